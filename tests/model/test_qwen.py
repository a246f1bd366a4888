"""The declaration of the weights, and their form in the decode loop."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from step_grpo.compile_time import COMPILED
from step_grpo.evaluate import decode_ready
from step_grpo.mesh import make_mesh, replicated
from step_grpo.model import qwen
from step_grpo.model.cache import LayerCache, copy_lanes, empty_cache, with_capacity, write_token

SIZES = {
    "vocab_size": 11, "width": 12, "layers": 3, "heads": 4, "kv_heads": 2, "head_dim": 6, "ffn": 10,
    "rope_theta": 1e4, "rms_eps": 1e-6,
}  # fmt: skip
CONFIGS = {
    "qwen3": qwen.QwenConfig(**SIZES, tied=True, qk_norm=True, qkv_bias=False),
    "qwen2": qwen.QwenConfig(**SIZES, tied=False, qk_norm=False, qkv_bias=True),
}
LETTERS = {"V": ("vocab", 11), "N": ("heads", 4), "K": ("kv_heads", 2), "F": ("ffn", 10), "H": (None, 6)}


@pytest.fixture(params=CONFIGS)
def cfg(request):
    return CONFIGS[request.param]


def test_shape_and_logical_axes_of_every_weight_follow_its_name(cfg):
    """`wq_DNH` is `[D, N, H]`, in a layer `[L, D, N, H]`; a norm over `D` alone is not sharded."""

    def check(path, weight, axes):
        name, stacked = path[-1].key, path[0].key == "layers"
        suffix = name.rpartition("_")[2]
        letters = LETTERS | {"D": ("embed" if len(suffix) > 1 else None, 12)}
        expected = [("layers", 3)] * stacked + [letters[letter] for letter in suffix]
        assert list(zip(axes, weight.shape, strict=True)) == expected, name
        assert len(set(axes) - {None}) == len([axis for axis in axes if axis]), name
        return True

    checked = jax.tree.map_with_path(check, qwen.abstract_params(cfg), qwen.logical_axes(cfg))
    assert len(jax.tree.leaves(checked)) == (13 if cfg.tied else 15)


def test_abstract_weights_are_those_that_are_initialised(cfg):
    made = jax.tree.map(lambda w: jax.ShapeDtypeStruct(w.shape, w.dtype), qwen.init_params(cfg, 0))
    assert jax.tree.leaves_with_path(made) == jax.tree.leaves_with_path(qwen.abstract_params(cfg))


def test_decode_weights_are_cast_once_and_taken_apart_by_layer(cfg):
    params = qwen.init_params(cfg, 0)
    ready = qwen.decode_params(params, jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(ready)} == {jnp.dtype("bfloat16")}
    assert len(ready["layers"]) == cfg.layers
    for i, layer in enumerate(ready["layers"]):
        for name, weight in layer.items():
            assert jnp.array_equal(weight, params["layers"][name][i].astype(jnp.bfloat16))
    assert ready.keys() == params.keys()


def test_decode_weights_of_more_layers_take_no_more_programs(cfg, compile_events):
    """Compilers take long over a merge of every layer; the second rollout compiles nothing."""
    mesh = make_mesh(1, 1)
    counts = {}
    for layers in (2, 5):
        deeper = replace(cfg, layers=layers, ffn=9 + layers)  # of shapes that no other test has
        params = jax.device_put(qwen.init_params(deeper, 0), replicated(mesh))
        for again in (False, True):
            compile_events.clear()
            ready = decode_ready(params, deeper, "bfloat16", mesh)
            counts[layers, again] = compile_events.count(COMPILED)
    of_a_layer, beside = 1, 1
    assert counts[2, False] == of_a_layer + beside
    assert counts[5, False] == of_a_layer
    assert counts[2, True] == counts[5, True] == 0
    expected = qwen.decode_params(params, jnp.bfloat16)
    assert jax.tree.all(jax.tree.map(jnp.array_equal, ready, expected))


def test_decode_step_casts_no_weight(cfg):
    """Every conversion of a type in the program is of activations, which are smaller than any matrix."""
    ready = qwen.decode_params(qwen.init_params(cfg, 0), jnp.bfloat16)
    cache = empty_cache(cfg.layers, 1, cfg.kv_heads, 4, cfg.head_dim, jnp.bfloat16)
    program = jax.make_jaxpr(lambda p: qwen.decode(p, cfg, jnp.zeros(1, jnp.int32), cache, jnp.ones(1, int)))(
        ready
    )
    weights = {leaf.shape for leaf in jax.tree.leaves(ready) if leaf.ndim > 1}
    casts = {e.invars[0].aval.shape for e in program.eqns if e.primitive.name == "convert_element_type"}
    assert casts and not casts & weights


def random_cache(seed: int, rows: int, length: int):
    shape = (rows, 2, length, 6)
    keys = jax.random.split(jax.random.key(seed), 6).reshape(3, 2)
    return tuple(LayerCache(jax.random.normal(k, shape), jax.random.normal(v, shape)) for k, v in keys)


def test_copied_lanes_hold_the_prompt_and_the_others_are_untouched():
    old, prompts = random_cache(0, rows=5, length=8), random_cache(1, rows=2, length=3)
    new = copy_lanes(old, prompts, jnp.array([-1, 1, -1, 0, 1]))
    for before, source, after in zip(*map(jax.tree.leaves, (old, prompts, new)), strict=True):
        assert jnp.array_equal(after[jnp.array([0, 2])], before[jnp.array([0, 2])])
        assert jnp.array_equal(after[jnp.array([1, 3, 4]), :, :3], source[jnp.array([1, 0, 1])])
        assert jnp.array_equal(after[:, :, 3:], before[:, :, 3:])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.int8], ids=["f32", "int8"])
def test_layout_of_the_keys_changes_nothing_else(dtype):
    """Whatever is done to a cache whose keys stand as columns is done to one where they stand as rows."""
    token = jax.random.normal(jax.random.key(5), (5, 2, 6))

    def use(keys_as_columns):
        zeros = empty_cache(3, 5, 2, 4, 6, dtype, keys_as_columns=keys_as_columns)
        prompts = random_cache(1, rows=2, length=3)
        cache = copy_lanes(with_capacity(zeros, 8), prompts, jnp.array([-1, 1, -1, 0, 1]))
        cache = tuple(write_token(layer, token, 2 * token, jnp.array([0, 5, 7, 8, 3])) for layer in cache)
        moved = copy_lanes(with_capacity(cache, 9), cache, jnp.array([4, -1, 3, 0, 1]))
        assert all(layer.keys_as_columns == keys_as_columns and layer.capacity == 9 for layer in moved)
        return tuple(layer.laid_out(False) for layer in (*moved, *with_capacity(moved, 2)))

    rows, columns = use(False), use(True)
    assert any(leaf.any() for leaf in jax.tree.leaves(rows))
    jax.tree.map(np.testing.assert_array_equal, rows, columns)


def test_token_behind_the_capacity_is_dropped_not_written_over_the_last():
    (cache, *_) = random_cache(2, rows=3, length=4)
    token = jnp.full((3, 2, 6), 7.0)
    after = write_token(cache, token, token, jnp.array([0, 4, 3]))
    for before, now in ((cache.k, after.k), (cache.v, after.v)):
        expected = np.array(before)
        expected[0, :, 0] = expected[2, :, 3] = 7
        assert np.array_equal(now, expected)


def test_head_is_the_embedding_where_they_are_tied(cfg):
    params = qwen.init_params(cfg, 0)
    expected = params["embed_VD"].T if cfg.tied else params["head_DV"]
    assert jnp.array_equal(qwen.head(params), expected)
    assert cfg.tied == ("head_DV" not in params)


def training_loss(cfg, remat):
    """A loss that every weight and every earlier token has a part in, of packed rows."""

    def loss(params, tokens_BT):
        positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
        segments_BT = 1 + (positions_BT >= 5)
        hidden = qwen.forward(params, cfg, tokens_BT, positions_BT, segments_BT, jnp.float32, remat=remat)
        return jnp.sum(jnp.sin(qwen.unembed(params, hidden)))

    return loss


def test_gradient_does_not_depend_on_what_is_recomputed(cfg):
    params = qwen.init_params(cfg, 0)
    tokens_BT = jnp.asarray(np.random.default_rng(0).integers(0, cfg.vocab_size, (2, 9)), jnp.int32)
    full, *others = (
        jax.jit(jax.value_and_grad(training_loss(cfg, remat)))(params, tokens_BT)
        for remat in ("full", "dots", "none")
    )
    for other in others:
        for path, grad in jax.tree.leaves_with_path(other):
            expected = dict(jax.tree.leaves_with_path(full))[path]
            scale = float(jnp.abs(expected).max())
            assert scale > 0
            np.testing.assert_allclose(grad, expected, rtol=0, atol=1e-6 * scale, err_msg=str(path))


def test_more_is_kept_the_less_is_recomputed():
    """Temporaries of the compiled gradient: `dots` adds every layer's products with weights, `none` all."""
    L, D, F, T = 8, 64, 256, 512
    sizes = {**SIZES, "width": D, "ffn": F, "layers": L, "head_dim": 16}
    cfg = qwen.QwenConfig(**sizes, tied=True, qk_norm=True, qkv_bias=False)
    tokens_BT = jax.ShapeDtypeStruct((1, T), jnp.int32)

    def temporaries(remat):
        gradient = jax.jit(jax.grad(training_loss(cfg, remat)))
        compiled = gradient.lower(qwen.abstract_params(cfg), tokens_BT).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    queries = keys_and_values = attended = D  # as wide as these sizes make them
    products = 4 * L * T * (queries + keys_and_values + attended + 2 * F)
    scores = 4 * L * cfg.heads * T * T  # not by a weight
    full, dots, none = (temporaries(remat) for remat in ("full", "dots", "none"))
    assert 0.9 * products < dots - full < 1.1 * products
    assert none > dots + scores
