"""Numbers that lie, put there on purpose."""

import contextlib
import io
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from short_run import ONE_STEP, short_config, train

from step_grpo import checkpoint, guards, replay
from step_grpo import main as run
from step_grpo.errors import UserError
from step_grpo.grpo.loss import LossSums
from step_grpo.grpo.packing import Sample, pack, stack
from step_grpo.grpo.update import Measurements, TrainBatch, TrainState, _apply, adamw
from step_grpo.metrics import read_metrics

FINE = {
    "kl": 0.1,
    "sampler_gap": 0.01,
    "tokens": 100.0,
    "accuracy": 0.5,
    "formatted": 1.0,
    "truncated": 0.1,
    "equal_groups": 0.5,
    "grading_failures": 0.0,
}

# ---------------------------------------------------------------------- the update


@pytest.fixture(scope="module")
def apply():
    return jax.jit(lambda state, grads, sums: _apply(adamw(0.1), state, grads, sums))


def state() -> TrainState:
    params = {"w": jnp.arange(4.0), "b": jnp.ones(2)}
    moments = jax.tree.map(lambda x: x + 0.25 if x.dtype == jnp.float32 else x, adamw(0.1).init(params))
    return TrainState(jnp.int32(3), params, moments)


GRADS = {"w": jnp.ones(4), "b": jnp.full(2, 0.5)}
SUMS = LossSums(*(jnp.float32(2.0) for _ in LossSums._fields))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", ["gradient", *(name for name in LossSums._fields if name != "tokens")])
def test_update_that_is_not_finite_leaves_every_bit_as_it_was(apply, where, bad):
    grads, sums = GRADS, SUMS
    if where == "gradient":
        grads = {**GRADS, "w": GRADS["w"].at[2].set(bad)}
    else:
        sums = SUMS._replace(**{where: jnp.float32(bad)})
    after, measured = apply(state(), grads, sums)
    assert measured.skipped == 1
    same = jax.tree.map(lambda x, y: np.asarray(x).tobytes() == np.asarray(y).tobytes(), after, state())
    assert jax.tree.all(same)


def test_finite_update_is_made(apply):
    after, measured = apply(state(), GRADS, SUMS)
    assert (int(after.step), float(measured.skipped)) == (4, 0)
    assert not np.array_equal(after.params["w"], state().params["w"])


def measured(skipped: int, **fields) -> Measurements:
    values = dict.fromkeys(Measurements._fields, 1.0) | fields
    return Measurements(**{**values, "skipped": float(skipped)})


def test_means_are_over_the_updates_that_were_made():
    found = guards.averaged([measured(0, loss=2.0), measured(1, loss=np.nan), measured(0, loss=4.0)])
    assert (found["loss"], found["skipped_updates"], "skipped" in found) == (3.0, 1.0, False)
    assert np.isnan(guards.averaged([measured(1, loss=np.nan)])["loss"])


def batch(samples: int = 3) -> TrainBatch:
    parts = [
        Sample(np.array([5]), np.array([6, 7]), 1.0, np.zeros(2, np.float32), np.ones(2, np.float32))
        for _ in range(samples)
    ]
    packed = stack(pack(parts, row_length=4, rows=2), 3)
    return TrainBatch(packed, packed.mask * 2, packed.mask * 3)


def test_updates_in_a_row_are_counted_over_steps_and_stop_the_run(tmp_path):
    watch = guards.SkippedUpdates(tmp_path, short_config({"grpo": {"max_skipped": 3}}), in_a_row=1)
    for step, skipped, in_a_row in ((7, (1, 0), 0), (8, (0, 1), 1), (9, (1,), 2)):
        watch.look(step, [measured(s) for s in skipped], [batch()] * len(skipped))
        assert watch.in_a_row == in_a_row
        watch.stop_if_too_many()
    watch.look(10, [measured(1)], [batch()])
    with pytest.raises(
        UserError, match=r"3 updates in a row were not finite .config\.grpo\.max_skipped is 3"
    ):
        watch.stop_if_too_many()
    kept = sorted(path.name for path in (tmp_path / "bad").iterdir())
    assert kept == ["step-10.npz", "step-7.npz", "step-8.npz", "step-9.npz"]


def test_row_that_ends_within_its_step_stops_the_run_too(tmp_path):
    watch = guards.SkippedUpdates(tmp_path, short_config({"grpo": {"max_skipped": 2}}))
    watch.look(1, [measured(s) for s in (0, 1, 0, 1)], [batch()] * 4)
    watch.stop_if_too_many()
    watch.look(2, [measured(s) for s in (1, 1, 0, 0)], [batch()] * 4)
    assert watch.in_a_row == 0
    with pytest.raises(UserError, match="3 updates in a row were not finite"):  # one was of the step before
        watch.stop_if_too_many()


def test_kept_batch_comes_back_without_its_empty_rows(tmp_path):
    config = short_config()
    guards.write_batch(tmp_path / "bad" / "step-4.npz", 4, guards.to_arrays(batch()), config)
    step, settings, held = guards.read_batch(tmp_path / "bad" / "step-4.npz")
    assert (step, settings.rollout.samples, held.packed.tokens.shape) == (4, config.rollout.samples, (3, 4))
    np.testing.assert_array_equal(held.old_logprobs, held.packed.mask * 2)
    np.testing.assert_array_equal(np.sort(held.packed.sample_ids[:, 0]), [0, 1, 2])


def test_file_that_is_no_batch_is_refused_and_nothing_in_it_is_run(tmp_path):
    path = tmp_path / "step-1.npz"
    for content in (b"", b"PK\x03\x04junk"):
        path.write_bytes(content)
        with pytest.raises(UserError, match="is no batch that a run kept"):
            guards.read_batch(path)
    np.savez(path, step=np.array([print], object), allow_pickle=True)
    with pytest.raises(UserError, match="is no batch that a run kept"):
        guards.read_batch(path)


def test_faults_are_told_by_sample_and_token():
    packed = jax.tree.map(lambda x: x.reshape(-1, x.shape[-1]), batch(2).packed)
    values = np.zeros_like(packed.mask)
    values[0, 3] = np.nan  # no completion token is predicted there
    row = int(np.flatnonzero((packed.sample_ids == 1).any(axis=1))[0])
    place = int(np.flatnonzero((packed.sample_ids[row] == 1) & (packed.completion_index[row] == 1))[0])
    values[row, place] = np.inf
    assert list(replay.faults(packed, {"x": values})) == [replay.Fault(1, row, "x", [1])]


# ---------------------------------------------------------------------- a whole run


def test_run_skips_counts_keeps_and_replays_a_poisoned_batch(tmp_path, monkeypatch):
    """The second of two updates has a log-prob that is no number; the run goes on without it.

    Its completions are cut off before any answer, and it says so.
    """
    real = run.training_samples

    def poisoned(scored, advantages, config):
        samples = real(scored, advantages, config)
        samples[-1].sampler_logprobs[3] = np.nan
        return samples

    monkeypatch.setattr(run, "training_samples", poisoned)
    two = {
        "prompts_per_step": 2,
        "rollout": {"samples": 2, "max_response_tokens": 8},
        "grpo": {"row_length": 96},
        "eval": {"questions": 2, "max_response_tokens": 8},
    }
    done = train(short_config(ONE_STEP, two), tmp_path)
    (line,) = read_metrics(tmp_path / "metrics.jsonl")
    assert line["skipped_updates"] == 1
    assert all(value is not None for value in line.values())
    (file,) = (tmp_path / "bad").iterdir()
    for warning in ("every group has equal rewards", "no answer is correct", "100% of the completions take"):
        assert f"warning: step 1: {warning}" in done.printed
    assert "an update is not finite and was skipped; look with python -m step_grpo.replay" in done.printed
    assert checkpoint.read_run(tmp_path / "checkpoints" / "000001")["skipped"] == 1

    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        replay.main(tmp_path, str(file))
    text = printed.getvalue()
    assert "weights: builtin:tiny" in text
    assert re.search(r"sample 1 \(row \d\): sampler's log-prob not finite at completion tokens 3\n", text)
    assert text.endswith("1 samples have figures that are not finite\n")
    assert "computed again" not in text  # those are fine

    command = [sys.executable, "-m", "step_grpo.replay", f"--workdir={tmp_path}", f"--batch={file}"]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == text


# ---------------------------------------------------------------------- warnings


def test_run_that_drifts_samples_inexactly_and_is_paid_for_silence_says_so(
    tmp_path, monkeypatch, finished_run
):
    """Steps far too long, a sampler that rounds what it caches, and a reward that counts tokens alone."""
    module = "def silence(completions):\n    return -completions.tokens / 10.0\n"
    (tmp_path / "paid_for_silence.py").write_text(module)
    monkeypatch.syspath_prepend(tmp_path)
    bounds = {"warn": {"kl": 0.02, "sampler_gap": 1e-4, "length": 0.9}}
    faults = {
        "reward": {"functions": ("paid_for_silence:silence",)},
        "rollout": {"exit": "none", "cache_dtype": "int8"},
        "grpo": {"learning_rate": 1e-3, "prompts_per_update": 4},
        "eval": {"questions": 4},
    }
    done = train(short_config(bounds, faults), tmp_path / "workdir")
    first, second = done.metrics
    assert first["kl"] == 0 < bounds["warn"]["kl"] < second["kl"]
    assert second["tokens"] < 0.9 * first["tokens"]
    assert max(line["sampler_gap"] for line in finished_run.metrics) < 1e-5  # where nothing is rounded
    said = [line for line in done.printed.splitlines() if line.startswith("warning: ")]
    for warning in (
        "step 1: sampler and trainer differ by",
        f"step 2: the KL to the first policy is {second['kl']:.3g} nats a token",
        "step 2: sampler and trainer differ by",
        f"step 2: completions have {second['tokens']:.0f} tokens, in the first step {first['tokens']:.0f}",
    ):
        assert sum(line.startswith(f"warning: {warning}") for line in said) == 1, (warning, said)
    assert not any("step 1: the KL" in line or "step 1: completions have" in line for line in said)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"kl": 0.51}, "KL .* config.warn.kl=0.5: look at config.grpo.learning_rate"),
        ({"sampler_gap": 0.06}, "sampler and trainer differ .* look at config.model.dtype"),
        ({"accuracy": 0.0}, "no answer is correct: look at the completions"),
        ({"tokens": 19.0}, "19 tokens, in the first step 100, .* config.warn.length=0.2: look at"),
        ({"truncated": 0.9}, "90% of the completions take the whole budget"),
        ({"equal_groups": 1.0}, r"every group has equal rewards \(accuracy 50.0%, formatted 100.0%\)"),
        ({"grading_failures": 3.0}, "3 answers could not be graded"),
        ({"kl": float("nan"), "sampler_gap": float("nan")}, None),
        ({"kl": 0.5, "sampler_gap": 0.05, "tokens": 20.0, "truncated": 0.89}, None),
    ],
)
def test_oddity_is_one_line_that_says_where_to_look(change, said):
    found = guards.oddities(FINE | change, 100.0, short_config().warn)
    assert len(found) == (said is not None)
    assert said is None or re.search(said, found[0])
    assert not any("\n" in line for line in found)
