"""The mesh: sizes, where arrays lie, and that neither a gradient nor a completion depends on it."""

import functools
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from short_run import short_config

from step_grpo.checkpoint import Progress, Saver, open_model, restore
from step_grpo.config import base_config
from step_grpo.errors import UserError
from step_grpo.evaluate import decode_ready
from step_grpo.grpo.packing import Sample, pack, stack
from step_grpo.grpo.update import TrainBatch, Update
from step_grpo.main import build_update, optimizer_of
from step_grpo.mesh import (
    arranged,
    check_tensor,
    make_mesh,
    mesh_sizes,
    place_rows,
    replicated,
    shardings,
    share_of,
    spec_of,
)
from step_grpo.model import qwen
from step_grpo.model.attention import choose_attention
from step_grpo.rollout.engine import RolloutEngine
from step_grpo.rollout.phases import Machine
from step_grpo.rollout.policies import Confidence
from step_grpo.rollout.triggers import build_vocabulary

CFG = qwen.QwenConfig(
    vocab_size=64, width=32, layers=2, heads=4, kv_heads=2, head_dim=8, ffn=48, rope_theta=1e4,
    rms_eps=1e-6, tied=True, qk_norm=True, qkv_bias=False, init_std=0.2,
)  # fmt: skip
UNTIED = qwen.QwenConfig(**{**CFG.__dict__, "tied": False, "qk_norm": False, "qkv_bias": True})
MESHES = [(8, 1, 1), (1, 8, 1), (2, 2, 2), (1, 4, 2), (1, 1, 2)]


def mesh_of_sizes(sizes):
    data, fsdp, tensor = sizes
    devices = jax.devices()[: data * fsdp * tensor]
    return make_mesh(data=data, fsdp=fsdp, tensor=tensor, devices=devices)


# ---------------------------------------------------------------------- sizes and places


@pytest.mark.parametrize(
    ("devices", "wanted", "shared", "sizes"),
    [
        (8, (0, 1, 1), 0, (8, 1, 1)),
        (8, (1, 0, 1), 16, (1, 8, 1)),
        (8, (1, 0, 2), 16, (1, 4, 2)),
        (8, (2, 0, 2), 0, (2, 2, 2)),
        (8, (1, 0, 2), 6, (1, 3, 2)),  # two devices are left over
        (8, (2, 2, 0), 8, (2, 2, 2)),
        (1, (1, 0, 1), 5, (1, 1, 1)),
        (8, (2, 2, 2), 4, (2, 2, 2)),
    ],
)
def test_open_axis_takes_what_the_others_leave(devices, wanted, shared, sizes):
    assert mesh_sizes(devices, dict(zip(("data", "fsdp", "tensor"), wanted, strict=True)), shared) == sizes


@pytest.mark.parametrize(
    ("wanted", "shared", "message"),
    [
        ((0, 0, 1), 0, "config.mesh.data and config.mesh.fsdp are 0"),
        ((4, 4, 1), 0, "needs 16 devices; there are 8"),
        ((1, 0, 16), 0, "needs 16 devices; there are 8"),
        ((2, 4, 1), 12, "must divide config.rollout.lanes and the rows"),
        ((3, 0, 1), 8, "must divide config.rollout.lanes and the rows"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(wanted, shared, message):
    with pytest.raises(UserError, match=re.escape(message)):
        mesh_sizes(8, dict(zip(("data", "fsdp", "tensor"), wanted, strict=True)), shared)


def test_axis_that_does_not_spread_is_refused_by_its_name():
    with pytest.raises(UserError, match=r"mesh\.tensor: the model's kv_heads axis of 2 .* over 4 devices"):
        shardings(make_mesh(data=2, tensor=4), qwen.logical_axes(CFG), qwen.abstract_params(CFG))


def test_unknown_and_missing_axes_are_whole_on_every_device():
    assert spec_of(make_mesh(data=8), ["rows", "embed", "heads", None]) == PartitionSpec("data")
    assert spec_of(make_mesh(data=2, fsdp=4), ["rows", None]) == PartitionSpec(("data", "fsdp"))


# ---------------------------------------------------------------------- the update


def samples():
    rng = np.random.default_rng(3)
    made = []
    for p, c in [(3, 9), (2, 21), (4, 1), (1, 14), (3, 6), (2, 0), (5, 20), (1, 24), (6, 17), (2, 8)]:
        made.append(
            Sample(
                prompt_ids=rng.integers(0, CFG.vocab_size, p),
                completion_ids=rng.integers(0, CFG.vocab_size, c),
                advantage=float(rng.normal()),
                sampler_logprobs=-4 + rng.random(c).astype(np.float32),
                loss_mask=(rng.random(c) < 0.8).astype(np.float32),
            )
        )
    return made


def update_on(cfg, mesh, chunk=64) -> Update:
    config = base_config()
    config.model.dtype, config.model.attention = "float32", "xla"
    config.grpo.logprob_chunk, config.grpo.kl_coef, config.grpo.learning_rate = chunk, 0.1, 1e-2
    return build_update(cfg, config, optimizer_of(config.grpo), mesh)


def params_on(cfg, mesh, seed=0):
    return jax.device_put(
        whole_params(cfg, seed), shardings(mesh, qwen.logical_axes(cfg), qwen.abstract_params(cfg))
    )


@functools.cache
def whole_params(cfg, seed):
    return jax.device_get(qwen.init_params(cfg, seed))


def gradient(cfg, sizes, *, rows, row_length=32, chunk=64, packed=True, fetch=jax.device_get):
    """Gradient sums of all samples against another old policy and reference, on the host."""
    mesh = mesh_of_sizes(sizes)
    update = update_on(cfg, mesh, chunk)
    policy, old, reference = (params_on(cfg, mesh, seed) for seed in range(3))
    parts = [samples()] if packed else [[sample] for sample in samples()]
    grads, sums = update.start(policy)
    for part in parts:
        batches = pack(part, row_length=row_length, rows=rows)
        placed, count = place_rows(mesh, stack(batches, len(batches) + 1), axis=1), len(batches)
        compared = (update.logprobs(weights, placed, count).logprobs for weights in (old, reference))
        grads, sums = update.accumulate(policy, grads, sums, TrainBatch(placed, *compared), count)
    return fetch((grads, sums))


@pytest.fixture(scope="module", params=["tied", "untied"])
def alone(request):
    cfg = {"tied": CFG, "untied": UNTIED}[request.param]
    return cfg, gradient(cfg, (1, 1, 1), rows=8)


def assert_same(found, expected):
    (grads, sums), (grads_there, sums_there) = found, expected
    for name, value in zip(sums._fields, sums, strict=True):
        np.testing.assert_allclose(value, getattr(sums_there, name), rtol=1e-5, err_msg=name)
    for (path, grad), there in zip(
        jax.tree.leaves_with_path(grads), jax.tree.leaves(grads_there), strict=True
    ):
        scale = np.abs(there).max()
        np.testing.assert_allclose(grad, there, rtol=0, atol=1e-5 * scale, err_msg=str(path))


@pytest.mark.parametrize("sizes", MESHES)
def test_gradient_does_not_depend_on_the_mesh(alone, sizes):
    cfg, expected = alone
    assert_same(gradient(cfg, sizes, rows=8), expected)


@pytest.mark.parametrize(
    "way",
    [
        {"sizes": (1, 1, 1), "rows": 1},  # several micro-batches
        {"sizes": (2, 1, 1), "rows": 2},
        {"sizes": (2, 2, 2), "rows": 4, "chunk": 8},
        {"sizes": (1, 1, 1), "rows": 8, "chunk": 16, "row_length": 40},
        {"sizes": (1, 1, 1), "rows": 1, "packed": False},
    ],
)
def test_gradient_does_not_depend_on_packing_micro_batches_and_chunks(alone, way):
    cfg, expected = alone
    assert_same(gradient(cfg, **way), expected)


def test_state_lies_and_stays_where_its_weights_do():
    mesh = mesh_of_sizes((2, 2, 2))
    update = update_on(CFG, mesh)
    state = update.init(params_on(CFG, mesh))
    where = jax.tree.map(lambda w: w.sharding, params_on(CFG, mesh))

    def check(state):
        adam = state.opt_state[1]
        for tree in (state.params, adam.mu, adam.nu):
            jax.tree.map(
                lambda w, at: w.sharding.is_equivalent_to(at, w.ndim) or pytest.fail(str(at)), tree, where
            )

    check(state)
    (batch,) = pack(samples(), row_length=48, rows=4)
    placed = place_rows(mesh, stack([batch], 2), axis=1)
    old = update.logprobs(state.params, placed, 1).logprobs
    for _ in range(2):
        grads, sums = update.start(state.params)
        grads, sums = update.accumulate(state.params, grads, sums, TrainBatch(placed, old, old), 1)
        state, _ = update.apply(state, grads, sums)
        check(state)
    assert [f._cache_size() for f in (update.logprobs, update.accumulate, update.apply)] == [1, 1, 1]


# ---------------------------------------------------------------------- going on

SPREAD = {  # how a run is spread over devices, by the sizes of its mesh
    (1, 1, 1): {"grpo": {"rows": 2}},
    (1, 8, 1): {"grpo": {"rows": 8}, "model": {"remat": "none"}},
    (2, 2, 2): {"grpo": {"rows": 4, "logprob_chunk": 16}, "model": {"attention": "xla"}},
}


def spread(sizes):
    return short_config({"mesh": dict(zip(("data", "fsdp", "tensor"), sizes, strict=True))}, SPREAD[sizes])


@functools.cache
def spread_update(sizes) -> Update:
    return build_update(CFG, spread(sizes), optimizer_of(spread(sizes).grpo), mesh_of_sizes(sizes))


def one_more(state, sizes):
    """The state behind an update with all samples."""
    config, mesh, update = spread(sizes), mesh_of_sizes(sizes), spread_update(sizes)
    state = state or update.init(params_on(CFG, mesh))
    batches = pack(samples(), row_length=32, rows=config.grpo.rows)
    placed = place_rows(mesh, stack(batches, len(batches)), axis=1)
    grads, sums = update.start(state.params)
    batch = TrainBatch(placed, placed.sampler_logprobs, placed.sampler_logprobs)
    grads, sums = update.accumulate(state.params, grads, sums, batch, len(batches))
    return update.apply(state, grads, sums)[0]


@pytest.fixture(scope="module")
def first_half(tmp_path_factory):
    """A workdir with the checkpoint of one device, the model, and the state that it has a step later."""
    workdir, described = tmp_path_factory.mktemp("run"), open_model("builtin:tiny").described
    state = one_more(None, (1, 1, 1))
    with Saver(workdir, described, spread((1, 1, 1))) as saver:
        saver.save(Progress(1, 4), state)
    return workdir, described, jax.device_get(one_more(state, (1, 1, 1)))


@pytest.mark.parametrize("sizes", [(1, 8, 1), (2, 2, 2)])
def test_run_goes_on_on_another_mesh_as_it_would_have_up_to_rounding(first_half, sizes):
    """Completions do not depend on the mesh either, see below."""
    workdir, described, expected = first_half
    mesh = mesh_of_sizes(sizes)
    fresh = spread_update(sizes).init(params_on(CFG, mesh, seed=1))
    progress, state = restore(workdir, fresh, described, spread(sizes))
    assert progress == Progress(1, 4)
    jax.tree.map(
        lambda x, at: x.sharding.is_equivalent_to(at.sharding, x.ndim) or pytest.fail(), state, fresh
    )
    state = jax.device_get(one_more(state, sizes))
    assert state.step == expected.step == 2
    for found, there in zip(jax.tree.leaves(state), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(found, there, rtol=0, atol=1e-5 * np.abs(there).max())


@pytest.mark.parametrize("torus", ["of other sizes", "across hosts", "within hosts"])
def test_devices_that_share_a_lane_are_of_one_host(torus, monkeypatch):
    """Four hosts of four devices each, which come in another order than by host."""
    devices = [SimpleNamespace(process_index=i % 4, id=i) for i in range(16)]

    def follow_torus(sizes, axes, axis_types, devices):
        if torus == "of other sizes":
            raise NotImplementedError
        order = sorted(devices, key=lambda d: d.process_index) if torus == "within hosts" else devices
        return SimpleNamespace(devices=np.array(order[::-1]).reshape(sizes))

    monkeypatch.setattr(jax, "make_mesh", follow_torus)
    grid = arranged((2, 2, 4), devices)
    assert {d.id for d in grid.flat} == set(range(16))
    assert all(len({d.process_index for d in group}) == 1 for group in grid.reshape(-1, 4))
    assert (grid.flat[0].id == 15) == (torus == "within hosts")  # the torus decides where it may


def collectives(program: str, kind: str) -> list[tuple[int, ...]]:
    """Shapes of what the collectives of a kind make."""
    shapes = re.findall(rf"= \(?\w+\[([\d,]*)\][^=]*? {kind}\(", program)
    return [tuple(int(n) for n in shape.split(",") if n) for shape in shapes]


@pytest.mark.parametrize("cfg", [CFG, UNTIED])
def test_update_gathers_neither_vocabulary_nor_logits(cfg):
    mesh = mesh_of_sizes((1, 2, 2))
    update = update_on(cfg, mesh, chunk=16)
    (batch,) = pack(samples(), row_length=48, rows=4)
    packed = place_rows(mesh, stack([batch], 2), axis=1)
    placed = TrainBatch(packed, packed.mask, packed.mask)
    params = params_on(cfg, mesh)
    program = update.accumulate.lower(params, *update.start(params), placed, 1).compile().as_text()
    gathered = collectives(program, "all-gather")
    assert any(cfg.width in shape for shape in gathered)  # the weights of a layer, and tiles of the head
    assert not any(cfg.vocab_size in shape for shape in gathered)


# ---------------------------------------------------------------------- the rollout


TEXTS = [b" " + bytes([97 + i % 26]) * (1 + i // 26) for i in range(CFG.vocab_size)]
TEXTS[5] = b" Wait"
MACHINE = Machine(
    policy=Confidence(question=(7, 8), max_notes=4, delta=0.02, strict=False, early_abort=True),
    max_response=40, think_budget=36, budget_margin=4, max_probes=3, max_repetitions=3, temperature=1.0,
    top_p=0.9, think_end=2, eos=(1,), closing=(10, 2, 10), top_k=0, min_p=0.0,
)  # fmt: skip
PROMPTS = [(3, 4, 11), (12, 13), (14, 15, 16, 17, 3), (20, 21), (22, 23, 24)]


def engine_on(sizes, kind="xla"):
    mesh = mesh_of_sizes(sizes)
    mine = share_of(mesh, jax.process_index())
    vocab = jax.device_put(build_vocabulary(TEXTS, ("Wait",), ()), replicated(mine))
    engine = RolloutEngine(
        CFG, MACHINE, vocab, lanes=8, max_prompt=8, dtype=jnp.float32, mesh=mine,
        attention=choose_attention(kind, mine),
    )  # fmt: skip
    return engine, decode_ready(params_on(CFG, mesh), CFG, "float32", mesh)


@functools.cache
def completions_on(sizes, kind="xla"):
    engine, ready = engine_on(sizes, kind)
    return engine(ready, PROMPTS, 3, jax.random.key(7))[0]


@pytest.mark.parametrize(
    ("kind", "count", "slices", "tensor", "most"),
    [
        ("TPU v6 lite", 16, 1, 4, 2),
        ("TPU v6 lite", 16, 1, 2, 2),
        ("TPU v5 lite", 32, 1, 2, 1),
        ("TPU v6 lite", 32, 1, 2, 2),
        ("TPU v5 lite", 32, 1, 1, 1),
        ("TPU v6 lite", 8, 1, 4, 4),
        ("TPU v6 lite", 16, 2, 4, 4),  # two slices of one host each
        ("TPU v5", 32, 1, 4, 4),
    ],
)
def test_weights_over_devices_are_refused_on_slices_for_which_that_does_not_compile(
    kind, count, slices, tensor, most
):
    devices = [SimpleNamespace(device_kind=kind, slice_index=i * slices // count) for i in range(count)]
    if tensor <= most:
        check_tensor(devices, tensor)
        return
    wanted = rf"config\.mesh\.tensor is {tensor}, .* set config\.mesh\.tensor={most},"
    with pytest.raises(UserError, match=wanted):
        check_tensor(devices, tensor)


@pytest.mark.parametrize("sizes", [(2, 2, 2), (1, 4, 1), (1, 1, 2)])
def test_completions_do_not_depend_on_the_mesh(sizes):
    expected = completions_on((1, 1, 1))
    assert {c.reason for c in expected} >= {"early_exit"} and sum(len(c.confidences) for c in expected) > 5
    for found, there in zip(completions_on(sizes), expected, strict=True):
        assert (found.tokens.tolist(), found.reason) == (there.tokens.tolist(), there.reason)
        np.testing.assert_allclose(found.logprobs, there.logprobs, rtol=1e-4, atol=1e-5)


def test_kernels_run_on_the_heads_of_a_device():
    for found, there in zip(completions_on((1, 1, 2), "pallas"), completions_on((1, 1, 1)), strict=True):
        assert found.tokens.tolist() == there.tokens.tolist()


def test_decode_loop_gathers_no_weights_and_no_logits():
    engine, ready = engine_on((1, 2, 2))
    programs = engine.compile(ready, completions=8)
    text = programs._programs["segment", programs.ladder.shapes[0]].as_text()
    gathered = collectives(text, "all-gather")
    assert gathered, "candidates of each part of the vocabulary are compared"
    assert max(map(np.prod, gathered)) <= 4 * 2  # a lane's best of each part
    assert not any(CFG.vocab_size in shape for shape in collectives(text, "all-reduce"))
