"""Our model computes what transformers computes from the same files."""

import functools

import hf_models
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hf_models import DTYPES, FAMILIES, our_logits, packed_logits, random_tokens, transformers_logits

from step_grpo.model.cache import copy_lanes, empty_cache
from step_grpo.model.qwen import decode, decode_params, forward, prefill, unembed
from step_grpo.model.weights import load_checkpoint, load_params


@pytest.fixture(scope="module")
def checkpoint_of(tmp_path_factory):
    """Writes each kind of checkpoint once."""

    @functools.cache
    def write(family, dtype="float32", sharded=False):
        folder = tmp_path_factory.mktemp(family)
        return hf_models.write_checkpoint(folder, family, dtype, sharded)

    return write


def load(folder):
    checkpoint = load_checkpoint(folder)
    return load_params(checkpoint), checkpoint.config


@pytest.mark.parametrize("sharded", [False, True], ids=["single", "sharded"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_transformers(checkpoint_of, family, dtype, sharded):
    folder = checkpoint_of(family, dtype, sharded)
    assert (folder / "model.safetensors.index.json").exists() == sharded
    tokens = random_tokens(2, 33)
    expected = transformers_logits(folder, tokens)
    assert expected.std() > 0.5, "logits near zero would be equal whatever the weights"
    assert np.abs(our_logits(*load(folder), tokens) - expected).max() < 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_every_weight_of_every_layer_reaches_the_logits(checkpoint_of, family):
    params, cfg = load(checkpoint_of(family))
    tokens = random_tokens(1, 9)
    base = our_logits(params, cfg, tokens)
    params = jax.tree.map(np.asarray, params)
    leaves, tree = jax.tree.flatten(params)
    for i, (path, leaf) in enumerate(jax.tree_util.tree_leaves_with_path(params)):
        for layer in range(cfg.layers) if path[0].key == "layers" else [...]:
            changed = leaf.copy()
            changed[layer] = leaf[layer][..., ::-1]
            found = our_logits(
                jax.tree.unflatten(tree, [*leaves[:i], changed, *leaves[i + 1 :]]), cfg, tokens
            )
            assert np.abs(found - base).max() > 1e-3, (path, layer)


@pytest.mark.parametrize("family", ["qwen3_tied", "r1_distill"])
def test_config_of_the_older_form_gives_the_same_logits(checkpoint_of, tmp_path, family):
    folder = hf_models.write_checkpoint(tmp_path / "old", family)
    older = {"rope_parameters": None, "rope_theta": hf_models.THETA[family], "dtype": None}
    hf_models.edit_json(folder / "config.json", **older, torch_dtype="float32")
    assert "rope_parameters" not in load_checkpoint(folder).hf_config
    tokens = random_tokens(1, 20)
    np.testing.assert_array_equal(
        our_logits(*load(folder), tokens), our_logits(*load(checkpoint_of(family)), tokens)
    )


def test_rope_theta_of_the_file_is_used(tmp_path):
    folder = hf_models.write_checkpoint(tmp_path / "m", "qwen3_tied")
    tokens = random_tokens(1, 40)
    before = our_logits(*load(folder), tokens)
    hf_models.edit_json(folder / "config.json", rope_parameters={"rope_theta": 500.0, "rope_type": "default"})
    after = our_logits(*load(folder), tokens)
    assert np.abs(after - before).max() > 1e-2
    assert np.abs(after - transformers_logits(folder, tokens)).max() < 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_rows_equal_separate_sequences(checkpoint_of, family):
    params, cfg = load(checkpoint_of(family))
    sequences = [random_tokens(1, length)[0] for length in (5, 11, 1, 7)]
    padding = 6
    row = {
        "tokens": np.concatenate([*sequences, np.zeros(padding, int)]),
        "positions": np.concatenate([*(np.arange(len(s)) for s in sequences), np.zeros(padding, int)]),
        "segments": np.concatenate(
            [*(np.full(len(s), i + 1) for i, s in enumerate(sequences)), np.zeros(padding, int)]
        ),
    }
    packed = np.asarray(
        packed_logits(params, cfg, *(row[name][None] for name in ("tokens", "positions", "segments")))
    )[0]
    assert np.isfinite(packed).all()
    start = 0
    for sequence in sequences:
        alone = transformers_logits(checkpoint_of(family), sequence[None])[0]
        assert np.abs(packed[start : start + len(sequence)] - alone).max() < 1e-4
        start += len(sequence)


@pytest.mark.parametrize("family", ["qwen3_tied", "r1_distill"])
def test_gradient_of_padding_is_zero_and_finite(checkpoint_of, family):
    params, cfg = load(checkpoint_of(family))
    tokens, segments = random_tokens(1, 8), np.array([[1, 1, 1, 2, 2, 0, 0, 0]])
    positions = np.array([[0, 1, 2, 0, 1, 0, 0, 0]])

    def loss(params, tokens):
        x_BTD = forward(params, cfg, tokens, positions, segments, jnp.float32)
        return jnp.sum(unembed(params, x_BTD)[0, :5] ** 2)

    gradient = jax.jit(jax.grad(loss))
    found, other = gradient(params, tokens), gradient(params, np.where(segments == 0, 3, tokens))
    jax.tree.map(np.testing.assert_array_equal, found, other)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(found))


@pytest.mark.parametrize("family", FAMILIES)
def test_prefill_and_decode_equal_teacher_forcing(checkpoint_of, family):
    """Prompts of different lengths, padded, copied to other lanes of a larger cache, then decoded."""
    params, cfg = load(checkpoint_of(family))
    tokens, lengths, steps, capacity = random_tokens(3, 20), np.array([3, 9, 1]), 11, 24
    lane_row = np.array([2, 0, 1, 1])
    expected = transformers_logits(checkpoint_of(family), tokens)[lane_row]

    flat = decode_params(params, jnp.float32)
    prompts = jax.jit(prefill, static_argnames="cfg")(flat, cfg, tokens[:, : lengths.max()])
    sizes = cfg.layers, len(lane_row), cfg.kv_heads, capacity, cfg.head_dim
    cache = empty_cache(*sizes, jnp.float32, keys_as_columns=True)
    cache = jax.jit(copy_lanes)(cache, prompts, lane_row)
    advance = jax.jit(decode, static_argnames="cfg")
    lanes = np.arange(len(lane_row))
    length = lengths[lane_row] - 1  # the prompt's last token runs again, for its logits
    for _ in range(steps):
        logits, cache = advance(flat, cfg, tokens[lane_row, length], cache, length)
        assert np.abs(np.asarray(logits) - expected[lanes, length]).max() < 1e-4
        length = length + 1
