"""Adapters beside frozen weights: products, gradients, the rollout, and a run that trains nothing else."""

import dataclasses
import functools
import json
import shutil
from functools import partial
from statistics import NormalDist

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from ml_collections import ConfigDict
from safetensors.numpy import load_file, save_file
from short_run import short_config, train

from step_grpo import checkpoint
from step_grpo.config import LORA_TARGETS
from step_grpo.errors import UserError
from step_grpo.evaluate import decode_ready
from step_grpo.export import export, export_adapter
from step_grpo.grpo.packing import PackedBatch, Sample, pack, stack
from step_grpo.grpo.settings import GrpoSettings
from step_grpo.grpo.update import TrainBatch, Update, adamw, make_update
from step_grpo.mesh import make_mesh, shardings
from step_grpo.model import lora, qwen
from step_grpo.model.attention import XLA, choose_attention
from step_grpo.model.cache import empty_cache
from step_grpo.model.linear import Adapted, dense, product
from step_grpo.model.load import load_model
from step_grpo.model.rounding import Rounded, round_off
from step_grpo.model.weights import RULES, lay_out, resolve_checkpoint

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
    packed = stack(pack(samples, row_length=8, rows=2), 1)
    packed = PackedBatch(*map(jnp.asarray, packed))
    return TrainBatch(packed, packed.sampler_logprobs, packed.sampler_logprobs - 0.2)


def test_gradient_of_an_adapter_is_that_through_merged_weights(cfg):
    """The chain rule by hand: with dW of a full update, da = s dW b' and db = s a' dW."""
    base, adapter, batch = base_of(cfg), trained_adapter(cfg), toy_batch()
    beside, full = toy_update(cfg, partial(lora.attach, SCALE)), toy_update(cfg)
    grads, sums = beside.accumulate(adapter, *beside.start(adapter), batch, 1, base)
    whole = merged(base, adapter)
    full_grads, full_sums = full.accumulate(whole, *full.start(whole), batch, 1)
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
    arguments = state.params, *update.start(state.params), batch, 1, base
    compiled = update.accumulate.lower(*arguments).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 0.8 * base["embed_VD"].nbytes
    grads, sums = update.accumulate(*arguments)
    state, measured = update.apply(state, grads, sums)
    assert measured.update_norm > 0
    jax.tree.map(np.testing.assert_array_equal, base, before)


def test_reference_is_the_base_itself(cfg):
    base, batch = base_of(cfg), toy_batch()
    alone = toy_update(cfg).logprobs(base, batch.packed, 1)
    beside = toy_update(cfg, partial(lora.attach, SCALE)).logprobs(None, batch.packed, 1, base)
    np.testing.assert_array_equal(alone.logprobs, beside.logprobs)


# ---------------------------------------------------------------------- rollout


make_ready = jax.jit(qwen.decode_params, static_argnums=1)


def decoded(cfg, ready):
    """Logits of three tokens, one after another."""
    cache, logits = empty_cache(cfg.layers, 1, cfg.kv_heads, 4, cfg.head_dim, jnp.float32), []
    step = jax.jit(qwen.decode, static_argnums=1)
    for i, token in enumerate((5, 1, 9)):
        out, cache = step(ready, cfg, jnp.array([token]), cache, jnp.array([i]))
        logits.append(out[0])
    return jnp.stack(logits)


def test_rollout_of_a_dense_base_reads_merged_weights(cfg):
    base, adapter = base_of(cfg), trained_adapter(cfg)
    whole = lora.attach(SCALE, adapter, base)
    ready, expected = (
        qwen.decode_params(whole, jnp.float32),
        make_ready(merged(base, adapter), jnp.float32),
    )
    assert jax.tree.structure(ready) == jax.tree.structure(expected)
    for ours, theirs in zip(jax.tree.leaves(ready), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)
    unmerged = qwen.unembed(base, hidden(whole, cfg)[0, :3])
    np.testing.assert_allclose(decoded(cfg, ready), unmerged, rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------------- rounded weights

ROUNDED = ("int8", "int4", "nf4")
WIDE = dataclasses.replace(CONFIGS["qwen3"], vocab_size=64, width=128, ffn=192, head_dim=16)


def nearest(kind, blocks):
    """Of all values that a block can have, the nearest to each of its numbers, by trying all."""
    largest = np.abs(blocks).max(axis=-1, keepdims=True)[..., None].astype(np.float64)
    table = {"int8": np.arange(-128, 128) / 127.5, "int4": np.arange(-8, 8) / 7.5, "nf4": np.array(nf4())}[
        kind
    ]
    values = largest * table
    best = np.abs(blocks[..., None] - values).argmin(axis=-1)
    return np.take_along_axis(values, best[..., None], axis=-1)[..., 0]


def nf4():
    """NF4 as its paper builds it: quantiles of the normal distribution, eight above zero and seven below."""
    offset = (1 - 1 / 30 + 1 - 1 / 32) / 2

    def quantiles(count):
        return [NormalDist().inv_cdf(p) for p in np.linspace(offset, 0.5, count)[:-1]]

    values = [*(-v for v in quantiles(8)), 0.0, *quantiles(9)]
    return sorted(v / max(values) for v in values)


@pytest.mark.parametrize("kind", ROUNDED)
def test_rounded_weight_is_the_nearest_of_its_block(kind):
    weight = np.random.default_rng(0).normal(size=(2, 3, 128, 5)).astype(np.float32)
    weight[0, 1] = 0
    blocks = weight.transpose(0, 1, 3, 2).reshape(2, 3, 5, 2, 64)
    expected = nearest(kind, blocks).reshape(2, 3, 5, 128).transpose(0, 1, 3, 2)
    found = np.array(dense(round_off(jnp.asarray(weight), kind, -2, jnp.float32)))
    np.testing.assert_allclose(np.abs(found - weight), np.abs(expected - weight), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("kind", "levels"), [("int8", 127.5), ("int4", 7.5)])
def test_product_with_a_rounded_weight_errs_as_rounding_does(kind, levels):
    """Rounding adds the variance of a step, step^2 / 12, at every input."""
    rng = np.random.default_rng(1)
    x, w = (rng.normal(size=size).astype(np.float32) for size in ((1, 50, 512), (512, 2, 30)))
    weight = round_off(jnp.asarray(w), kind, -3, jnp.float32)
    error = np.array(product("BTD,DNH->BTNH", jnp.asarray(x), weight)) - np.einsum("BTD,DNH->BTNH", x, w)
    largest = np.abs(w.reshape(8, 64, 60)).max(axis=1, keepdims=True)
    steps = largest.repeat(64, axis=1).reshape(512, 60) / levels
    expected = np.sqrt(np.mean(x[0] ** 2 @ steps**2 / 12))
    assert np.sqrt(np.mean(error**2)) == pytest.approx(expected, rel=0.1)


def test_four_bits_of_an_odd_axis_are_refused_by_field():
    with pytest.raises(UserError, match=r"config\.lora\.base is 'nf4'.* odd width, 7; use 'int8'"):
        round_off(jnp.ones((2, 7, 3)), "nf4", -2, jnp.float32)


def rounded_base(kind, dtype="float32"):
    config = ConfigDict({"model": {"dtype": dtype}, "lora": {"rank": RANK, "base": kind}})
    keep = lora.keeper(config)
    return jax.tree.map_with_path(lambda path, weight: keep(path[-1].key, weight), base_of(WIDE))


@pytest.mark.parametrize("kind", ROUNDED)
def test_adapter_beside_rounded_weights_learns_and_samples_as_beside_the_same_dense_ones(kind):
    base, adapter, batch = rounded_base(kind), trained_adapter(WIDE), toy_batch()
    same = {**base, "layers": {name: dense(weight) for name, weight in base["layers"].items()}}
    assert not np.allclose(same["layers"]["wq_DNH"], base_of(WIDE)["layers"]["wq_DNH"], atol=1e-4)
    update = toy_update(WIDE, partial(lora.attach, SCALE))
    ours, theirs = (update.accumulate(adapter, *update.start(adapter), batch, 1, b)[0] for b in (base, same))
    for grad, expected in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(grad, expected, rtol=1e-3, atol=1e-5)
    ready = [make_ready(lora.attach(SCALE, adapter, b), jnp.float32) for b in (base, same)]
    np.testing.assert_allclose(decoded(WIDE, ready[0]), decoded(WIDE, ready[1]), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("kind", "bits"), [("int8", 8), ("int4", 4), ("nf4", 4)])
def test_rounded_base_stays_rounded_from_loading_to_the_decode_loop(kind, bits):
    whole = lora.attach(SCALE, trained_adapter(WIDE), rounded_base(kind, "bfloat16"))
    for tree in (whole["layers"], qwen.decode_params(whole, jnp.bfloat16)["layers"][0]):
        for rule in lora.TARGETS.values():
            base = tree[rule.ours].base
            dense_size = jax.eval_shape(dense, base).size
            assert isinstance(base, Rounded) and base.codes.nbytes * 8 == bits * dense_size
            assert base.scales.dtype == jnp.bfloat16
            assert base.scales.size * 16 <= dense_size
    assert whole["embed_VD"].dtype == jnp.bfloat16


@pytest.mark.parametrize("remat", ["full", "dots", "none"])
def test_backward_pass_keeps_no_dense_copy_of_rounded_layers(remat):
    """What is kept of the scan is stacked along its layers."""
    base, adapter = rounded_base("int8"), trained_adapter(WIDE)

    def loss(adapter):
        return jnp.sum(hidden.__wrapped__(lora.attach(SCALE, adapter, base), WIDE, remat))

    program = str(jax.make_jaxpr(jax.grad(loss))(adapter))
    assert f"f32[{WIDE.layers},{WIDE.width},{RANK}]" in program
    assert f"f32[{WIDE.layers},{WIDE.width},{WIDE.ffn}]" not in program


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
    adapter = checkpoint.open_model(folder).adapter
    stored = sum(file.stat().st_size for file in (folder / "params").rglob("*") if file.is_file())
    assert stored < 2 * sum(leaf.nbytes for leaf in jax.tree.leaves(adapter))


def test_resumed_lora_run_equals_an_uninterrupted_one_bit_for_bit(lora_run, tmp_path):
    train(short_config(TINY, {"steps": 1}), tmp_path)
    resumed = train(short_config(TINY), tmp_path)
    assert resumed.metrics == lora_run.metrics
    assert resumed.completions("after") == lora_run.completions("after")
    assert identical(*(checkpoint.open_model(run.workdir).params for run in (lora_run, resumed)))


def test_another_base_under_the_same_name_is_refused(lora_run, tmp_path, monkeypatch):
    changed = shutil.copytree(resolve_checkpoint("builtin:tiny"), tmp_path / "changed")
    weights = load_file(changed / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"] = weights["model.layers.1.mlp.up_proj.weight"] * 1.01
    save_file(weights, changed / "model.safetensors")
    monkeypatch.setattr("step_grpo.model.load.resolve_checkpoint", lambda name: changed)
    folder = checkpoint.saved_steps(lora_run.workdir)[-1]
    with pytest.raises(UserError, match=r"an adapter of 'builtin:tiny', whose weights have changed since"):
        checkpoint.open_model(folder)
    described, _ = load_model(lora_run.config.model, 0)
    run = checkpoint.read_run(folder)
    with pytest.raises(
        UserError, match=r"began from other weights than those that 'builtin:tiny' .* has now"
    ):
        checkpoint.check_same_model(folder, run, described)
    del run["loaded"]  # as older versions wrote it
    checkpoint.check_same_model(folder, run, described)


def test_run_over_rounded_weights_samples_and_evaluates_the_policy_that_it_trains(tmp_path):
    settings = ({**TINY, "lora": {**TINY["lora"], "base": "nf4"}}, {"steps": 1})
    run = train(short_config(*settings, {"prompts_per_step": 2, "eval": {"questions": 4}}), tmp_path)
    assert 0 < run.metrics[0]["sampler_gap"] < 1e-4
    assert run.metrics[0]["update_norm"] > 0
    opened = checkpoint.open_model(tmp_path)
    assert isinstance(opened.params["layers"]["wq_DNH"].base, Rounded)


# ---------------------------------------------------------------------- export


def test_adapter_in_peft_is_the_merged_export_in_transformers_and_our_own_forward(lora_run, tmp_path):
    import torch
    from peft import AutoPeftModelForCausalLM, PeftModel
    from transformers import AutoModelForCausalLM

    export_adapter(lora_run.workdir, tmp_path / "adapter", dtype="float32")
    export(lora_run.workdir, tmp_path / "merged", dtype="float32")
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    tokens = np.random.default_rng(0).integers(0, 60, size=(2, 24))

    def logits(model):
        with torch.no_grad():
            return model.eval()(torch.tensor(tokens)).logits.numpy()

    base = AutoModelForCausalLM.from_pretrained(settings["base_model_name_or_path"], dtype=torch.float32)
    before = logits(base)
    in_peft = logits(PeftModel.from_pretrained(base, tmp_path / "adapter"))
    alone = logits(AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", dtype=torch.float32))
    merged = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32))
    opened = checkpoint.open_model(lora_run.workdir)
    cfg, positions = opened.described.config, jnp.broadcast_to(jnp.arange(24), (2, 24))
    states = qwen.forward(
        opened.params, cfg, jnp.asarray(tokens), positions, jnp.ones_like(positions), jnp.float32
    )
    assert np.abs(merged - before).max() > 1e-2
    np.testing.assert_allclose(in_peft, merged, atol=1e-4)
    np.testing.assert_allclose(alone, merged, atol=1e-4)
    np.testing.assert_allclose(qwen.unembed(opened.params, states), merged, atol=1e-4)


def test_adapter_of_a_run_without_one_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"builtin:tiny is of no run with config\.lora\.rank above 0"):
        export_adapter("builtin:tiny", tmp_path / "adapter")


# ---------------------------------------------------------------------- over devices


@pytest.mark.parametrize("kind", ["dense", "nf4"])
def test_adapter_and_base_over_a_mesh_compute_as_on_one_device(kind):
    """Eight devices, two along each axis; every part lies where the axes of its weight say."""
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    base, adapter = rounded_base(kind), trained_adapter(WIDE)
    names = qwen.logical_axes(WIDE)
    spread = jax.tree.map(
        lambda weight, axes: lay_out(weight, axes, mesh),
        lora.attach(SCALE, adapter, base),
        names,
        is_leaf=lambda node: isinstance(node, Adapted | Rounded),
    )
    wq = spread["layers"]["wq_DNH"]
    assert wq.a.sharding.spec == PartitionSpec(None, "fsdp")
    assert wq.b.sharding.spec == PartitionSpec(None, None, "tensor")
    assert jax.tree.leaves(wq.base)[0].sharding.spec == PartitionSpec(None, "fsdp", "tensor")
    where = shardings(mesh, lora.adapter_axes(WIDE, LORA_TARGETS), adapter)
    assert where["layers"]["wq_DNH"]["b"].spec == wq.b.sharding.spec
    one = qwen.decode_params(lora.attach(SCALE, adapter, base), jnp.float32)
    ready = decode_ready(spread, WIDE, "float32", mesh)
    for ours, expected in zip(jax.tree.leaves(ready), jax.tree.leaves(one), strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-5)
    tokens = jnp.arange(24).reshape(4, 6)
    positions, attention = tokens % 6, choose_attention("xla", mesh, spread_rows=True)
    here, there = (
        jax.jit(partial(qwen.forward, cfg=WIDE, dtype=jnp.float32, attention=how))(
            params, tokens_BT=tokens, positions_BT=positions, segments_BT=jnp.ones_like(tokens)
        )
        for params, how in ((lora.attach(SCALE, adapter, base), XLA), (spread, attention))
    )
    np.testing.assert_allclose(here, there, rtol=1e-4, atol=1e-4)
