"""Hugging Face folders: what is read, what is written, what is refused."""

import errno
import itertools
import json
import os
import pickle
import subprocess
import sys
import time
import weakref
from pathlib import Path

import hf_models
import jax
import ml_dtypes
import numpy as np
import pytest
from hf_models import DTYPES, FAMILIES, one_line, random_tokens, transformers_logits
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import PartitionSpec
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from test_checkpoint import no_file_above
from transformers import AutoModelForCausalLM

from step_grpo.errors import UserError
from step_grpo.mesh import make_mesh
from step_grpo.model import weights
from step_grpo.model.qwen import abstract_params, config_from_hf, init_params
from step_grpo.model.weights import (
    RULES,
    load_checkpoint,
    load_params,
    plan_shards,
    random_checkpoint,
    resolve_checkpoint,
    save_params,
)

INDEX = "model.safetensors.index.json"


@pytest.fixture
def folder(tmp_path):
    return hf_models.write_checkpoint(tmp_path / "m", "qwen3_tied")


@pytest.fixture
def sharded(tmp_path):
    return hf_models.write_checkpoint(tmp_path / "s", "qwen3_untied", sharded=True)


def edit_tensors(folder: Path, edit) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def refusal(call, *args, **kwargs) -> str:
    with pytest.raises(UserError) as caught:
        call(*args, **kwargs)
    assert one_line(str(caught.value))
    return str(caught.value)


# ---- reading ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_rules_cover_every_weight_and_tensor_once(tmp_path, family):
    checkpoint = load_checkpoint(hf_models.write_checkpoint(tmp_path, family))
    abstract = abstract_params(checkpoint.config)
    params = load_params(checkpoint)
    assert jax.tree.map(lambda w: (w.shape, w.dtype), params) == jax.tree.map(
        lambda w: (w.shape, w.dtype), abstract
    )
    assert len({rule.ours for rule in RULES}) == len({rule.hf for rule in RULES}) == len(RULES)


def test_at_most_one_tensor_is_on_the_host(folder, monkeypatch):
    """The arrays of earlier tensors are gone when the next one is read."""
    alive, placed = [], weights._placed

    def place(array, sharding):
        assert array.dtype == np.float32 and array.flags.c_contiguous
        assert all(ref() is None for ref in alive)
        alive.append(weakref.ref(array))
        return placed(array.copy(), sharding)

    monkeypatch.setattr(weights, "_placed", place)
    checkpoint = load_checkpoint(folder)
    load_params(checkpoint)
    assert len(alive) == 2 + 11 * checkpoint.config.layers


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_lie_in_their_shards_and_are_the_same(tmp_path, family):
    checkpoint = load_checkpoint(hf_models.write_checkpoint(tmp_path, family))
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    whole, spread = load_params(checkpoint), load_params(checkpoint, mesh)
    jax.tree.map(np.testing.assert_array_equal, whole, spread)
    assert spread["embed_VD"].sharding.spec == PartitionSpec("tensor", "fsdp")
    assert spread["layers"]["wq_DNH"].sharding.spec == PartitionSpec(None, "fsdp", "tensor")
    assert spread["layers"]["w_down_FD"].sharding.spec == PartitionSpec(None, "tensor", "fsdp")
    wq = spread["layers"]["wq_DNH"]
    assert wq.addressable_shards[0].data.size * 4 == wq.size


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtype_is_the_stored_one(tmp_path, dtype):
    assert load_checkpoint(hf_models.write_checkpoint(tmp_path, "r1_distill", dtype)).dtype == dtype


def test_tied_head_in_the_file_is_ignored_and_never_written(folder, tmp_path):
    before = load_params(load_checkpoint(folder))
    edit_tensors(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] * 3}))
    checkpoint = load_checkpoint(folder)
    after = load_params(checkpoint)
    jax.tree.map(np.testing.assert_array_equal, before, after)
    save_params(after, checkpoint.hf_config, tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        ([151645, 151643], 151645, (151645, 151643)),  # Qwen3
        (None, [5, 3], (5, 3)),
        (4, None, (4,)),
        ([1, 2], [3, 2], (1, 2, 3)),
        (None, None, ()),
    ],
)
def test_eos_ids_are_the_union_of_both_files_in_order(folder, generation, config, expected):
    hf_models.edit_json(folder / "config.json", eos_token_id=config)
    hf_models.edit_json(folder / "generation_config.json", eos_token_id=generation)
    assert load_checkpoint(folder).eos_ids == expected


def test_generation_config_may_be_absent(folder):
    (folder / "generation_config.json").unlink()
    checkpoint = load_checkpoint(folder)
    assert checkpoint.generation == {}
    assert checkpoint.eos_ids == (7,)


# ---- what is refused -------------------------------------------------------------------------------------


def test_missing_folder_is_named(tmp_path):
    assert "nowhere" in refusal(load_checkpoint, tmp_path / "nowhere")


def test_missing_config_is_named(folder):
    (folder / "config.json").unlink()
    assert "config.json: no such file" in refusal(load_checkpoint, folder)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff\xfe", b""])
def test_damaged_json_is_named(folder, name, content):
    (folder / name).write_bytes(content)
    assert name in refusal(load_checkpoint, folder)


def test_missing_weights_are_named(folder):
    (folder / "model.safetensors").unlink()
    assert "weights are missing" in refusal(load_checkpoint, folder)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "weights.pkl", "model.pt"])
def test_pickled_weights_are_refused_and_never_opened(folder, tmp_path, name):
    """Reading this file with pickle makes a mark."""
    marker = tmp_path / "code_was_run"

    class Bomb:
        def __reduce__(self):
            return Path.touch, (marker,)

    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(pickle.dumps(Bomb()))
    message = refusal(load_checkpoint, folder)
    assert repr(name) in message and "convert them to model.safetensors" in message
    assert not marker.exists()
    pickle.loads((folder / name).read_bytes())
    assert marker.exists()


def test_missing_tensor_is_named(folder):
    edit_tensors(folder, lambda t: t.pop("model.layers.1.self_attn.q_norm.weight"))
    assert "'model.layers.1.self_attn.q_norm.weight' is missing" in refusal(load_checkpoint, folder)


def test_tensor_of_the_wrong_shape_is_named(folder):
    edit_tensors(folder, lambda t: t.update({"model.norm.weight": np.ones(47, np.float32)}))
    message = refusal(load_checkpoint, folder)
    assert "'model.norm.weight' has shape (47,)" in message and "(48,)" in message


def test_transposed_tensor_is_refused(folder):
    name = "model.layers.0.mlp.up_proj.weight"
    edit_tensors(folder, lambda t: t.update({name: np.ascontiguousarray(t[name].T)}))
    assert name in refusal(load_checkpoint, folder)


@pytest.mark.parametrize(
    "name", ["model.layers.3.mlp.up_proj.weight", "model.layers.0.self_attn.q_proj.bias", "visual.weight"]
)
def test_unexpected_tensor_is_named(folder, name):
    edit_tensors(folder, lambda t: t.update({name: np.ones(3, np.float32)}))
    assert f"{name!r} is not expected" in refusal(load_checkpoint, folder)


def test_unsupported_dtype_is_named(folder):
    name = "model.layers.0.mlp.up_proj.weight"
    edit_tensors(folder, lambda t: t.update({name: t[name].astype(np.int8)}))
    assert f"{name!r} is I8" in refusal(load_checkpoint, folder)


@pytest.mark.parametrize("kept", [0, 5, 200, -1])
def test_truncated_file_is_named(folder, kept):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    assert "model.safetensors: damaged or incomplete" in refusal(load_checkpoint, folder)


def test_missing_shard_is_named(sharded):
    shard = sorted(sharded.glob("model-*.safetensors"))[1]
    shard.unlink()
    assert repr(shard.name) in refusal(load_checkpoint, sharded)


def test_index_does_not_lead_out_of_the_folder(sharded):
    index = json.loads((sharded / INDEX).read_text())
    index["weight_map"]["model.norm.weight"] = "../outside.safetensors"
    save_file({"model.norm.weight": np.ones(40, np.float32)}, sharded.parent / "outside.safetensors")
    (sharded / INDEX).write_text(json.dumps(index))
    assert "'../outside.safetensors'" in refusal(load_checkpoint, sharded)


def test_index_and_shard_that_disagree_are_refused(sharded):
    index = json.loads((sharded / INDEX).read_text())
    shards = sorted(set(index["weight_map"].values()))
    name = next(name for name, shard in index["weight_map"].items() if shard == shards[0])
    index["weight_map"][name] = shards[1]
    (sharded / INDEX).write_text(json.dumps(index))
    assert f"{name!r} is missing" in refusal(load_checkpoint, sharded)


@pytest.mark.parametrize("weight_map", [None, [], {"model.norm.weight": 3}, {}])
def test_index_without_a_weight_map_is_refused(sharded, weight_map):
    (sharded / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    refusal(load_checkpoint, sharded)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model_type", "llama"),
        ("num_attention_heads", 3),
        ("num_attention_heads", "4"),
        ("hidden_size", -1),
        ("num_hidden_layers", 0),
        ("head_dim", 15),
        ("attention_bias", True),
        ("use_sliding_window", True),
        ("hidden_act", "gelu"),
        ("rope_parameters", {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0}),
        ("rms_norm_eps", None),
        ("vocab_size", None),
    ],
)
def test_unsupported_architecture_is_refused(folder, field, value):
    hf_models.edit_json(folder / "config.json", **{field: value})
    refusal(load_checkpoint, folder)


@pytest.mark.parametrize("value", ["7", [7, "9"], -1, True, {"a": 1}])
def test_eos_that_is_no_id_is_named(folder, value):
    hf_models.edit_json(folder / "generation_config.json", eos_token_id=value)
    assert "generation_config.json: eos_token_id" in refusal(load_checkpoint, folder)


# ---- writing ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [2**30, 20_000], ids=["single", "sharded"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_save_load_save_gives_the_same_bytes(tmp_path, family, dtype, limit):
    source = load_checkpoint(hf_models.write_checkpoint(tmp_path / "m", family, dtype))
    first, second = tmp_path / "1", tmp_path / "2"
    first.mkdir()
    second.mkdir()
    save_params(load_params(source), source.hf_config, first, dtype=dtype, max_shard_bytes=limit)
    (first / "config.json").write_text(json.dumps(source.hf_config))
    again = load_params(load_checkpoint(first))
    save_params(again, source.hf_config, second, dtype=dtype, max_shard_bytes=limit)
    written = sorted(path.name for path in second.iterdir())
    assert (len(written) == 1) == (limit == 2**30)
    for name in written:
        assert (first / name).read_bytes() == (second / name).read_bytes()
    jax.tree.map(np.testing.assert_array_equal, load_params(source), again)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_written_tensors_are_those_that_transformers_wrote(tmp_path, family, dtype):
    folder = hf_models.write_checkpoint(tmp_path / "m", family, dtype)
    source = load_checkpoint(folder)
    save_params(load_params(source), source.hf_config, tmp_path, dtype=dtype)
    theirs, ours = load_file(folder / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert theirs.keys() == ours.keys()
    for name, tensor in theirs.items():
        assert tensor.dtype == ours[name].dtype
        np.testing.assert_array_equal(tensor, ours[name])
    with safe_open(tmp_path / "model.safetensors", framework="numpy") as handle:
        assert handle.metadata() == {"format": "pt"}


def test_float32_is_rounded_to_nearest_even(folder, tmp_path):
    source = load_checkpoint(folder)
    save_params(load_params(source), source.hf_config, tmp_path, dtype="bfloat16")
    expected = load_file(folder / "model.safetensors")
    for name, tensor in load_file(tmp_path / "model.safetensors").items():
        np.testing.assert_array_equal(tensor, expected[name].astype(ml_dtypes.bfloat16))


def test_saving_again_in_the_other_form_leaves_no_stale_weights(folder, tmp_path):
    source = load_checkpoint(folder)
    params = load_params(source)
    other = jax.tree.map(lambda w: w + 1, params)
    (tmp_path / "config.json").write_text(json.dumps(source.hf_config))
    for weights_now, limit in ((params, 2**30), (other, 20_000), (params, 2**30)):
        save_params(weights_now, source.hf_config, tmp_path, dtype="float32", max_shard_bytes=limit)
        assert (tmp_path / INDEX).exists() != (tmp_path / "model.safetensors").exists()
        jax.tree.map(np.testing.assert_array_equal, load_params(load_checkpoint(tmp_path)), weights_now)


def test_interrupted_save_keeps_the_old_file(folder, monkeypatch):
    before = (folder / "model.safetensors").read_bytes()
    source = load_checkpoint(folder)

    def write_half(arrays, path, metadata):
        Path(path).write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(weights, "save_file", write_half)
    with pytest.raises(KeyboardInterrupt):
        save_params(load_params(source), source.hf_config, folder)
    assert (folder / "model.safetensors").read_bytes() == before


def test_tensors_that_cannot_be_written_are_an_error_of_the_system_with_its_number(tmp_path):
    tensors = {"x": np.zeros(100_000, np.float32)}
    with no_file_above(1000), pytest.raises(OSError, match=r"x\.safetensors") as caught:
        weights.save_tensors(tensors, tmp_path / "x.safetensors")
    assert caught.value.errno == errno.EFBIG
    with pytest.raises(OSError, match="No such file") as caught:
        weights.save_tensors(tensors, tmp_path / "no" / "x.safetensors")
    assert caught.value.errno == errno.ENOENT


@pytest.mark.parametrize(("dtype", "value"), [("float16", 1e5), ("bfloat16", np.nan), ("float32", np.inf)])
def test_weight_that_is_not_finite_in_the_dtype_is_named(folder, tmp_path, dtype, value):
    source = load_checkpoint(folder)
    params = load_params(source)
    params["layers"]["wo_NHD"] = params["layers"]["wo_NHD"].at[2, 0, 0, 0].set(value)
    message = refusal(save_params, params, source.hf_config, tmp_path, dtype=dtype)
    assert "'model.layers.2.self_attn.o_proj.weight'" in message


def test_unknown_dtype_is_named(folder, tmp_path):
    source = load_checkpoint(folder)
    assert "'fp8'" in refusal(save_params, load_params(source), source.hf_config, tmp_path, dtype="fp8")


@given(st.lists(st.integers(1, 50), min_size=1), st.integers(1, 100))
def test_shards_hold_every_name_once_in_order_and_within_the_limit(sizes, limit):
    nbytes = {f"t{i}": size for i, size in enumerate(sizes)}
    shards = plan_shards(nbytes, limit)
    assert [name for shard in shards for name in shard] == list(nbytes)
    for shard in shards:
        assert shard and (len(shard) == 1 or sum(nbytes[name] for name in shard) <= limit)
    for left, right in itertools.pairwise(shards):  # a new shard only where it is needed
        assert sum(nbytes[name] for name in left) + nbytes[right[0]] > limit


# ---- names and random weights ----------------------------------------------------------------------------


def test_folder_resolves_to_itself(folder):
    assert resolve_checkpoint(str(folder)) == folder


@pytest.mark.parametrize("name", ["", "no-such-folder", "./no/such", "/no/such", "a/b/c", "builtin:huge"])
def test_name_that_is_nothing_names_the_field(name):
    assert refusal(resolve_checkpoint, name).startswith("config.model.checkpoint: ")


def resolve_in_a_process(tmp_path, **environment) -> tuple[int, str, float]:
    """What resolving a Hub name ends with in a fresh process with an empty cache: code, message, seconds."""
    code = (
        "import time\nfrom step_grpo.errors import UserError\nfrom step_grpo.model import weights\n"
        "start = time.monotonic()\n"
        "try: weights.resolve_checkpoint('Qwen/Qwen3-0.6B')\n"
        "except UserError as error: print(error.exit_code, error)\n"
        "print(time.monotonic() - start)"
    )
    ours = {
        n: v for n, v in os.environ.items() if not n.startswith("HF_") and not n.lower().endswith("_proxy")
    }
    ours.pop("TRANSFORMERS_OFFLINE", None)
    env = {**ours, "HF_HOME": str(tmp_path), "JAX_PLATFORMS": "cpu", **environment}
    run = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    message, seconds = run.stdout.splitlines()
    code, _, message = message.partition(" ")
    return int(code), message, float(seconds)


@pytest.mark.parametrize("environment", [{"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}])
def test_hub_out_of_reach_is_one_line_at_once(tmp_path, environment):
    code, message, seconds = resolve_in_a_process(tmp_path, **environment)
    assert code == (2 if "HF_HUB_OFFLINE" in environment else 75)
    assert message.startswith("config.model.checkpoint: 'Qwen/Qwen3-0.6B'") and "cannot be reached" in message
    assert seconds < 10


def test_hub_that_never_answers_is_given_up(tmp_path):
    import socket

    with socket.create_server(("127.0.0.1", 0)) as server:  # accepts, and stays silent
        start = time.monotonic()
        code, message, seconds = resolve_in_a_process(
            tmp_path, HF_ENDPOINT=f"http://127.0.0.1:{server.getsockname()[1]}"
        )
    assert code == 75 and "cannot be reached" in message
    assert seconds < 10 and time.monotonic() - start < 60


@pytest.mark.parametrize(
    ("status", "code", "reason", "ends"),
    [
        (404, "RepoNotFound", "no such model", 2),
        (401, "", "401", 2),
        (403, "GatedRepo", "licence", 2),
        (503, "", "503", 75),
    ],
)
def test_hub_refusal_says_why(tmp_path, status, code, reason, ends):
    import http.server
    import threading

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(status)
            self.send_header("X-Error-Code", code)
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_HEAD = do_GET

        def log_message(self, *args):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        found, message, _ = resolve_in_a_process(
            tmp_path, HF_ENDPOINT=f"http://127.0.0.1:{server.server_port}"
        )
        server.shutdown()
    assert reason in message and found == ends


@pytest.mark.parametrize("kind", ["qwen3", "qwen2"])
def test_random_checkpoint_is_complete_and_loads_in_transformers(tmp_path, kind):
    architecture = {
        "model_type": kind,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 10,
        "intermediate_size": 24,
        "vocab_size": hf_models.VOCAB,
        "rope_theta": 1e6,
        "tie_word_embeddings": True,
        "eos_token_id": [3, 4],
    }
    if kind == "qwen2":
        del architecture["head_dim"]
    hf_config, params = random_checkpoint(architecture, seed=3)
    assert config_from_hf(hf_config).rope_theta == 1e6
    assert hf_config["eos_token_id"] == [3, 4]
    jax.tree.map(np.testing.assert_array_equal, params, random_checkpoint(architecture, seed=3)[1])
    assert not np.array_equal(params["embed_VD"], random_checkpoint(architecture, seed=4)[1]["embed_VD"])

    save_params(params, hf_config, tmp_path, dtype="float32")
    (tmp_path / "config.json").write_text(json.dumps(hf_config))
    tokens = random_tokens(1, 12)
    ours = hf_models.our_logits(params, config_from_hf(hf_config), tokens)
    assert np.abs(ours - transformers_logits(tmp_path, tokens)).max() < 1e-4
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config.rope_parameters["rope_theta"] == 1e6


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({}, "model_type"),
        ({"model_type": "llama"}, "model_type"),
        ({"model_type": "qwen3", "hiden_size": 3}, "hiden_size"),
        ({"model_type": "qwen3", "hidden_size": "64"}, "hidden_size"),
    ],
)
def test_wrong_architecture_field_is_named(fields, named):
    message = refusal(random_checkpoint, fields, seed=0)
    assert message.startswith("config.model.architecture") and named in message


def test_initial_weights_have_the_declared_spread(folder):
    cfg = load_checkpoint(folder).config
    params = init_params(cfg, seed=0)
    assert abs(float(params["embed_VD"].std()) - cfg.init_std) < 0.1 * cfg.init_std
    assert (params["layers"]["attn_norm_D"] == 1).all()
