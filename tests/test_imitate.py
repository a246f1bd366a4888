"""Fine-tuning on a model's own truncated completions: which are kept, the loss, and what is refused."""

from collections import Counter
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict
from short_run import read_records, short_config

from step_grpo import imitate
from step_grpo.errors import UserError
from step_grpo.grpo.packing import Sample, pack
from step_grpo.imitate import fine_tune, kept, sample, shuffled
from step_grpo.mesh import make_mesh, mesh_of
from step_grpo.model import qwen
from step_grpo.model.load import Description, load_model
from step_grpo.sft import supervised, train_step

SMALL = qwen.QwenConfig(
    vocab_size=11, width=16, layers=2, heads=2, kv_heads=1, head_dim=8, ffn=16, rope_theta=1e4,
    rms_eps=1e-6, tied=False, qk_norm=True, qkv_bias=False, init_std=0.35,
)  # fmt: skip


def some_samples(weights: bool) -> list[Sample]:
    """Of several lengths, with weights of their own where they are a verifier's verdicts."""
    rng = np.random.default_rng(0)
    found = []
    for prompt, completion in ((3, 5), (1, 1), (6, 2), (2, 9), (4, 4)):
        tokens = rng.integers(11, size=prompt + completion)
        one = supervised(tuple(tokens[:prompt]), tokens[prompt:].tolist())
        mask = rng.uniform(0.2, 2.0, completion).astype(np.float32) if weights else one.loss_mask
        found.append(Sample(one.prompt_ids, one.completion_ids, 1.0, one.sampler_logprobs, mask))
    return found


def restated_loss(params: qwen.Params, samples: list[Sample]) -> float:
    """`sum(w * -log p) / sum(w)` over completion tokens, one by one, in float64 from the logits on."""
    total = weight = 0.0
    for one in samples:
        tokens = np.concatenate([one.prompt_ids, one.completion_ids])
        places = np.arange(len(tokens))[None]
        hidden = qwen.forward(
            params, SMALL, jnp.array(tokens[None]), jnp.array(places), jnp.ones_like(places), jnp.float32
        )
        logits = np.asarray(hidden[0], np.float64) @ np.asarray(params["head_DV"], np.float64)
        logprobs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        first = len(one.prompt_ids)
        for place, (token, counted) in enumerate(zip(one.completion_ids, one.loss_mask, strict=True)):
            total -= counted * logprobs[first - 1 + place, token]
            weight += counted
    return total / weight


@pytest.mark.parametrize("weights", [False, True], ids=["completions", "verdicts"])
def test_loss_and_its_step_equal_the_restatement(weights):
    """The loss of DEER+SFT and, with weights, of FlashThink's verifier.

    Along a step of `-rate * gradient` the loss falls by `|step|^2 / rate`, which it does along no other of
    that length.
    """
    params, samples = qwen.init_params(SMALL, 0), some_samples(weights)
    (batch,) = pack(samples, row_length=16, rows=4)  # several sequences share a row
    rate = 1e-2
    optimizer = optax.sgd(rate)
    after, _, loss = jax.jit(lambda *state: train_step(SMALL, "float32", optimizer, *state))(
        params, optimizer.init(params), batch
    )
    assert float(loss) == pytest.approx(restated_loss(params, samples), rel=1e-5)
    moved = jax.tree.map(jnp.subtract, after, params)
    before = jax.tree.map(jnp.subtract, params, moved)
    fall = (restated_loss(before, samples) - restated_loss(after, samples)) / 2
    assert fall == pytest.approx(float(optax.tree.norm(moved)) ** 2 / rate, rel=1e-2)


def test_right_completions_that_a_probe_ended_are_kept_whole():
    def scored(number: int, correct: bool, reason: str) -> SimpleNamespace:
        completion = SimpleNamespace(tokens=np.array([number, 7]), reason=reason)
        prompt, grade = SimpleNamespace(ids=(number, 1)), SimpleNamespace(correct=correct)
        return SimpleNamespace(prompt=prompt, grade=grade, completion=completion)

    reasons = ("early_exit", "natural", "budget", "length")
    cases = [(correct, reason) for correct in (True, False) for reason in reasons]
    (found,) = kept([scored(number, *case) for number, case in enumerate(cases)])
    assert found.prompt_ids.tolist() == [0, 1]
    assert found.completion_ids.tolist() == [0, 7]
    assert found.loss_mask.tolist() == [1, 1]


def test_every_epoch_has_each_completion_once_in_another_order():
    config = short_config({"grpo": {"row_length": 192}})
    samples = [supervised((1,), [number + 2] * 60) for number in range(20)]

    def numbers(epochs: int) -> list[int]:
        batches = shuffled(samples, config, epochs, rows=2)
        rows = [np.unique(row[row > 1]).tolist() for batch in batches for row in batch.tokens]
        return [number for row in rows for number in row]

    two = numbers(2)
    assert Counter(two) == dict.fromkeys(range(2, 22), 2)
    assert two[:20] == numbers(1) and two[:20] != two[20:]


def test_batch_has_a_size_of_its_own(tmp_path, monkeypatch):
    """`grpo.rows` is free to change, for in an update it changes nothing but rounding; here it would."""
    asked = []

    def one_batch(samples, config, epochs, rows):
        asked.append((epochs, rows))
        return iter(pack(samples, row_length=16, rows=4))

    monkeypatch.setattr(imitate, "shuffled", one_batch)
    config = short_config({"grpo": {"rows": 8}})
    described = Description(SMALL, {}, {}, (0,), None)
    for rows in (4, 0):
        settings = ConfigDict({"rows": rows, "epochs": 3, "learning_rate": 1e-3})
        params = qwen.init_params(SMALL, 0)
        fine_tune(described, params, some_samples(False), config, settings, make_mesh(2), tmp_path)
    assert asked == [(3, 4), (3, 2)]


def test_it_samples_what_the_first_step_of_a_training_samples(finished_run):
    config = finished_run.config.copy_and_resolve_references().unlock()
    config.steps = 1
    mesh = mesh_of(config.mesh, config.rollout.lanes, config.imitation.rows)
    described, params = load_model(config.model, config.seed, mesh)
    found = sample(described, params, config.lock(), mesh)
    rows = [row for row in read_records(finished_run.workdir / "rollouts.jsonl") if row["step"] == 1]
    texts = {(row["id"], row["sample"]): "".join(p.get("text", "") for p in row["segments"]) for row in rows}
    sampled = {(s.prompt.question.id, s.completion.sample): s.text for s in found}
    assert texts and texts.items() <= sampled.items()  # the log has some of the completions


def test_what_gives_nothing_to_imitate_is_refused(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"config\.rollout\.exit is 'none': nothing is cut short"):
        imitate.main(short_config({"rollout": {"exit": "none"}}), tmp_path)
    with pytest.raises(UserError, match=r"config\.lora\.rank is above 0; .* set it to 0"):
        imitate.main(short_config({"lora": {"rank": 2}}), tmp_path)
    monkeypatch.setattr(imitate, "sample", lambda *_: [])
    with pytest.raises(UserError, match="none of 0 completions was cut short and right: lower"):
        imitate.main(short_config(), tmp_path)
