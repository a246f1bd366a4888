"""Fuzzing of what a user or a model hands in: configs, data files, and token streams.

`python -m benchmarks.fuzz --cases=100000` spreads so many cases over the targets below and prints, on its
last line, one JSON object: `cases` and `failures` of each target, and of all.

- `config`: fields set to values of any type; `validate` accepts, or raises a `UserError` that names a field.
- `jsonl`, `parquet`, `hf`: files with rows of any type, bad encodings and damaged bytes, `hf` those of the
  other two through Hugging Face's library; `load_questions` gives questions and a count of the rows that it
  dropped, or raises a `UserError` that names the file, the row if it is one, or the field of the config.
- `triggers`: strings of tokens; the automaton of the decode loop finds the triggers that a regex finds.
- `phases`: a made-up model in which every token depends on all before it, decoded by the jitted loop, and by
  the plain Python restatement of the method (`tests/rollout/brute_force.py`): tokens, forced tokens, reasons
  and confidences are the same.
"""

import argparse
import contextlib
import json
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import datasets
import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from ml_collections import ConfigDict

from step_grpo.cli import leaf_fields
from step_grpo.config import base_config, data_config, validate
from step_grpo.data.sources import Questions, load_questions
from step_grpo.errors import UserError
from step_grpo.model import qwen
from step_grpo.rollout import decode
from step_grpo.rollout.phases import REASONS, Machine
from step_grpo.rollout.policies import Confidence
from step_grpo.rollout.triggers import Vocabulary, build_vocabulary, reach

sys.path.append(str(Path(__file__).parents[1] / "tests" / "rollout"))
from brute_force import BruteForce
from test_triggers import SEVERAL, TINY_TEXTS, found_by_tables, random_strings, standing

SHARES = {"config": 0.1, "jsonl": 0.1, "parquet": 0.03, "hf": 0.01, "triggers": 0.74, "phases": 0.02}
"""Of the cases; one of `triggers` is cheapest."""


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs all targets and prints their counts; returns the JSON object."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fuzz", description=__doc__)
    parser.add_argument("--cases", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    start, targets = time.perf_counter(), {}
    for name, share in SHARES.items():
        targets[name] = run_target(name, max(1, round(args.cases * share)), args.seed)
        print(name, json.dumps(targets[name]), flush=True)
    result = {
        "cases": sum(target["cases"] for target in targets.values()),
        "failures": sum(target["failures"] for target in targets.values()),
        "targets": targets,
        "seconds": time.perf_counter() - start,
        "settings": vars(args),
    }
    print(json.dumps(result))
    return result


def run_target(name: str, cases: int, random_seed: int) -> dict[str, Any]:
    """Runs a target; what fails is printed, in its smallest form where hypothesis made it."""
    start, counter = time.perf_counter(), Counter()
    failures = 0
    try:
        TARGETS[name](cases, random_seed, counter)
    except Exception:  # whatever it is: the target ends at its first failure
        traceback.print_exc()
        failures = 1
    return {"cases": counter.cases, "failures": failures, "seconds": round(time.perf_counter() - start, 1)}


class Counter:
    """How many cases have been tried."""

    cases = 0


def explore(
    check: Callable[[Any], None], strategy: Any, cases: int, random_seed: int, counter: Counter
) -> None:
    """Calls `check` with so many draws of a strategy; a failure is made small and raised."""

    @seed(random_seed)
    @settings(
        max_examples=cases,
        deadline=None,
        database=None,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def one(case: Any) -> None:
        counter.cases += 1
        check(case)

    one()


# ---------------------------------------------------------------------- configs

ODD_TEXT = st.text(max_size=6) | st.sampled_from(
    ["", "a..b", "\x00", "\ud800", "inf", "verifier", "int8", "qwen3"]
)
NUMBERS = st.integers(-3, 20000) | st.sampled_from([0, -1, 2**63, 10**400]) | st.floats()
ANY_VALUE = st.one_of(
    st.none(),
    st.booleans(),
    NUMBERS,
    ODD_TEXT,
    st.binary(max_size=3),
    st.lists(ODD_TEXT | NUMBERS | st.none(), max_size=3),
    st.lists(ODD_TEXT, max_size=3).map(tuple),
    st.dictionaries(st.sampled_from(["model_type", "x"]), ODD_TEXT | NUMBERS, max_size=2).map(ConfigDict),
    st.sampled_from([np.float32(0.5), np.int64(3), complex(1, 1), object, {1, 2}]),
)
GROUPS = [
    "model",
    "lora",
    "mesh",
    "data",
    "rollout",
    "rollout.sufficiency",
    "eval",
    "eval.data",
    "grpo",
    "warn",
]
CHOICES = [
    "accuracy",
    "sufficiency",
    "verifier",
    "none",
    "jsonl",
    "tasks",
    "arithmetic",
    "drop",
    "choice",
    "gspo",
]


def fuzz_config(cases: int, random_seed: int, counter: Counter) -> None:
    """One to four fields or groups of a config set to anything."""
    fields = st.sampled_from(leaf_fields(base_config())) | st.sampled_from(GROUPS)
    changes = st.lists(st.tuples(fields, ANY_VALUE | st.sampled_from(CHOICES)), min_size=1, max_size=4)
    explore(check_config, changes, cases, random_seed, counter)


def check_config(changes: list[tuple[str, Any]]) -> None:
    """`validate` accepts a changed config, or names one of its fields."""
    config = base_config().unlock()
    for path, value in changes:
        *groups, name = path.split(".")
        parent: Any = config
        for group in groups:
            parent = parent[group] if isinstance(parent, ConfigDict) and group in parent else None
        if isinstance(parent, ConfigDict):
            # What a ConfigDict refuses itself, such as an integer too large for a float, never gets further.
            with parent.ignore_type(), contextlib.suppress(OverflowError, TypeError, ValueError):
                parent[name] = value
    try:
        validate(config)
    except UserError as error:
        assert str(error).startswith("config."), error


# ---------------------------------------------------------------------- data

JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just("\ud800"),
    lambda inner: (
        st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["a", "b"]), inner, max_size=2)
    ),
    max_leaves=4,
)
COLUMNS = ["problem", "answer", "a", "problem.a", "answer.0", "answer.a.0", "b"]
ROWS = st.dictionaries(st.sampled_from(["problem", "answer", "a", "b"]), JSON_VALUES, max_size=4)
GOOD_ROWS = st.fixed_dictionaries(
    {"problem": st.text(max_size=8), "answer": st.integers() | st.text(max_size=4)}
)
LINES = st.one_of(
    GOOD_ROWS.map(lambda row: json.dumps(row).encode()),
    ROWS.map(lambda row: json.dumps(row).encode()),
    ROWS.map(lambda row: json.dumps(row).encode()[:-1]),
    ROWS.map(lambda row: json.dumps(row, ensure_ascii=False).encode("utf-16-le", "surrogatepass")),
    st.binary(max_size=12),
    st.sampled_from([b"[" * 5000, b"9" * 5000, b'{"problem": "\xff"}', b"\xef\xbb\xbf{}", b"\x00", b"NaN"]),
    st.just(b'{"problem": "' + b"x" * 10**5 + b'", "answer": "1"}'),
)
DATA_FIELDS = st.fixed_dictionaries(
    {
        "bad_rows": st.sampled_from(["error", "drop"]),
        "prompt_column": st.sampled_from(["problem", "problem", *COLUMNS]),
        "answer_column": st.sampled_from(["answer", "answer", *COLUMNS]),
        "answer_pattern": st.sampled_from(["", "", "", "(.)", "(", "x", "(a|b)*c(.*)"]),
        "choice_columns": st.sampled_from([(), (), ("b",), ("a", "b")]),
    }
)


def fuzz_jsonl(cases: int, random_seed: int, counter: Counter) -> None:
    """Files of up to four lines, some of them no JSON."""
    with tempfile.TemporaryDirectory(prefix="fuzz_") as folder:
        path = Path(folder) / "rows.jsonl"

        def check(case: tuple[list[bytes], dict[str, Any]]) -> None:
            content = b"\n".join(case[0])
            path.write_bytes(content)
            rows = sum(bool(line.strip()) for line in content.split(b"\n"))
            check_source("jsonl", path, case[1], rows)

        explore(check, st.tuples(st.lists(LINES, max_size=4), DATA_FIELDS), cases, random_seed, counter)


def check_source(source: str, path: Path, fields: dict[str, Any], rows: int | None) -> None:
    """Reading gives questions and counts every other row, or names the file or the field.

    Args:
        source: of the config.
        path: the file.
        fields: other fields of the config.
        rows: how many the file has; None where it is damaged.
    """
    try:
        questions = load_questions(data_config(source=source, name=str(path), **fields))
    except UserError as error:
        message = str(error)
        assert message.startswith("config.data."), message
        assert str(path) in message or message.startswith("config.data.answer_pattern"), message
        return
    assert isinstance(questions, Questions)
    assert len(questions) > 0
    assert rows is None or len(questions) + questions.dropped == rows, (
        len(questions),
        questions.dropped,
        rows,
    )
    assert questions.dropped == 0 or fields["bad_rows"] == "drop"
    for question in questions:
        assert question.question and question.answer
        (question.question + question.answer).encode("utf-8")


BAD_TEXT = pa.array([b"\xff\xfe", b"ok"], pa.binary()).view(pa.string())
ARRAYS: tuple[pa.Array, ...] = (
    pa.array(["question", "2"]),
    pa.array(["2", "3"]),
    pa.array(["", None]),
    pa.array([None, None]),
    pa.array([1, 2]),
    pa.array([1.5, float("nan")]),
    pa.array([True, False]),
    pa.array([b"\xff", b"text"]),
    BAD_TEXT,
    pa.array([["a"], ["b", "c"]]),
    pa.array([{"a": "x"}, {"a": None}]),
    pa.array([2**62, -(2**62)], pa.timestamp("ms")),
    pa.array([2**31 - 1, 0], pa.date32()),
    pa.array([1, 2], pa.timestamp("us", tz="Nowhere/Land")),
    pa.array([2**62, 1], pa.duration("s")),
    pa.array(["2", "2"]).dictionary_encode(),
    pa.array(["x" * 10**5, "y"], pa.large_string()),
    pa.array([], pa.string()),
)
DAMAGE = st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=3)


TABLES = st.tuples(
    st.dictionaries(st.sampled_from(["problem", "answer", "a"]), st.integers(0, len(ARRAYS) - 2)),
    st.sampled_from([2, 2, 1, 0]),
    DAMAGE,
    st.sampled_from([1.0, 1.0, 1.0, 0.5, 0.0]),
)
"""Columns by number, rows, bytes that are changed, and how much of the file is left."""


def write_parquet(path: Path, table: tuple[Any, ...]) -> int | None:
    """Writes one of `TABLES`; returns its rows, None where it is damaged."""
    chosen, rows, damage, kept = table
    pq.write_table(pa.table({name: ARRAYS[i].slice(0, rows) for name, i in chosen.items()}), path)
    content = bytearray(path.read_bytes())
    for place, byte in damage:
        content[int(place * len(content))] = byte
    path.write_bytes(content[: int(kept * len(content))])
    return rows if not damage and kept == 1 and chosen else None


def fuzz_parquet(cases: int, random_seed: int, counter: Counter) -> None:
    """Files with columns of any type, whole, damaged or cut off."""
    with tempfile.TemporaryDirectory(prefix="fuzz_") as folder:
        path = Path(folder) / "rows.parquet"

        def check(case: tuple[Any, ...]) -> None:
            table, fields = case
            check_source("parquet", path, fields, write_parquet(path, table))

        explore(check, st.tuples(TABLES, DATA_FIELDS), cases, random_seed, counter)


def fuzz_hf(cases: int, random_seed: int, counter: Counter) -> None:
    """Files of lines or of columns, read by Hugging Face's library."""

    def check(case: tuple[Any, ...]) -> None:
        lines, table, fields = case
        # Its cache knows a file by name, size and time: each case has a place of its own.
        with (
            tempfile.TemporaryDirectory(prefix="fuzz_") as folder,
            mock.patch.object(datasets.config, "HF_DATASETS_CACHE", Path(folder) / "cache"),
        ):
            path = Path(folder) / ("rows.jsonl" if lines else "rows.parquet")
            rows = None  # of lines: the library has ideas of its own of what a line is
            if lines:
                path.write_bytes(b"\n".join(lines))
            else:
                rows = write_parquet(path, table)
            check_source("hf", path, fields, rows)

    # pyarrow's reader of JSON, which the library calls, ends the process at a first line that is null.
    readable = LINES.filter(lambda line: line.strip() not in (b"null", b"NaN"))
    lines = st.just([]) | st.lists(readable, min_size=1, max_size=4)
    explore(check, st.tuples(lines, TABLES, DATA_FIELDS), cases, random_seed, counter)


# ---------------------------------------------------------------------- token streams


def fuzz_triggers(cases: int, random_seed: int, counter: Counter) -> None:
    """Strings of tokens of the built-in tokenizer, with triggers in pieces and what may touch them."""
    for number, triggers in enumerate([("Wait",), SEVERAL]):
        count = cases // 2 + (cases % 2 and number)
        rows = random_strings(TINY_TEXTS, triggers, count=count, units=6, seed=random_seed)
        for ids_BT in np.array_split(rows, max(1, count // 25_000)):
            spans = [standing([TINY_TEXTS[i] for i in ids], triggers) for ids in ids_BT.tolist()]
            expected = [[(trigger.first, trigger.behind) for trigger in row] for row in spans]
            found = found_by_tables(TINY_TEXTS, ids_BT, triggers)
            counter.cases += len(ids_BT)
            for ids, there, told in zip(ids_BT, expected, found, strict=True):
                assert there == told, f"{[TINY_TEXTS[i] for i in ids]}: regex {there}, automaton {told}"


TOKENS = [b"<eos>", b"<end>", b"</think>", b"Wait", b" Wa", b"it", b"ing", b"Hold", b" on", b"", b"\n", b".W"]
TOKENS += [b"ait", b"a ", b" b", b", ", b"a b", b"{"]
RESPONSE = 40  # tokens
ENTRIES = 8192  # of the made-up model
MACHINES = (
    {"delta": 0.55, "strict": False, "max_notes": 4},
    {"delta": 0.2, "strict": True, "max_notes": 6, "max_probes": 2, "max_repetitions": 1},
    {"delta": 1.0, "strict": False, "max_notes": 3, "think_budget": 20, "budget_margin": 5},
)
BATCH = 256


def fuzz_phases(cases: int, random_seed: int, counter: Counter) -> None:
    """Completions of made-up models, in lanes and by the restatement."""
    rng = np.random.default_rng(random_seed)
    for number in range(-(-cases // BATCH)):
        count = min(BATCH, cases - counter.cases)
        check_phases(machine_of(**MACHINES[number % len(MACHINES)]), made_up_model(rng), count)
        counter.cases += count


def machine_of(delta: float, strict: bool, max_notes: int, **limits: int) -> Machine:
    """A greedy machine: what a completion is follows from the made-up model alone."""
    policy = Confidence(question=(17, 13), max_notes=max_notes, delta=delta, strict=strict, early_abort=False)
    usual = {"think_budget": 34, "budget_margin": 4, "max_probes": 4, "max_repetitions": 2}
    fixed = {"temperature": 0.0, "top_p": 1.0, "think_end": 2, "eos": (0, 1), "closing": (10, 2, 10)}
    return Machine(policy=policy, max_response=RESPONSE, **{**usual, **limits}, **fixed)  # type: ignore[arg-type]


def made_up_model(rng: np.random.Generator) -> np.ndarray:
    """`[ENTRIES, V]` logits: ends are rare, triggers and their pieces frequent, and so are equal chunks."""
    logits = rng.normal(size=(ENTRIES, len(TOKENS))) * rng.choice([1.0, 3.0], (ENTRIES, 1))
    liked = {
        b"<eos>": -1.5,
        b"<end>": -1.5,
        b"</think>": -1.5,
        b"Wait": 2.0,
        b" Wa": 0.5,
        b"it": 0.5,
        b", ": 3.0,
    }
    return (logits + np.array([liked.get(text, 0) for text in TOKENS])).astype(np.float32)


def entry(mixed: Any) -> Any:
    """Which row of a made-up model follows a text: of the sum of its tokens' mixes, uint32."""
    return (mixed >> 7) % ENTRIES


def mix(token: Any, position: Any) -> Any:
    """A token at its place as uint32; the sum over a text tells texts apart."""
    value = (token * np.uint32(2654435761)) ^ (position * np.uint32(40503) + np.uint32(0x9E3779B9))
    return (value ^ (value >> 13)) * np.uint32(0x85EBCA6B)


def check_phases(machine: Machine, model: np.ndarray, count: int) -> None:
    """Compares `count` completions, those of prompts that differ in their only token.

    The cache of the made-up model holds a mix a position, so that a lane whose length in the cache is wrong,
    or whose cache holds what a probe left, samples other tokens.
    """
    vocab = build_vocabulary(TOKENS, ("Wait", "Hold on"))
    state = decoded(machine, reach(vocab.triggers), vocab, jnp.asarray(model))
    lane, tokens, forced = (
        jax.tree.map(np.asarray, part) for part in (state.lane, state.tokens, state.forced)
    )
    scores = np.asarray(state.probed.confidences)
    restated = Restated(machine, model)
    for i in range(count):
        out, _, by_machine, reason, confidences = restated((first_token(i),), None, 0, 0)
        length = lane.length[i]
        context = f"prompt {i} of {machine}"
        assert tokens[i, :length].tolist() == out, context
        assert forced[i, :length].tolist() == by_machine, context
        assert REASONS[lane.reason[i]] == reason, context
        assert lane.probes[i] == len(confidences), context
        np.testing.assert_allclose(scores[i, : len(confidences)], confidences, atol=1e-4, err_msg=context)


def first_token(i: int) -> int:
    """The prompt of a case; no token of the vocabulary."""
    return 1000 + i


@partial(jax.jit, static_argnums=(0, 1))
def decoded(machine: Machine, back: int, vocab: Vocabulary, model: jax.Array) -> decode.RolloutState:
    """`BATCH` finished lanes of the decode loop itself, over a made-up model; `back` is `reach(vocab)`."""
    room = 2 + RESPONSE + machine.check_room
    shape = SimpleNamespace(layers=1, kv_heads=1, head_dim=1)
    state = decode.empty_state(shape, machine, BATCH, room, jnp.float32, back)  # type: ignore[arg-type]
    numbers = jnp.arange(BATCH, dtype=jnp.int32)
    lane = decode.fresh_lanes(numbers, numbers * 0, numbers * 0 + 1, first_token(0) + numbers)
    lane = lane._replace(limit=jnp.full(BATCH, RESPONSE, jnp.int32))
    state = state._replace(lane=lane, cache=jnp.zeros((BATCH, room), jnp.uint32))
    with mock.patch.object(qwen, "decode", scripted_decode):
        steps, nobody = jnp.int32(100 * RESPONSE), jnp.zeros(1, jnp.int32)
        return decode.decode_segment(shape, machine, model, vocab, jax.random.key(0), state, steps, nobody)[0]  # type: ignore[arg-type]


def scripted_decode(
    model: Any, cfg: Any, token_B: jax.Array, cache_BS: jax.Array, length_B: jax.Array, attention: Any
) -> tuple[jax.Array, jax.Array]:
    """In place of `qwen.decode`: the logits behind all that is in the cache, the token fed now included."""
    rows, at_S = jnp.arange(len(token_B)), jnp.arange(cache_BS.shape[1])
    fed_B = mix(token_B.astype(jnp.uint32), length_B.astype(jnp.uint32))
    cache_BS = cache_BS.at[rows, length_B].set(fed_B)
    seen_BS = jnp.where(at_S <= length_B[:, None], cache_BS, jnp.uint32(0))
    return model[entry(jnp.sum(seen_BS, axis=1, dtype=jnp.uint32))], cache_BS


class Restated(BruteForce):
    """The restatement over a made-up model, greedily."""

    def __init__(self, machine: Machine, model: np.ndarray) -> None:
        super().__init__({}, None, machine, TOKENS, ("Wait", "Hold on"), longest=0)
        self.model = model
        self.draw = lambda logits, *identity: int(np.argmax(logits))

    def logits(self, tokens: Sequence[int], model: None = None) -> np.ndarray:
        """`[1, V]` logits behind a whole text."""
        places = np.arange(len(tokens), dtype=np.uint32)
        mixed = np.sum(mix(np.asarray(tokens, np.uint32), places), dtype=np.uint32)
        return self.model[entry(mixed)][None]


TARGETS: dict[str, Callable[[int, int, Counter], None]] = {
    "config": fuzz_config,
    "jsonl": fuzz_jsonl,
    "parquet": fuzz_parquet,
    "hf": fuzz_hf,
    "triggers": fuzz_triggers,
    "phases": fuzz_phases,
}


if __name__ == "__main__":
    main()
