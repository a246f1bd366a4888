"""Log-probs of given tokens from hidden states, without ever holding the logits of all tokens.

For 4 x 16,384 tokens and a vocabulary of 151,936 the logits alone are 40 GB, and as much again in the
backward pass. Here one tile of `chunk` tokens by `vocab_chunk` entries lives at a time, forward and backward.
Tokens *and* vocabulary are cut, because each cut alone has a price:

- tokens only: every chunk reads and writes the whole f32 gradient of the head, [D, V]; chunks small enough to
  bound [chunk, V] make that, not the matrix product, the cost (and, over several devices, one reduction of
  the whole head a chunk).
- vocabulary only: the gradient of the hidden states, [B, T, D], has to be accumulated in f32 beside its bf16
  result, more than the tile itself.

With tiles of 4096 x 4096 both accumulators are touched once in 4096 rows or columns, the products are compute
bound and the tile is 64 MiB whatever D, V and T. Tokens are cut along T only, so rows that are sharded over
devices stay where they are.

On a mesh each device works through its own rows and its own part of the vocabulary (`tensor`); what they
exchange is the width of the head's tile at hand (`fsdp`) and five numbers a token.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jax.sharding import Mesh, PartitionSpec

from step_grpo.mesh import axis_size, row_shares, spec_of

# Stands for the logit of a column that is not to count. Finite, so that 0 times it is 0.
_NEVER = -1e30

_Arrays = tuple[jax.Array, ...]


class TokenLogprobs(NamedTuple):
    """Per-token figures, both f32 [B, T], in nats."""

    logprobs: jax.Array
    entropy: jax.Array


class _Tiling(NamedTuple):
    """Static: the size of a tile, the layout of the head, and by what the logits are divided."""

    width: int  # positions of every row
    vocab: int
    vocab_axis: int
    temperature: float
    mesh: Mesh | None

    @property
    def head_axes(self) -> str:
        """The axes of the head as einsum writes them."""
        return "vd" if self.vocab_axis == 0 else "dv"

    def over(self, *axes: str) -> tuple[str, ...]:
        """Those of the mesh's axes along which there are several devices."""
        return tuple(a for a in axes if self.mesh is not None and axis_size(self.mesh, a) > 1)


class _Tile(NamedTuple):
    """Logits of some tokens over some of the vocabulary, and what made them."""

    logits: jax.Array  # f32 [B, width, vocab], over temperature; _NEVER where an earlier tile had the column
    is_target: jax.Array  # bool [B, width, vocab]
    head: jax.Array  # [D, vocab] or [vocab, D], in the type of the hidden states
    start: jax.Array  # first column


def token_logprobs(
    hidden: jax.Array,
    head: jax.Array,
    targets: jax.Array,
    *,
    temperature: float = 1.0,
    chunk: int = 4096,
    vocab_chunk: int = 4096,
    vocab_axis: int = 1,
    mesh: Mesh | None = None,
) -> TokenLogprobs:
    """Log-prob of each target, and the entropy, under `softmax(hidden @ head / temperature)`.

    Differentiable in `hidden` and `head`, through both results. Products run in the type of `hidden`;
    logits, softmax and the accumulated gradients are f32. Pass the head as the f32 master weight: it is cast
    tile by tile, and its gradient is accumulated in f32.

    Args:
        hidden: [B, T, D].
        head: [D, V].
        targets: int [B, T], each in [0, V).
        temperature: above 0; a Python number.
        chunk: tokens (over all B rows) in a tile; at least one position of every row is taken.
        vocab_chunk: vocabulary entries in a tile.
        vocab_axis: 1 for a head [D, V]; 0 for [V, D], such as a tied embedding (a transpose is a copy).
        mesh: over whose devices rows and head lie as `step_grpo.mesh.RULES` says; a chunk is then of the
            tokens of one device. None: on one device, or wherever the compiler puts them.

    Returns:
        TokenLogprobs, f32 [B, T] each.
    """
    rows, length, _ = hidden.shape
    if mesh is not None:
        rows //= row_shares(mesh)
        vocab_chunk = min(vocab_chunk, head.shape[vocab_axis] // axis_size(mesh, "tensor"))
    tiling = _Tiling(
        width=min(length, max(1, chunk // rows)),
        vocab=min(head.shape[vocab_axis], vocab_chunk),
        vocab_axis=vocab_axis,
        temperature=temperature,
        mesh=mesh if mesh is not None and mesh.size > 1 else None,
    )
    return _tiled(hidden, head, targets, tiling)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _tiled(hidden: jax.Array, head: jax.Array, targets: jax.Array, tiling: _Tiling) -> TokenLogprobs:
    return _forward(hidden, head, targets, tiling)[0]


def _forward(
    hidden: jax.Array, head: jax.Array, targets: jax.Array, tiling: _Tiling
) -> tuple[TokenLogprobs, _Arrays]:
    """The result and what the backward pass needs: its inputs and two numbers a token."""
    program = _on_each_device(tiling, _forward_on_device, ("hidden", "head", "token"), ("token",) * 3)
    logprobs, entropy, log_z = program(hidden, head, targets)
    return TokenLogprobs(logprobs, entropy), (hidden, head, targets, entropy, log_z)


def _forward_for_gradient(hidden: Any, head: Any, targets: Any, tiling: _Tiling) -> tuple[TokenLogprobs, Any]:
    """`_forward`, and whether the head is one of the arguments of the gradient, in the form of a tree."""
    found, residuals = _forward(hidden.value, head.value, targets.value, tiling)
    return found, (residuals, () if head.perturbed else None)


def _backward(tiling: _Tiling, residuals: Any, cotangents: Any) -> tuple[jax.Array, jax.Array | None, None]:
    """Gradients of hidden and head, the tiles computed anew; of a head that is not trained there is none.

    No compiler takes a sum out of a loop that nobody reads, and this one is as large as the head.
    """
    arrays, head_is_trained = residuals
    tokens = [jnp.zeros(ct.shape, ct.dtype) if isinstance(ct, SymbolicZero) else ct for ct in cotangents]
    outputs = ("hidden",) if head_is_trained is None else ("hidden", "head")
    function = partial(_backward_on_device, head_is_trained is not None)
    program = _on_each_device(tiling, function, ("hidden", "head", *["token"] * 5), outputs)
    d_hidden, *d_head = program(*arrays, *tokens)
    return d_hidden, d_head[0] if d_head else None, None


_tiled.defvjp(_forward_for_gradient, _backward, symbolic_zeros=True)


def _on_each_device(
    tiling: _Tiling, function: Callable, inputs: Sequence[str], outputs: Sequence[str]
) -> Callable:
    """`function(tiling, *arrays)` run by every device of the mesh on its parts of the arrays."""
    mesh = tiling.mesh
    if mesh is None:
        return partial(function, tiling)
    head = ("vocab", "embed") if tiling.vocab_axis == 0 else ("embed", "vocab")
    specs: dict[str, PartitionSpec] = {
        "hidden": spec_of(mesh, ("rows", None, None)),
        "head": spec_of(mesh, head),
        "token": spec_of(mesh, ("rows", None)),
    }
    in_specs, out_specs = (tuple(specs[name] for name in names) for names in (inputs, outputs))
    return jax.shard_map(
        partial(function, tiling), mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
    )


def _forward_on_device(tiling: _Tiling, hidden: jax.Array, head: jax.Array, targets: jax.Array) -> _Arrays:
    """Log-prob, entropy and log of the normaliser of each token, f32 [B, T]."""

    def block(index, out):
        (h, t), start, _ = _cut((hidden, targets), index, tiling.width)

        def absorb(column, stats):
            return _absorb(stats, _tile(h, head, t, column, tiling))

        zeros = jnp.zeros(t.shape, jnp.float32)
        stats = lax.fori_loop(
            0,
            _count(head.shape[tiling.vocab_axis], tiling.vocab),
            absorb,
            (zeros + _NEVER, zeros, zeros, zeros),
        )
        top, total, weighted, target = _joined(stats, tiling)
        log_z = top + jnp.log(total)
        return _put(out, (target - log_z, jnp.log(total) - weighted / total, log_z), start)

    empty = jnp.zeros(targets.shape, jnp.float32)
    return lax.fori_loop(0, _count(targets.shape[1], tiling.width), block, (empty, empty, empty))


def _absorb(stats: _Arrays, tile: _Tile) -> _Arrays:
    """Add a tile to the running maximum m, sum of e^(x-m), sum of (x-m)e^(x-m) and logit of the target."""
    top, total, weighted, target = stats
    new_top = jnp.maximum(top, tile.logits.max(-1))
    total, weighted = _rescaled(total, weighted, top - new_top)
    relative = tile.logits - new_top[..., None]
    weight = jnp.exp(relative)
    return (
        new_top,
        total + weight.sum(-1),
        weighted + (weight * relative).sum(-1),
        target + jnp.where(tile.is_target, tile.logits, 0.0).sum(-1),
    )


def _rescaled(total: jax.Array, weighted: jax.Array, shift: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The two sums of `_absorb` for another maximum, smaller by `shift`."""
    scale = jnp.exp(shift)
    return total * scale, (weighted + total * shift) * scale


def _joined(stats: _Arrays, tiling: _Tiling) -> _Arrays:
    """The statistics of `_absorb` of the whole vocabulary from those of each device's part."""
    over = tiling.over("tensor")
    if not over:
        return stats
    top, total, weighted, target = stats
    new_top = lax.pmax(top, over)
    total, weighted = _rescaled(total, weighted, top - new_top)
    return new_top, *lax.psum((total, weighted, target), over)


def _backward_on_device(
    head_is_trained: bool,
    tiling: _Tiling,
    hidden: jax.Array,
    head: jax.Array,
    targets: jax.Array,
    entropy: jax.Array,
    log_z: jax.Array,
    ct_logprobs: jax.Array,
    ct_entropy: jax.Array,
) -> _Arrays:
    """Gradients of the device's hidden states and, where it is trained, of its part of the head.

    With p the softmax and H its entropy, d logprob / d logits = onehot - p, d H / d logits = -p (log p + H).
    """
    tokens = (hidden, targets, entropy, log_z, ct_logprobs, ct_entropy)

    def block(index, grads):
        (h, t, ent, lz, ct_logprob, ct_entropy), start, fresh = _cut(tokens, index, tiling.width)
        ct_logprob = jnp.where(fresh, ct_logprob, 0.0)[..., None]
        ct_entropy = jnp.where(fresh, ct_entropy, 0.0)[..., None]

        def column_block(column, grads):
            d_h, d_head = grads
            tile = _tile(h, head, t, column, tiling)
            log_p = tile.logits - lz[..., None]
            p = jnp.exp(log_p)
            d_logits = ct_logprob * (tile.is_target - p) - ct_entropy * p * (log_p + ent[..., None])
            d_logits = (d_logits / tiling.temperature).astype(h.dtype)
            d_h += _product(f"btv,{tiling.head_axes}->btd", d_logits, tile.head)
            if not head_is_trained:
                return d_h, d_head
            d_tile = _scattered(_product(f"btd,btv->{tiling.head_axes}", h, d_logits), tiling)
            d_tile += lax.dynamic_slice_in_dim(d_head, tile.start, tiling.vocab, tiling.vocab_axis)
            return d_h, lax.dynamic_update_slice_in_dim(d_head, d_tile, tile.start, tiling.vocab_axis)

        d_hidden, d_head = grads
        columns = _count(head.shape[tiling.vocab_axis], tiling.vocab)
        d_h, d_head = lax.fori_loop(0, columns, column_block, (jnp.zeros(h.shape, jnp.float32), d_head))
        d_h = lax.psum(d_h, tiling.over("tensor"))
        d_h += lax.dynamic_slice_in_dim(d_hidden, start, tiling.width, axis=1)
        return _put((d_hidden,), (d_h.astype(h.dtype),), start)[0], d_head

    d_head = jnp.zeros(head.shape if head_is_trained else (), jnp.float32)
    grads = (jnp.zeros(hidden.shape, hidden.dtype), d_head)
    d_hidden, d_head = lax.fori_loop(0, _count(targets.shape[1], tiling.width), block, grads)
    if not head_is_trained:
        return (d_hidden,)
    return d_hidden, lax.psum(d_head, tiling.over("data")).astype(head.dtype)


def _scattered(d_tile: jax.Array, tiling: _Tiling) -> jax.Array:
    """The gradient of the device's part of a tile of the head, of all rows that share the weights' `fsdp`."""
    over = tiling.over("fsdp")
    if not over:
        return d_tile
    return lax.psum_scatter(d_tile, over, scatter_dimension=1 - tiling.vocab_axis, tiled=True)


def _tile(h: jax.Array, head: jax.Array, targets: jax.Array, column: jax.Array, tiling: _Tiling) -> _Tile:
    """Tile number `column` of the device's part of the vocabulary, for the tokens `h` [B, width, D]."""
    size = head.shape[tiling.vocab_axis]
    start = jnp.minimum(column * tiling.vocab, size - tiling.vocab)
    ids = start + jnp.arange(tiling.vocab)
    fresh = ids >= column * tiling.vocab
    if over := tiling.over("tensor"):
        ids += lax.axis_index(over) * size
    tile = lax.dynamic_slice_in_dim(head, start, tiling.vocab, tiling.vocab_axis).astype(h.dtype)
    if over := tiling.over("fsdp"):
        tile = lax.all_gather(tile, over, axis=1 - tiling.vocab_axis, tiled=True)
    logits = _product(f"btd,{tiling.head_axes}->btv", h, tile) / tiling.temperature
    return _Tile(jnp.where(fresh, logits, _NEVER), fresh & (ids == targets[..., None]), tile, start)


def _product(axes: str, left: jax.Array, right: jax.Array) -> jax.Array:
    """An einsum with rows and positions, `bt`, as one axis (see `step_grpo.model.linear.product`)."""
    operands, out = axes.split("->")
    of_tokens = [
        x.reshape(-1, x.shape[-1]) if names.startswith("bt") else x
        for names, x in zip(operands.split(","), (left, right), strict=True)
    ]
    result = jnp.einsum(axes.replace("bt", "t"), *of_tokens, preferred_element_type=jnp.float32)
    return result.reshape(*left.shape[:2], -1) if out.startswith("bt") else result


def _count(length: int, size: int) -> int:
    return -(-length // size)


def _cut(arrays: _Arrays, index: jax.Array, size: int) -> tuple[_Arrays, jax.Array, jax.Array]:
    """Chunk `index` of arrays [B, T, ...] along T, its start, and which positions are new: bool [size].

    The last chunk is moved back to end with the arrays, so that no padded copy is made; the positions that it
    shares with the chunk before it are not new.
    """
    arrays = _tied_to(index, arrays)
    start = jnp.minimum(index * size, arrays[0].shape[1] - size)
    chunk = tuple(lax.dynamic_slice_in_dim(array, start, size, axis=1) for array in arrays)
    return chunk, start, start + jnp.arange(size) >= index * size


def _tied_to(index: jax.Array, arrays: _Arrays) -> _Arrays:
    """The arrays, as if they changed with the index of the loop, for XLA on a CPU.

    It computes bf16 in f32 and would cast before it cuts, so before the loop and all at once: an f32 copy of
    the hidden states. Other compilers have no such need, and TPU's would make a copy in another layout.
    """
    return lax.platform_dependent(
        index, arrays, cpu=lambda i, a: lax.optimization_barrier((i, a))[1], default=lambda i, a: a
    )


def _put(arrays: _Arrays, chunks: _Arrays, start: jax.Array) -> _Arrays:
    """Write chunks back where `_cut` found them."""
    return tuple(
        lax.dynamic_update_slice_in_dim(a, c, start, axis=1) for a, c in zip(arrays, chunks, strict=True)
    )
