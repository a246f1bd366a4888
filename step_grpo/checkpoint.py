"""Checkpoints of a run: everything that resuming or exporting needs, in one folder a step.

`WORKDIR/checkpoints/000010/` holds `params/` and `optimizer/` (Orbax), `model/` (configs and tokenizer, as
in a Hugging Face folder) and `run.json` (step, data cursor, config), written last: a folder without it is no
checkpoint. `params/` is what is trained: all weights, or the adapter, whose base is loaded anew as the config
says. On a disk the folder even appears under its name only when it is complete. Orbax's interface is used
here alone.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict
from orbax.checkpoint.experimental import v1 as ocp

from step_grpo import paths
from step_grpo.data.prompts import load_tokenizer
from step_grpo.errors import UserError
from step_grpo.grpo.update import TrainState
from step_grpo.mesh import shardings
from step_grpo.model import lora
from step_grpo.model.load import Description, load_model, save_description
from step_grpo.model.qwen import Params, QwenConfig, abstract_params, config_from_hf
from step_grpo.model.weights import (
    eos_ids_of,
    load_checkpoint,
    load_params,
    param_shardings,
    read_json,
    resolve_checkpoint,
    write_json,
)

RUN = "run.json"


@dataclass(frozen=True)
class Progress:
    """Where a run stands between two steps."""

    step: int  # finished steps
    cursor: int  # questions taken from the source


def save(
    workdir: Path,
    progress: Progress,
    state: TrainState,
    described: Description,
    config: ConfigDict,
) -> Path:
    """Writes the checkpoint of a step and removes all but the newest few; returns its folder."""
    folder = workdir / "checkpoints" / f"{progress.step:06d}"
    with paths.replaced(folder, marker=RUN) as partial:
        ocp.save(paths.absolute(partial) / "params", state.params)
        ocp.save(paths.absolute(partial) / "optimizer", {"step": state.step, "state": state.opt_state})
        save_description(described, partial / "model")
        run = {"step": progress.step, "cursor": progress.cursor, "config": config.to_dict()}
        write_json(partial / RUN, json.loads(json.dumps(run)))
    for old in saved_steps(workdir)[: -config.keep_checkpoints]:
        paths.remove(old, marker=RUN)
    return folder


def restore(workdir: Path, state: TrainState, config: ConfigDict) -> tuple[Progress, TrainState]:
    """The newest checkpoint of a workdir, or `state` at step 0 where there is none.

    Args:
        workdir: of the run.
        state: freshly initialised; says what shapes, types and shardings to restore into.
        config: of the run that goes on.

    Raises:
        UserError: the checkpoint is of a run with another config, or does not load.
    """
    folders = saved_steps(workdir)
    if not folders:
        return Progress(0, 0), state
    folder = folders[-1]
    run = read_json(folder / RUN)
    check_same_run(run["config"], json.loads(json.dumps(config.to_dict())), folder)
    optimizer = {"step": state.step, "state": state.opt_state}
    params = _load(folder / "params", state.params)
    optimizer = _load(folder / "optimizer", optimizer)
    return Progress(run["step"], run["cursor"]), TrainState(optimizer["step"], params, optimizer["state"])


FREE_FIELDS = (
    "steps",
    "save_every",
    "keep_checkpoints",
    "rollout.lanes",
    "reward.grading_workers",
)
"""What may differ when a run goes on: how long it is, what it keeps, how it is spread over the machine."""


def check_same_run(saved: dict[str, Any], wanted: dict[str, Any], folder: Path) -> None:
    """Refuses to go on with a run under other settings; only those may change that alter no result.

    Raises:
        UserError: naming the first field that differs, and both values.
    """
    free = {f"config.{field}" for field in FREE_FIELDS}
    before, now = dict(_leaves(saved, "config")), dict(_leaves(wanted, "config"))
    for field in sorted({*before, *now} - free):
        if before.get(field) != now.get(field):
            raise UserError(
                f"{folder} was made with {field}={before.get(field)!r}, not {now.get(field)!r}; use a new "
                "--workdir, or the same settings"
            )


def _leaves(tree: Any, name: str) -> Iterator[tuple[str, Any]]:
    """The fields of a config under their dotted names."""
    if not isinstance(tree, dict) or not tree:
        yield name, tree
        return
    for key, value in tree.items():
        yield from _leaves(value, f"{name}.{key}")


def saved_steps(workdir: Path) -> list[Path]:
    """The complete checkpoints of a workdir, oldest first."""
    found = (workdir / "checkpoints").glob("[0-9]*")
    return sorted(path for path in found if (path / RUN).is_file())


@dataclass(frozen=True)
class Opened:
    """A model for evaluation or export, from wherever it came."""

    described: Description
    params: Params  # adapters beside their base
    folder: Path  # holds the tokenizer files
    dtype: str  # to export in, unless told otherwise
    settings: dict[str, Any]  # the config of the run that made it; empty where there was none
    adapter: Params | None = None  # what was trained of `params`, if that is not all


def open_model(name: str | Path, mesh: Mesh | None = None) -> Opened:
    """Loads a model.

    Args:
        name: a run's workdir (its newest checkpoint), one of its checkpoints, a Hugging Face folder, a Hub
            name, or `builtin:tiny`.
        mesh: over which the weights are to lie; None for one device.

    Raises:
        UserError: there is no such checkpoint, or it does not load.
    """
    folder = paths.folder(name)
    if steps := saved_steps(folder):
        folder = steps[-1]
    if (folder / RUN).is_file():
        described = read_description(folder / "model")
        settings = read_json(folder / RUN)["config"]
        params, adapter = _read_weights(folder, described.config, ConfigDict(settings), mesh)
        files = paths.fetched(folder / "model")
        return Opened(described, params, files, settings["export_dtype"], settings, adapter)
    source = load_checkpoint(resolve_checkpoint(str(name), field="--checkpoint"))
    tokenizer = load_tokenizer(str(source.folder), where="--checkpoint")
    described = Description(source.config, source.hf_config, source.generation, source.eos_ids, tokenizer)
    return Opened(described, load_params(source, mesh), source.folder, source.dtype, {})


def _read_weights(
    folder: Path, cfg: QwenConfig, config: ConfigDict, mesh: Mesh | None
) -> tuple[Params, Params | None]:
    """The weights of a checkpoint; with LoRA the base that its config names, and the adapter beside it."""
    if not config.get("lora", {}).get("rank", 0):  # older checkpoints know no adapters
        return _load(folder / "params", _lying(abstract_params(cfg), param_shardings(cfg, mesh))), None
    targets = tuple(config.lora.targets)
    like = jax.eval_shape(partial(lora.init_adapter, cfg, config.lora.rank, targets, config.seed))
    where = shardings(mesh, lora.adapter_axes(cfg, targets), like) if mesh else None
    adapter = _load(folder / "params", _lying(like, where) if where else like)
    _, base = load_model(config.model, config.seed, mesh, lora.keeper(config))
    return lora.attacher(config.lora)(adapter, base), adapter


def _lying(shapes: Params, where: Params) -> Params:
    """The shapes with the sharding of each."""
    return jax.tree.map(lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), shapes, where)


def read_description(folder: Path) -> Description:
    """What `save_description` wrote."""
    hf_config, generation = read_json(folder / "config.json"), read_json(folder / "generation_config.json")
    tokenizer = load_tokenizer(str(paths.fetched(folder)), where="--checkpoint")
    return Description(
        config_from_hf(hf_config), hf_config, generation, eos_ids_of(generation, hf_config), tokenizer
    )


def _load(path: Path, like: Any) -> Any:
    """Restores a tree into the shapes, types and shardings of `like`; on one device where it names none.

    Left to Orbax, that would be the devices that saved it, and this machine may have others.
    """
    one = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding or one), like
    )
    try:
        return ocp.load(paths.absolute(path), abstract)
    except Exception as error:  # Orbax raises types of many libraries for a damaged folder
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{path}: does not load ({reason}); delete its checkpoint to go on from the one before"
        ) from error
