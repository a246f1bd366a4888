"""The finished completions of a rollout that was interrupted, kept for the run that goes on.

`WORKDIR/partial_rollout/step_000012-0.npz` is what process 0 had finished of step 12. It holds all that these
completions depend on as well, and counts for nothing where any of that differs.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from io import BytesIO
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import jax
import numpy as np
from ml_collections import ConfigDict

import step_grpo
from step_grpo import checkpoint, paths
from step_grpo.data.prompts import EncodedPrompt, checksum
from step_grpo.rollout.engine import Completion
from step_grpo.scoring import joined, parted

LOOKED_AT = 64  # values of each weight that tell one policy from another; an update changes nearly all


class PartialRollout:
    """What is finished of the rollout of a step, by the cursor that each of its rounds begins at.

    Begins with what an interrupted run has left of the same step. Use it as a context manager: when its block
    ends with an error, what is finished is written; else the file, if there is one, is not needed any more.
    """

    def __init__(self, path: Path, facts: Callable[[], dict[str, Any]]):
        """Reads the file; one that is damaged or of another rollout is left out, with a warning.

        Args:
            path: from `file_of`.
            facts: all that the completions depend on, JSON; asked for only where there is a file to read or
                to write, for it looks at the weights.
        """
        self._path, self._facts = path, facts
        self._there = path.exists()
        self._rounds: dict[int, list[Completion]] = {}
        self._unwritten = False
        if self._there:
            try:
                self._rounds = read(path, facts())
            except ValueError as error:
                print(f"warning: {path} {error}; it is left out", flush=True)

    def of_round(self, cursor: int) -> list[Completion]:
        """The finished completions of the round that begins at a cursor, so far."""
        return list(self._rounds.get(cursor, ()))

    def add(self, cursor: int, completions: Sequence[Completion]) -> None:
        """Remembers completions of such a round."""
        self._rounds.setdefault(cursor, []).extend(completions)
        self._unwritten |= bool(completions)

    def write(self) -> None:
        """Writes what is finished, if there is anything new; says so where it cannot."""
        if not self._unwritten:
            return
        try:
            paths.make(self._path.parent)
            paths.write_bytes(self._path, to_bytes(self._rounds, self._facts()))
        except OSError as error:
            print(f"warning: {self._path} cannot be written ({error.strerror or error})", flush=True)
        self._unwritten = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, where: TracebackType | None) -> None:
        if error:
            self.write()
        elif self._there:
            self._path.unlink(missing_ok=True)


def kept_rollout(
    workdir: Path,
    step: int,
    params: Any,
    key: jax.Array,
    questions: Sequence[EncodedPrompt],
    config: ConfigDict,
) -> PartialRollout:
    """That of this process for a step, counted from 1; the other arguments are those of `facts_of`."""
    return PartialRollout(file_of(workdir, step), partial(facts_of, params, key, questions, config))


def file_of(workdir: Path, step: int) -> Path:
    """Where this process keeps what it has finished of a step, counted from 1."""
    return workdir / "partial_rollout" / f"step_{step:06d}-{jax.process_index()}.npz"


def facts_of(
    params: Any, key: jax.Array, questions: Sequence[EncodedPrompt], config: ConfigDict
) -> dict[str, Any]:
    """All that the completions of a step depend on.

    Args:
        params: from `evaluate.decode_ready`; some values of each array stand for the whole.
        key: of the step; seed and step are in it.
        questions: all that the run trains on.
        config: of the run.
    """
    weights = hashlib.sha256()
    for leaf in jax.tree.leaves(params):
        part = leaf.addressable_shards[0].data
        weights.update(np.asarray(part[(0,) * (part.ndim - 1)][:LOOKED_AT]).tobytes())
    return {
        "config": checkpoint.exact_fields(config),
        "version": [step_grpo.__version__, jax.__version__],
        "key": jax.random.key_data(key).tolist(),
        "weights": weights.hexdigest(),
        "questions": checksum(questions),
        "process": [jax.process_index(), jax.process_count()],
    }


def to_bytes(rounds: Mapping[int, Sequence[Completion]], facts: Mapping[str, Any]) -> bytes:
    """The contents of the file."""
    found = [(cursor, c) for cursor, completions in rounds.items() for c in completions]
    rows = [(cursor, c.prompt, c.sample, c.reason, c.probe_tokens) for cursor, c in found]
    texts = {"facts": _bytes(facts), "rows": _bytes(rows)}
    with BytesIO() as file:
        np.savez(file, **texts, **joined([c for _, c in found]))  # type: ignore[arg-type]
        return file.getvalue()


def _bytes(value: Any) -> np.ndarray:
    return np.frombuffer(json.dumps(value).encode(), np.uint8)


def read(path: Path, facts: Mapping[str, Any]) -> dict[int, list[Completion]]:
    """The completions by round that `to_bytes` wrote under these facts.

    Raises:
        ValueError: the file is damaged, or was written under others.
    """
    try:
        with np.load(BytesIO(path.read_bytes()), allow_pickle=False) as loaded:
            held = dict(loaded)
        there = json.loads(held["facts"].tobytes())
        rows, parts = json.loads(held["rows"].tobytes()), parted(held)
    except Exception as error:  # NumPy and zipfile raise whatever a damaged file leads to
        raise ValueError(f"is damaged ({error or type(error).__name__})") from None
    if differing := sorted(name for name in facts if facts[name] != there.get(name)):
        raise ValueError(f"is of another rollout (other {', '.join(differing)})")
    rounds: dict[int, list[Completion]] = {}
    for i, (cursor, prompt, sample, reason, probe_tokens) in enumerate(rows):
        arrays = {name: values[i] for name, values in parts.items()}
        made = Completion(prompt=prompt, sample=sample, reason=reason, probe_tokens=probe_tokens, **arrays)
        rounds.setdefault(cursor, []).append(made)
    return rounds
