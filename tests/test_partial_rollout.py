"""What an interrupted rollout leaves for the run that goes on, and files that must not count."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from short_run import short_config

from step_grpo.data.prompts import EncodedPrompt
from step_grpo.data.sources import Question
from step_grpo.partial_rollout import PartialRollout, facts_of
from step_grpo.rollout.engine import Completion

FACTS = {"key": [0, 1], "weights": "abc"}


def completion(prompt: int, sample: int, tokens: int) -> Completion:
    rng = np.random.default_rng(tokens)
    return Completion(
        prompt=prompt,
        sample=sample,
        tokens=rng.integers(0, 99, tokens, dtype=np.int32),
        logprobs=rng.random(tokens, dtype=np.float32),
        forced=rng.random(tokens) < 0.5,
        reason="budget",
        confidences=rng.random(tokens % 3, dtype=np.float32),
        probe_tokens=tokens,
    )


ROUNDS = {0: [completion(0, 1, 5), completion(1, 0, 3)], 4: [completion(0, 0, 7)]}


def assert_equal(found: Completion, there: Completion) -> None:
    for name, value in vars(there).items():
        np.testing.assert_array_equal(getattr(found, name), value, err_msg=name)
        assert getattr(getattr(found, name), "dtype", None) == getattr(value, "dtype", None)


def interrupt(path, facts=FACTS) -> None:
    """A rollout that has finished `ROUNDS` when something ends it."""
    with pytest.raises(KeyboardInterrupt), PartialRollout(path, lambda: facts) as kept:
        for cursor, completions in ROUNDS.items():
            for one in completions:
                kept.add(cursor, [one])
        raise KeyboardInterrupt


@pytest.fixture
def path(tmp_path):
    return tmp_path / "partial_rollout" / "step_000003-0.npz"


def test_finished_completions_come_back_bit_for_bit_and_the_file_goes_once_used(path, capsys):
    interrupt(path)
    with PartialRollout(path, lambda: dict(FACTS)) as kept:
        for cursor, completions in ROUNDS.items():
            found = kept.of_round(cursor)
            assert len(found) == len(completions)
            for one, there in zip(found, completions, strict=True):
                assert_equal(one, there)
        assert kept.of_round(8) == []
        assert path.exists()
    assert not path.exists() and capsys.readouterr().out == ""


def test_second_interruption_adds_to_the_first(path):
    interrupt(path)
    with pytest.raises(ValueError, match="gone"), PartialRollout(path, lambda: FACTS) as kept:
        kept.add(4, [completion(1, 1, 6)])
        raise ValueError("gone")
    with PartialRollout(path, lambda: FACTS) as kept:
        assert [(c.prompt, c.sample) for c in kept.of_round(4)] == [(0, 0), (1, 1)]
        assert len(kept.of_round(0)) == 2


def test_rollout_interrupted_before_anything_is_finished_leaves_nothing(path):
    with pytest.raises(KeyboardInterrupt), PartialRollout(path, lambda: FACTS):
        raise KeyboardInterrupt
    assert not path.parent.exists()


def cut(path) -> None:
    path.write_bytes(path.read_bytes()[:-30])


def flip(path) -> None:
    data = bytearray(path.read_bytes())
    data[data.index(ROUNDS[0][0].tokens.tobytes())] ^= 1
    path.write_bytes(bytes(data))


def empty(path) -> None:
    path.write_bytes(b"")


def pickled(path) -> None:
    np.savez(path, facts=np.array([print], object), allow_pickle=True)


@pytest.mark.parametrize("damage", [cut, flip, empty, pickled])
def test_damaged_file_is_left_out_with_one_line(path, damage, capsys):
    interrupt(path)
    damage(path)
    with PartialRollout(path, lambda: FACTS) as kept:
        assert not any(kept.of_round(cursor) for cursor in ROUNDS)
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"warning: {path} is damaged (") and line.endswith("; it is left out")


def test_file_of_another_rollout_is_left_out_with_what_differs(path, capsys):
    interrupt(path, {**FACTS, "weights": "of another policy"})
    assert PartialRollout(path, lambda: FACTS).of_round(0) == []
    assert (
        capsys.readouterr().out == f"warning: {path} is of another rollout (other weights); it is left out\n"
    )


def test_rollout_that_comes_to_its_end_writes_and_asks_nothing(path):
    def never() -> dict:
        raise AssertionError("the weights were looked at")

    with PartialRollout(path, never) as kept:
        kept.add(0, ROUNDS[0])
    assert not path.parent.exists()


def test_folder_that_cannot_be_written_does_not_hide_what_happened(tmp_path, capsys):
    (tmp_path / "partial_rollout").write_text("a file is in the way")
    interrupt(tmp_path / "partial_rollout" / "step_000003-0.npz")
    assert "cannot be written (" in capsys.readouterr().out


def test_facts_differ_wherever_a_completion_may(monkeypatch):
    prompt = EncodedPrompt(Question("a", "1+1", "2"), (1, 2))
    other_answer = EncodedPrompt(Question("a", "1+1", "3"), (1, 2))
    params = {"w": jnp.arange(12.0).reshape(3, 4), "b": jnp.zeros(())[None]}
    moved = {**params, "w": params["w"].at[0, 2].add(1e-3)}
    key, config = jax.random.key(3), short_config()
    usual = facts_of(params, key, [prompt], config)
    assert usual == facts_of(jax.tree.map(jnp.copy, params), key, [prompt], short_config({"steps": 77}))
    for name, facts in {
        "weights": facts_of(moved, key, [prompt], config),
        "key": facts_of(params, jax.random.fold_in(key, 1), [prompt], config),
        "questions": facts_of(params, key, [other_answer], config),
        "config": facts_of(params, key, [prompt], short_config({"rollout": {"delta": 0.5}})),
    }.items():
        assert [field for field in usual if usual[field] != facts[field]] == [name]
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    assert facts_of(params, key, [prompt], config)["process"] != usual["process"]
