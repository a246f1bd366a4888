"""Questions with reference answers, from wherever they are: Hub, TFDS, jsonl, parquet, or generated.

`load_questions` reads a source into memory once; `Questions.take` then walks it in an order that is a pure
function of a seed and a cursor, so a resumed run needs the cursor and nothing else.
"""

import dataclasses
import difflib
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from string import ascii_uppercase
from typing import Any, NoReturn

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from absl import logging
from ml_collections import ConfigDict

from step_grpo import hub
from step_grpo.errors import UserError


@dataclasses.dataclass(frozen=True)
class Question:
    """One problem; `id` names its place in the source and stays the same whatever other rows are dropped."""

    id: str
    question: str
    answer: str
    grading: str = "math"  # or a key of `reward.choices.TEXT_GRADING`


@dataclasses.dataclass(frozen=True)
class Questions:
    """The usable rows of a source, in its own order, and the number of rows that were not usable."""

    items: tuple[Question, ...]
    dropped: int = 0

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Question:
        return self.items[index]

    def __iter__(self) -> Iterator[Question]:
        return iter(self.items)


def take(size: int, cursor: int, count: int, seed: int) -> tuple[list[int], int]:
    """Indices of the next `count` of `size` questions, and the cursor behind them.

    The cursor counts questions since the start of training; it is all that resuming needs. Each epoch is a
    permutation of its own and holds every question exactly once; a batch may straddle epochs.
    """
    picked: list[int] = []
    position, end = cursor, cursor + count
    while position < end:
        epoch, start = divmod(position, size)
        order = epoch_order(size, seed, epoch)[start : start + end - position]
        picked += order.tolist()
        position += len(order)
    return picked, end


def epoch_order(size: int, seed: int, epoch: int) -> np.ndarray:
    """The permutation of `range(size)` that belongs to an epoch, `[size]`.

    Sorting raw Philox words: NumPy promises that stream for good, but not `Generator.permutation`.
    """
    words = np.random.Philox(np.random.SeedSequence([seed, epoch])).random_raw(size)
    return np.argsort(words, kind="stable")


def load_questions(config: ConfigDict, *, where: str = "config.data") -> Questions:
    """Reads the source that a `data_config` describes.

    Args:
        config: the fields of `step_grpo.config.data_config`.
        where: the path of that config, for messages.

    Raises:
        UserError: an unknown source, name, split or column, an unreadable file, a bad row (unless
            `bad_rows` is `drop`), or no usable row at all.
    """
    if config.source not in _READERS:
        raise UserError(f"{where}.source is {config.source!r}; it must be one of {', '.join(_READERS)}")
    if config.bad_rows not in ("error", "drop"):
        raise UserError(f"{where}.bad_rows is {config.bad_rows!r}; it must be 'error' or 'drop'")
    if not config.name and config.source != "arithmetic":
        raise UserError(f"{where}.name is empty; name the dataset or the file to read")
    return _questions(_READERS[config.source](config, where), config, where)


# ---------------------------------------------------------------- rows to questions


@dataclasses.dataclass(frozen=True)
class _Table:
    """The rows of a source: `label` and `unit` say in messages which row is meant, `key` starts the ids."""

    label: str
    key: str
    unit: str
    rows: "Iterable[tuple[int, Mapping[str, Any] | _BadRowError]]"  # a row that cannot be read is its error


class _BadRowError(Exception):
    """What is wrong with one row; becomes a `UserError` or a count."""


def _questions(table: _Table, config: ConfigDict, where: str) -> Questions:
    good: list[tuple[int, str, str, list[str]]] = []
    problems: list[str] = []

    def bad(number: int, field: str, problem: str) -> None:
        message = f"{where}.{field}: {table.label}, {table.unit} {number}: {problem}"
        if config.bad_rows == "error":
            raise UserError(f"{message}; mend it, or set {where}.bad_rows=drop")
        problems.append(message)

    for number, row in table.rows:
        field = "name"
        try:
            if isinstance(row, _BadRowError):
                raise row
            field = "prompt_column"
            question = _text(_column(row, config.prompt_column), config.prompt_column)
            field = "answer_column"
            answer = _answer_text(_column(row, config.answer_column), config.answer_column)
            field = "choice_columns"
            wrong = [_answer_text(_column(row, name), name) for name in config.choice_columns]
        except _BadRowError as problem:
            bad(number, field, str(problem))
        else:
            good.append((number, question, answer, wrong))

    questions = []
    answers = _extract([answer for _, _, answer, _ in good], config.answer_pattern, where)
    for (number, question, _, wrong), answer in zip(good, answers, strict=True):
        if answer:
            asked, right = with_options(question, answer, wrong) if wrong else (question, answer)
            questions.append(Question(f"{table.key}:{number}", asked, right, config.grading))
        else:
            bad(number, "answer_pattern", f"{config.answer_pattern!r} finds no answer")
    if not questions:
        why = f"all {len(problems)} rows are bad, first {problems[0]}" if problems else "it has no rows"
        raise UserError(f"{where}.name: {table.label} gives no question: {why}")
    return Questions(tuple(questions), len(problems))


def with_options(question: str, right: str, wrong: Sequence[str]) -> tuple[str, str]:
    """A multiple-choice question with its options under letters, and the letter of the right one.

    The order of the options is folded from the question alone, so it is the same in every run.
    """
    words = np.random.Philox(np.random.SeedSequence(list(question.encode("utf-8")))).random_raw(
        1 + len(wrong)
    )
    order = np.argsort(words, kind="stable").tolist()
    options = [right, *wrong]
    lines = [f"{letter}. {options[place]}" for letter, place in zip(ascii_uppercase, order, strict=False)]
    return "\n".join([question, "", *lines]), ascii_uppercase[order.index(0)]


def _column(row: Mapping[str, Any], path: str) -> Any:
    """The value under a dotted path of column names and list indices."""
    value: Any = row
    for depth, part in enumerate(path.split(".")):
        if isinstance(value, np.ndarray):
            value = value.tolist()
        if isinstance(value, Mapping):
            if part not in value:
                parent = "".join(f"{name}." for name in path.split(".")[:depth])
                raise _BadRowError(_missing(parent + part, [parent + str(name) for name in value]))
            value = value[part]
        elif isinstance(value, list | tuple):
            if not part.isdecimal() or int(part) >= len(value):
                raise _BadRowError(f"column {path!r}: {part!r} is not an index of a list of {len(value)}")
            value = value[int(part)]
        else:
            raise _BadRowError(f"column {path!r}: nothing can be inside {_kind(value)}, at {part!r}")
    return value


def _missing(name: str, present: list[str]) -> str:
    near = difflib.get_close_matches(name, present, n=1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    return f"no column {name!r}{hint}; it has {', '.join(sorted(present)) or 'none'}"


def _text(value: Any, column: str) -> str:
    """A non-empty, trimmed text."""
    if isinstance(value, bytes):
        try:
            value = value.decode("utf-8")
        except UnicodeDecodeError:
            raise _BadRowError(f"column {column!r} is not UTF-8") from None
    if not isinstance(value, str):
        raise _BadRowError(f"column {column!r} is {_kind(value)}, not text")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:  # JSON can spell half a surrogate pair
        raise _BadRowError(f"column {column!r} has an unpaired surrogate, which no tokenizer takes") from None
    text = value.strip()
    if not text:
        raise _BadRowError(f"column {column!r} is empty")
    return text


def _answer_text(value: Any, column: str) -> str:
    """A text from what benchmarks hold as answers: texts, numbers, and lists of just one of these."""
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, list | tuple):
        if len(value) != 1:
            raise _BadRowError(f"column {column!r} is a list of {len(value)} answers; only one is supported")
        value = value[0]
    if isinstance(value, float) and math.isfinite(value):
        return str(int(value)) if value.is_integer() else repr(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return _text(value, column)


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    return f"the number {value}" if isinstance(value, float) else f"a value of type {type(value).__name__}"


def _extract(answers: list[str], pattern: str, where: str) -> list[str]:
    """The first group of `pattern` in each answer, trimmed; empty where there is none.

    Arrow's regular expressions are RE2's: linear time whatever the pattern and the text.
    """
    if not pattern:
        return answers
    column = pa.array(answers, pa.large_string())
    try:
        found = pc.match_substring_regex(column, pattern).to_pylist()
        whole = f"(?s:^.*?)(?:{pattern})(?s:.*$)"
        group = pc.replace_substring_regex(column, whole, r"\1", max_replacements=1).to_pylist()
    except pa.ArrowInvalid as error:
        raise UserError(
            f"{where}.answer_pattern is {pattern!r}, not a pattern with a group (RE2 syntax): {_line(error)}"
        ) from None
    return [text.strip() if ok else "" for ok, text in zip(found, group, strict=True)]


# ---------------------------------------------------------------- sources to rows


def _read_jsonl(config: ConfigDict, where: str) -> _Table:
    path = _existing(config.name, where)
    if path.is_dir():
        raise UserError(f"{where}.name: {path} is a folder; name one .jsonl file")

    def rows() -> Iterator[tuple[int, Mapping[str, Any] | _BadRowError]]:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield number, _json_object(line)

    return _Table(str(path), path.name, "line", rows())


def _json_object(line: bytes) -> Mapping[str, Any] | _BadRowError:
    """The JSON object in a line, or what is wrong with it."""
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        return _BadRowError(f"not UTF-8 (byte {error.start + 1})")
    except (ValueError, RecursionError) as error:
        return _BadRowError(f"not JSON ({_line(error)}); each line must be one JSON object")
    if not isinstance(row, dict):
        return _BadRowError(f"JSON but a {type(row).__name__}; each line must be one JSON object")
    return row


def _read_parquet(config: ConfigDict, where: str) -> _Table:
    path = _existing(config.name, where)
    try:
        names = pq.ParquetDataset(path).schema.names
        table = pq.read_table(path, columns=_roots(config, names))
    except (
        pa.ArrowException,
        OSError,
        ValueError,
    ) as error:  # of a damaged file, also names that are no UTF-8
        raise UserError(f"{where}.name: {path} is not readable as parquet: {_line(error)}") from None
    return _Table(str(path), path.name, "row", _arrow_rows([table]))


_ARROW_ROWS = 1024  # that become Python values at a time


def _arrow_rows(tables: Iterable[pa.Table]) -> Iterator[tuple[int, Mapping[str, Any] | _BadRowError]]:
    """The rows of tables, one after another, numbered from 0."""
    batches = (batch for table in tables for batch in table.to_batches(max_chunksize=_ARROW_ROWS))
    return enumerate(row for batch in batches for row in _python_rows(batch))


def _python_rows(batch: pa.RecordBatch) -> list[Mapping[str, Any] | _BadRowError]:
    """The rows of a batch; the error of one that holds no Python value, such as a text that is not UTF-8.

    A batch with such a row fails as a whole, so it is then read row by row.
    """
    try:
        return [_without_json(row, batch.schema) for row in batch.to_pylist()]
    except (ValueError, OverflowError, KeyError, RecursionError, pa.ArrowException) as error:
        if batch.num_rows == 1:
            return [_BadRowError(f"cannot be read ({_line(error)})")]
    return [row for number in range(batch.num_rows) for row in _python_rows(batch.slice(number, 1))]


def _without_json(value: Any, kind: pa.Schema | pa.DataType) -> Any:
    """A value of Arrow, with what is JSON in it parsed: `datasets` stores so what differs from row to row."""
    if isinstance(kind, pa.JsonType):
        return value if value is None else json.loads(value)
    if isinstance(value, dict) and isinstance(kind, pa.Schema | pa.StructType):
        return {name: _without_json(inner, kind.field(name).type) for name, inner in value.items()}
    if isinstance(value, list) and isinstance(kind, pa.ListType | pa.LargeListType | pa.FixedSizeListType):
        return [_without_json(inner, kind.value_type) for inner in value]
    return value


def _roots(config: ConfigDict, names: list[str]) -> list[str]:
    """The columns to read; all of them where one is missing, for the message that lists them."""
    columns = (config.prompt_column, config.answer_column, *config.choice_columns)
    roots = {column.partition(".")[0] for column in columns}
    return sorted(roots) if roots <= set(names) else list(names)


def _read_hf(config: ConfigDict, where: str) -> _Table:
    import datasets  # noqa: PLC0415 (a second of import)

    local = Path(config.name).expanduser()
    if not local.exists():
        if hub.looks_like_path(config.name):
            _existing(config.name, where)
        datasets.config.HF_HUB_OFFLINE = hub.offline()
    verbosity, bars = datasets.logging.get_verbosity(), datasets.is_progress_bar_enabled()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what fails is said once, below
    if local.exists():
        datasets.disable_progress_bars()
    try:
        dataset = _load_local(datasets, local, config) if local.exists() else _load_named(datasets, config)
        dataset = dataset.select_columns(_roots(config, dataset.column_names))
        _refuse_media(datasets, dataset.features, config, where)
    except UserError:
        raise
    except Exception as error:  # any failure to read is the dataset's, and comes in many types
        _refuse_hf(error, config, where)
    finally:
        datasets.logging.set_verbosity(verbosity)
        if bars:
            datasets.enable_progress_bars()
    key = local.name if local.exists() else config.name
    label = f"{config.name}, split {config.split}"
    return _Table(label, f"{key}/{config.split}", "row", _arrow_rows(_hf_tables(dataset, config, where)))


def _hf_tables(dataset: Any, config: ConfigDict, where: str) -> Iterator[pa.Table]:
    """The stored rows themselves: what `datasets` makes of them may open a file that a row names."""
    try:
        yield from dataset.with_format("arrow").iter(_ARROW_ROWS)
    except (pa.ArrowException, OSError, ValueError) as error:  # of a damaged file
        _refuse_hf(error, config, where)


def _refuse_media(datasets: Any, features: Any, config: ConfigDict, where: str) -> None:
    """Images, sounds and the like are no text, whatever is in them."""
    fields = {"prompt_column": (config.prompt_column,), "answer_column": (config.answer_column,)}
    for field, columns in {**fields, "choice_columns": config.choice_columns}.items():
        for column in columns:
            kind = features.get(column)
            if hasattr(kind, "decode_example") and not isinstance(kind, datasets.Json):
                raise UserError(
                    f"{where}.{field}: {config.name}, split {config.split}: column {column!r} is of the type "
                    f"{type(kind).__name__}, not text"
                )


def _load_named(datasets: Any, config: ConfigDict) -> Any:
    """The rows of a subset, or of several, written `one+another`, one after another."""
    subsets = config.subset.split("+")
    parts = [datasets.load_dataset(config.name, subset or None, split=config.split) for subset in subsets]
    return parts[0] if len(parts) == 1 else datasets.concatenate_datasets(parts)


def _load_local(datasets: Any, path: Path, config: ConfigDict) -> Any:
    if path.is_file():
        kind = {".jsonl": "json", ".arrow": "arrow", ".tsv": "csv"}.get(path.suffix, path.suffix[1:])
        if kind not in ("json", "parquet", "csv", "arrow"):
            raise ValueError(f"a file of type {path.suffix!r} is neither json, jsonl, parquet, csv nor arrow")
        files = {config.split.partition("[")[0]: str(path)}
        return datasets.load_dataset(kind, data_files=files, split=config.split)
    if (path / "dataset_dict.json").exists():
        saved = datasets.load_from_disk(str(path))
        if config.split not in saved:
            raise ValueError(f"Unknown split {config.split!r}. Should be one of {sorted(saved)}")
        return saved[config.split]
    if (path / "state.json").exists():
        return datasets.load_from_disk(str(path))
    return datasets.load_dataset(str(path), config.subset or None, split=config.split)


def _refuse_hf(error: Exception, config: ConfigDict, where: str) -> NoReturn:
    text = _line(error)
    if isinstance(error, ConnectionError):
        raise hub.failure()(
            f"{where}.name: {config.name!r} is no local file or folder, not in the cache, and the Hugging "
            "Face Hub cannot be reached; check the name and the network, or name a local copy"
        ) from error
    if "split" in text:
        raise UserError(f"{where}.split is {config.split!r}: {text}") from error
    if "BuilderConfig" in text or "Config name" in text:
        raise UserError(f"{where}.subset is {config.subset!r}: {text}") from error
    raise UserError(
        f"{where}.name: cannot load {config.name!r} ({type(error).__name__}: {text}); "
        "name a dataset of the Hugging Face Hub, a data file or a folder"
    ) from error


def _read_tfds(config: ConfigDict, where: str) -> _Table:
    import tensorflow_datasets as tfds  # noqa: PLC0415 (half a second of import; needs no TensorFlow)

    local = Path(config.name).expanduser()
    if hub.looks_like_path(config.name):
        local = _existing(config.name, where)
    name = f"{config.name}/{config.subset}" if config.subset else config.name
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)  # a warning for each folder that is not there yet
    try:
        builder = tfds.builder_from_directory(str(local)) if local.is_dir() else _prepared(tfds, name, where)
        source = builder.as_data_source(split=config.split)
    except UserError:
        raise
    except ImportError as error:
        raise UserError(
            f"{where}.name: preparing the TFDS dataset {name!r} needs the package {error.name!r}; install "
            "it, or prepare the dataset elsewhere and point TFDS_DATA_DIR to it"
        ) from error
    except Exception as error:  # any failure to read is the dataset's, and comes in many types
        text = _line(error)
        field = "split" if "split" in text else "name"
        raise UserError(f"{where}.{field}: cannot load the TFDS dataset {name!r}: {text}") from error
    finally:
        logging.set_verbosity(verbosity)
    label = f"{name}, split {config.split}"
    return _Table(label, f"{builder.info.full_name}/{config.split}", "row", _decoded(source))


def _decoded(source: Sequence[Any]) -> Iterator[tuple[int, Mapping[str, Any] | _BadRowError]]:
    """The rows of a source that decodes each when it is asked for it."""
    for number in range(len(source)):
        try:
            yield number, source[number]
        except Exception as error:  # any failure to decode is the row's, and comes in many types
            yield number, _BadRowError(f"cannot be read ({_line(error)})")


def _prepared(tfds: Any, name: str, where: str) -> Any:
    """The builder of a dataset whose files are on disk, downloaded if they must be."""
    try:
        builder = tfds.builder(name, file_format="array_record")  # the format that reads rows by number
    except tfds.core.DatasetNotFoundError:
        near = difflib.get_close_matches(name, tfds.list_builders(with_community_datasets=False), n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise UserError(f"{where}.name: TFDS has no dataset {name!r}{hint}") from None
    if not builder.is_prepared():
        if hub.offline():
            raise hub.failure()(
                f"{where}.name: the TFDS dataset {name!r} is not in {builder.data_path.parent}, and there is "
                "no network to download it; prepare it elsewhere and point TFDS_DATA_DIR to it"
            )
        builder.download_and_prepare()
    return builder


def _read_arithmetic(config: ConfigDict, where: str) -> _Table:
    from step_grpo.data import arithmetic  # noqa: PLC0415 (other sources do without it)

    _counted(config, where)
    if config.split not in arithmetic.SPLITS:
        splits = ", ".join(arithmetic.SPLITS)
        raise UserError(f"{where}.split is {config.split!r}; arithmetic has {splits}")
    problems = arithmetic.problems(config.split, config.count, config.seed)
    rows = enumerate({"problem": problem, "answer": answer} for problem, answer in problems)
    return _Table(f"arithmetic, split {config.split}", f"arithmetic/{_draw(config)}", "row", rows)


def _read_tasks(config: ConfigDict, where: str) -> _Table:
    from step_grpo.data import tasks  # noqa: PLC0415 (other sources do without it)

    _counted(config, where)
    if config.split not in tasks.SPLITS:
        raise UserError(f"{where}.split is {config.split!r}; tasks have {', '.join(tasks.SPLITS)}")
    drawn = config.split, config.count, config.seed
    problems = tasks.problems(config.name, *drawn, where=f"{where}.name")
    rows = enumerate({"problem": problem, "answer": answer} for problem, answer in problems)
    return _Table(f"{config.name}, split {config.split}", f"tasks/{config.name}/{_draw(config)}", "row", rows)


def _draw(config: ConfigDict) -> str:
    """The split, as it stands in the identity of a generated question; any draw but the first says which."""
    return config.split + (f"/seed{config.seed}" if config.seed else "")


def _read_reasoning_gym(config: ConfigDict, where: str) -> _Table:
    from step_grpo.data import gym  # noqa: PLC0415 (other sources do without it)

    _counted(config, where)
    rows = enumerate(gym.rows(config.name, config.split, config.count, config.seed, where=where))
    label = f"reasoning-gym's {config.name}, split {config.split}"
    return _Table(label, f"reasoning_gym/{config.name}/{_draw(config)}", "row", rows)


def _counted(config: ConfigDict, where: str) -> None:
    if config.count < 1:
        raise UserError(f"{where}.count is {config.count}; it must be at least 1, the problems to generate")
    if config.seed < 0:
        raise UserError(f"{where}.seed is {config.seed}; it must be 0 or more, the draw of the problems")


def _existing(name: str, where: str) -> Path:
    path = Path(name).expanduser()
    if not path.exists():
        raise UserError(f"{where}.name: no such file or folder: {name}")
    return path


def _line(error: BaseException) -> str:
    """The first line of what an exception says, or else its type."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


_READERS = {
    "hf": _read_hf,
    "tfds": _read_tfds,
    "jsonl": _read_jsonl,
    "parquet": _read_parquet,
    "arithmetic": _read_arithmetic,
    "tasks": _read_tasks,
    "reasoning_gym": _read_reasoning_gym,
}
