"""Every implementation of attention against a NumPy restatement, and the choice between them."""

import dataclasses
import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from step_grpo.errors import UserError
from step_grpo.mesh import make_mesh
from step_grpo.model import attention as attention_module
from step_grpo.model.attention import (
    SETTINGS,
    XLA,
    Attention,
    choose_attention,
    cudnn_applies,
    decode_attention,
    full_attention,
    splash_block,
    triton_blocks,
)
from step_grpo.model.cache import LayerCache, empty_cache, quantise, stored, stored_token, write_token
from step_grpo.model.tpu_kernels import (
    blocks_in_use,
    decode_block,
    ragged_decode_attention,
    write_token_in_place,
)

PALLAS = Attention("pallas", interpret=True)
# scores of about one, weights of about 1/S: what is left is the rounding of the products
TOLERANCE = {jnp.float32: 2e-6, jnp.bfloat16: 2e-2}


def plain_attention(q_BNH, k_BKSH, v_BKSH, length_B):
    """Softmax attention in float64, a lane and a head at a time."""
    q, k, v = (np.asarray(x, np.float64) for x in (q_BNH, k_BKSH, v_BKSH))
    out = np.zeros_like(q)
    for b, n in np.ndindex(q.shape[:2]):
        head, length = n * k.shape[1] // q.shape[1], length_B[b]
        if length:
            scores = k[b, head, :length] @ q[b, n] / np.sqrt(q.shape[2])
            weights = np.exp(scores - scores.max())
            out[b, n] = weights @ v[b, head, :length] / weights.sum()
    return out


def random(seed, *shape, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(seed), shape).astype(dtype)


def random_heads(B, K, G, S, H, dtype=jnp.float32):
    shapes = (B, K * G, H), (B, K, S, H), (B, K, S, H)
    return [random(i, *shape, dtype=dtype) for i, shape in enumerate(shapes)]


def ragged(q_BNH, k, v, length, *scales, **options):
    """The kernel takes queries that are scaled already."""
    q_BNH = q_BNH * jnp.asarray(q_BNH.shape[-1] ** -0.5, q_BNH.dtype)
    return ragged_decode_attention(q_BNH, k, v, length, *scales, interpret=True, **options)


# ---------------------------------------------------------------- the decode kernel


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize(("K", "G", "H"), [(1, 8, 128), (2, 1, 64), (3, 2, 64), (4, 4, 128), (8, 5, 16)])
def test_decode_kernel_equals_plain_attention_at_ragged_lengths(K, G, H, dtype):
    S, block = 384, 128
    lengths = np.array([0, 1, 127, 128, 129, 256, 257, 383, 384, 500])
    q, k, v = random_heads(len(lengths), K, G, S, H, dtype)
    out = ragged(q, k, v, lengths, block=block)
    assert out.dtype == dtype
    expected = plain_attention(q, k, v, np.minimum(lengths, S))
    assert np.abs(np.asarray(out, np.float64) - expected).max() < TOLERANCE[dtype]
    assert not out[0].any()  # a lane that sees nothing


@pytest.mark.parametrize("S", [64, 200, 320])
def test_last_block_may_reach_past_the_end_of_the_cache(S):
    """What lies there is NaN in interpret mode."""
    lengths = np.array([1, S - 1, S])
    q, k, v = random_heads(len(lengths), 2, 2, S, 16)
    block = 128 if S > 128 else S
    out = ragged(q, k, v, lengths, block=block)
    assert np.abs(out - plain_attention(q, k, v, lengths)).max() < 2e-6


@pytest.mark.parametrize("block", [128, 256, 384])
def test_what_lies_behind_a_length_is_never_read(block):
    lengths = np.array([5, 128, 300])
    q, k, v = random_heads(len(lengths), 2, 2, 384, 16)
    behind = np.arange(384)[None, None, :, None] >= lengths[:, None, None, None]
    out = ragged(q, jnp.where(behind, 1e30, k), jnp.where(behind, -1e30, v), lengths, block=block)
    np.testing.assert_array_equal(out, ragged(q, k, v, lengths, block=block))


def test_blocks_in_use_are_all_blocks_below_each_length_and_one_of_an_empty_lane():
    lengths, capacity, block = np.array([0, 1, 128, 129, 512]), 512, 128
    steps, lane, first = (np.asarray(x) for x in blocks_in_use(jnp.asarray(lengths), capacity, block))
    expected = [
        (b, at) for b, n in enumerate(lengths) for at in range(0, max(n, 1), block)
    ]  # lane and first position
    found = [(lane[i], (i - first[lane[i]]) * block) for i in range(steps)]
    assert found == expected and len(lane) == len(lengths) * capacity // block


def test_block_fits_twice_into_the_memory_of_a_core_and_is_whole_registers():
    for heads, itemsize, H in itertools.product((1, 2, 4, 8, 16), (1, 2, 4), (64, 128)):
        block = decode_block(heads, 1 << 20, H, itemsize)
        assert block % 128 == 0
        assert 4 * block * heads * 128 * itemsize <= 4 << 20  # keys and values, two of each
    assert decode_block(4, 64, 128, 2) == 64


# ---------------------------------------------------------------- the write


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.int8], ids=["f32", "bf16", "int8"])
@pytest.mark.parametrize("S", [20, 100, 256])
def test_written_token_stands_at_its_position_and_nothing_else_changed(S, dtype):
    positions = np.array([0, 7, 8, 15, 16, 17, S - 1, S, S + 1, S + 31, -1])
    B, K, H = len(positions), 2, 16
    old = stored(LayerCache(random(0, B, K, S, H), random(1, B, K, S, H)), dtype)
    token = stored_token(random(2, B, K, H), random(3, B, K, H), dtype)
    old_leaves, new_leaves = jax.tree.leaves(old), jax.tree.leaves(token)
    assert len(old_leaves) == (4 if dtype == jnp.int8 else 2)
    expected = [np.array(leaf) for leaf in old_leaves]
    for b, position in enumerate(positions):
        for leaf, new in zip(expected, new_leaves, strict=True):
            if 0 <= position < S:
                leaf[b, :, position] = new[b]
    found = write_token_in_place(tuple(old_leaves), tuple(new_leaves), positions, interpret=True)
    jax.tree.map(np.testing.assert_array_equal, list(found), expected)


def test_scatter_and_kernel_write_the_same_cache():
    positions = np.array([0, 5, 127, 128, 159, 160, 200])
    k, v = random(1, 7, 2, 16), random(2, 7, 2, 16)
    for dtype in (jnp.float32, jnp.bfloat16, jnp.int8):
        (cache,) = empty_cache(1, 7, 2, 160, 16, dtype)
        q = random(0, 7, 4, 16)
        found = [decode_attention(kind, q, k, v, cache, positions)[1] for kind in (XLA, PALLAS)]
        jax.tree.map(np.testing.assert_array_equal, *found)


# ---------------------------------------------------------------- decode_attention


@pytest.mark.parametrize(
    ("kind", "columns"), [(XLA, False), (XLA, True), (PALLAS, False)], ids=["xla", "columns", "pallas"]
)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["f32", "bf16"])
def test_decoded_token_sees_itself_and_what_the_cache_holds(kind, columns, dtype):
    lengths = np.array([0, 1, 100, 191])
    q, k, v = random_heads(4, 2, 3, 192, 64, dtype)
    new_k, new_v = random(7, 4, 2, 64, dtype=dtype), random(8, 4, 2, 64, dtype=dtype)
    held = LayerCache(k, v).laid_out(columns)
    out, cache = decode_attention(kind, q, new_k, new_v, held, lengths)
    assert cache.keys_as_columns == columns
    full_k, full_v = np.array(k), np.array(v)
    for b, length in enumerate(lengths):
        full_k[b, :, length], full_v[b, :, length] = new_k[b], new_v[b]
    np.testing.assert_array_equal(cache.laid_out(False).k, full_k)
    expected = plain_attention(q, full_k, full_v, lengths + 1)
    assert np.abs(np.asarray(out, np.float64) - expected).max() < TOLERANCE[dtype]


@pytest.mark.parametrize("kind", [XLA, PALLAS], ids=["xla", "pallas"])
def test_kernels_run_inside_shard_map_and_a_loop(kind):
    mesh = make_mesh(4)
    assert mesh.size == 4
    q, k, v = random_heads(8, 2, 2, 128, 16)
    lengths = jnp.array([3, 90, 0, 20, 50, 1, 77, 110])

    def local(q, k, v, length):
        def body(_, carry):
            q, cache, length = carry
            out, cache = decode_attention(kind, q, q[:, ::2], q[:, 1::2], cache, length)
            return out, cache, length + 1

        return jax.lax.fori_loop(0, 4, body, (q, LayerCache(k, v), length))

    lanes = PartitionSpec("data")
    sharded = jax.shard_map(local, mesh=mesh, in_specs=lanes, out_specs=lanes, check_vma=False)
    found, expected = jax.jit(sharded)(q, k, v, lengths), jax.jit(local)(q, k, v, lengths)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), found, expected)


# ---------------------------------------------------------------- int8


def test_quantised_value_is_off_by_half_a_factor_at_most():
    x = random(0, 50, 64) * jnp.logspace(-3, 3, 50)[:, None]
    x = x.at[7].set(0)
    values, scale = quantise(x)
    error = np.abs(np.asarray(values, np.float64) * np.asarray(scale, np.float64)[:, None] - x)
    assert values.dtype == jnp.int8 and (error <= np.asarray(scale)[:, None] * 0.5001).all()
    assert (np.abs(values).max(axis=1)[np.arange(50) != 7] == 127).all() and not values[7].any()


@pytest.mark.parametrize("kind", [XLA, PALLAS], ids=["xla", "pallas"])
@pytest.mark.parametrize("spread", [1.0, 4.0])
def test_attention_over_int8_is_within_the_bound_of_the_rounding(kind, spread):
    """A score is off by e at most, so a weight by the factor exp(2 e); a value by half its factor."""
    lengths = np.array([1, 40, 127, 128, 250, 255])
    q, k, v = random_heads(len(lengths), 2, 4, 256, 64)
    k, v = k * spread, v * spread
    cache = stored(LayerCache(k, v).laid_out(kind.keys_as_columns), jnp.int8)
    new_k, new_v = random(7, 6, 2, 64) * spread, random(8, 6, 2, 64) * spread
    out, cache = decode_attention(kind, q, new_k, new_v, cache, lengths)
    exact = write_token(LayerCache(k, v), new_k, new_v, lengths)
    expected = plain_attention(q, exact.k, exact.v, lengths + 1)
    norm1 = np.abs(np.asarray(q)).sum(axis=2).max()
    e = norm1 / np.sqrt(64) * float(cache.k_scale.max()) / 2
    bound = (np.exp(2 * e) - 1) * float(jnp.abs(exact.v).max()) + float(cache.v_scale.max()) / 2
    error = np.abs(np.asarray(out, np.float64) - expected).max()
    assert 0 < error < bound
    # and as it is in practice, for the bound assumes that all errors point the same way
    assert error < 0.03 * spread**2


@pytest.mark.parametrize(("K", "G", "H"), [(1, 8, 128), (2, 2, 64), (3, 1, 16)])
def test_int8_kernel_equals_plain_attention_over_the_rounded_cache(K, G, H):
    lengths = np.array([0, 1, 128, 200, 320])
    q, k, v = random_heads(len(lengths), K, G, 320, H)
    cache = stored(LayerCache(k, v), jnp.int8)
    rounded = [
        np.asarray(x, np.float64) * np.asarray(s)[..., None]
        for x, s in ((cache.k, cache.k_scale), (cache.v, cache.v_scale))
    ]
    out = ragged(q, cache.k, cache.v, lengths, cache.k_scale, cache.v_scale, block=128)
    assert np.abs(out - plain_attention(q, *rounded, lengths)).max() < 5e-6


# ---------------------------------------------------------------- whole sequences


def packed_case(T, N, K, H, dtype=jnp.float32):
    shapes = (2, T, N, H), (2, T, K, H), (2, T, K, H)
    q, k, v = (random(i, *shape, dtype=dtype) for i, shape in enumerate(shapes))
    cut = T // 3
    segments = np.ones((2, T), np.int32)
    segments[0, cut:], segments[0, -T // 5 :] = 2, 0
    segments[1, 5:] = 2
    return q, k, v, segments


def plain_full(q, k, v, segments):
    """Every position as a decoding step over the keys of its segment so far."""
    out = np.zeros(q.shape)
    for b, t in np.ndindex(segments.shape):
        own = [s for s in range(t + 1) if segments[b, s] == segments[b, t]]
        keys, values = (np.asarray(x)[b, own].swapaxes(0, 1)[None] for x in (k, v))
        out[b, t] = plain_attention(np.asarray(q)[b, t][None], keys, values, [len(own)])[0]
    return out


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("kind", [XLA, PALLAS], ids=["xla", "pallas"])
@pytest.mark.parametrize(("T", "N", "K", "H"), [(40, 4, 2, 64), (150, 3, 1, 16)])
def test_full_attention_sees_the_own_segment_so_far(kind, T, N, K, H, dtype):
    q, k, v, segments = packed_case(T, N, K, H, dtype)
    for ids in (segments, None):
        out = full_attention(kind, q, k, v, ids)
        expected = plain_full(q, k, v, np.ones_like(segments) if ids is None else ids)
        assert out.dtype == dtype
        assert np.abs(np.asarray(out, np.float64) - expected).max() < 2 * TOLERANCE[dtype]


@pytest.mark.parametrize("packed", [True, False])
def test_gradients_of_splash_attention_are_those_of_xla(packed):
    q, k, v, segments = packed_case(150, 4, 2, 16)
    real = (segments > 0)[:, :, None, None]

    def loss(kind):
        def of(q, k, v):
            out = full_attention(kind, q, k, v, segments if packed else None)
            return jnp.sum(jnp.where(real, jnp.sin(3 * out), 0))

        return jax.grad(of, argnums=(0, 1, 2))

    for found, expected in zip(loss(PALLAS)(q, k, v), loss(XLA)(q, k, v), strict=True):
        assert np.abs(expected).max() > 0.1
        assert np.abs(found - expected).max() < 2e-5


def test_rows_spread_over_devices_give_the_same_sequences_and_gradients():
    mesh = make_mesh(2)
    q, k, v, segments = packed_case(60, 2, 1, 16)

    def loss(kind, q):
        return jnp.sum(full_attention(kind, q, k, v, segments) ** 2)

    grad = jax.jit(jax.value_and_grad(loss, argnums=1), static_argnums=0)
    rows = jax.sharding.NamedSharding(mesh, PartitionSpec("data"))
    spread = dataclasses.replace(PALLAS, rows_over=mesh)
    found, expected = grad(spread, jax.device_put(q, rows)), grad(PALLAS, q)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), found, expected)


@pytest.mark.parametrize(
    ("length", "block"), [(1, 128), (129, 256), (512, 512), (640, 128), (768, 256), (18432, 512)]
)
def test_splash_block_pads_least_and_is_large(length, block):
    assert splash_block(length) == block


# ---------------------------------------------------------------- cuDNN


@pytest.fixture
def cudnn_on_xla(monkeypatch):
    """The calls that cuDNN would get, computed by XLA."""
    calls, real = [], jax.nn.dot_product_attention

    def dot_product_attention(*args, implementation, **options):
        calls.append(implementation)
        return real(*args, implementation="xla", **options)

    monkeypatch.setattr(attention_module.jax.nn, "dot_product_attention", dot_product_attention)
    return calls


@pytest.mark.parametrize(("K", "G"), [(2, 3), (1, 4), (4, 1)])
def test_calls_to_cudnn_mean_what_xla_computes(cudnn_on_xla, K, G):
    cudnn, dtype = Attention("cudnn"), jnp.bfloat16
    lengths = np.array([0, 1, 50, 63, 64])
    q, k, v = random_heads(5, K, G, 64, 16, dtype)
    new = random(8, 5, K, 16, dtype=dtype)
    out, cache = decode_attention(cudnn, q, new, new, LayerCache(k, v), lengths)
    expected = plain_attention(q, cache.k, cache.v, np.minimum(lengths + 1, 64))
    assert np.abs(np.asarray(out, np.float64) - expected).max() < TOLERANCE[dtype]
    q, k, v, segments = packed_case(40, K * G, K, 16, dtype)
    for ids in (None, segments):
        out = full_attention(cudnn, q, k, v, ids)
        expected = plain_full(q, k, v, np.ones_like(segments) if ids is None else ids)
        assert np.abs(np.asarray(out, np.float64) - expected).max() < 2 * TOLERANCE[dtype]
    assert cudnn_on_xla == ["cudnn"] * 3


@pytest.mark.parametrize(
    ("dtype", "T", "H", "masked", "applies"),
    [
        (jnp.bfloat16, 18432, 128, True, True),
        (jnp.float16, 64, 64, False, True),
        (jnp.float32, 64, 64, False, False),
        (jnp.bfloat16, 64, 12, False, False),
        (jnp.bfloat16, 64, 256, False, False),
        (jnp.bfloat16, 65, 64, True, False),
        (jnp.bfloat16, 65, 64, False, True),
    ],
)
def test_cudnn_applies_to_half_precision_and_heads_of_eights(dtype, T, H, masked, applies):
    assert cudnn_applies(jax.ShapeDtypeStruct((1, T, 4, H), dtype), masked=masked) == applies


@pytest.mark.parametrize(("K", "G", "S", "H"), [(2, 3, 64, 16), (1, 1, 48, 32), (2, 2, 384, 16)])
def test_where_cudnn_does_not_apply_a_kernel_decodes(cudnn_on_xla, K, G, S, H):
    gpu, dtype = Attention("cudnn", interpret=True), jnp.float32
    lengths = np.array([0, 1, 15, 16, S - 1, S])
    q, k, v = random_heads(6, K, G, S, H, dtype)
    new = random(8, 6, K, H, dtype=dtype)
    out, cache = decode_attention(gpu, q, new, new, LayerCache(k, v), lengths)
    expected = plain_attention(q, cache.k, cache.v, np.minimum(lengths + 1, S))
    assert np.abs(np.asarray(out, np.float64) - expected).max() < TOLERANCE[dtype]
    assert not cudnn_on_xla


def test_kernel_for_gpu_is_in_the_program_for_a_gpu():
    q, k, v = random_heads(2, 2, 2, 256, 32)
    step = jax.jit(partial(decode_attention, Attention("cudnn")))
    traced = step.trace(q, k[:, :, 0], v[:, :, 0], LayerCache(k, v), jnp.zeros(2, int))
    assert "triton" in traced.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize(
    ("capacity", "head_dim", "blocks"),
    [
        *[(64, 16, (64, 1)), (384, 128, (128, 3)), (4096, 64, (128, 16)), (18432, 128, (128, 16))],
        *[(48, 32, (16, 3)), (40, 32, None), (64, 12, None), (64, 8, None)],
    ],
)
def test_kernel_for_gpu_knows_powers_of_two(capacity, head_dim, blocks):
    assert triton_blocks(capacity, head_dim) == blocks


def test_where_neither_cudnn_nor_the_kernel_applies_xla_runs(cudnn_on_xla):
    cudnn = Attention("cudnn")
    q, k, v = random_heads(3, 2, 2, 40, 16)
    (quantised,) = empty_cache(1, 3, 2, 64, 16, jnp.int8)
    lengths = jnp.zeros(3, int)
    token = k[:, :, 0], v[:, :, 0]
    for dtype, cache in ((jnp.float32, LayerCache(k, v)), (jnp.bfloat16, quantised)):
        args = q.astype(dtype), *token, cache, lengths
        np.testing.assert_array_equal(decode_attention(cudnn, *args)[0], decode_attention(XLA, *args)[0])
    q, k, v, segments = packed_case(41, 2, 1, 16, jnp.bfloat16)
    np.testing.assert_array_equal(
        full_attention(cudnn, q, k, v, segments), full_attention(XLA, q, k, v, segments)
    )
    assert not cudnn_on_xla


# ---------------------------------------------------------------- the choice


class Device:
    """What the choice looks at."""

    def __init__(self, platform):
        self.platform = platform


class Devices:
    shape: dict[str, int] = {}  # noqa: RUF012

    def __init__(self, platform):
        self.devices = np.array([Device(platform)])


CHOICES = {
    ("auto", "cpu"): "xla", ("auto", "tpu"): "pallas", ("auto", "gpu"): "cudnn", ("auto", "new"): "xla",
    ("xla", "cpu"): "xla", ("xla", "tpu"): "xla", ("xla", "gpu"): "xla", ("xla", "new"): "xla",
    ("pallas", "cpu"): "pallas", ("pallas", "tpu"): "pallas",
    ("pallas", "gpu"): None, ("pallas", "new"): None,
    ("cudnn", "cpu"): None, ("cudnn", "tpu"): None, ("cudnn", "gpu"): "cudnn", ("cudnn", "new"): None,
}  # fmt: skip


@pytest.mark.parametrize(("setting", "platform"), CHOICES)
def test_choice_follows_setting_and_platform(setting, platform):
    assert {setting for setting, _ in CHOICES} == set(SETTINGS)
    expected = CHOICES[setting, platform]
    if expected is None:
        with pytest.raises(UserError, match=rf"config\.model\.attention is '{setting}'.*'{platform}'"):
            choose_attention(setting, Devices(platform))
    else:
        chosen = choose_attention(setting, Devices(platform))
        assert (chosen.kind, chosen.rows_over) == (expected, None)
        assert chosen.interpret == ((setting, platform) == ("pallas", "cpu"))


def test_choice_is_hashable_and_remembers_the_mesh_of_spread_rows():
    mesh = make_mesh(2)
    chosen = choose_attention("auto", mesh, spread_rows=True)
    assert isinstance(chosen.rows_over, Mesh) and hash(chosen) == hash(
        choose_attention("auto", mesh, spread_rows=True)
    )
    assert chosen != choose_attention("auto", mesh)
