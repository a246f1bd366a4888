"""Numbers that lie: updates that are not finite, and batches whose figures say that something is wrong."""

import json
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from step_grpo import paths
from step_grpo.distributed import is_first
from step_grpo.errors import UserError
from step_grpo.grpo.packing import PackedBatch
from step_grpo.grpo.update import Measurements, TrainBatch

MOST_KEPT = 20  # batches kept for replay; each may take a hundred megabytes


class SkippedUpdates:
    """Counts the updates that were skipped, and keeps the first such batch of a step for `step_grpo.replay`.

    Attributes:
        in_a_row: skipped up to the last update.
        most: the longest row that was seen in the step, which may have ended within it.
    """

    def __init__(self, workdir: Path, config: ConfigDict, in_a_row: int = 0):
        """Begins with those that a run that goes on had skipped."""
        self.in_a_row = self.most = in_a_row
        self._workdir, self._config = workdir, config

    def look(self, step: int, measured: Sequence[Measurements], batches: Sequence[TrainBatch]) -> None:
        """Goes through the updates of a step.

        Args:
            step: counted from 1.
            measured: of each update, on the host.
            batches: of each, [M, rows, T].
        """
        saved, self.most = False, self.in_a_row
        for one, batch in zip(measured, batches, strict=True):
            self.in_a_row = self.in_a_row + 1 if one.skipped else 0
            self.most = max(self.most, self.in_a_row)
            if one.skipped and not saved:
                saved = True
                self._save(step, batch)

    def _save(self, step: int, batch: TrainBatch) -> None:
        folder = self._workdir / "bad"
        held = to_arrays(batch)  # all processes have a part of it
        if not is_first():
            return
        path = folder / f"step-{step}.npz"
        keep = path.exists() or len(list(folder.glob("step-*.npz"))) < MOST_KEPT
        if keep:
            write_batch(path, step, held, self._config)
        look = f"look with python -m step_grpo.replay --workdir={self._workdir} --batch={path}"
        where = look if keep else f"{folder} is full, its batch is not kept"
        print(f"warning: step {step}: an update is not finite and was skipped; {where}", flush=True)

    def stop_if_too_many(self) -> None:
        """Ends a run that no longer learns.

        Raises:
            UserError: `config.grpo.max_skipped` updates in a row were skipped.
        """
        allowed = self._config.grpo.max_skipped
        if self.most >= allowed:
            raise UserError(
                f"{self.most} updates in a row were not finite (config.grpo.max_skipped is {allowed}); "
                f"batches are in {self._workdir / 'bad'}, see python -m step_grpo.replay; a lower "
                "config.grpo.learning_rate or config.model.dtype=float32 may help"
            )


def averaged(measured: Sequence[Measurements]) -> dict[str, float]:
    """The figures of a step: means over the updates that were made, and how many were skipped.

    With none made the means are those of the skipped ones, not finite where they were not; without any update
    all is 0.
    """
    made = [one for one in measured if not one.skipped] or list(measured)
    names = [name for name in Measurements._fields if name != "skipped"]
    means = {name: float(np.mean([getattr(one, name) for one in made])) if made else 0.0 for name in names}
    return means | {"skipped_updates": float(sum(one.skipped for one in measured))}


# ---------------------------------------------------------------------- batches on disk


def to_arrays(batch: TrainBatch) -> dict[str, np.ndarray]:
    """The rows of an update that hold something, [rows, T] each, by the fields they come from."""
    held = {**batch.packed._asdict(), "old_logprobs": batch.old_logprobs, "ref_logprobs": batch.ref_logprobs}
    flat = {name: _whole(array).reshape(-1, array.shape[-1]) for name, array in held.items()}
    filled = flat["segment_ids"].any(axis=1)
    return {name: rows[filled] for name, rows in flat.items()}


def _whole(array: Any) -> np.ndarray:
    """On the host, whatever process has the parts."""
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
        return np.asarray(multihost_utils.process_allgather(array, tiled=True))
    return np.asarray(array)


def write_batch(path: Path, step: int, held: Mapping[str, np.ndarray], config: ConfigDict) -> None:
    """Writes a batch with the step and the config it belongs to; whole or not at all."""
    paths.make(path.parent)
    settings = np.frombuffer(json.dumps(config.to_dict()).encode(), np.uint8)
    with BytesIO() as file:
        np.savez_compressed(file, **held, step=np.array(step), config=settings)  # type: ignore[arg-type]
        paths.write_bytes(path, file.getvalue())


def read_batch(path: Path) -> tuple[int, ConfigDict, TrainBatch]:
    """Step, config and rows that `write_batch` wrote.

    Raises:
        UserError: the file is not such a batch.
    """
    try:
        with np.load(BytesIO(path.read_bytes()), allow_pickle=False) as loaded:
            held = dict(loaded)
        step, config = int(held.pop("step")), ConfigDict(json.loads(held.pop("config").tobytes()))
        packed = PackedBatch(*(held[name] for name in PackedBatch._fields))
        return step, config, TrainBatch(packed, held["old_logprobs"], held["ref_logprobs"])
    except Exception as error:  # NumPy and zipfile raise whatever a damaged file leads to
        raise UserError(
            f"--batch={path}: is no batch that a run kept ({error or type(error).__name__})"
        ) from None


# ---------------------------------------------------------------------- warnings


def warn(step: int, figures: Mapping[str, float], first_tokens: float, bounds: ConfigDict) -> None:
    """Prints what `oddities` finds in a step."""
    for text in oddities(figures, first_tokens, bounds):
        print(f"warning: step {step}: {text}")


def oddities(figures: Mapping[str, float], first_tokens: float, bounds: ConfigDict) -> list[str]:
    """What is odd about a step, one line each that says what to look at.

    Args:
        figures: of its line of metrics.
        first_tokens: mean tokens of a completion in the first step of the run.
        bounds: `config.warn`.
    """
    kl, gap, tokens = figures["kl"], figures["sampler_gap"], figures["tokens"]
    found = []
    if figures["equal_groups"] == 1:
        found.append(
            f"every group has equal rewards (accuracy {figures['accuracy']:.1%}, formatted "
            f"{figures['formatted']:.1%}): nothing is learnt; look at the completions and the grading"
        )
    if figures["grading_failures"]:
        found.append(f"{figures['grading_failures']:.0f} answers could not be graded and count as wrong")
    if kl > bounds.kl:
        found.append(
            f"the KL to the first policy is {kl:.3g} nats a token, above config.warn.kl={bounds.kl:g}: look "
            "at config.grpo.learning_rate and config.grpo.kl_coef"
        )
    if gap > bounds.sampler_gap:
        found.append(
            f"sampler and trainer differ by {gap:.3g} nats a token, above config.warn.sampler_gap="
            f"{bounds.sampler_gap:g}: look at config.model.dtype and config.rollout.cache_dtype"
        )
    if figures["accuracy"] == 0:
        found.append("no answer is correct: look at the completions, the grading and the answers of the data")
    if tokens < bounds.length * first_tokens:
        found.append(
            f"completions have {tokens:.0f} tokens, in the first step {first_tokens:.0f}, a share below "
            f"config.warn.length={bounds.length:g}: look at the accuracy and at config.reward"
        )
    if figures["truncated"] >= bounds.truncated:
        found.append(
            f"{figures['truncated']:.0%} of the completions take the whole budget, config.warn.truncated="
            f"{bounds.truncated:g} or more: look at config.rollout.max_response_tokens"
        )
    return found
