"""The notebooks run from top to bottom, and are kept without what they show."""

import os
import re
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient

from step_grpo import cli
from step_grpo.config import validate
from step_grpo.main import main

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))
SEEN = {
    "how_step_grpo_works": ("the right answer:", "c > δ", "update 2:", "<s style="),
    "colab_tpu": ("the tiny model", "export:", "accuracy (95 % interval)", "not pushed"),
}
TEXTS = ("printed", "text/html", "text/markdown", "text/plain")
PICTURES = {"how_step_grpo_works": 7, "colab_tpu": 2}


def load(path: Path) -> nbformat.NotebookNode:
    return nbformat.read(path, as_version=nbformat.NO_CONVERT)


def shorten(notebook: nbformat.NotebookNode, **parameters: object) -> None:
    """Sets parameters in a cell behind the one that is tagged so, as papermill does."""
    tags = [cell.metadata.get("tags", []) for cell in notebook.cells]
    (at,) = [i for i, of_cell in enumerate(tags) if "parameters" in of_cell]
    source = "\n".join(f"{name} = {value!r}" for name, value in parameters.items())
    notebook.cells.insert(at + 1, nbformat.v4.new_code_cell(source))


def execute(notebook: nbformat.NotebookNode, folder: Path) -> None:
    """Runs all cells in a kernel of its own that works in `folder`; the first error is raised."""
    resources = {"metadata": {"path": str(folder)}}
    with tempfile.TemporaryDirectory() as sockets:  # not ports: also where there is no network at all
        kernel = AsyncKernelManager(transport="ipc", ip=f"{sockets}/kernel")
        settings = {"timeout": 600, "startup_timeout": 300, "resources": resources}
        NotebookClient(notebook, km=kernel, **settings).execute()


def shown(notebook: nbformat.NotebookNode, kind: str) -> list[str]:
    """All that the cells show in one form: text as it is printed, or a MIME type."""
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    if kind == "printed":
        return [output.text for output in outputs if output.output_type == "stream"]
    return [output.data[kind] for output in outputs if kind in output.get("data", {})]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_valid_and_kept_without_outputs(path):
    notebook = load(path)
    nbformat.validate(notebook)
    assert nbformat.version_info[0] >= notebook.nbformat == 4
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert code and not any(cell.outputs or cell.execution_count for cell in code)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_names_no_place_of_one_machine(path):
    own = {"/dev/accel*", "/dev/vfio/[0-9]*"}  # where a TPU shows on its machine
    for cell in load(path).cells:
        words = re.split(r"[\s\"'(]+", cell.source)
        places = {word for word in words if re.match(r"(/|~/?)\w", word)}
        assert places <= own


@pytest.mark.skipif(
    "STEP_GRPO_TEST_NOTEBOOKS" not in os.environ, reason="takes a minute or two: STEP_GRPO_TEST_NOTEBOOKS=1"
)
@pytest.mark.parametrize(("name", "folder"), [("how_step_grpo_works", "notebooks"), ("colab_tpu", ".")])
def test_notebook_runs_from_top_to_bottom(name, folder, tmp_path):
    root = Path(__file__).parents[1]
    notebook = load(root / "notebooks" / f"{name}.ipynb")
    own = {"WORKDIR": str(tmp_path)} if name == "colab_tpu" else {}
    shorten(notebook, SHORT=True, **own)
    before = sorted(os.listdir(root / "notebooks"))
    execute(notebook, root / folder)
    text = "\n".join(part for kind in TEXTS for part in shown(notebook, kind))
    for part in SEEN[name]:
        assert part in text, part
    assert len(shown(notebook, "image/png")) == PICTURES[name]
    assert sorted(os.listdir(root / "notebooks")) == before  # nothing is left behind


def test_the_run_on_a_tpu_is_one_that_the_command_line_understands(tmp_path, monkeypatch):
    monkeypatch.chdir(NOTEBOOKS[0].parents[1])
    (cell,) = [cell for cell in load(NOTEBOOKS[0]).cells if "subprocess.Popen(" in cell.source]
    started: list[list[str]] = []
    fake = SimpleNamespace(Popen=lambda command, **_: started.append(command), STDOUT=None)
    named = {"on_tpu": True, "SHORT": False, "STEPS": 7, "WORKDIR": str(tmp_path)}
    exec(cell.source, {**named, "subprocess": fake, "sys": sys, "Path": Path})
    (command,) = started
    assert command[1:3] == ["-m", "step_grpo.main"]
    arguments = cli.parse(main, command[2:])
    config = arguments["config"]
    validate(config)
    assert (config.model.checkpoint, config.steps) == ("Qwen/Qwen3-0.6B", 7)
    assert config.lora.rank > 0 and config.data.name == "openai/gsm8k" and arguments["workdir"] == tmp_path
