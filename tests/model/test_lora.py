"""Adapters beside frozen weights: products, gradients, the rollout, and a run that trains nothing else."""

import functools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from short_run import short_config, train

from step_grpo import checkpoint
from step_grpo.config import LORA_TARGETS
from step_grpo.grpo.packing import PackedBatch, Sample, pack
from step_grpo.grpo.settings import GrpoSettings
from step_grpo.grpo.update import TrainBatch, Update, adamw, make_update
from step_grpo.model import lora, qwen
from step_grpo.model.cache import empty_cache
from step_grpo.model.linear import Adapted, dense, product
from step_grpo.model.weights import RULES

SIZES = {
    "vocab_size": 4099, "width": 12, "layers": 2, "heads": 4, "kv_heads": 2, "head_dim": 6, "ffn": 10,
    "rope_theta": 1e4, "rms_eps": 1e-6, "init_std": 0.2,
}  # fmt: skip
CONFIGS = {
    "qwen3": qwen.QwenConfig(**SIZES, tied=True, qk_norm=True, qkv_bias=False),
    "qwen2": qwen.QwenConfig(**SIZES, tied=False, qk_norm=False, qkv_bias=True),
}
RANK, SCALE = 3, 1.5
TINY = {"lora": {"rank": 4, "alpha": 8.0}, "grpo": {"learning_rate": 1e-3}}


@pytest.fixture(params=CONFIGS)
def cfg(request):
    return CONFIGS[request.param]


@functools.cache
def base_of(cfg):
    return qwen.init_params(cfg, 0)


def trained_adapter(cfg):
    """An adapter whose `b` is no longer zero."""
    rng = np.random.default_rng(7)
    adapter = lora.init_adapter(cfg, RANK, LORA_TARGETS, 0)
    return jax.tree.map(lambda w: jnp.asarray(w + 0.1 * rng.normal(size=w.shape), jnp.float32), adapter)


def merged(base, adapter):
    """`w + scale * a b` of every layer, as matrices in NumPy."""
    layers = {name: np.array(w) for name, w in base["layers"].items()}
    for name, pair in adapter["layers"].items():
        a, b = np.array(pair["a"], np.float64), np.array(pair["b"], np.float64)
        for i in range(len(a)):
            delta = SCALE * a[i].reshape(-1, RANK) @ b[i].reshape(RANK, -1)
            layers[name][i] += delta.reshape(layers[name][i].shape)
    return {**base, "layers": {name: jnp.asarray(w, jnp.float32) for name, w in layers.items()}}


@partial(jax.jit, static_argnums=(1, 2))
def hidden(params, cfg, remat="full"):
    tokens = jnp.array([[5, 1, 9, 2, 2, 7], [3, 3, 8, 1, 0, 4]])
    segments = jnp.array([[1, 1, 1, 2, 2, 2], [1, 1, 1, 1, 1, 0]])
    positions = jnp.array([[0, 1, 2, 0, 1, 2], [0, 1, 2, 3, 4, 5]])
    return qwen.forward(params, cfg, tokens, positions, segments, jnp.float32, remat=remat)


# ---------------------------------------------------------------------- the adapter


def test_targets_of_the_config_are_the_projections_of_a_layer():
    assert set(LORA_TARGETS) == set(lora.TARGETS)
    assert {rule.ours for rule in lora.TARGETS.values()} == {
        rule.ours for rule in RULES if "layers" in rule.hf and len(rule.axes) == 2
    }


def test_adapter_has_the_shapes_and_axes_of_its_weight_with_the_rank_between(cfg):
    weights, axes = qwen.abstract_params(cfg)["layers"], qwen.logical_axes(cfg)["layers"]
    adapter, named = lora.init_adapter(cfg, RANK, LORA_TARGETS, 0), lora.adapter_axes(cfg, LORA_TARGETS)
    for name, pair in adapter["layers"].items():
        a, b = pair["a"], pair["b"]
        assert (a.shape[-1], b.shape[1]) == (RANK, RANK)
        assert (*a.shape[:-1], *b.shape[2:]) == weights[name].shape
        of_a, of_b = (named["layers"][name][part] for part in "ab")
        assert (len(of_a), len(of_b)) == (a.ndim, b.ndim)
        assert of_a[-1] is None and of_b[:2] == ("layers", None)
        assert (*of_a[:-1], *of_b[2:]) == axes[name]


def test_fresh_adapter_is_spread_as_in_peft_and_changes_nothing(cfg):
    base, adapter = base_of(cfg), lora.init_adapter(cfg, 64, LORA_TARGETS, 0)
    for name, pair in adapter["layers"].items():
        inputs = pair["a"][0].size / 64
        assert np.abs(pair["a"]).max() <= inputs**-0.5
        assert pair["a"].std() == pytest.approx((3 * inputs) ** -0.5, rel=0.1), name
        assert not pair["b"].any()
    beside = hidden(lora.attach(SCALE, adapter, base), cfg)
    np.testing.assert_allclose(beside, hidden(base, cfg), rtol=1e-5, atol=1e-6)


def test_numbers_of_an_adapter_depend_on_seed_and_weight_alone(cfg):
    every, some = (lora.init_adapter(cfg, RANK, t, 3)["layers"] for t in (LORA_TARGETS, ("v_proj", "k_proj")))
    assert set(some) == {"wk_DKH", "wv_DKH"}
    assert all(jnp.array_equal(every[name]["a"], some[name]["a"]) for name in some)
    assert not jnp.array_equal(every["wk_DKH"]["a"], every["wv_DKH"]["a"])
    other = lora.init_adapter(cfg, RANK, LORA_TARGETS, 4)["layers"]
    assert not jnp.array_equal(every["wk_DKH"]["a"], other["wk_DKH"]["a"])


# ---------------------------------------------------------------------- products and gradients


@pytest.mark.parametrize("axes", ["BTD,DNH->BTNH", "BTNH,NHD->BTD", "BTF,FD->BTD"])
def test_product_beside_an_adapter_is_that_with_the_sum(axes):
    sizes = {"B": 2, "T": 3, "D": 8, "N": 2, "H": 4, "F": 6}
    left, weight, _ = axes.replace("->", ",").split(",")
    inputs = [letter for letter in weight if letter in left]
    outputs = [letter for letter in weight if letter not in left]
    shapes = [list(left), list(weight), [*inputs, "r"], ["r", *outputs]]
    rng = np.random.default_rng(0)
    x, w, a, b = (rng.normal(size=[(sizes | {"r": RANK})[k] for k in s]).astype(np.float32) for s in shapes)
    adapted = Adapted(*map(jnp.asarray, (w, a, b)), scale=SCALE)
    low = a.reshape(-1, RANK) @ b.reshape(RANK, -1)
    expected = np.einsum(axes, x, w + SCALE * low.reshape(w.shape))
    np.testing.assert_allclose(product(axes, jnp.asarray(x), adapted), expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(dense(adapted), w + SCALE * low.reshape(w.shape), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("remat", ["full", "dots", "none"])
def test_hidden_states_beside_an_adapter_are_those_of_merged_weights(cfg, remat):
    base, adapter = base_of(cfg), trained_adapter(cfg)
    ours = hidden(lora.attach(SCALE, adapter, base), cfg, remat)
    assert np.abs(ours - hidden(base, cfg)).max() > 0.1
    np.testing.assert_allclose(ours, hidden(merged(base, adapter), cfg), rtol=1e-4, atol=1e-4)


def toy_update(cfg, attach=None) -> Update:
    """On a vocabulary so large that a gradient of the head would be seen."""
    return make_update(
        lambda params, *row: qwen.forward(params, cfg, *row, jnp.float32),
        lambda params: params["embed_VD"] if cfg.tied else params["head_DV"],
        GrpoSettings(logprob_chunk=8, logprob_vocab_chunk=512),
        adamw(1e-2),
        vocab_axis=0 if cfg.tied else 1,
        **({"attach": attach} if attach else {}),
    )


def toy_batch() -> TrainBatch:
    def sample(*ids, advantage):
        count = len(ids)
        return Sample(
            np.array([1, 2]), np.array(ids), advantage, np.full(count, -8.0), np.ones(count, np.float32)
        )

    samples = [sample(7, 5, 40, advantage=1.0), sample(4001, 9, advantage=-0.5)]
    (packed,) = pack(samples, row_length=8, rows=2)
    packed = PackedBatch(*map(jnp.asarray, packed))
    return TrainBatch(packed, packed.sampler_logprobs, packed.sampler_logprobs - 0.2)


def test_gradient_of_an_adapter_is_that_through_merged_weights(cfg):
    """The chain rule by hand: with dW of a full update, da = s dW b' and db = s a' dW."""
    base, adapter, batch = base_of(cfg), trained_adapter(cfg), toy_batch()
    beside, full = toy_update(cfg, partial(lora.attach, SCALE)), toy_update(cfg)
    grads, sums = beside.accumulate(adapter, *beside.start(adapter), batch, base)
    whole = merged(base, adapter)
    full_grads, full_sums = full.accumulate(whole, *full.start(whole), batch)
    np.testing.assert_allclose(sums, full_sums, rtol=1e-4, atol=1e-5)
    assert jax.tree.structure(grads) == jax.tree.structure(adapter)
    for name, pair in adapter["layers"].items():
        for i in range(cfg.layers):
            a, b = np.array(pair["a"][i]).reshape(-1, RANK), np.array(pair["b"][i]).reshape(RANK, -1)
            d_w = np.array(full_grads["layers"][name][i]).reshape(len(a), -1)
            ours = {part: np.array(grads["layers"][name][part][i]) for part in "ab"}
            assert np.abs(ours["b"]).max() > 1e-4
            for d, expected in ((ours["a"], SCALE * d_w @ b.T), (ours["b"], SCALE * a.T @ d_w)):
                np.testing.assert_allclose(d.reshape(expected.shape), expected, rtol=2e-3, atol=1e-5)


def test_update_beside_a_base_makes_no_gradient_of_it(cfg):
    """Not even in passing: the head alone would need more memory than all temporaries take."""
    base, adapter, batch = base_of(cfg), trained_adapter(cfg), toy_batch()
    before = jax.tree.map(np.array, base)
    update = toy_update(cfg, partial(lora.attach, SCALE))
    state = update.init(adapter)
    assert sum(leaf.size for leaf in jax.tree.leaves(state.opt_state)) < 3 * sum(
        leaf.size for leaf in jax.tree.leaves(adapter)
    )
    arguments = state.params, *update.start(state.params), batch, base
    compiled = update.accumulate.lower(*arguments).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 0.8 * base["embed_VD"].nbytes
    grads, sums = update.accumulate(*arguments)
    state, measured = update.apply(state, grads, sums)
    assert measured.update_norm > 0
    jax.tree.map(np.testing.assert_array_equal, base, before)


def test_reference_is_the_base_itself(cfg):
    base, batch = base_of(cfg), toy_batch()
    alone = toy_update(cfg).logprobs(base, batch.packed)
    beside = toy_update(cfg, partial(lora.attach, SCALE)).logprobs(None, batch.packed, base)
    np.testing.assert_array_equal(alone.logprobs, beside.logprobs)


# ---------------------------------------------------------------------- rollout


def decoded(cfg, ready):
    """Logits of three tokens, one after another."""
    cache, logits = empty_cache(cfg.layers, 1, cfg.kv_heads, 4, cfg.head_dim, jnp.float32), []
    for i, token in enumerate((5, 1, 9)):
        out, cache = qwen.decode(ready, cfg, jnp.array([token]), cache, jnp.array([i]))
        logits.append(out[0])
    return jnp.stack(logits)


def test_rollout_of_a_dense_base_reads_merged_weights(cfg):
    base, adapter = base_of(cfg), trained_adapter(cfg)
    whole = lora.attach(SCALE, adapter, base)
    ready, expected = (
        qwen.decode_params(whole, jnp.float32),
        qwen.decode_params(merged(base, adapter), jnp.float32),
    )
    assert jax.tree.structure(ready) == jax.tree.structure(expected)
    for ours, theirs in zip(jax.tree.leaves(ready), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)
    unmerged = qwen.unembed(base, hidden(whole, cfg)[0, :3])
    np.testing.assert_allclose(decoded(cfg, ready), unmerged, rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------------- a run


def identical(a, b) -> bool:
    same = jax.tree.map(lambda x, y: np.asarray(x).tobytes() == np.asarray(y).tobytes(), a, b)
    return jax.tree.all(same)


@pytest.fixture(scope="module")
def lora_run(tmp_path_factory):
    """Two steps that train an adapter of the built-in model."""
    return train(short_config(TINY), tmp_path_factory.mktemp("lora_run"))


def test_run_trains_every_part_of_the_adapter_and_nothing_else(lora_run):
    params = checkpoint.open_model(lora_run.workdir).params
    base = checkpoint.open_model("builtin:tiny").params
    adapted = {name: w for name, w in params["layers"].items() if isinstance(w, Adapted)}
    assert adapted.keys() == {rule.ours for rule in lora.TARGETS.values()}
    frozen = {**params, "layers": {name: getattr(w, "base", w) for name, w in params["layers"].items()}}
    assert identical(frozen, base)
    assert all(weight.b.any(axis=tuple(range(1, weight.b.ndim))).all() for weight in adapted.values())
    assert lora_run.metrics[0]["kl"] < lora_run.metrics[1]["kl"]


def test_sampler_reads_the_policy_that_is_trained(lora_run):
    for line in lora_run.metrics:
        assert 0 < line["sampler_gap"] < 1e-4


def test_checkpoint_holds_the_adapter_alone(lora_run):
    folder = checkpoint.saved_steps(lora_run.workdir)[-1]
    described = checkpoint.read_description(folder / "model")
    adapter = checkpoint.read_adapter(folder, described.config, lora_run.config)
    stored = sum(file.stat().st_size for file in (folder / "params").rglob("*") if file.is_file())
    assert stored < 2 * sum(leaf.nbytes for leaf in jax.tree.leaves(adapter))


def test_resumed_lora_run_equals_an_uninterrupted_one_bit_for_bit(lora_run, tmp_path):
    train(short_config(TINY, {"steps": 1}), tmp_path)
    resumed = train(short_config(TINY), tmp_path)
    assert resumed.metrics == lora_run.metrics
    assert resumed.completions("after") == lora_run.completions("after")
    assert identical(*(checkpoint.open_model(run.workdir).params for run in (lora_run, resumed)))
