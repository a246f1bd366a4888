"""Qwen3 (dense) and Qwen2 as one Flax declaration and a few pure functions.

`Qwen` declares every weight once: shape, initialiser and logical axes. From there on everything is a pure
function of a plain dictionary of arrays (`params`) and a frozen, hashable `QwenConfig`:

- `forward`: packed rows through all layers, for training and log-probs (layers stacked, scanned, remat);
- `prefill` and `decode`: prompts and single tokens, with a cache, for sampling.

Both families differ in two switches of the architecture: Qwen3 normalises queries and keys before RoPE,
Qwen2 (and so R1-Distill-Qwen) has a bias on queries, keys and values.
"""

import dataclasses
from collections.abc import Callable, Mapping
from functools import lru_cache, partial
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from step_grpo.errors import UserError
from step_grpo.mesh import constrain, is_axes
from step_grpo.model.attention import XLA, Attention, decode_attention, full_attention
from step_grpo.model.cache import Cache, LayerCache
from step_grpo.model.linear import axes_of, cast, product, settled

Params = dict[str, Any]

REMAT: Mapping[str, Callable[[Callable], Callable]] = MappingProxyType(
    {
        "full": jax.checkpoint,
        "dots": partial(jax.checkpoint, policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable),
        "none": lambda body: body,
    }
)
"""What the backward pass computes anew of a layer: all, all but its products with weights, or nothing."""


@dataclasses.dataclass(frozen=True)
class QwenConfig:
    """Architecture of a checkpoint, as its own `config.json` states it."""

    vocab_size: int  # V
    width: int  # D
    layers: int  # L
    heads: int  # N
    kv_heads: int  # K
    head_dim: int  # H
    ffn: int  # F
    rope_theta: float
    rms_eps: float
    tied: bool  # the output head is the embedding
    qk_norm: bool  # Qwen3
    qkv_bias: bool  # Qwen2
    init_std: float = 0.02


def config_from_hf(hf: dict[str, Any]) -> QwenConfig:
    """Reads the architecture from the contents of a Hugging Face `config.json`.

    Raises:
        UserError: an unsupported model type, position scaling or attention variant, or a missing field.
    """
    kind = hf.get("model_type")
    if kind not in ("qwen3", "qwen2"):
        raise UserError(f"config.json: model_type is {kind!r}; supported are 'qwen3' (dense) and 'qwen2'")
    rope = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type != "default":
        raise UserError(f"config.json: rope type {rope_type!r} is not supported; only 'default' is")
    if hf.get("use_sliding_window"):
        raise UserError("config.json: use_sliding_window is true; only full attention is supported")
    if hf.get("hidden_act", "silu") != "silu":
        raise UserError(f"config.json: hidden_act {hf['hidden_act']!r} is not supported; only 'silu' is")
    if kind == "qwen3" and hf.get("attention_bias"):
        raise UserError("config.json: attention_bias is true; Qwen3 is supported without biases")
    try:
        cfg = QwenConfig(
            vocab_size=hf["vocab_size"],
            width=hf["hidden_size"],
            layers=hf["num_hidden_layers"],
            heads=hf["num_attention_heads"],
            kv_heads=hf["num_key_value_heads"],
            head_dim=_head_dim(kind, hf),
            ffn=hf["intermediate_size"],
            rope_theta=float(rope["rope_theta"] if "rope_theta" in rope else hf["rope_theta"]),
            rms_eps=hf["rms_norm_eps"],
            tied=bool(hf.get("tie_word_embeddings", False)),
            qk_norm=kind == "qwen3",
            qkv_bias=kind == "qwen2",
            init_std=hf.get("initializer_range", 0.02),
        )
    except KeyError as missing:
        raise UserError(f"config.json: field {missing} is missing") from None
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise UserError(f"config.json: a size is not a number ({error})") from None
    _check_sizes(cfg)
    return cfg


def _head_dim(kind: str, hf: dict[str, Any]) -> int:
    """The head width `H`; where the file is silent, the default of the family."""
    default = 128 if kind == "qwen3" else None
    return hf.get("head_dim", default) or hf["hidden_size"] // hf["num_attention_heads"]


def _check_sizes(cfg: QwenConfig) -> None:
    """Refuses sizes that no model can have.

    Raises:
        UserError: naming the size.
    """
    for name in ("vocab_size", "width", "layers", "heads", "kv_heads", "head_dim", "ffn"):
        size = getattr(cfg, name)
        if type(size) is not int or size < 1:
            raise UserError(f"config.json: the model's {name} is {size!r}; it must be a positive integer")
    if cfg.heads % cfg.kv_heads:
        raise UserError(
            f"config.json: {cfg.heads} attention heads are no multiple of {cfg.kv_heads} key/value heads"
        )
    if cfg.head_dim % 2:
        raise UserError(f"config.json: head_dim {cfg.head_dim} is odd; rotary embedding needs an even one")


class Qwen(nnx.Module):
    """Declares the weights; `layers` are stacked along a leading axis `L` that the names leave out."""

    def __init__(self, cfg: QwenConfig, rngs: nnx.Rngs):
        D, N, K, H, F = cfg.width, cfg.heads, cfg.kv_heads, cfg.head_dim, cfg.ffn
        normal = nnx.initializers.normal(cfg.init_std)
        zeros, ones = nnx.initializers.zeros, nnx.initializers.ones

        def weight(shape: tuple[int, ...], axes: tuple[str | None, ...], init) -> nnx.Param:
            return nnx.Param(init(rngs.params(), shape, jnp.float32), axes=axes)

        def stacked(shape: tuple[int, ...], axes: tuple[str | None, ...], init) -> nnx.Param:
            return weight((cfg.layers, *shape), ("layers", *axes), init)

        self.embed_VD = weight((cfg.vocab_size, D), ("vocab", "embed"), normal)
        self.final_norm_D = weight((D,), (None,), ones)
        if not cfg.tied:
            self.head_DV = weight((D, cfg.vocab_size), ("embed", "vocab"), normal)
        layers = {
            "attn_norm_D": stacked((D,), (None,), ones),
            "wq_DNH": stacked((D, N, H), ("embed", "heads", None), normal),
            "wk_DKH": stacked((D, K, H), ("embed", "kv_heads", None), normal),
            "wv_DKH": stacked((D, K, H), ("embed", "kv_heads", None), normal),
            "wo_NHD": stacked((N, H, D), ("heads", None, "embed"), normal),
            "mlp_norm_D": stacked((D,), (None,), ones),
            "w_gate_DF": stacked((D, F), ("embed", "ffn"), normal),
            "w_up_DF": stacked((D, F), ("embed", "ffn"), normal),
            "w_down_FD": stacked((F, D), ("ffn", "embed"), normal),
        }
        if cfg.qk_norm:
            layers["q_norm_H"] = stacked((H,), (None,), ones)
            layers["k_norm_H"] = stacked((H,), (None,), ones)
        if cfg.qkv_bias:
            layers["bq_NH"] = stacked((N, H), ("heads", None), zeros)
            layers["bk_KH"] = stacked((K, H), ("kv_heads", None), zeros)
            layers["bv_KH"] = stacked((K, H), ("kv_heads", None), zeros)
        self.layers = nnx.Dict(layers)


def init_params(cfg: QwenConfig, seed: int) -> Params:
    """Random float32 weights."""
    return nnx.to_pure_dict(nnx.state(Qwen(cfg, nnx.Rngs(params=seed)), nnx.Param))


def abstract_params(cfg: QwenConfig) -> Params:
    """The tree of `ShapeDtypeStruct` of the weights; nothing is allocated."""
    return nnx.to_pure_dict(nnx.state(nnx.eval_shape(lambda: Qwen(cfg, nnx.Rngs(params=0))), nnx.Param))


@lru_cache
def logical_axes(cfg: QwenConfig) -> Params:
    """The tree of logical axis names of the weights, a tuple a weight; read it, never write to it."""
    state = nnx.state(nnx.eval_shape(lambda: Qwen(cfg, nnx.Rngs(params=0))), nnx.Param)
    axes = jax.tree.map(
        lambda weight: weight.get_metadata("axes"), state, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable)
    )
    return nnx.to_pure_dict(axes)


def decode_axes(cfg: QwenConfig) -> Params:
    """The tree of logical axis names of what `decode_params` makes.

    `embed` is not among them: weights that every token reads are spread over as few devices as hold them.
    """
    axes = _gathered(logical_axes(cfg))
    layer = {name: names[1:] for name, names in axes["layers"].items()}
    return {**axes, "layers": (layer,) * cfg.layers}


def _gathered(axes: Params) -> Params:
    """The logical axes without those over which weights are only stored apart."""
    return jax.tree.map(
        lambda names: tuple(None if name == "embed" else name for name in names),
        axes,
        is_leaf=is_axes,
    )


def decode_params(params: Params, dtype) -> Params:
    """The weights as the decode loop wants them: cast once, merged with an adapter, the layers taken apart.

    Made once a rollout batch, so that no token casts or slices a weight. `evaluate.decode_ready` does the
    same with a program for one layer: that of all layers takes a TPU's compiler minutes where it merges.
    """
    stacked = params["layers"]
    layers = tuple(decode_layer(stacked, jnp.int32(i), dtype) for i in range(layer_count(params)))
    return {**decode_rest(params, dtype), "layers": layers}


def decode_layer(stacked: Params, layer: jax.Array, dtype) -> Params:
    """One of `decode_params`' layers.

    Args:
        stacked: `params["layers"]`, a leading axis `L`.
        layer: its number, int32.
        dtype: of the result.
    """

    def taken(part: jax.Array) -> jax.Array:
        return jax.lax.dynamic_index_in_dim(part, layer, keepdims=False)

    return {name: settled(jax.tree.map(taken, weight), dtype) for name, weight in stacked.items()}


def decode_rest(params: Params, dtype) -> Params:
    """What `decode_params` has beside its layers."""
    return {name: cast(weight, dtype) for name, weight in params.items() if name != "layers"}


def layer_count(params: Params) -> int:
    """How many layers are stacked."""
    return jax.tree.leaves(params["layers"])[0].shape[0]


def head(params: Params) -> jax.Array:
    """The output head `[D, V]`, tied or not."""
    return params["head_DV"] if "head_DV" in params else params["embed_VD"].T


def unembed(params: Params, x: jax.Array) -> jax.Array:
    """Logits `[..., V]` in float32 of hidden states `[..., D]`."""
    return jnp.einsum("...D,DV->...V", x, head(params).astype(x.dtype), preferred_element_type=jnp.float32)


def forward(
    params: Params,
    cfg: QwenConfig,
    tokens_BT: jax.Array,
    positions_BT: jax.Array,
    segments_BT: jax.Array,
    dtype,
    attention: Attention = XLA,
    remat: str = "full",
) -> jax.Array:
    """Hidden states after the final norm, `[B, T, D]`, of packed rows.

    A token sees the tokens before it that carry its own segment id; id 0 is padding. Layers are scanned; what
    is kept of them for the backward pass is one of `REMAT`.
    """
    rope = rope_table(positions_BT, cfg)
    mesh = attention.rows_over
    axes = {name: names[1:] for name, names in _gathered(logical_axes(cfg))["layers"].items()}

    def within_segments(q_BTNH, k_BTKH, v_BTKH):
        return full_attention(attention, q_BTNH, k_BTKH, v_BTKH, segments_BT), None

    @REMAT[remat]
    def body(x_BTD, weights):
        weights = {
            name: jax.tree.map(
                lambda part, where: constrain(mesh, part, *where), cast(w, dtype), axes_of(axes[name], w)
            )
            for name, w in weights.items()
        }
        x_BTD, _ = layer(cfg, weights, x_BTD, rope, within_segments)
        return constrain(mesh, x_BTD, "rows", None, None), None

    x_BTD = embed(params["embed_VD"], tokens_BT, dtype, mesh)
    x_BTD, _ = jax.lax.scan(body, x_BTD, params["layers"])
    return rms_norm(x_BTD, params["final_norm_D"].astype(dtype), cfg.rms_eps)


def embed(embed_VD: jax.Array, tokens_BT: jax.Array, dtype, mesh: Mesh | None) -> jax.Array:
    """Rows of the embedding, `[B, T, D]`, whose table is never gathered.

    Each device looks up its part of `D` for the rows of all that share the rest of it; then they exchange
    parts for rows, which is less than the table.
    """
    tokens_BT = constrain(mesh, tokens_BT, "copies", None)
    x_BTD = constrain(mesh, embed_VD[tokens_BT].astype(dtype), "copies", None, "embed")
    return constrain(mesh, x_BTD, "rows", None, None)


def prefill(params: Params, cfg: QwenConfig, tokens_BT: jax.Array, attention: Attention = XLA) -> Cache:
    """Runs prompts, padded on the right to `T`: a cache with room for `T` tokens.

    No token sees what is behind it, so that the padding needs no mask; what the cache holds there is garbage.
    """
    rope = rope_table(jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape), cfg)

    def keep(q_BTNH, k_BTKH, v_BTKH):
        kv = LayerCache(k_BTKH.swapaxes(1, 2), v_BTKH.swapaxes(1, 2))
        return full_attention(attention, q_BTNH, k_BTKH, v_BTKH), kv.laid_out(attention.keys_as_columns)

    x_BTD = params["embed_VD"][tokens_BT]
    cache = []
    for weights in params["layers"]:
        x_BTD, kv = layer(cfg, weights, x_BTD, rope, keep)
        cache.append(kv)
    return tuple(cache)


def decode(
    params: Params,
    cfg: QwenConfig,
    tokens_B: jax.Array,
    cache: Cache,
    length_B: jax.Array,
    attention: Attention = XLA,
) -> tuple[jax.Array, Cache]:
    """Runs one token a lane behind the `length_B` tokens that its cache holds.

    Returns:
        Logits `[B, V]` in float32, and the cache with the token written at position `length_B`.
    """
    rope = rope_table(length_B[:, None], cfg)

    x_B1D = params["embed_VD"][tokens_B][:, None]
    new_cache = []
    for weights, held in zip(params["layers"], cache, strict=True):

        def append(q_B1NH, k_B1KH, v_B1KH, held=held):
            token = q_B1NH[:, 0], k_B1KH[:, 0], v_B1KH[:, 0]
            out_BNH, kv = decode_attention(attention, *token, held, length_B)
            return out_BNH[:, None], kv

        x_B1D, kv = layer(cfg, weights, x_B1D, rope, append)
        new_cache.append(kv)
    x_B1D = rms_norm(x_B1D, params["final_norm_D"], cfg.rms_eps)
    return unembed(params, x_B1D[:, 0]), tuple(new_cache)


def layer(
    cfg: QwenConfig, weights: Params, x_BTD: jax.Array, rope: jax.Array, attention: Callable
) -> tuple[jax.Array, Any]:
    """One pre-norm transformer layer.

    Args:
        cfg: the architecture.
        weights: the layer's weights, without the `L` axis.
        x_BTD: residual stream.
        rope: `rope_table` of the positions.
        attention: `(q_BTNH, k_BTKH, v_BTKH) -> (out_BTNH, kept)`; knows the mask and the cache.

    Returns:
        The residual stream after the layer, and what `attention` kept.
    """
    with jax.named_scope("attention"):
        y_BTD = rms_norm(x_BTD, weights["attn_norm_D"], cfg.rms_eps)
        q = product("BTD,DNH->BTNH", y_BTD, weights["wq_DNH"])
        k = product("BTD,DKH->BTKH", y_BTD, weights["wk_DKH"])
        v = product("BTD,DKH->BTKH", y_BTD, weights["wv_DKH"])
        if cfg.qkv_bias:
            q, k, v = q + weights["bq_NH"], k + weights["bk_KH"], v + weights["bv_KH"]
        if cfg.qk_norm:
            q = rms_norm(q, weights["q_norm_H"], cfg.rms_eps)
            k = rms_norm(k, weights["k_norm_H"], cfg.rms_eps)
        out, kept = attention(apply_rope(q, rope), apply_rope(k, rope), v)
        x_BTD = x_BTD + product("BTNH,NHD->BTD", out, weights["wo_NHD"])
    with jax.named_scope("mlp"):
        y_BTD = rms_norm(x_BTD, weights["mlp_norm_D"], cfg.rms_eps)
        gate = jax.nn.silu(product("BTD,DF->BTF", y_BTD, weights["w_gate_DF"]))
        up = product("BTD,DF->BTF", y_BTD, weights["w_up_DF"])
        x_BTD = x_BTD + product("BTF,FD->BTD", gate * up, weights["w_down_FD"])
    return x_BTD, kept


def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """Root-mean-square norm over the last axis, computed in float32."""
    x32 = x.astype(jnp.float32)
    x32 = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    return x32.astype(x.dtype) * scale


def rope_table(positions_BT: jax.Array, cfg: QwenConfig) -> jax.Array:
    """Cosines and sines of rotary position embedding, float32 `[2, B, T, 1, H/2]` (arXiv 2104.09864)."""
    half = cfg.head_dim // 2
    frequency = cfg.rope_theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = positions_BT[:, :, None, None].astype(jnp.float32) * frequency
    return jnp.stack([jnp.cos(angle), jnp.sin(angle)])


def apply_rope(x_BTNH: jax.Array, rope: jax.Array) -> jax.Array:
    """Rotates the two halves of each head by the position's angles."""
    cos, sin = rope
    a, b = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x_BTNH.dtype)
