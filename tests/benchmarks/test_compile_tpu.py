"""The check of programs for TPU: passes with the kernels, and notices what they are there to prevent."""

import dataclasses
import json
from pathlib import Path

import pytest

from benchmarks.compile_tpu import Task, compile_task, main, missing_libtpu

ROOT = Path(__file__).parents[2]
TASK = Task("v5e:2x2", "qwen3_0p6b", "segment", 16, 2048, prompt=128, row_length=640, layers=2)


@pytest.fixture(autouse=True)
def where_the_module_is_found(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


def needs_libtpu():
    reason = missing_libtpu()
    if reason:
        pytest.skip(reason)


def test_without_libtpu_the_command_says_so_and_ends_well(monkeypatch, capsys):
    monkeypatch.setattr("benchmarks.compile_tpu.importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr("sys.argv", ["compile_tpu"])
    main()
    assert "pip install" in json.loads(capsys.readouterr().out.splitlines()[-1])["skipped"]


@pytest.mark.parametrize(
    ("program", "cache_dtype"),
    [("segment", ""), ("segment", "int8"), ("insert", "int8"), ("prefill", ""), ("attention", "")],
)
def test_program_has_kernels_and_no_copy_of_the_cache(program, cache_dtype):
    needs_libtpu()
    result = compile_task(dataclasses.replace(TASK, program=program, cache_dtype=cache_dtype))
    expected = {"segment": 4, "insert": 0, "prefill": 1, "attention": 3}[
        program
    ]  # a write and a read a layer
    assert result["ok"] and result["kernels"] == expected, result


def test_check_notices_that_xla_copies_the_cache():
    needs_libtpu()
    result = compile_task(dataclasses.replace(TASK, attention="xla", capacity=8192))
    assert not result["ok"] and result["kernels"] == 0, result
    assert result["temporaries_mib"] > 0.9 * result["cache_mib"], result
