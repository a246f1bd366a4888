"""Grouped-query attention behind two functions, by the platform of the devices that run the program.

`full_attention` is for whole sequences (prefill and training), `decode_attention` for one token a lane
against a cache. A frozen `Attention` says which implementation a program is built with. Nothing here asks
what the host has: a program for a TPU is lowered on any machine by asking for it.
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.gpu.decode_attention import mqa
from jax.experimental.pallas.ops.tpu import splash_attention as splash
from jax.sharding import Mesh

from step_grpo.errors import UserError
from step_grpo.mesh import axis_size, is_axes, spec_of
from step_grpo.model.cache import LayerCache, stored_token, write_token
from step_grpo.model.tpu_kernels import ragged_decode_attention, write_token_in_place

SETTINGS = ("auto", "xla", "pallas", "cudnn")
SPLASH_BLOCKS = (512, 256, 128)  # positions of queries and of keys handled at a time
XLA_BLOCKS = 4  # of queries, where there is no kernel
XLA_LEAST = 128  # positions from which on queries are taken in blocks
TRITON_BLOCK = 128  # keys that the kernel for GPU handles at a time, at most
TRITON_SPLITS = 16  # parts of a cache that it handles side by side, at most


@dataclasses.dataclass(frozen=True)
class Attention:
    """Which implementation a program uses; hashable, so that a change is a new program.

    Attributes:
        kind: `xla` runs everywhere; `pallas` are kernels for TPU; `cudnn` is for NVIDIA GPUs, where one token
            a lane goes through a Pallas kernel if cuDNN does not take it.
        interpret: the Pallas kernels run on any platform, slowly.
        rows_over: the mesh over which the compiler spreads the rows of whole sequences, and their heads.
            None where each device has rows of its own, as in `shard_map`.
        heads_over: the mesh over whose `tensor` axis the compiler spreads the heads of such own rows.
    """

    kind: str = "xla"
    interpret: bool = False
    rows_over: Mesh | None = None
    heads_over: Mesh | None = None

    @property
    def keys_as_columns(self) -> bool:
        """How the cache that it decodes with holds its keys."""
        return self.kind == "xla"


XLA = Attention()


def choose_attention(setting: str, mesh: Mesh, *, spread_rows: bool = False) -> Attention:
    """The implementation for the devices of a mesh.

    Args:
        setting: `config.model.attention`.
        mesh: of the devices that will run the program; they may be those of a topology that is not here.
        spread_rows: the program is one for all devices, its rows spread by the compiler; else it runs in a
            `shard_map` over the rows.

    Raises:
        UserError: the devices cannot run what the setting names.
    """
    platform = mesh.devices.flat[0].platform
    kind = {"tpu": "pallas", "gpu": "cudnn"}.get(platform, "xla") if setting == "auto" else setting
    runs_on = {"xla": (platform,), "pallas": ("tpu", "cpu"), "cudnn": ("gpu",)}[kind]
    if platform not in runs_on:
        raise UserError(
            f"config.model.attention is {setting!r}, which does not run on the platform {platform!r}; "
            "it must be 'auto' or 'xla'"
        )
    interpret = kind == "pallas" and platform == "cpu"
    if spread_rows:
        return Attention(kind, interpret, rows_over=mesh)
    return Attention(kind, interpret, heads_over=mesh if axis_size(mesh, "tensor") > 1 else None)


def cudnn_applies(q_BTNH: jax.Array, *, masked: bool) -> bool:
    """Whether cuDNN's fused attention takes queries of this type and shape, on any GPU that has it.

    Args:
        q_BTNH: queries; the keys are of the same type.
        masked: with a mask beside the causal one, which cuDNN takes as a bias.
    """
    T, H = q_BTNH.shape[1], q_BTNH.shape[3]
    half = q_BTNH.dtype in (jnp.bfloat16, jnp.float16)
    return half and H % 8 == 0 and H <= 128 and not (masked and T % 2)


def triton_blocks(capacity: int, head_dim: int) -> tuple[int, int] | None:
    """How the Pallas kernel for GPU goes through a cache of `capacity` tokens.

    Returns:
        Keys handled at a time, and parts of the cache handled side by side; None where Triton, which knows
        powers of two from 16 on, has no way.
    """
    block = min(capacity & -capacity, TRITON_BLOCK)  # the largest power of two that divides it
    if block < 16 or head_dim < 16 or head_dim & (head_dim - 1):
        return None
    blocks = capacity // block
    return block, max(n for n in range(1, TRITON_SPLITS + 1) if blocks % n == 0)


# ---------------------------------------------------------------- whole sequences


def full_attention(
    attention: Attention,
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    segments_BT: jax.Array | None = None,
) -> jax.Array:
    """Causal attention of sequences to themselves; a query always sees its own key.

    Args:
        attention: the implementation.
        q_BTNH: queries.
        k_BTKH: keys; `N` is a multiple of `K`.
        v_BTKH: values.
        segments_BT: ids of the sequences packed into a row; a query sees keys of its own id alone. None: each
            row is one sequence.

    Returns:
        `[B, T, N, H]` in the dtype of the queries.
    """
    implementation = {"xla": _full_xla, "pallas": _full_splash, "cudnn": _full_cudnn}[attention.kind]

    def of_a_device(q, k, v, segments):
        return implementation(attention, q, k, v, segments)

    q, kv = ("rows", None, "heads", None), ("rows", None, "kv_heads", None)
    axes = (q, kv, kv, None if segments_BT is None else ("rows", None))
    kv_heads = k_BTKH.shape[2]
    program = _on_each_device(attention, of_a_device, kv_heads, axes, q)
    return program(q_BTNH, k_BTKH, v_BTKH, segments_BT)


def _on_each_device(
    attention: Attention, function: Callable, kv_heads: int, in_axes: Sequence[Any], out_axes: Any
) -> Callable:
    """`function` run by every device on its rows and heads, for the compiler cannot take a kernel apart.

    Args:
        attention: its `kind` says whether there is a kernel.
        function: of arrays.
        kv_heads: where they do not spread over the devices, each computes all heads.
        in_axes: a tree of tuples of logical axes (`mesh.RULES`) for every argument; None for one without
            arrays.
        out_axes: of the result, likewise.
    """
    mesh = attention.rows_over or attention.heads_over
    if attention.kind == "xla" or mesh is None or mesh.size == 1:
        return function
    whole = {"rows"} if attention.rows_over is None else set()
    if kv_heads % axis_size(mesh, "tensor"):
        whole |= {"heads", "kv_heads"}

    def specs(axes):
        return spec_of(mesh, [None if name in whole else name for name in axes])

    in_specs, out_specs = (jax.tree.map(specs, axes, is_leaf=is_axes) for axes in (tuple(in_axes), out_axes))
    if attention.rows_over is None:  # in a shard_map over the rows already
        return jax.shard_map(
            function, in_specs=in_specs, out_specs=out_specs, axis_names={"tensor"}, check_vma=False
        )
    return jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def _same_segment(segments_BT: jax.Array) -> jax.Array:
    return segments_BT[:, :, None] == segments_BT[:, None, :]


def _full_xla(attention, q_BTNH, k_BTKH, v_BTKH, segments_BT):
    """A few blocks of queries, each with the keys up to its own end: three in eight scores are never made."""
    T = q_BTNH.shape[1]
    mask_BTS = jnp.tril(jnp.ones((T, T), bool))[None]
    if segments_BT is not None:
        mask_BTS &= _same_segment(segments_BT)
    kv = LayerCache(k_BTKH.swapaxes(1, 2), v_BTKH.swapaxes(1, 2))
    size = -(-T // XLA_BLOCKS) if T >= XLA_LEAST else T

    def block(start):
        end = min(start + size, T)
        seen = jax.tree.map(lambda x: x[:, :, :end], kv)
        return attend(q_BTNH[:, start:end], seen, mask_BTS[:, start:end, :end])

    return jnp.concatenate([block(start) for start in range(0, T, size)], axis=1)


def _full_cudnn(attention, q_BTNH, k_BTKH, v_BTKH, segments_BT):
    masked = segments_BT is not None
    if not cudnn_applies(q_BTNH, masked=masked):
        return _full_xla(attention, q_BTNH, k_BTKH, v_BTKH, segments_BT)
    mask_B1TS = _same_segment(segments_BT)[:, None] if masked else None
    return jax.nn.dot_product_attention(
        q_BTNH, k_BTKH, v_BTKH, mask=mask_B1TS, is_causal=True, implementation="cudnn"
    )


def _full_splash(attention, q_BTNH, k_BTKH, v_BTKH, segments_BT):
    B, T, N, H = q_BTNH.shape
    block = splash_block(T)
    padding = -T % block

    def padded(x):
        return jnp.pad(x, [(0, 0), (0, padding), *[(0, 0)] * (x.ndim - 2)])

    # Padding sees padding: splash attention has no answer for a query that sees nothing.
    segments_BT = padded(jnp.ones((B, T), jnp.int32) if segments_BT is None else segments_BT)
    q_BTNH = q_BTNH * jnp.asarray(H**-0.5, q_BTNH.dtype)
    q, k, v = (padded(x).swapaxes(1, 2) for x in (q_BTNH, k_BTKH, v_BTKH))
    kernel = splash.make_splash_mha_single_device(
        splash.MultiHeadMask([splash.CausalMask((T + padding, T + padding))] * N),
        block_sizes=_splash_block_sizes(block),
        interpret=attention.interpret,
    )
    out_BNTH = jax.vmap(lambda q, k, v, ids: kernel(q, k, v, splash.SegmentIds(ids, ids)))(
        q, k, v, segments_BT
    )
    return out_BNTH[:, :, :T].swapaxes(1, 2)


def splash_block(length: int) -> int:
    """The block that pads a sequence the least; of several, the largest."""
    return min(SPLASH_BLOCKS, key=lambda block: (-length % block, -block))


def _splash_block_sizes(block: int) -> splash.BlockSizes:
    return splash.BlockSizes(
        block_q=block,
        block_kv=block,
        block_kv_compute=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_kv_dkv_compute=block,
        block_q_dq=block,
        block_kv_dq=block,
    )


# ---------------------------------------------------------------- one token a lane


def decode_attention(
    attention: Attention,
    q_BNH: jax.Array,
    k_BKH: jax.Array,
    v_BKH: jax.Array,
    cache: LayerCache,
    length_B: jax.Array,
) -> tuple[jax.Array, LayerCache]:
    """Writes one token a lane behind the `length_B` tokens of its cache, and attends to all of them.

    Args:
        attention: the implementation.
        q_BNH: the token's queries.
        k_BKH: its keys.
        v_BKH: its values.
        cache: of the layer, quantised or not.
        length_B: tokens in the cache. A token that it has no room for is dropped.

    Returns:
        `[B, N, H]` in the dtype of the queries, and the cache.
    """
    q, kv = ("rows", "heads", None), ("rows", "kv_heads", None)
    held = jax.tree.map(lambda x: ("rows", "kv_heads", *[None] * (x.ndim - 2)), cache)
    implementation = {"xla": _decode_xla, "pallas": _decode_pallas, "cudnn": _decode_cudnn}[attention.kind]
    axes = (q, kv, kv, held, ("rows",))
    program = _on_each_device(attention, partial(implementation, attention), k_BKH.shape[1], axes, (q, held))
    return program(q_BNH, k_BKH, v_BKH, cache, length_B)


def _decode_xla(attention, q_BNH, k_BKH, v_BKH, cache, length_B):
    cache = write_token(cache, k_BKH, v_BKH, length_B)
    mask_B1S = (jnp.arange(cache.capacity) <= length_B[:, None])[:, None]
    return attend(q_BNH[:, None], cache, mask_B1S)[:, 0], cache


def _decode_cudnn(attention, q_BNH, k_BKH, v_BKH, cache, length_B):
    fused = cudnn_applies(q_BNH[:, None], masked=False)
    blocks = triton_blocks(cache.capacity, q_BNH.shape[-1])
    if cache.k_scale is not None or not (fused or blocks):
        return _decode_xla(attention, q_BNH, k_BKH, v_BKH, cache, length_B)
    cache = write_token(cache, k_BKH, v_BKH, length_B)
    if fused:
        return _attend_cudnn(q_BNH, cache, length_B + 1), cache
    assert blocks
    return _attend_triton(q_BNH, cache, length_B + 1, *blocks, interpret=attention.interpret), cache


def _decode_pallas(attention, q_BNH, k_BKH, v_BKH, cache, length_B):
    leaves, kept = jax.tree.flatten(cache)
    new = jax.tree.leaves(stored_token(k_BKH, v_BKH, cache.k.dtype))
    written = write_token_in_place(tuple(leaves), tuple(new), length_B, interpret=attention.interpret)
    cache = jax.tree.unflatten(kept, written)
    q_BNH = q_BNH * jnp.asarray(q_BNH.shape[-1] ** -0.5, q_BNH.dtype)
    out = ragged_decode_attention(
        q_BNH, cache.k, cache.v, length_B + 1, cache.k_scale, cache.v_scale, interpret=attention.interpret
    )
    return out, cache


def _attend_cudnn(q_BNH: jax.Array, cache: LayerCache, length_B: jax.Array) -> jax.Array:
    """The heads of keys go to the batch, and the query heads that share one become its `T`.

    So the cache keeps its layout, where `[B, S, K, H]` would be a copy of it.
    """
    B, N, H = q_BNH.shape
    K, S = cache.k.shape[1:3]
    k, v = (x.reshape(B * K, S, 1, H) for x in (cache.k, cache.v))
    length = jnp.repeat(jnp.minimum(length_B, S), K).astype(jnp.int32)
    out = jax.nn.dot_product_attention(
        q_BNH.reshape(B * K, N // K, 1, H), k, v, key_value_seq_lengths=length, implementation="cudnn"
    )
    return out.reshape(B, N, H)


def _attend_triton(q_BNH, cache: LayerCache, length_B, block: int, splits: int, *, interpret: bool):
    """The kernel reads the tokens in use alone; as in cuDNN's, the heads of keys go to the batch."""
    B, N, H = q_BNH.shape
    K, S = cache.k.shape[1:3]
    k, v = (x.reshape(B * K, S, H).astype(q_BNH.dtype) for x in (cache.k, cache.v))
    length = jnp.repeat(jnp.minimum(length_B, S), K).astype(jnp.int32)
    q = q_BNH.reshape(B * K, N // K, H)
    out = mqa(q, k, v, kv_seq_len=length, block_k=block, k_splits=splits, interpret=interpret)
    return out.reshape(B, N, H)


# ---------------------------------------------------------------- XLA


def attend(
    q_BTNH: jax.Array,
    held: LayerCache,
    mask_BTS: jax.Array,
) -> jax.Array:
    """Softmax attention of `N` query heads over `K` key/value heads, `N` a multiple of `K`.

    Scores and softmax are float32 whatever the dtype of the inputs. A query that may see no key returns the
    mean of the values, a finite number that nothing reads.

    Args:
        q_BTNH: queries.
        held: keys and values.
        mask_BTS: True where query `t` may see key `s`.

    Returns:
        `[B, T, N, H]` in the dtype of the queries.
    """
    B, T, N, H = q_BTNH.shape
    K = held.v.shape[1]
    G = N // K
    k, v_BKSH = held.k.astype(q_BTNH.dtype), held.v.astype(q_BTNH.dtype)
    # The queries of a group stand as the rows of one product: with an axis of its own for one query time,
    # XLA's CPU matrix products are several times slower.
    q_BKMH = q_BTNH.reshape(B, T, K, G, H).transpose(0, 2, 3, 1, 4).reshape(B, K, G * T, H)
    product = "BKMH,BKHS->BKMS" if held.keys_as_columns else "BKMH,BKSH->BKMS"
    scores = jnp.einsum(product, q_BKMH, k, preferred_element_type=jnp.float32)
    if held.k_scale is not None:
        scores *= held.k_scale[:, :, None]
    scores = scores.reshape(B, K, G, T, -1) * H**-0.5
    scores = jnp.where(mask_BTS[:, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).reshape(B, K, G * T, -1)
    if held.v_scale is not None:
        weights *= held.v_scale[:, :, None]
    out_BKMH = jnp.einsum("BKMS,BKSH->BKMH", weights.astype(v_BKSH.dtype), v_BKSH)
    return out_BKMH.reshape(B, K, G, T, H).transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)
