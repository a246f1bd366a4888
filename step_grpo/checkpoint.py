"""Checkpoints of a run: everything that resuming or exporting needs, in one folder a step.

`WORKDIR/checkpoints/000010/` holds `params/` and `optimizer/` (Orbax), `model/` (configs and tokenizer, as
in a Hugging Face folder) and `run.json` (step, data cursor, config, version, checksums of the vocabulary, of
the weights that the run began from and of every array, and the size of every file), written last: a folder
without it is no checkpoint. `params/` is what is trained: all weights, or the adapter, whose base is loaded
anew as the config says. On a disk the folder even appears under its name only when it is complete. Orbax's
interface is used here alone.
"""

import hashlib
import json
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any, Self

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict
from orbax.checkpoint.experimental import v1 as ocp

import step_grpo
from step_grpo import checksums, heap, paths
from step_grpo.data.prompts import load_tokenizer
from step_grpo.distributed import anywhere, is_first
from step_grpo.errors import FunctionError, TransientError, UserError
from step_grpo.grpo.update import TrainState
from step_grpo.mesh import shardings
from step_grpo.metrics import read_metrics
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
from step_grpo.preemption import StoppedError

RUN = "run.json"
DAMAGED = ".damaged"  # behind the name of a checkpoint that was left out


@dataclass(frozen=True)
class Progress:
    """Where a run stands between two steps."""

    step: int  # finished steps
    cursor: int  # questions taken from the source
    skipped: int = 0  # updates skipped in a row, up to here


# ---------------------------------------------------------------------- saving


class Saver:
    """Writes checkpoints behind the run's back, one at a time, and removes those that are not to be kept.

    All processes call its methods alike: each writes what its devices hold. Use it as a context manager:
    when the block ends in whatever way, what was begun is completed; ended by `StoppedError` or
    `FunctionError`, the newest state that was offered is saved too.
    """

    def __init__(
        self,
        workdir: Path,
        described: Description,
        config: ConfigDict,
        data: Mapping[str, str] = MappingProxyType({}),
    ):
        """Writes nothing yet; `data` are checksums of the questions by the fields that they come from."""
        self._workdir, self._described, self._config, self._data = workdir, described, config, data
        self._newest: tuple[Progress, TrainState] | None = None
        self._saved: Progress | None = None
        self._thread: threading.Thread | None = None
        self._failure: Exception | None = None

    def offer(self, progress: Progress, state: TrainState, figures: Mapping[str, Any]) -> None:
        """Saves after a step, if it is one of those to save after.

        Args:
            progress: behind the step.
            state: likewise; its arrays may be given away as soon as this returns.
            figures: of the step's line of metrics.

        Raises:
            UserError: `config.keep_best` is no metric.
            TransientError: a checkpoint cannot be written.
        """
        self._newest = progress, state
        best = self._config.keep_best.removeprefix("-")
        if best and best not in figures:
            raise UserError(
                f"config.keep_best is {self._config.keep_best!r}; it must be one of the metrics "
                f"{', '.join(sorted(figures))}, with a minus in front where less is better"
            )
        if progress.step % self._config.save_every == 0 or progress.step == self._config.steps:
            self.save(progress, state)

    def save(self, progress: Progress, state: TrainState) -> None:
        """Begins to write a checkpoint, unless it is there; returns when `state` is copied.

        Raises:
            TransientError: this checkpoint, or the one before it, cannot be written.
        """
        self.finish()
        if progress == self._saved:
            return
        folder = folder_of(self._workdir, progress.step)
        replacing, failure = ExitStack(), None
        try:
            if is_first():
                replacing.enter_context(paths.replaced(folder, marker=RUN))
                save_description(self._described, paths.written_to(folder) / "model")
        except Exception as error:
            failure = error
        self._fail_together(folder, failure, replacing)  # the others come here when the folder is there
        where, begun, held = paths.absolute(paths.written_to(folder)), list[Any](), _held(state)
        try:
            for name, tree in held.items():
                begun.append(ocp.save_async(where / name, tree))
        except Exception as error:
            failure = error
            for response in begun:  # what is still writing would make the folder anew
                _failure_of(response)
        self._fail_together(folder, failure, replacing)
        self._saved = progress
        self._thread = threading.Thread(
            target=self._complete, args=(progress, begun, checksums.begin(held), replacing), name="checkpoint"
        )
        self._thread.start()

    def finish(self) -> None:
        """Waits until what was begun is complete in all processes.

        Raises:
            TransientError: in all of them, if one cannot write.
        """
        if self._thread is None or self._saved is None:
            return
        self._thread.join()
        folder, failure = folder_of(self._workdir, self._saved.step), self._failure
        self._thread = self._failure = None
        self._fail_together(folder, failure, ExitStack())

    def _fail_together(self, folder: Path, failure: Exception | None, replacing: ExitStack) -> None:
        """Gives up a checkpoint in all processes, if one of them failed; all must call it."""
        if not anywhere(failure is not None):
            return
        self._saved = None
        error = failure or OSError("another process of the run cannot write")
        replacing.__exit__(type(error), error, error.__traceback__)
        raise TransientError(
            f"{folder} cannot be written ({_line(error)}); make room or give the rights, then "
            f"{self._how_to_go_on()}"
        ) from failure

    def _complete(
        self,
        progress: Progress,
        begun: Sequence[Any],
        sums: Callable[[], dict[str, int]],
        replacing: ExitStack,
    ) -> None:
        """Waits for Orbax, then lets the checkpoint appear; in a thread of its own."""
        try:
            with replacing:
                # All of them to their end: what is still writing would make the folder anew.
                failures = [failed for response in begun if (failed := _failure_of(response))]
                if failures:
                    raise failures[0]
                if is_first():
                    sync_lines(self._workdir)
                    writing = paths.written_to(folder_of(self._workdir, progress.step))
                    write_json(writing / RUN, self._run(progress, paths.sizes(writing), sums()))
            if is_first():
                remove_old(self._workdir, progress.step, self._config)
        except Exception as error:  # told by `finish`, in the thread that may raise
            self._failure = error
        heap.trim()  # of the copies, and of what the steps since the last checkpoint have left

    def _run(self, progress: Progress, files: dict[str, int], sums: dict[str, int]) -> dict[str, Any]:
        """The contents of `run.json`."""
        return {
            **asdict(progress),
            "config": plain(self._config),
            "version": step_grpo.__version__,
            "vocabulary": vocabulary_of(self._described.tokenizer),
            "loaded": self._described.weights,
            "data": dict(self._data),
            "files": files,
            "checksums": sums,
        }

    def _how_to_go_on(self) -> str:
        there = [folder_of(self._workdir, self._saved.step)] if self._saved else saved_steps(self._workdir)
        begins = f"goes on from {there[-1]}" if there else "begins anew"
        return f"run the same line again: it {begins}"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, where: TracebackType | None) -> None:
        if isinstance(error, StoppedError):
            if self._newest:
                self.save(*self._newest)
            self.finish()
            raise StoppedError(f"stopped; {self._how_to_go_on()}") from None
        if isinstance(error, FunctionError) and self._newest:
            self.save(*self._newest)
        if error is None or isinstance(error, FunctionError):
            self.finish()
        elif self._thread is not None:  # what went wrong is told, not what comes of it
            self._thread.join()


def sync_lines(workdir: Path) -> None:
    """Makes the lines of the steps up to a checkpoint outlast a loss of power, as the checkpoint will."""
    for name in ("metrics.jsonl", "rollouts.jsonl"):
        if not paths.is_remote(workdir) and (workdir / name).is_file():
            paths.sync(workdir / name)


def _held(state: TrainState) -> dict[str, Any]:
    """What of a state lies in which folder of a checkpoint."""
    return {"params": state.params, "optimizer": {"step": state.step, "state": state.opt_state}}


def _failure_of(response: Any) -> Exception | None:
    """Why a save of Orbax's failed, once it has ended; None where it did not."""
    try:
        response.result()
    except Exception as error:
        return error
    return None


def folder_of(workdir: Path, step: int) -> Path:
    """Where the checkpoint of a step is."""
    return workdir / "checkpoints" / f"{step:06d}"


def kept(steps: Sequence[int], newest: int, every: int, values: Mapping[int, float]) -> set[int]:
    """The checkpoints that stay.

    Args:
        steps: saved, ascending.
        newest: how many of the last stay.
        every: those of steps that it divides stay; 0: none for that.
        values: of the saved steps, the largest is the best and stays, of equals the last; empty: none.
    """
    best = sorted((values[step], step) for step in steps if step in values)[-1:]
    return {*steps[-newest:], *(s for s in steps if every and s % every == 0), *(step for _, step in best)}


def remove_old(workdir: Path, step: int, config: ConfigDict) -> None:
    """Deletes the checkpoints that are not to be kept, never that of `step`, the newest of the run."""
    found = {int(path.name): path for path in saved_steps(workdir)}
    values = metric_of(workdir, config.keep_best)
    stay = kept(sorted(found), config.keep_checkpoints, config.keep_every, values)
    for old in found.keys() - stay - {step}:
        paths.remove(found[old], marker=RUN)
    for damaged in (workdir / "checkpoints").glob(f"[0-9]*{DAMAGED}"):
        name = damaged.name.removesuffix(DAMAGED)
        if name.isdecimal() and int(name) <= step:  # the run has come there again
            paths.remove(damaged, marker=RUN)


def metric_of(workdir: Path, name: str) -> dict[int, float]:
    """A metric by step, its sign turned where a minus stands before its name; nothing for no name."""
    sign = -1 if name.startswith("-") else 1
    values = {
        line["step"]: line.get(name.removeprefix("-"))
        for line in (read_metrics(workdir / "metrics.jsonl") if name else [])
    }
    return {step: sign * value for step, value in values.items() if value is not None}


def plain(config: ConfigDict) -> dict[str, Any]:
    """A config as JSON holds it: tuples are lists."""
    return json.loads(json.dumps(config.to_dict()))


def vocabulary_of(tokenizer: Any) -> str:
    """A checksum of all tokens and their ids."""
    return hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


# ---------------------------------------------------------------------- going on


class DamagedError(UserError):
    """A checkpoint that is not whole; the one before it may be."""


def restore(
    workdir: Path,
    state: TrainState,
    described: Description,
    config: ConfigDict,
    data: Mapping[str, str] = MappingProxyType({}),
) -> tuple[Progress, TrainState]:
    """The newest whole checkpoint of a workdir, or `state` at step 0 where there is none.

    A damaged one is named, and the one before it is taken. Nothing is written: see `put_away`.

    Args:
        workdir: of the run.
        state: freshly initialised; says what shapes, types and shardings to restore into.
        described: the model that the run trains.
        config: of the run that goes on.
        data: as of `Saver`.

    Raises:
        UserError: the checkpoint is of a run with another config, model, vocabulary or data, or all are
            damaged.
    """
    for folder in reversed(checkpoint_folders(workdir)):
        try:
            return _restored(folder, state, described, config, data)
        except DamagedError as error:
            print(f"warning: {error}; it is left out", flush=True)
    # In a bucket a folder without its marker is what an interrupted save leaves, on a disk it never is.
    if saved_steps(workdir) if paths.is_remote(workdir) else checkpoint_folders(workdir):
        raise UserError(f"{workdir / 'checkpoints'}: none is whole; delete the folder to begin anew")
    return Progress(0, 0), state


def _restored(
    folder: Path, like: TrainState, described: Description, config: ConfigDict, data: Mapping[str, str]
) -> tuple[Progress, TrainState]:
    """What `restore` returns, of one checkpoint.

    Raises:
        DamagedError: in all processes, if it is not whole for one of them.
    """
    failed = None
    try:
        run = read_run(folder)
        if run["step"] != int(folder.name):
            raise DamagedError(f"{folder} is damaged: it is a copy of that of step {run['step']}")
        check_same_run(run["config"], plain(config), folder)
        check_same_model(folder, run, described)
        check_same_data(run.get("data", {}), data, folder)
        state = _read_state(folder, like)
    except DamagedError as error:
        failed = error
    if anywhere(failed is not None):
        raise failed or DamagedError(f"{folder} is damaged for another process")
    check_sums(folder, run, _held(state))
    return Progress(run["step"], run["cursor"], run.get("skipped", 0)), state


def _read_state(folder: Path, like: TrainState) -> TrainState:
    read = {name: load_tree(folder / name, tree) for name, tree in _held(like).items()}
    return TrainState(read["optimizer"]["step"], read["params"], read["optimizer"]["state"])


def put_away(workdir: Path, step: int, config: ConfigDict) -> None:
    """Makes room for a run that goes on from `step` and holds the workdir; the first process calls it.

    Checkpoints behind that step are damaged, or `restore` would have taken them. They get another name, so
    that nothing takes them for the newest; in a bucket, where nothing can be renamed, they are deleted. So is
    what interrupted writes have left, and what an interruption has kept from being deleted.
    """
    for folder in checkpoint_folders(workdir):
        if int(folder.name) > step and not paths.is_remote(folder):
            aside = folder.with_name(folder.name + DAMAGED)
            paths.remove(aside, marker=RUN)
            folder.rename(aside)
        elif int(folder.name) > step or not (folder / RUN).is_file():
            paths.remove(folder, marker=RUN)
    for left in (workdir / "checkpoints").glob(".[0-9]*.partial"):
        paths.remove(left, marker=RUN)
    remove_old(workdir, step, config)


def check_sums(folder: Path, run: Mapping[str, Any], held: Mapping[str, Any]) -> None:
    """Compares what was read from a checkpoint with what was saved; all processes must call it alike.

    Args:
        folder: the checkpoint.
        run: its `run.json`; older ones have no checksums.
        held: trees of arrays by the folder that they were read from.

    Raises:
        DamagedError: naming the first array that is not what was saved.
    """
    if not (saved := run.get("checksums")):
        return
    for name, found in checksums.begin(held)().items():
        if saved.get(name) != found:
            raise DamagedError(f"{folder} is damaged: the values of {name} are not those that were saved")


def read_run(folder: Path) -> dict[str, Any]:
    """The `run.json` of a checkpoint all of whose files are there in full.

    Raises:
        DamagedError: they are not.
    """
    if not (folder / RUN).is_file():
        raise DamagedError(f"{folder} is not complete: it has no {RUN}")
    try:
        run = read_json(folder / RUN)
    except ValueError as error:
        raise DamagedError(f"{folder} is damaged: {RUN} is not readable ({_line(error)})") from None
    there = paths.sizes(folder)
    for name, size in run.get("files", {}).items():
        if there.get(name) != size:
            what = f"has {there[name]} of {size} bytes" if name in there else "is missing"
            raise DamagedError(f"{folder} is damaged: {name} {what}")
    return run


def check_same_model(folder: Path, run: Mapping[str, Any], described: Description) -> None:
    """Refuses weights of another architecture, for another vocabulary, or begun from other weights.

    What a run began from is the base of its adapter or its reference, and is loaded anew when it goes on.

    Raises:
        UserError: naming the field that differs.
    """
    saved, wanted = read_json(folder / "model" / "config.json"), json.loads(json.dumps(described.hf_config))
    for field in sorted({*saved, *wanted}):
        if saved.get(field) != wanted.get(field):
            raise UserError(
                f"{folder} holds a model with {field}={saved.get(field)!r}, config.model has "
                f"{wanted.get(field)!r}; use a new --workdir, or the same model"
            )
    if run.get("vocabulary") not in (None, vocabulary_of(described.tokenizer)):
        raise UserError(
            f"{folder} was made with another vocabulary than that of config.model.tokenizer; use a new "
            "--workdir, or the same tokenizer"
        )
    if _changed(run, described):
        raise UserError(
            f"{folder} began from other weights than those that "
            f"{run['config']['model']['checkpoint']!r} (config.model.checkpoint) has now; use a new "
            "--workdir, or the old weights"
        )


def _changed(run: Mapping[str, Any], described: Description) -> bool:
    """Whether the model that a run names has other weights than when it began; older runs do not tell."""
    return run.get("loaded") not in (None, described.weights)


FREE_FIELDS = (
    "steps",
    "save_every",
    "keep_checkpoints",
    "keep_every",
    "keep_best",
    "grpo.max_skipped",
    "rollout.lanes",
    "reward.grading_workers",
    "warn",
    "log",
)
"""What may differ when a run goes on, fields and groups of them: how long it is, what it keeps and shows."""
ROUNDING = ("mesh", "grpo.rows", "grpo.logprob_chunk", "model.attention", "model.remat")
"""What may differ too, but changes results up to rounding: how the work is spread over the machine."""


def bound_fields(config: ConfigDict) -> dict[str, Any]:
    """The fields of a config that may not differ when a run goes on, by their dotted names."""
    return _without(plain(config), FREE_FIELDS + ROUNDING)


def exact_fields(config: ConfigDict) -> dict[str, Any]:
    """The fields of a config that its results depend on to the last bit, by their dotted names."""
    return _without(plain(config), FREE_FIELDS)


def _without(settings: dict[str, Any], free: Sequence[str]) -> dict[str, Any]:
    """The fields that are not free, nor in a group that is."""
    names = {f"config.{name}" for name in free}
    groups = tuple(f"{name}." for name in names)
    fields = dict(_leaves(settings, "config"))
    return {name: fields[name] for name in fields if name not in names and not name.startswith(groups)}


def check_same_run(saved: dict[str, Any], wanted: dict[str, Any], folder: Path) -> None:
    """Refuses to go on with a run under other settings; only those may change that alter no result.

    A result may change by rounding, as it does on another machine.

    Raises:
        UserError: naming the first field that differs, and both values.
    """
    before, now = (_without(settings, FREE_FIELDS + ROUNDING) for settings in (saved, wanted))
    for field in sorted({*before, *now}):
        if before.get(field) != now.get(field):
            raise UserError(
                f"{folder} was made with {field}={before.get(field)!r}, not {now.get(field)!r}; use a new "
                "--workdir, or the same settings"
            )


def check_same_data(saved: Mapping[str, str], wanted: Mapping[str, str], folder: Path) -> None:
    """Refuses to go on with other questions, as a file has that was changed; older checkpoints know of none.

    Raises:
        UserError: naming the data that differ.
    """
    for field in saved.keys() & wanted.keys():
        if saved[field] != wanted[field]:
            raise UserError(
                f"{folder} was made with other questions: {field} gave {saved[field]}, and now gives "
                f"{wanted[field]}; use a new --workdir, or the same data"
            )


def _leaves(tree: Any, name: str) -> Iterator[tuple[str, Any]]:
    """The fields of a config under their dotted names."""
    if not isinstance(tree, dict) or not tree:
        yield name, tree
        return
    for key, value in tree.items():
        yield from _leaves(value, f"{name}.{key}")


def checkpoint_folders(workdir: Path) -> list[Path]:
    """The checkpoints of a workdir, oldest first, complete or not."""
    found = (path for path in (workdir / "checkpoints").glob("[0-9]*") if path.name.isdecimal())
    return sorted(found, key=lambda path: int(path.name))


def saved_steps(workdir: Path) -> list[Path]:
    """The complete checkpoints of a workdir, oldest first."""
    return [path for path in checkpoint_folders(workdir) if (path / RUN).is_file()]


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
        UserError: there is no such checkpoint, it is damaged, or the base of its adapter has changed.
    """
    folder = paths.folder(name)
    if steps := saved_steps(folder):
        folder = steps[-1]
    if (folder / RUN).is_file():
        described = read_description(folder / "model")
        run = read_run(folder)
        settings = run["config"]
        params, adapter = _read_weights(folder, described.config, run, mesh)
        check_sums(folder, run, {"params": params if adapter is None else adapter})
        files = paths.fetched(folder / "model")
        return Opened(described, params, files, settings["export_dtype"], settings, adapter)
    source = load_checkpoint(resolve_checkpoint(str(name), field="--checkpoint"))
    tokenizer = load_tokenizer(str(source.folder), where="--checkpoint")
    described = Description(source.config, source.hf_config, source.generation, source.eos_ids, tokenizer)
    return Opened(described, load_params(source, mesh), source.folder, source.dtype, {})


def _read_weights(
    folder: Path, cfg: QwenConfig, run: Mapping[str, Any], mesh: Mesh | None
) -> tuple[Params, Params | None]:
    """The weights of a checkpoint; with LoRA the base that its config names, and the adapter beside it."""
    config = ConfigDict(run["config"])
    if not config.get("lora", {}).get("rank", 0):  # older checkpoints know no adapters
        return load_tree(folder / "params", _lying(abstract_params(cfg), param_shardings(cfg, mesh))), None
    targets = tuple(config.lora.targets)
    like = jax.eval_shape(partial(lora.init_adapter, cfg, config.lora.rank, targets, config.seed))
    where = shardings(mesh, lora.adapter_axes(cfg, targets), like) if mesh else None
    adapter = load_tree(folder / "params", _lying(like, where) if where else like)
    described, base = load_model(config.model, config.seed, mesh, lora.keeper(config))
    if _changed(run, described):
        raise UserError(
            f"{folder} holds an adapter of {config.model.checkpoint!r}, whose weights have changed since; "
            "put back those that it was trained beside"
        )
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


def load_tree(path: Path, like: Any) -> Any:
    """Restores a tree into the shapes, types and shardings of `like`; on one device where it names none.

    Left to Orbax, that would be the devices that saved it, and this machine may have others.

    Raises:
        DamagedError: it does not load.
    """
    one = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding or one), like
    )
    try:
        return ocp.load(paths.absolute(path), abstract)
    except Exception as error:  # Orbax raises types of many libraries for a damaged folder
        raise DamagedError(f"{path.parent} is damaged: {path.name} does not load ({_line(error)})") from error
