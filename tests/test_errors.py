"""Users' mistakes at the real entry points: one line that names the field and the fix, exit code 2."""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from subprocess import CompletedProcess

import pytest
from short_run import ROOT, command

from step_grpo.model.weights import resolve_checkpoint

TINY = f"--config={ROOT / 'configs' / 'tiny.py'}"
JSONL = (
    "--config.data.source=jsonl",
    "--config.data.prompt_column=problem",
    "--config.data.answer_column=answer",
)

# What is typed (`@` stands for the folder of the tests' files), the field at fault, and what would mend it.
MISTAKES = {
    "missing checkpoint": (
        ("main", TINY, "--config.model.checkpoint=/nowhere"),
        "config.model.checkpoint: '/nowhere'",
        "give a folder, a Hub name org/name, or builtin:tiny",
    ),
    "config typo": (
        ("main", TINY, "--config.rollot.delta=1"),
        "--config.rollot.delta: there is no such field",
        "did you mean --config.rollout.delta?",
    ),
    "row without an answer": (
        ("main", TINY, *JSONL, "--config.data.name=@/rows.jsonl"),
        "config.data.answer_column: ",
        "rows.jsonl, line 2: no column 'answer'",
    ),
    "wrong dataset name": (
        ("main", TINY, "--config.data.source=hf", "--config.data.name=no/such"),
        "config.data.name: 'no/such'",
        "check the name",
    ),
    "unknown flag": (
        ("main", TINY, "--workdr=@/x"),
        "unknown flag --workdr",
        "did you mean --workdir?",
    ),
    "damaged weights": (
        ("main", TINY, "--config.model.checkpoint=@/damaged"),
        "damaged/model.safetensors: damaged",
        "copy or download it again",
    ),
    "wrong split": (
        ("main", TINY, "--config.data.split=trian"),
        "config.data.split is 'trian'",
        "train",
    ),
    "evaluation of nothing": (
        ("evaluate", TINY, "--checkpoint=/nowhere"),
        "--checkpoint: '/nowhere'",
        "give a folder, a Hub name org/name, or builtin:tiny",
    ),
    "export of nothing": (
        ("export", "--checkpoint=/nowhere", "--out=@/run"),
        "--checkpoint: '/nowhere'",
        "give a folder, a Hub name org/name, or builtin:tiny",
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mistakes")
    rows = [{"problem": "1+1", "answer": "2"}, {"problem": "1+2"}]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shutil.copytree(resolve_checkpoint("builtin:tiny"), folder / "damaged")
    weights = folder / "damaged" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100_000])
    return folder


@pytest.fixture(scope="module")
def outcomes(folder) -> dict[str, CompletedProcess]:
    """All of them, two processes at a time."""

    def make(name: str) -> CompletedProcess:
        program, *arguments = (part.replace("@", str(folder)) for part in MISTAKES[name][0])
        where = [] if program == "export" else [f"--workdir={folder / 'run'}"]
        return command(program, *arguments, *where)

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(MISTAKES, pool.map(make, MISTAKES), strict=True))


@pytest.mark.parametrize("name", MISTAKES)
def test_mistake_is_one_line_that_names_field_and_fix(outcomes, name):
    done, (_, field, fix) = outcomes[name], MISTAKES[name]
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("step_grpo: error: ") and done.stderr.count("\n") == 1
    assert field in done.stderr and fix in done.stderr
    assert "Traceback" not in done.stderr + done.stdout


def test_mistakes_leave_no_folder_behind(outcomes, folder):
    assert outcomes and not (folder / "run").exists()
