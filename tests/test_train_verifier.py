"""The verifier's training: where thoughts are cut, how prefixes are labelled, what the verifier reads."""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from short_run import short_config

from step_grpo import evaluate, train_verifier
from step_grpo.data.prompts import EncodedPrompt
from step_grpo.data.sources import Question
from step_grpo.data.tiny_tokenizer import build_tokenizer
from step_grpo.errors import UserError
from step_grpo.mesh import make_mesh
from step_grpo.model import qwen
from step_grpo.model.load import Description
from step_grpo.reward.grading import Grade
from step_grpo.rollout import programs
from step_grpo.rollout.engine import Completion, RolloutEngine
from step_grpo.rollout.phases import Machine
from step_grpo.rollout.policies import Judge, Verifier
from step_grpo.rollout.triggers import build_delimiters, build_vocabulary
from step_grpo.scoring import Scored
from step_grpo.train_verifier import (
    HELD_OUT,
    Prefix,
    area_under_curve,
    check_room,
    delimiter_ends,
    draw_prefixes,
    label,
    set_aside,
    verdict_odds,
    verdict_samples,
    write_prefixes,
)

TEXTS = [b"<eos>", b"</think>", b"Wait", b" a", b"b", b"c", b"\n", b"b\n"]
SMALL = qwen.QwenConfig(
    vocab_size=len(TEXTS), width=16, layers=1, heads=2, kv_heads=1, head_dim=8, ffn=16, rope_theta=1e4,
    rms_eps=1e-6, tied=False, qk_norm=True, qkv_bias=False, init_std=0.35,
)  # fmt: skip
POLICY = Verifier(question=(6, 3), yes=(4, 7), no=(5,), threshold=0.6, judge=Judge(SMALL, prefix=(5, 3)))
TINY = build_tokenizer()


@pytest.fixture(name="described")
def tiny_description() -> Description:
    cfg = dataclasses.replace(SMALL, vocab_size=len(TINY))
    return Description(cfg, {}, {}, (TINY.eos_token_id,), TINY)


def tiny_config(**fields):
    verifier = {"delimiters": ("\n",), "question": "?"}
    words = {"yes_words": (" yes", ", yes"), "no_words": (" no", ", not ")}
    return short_config({"rollout": {"verifier": verifier, **words}}, fields)


def prompt(name: str, answer: str = "7") -> EncodedPrompt:
    return EncodedPrompt(Question(name, f"{name}?", answer), tuple(ids(name)))


def ids(text: str) -> list[int]:
    return TINY.encode(text, add_special_tokens=False)


def thought(asked: EncodedPrompt, text: str, sample: int = 0) -> Scored:
    tokens = np.array(ids(text), np.int32)
    zero = np.zeros(len(tokens), np.float32)
    completion = Completion(0, sample, tokens, zero, zero > 0, "natural", zero[:0], 0)
    return Scored(asked, completion, text, Grade(True, True), 1)


# ---------------------------------------------------------------------- where thoughts are cut

PIECES = [b"\n", b"\n\n", b".\n\n", b"\n\n\n", b"a", b"a\n", b"", b"</think>"]
TABLE = jax.tree.map(np.asarray, build_delimiters(PIECES, ("\n\n",)))


@given(st.lists(st.integers(0, len(PIECES) - 1), max_size=30))
def test_prefixes_end_where_a_regex_finds_a_delimiter_in_the_thinking(tokens):
    end = len(PIECES) - 1
    thinking = tokens[: tokens.index(end)] if end in tokens else tokens
    text = b"".join(PIECES[t] for t in thinking)
    found = {match.end() for match in re.finditer(rb"\n\n", text)}
    lengths = np.cumsum([0, *(len(PIECES[t]) for t in thinking)])
    expected = [
        i + 1 for i in range(len(thinking)) if any(lengths[i] < stop <= lengths[i + 1] for stop in found)
    ]
    assert delimiter_ends(tokens, TABLE, {end}) == expected


def test_prefixes_are_lines_of_the_thinking_that_the_policy_would_judge(described):
    config = tiny_config(verifier_training={"prefixes": 2}, rollout={"max_probes": 4}, seed=5)
    lines = ["<think>\n", "1+2=3.\n", "3+4=7.\n", "Wait, check: 1+2=3, yes.\n", "Wait\n", "Wait.\n"]
    text = "".join(lines) + "</think>\n\nThe answer is \\boxed{7}.\n"
    asked = [prompt("a"), prompt("b")]
    scored = [thought(p, text, i) for p in asked for i in range(40)]
    prefixes = draw_prefixes(scored, described, config)
    expected = {tuple(ids("".join(lines[:n]))) for n in range(1, 5)}
    for p in asked:  # each of the first four once, though many completions share them
        own = [prefix.tokens for prefix in prefixes if prefix.prompt == p]
        assert len(own) == 4 and set(own) == expected
    assert draw_prefixes(scored, described, config) == prefixes
    one = draw_prefixes(scored[:1], described, config)
    assert len(one) == 2 and len(draw_prefixes([thought(asked[0], "1+2")], described, config)) == 0


# ---------------------------------------------------------------------- labels


class Answers:
    """Stands for the engine: answers each prompt with a text of its own, and notes what it is asked."""

    def __init__(self, texts):
        self.texts, self.asked = texts, []

    def __call__(self, params, prompts, samples, key, on_progress, limits):
        assert samples == 1
        self.asked += list(zip(prompts, limits, strict=True))
        zero = np.zeros(1, np.float32)
        answers = [np.array(ids(self.texts[TINY.decode(p)]), np.int32) for p in prompts]
        return [Completion(i, 0, a, zero, zero > 0, "eos", zero, 0) for i, a in enumerate(answers)], None


def test_label_is_whether_the_answer_behind_the_closed_prefix_is_right(described, monkeypatch):
    config = tiny_config()
    answer_of = {
        ("a", "<think>\n1+2=3.\n"): ("The answer is \\boxed{7}.", True),
        ("a", "<think>\n"): ("The answer is \\boxed{8}.", False),
        ("b", "<think>\n"): ("I do not know.", False),
        ("b", "<think>\n\\boxed{9}.\n"): ("So.", True),  # the last box counts, wherever it stands
        ("b", "<think>\n\\boxed{9}\n"): ("The answer is \\boxed{7}.", False),
    }
    asked = {"a": prompt("a", "7"), "b": prompt("b", "9")}
    prefixes = [Prefix(asked[name], tuple(ids(text))) for name, text in answer_of]
    engine = Answers({f"{n}{text}\n</think>\n\n": said for (n, text), (said, _) in answer_of.items()})
    settings = {}
    monkeypatch.setattr(
        evaluate, "build_engine", lambda *a, **named: settings.update(named, rollout=a[1]) or engine
    )
    monkeypatch.setattr(train_verifier, "decode_ready", lambda *a: None)
    suffices = label(described, None, prefixes, config, make_mesh(1))
    assert suffices.tolist() == [right for _, right in answer_of.values()]
    assert settings["temperature"] == 0 and not settings["truncate"]
    for (tokens, limit), prefix in zip(engine.asked, prefixes, strict=True):
        assert len(tokens) <= settings["rollout"].max_prompt_tokens
        written = len(tokens) - len(prefix.prompt.ids)
        assert limit + written == config.rollout.max_response_tokens and limit <= settings["max_response"]


# ---------------------------------------------------------------------- what the verifier reads


def test_verifier_is_trained_on_what_it_reads_in_the_decode_loop(monkeypatch):
    """A whole forward pass over a prefix gives the scores that the engine's verifier gave at its end."""
    monkeypatch.setattr(programs, "CAPACITY_LEVELS", 1)  # a growing cache is tested elsewhere
    policy = Verifier(**{**vars(POLICY), "threshold": 1.0})  # never ends the thinking
    machine = Machine(
        policy=policy, max_response=32, think_budget=32, budget_margin=0, max_probes=6, max_repetitions=9,
        temperature=2.0, top_p=1.0, think_end=1, eos=(0,), closing=(6, 1, 6),
    )  # fmt: skip
    params = qwen.init_params(SMALL, 0)
    vocab = build_vocabulary(TEXTS, ("Wait",), ("\n",))
    engine = RolloutEngine(
        SMALL, machine, vocab, lanes=4, max_prompt=4, dtype=jnp.float32, mesh=make_mesh(1),
        judge_params=policy.judge_params(params, jnp.float32),
    )  # fmt: skip
    asked = [EncodedPrompt(Question(str(i), "", ""), tokens) for i, tokens in enumerate([(5, 3, 4), (7,)])]
    ready = qwen.decode_params(params, jnp.float32)
    completions, _ = engine(ready, [p.ids for p in asked], 16, jax.random.key(0))
    plain = [c for c in completions if c.reason in ("natural", "eos") and not c.forced.any()]
    delimiters = jax.tree.map(np.asarray, vocab.delimiters)
    ends = [delimiter_ends(c.tokens.tolist(), delimiters, {0, 1})[: machine.max_probes] for c in plain]
    prefixes = [
        Prefix(asked[c.prompt], tuple(c.tokens[:n].tolist()))
        for c, own in zip(plain, ends, strict=True)
        for n in own
    ]
    given = np.concatenate([c.confidences for c in plain])
    assert len(given) > 10 and [len(c.confidences) for c in plain] == [len(own) for own in ends]
    config = short_config({"model": {"attention": "xla"}, "grpo": {"row_length": 192}})
    described = Description(SMALL, {}, {}, (0,), None)
    odds = verdict_odds(described, policy, prefixes, config, make_mesh(1), params)
    np.testing.assert_allclose(jax.nn.sigmoid(odds), given, atol=2e-5)


def test_verdicts_are_one_token_each_and_weigh_the_same_together():
    rollout = tiny_config().rollout
    yes, no = ids(", yes")[0], ids(", not ")[0]
    policy = Verifier(question=(1, 2), yes=(yes,), no=(no,), threshold=0.5, judge=Judge(SMALL, (3,)))
    prefixes = [Prefix(prompt("a"), tuple(range(4, 5 + n))) for n in range(5)]
    suffices = np.array([True, True, False, True, True])
    samples = verdict_samples(policy, prefixes, suffices, TINY, rollout)
    assert [s.completion_ids.tolist() for s in samples] == [[yes if enough else no] for enough in suffices]
    for s, prefix in zip(samples, prefixes, strict=True):
        assert s.prompt_ids.tolist() == [3, *prefix.prompt.ids, *prefix.tokens, 1, 2]
    weights = np.concatenate([s.loss_mask for s in samples])
    assert weights[suffices].sum() == pytest.approx(weights[~suffices].sum())
    assert weights.mean() == pytest.approx(1)
    with pytest.raises(UserError, match="none of 5 prefixes suffice"):
        verdict_samples(policy, prefixes, np.zeros(5, bool), TINY, rollout)


def test_held_out_prompts_share_no_prefix_with_the_trained_ones():
    prefixes = [Prefix(prompt(f"p{i % 20}"), (i,)) for i in range(100)]
    held_out = set_aside(prefixes)
    names = [{p.prompt.question.id for p, aside in zip(prefixes, held_out, strict=True) if aside == kind}
             for kind in (False, True)]  # fmt: skip
    assert not names[0] & names[1] and len(names[1]) == 20 // HELD_OUT


def test_rows_too_short_for_the_question_are_refused():
    config = tiny_config(grpo={"row_length": 192})
    policy = Verifier(question=(1,) * 40, yes=(2,), no=(3,), threshold=0.5, judge=Judge(SMALL, ()))
    with pytest.raises(UserError, match=r"config\.grpo\.row_length is 192, .* up to 217 tokens"):
        check_room(policy, config)


# ---------------------------------------------------------------------- how good it is

SCORED = st.lists(st.tuples(st.integers(-3, 3), st.booleans()), min_size=1, max_size=20)


@given(SCORED)
def test_area_under_curve_is_the_share_of_pairs_in_order(pairs):
    yes, no = ([score for score, positive in pairs if positive == kind] for kind in (True, False))
    wins = [(a > b) + 0.5 * (a == b) for a in yes for b in no]
    found = area_under_curve(np.array([s for s, _ in pairs]), np.array([p for _, p in pairs]))
    assert found == (pytest.approx(np.mean(wins)) if wins else None)


def test_record_of_a_prefix_holds_its_label(tmp_path):
    prefixes = [Prefix(prompt("a"), tuple(ids("1+2=3.\n"))), Prefix(prompt("b"), tuple(ids("\n")))]
    path = tmp_path / "prefixes.jsonl"
    write_prefixes(path, prefixes, np.array([True, False]), np.array([False, True]), TINY)
    first, second = map(json.loads, path.read_text().splitlines())
    assert first["text"] == "1+2=3.\n" and first["suffices"] and not first["held_out"]
    assert second["id"] == "b" and not second["suffices"] and second["held_out"]
