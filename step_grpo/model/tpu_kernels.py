"""Pallas kernels for TPU: attention of one token a lane over a ragged cache, and the write of that token.

Both keep the layout of the cache, `[B, K, S, H]`. XLA alone does not: its scatter wants the heads of a
position side by side, so that a decode loop without these kernels copies the cache at every token.

The attention kernel walks a list of the blocks in use, lane by lane. Its grid is as long as that list: a
position behind a lane's length costs neither a fetch nor an empty grid step, and the pipeline fetches the
next lane's first block while the last one is computed. A block holds the positions of half of the heads
together, so that its fetch is long enough to hide the overhead of a grid step; the halves go to the two cores
of a chip that has two behind one device (v4, v5p), and one after the other elsewhere.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

VECTOR = 128  # width of a register, and so the unit of the minor axis in memory
TILE_BYTES = 32  # rows of a memory tile times the size of an element
BLOCK_BYTES = 1 << 19  # of keys, and as much of values; two of each are in flight
MASKED = -0.7 * float(jnp.finfo(jnp.float32).max)  # finite: -inf would make NaN where nothing is seen


def decode_block(heads: int, capacity: int, head_dim: int, itemsize: int) -> int:
    """Positions of a block of `heads` heads: as many times 128 as fill `BLOCK_BYTES`, or the whole cache."""
    position = heads * pl.cdiv(head_dim, VECTOR) * VECTOR * itemsize
    return min(max(BLOCK_BYTES // position // VECTOR, 1) * VECTOR, capacity)


def blocks_in_use(length_B: jax.Array, capacity: int, block: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The list of blocks that the attention kernel walks.

    Every lane has at least one, in which its output is written.

    Returns:
        Its length; the lane of each entry, padded to all blocks of the cache; each lane's first entry, `[B]`.
    """
    B = length_B.shape[0]
    count_B = jnp.maximum(pl.cdiv(length_B, block), 1)
    lanes = jnp.arange(B, dtype=jnp.int32)
    lane = jnp.repeat(lanes, count_B, total_repeat_length=B * pl.cdiv(capacity, block))
    end_B = jnp.cumsum(count_B)
    return end_B[-1], lane, end_B - count_B


def ragged_decode_attention(
    q_BNH: jax.Array,
    k_BKSH: jax.Array,
    v_BKSH: jax.Array,
    length_B: jax.Array,
    k_scale_BKS: jax.Array | None = None,
    v_scale_BKS: jax.Array | None = None,
    *,
    block: int | None = None,
    interpret: bool = False,
) -> jax.Array:
    """Attention of one query a lane over the first `length_B` positions of its cache.

    Scores and softmax are float32; products are of the queries' dtype. The online softmax is that of
    FlashAttention (arXiv 2205.14135).

    Args:
        q_BNH: queries, already divided by the root of `H`.
        k_BKSH: keys; `N` is a multiple of `K`.
        v_BKSH: values.
        length_B: positions to see; a lane that sees none returns zeros.
        k_scale_BKS: float32 factors of int8 keys; None where keys and values are not quantised.
        v_scale_BKS: float32 factors of int8 values, likewise.
        block: positions fetched at a time, a multiple of 128 or `S`; None: `decode_block`.
        interpret: run on any platform, slowly.

    Returns:
        `[B, N, H]` in the dtype of the queries.
    """
    B, N, H = q_BNH.shape
    K, S = k_BKSH.shape[1:3]
    halves = 2 if K % 2 == 0 else 1
    heads, G = K // halves, N // K
    scale_operands = [x for x in (k_scale_BKS, v_scale_BKS) if x is not None]
    quantised = len(scale_operands) == 2
    block = block or decode_block(heads, S, H, k_BKSH.dtype.itemsize)
    length_B = jnp.minimum(length_B.astype(jnp.int32), S)
    steps, lane, first = blocks_in_use(length_B, S, block)

    def of_lane(half, step, lane, first, length):
        return lane[step], half, 0, 0

    def of_block(half, step, lane, first, length):
        return lane[step], half, step - first[lane[step]], 0

    def of_scales(half, step, lane, first, length):
        return lane[step], 0, step - first[lane[step]]

    queries = pl.BlockSpec((1, heads, G, H), of_lane)
    cached = pl.BlockSpec((1, heads, block, H), of_block)
    scales = pl.BlockSpec((1, K, block), of_scales)  # of all heads: a tile of memory holds eight
    out = pl.pallas_call(
        functools.partial(_attend_block, block=block, capacity=S, quantised=quantised),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(halves, steps),
            in_specs=[queries, cached, cached, *([scales] * len(scale_operands))],
            out_specs=queries,
            scratch_shapes=[
                pltpu.VMEM((heads, G, VECTOR), jnp.float32),
                pltpu.VMEM((heads, G, VECTOR), jnp.float32),
                pltpu.VMEM((heads, G, H), jnp.float32),
            ],
        ),
        out_shape=jax.ShapeDtypeStruct((B, K, G, H), q_BNH.dtype),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        interpret=interpret,
        name="ragged_decode_attention",
    )(lane, first, length_B, q_BNH.reshape(B, K, G, H), k_BKSH, v_BKSH, *scale_operands)
    return out.reshape(B, N, H)


def _attend_block(lane_ref, first_ref, length_ref, q_ref, k_ref, v_ref, *refs, block, capacity, quantised):
    """One block of one lane: carries on the maximum, the sum and the weighted values of an online softmax."""
    scale_refs, (out_ref, max_ref, sum_ref, acc_ref) = refs[:-4], refs[-4:]
    lane = lane_ref[pl.program_id(1)]
    start = (pl.program_id(1) - first_ref[lane]) * block
    length = length_ref[lane]

    @pl.when(start == 0)
    def _():
        max_ref[...] = jnp.full_like(max_ref, MASKED)
        sum_ref[...] = jnp.zeros_like(sum_ref)
        acc_ref[...] = jnp.zeros_like(acc_ref)

    q, k, v = q_ref[0], k_ref[0].astype(q_ref.dtype), v_ref[0].astype(q_ref.dtype)
    if capacity % block:  # the last block reaches past the end of the cache, where there may be NaN
        inside = start + jax.lax.broadcasted_iota(jnp.int32, v.shape, 1) < capacity
        v = jnp.where(inside, v, jnp.zeros_like(v))
    scores = jnp.einsum("KGH,KSH->KGS", q, k, preferred_element_type=jnp.float32)
    visible = start + jax.lax.broadcasted_iota(jnp.int32, scores.shape, 2) < length
    if quantised:
        k_scale, v_scale = (_of_this_half(ref[0], k.shape[0]) for ref in scale_refs)
        scores *= k_scale
    scores = jnp.where(visible, scores, MASKED)

    old_max, old_sum = max_ref[:, :, :1], sum_ref[:, :, :1]
    new_max = jnp.maximum(old_max, jnp.max(scores, axis=2, keepdims=True))
    decay = jnp.exp(old_max - new_max)
    weights = jnp.where(visible, jnp.exp(scores - new_max), 0.0)
    new_sum = decay * old_sum + jnp.sum(weights, axis=2, keepdims=True)
    max_ref[...] = jnp.broadcast_to(new_max, max_ref.shape)
    sum_ref[...] = jnp.broadcast_to(new_sum, sum_ref.shape)
    if quantised:
        weights = jnp.where(visible, weights * v_scale, 0.0)
    weighted = jnp.einsum("KGS,KSH->KGH", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
    acc_ref[...] = decay * acc_ref[...] + weighted

    @pl.when(start + block >= length)
    def _():
        out_ref[0] = (acc_ref[...] / jnp.where(new_sum == 0, 1.0, new_sum)).astype(out_ref.dtype)


def _of_this_half(scale_KS: jax.Array, heads: int) -> jax.Array:
    """Scales of the grid's half of the heads, `[heads, 1, S]`; the compiler wants the slices static."""
    if scale_KS.shape[0] > heads:
        scale_KS = jnp.where(pl.program_id(0) == 0, scale_KS[:heads], scale_KS[heads:])
    return scale_KS[:, None]


def write_token_in_place(
    caches: tuple[jax.Array, ...],
    tokens: tuple[jax.Array, ...],
    position_B: jax.Array,
    *,
    interpret: bool = False,
) -> tuple[jax.Array, ...]:
    """Writes one token a lane at `position_B` of caches whose buffers are given up for the result.

    Only the tile of memory around a position is read and written. A position outside the cache is dropped.

    Args:
        caches: `[B, K, S, H]` or, for scales, `[B, K, S]`.
        tokens: for each cache `[B, K, H]` or `[B, K]`, in its dtype.
        position_B: where to write.
        interpret: run on any platform, slowly.

    Returns:
        The caches after the write.
    """
    B, K, S = caches[0].shape[:3]
    rows = [_positions_of_a_tile(cache) for cache in caches]

    def token_spec(token):
        return pl.BlockSpec((1, *token.shape[1:]), lambda lane, position: (lane, *[0] * (token.ndim - 1)))

    def tile_spec(cache, rows):
        def at(lane, position):
            tile = jnp.clip(position[lane], 0, S - 1) // rows
            return lane, 0, tile, *[0] * (cache.ndim - 3)

        return pl.BlockSpec((1, K, rows, *cache.shape[3:]), at)

    tokens = tuple(token[:, :, None] for token in tokens)
    tiles = [tile_spec(cache, n) for cache, n in zip(caches, rows, strict=True)]
    count = len(caches)
    return pl.pallas_call(
        functools.partial(_write_tiles, rows=rows, capacity=S),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(B,),
            in_specs=[*map(token_spec, tokens), *tiles],
            out_specs=tuple(tiles),
        ),
        out_shape=tuple(jax.ShapeDtypeStruct(cache.shape, cache.dtype) for cache in caches),
        input_output_aliases={1 + count + i: i for i in range(count)},  # position, tokens, caches
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
        interpret=interpret,
        name="write_token",
    )(position_B.astype(jnp.int32), *tokens, *caches)


def _positions_of_a_tile(cache: jax.Array) -> int:
    """Positions in one tile of memory: rows of `[S, H]`, or columns of `[K, S]`; all of a smaller cache."""
    tile = VECTOR if cache.ndim == 3 else TILE_BYTES // cache.dtype.itemsize
    return min(tile, cache.shape[2])


def _write_tiles(position_ref, *refs, rows, capacity):
    """Puts one lane's token into the tile of each cache that holds its position."""
    position = position_ref[pl.program_id(0)]
    count = len(rows)
    for token, old, new, n in zip(
        refs[:count], refs[count : 2 * count], refs[2 * count :], rows, strict=True
    ):
        start = jnp.clip(position, 0, capacity - 1) // n * n
        row = start + jax.lax.broadcasted_iota(jnp.int32, old.shape[1:], 1)
        new[0] = jnp.where(row == position, token[0], old[0])
