import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from step_grpo.config import data_config
from step_grpo.data.sources import Questions, epoch_order, load_questions, take
from step_grpo.errors import UserError

ROWS = [{"problem": f" What is {i} + 1? ∑ ", "answer": str(i + 1)} for i in range(5)]


@pytest.fixture(autouse=True)
def private_caches(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf_cache")


def jsonl(folder: Path, rows: list, name: str = "rows.jsonl") -> str:
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def load(where: str = "config.data", **fields) -> Questions:
    return load_questions(data_config(**fields), where=where)


def refusal(**fields) -> str:
    with pytest.raises(UserError) as caught:
        load(**fields)
    message = str(caught.value)
    assert "\n" not in message
    return message


def pairs(questions: Questions) -> list[tuple[str, str]]:
    return [(q.question, q.answer) for q in questions]


EXPECTED = [(f"What is {i} + 1? ∑", str(i + 1)) for i in range(5)]


# ---------------------------------------------------------------- every source gives the same questions


def test_jsonl_rows_become_trimmed_questions(tmp_path):
    questions = load(source="jsonl", name=jsonl(tmp_path, ROWS))
    assert pairs(questions) == EXPECTED
    assert [q.id for q in questions] == [f"rows.jsonl:{i}" for i in range(1, 6)]
    assert questions.dropped == 0


def test_parquet_file_and_folder_give_the_same_questions(tmp_path):
    folder = tmp_path / "parts"
    folder.mkdir()
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "rows.parquet")
    pq.write_table(pa.Table.from_pylist(ROWS[:3]), folder / "0.parquet")
    pq.write_table(pa.Table.from_pylist(ROWS[3:]), folder / "1.parquet")
    assert pairs(load(source="parquet", name=str(tmp_path / "rows.parquet"))) == EXPECTED
    assert pairs(load(source="parquet", name=str(folder))) == EXPECTED


def test_every_local_form_of_a_hugging_face_dataset_is_read(tmp_path):
    dataset = datasets.Dataset.from_list(ROWS)
    dataset.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": dataset}).save_to_disk(str(tmp_path / "splits"))
    folder = tmp_path / "folder"
    folder.mkdir()
    jsonl(folder, ROWS, "train.jsonl")
    dataset.to_parquet(str(tmp_path / "rows.parquet"))
    for name in ("one", "splits", "folder", "rows.parquet", "folder/train.jsonl"):
        assert pairs(load(source="hf", name=str(tmp_path / name))) == EXPECTED, name


def test_hugging_face_split_slices_apply_to_files(tmp_path):
    assert pairs(load(source="hf", name=jsonl(tmp_path, ROWS), split="train[1:3]")) == EXPECTED[1:3]


def write_tfds(data_dir: Path) -> Path:
    """A TFDS dataset on disk, written with TFDS's own features and metadata and without TensorFlow."""
    import tensorflow_datasets as tfds
    from array_record.python import array_record_module

    folder = data_dir / "toy_math" / "1.0.0"
    folder.mkdir(parents=True)
    features = tfds.features.FeaturesDict({"problem": tfds.features.Text(), "answer": np.int64})
    path = folder / "toy_math-train.array_record-00000-of-00001"
    writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
    for row in ROWS:
        writer.write(features.serialize_example({"problem": row["problem"], "answer": int(row["answer"])}))
    writer.close()
    template = tfds.core.ShardedFileTemplate(
        template="{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
        data_dir=folder,
        dataset_name="toy_math",
        split="train",
        filetype_suffix="array_record",
    )
    split = tfds.core.SplitInfo(
        name="train", shard_lengths=[len(ROWS)], num_bytes=0, filename_template=template
    )
    tfds.folder_dataset.write_metadata(
        data_dir=str(folder), features=features, split_infos=[split], check_data=False
    )
    return folder


def test_tfds_is_read_by_folder_and_by_name_without_tensorflow(tmp_path):
    import tensorflow_datasets as tfds

    folder = write_tfds(tmp_path)
    from_folder = load(source="tfds", name=str(folder))
    assert pairs(from_folder) == EXPECTED
    assert from_folder[0].id == "toy_math/1.0.0/train:0"
    tfds.core.add_data_dir(str(tmp_path))
    assert load(source="tfds", name="toy_math").items == from_folder.items
    message = refusal(source="tfds", name=str(folder), split="trian")
    assert message.startswith("config.data.split") and "'train'" in message
    assert "tensorflow" not in sys.modules


def test_tfds_name_typo_suggests_the_nearest_dataset():
    assert "did you mean 'math_qa'?" in refusal(source="tfds", name="math_qaa")


def test_arithmetic_gets_split_and_count(monkeypatch):
    calls = []

    def problems(split: str, count: int, seed: int) -> list[tuple[str, str]]:
        calls.append((split, count, seed))
        return [(row["problem"], row["answer"]) for row in ROWS]

    monkeypatch.setattr("step_grpo.data.arithmetic.problems", problems)
    assert pairs(load(source="arithmetic", split="test", count=5)) == EXPECTED
    assert calls == [("test", 5, 0)]


def test_split_that_arithmetic_does_not_have_is_refused_at_once():
    message = refusal(source="arithmetic", split="trian")
    assert message == "config.data.split is 'trian'; arithmetic has test, validation, train"


@pytest.mark.parametrize(
    ("name", "count"), [("gsm8k", 1319), ("math", 500), ("aime", 30), ("olympiadbench", 675)]
)
def test_every_row_of_the_real_benchmarks_is_usable(name, count):
    folder = os.environ.get("STEP_GRPO_TEST_DATA")
    if not folder:
        pytest.skip("STEP_GRPO_TEST_DATA is not set")
    path = Path(folder) / "benchmarks" / f"{name}.jsonl"
    questions = load(source="jsonl", name=str(path))
    assert len(questions) == count
    raw = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    assert [q.question for q in questions] == [row["problem"].strip() for row in raw]


# ---------------------------------------------------------------- columns and answers


def test_dotted_paths_reach_into_objects_and_lists(tmp_path):
    row = {"prompt": [{"role": "user", "content": "Q"}], "reward_model": {"ground_truth": "7"}}
    columns = {"prompt_column": "prompt.0.content", "answer_column": "reward_model.ground_truth"}
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "rows.parquet")
    assert pairs(load(source="jsonl", name=jsonl(tmp_path, [row]), **columns)) == [("Q", "7")]
    assert pairs(load(source="parquet", name=str(tmp_path / "rows.parquet"), **columns)) == [("Q", "7")]
    assert pairs(load(source="hf", name=jsonl(tmp_path, [row]), **columns)) == [("Q", "7")]


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        (18, "18"),
        (18.0, "18"),
        (0.5, "0.5"),
        (["18"], "18"),
        ([18], "18"),
        (" x ", "x"),
        (10**30, "1" + "0" * 30),
    ],
)
def test_answers_of_other_types_become_text(tmp_path, answer, text):
    name = jsonl(tmp_path, [{"problem": "Q", "answer": answer}])
    assert pairs(load(source="jsonl", name=name)) == [("Q", text)]


def test_answer_pattern_takes_its_first_group(tmp_path):
    rows = [{"problem": "Q", "answer": "1 + 1\n#### 70,000\n"}, {"problem": "Q", "answer": "#### -3"}]
    questions = load(source="jsonl", name=jsonl(tmp_path, rows), answer_pattern="#### (.*)")
    assert [q.answer for q in questions] == ["70,000", "-3"]


def test_answer_pattern_takes_linear_time(tmp_path):
    rows = [{"problem": "Q", "answer": "a" * 30_000 + "b"}, {"problem": "Q", "answer": "a"}]
    start = time.process_time()
    questions = load(source="jsonl", name=jsonl(tmp_path, rows), answer_pattern="^(a+)+$", bad_rows="drop")
    assert time.process_time() - start < 5  # a backtracking engine does not come back
    assert len(questions) == questions.dropped == 1


@pytest.mark.parametrize("pattern", ["(", "no group", r"(x)\1", "(?=x)(y)"])
def test_wrong_answer_pattern_names_its_field(tmp_path, pattern):
    message = refusal(source="jsonl", name=jsonl(tmp_path, ROWS), answer_pattern=pattern)
    assert message.startswith("config.data.answer_pattern") and pattern in message.replace("\\\\", "\\")


# ---------------------------------------------------------------- bad rows

BAD_ROWS = {
    "missing": ({"problem": "Q"}, "no column 'answer'"),
    "null": ({"problem": "Q", "answer": None}, "is null"),
    "empty": ({"problem": "Q", "answer": "  "}, "is empty"),
    "boolean": ({"problem": "Q", "answer": True}, "is a value of type bool"),
    "object": ({"problem": "Q", "answer": {"a": 1}}, "is a value of type dict"),
    "two answers": ({"problem": "Q", "answer": ["1", "2"]}, "list of 2"),
    "no answers": ({"problem": "Q", "answer": []}, "list of 0"),
    "not a number": ({"problem": "Q", "answer": float("nan")}, "the number nan"),
    "question a number": ({"problem": 3, "answer": "1"}, "is a value of type int"),
    "question null": ({"problem": None, "answer": "1"}, "is null"),
    "question empty": ({"problem": "\n", "answer": "1"}, "is empty"),
    "half a surrogate pair": ({"problem": "\ud800", "answer": "1"}, "surrogate"),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_bad_row_is_an_error_that_names_file_line_and_column(tmp_path, case):
    row, problem = BAD_ROWS[case]
    name = jsonl(tmp_path, [ROWS[0], row, ROWS[1]])
    message = refusal(source="jsonl", name=name)
    column = "problem" if case.startswith(("question", "half")) else "answer"
    field = {"problem": "prompt_column", "answer": "answer_column"}[column]
    for part in (f"config.data.{field}", name, "line 2", repr(column), problem, "bad_rows=drop"):
        assert part in message


@pytest.mark.parametrize("case", BAD_ROWS)
def test_bad_row_is_dropped_and_counted_on_request(tmp_path, case):
    rows = [ROWS[0], BAD_ROWS[case][0], ROWS[1]]
    questions = load(source="jsonl", name=jsonl(tmp_path, rows), bad_rows="drop")
    assert pairs(questions) == EXPECTED[:2]
    assert questions.dropped == 1
    assert [q.id for q in questions] == ["rows.jsonl:1", "rows.jsonl:3"]  # ids outlive the dropping


def test_missing_column_lists_those_present_and_the_nearest(tmp_path):
    message = refusal(source="jsonl", name=jsonl(tmp_path, ROWS), answer_column="anser")
    assert "did you mean 'answer'?" in message and "answer, problem" in message
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "rows.parquet")
    message = refusal(source="parquet", name=str(tmp_path / "rows.parquet"), answer_column="anser")
    assert "row 0" in message and "answer, problem" in message


def test_messages_name_the_config_that_was_wrong(tmp_path):
    message = refusal(where="config.eval.data", source="jsonl", name=str(tmp_path / "none.jsonl"))
    assert message.startswith("config.eval.data.name")


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b'{"problem": "Q", "answer": "1"}\n{"problem"\n', "line 2: not JSON"),
        (b'{"problem": "Q", "answer": "1"}\n["Q", "1"]\n', "line 2: JSON but a list"),
        (b'{"problem": "\xff", "answer": "1"}\n', "line 1: not UTF-8"),
        (b"[" * 100_000 + b"\n", "line 1: not JSON"),
        (b'{"problem": "Q", "answer": ' + b"9" * 5000 + b"}\n", "line 1: not JSON"),
        (b"", "no question"),
        (b"\n\n", "no question"),
        (b"PK\x03\x04\x00\x00\xfe", "line 1: not UTF-8"),
    ],
)
def test_unreadable_jsonl_is_one_line(tmp_path, content, problem):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    message = refusal(source="jsonl", name=str(path))
    assert message.startswith("config.data.name") and problem in message


def test_lines_that_cannot_be_read_are_dropped_and_counted_where_the_config_says_so(tmp_path):
    path = tmp_path / "rows.jsonl"
    good = json.dumps(ROWS[0]).encode()
    path.write_bytes(b"\n".join([b'{"problem"', good, b'{"problem": "\xff"}', b"[1]", b"[" * 100_000]))
    questions = load(source="jsonl", name=str(path), bad_rows="drop")
    assert [q.id for q in questions] == ["rows.jsonl:2"] and questions.dropped == 4
    path.write_bytes(b"\xff\n")
    assert "all 1 rows are bad" in refusal(source="jsonl", name=str(path), bad_rows="drop")


def test_parquet_rows_that_are_no_python_values_are_named_or_dropped(tmp_path):
    path = tmp_path / "rows.parquet"
    no_text = pa.array([b"Q", b"\xff\xfe", b"R"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"problem": no_text, "answer": ["1", "2", "3"]}), path)
    message = refusal(source="parquet", name=str(path))
    assert message.startswith("config.data.name") and "row 1: cannot be read" in message
    questions = load(source="parquet", name=str(path), bad_rows="drop")
    assert pairs(questions) == [("Q", "1"), ("R", "3")] and questions.dropped == 1


BAD_PROBLEMS = {
    "codec can't decode": pa.array([b"Q", b"\xff\xfe", b"R"], pa.binary()).view(pa.string()),
    "out of range": pa.StructArray.from_arrays(
        [pa.array(["Q", "P", "R"]), pa.array([None, 2**62, None], pa.timestamp("us"))], ["text", "when"]
    ),
}


@pytest.mark.parametrize(
    ("why", "prompt"), [("codec can't decode", "problem"), ("out of range", "problem.text")]
)
def test_row_of_hugging_face_that_is_no_python_value_is_named_or_dropped(tmp_path, why, prompt):
    pq.write_table(
        pa.table({"problem": BAD_PROBLEMS[why], "answer": ["1", "2", "3"]}), tmp_path / "rows.parquet"
    )
    fields = {"source": "hf", "name": str(tmp_path / "rows.parquet"), "prompt_column": prompt}
    message = refusal(**fields)
    assert message.startswith("config.data.name") and "split train, row 1: cannot be read" in message
    assert why in message and "bad_rows=drop" in message
    questions = load(bad_rows="drop", **fields)
    assert pairs(questions) == [("Q", "1"), ("R", "3")] and questions.dropped == 1
    assert [q.id for q in questions] == ["rows.parquet/train:0", "rows.parquet/train:2"]


def test_line_of_hugging_face_that_is_not_utf8_is_named_or_dropped(tmp_path):
    path = tmp_path / "rows.jsonl"
    good = [json.dumps(row).encode() for row in ROWS[:2]]
    path.write_bytes(b"\n".join([good[0], b'{"problem": "\xff", "answer": "1"}', good[1]]))
    assert "split train, row 1: cannot be read" in refusal(source="hf", name=str(path))
    questions = load(source="hf", name=str(path), bad_rows="drop")
    assert pairs(questions) == EXPECTED[:2] and questions.dropped == 1


def test_objects_of_hugging_face_that_are_not_all_alike_are_read(tmp_path):
    rows = [{"problem": {"a": "Q"}, "answer": "1"}, {"problem": [{"b": "R"}], "answer": "2"}]
    name = jsonl(tmp_path, rows)
    first = load(source="hf", name=name, prompt_column="problem.a", bad_rows="drop")
    second = load(source="hf", name=name, prompt_column="problem.0.b", bad_rows="drop")
    assert pairs(first) + pairs(second) == [("Q", "1"), ("R", "2")]


def test_row_of_tfds_that_cannot_be_decoded_is_named_or_dropped(tmp_path, monkeypatch):
    import tensorflow_datasets as tfds

    decode = tfds.features.FeaturesDict.deserialize_example_np

    def second_fails(self, example, **others):
        row = decode(self, example, **others)
        if row["problem"].startswith(b" What is 1 "):
            raise TypeError("no such wire type")
        return row

    folder = write_tfds(tmp_path)
    monkeypatch.setattr(tfds.features.FeaturesDict, "deserialize_example_np", second_fails)
    message = refusal(source="tfds", name=str(folder))
    assert "split train, row 1: cannot be read (no such wire type); mend it" in message
    questions = load(source="tfds", name=str(folder), bad_rows="drop")
    assert pairs(questions) == [EXPECTED[0], *EXPECTED[2:]] and questions.dropped == 1


@pytest.fixture
def opened(tmp_path) -> Iterator[list[str]]:
    """When `secret.txt` in the test's folder was opened; the hook stays, and is deaf behind it."""
    secret, found, listening = str(tmp_path / "secret.txt"), [], [True]
    Path(secret).write_text("not for a prompt")

    def hear(event: str, args: tuple) -> None:
        if event == "open" and listening and str(args[0]) == secret:
            found.append(secret)

    sys.addaudithook(hear)
    yield found
    listening.clear()


def test_path_in_a_row_is_never_opened(tmp_path, opened):
    """`datasets` decodes images, so opens their paths; the file itself says that a column has images."""
    image = {"bytes": None, "path": str(tmp_path / "secret.txt")}

    def fields(kind: object, value: object, column: str) -> dict[str, str]:
        kinds = datasets.Features({"problem": kind, "answer": datasets.Value("string")})
        rows = [{"problem": value, "answer": "1"}]
        pq.write_table(pa.Table.from_pylist(rows, kinds.arrow_schema), tmp_path / f"{column}.parquet")
        return {"source": "hf", "name": str(tmp_path / f"{column}.parquet"), "prompt_column": column}

    picture = {"text": datasets.Value("string"), "image": datasets.Image()}
    beside = load(**fields(picture, {"text": "Q", "image": image}, "problem.text"))
    assert pairs(beside) == [("Q", "1")]
    whole = fields(datasets.Image(), image, "problem")
    for bad_rows in ("error", "drop"):
        message = refusal(bad_rows=bad_rows, **whole)
        assert message.startswith("config.data.prompt_column") and "'problem' is of the type Image" in message
    assert not opened
    Path(image["path"]).read_text()
    assert opened  # the hook hears


def test_damaged_parquet_file_with_a_column_name_that_is_no_text_is_named(tmp_path):
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"problem": ["Q"], "answer": ["1"]}), path, store_schema=False)
    path.write_bytes(path.read_bytes().replace(b"problem", b"prob\xffem"))
    assert "is not readable as parquet" in refusal(source="parquet", name=str(path))


def test_byte_order_mark_blank_lines_and_carriage_returns_are_read(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"problem": "Q", "answer": "1"}\r\n\r\n{"problem": "R", "answer": "2"}')
    questions = load(source="jsonl", name=str(path))
    assert [(q.question, q.id) for q in questions] == [("Q", "rows.jsonl:1"), ("R", "rows.jsonl:3")]


def test_all_rows_dropped_is_an_error_that_says_why(tmp_path):
    message = refusal(source="jsonl", name=jsonl(tmp_path, ROWS), answer_column="x", bad_rows="drop")
    assert "all 5 rows are bad" in message and "no column 'x'" in message


@pytest.mark.parametrize(
    ("fields", "start"),
    [
        ({"source": "csv"}, "config.data.source is 'csv'"),
        ({"source": "jsonl"}, "config.data.name is empty"),
        ({"source": "jsonl", "name": "."}, "config.data.name: . is a folder"),
        ({"source": "jsonl", "name": "none.jsonl"}, "config.data.name: no such file"),
        ({"source": "parquet", "name": "none.parquet"}, "config.data.name: no such file"),
        ({"source": "parquet", "name": __file__}, f"config.data.name: {__file__} is not readable as parquet"),
        ({"source": "hf", "name": "/none/at/all"}, "config.data.name: no such file or folder"),
        ({"source": "hf", "name": __file__}, "config.data.name: cannot load"),
        ({"source": "tfds", "name": "/none"}, "config.data.name: no such file or folder"),
        ({"source": "jsonl", "name": "x", "bad_rows": "ignore"}, "config.data.bad_rows is 'ignore'"),
        ({"source": "arithmetic", "count": 0}, "config.data.count is 0"),
    ],
)
def test_wrong_config_names_its_field(fields, start):
    assert refusal(**fields).startswith(start)


def test_unknown_split_and_broken_file_of_a_local_dataset_name_their_field(tmp_path):
    datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)}).save_to_disk(str(tmp_path / "splits"))
    message = refusal(source="hf", name=str(tmp_path / "splits"), split="test")
    assert message.startswith("config.data.split") and "'train'" in message
    (tmp_path / "bad.jsonl").write_text("{not json\n")
    assert refusal(source="hf", name=str(tmp_path / "bad.jsonl")).startswith("config.data.name")


@pytest.mark.parametrize("name", ["step-grpo-tests/no-such-dataset", "no such name!"])
def test_unknown_hub_name_fails_without_retries_where_there_is_no_network(name, monkeypatch):
    from huggingface_hub import constants

    from step_grpo import hub

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nothing listens there
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail(f"waits {seconds} s for another try"))
    hub.offline.cache_clear()
    message = refusal(source="hf", name=name)
    hub.offline.cache_clear()
    assert message.startswith("config.data.name") and name in message and "cannot be reached" in message


# ---------------------------------------------------------------- the order


@settings(deadline=None)
@given(size=st.integers(1, 40), n=st.integers(1, 25), seed=st.integers(0, 2**40), epochs=st.integers(1, 4))
def test_every_epoch_holds_each_question_exactly_once(size, n, seed, epochs):
    cursor, seen = 0, []
    while cursor < size * epochs:
        batch, after = take(size, cursor, n, seed)
        assert len(batch) == n and after == cursor + n
        seen += batch
        cursor = after
    for epoch in range(epochs):
        assert sorted(seen[epoch * size : (epoch + 1) * size]) == list(range(size))


@settings(deadline=None)
@given(size=st.integers(1, 30), cut=st.integers(0, 70), seed=st.integers(0, 1000))
def test_resuming_at_a_cursor_continues_the_same_order(size, cut, seed):
    whole, _ = take(size, 0, 80, seed)
    first, cursor = take(size, 0, cut, seed)
    second, _ = take(size, cursor, 80 - cut, seed)
    assert first + second == whole


def test_order_depends_on_seed_and_epoch():
    orders = {tuple(epoch_order(50, seed, epoch)) for seed in range(4) for epoch in range(4)}
    assert len(orders) == 16


def test_order_is_fixed_for_good():
    # A change here would make a resumed run repeat and skip questions.
    assert epoch_order(10, 0, 0).tolist() == [0, 8, 9, 3, 7, 5, 1, 2, 6, 4]
    assert epoch_order(10, 7, 3).tolist() == [7, 1, 9, 6, 0, 4, 2, 8, 3, 5]
