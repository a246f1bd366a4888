"""The update's benchmark, tiny: its last line, its sides' agreement, and its counts against brute force."""

import json
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from benchmarks import update
from benchmarks.update_peers import Scored, pad_for_trl, pad_right
from step_grpo.grpo.packing import Sample, pack, unpack
from step_grpo.model import qwen

SIZES = """--prompts=2 --samples=2 --median=12 --longest=24 --rows=2 --row_length=64
    --repeats=1 --threads 1 --product=512"""
CFG = qwen.QwenConfig(
    vocab_size=11,
    width=6,
    layers=2,
    heads=4,
    kv_heads=2,
    head_dim=8,
    ffn=10,
    rope_theta=1e4,
    rms_eps=1e-6,
    tied=True,
    qk_norm=True,
    qkv_bias=False,
)


def scored_samples():
    rng = np.random.default_rng(0)
    batch = []
    for p, c in [(3, 5), (1, 9), (4, 2), (2, 1), (5, 7)]:
        zeros, ones = np.zeros(c, np.float32), np.ones(c, np.float32)
        sample = Sample(rng.integers(1, 11, p), rng.integers(1, 11, c), rng.normal(), zeros, ones)
        batch.append(Scored(sample, rng.random(c).astype(np.float32), rng.random(c).astype(np.float32)))
    return batch


def test_update_tells_every_ratio_after_all_sides_agreed(capsys):
    result = update.main(SIZES.split())
    assert result == json.loads(capsys.readouterr().out.splitlines()[-1])
    for name in ("speed_vs_padded", "memory_vs_padded", "speed_vs_trl", "matmul_peak_share"):
        assert 0 < result[name]["low"] <= result[name]["median"] <= result[name]["high"]
        assert (name in result["below_goal"]) == (result[name]["median"] < update.GOALS.get(name, 0))
    assert set(result["agreement"]) == {"loss_padded", "gradient_padded", "loss_trl", "gradient_trl"}
    assert max(result["agreement"].values()) <= update.TOLERANCE
    ratio = result["memory"]["padded"] / result["memory"]["ours"]
    assert result["memory_vs_padded"]["median"] == pytest.approx(ratio, rel=1e-3)


@pytest.mark.parametrize("wrong", ["loss", "gradient", "nan"])
def test_sides_that_disagree_stop_the_run(wrong):
    def side(loss, grads):
        return SimpleNamespace(gradient=lambda few: (loss, {"w": np.array(grads), "b": np.ones(3)}))

    right = side(2.0, [1.0, 2.0])
    other = {
        "loss": side(2.001, [1.0, 2.0]),
        "gradient": side(2.0, [1.0, 2.001]),
        "nan": side(2.0, [1.0, np.nan]),
    }
    assert max(update.check_agreement(SimpleNamespace(batch=[]), right, right, right).values()) == 0
    for padded, trl in [(other[wrong], right), (right, other[wrong])]:
        with pytest.raises(SystemExit, match="do not compute the same"):
            update.check_agreement(SimpleNamespace(batch=[]), right, padded, trl)


def test_useful_flops_are_those_of_every_product_written_out():
    batch = [scored.sample for scored in scored_samples()]
    flops = 0
    for sample in batch:
        for position in range(len(sample)):
            for _ in range(CFG.layers):
                for rows, columns in [
                    (6, 4 * 8),
                    (6, 2 * 8),
                    (6, 2 * 8),
                    (4 * 8, 6),
                    (6, 10),
                    (6, 10),
                    (10, 6),
                ]:
                    flops += 2 * rows * columns
                flops += sum(2 * 2 * CFG.heads * CFG.head_dim for _ in range(position + 1))
        flops += len(sample.completion_ids) * 2 * 6 * 11
    assert update.useful_flops(CFG, batch) == 3 * flops


def test_figures_are_placed_where_unpack_finds_them():
    batch = scored_samples()
    packed = pack([s.sample for s in batch], row_length=16, rows=1)
    placed = [update.place([s.old for s in batch], rows) for rows in packed]
    for found, scored in zip(unpack(placed, packed), batch, strict=True):
        np.testing.assert_array_equal(found, scored.old)
    for values, rows in zip(placed, packed, strict=True):
        assert not values[rows.completion_index < 0].any()


def test_every_layout_holds_the_same_tokens():
    batch = scored_samples()
    right = [x for part in pad_right(batch, rows=2, width=12) for x in zip(*part, strict=True)]
    trl = [x for part in pad_for_trl(batch, rows=2, prompt=5, completion=9) for x in zip(*part, strict=True)]
    for scored, (tokens, targets, mask, advantages, old, ref) in zip(batch, right, strict=False):
        s = scored.sample
        assert [*tokens[: len(s)]] == [*s.prompt_ids, *s.completion_ids] and not tokens[len(s) :].any()
        trained = mask > 0
        assert [*targets[trained]] == [*s.completion_ids] and (
            advantages[trained] == np.float32(s.advantage)
        ).all()
        assert [*old[trained]] == [*scored.old] and [*ref[trained]] == [*scored.ref]
    for scored, (prompt, seen, completion, counts, advantage, old, ref) in zip(batch, trl, strict=True):
        s = scored.sample
        assert [*prompt[seen > 0]] == [*s.prompt_ids] and [*completion[counts > 0]] == [*s.completion_ids]
        assert [*old[counts > 0]] == [*scored.old] and [*ref[counts > 0]] == [*scored.ref]
        assert seen[-1] == counts[0] == 1 and advantage == np.float32(s.advantage)


def test_memory_counts_arguments_results_and_the_moments_beside_them():
    x = jax.numpy.zeros((256, 256))
    program = jax.jit(lambda a, b: a @ b).lower(x, x).compile()
    assert update.alive(program) >= 3 * x.nbytes
    reused = jax.jit(lambda a, b: a + b, donate_argnums=0).lower(x, x).compile()
    assert update.alive(reused) == 2 * x.nbytes
    job = SimpleNamespace(state=SimpleNamespace(opt_state=(x, x)), mesh=SimpleNamespace(size=2))
    assert update.Programs(reused, reused).peak_bytes(job) == 2 * (2 + 2) * x.nbytes
