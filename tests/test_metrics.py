"""The metrics stream."""

import json

from step_grpo.metrics import MetricsWriter, read_metrics


def steps(path):
    return [line["step"] for line in read_metrics(path)]


def test_lines_behind_the_step_that_is_resumed_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with MetricsWriter(path) as metrics:
        for step in (1, 2, 3):
            metrics.write(step, {"loss": step / 2})
    with MetricsWriter(path, first_step=2) as metrics:
        assert steps(path) == [1, 2]
        metrics.write(3, {"loss": 9.0})
    assert [line["loss"] for line in read_metrics(path)] == [0.5, 1.0, 9.0]


def test_run_from_the_start_begins_a_new_stream(tmp_path):
    path = tmp_path / "folder" / "metrics.jsonl"
    for _ in range(2):
        with MetricsWriter(path) as metrics:
            metrics.write(1, {})
    assert steps(path) == [1]


def test_line_is_on_disk_when_write_returns_and_a_torn_one_is_not_read(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with MetricsWriter(path) as metrics:
        metrics.write(1, {"loss": 1.0})
        assert steps(path) == [1]
    path.write_text(path.read_text() + '{"step": 2, "lo')
    assert steps(path) == [1]
    with MetricsWriter(path, first_step=1) as metrics:
        metrics.write(2, {})
    assert steps(path) == [1, 2]


def test_what_is_not_finite_becomes_null_so_that_each_line_is_json(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with MetricsWriter(path) as metrics:
        metrics.write(1, {"a": float("nan"), "b": float("inf"), "c": 0.1})
    line = json.loads(path.read_text(), parse_constant=lambda name: f"not JSON: {name}")
    assert line == {"step": 1, "a": None, "b": None, "c": 0.1}
    assert read_metrics(tmp_path / "none.jsonl") == []
