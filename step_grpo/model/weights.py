"""Hugging Face folders to parameters and back, one tensor at a time.

`RULES` says which tensor of a file is which weight of `step_grpo.model.qwen`, and how the axes of the two
lie; everything else follows from it and from the architecture. A file stores a linear map as `[out, in]`,
heads joined (`[N*H, D]`); ours are `[in, out]`, heads apart (`wq_DNH`), and the layers are stacked.
"""

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

import step_grpo
from step_grpo import hub, paths
from step_grpo.distributed import is_first
from step_grpo.errors import UserError
from step_grpo.mesh import shardings
from step_grpo.model.linear import Weight, axes_of, dense
from step_grpo.model.qwen import (
    Params,
    QwenConfig,
    abstract_params,
    config_from_hf,
    init_params,
    logical_axes,
)

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
LOOKED_AT = 64  # values of each tensor that tell one model from another
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")  # never opened
DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
STORED = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)


class Rule(NamedTuple):
    """One tensor of the file and one weight of ours."""

    hf: str  # name in the file; `{}` stands for the layer
    ours: str  # name in `params`, or in `params["layers"]`; its suffix names our axes
    axes: tuple[str, ...]  # axes in the file: `("NH", "D")` is a matrix `[N*H, D]`


RULES = (
    Rule("model.embed_tokens.weight", "embed_VD", ("V", "D")),
    Rule("model.layers.{}.input_layernorm.weight", "attn_norm_D", ("D",)),
    Rule("model.layers.{}.self_attn.q_proj.weight", "wq_DNH", ("NH", "D")),
    Rule("model.layers.{}.self_attn.q_proj.bias", "bq_NH", ("NH",)),
    Rule("model.layers.{}.self_attn.k_proj.weight", "wk_DKH", ("KH", "D")),
    Rule("model.layers.{}.self_attn.k_proj.bias", "bk_KH", ("KH",)),
    Rule("model.layers.{}.self_attn.v_proj.weight", "wv_DKH", ("KH", "D")),
    Rule("model.layers.{}.self_attn.v_proj.bias", "bv_KH", ("KH",)),
    Rule("model.layers.{}.self_attn.o_proj.weight", "wo_NHD", ("D", "NH")),
    Rule("model.layers.{}.self_attn.q_norm.weight", "q_norm_H", ("H",)),
    Rule("model.layers.{}.self_attn.k_norm.weight", "k_norm_H", ("H",)),
    Rule("model.layers.{}.post_attention_layernorm.weight", "mlp_norm_D", ("D",)),
    Rule("model.layers.{}.mlp.gate_proj.weight", "w_gate_DF", ("F", "D")),
    Rule("model.layers.{}.mlp.up_proj.weight", "w_up_DF", ("F", "D")),
    Rule("model.layers.{}.mlp.down_proj.weight", "w_down_FD", ("D", "F")),
    Rule("model.norm.weight", "final_norm_D", ("D",)),
    Rule("lm_head.weight", "head_DV", ("V", "D")),
)
HEAD = RULES[-1].hf


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A Hugging Face folder whose config and tensor names, shapes and types have been checked."""

    config: QwenConfig
    hf_config: dict[str, Any]  # config.json as it is
    generation: dict[str, Any]  # generation_config.json as it is, or {}
    eos_ids: tuple[int, ...]  # every id that ends a completion
    folder: Path
    dtype: str  # of the stored embedding: "float32", "float16" or "bfloat16"
    files: dict[str, Path]  # where each tensor is


def resolve_checkpoint(name: str, field: str = "config.model.checkpoint") -> Path:
    """The folder that `name` means: `builtin:tiny`, a folder, or a name on the Hugging Face Hub.

    A Hub snapshot is downloaded, or taken from the cache where the Hub cannot be reached.

    Args:
        name: what the user wrote.
        field: the config field or flag it was written in, for the error.

    Raises:
        UserError: it is none of them, or the Hub does not hand it out.
    """
    if name.startswith("builtin:"):
        assets = Path(step_grpo.__file__).parent / "assets"
        shipped = {f"builtin:{folder.name}": folder for folder in assets.iterdir() if folder.is_dir()}
        if name not in shipped:
            names = ", ".join(sorted(shipped))
            raise UserError(f"{field}: there is no {name!r} in this installation; there is {names}")
        return shipped[name]
    folder = paths.folder(name).expanduser()
    if name and folder.is_dir():
        return paths.fetched(folder)
    if not re.fullmatch(r"\w[\w.-]*/[\w.-]+", name):
        raise UserError(
            f"{field}: {name!r} is no folder; give a folder, a Hub name org/name, or builtin:tiny"
        )
    return _snapshot(name, field)


def load_checkpoint(folder: str | Path) -> Checkpoint:
    """Reads the config files and the headers of the weights; no tensor is read.

    Raises:
        UserError: the folder, a file or a tensor is missing, damaged, of the wrong shape, or not expected.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; a checkpoint is a folder with config.json and {WEIGHTS}")
    hf_config = read_json(folder / "config.json")
    generation_file = folder / "generation_config.json"
    generation = read_json(generation_file) if generation_file.exists() else {}
    config = config_from_hf(hf_config)
    files = _tensor_files(folder)
    return Checkpoint(
        config=config,
        hf_config=hf_config,
        generation=generation,
        eos_ids=eos_ids_of(generation, hf_config),
        folder=folder,
        dtype=_check_tensors(files, config),
        files=files,
    )


def checksum(checkpoint: Checkpoint) -> str:
    """A checksum of the first values of every tensor, as float32: training changes nearly all of them.

    It does not depend on the type that they are stored in, on shards or on devices.
    """
    digest = hashlib.sha256()
    with contextlib.ExitStack() as stack:
        handles = {path: stack.enter_context(_open(path)) for path in set(checkpoint.files.values())}
        for name, path in sorted(checkpoint.files.items()):
            tensor = handles[path].get_slice(name)
            *outer, width = tensor.get_shape()
            first = (*(slice(1) for _ in outer), slice(min(width, LOOKED_AT)))
            digest.update(name.encode() + tensor[first].astype(np.float32).tobytes())
    return digest.hexdigest()


def load_params(
    checkpoint: Checkpoint,
    mesh: Mesh | None = None,
    *,
    keep: Callable[[str, jax.Array], Weight] = lambda name, weight: weight,
) -> Params:
    """Reads the weights as float32, one tensor of the file on the host at a time.

    Args:
        checkpoint: from `load_checkpoint`.
        mesh: over which the weights are to lie, as `step_grpo.mesh.RULES` says, straight from the file; None
            for one device.
        keep: (our name, float32 weight) -> the form to keep it in; the float32 weight is then freed.

    Returns:
        The tree of `step_grpo.model.qwen.abstract_params`.
    """
    cfg = checkpoint.config
    where, axes = param_shardings(cfg, mesh), logical_axes(cfg)
    params: Params = {"layers": {}}
    with contextlib.ExitStack() as stack:
        handles = {path: stack.enter_context(_open(path)) for path in set(checkpoint.files.values())}

        def read(name: str) -> np.ndarray:
            return handles[checkpoint.files[name]].get_tensor(name)

        for rule in _rules(cfg):
            branch, places, names = params, where, axes
            if _is_stacked(rule):
                branch, places, names = params["layers"], where["layers"], axes["layers"]
                weight = _stacked_weight(rule, cfg, read, places[rule.ours])
            else:
                weight = _placed(_host_tensor(rule, cfg, read), places[rule.ours])
            kept = lay_out(keep(rule.ours, weight), names[rule.ours], mesh)
            branch[rule.ours] = jax.block_until_ready(kept)
    return params


def lay_out(weight: Weight, axes: tuple[str | None, ...], mesh: Mesh | None) -> Weight:
    """A weight, all its parts, where its logical axes lie on a mesh; without one, where it is."""
    if mesh is None:
        return weight
    return jax.device_put(weight, shardings(mesh, axes_of(axes, weight), weight))


def param_shardings(cfg: QwenConfig, mesh: Mesh | None) -> Params:
    """Where each weight lies: by its logical axes on a mesh, on the first device without one."""
    shapes = abstract_params(cfg)
    if mesh is None:
        one = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        return jax.tree.map(lambda _: one, shapes)
    return shardings(mesh, logical_axes(cfg), shapes)


def save_params(
    params: Params,
    hf_config: dict[str, Any],
    folder: str | Path,
    *,
    dtype: str = "bfloat16",
    max_shard_bytes: int = 5 * 2**30,
) -> None:
    """Writes the weights into `folder` as safetensors: one file, or shards and their index.

    The same weights give the same bytes. Each file appears under its name only when it is complete; at most
    one shard is on the host. A tied head is not written. Where weights are spread over several processes, all
    call it, and the first one writes.

    Args:
        params: the tree of `step_grpo.model.qwen`, arrays of JAX or NumPy; adapters are merged.
        hf_config: contents of the `config.json` that goes with them.
        folder: an existing folder.
        dtype: "float32", "float16" or "bfloat16".
        max_shard_bytes: a shard is closed before it would pass this size.

    Raises:
        UserError: an unknown dtype, or a weight that is not finite in it.
    """
    check_dtype(dtype)
    folder, cfg = Path(folder), config_from_hf(hf_config)
    sizes, itemsize = _axis_sizes(cfg), np.dtype(DTYPES[dtype]).itemsize
    tensors = {name: (rule, layer) for name, rule, layer in _tensors(cfg)}
    nbytes = {name: itemsize * math.prod(_file_shape(rule, sizes)) for name, (rule, _) in tensors.items()}
    shards = plan_shards(nbytes, max_shard_bytes)
    names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    if len(shards) == 1:
        names = [WEIGHTS]

    if not is_first():
        for rule, layer in tensors.values():
            _to_file(params, rule, layer, sizes, dtype)
        return
    for file, shard in zip(names, shards, strict=True):
        arrays = {name: _to_file(params, *tensors[name], sizes, dtype) for name in shard}
        partial = folder / f".{file}.partial"
        save_tensors(arrays, partial)
        partial.replace(folder / file)
    if len(shards) == 1:
        (folder / INDEX).unlink(missing_ok=True)
    else:
        weight_map = {name: file for file, shard in zip(names, shards, strict=True) for name in shard}
        write_json(
            folder / INDEX, {"metadata": {"total_size": sum(nbytes.values())}, "weight_map": weight_map}
        )
        (folder / WEIGHTS).unlink(missing_ok=True)  # readers prefer it to the index


def random_checkpoint(
    architecture: dict[str, Any], seed: int, mesh: Mesh | None = None
) -> tuple[dict[str, Any], Params]:
    """Random weights for a partial `config.json`; transformers' own defaults complete it.

    Args:
        architecture: fields of a Hugging Face config, `model_type` among them.
        seed: of the initialiser.
        mesh: over which the weights are to lie; None for one device.

    Returns:
        The complete contents of `config.json`, and the float32 weights.

    Raises:
        UserError: an unsupported model type, an unknown field or a wrong value.
    """
    from transformers import AutoConfig  # noqa: PLC0415  # takes seconds, and only random weights need it

    fields = dict(architecture)
    kind = fields.pop("model_type", None)
    if kind not in ("qwen3", "qwen2"):
        raise UserError(f"config.model.architecture.model_type: {kind!r} is none of 'qwen3', 'qwen2'")
    known = {*AutoConfig.for_model(kind).to_dict(), "rope_theta"}
    for field in fields.keys() - known:
        raise UserError(f"config.model.architecture.{field}: {kind} has no such field")
    try:
        hf_config = AutoConfig.for_model(kind, **fields).to_diff_dict()
    except Exception as error:  # transformers' validators raise types of their own
        raise UserError(f"config.model.architecture: {_one_line(error)}") from None
    cfg = config_from_hf(hf_config)
    return hf_config, jax.jit(partial(init_params, cfg, seed), out_shardings=param_shardings(cfg, mesh))()


def plan_shards(nbytes: dict[str, int], limit: int) -> list[list[str]]:
    """Deals names, in order, into shards of at most `limit` bytes; a larger tensor has a shard of its own."""
    shards: list[list[str]] = [[]]
    room = limit
    for name, size in nbytes.items():
        if size > room and shards[-1]:
            shards.append([])
            room = limit
        shards[-1].append(name)
        room -= size
    return shards


def check_dtype(dtype: str) -> None:
    """Refuses a name that is not one of `DTYPES`.

    Raises:
        UserError: naming the choices.
    """
    if dtype not in DTYPES:
        raise UserError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        UserError: there is no such file, or it holds something else.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; a checkpoint folder has one") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not readable as JSON ({_one_line(error)})") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: holds a {type(value).__name__}, not a JSON object")
    return value


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Writes JSON as transformers does, the whole file or none."""
    paths.write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def _snapshot(name: str, field: str) -> Path:
    """Downloads `org/name`, or finds it in the cache."""
    from huggingface_hub import errors, snapshot_download  # noqa: PLC0415

    patterns = ["*.safetensors", "*.json", "*.jinja", "*.txt"]
    kind = UserError
    try:
        return Path(snapshot_download(name, allow_patterns=patterns, local_files_only=hub.offline()))
    except errors.GatedRepoError:
        reason = "the Hub wants you to accept its licence and to log in (`hf auth login`)"
    except errors.RepositoryNotFoundError:
        reason = "the Hub has no such model, or it is private (`hf auth login`)"
    except Exception as error:  # one line for the user whatever goes wrong between here and the Hub
        unreachable = "the Hub cannot be reached (offline?), and the cache does not have it"
        reason, kind = unreachable if hub.offline() else _one_line(error), hub.failure(error)
    raise kind(f"{field}: {name!r} is no folder, and {reason}; give a folder, a Hub name, or builtin:tiny")


def _tensor_files(folder: Path) -> dict[str, Path]:
    """Tensor names and the file each is in, from the headers or the index."""
    if (folder / WEIGHTS).exists():
        with _open(folder / WEIGHTS) as handle:
            return dict.fromkeys(handle.keys(), folder / WEIGHTS)
    if not (folder / INDEX).exists():
        for pickled in sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES):
            raise UserError(
                f"{folder}: the weights are in {pickled!r}, which may run code when it is read; convert them "
                f"to {WEIGHTS} (transformers' save_pretrained does)"
            )
        raise UserError(f"{folder}: the weights are missing; neither {WEIGHTS} nor {INDEX} is there")
    weight_map = read_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise UserError(f"{folder / INDEX}: 'weight_map' does not map tensor names to files")
    for file in sorted(set(weight_map.values())):
        if Path(file).name != file or not (folder / file).is_file():
            raise UserError(f"{folder / INDEX}: names the shard {file!r}, which is not in the folder")
        with _open(folder / file) as handle:
            lost = {name for name, where in weight_map.items() if where == file} - set(handle.keys())
        if lost:
            raise UserError(f"{folder / file}: tensor {min(lost)!r} is missing; {INDEX} says it is here")
    return {name: folder / file for name, file in weight_map.items()}


def _check_tensors(files: dict[str, Path], cfg: QwenConfig) -> str:
    """Compares names, shapes and types with what the architecture asks for; the embedding's dtype."""
    sizes = _axis_sizes(cfg)
    shapes = {name: _file_shape(rule, sizes) for name, rule, _ in _tensors(cfg)}
    where = next(iter(files.values())).parent if files else Path()
    if missing := sorted(shapes.keys() - files.keys()):
        raise UserError(
            f"{where}: tensor {missing[0]!r} is missing ({len(missing)} are); config.json asks for it"
        )
    extra = sorted(files.keys() - shapes.keys() - ({HEAD} if cfg.tied else set()))
    if extra:
        raise UserError(f"{where}: tensor {extra[0]!r} is not expected ({len(extra)} are) by config.json")
    stored = {}
    for path in set(files.values()):
        with _open(path) as handle:
            for name in (name for name in shapes if files[name] == path):
                found = handle.get_slice(name)
                stored[name] = found.get_dtype()
                if stored[name] not in STORED:
                    raise UserError(
                        f"{path}: tensor {name!r} is {stored[name]}; supported: {', '.join(STORED)}"
                    )
                if (shape := tuple(found.get_shape())) != shapes[name]:
                    raise UserError(
                        f"{path}: tensor {name!r} has shape {shape}; config.json asks for {shapes[name]}"
                    )
    return STORED[stored[RULES[0].hf]]


def save_tensors(tensors: dict[str, np.ndarray], path: Path) -> None:
    """Writes a safetensors file.

    Raises:
        OSError: of the system, with its number: safetensors tells it in words alone.
    """
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:
        if found := re.search(r"\(os error (\d+)\)", str(error)):
            number = int(found[1])
            raise OSError(number, os.strerror(number), str(path)) from error
        raise


def _open(path: Path) -> Any:
    """Opens a safetensors file; its length is checked against its header."""
    try:
        return safe_open(path, framework="numpy")
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{path}: damaged or incomplete, copy or download it again ({_one_line(error)})"
        ) from None


def eos_ids_of(generation: dict[str, Any], hf_config: dict[str, Any]) -> tuple[int, ...]:
    """The end-of-text ids of both files, in order, each once."""
    found: list[int] = []
    for file, fields in (("generation_config.json", generation), ("config.json", hf_config)):
        ids = fields.get("eos_token_id")
        ids = ids if isinstance(ids, list) else [] if ids is None else [ids]
        if not all(type(token) is int and token >= 0 for token in ids):
            raise UserError(
                f"{file}: eos_token_id is {fields['eos_token_id']!r}; it must be an id or a list of ids"
            )
        found += ids
    return tuple(dict.fromkeys(found))


def _rules(cfg: QwenConfig) -> tuple[Rule, ...]:
    """The rules of the weights that this architecture has."""
    tree = abstract_params(cfg)
    return tuple(rule for rule in RULES if rule.ours in tree or rule.ours in tree["layers"])


def _tensors(cfg: QwenConfig) -> Iterator[tuple[str, Rule, int]]:
    """Name, rule and layer of every tensor of a file, layer after layer."""
    rules = _rules(cfg)
    stacked = [rule for rule in rules if _is_stacked(rule)]
    first = rules.index(stacked[0])
    yield from ((rule.hf, rule, 0) for rule in rules[:first])
    for layer in range(cfg.layers):
        yield from ((rule.hf.format(layer), rule, layer) for rule in stacked)
    yield from ((rule.hf, rule, 0) for rule in rules[first + len(stacked) :])


def _axis_sizes(cfg: QwenConfig) -> dict[str, int]:
    """Sizes of the axis letters."""
    return {
        "V": cfg.vocab_size,
        "D": cfg.width,
        "N": cfg.heads,
        "K": cfg.kv_heads,
        "H": cfg.head_dim,
        "F": cfg.ffn,
    }


def _is_stacked(rule: Rule) -> bool:
    return "{}" in rule.hf


def _our_axes(rule: Rule) -> str:
    return rule.ours.rsplit("_", 1)[1]


def _file_shape(rule: Rule, sizes: dict[str, int]) -> tuple[int, ...]:
    """Shape in the file."""
    return tuple(math.prod(sizes[letter] for letter in axis) for axis in rule.axes)


def _from_file(tensor: np.ndarray, rule: Rule, sizes: dict[str, int]) -> np.ndarray:
    """A view of a file's tensor with our axes."""
    letters = "".join(rule.axes)
    apart = tensor.reshape([sizes[letter] for letter in letters])
    return apart.transpose([letters.index(letter) for letter in _our_axes(rule)])


def _host_tensor(
    rule: Rule, cfg: QwenConfig, read: Callable[[str], np.ndarray], layer: int = 0
) -> np.ndarray:
    """One tensor of the file in float32, with our axes."""
    tensor = _from_file(read(rule.hf.format(layer)), rule, _axis_sizes(cfg))
    return np.ascontiguousarray(tensor, np.float32)


def _placed(tensor: np.ndarray, sharding: Sharding) -> jax.Array:
    """The tensor on its devices, of which this process fills its own; the host array is free afterwards."""
    return jax.block_until_ready(
        jax.make_array_from_callback(tensor.shape, sharding, lambda part: tensor[part])
    )


def _stacked_weight(
    rule: Rule, cfg: QwenConfig, read: Callable[[str], np.ndarray], sharding: Sharding
) -> jax.Array:
    """The tensors of all layers, stacked where they lie: each goes to its devices before the next is read."""
    weight = None
    for layer in range(cfg.layers):
        tensor = _host_tensor(rule, cfg, read, layer)
        if weight is None:
            weight = jnp.zeros((cfg.layers, *tensor.shape), jnp.float32, device=sharding)
        weight = _with_layer(weight, _placed(tensor, _without_layers(sharding)), layer)
    assert weight is not None
    return weight


@partial(jax.jit, donate_argnums=0)
def _with_layer(weight: jax.Array, tensor: jax.Array, layer: int) -> jax.Array:
    """A stacked weight with one of its layers replaced; one compiled program serves every layer."""
    return jax.lax.dynamic_update_index_in_dim(weight, tensor, layer, 0)


def _without_layers(sharding: Sharding) -> Sharding:
    """Of one layer of a stacked weight."""
    if isinstance(sharding, NamedSharding):
        return NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))
    return sharding


@partial(jax.jit, static_argnames="dtype")
def _one_layer(weight: Weight, layer: int, dtype: str) -> jax.Array:
    """One layer of a stacked weight, merged and cast on the device; one compiled slice serves every layer."""
    sliced = jax.tree.map(lambda part: jax.lax.dynamic_index_in_dim(part, layer, keepdims=False), weight)
    return dense(sliced).astype(DTYPES[dtype])


def _to_file(params: Params, rule: Rule, layer: int, sizes: dict[str, int], dtype: str) -> np.ndarray:
    """A host copy of one tensor as the file stores it."""
    if _is_stacked(rule):
        array = _on_host(_one_layer(params["layers"][rule.ours], layer, dtype))
    else:
        array = _on_host(jnp.asarray(params[rule.ours]).astype(DTYPES[dtype]))
    if not np.isfinite(array).all():
        raise UserError(f"tensor {rule.hf.format(layer)!r} has values that are not finite in {dtype}")
    letters, axes = "".join(rule.axes), _our_axes(rule)
    joined = array.transpose([axes.index(letter) for letter in letters]).reshape(_file_shape(rule, sizes))
    return np.ascontiguousarray(joined)


def _on_host(array: jax.Array) -> np.ndarray:
    """A host copy; of an array that is spread over processes, all of them make one."""
    if array.is_fully_addressable:
        return np.asarray(array)
    return multihost_utils.process_allgather(array, tiled=True)


def _one_line(error: BaseException) -> str:
    """The message of an exception on one line."""
    return " ".join(str(error).split()) or type(error).__name__
