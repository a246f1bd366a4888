"""The figures of each step in the tools that people have open: TensorBoard, Weights & Biases.

`metrics.jsonl` is always written and is what holds. A sink follows it, with the same names: when it is opened
it is given the lines that it lacks, so that no step is there twice and none is missing after an interruption,
or where the sink was chosen in the middle of a run.
"""

import importlib.util
import json
import math
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, Protocol

from ml_collections import ConfigDict

from step_grpo import paths
from step_grpo.distributed import from_first
from step_grpo.errors import UserError
from step_grpo.metrics import MetricsWriter, read_metrics

WANDB_RUN = "wandb_run.json"  # in the workdir: project, id of the run, last step that it was given


class Sink(Protocol):
    """Where figures go beside `metrics.jsonl`."""

    name: str

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        """Takes the finite figures of a step that follows all those it has."""

    def close(self) -> None:
        """Brings what it was given to where it belongs."""


class Sinks:
    """`metrics.jsonl` and the sinks that follow it.

    A sink that fails is named and left out: no run should end over its display.
    """

    def __init__(self, metrics: MetricsWriter, sinks: Sequence[Sink]):
        """Takes what is open."""
        self._metrics, self._sinks = metrics, list(sinks)

    def write(self, step: int, figures: dict[str, Any]) -> None:
        """Writes the line of a step, then tells the sinks; to them, only what is a finite number."""
        self._metrics.write(step, figures)
        numbers = {name: float(value) for name, value in figures.items() if is_number(value)}
        for sink in list(self._sinks):
            self._try(sink, lambda sink=sink: sink.write(step, numbers))

    def close(self) -> None:
        """Closes the sinks that are left."""
        for sink in list(self._sinks):
            self._try(sink, sink.close)

    def _try(self, sink: Sink, action: Any) -> None:
        try:
            action()
        except Exception as error:  # whatever the libraries raise
            self._sinks.remove(sink)
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            print(f"warning: {sink.name} failed ({reason}); metrics.jsonl has every step", flush=True)


def is_number(value: Any) -> bool:
    """Whether a figure can be drawn."""
    return isinstance(value, int | float) and math.isfinite(value)


def prepare(log: ConfigDict) -> None:
    """Finds out at the beginning of a run whether its sinks can be opened; all processes call it.

    Raises:
        UserError: in every process: a package is missing, or nobody is logged in.
    """
    if log.tensorboard:
        _require("tensorboard", "config.log.tensorboard")
    if log.wandb:
        _require("wandb", "config.log.wandb")
        from_first(_log_in)


def _require(package: str, field: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise UserError(
            f"{field}: the package {package} is not installed; pip install 'step_grpo[{package}]'"
        )


@contextmanager
def opened(workdir: Path, config: ConfigDict, metrics: MetricsWriter) -> Iterator[Sinks]:
    """The sinks that `config.log` names, which the first process alone writes to; all processes call it.

    Args:
        workdir: of the run.
        config: of the run.
        metrics: opened, so that `metrics.jsonl` is cut back to the step that the run goes on from.

    Raises:
        UserError: in every process, if one cannot be opened.
    """
    sinks: list[Sink] = []
    from_first(lambda: _open(workdir, config, sinks))
    with closing(Sinks(metrics, sinks)) as together:
        yield together


def _open(workdir: Path, config: ConfigDict, sinks: list[Sink]) -> None:
    lines = read_metrics(workdir / "metrics.jsonl")
    try:
        if config.log.tensorboard:
            sinks.append(TensorBoard(workdir / "tensorboard", lines))
        if config.log.wandb:
            sinks.append(Wandb(workdir, config, lines))
    except OSError as error:
        raise UserError(f"{workdir}: cannot be written ({error.strerror or error}); make room") from None


# ---------------------------------------------------------------------- TensorBoard


class TensorBoard:
    """Event files in a folder, always those of `metrics.jsonl` from its first line on.

    An event file can only grow. So the files of the run before the interruption are written anew, and time
    begins there; steps do not.
    """

    name = "TensorBoard"

    def __init__(self, folder: Path, lines: Sequence[Mapping[str, Any]]):
        """Replaces the event files of `folder` by one of the `lines` of `metrics.jsonl`."""
        from tensorboard.summary import Writer  # noqa: PLC0415  # an extra

        paths.make(folder)
        for old in folder.glob("events.out.tfevents.*"):
            old.unlink()
        self._folder = folder
        # Event files grow by appending, which a bucket does not know: they are sent anew.
        self._local = Path(tempfile.mkdtemp()) if paths.is_remote(folder) else folder
        self._writer = Writer(os.fspath(self._local))
        for line in lines:
            self._add(line["step"], {n: v for n, v in line.items() if n != "step" and is_number(v)})
        self._flush()

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        """Appends a point to each curve; it is in the file when this returns."""
        self._add(step, figures)
        self._flush()

    def close(self) -> None:
        """Ends the file."""
        self._writer.close()
        if self._local != self._folder:
            shutil.rmtree(self._local, ignore_errors=True)

    def _add(self, step: int, figures: Mapping[str, float]) -> None:
        for name, value in figures.items():
            self._writer.add_scalar(name, value, step)

    def _flush(self) -> None:
        self._writer.flush()
        if self._local != self._folder:
            for file in self._local.iterdir():
                paths.send(file, self._folder / file.name)


# ---------------------------------------------------------------------- Weights & Biases


class Wandb:
    """A run of Weights & Biases, which goes on under its id when the training does.

    The service takes each step once. So what was sent before an interruption stays as it was sent, and only
    later steps follow.
    """

    name = "wandb"

    def __init__(self, workdir: Path, config: ConfigDict, lines: Sequence[Mapping[str, Any]]):
        """Begins or resumes the run that `workdir` remembers, and sends the `lines` that it lacks.

        Raises:
            UserError: the run cannot be begun.
        """
        import wandb  # noqa: PLC0415  # an extra

        self._path, project = workdir / WANDB_RUN, config.log.wandb
        self._known = _known_run(self._path, project)
        try:
            self._run = wandb.init(
                project=project,
                id=self._known["id"],
                name=workdir.name,
                resume="allow",
                dir=tempfile.gettempdir() if paths.is_remote(workdir) else os.fspath(workdir),
                config=config.to_dict(),
                allow_val_change=True,  # of what may change when a run goes on
                settings=wandb.Settings(console="off"),  # the terminal belongs to the progress bar
            )
        except wandb.Error as error:
            raise UserError(f"config.log.wandb is {project!r}: {_first_line(error)}; {HOW_TO}") from None
        for line in lines:
            self.write(line["step"], {n: v for n, v in line.items() if n != "step" and is_number(v)})

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        """Sends a step, unless it was sent before."""
        if step <= self._known["step"]:
            return
        self._run.log(dict(figures), step=step, commit=True)
        self._known["step"] = step
        paths.write_text(self._path, json.dumps(self._known) + "\n")

    def close(self) -> None:
        """Waits until all is sent."""
        self._run.finish()


HOW_TO = "log in with `wandb login`, or set WANDB_MODE=offline"


def _known_run(path: Path, project: str) -> dict[str, Any]:
    """The run of a workdir in a project: as it was left, or a new one."""
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
        if known["project"] == project and isinstance(known["step"], int) and known["id"]:
            return known
    except (OSError, ValueError, LookupError, TypeError):  # not there, or cut short
        pass
    return {"project": project, "id": secrets.token_hex(8), "step": 0}


def _log_in() -> None:
    """Asks for the key while somebody is there to type it, not behind the first evaluation."""
    import wandb  # noqa: PLC0415  # an extra

    if os.environ.get("WANDB_MODE", "online") != "online":
        return
    try:
        wandb.login()
    except wandb.Error as error:
        raise UserError(f"config.log.wandb: {_first_line(error)}; {HOW_TO}") from None


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
