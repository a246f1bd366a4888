"""The README promises commands; the gate runs them."""

import pytest
from gate import Line, is_run, line_of, lines
from pages import ROOT, blocks

BLOCKS = [block.text for block in blocks(ROOT / "README.md", "bash")]
OTHERS = ("python -m venv", "source")  # the gate has an environment of its own
PROMISED = [line for text in BLOCKS for line in lines(text) if line.program not in OTHERS]


@pytest.mark.parametrize("line", PROMISED, ids=lambda line: " ".join([line.program, *dict(line.named)]))
def test_command_of_the_readme_is_run_by_the_gate(line):
    assert is_run(line), line


def test_readme_has_the_two_commands():
    assert any("pip install -e . && python -m step_grpo.main --config=configs/tiny.py" in b for b in BLOCKS)
    assert any("pip install -e '.[test]' && pytest" in b for b in BLOCKS)


def line(text: str) -> Line:
    """The one line of a text."""
    (found,) = lines(text)
    return found


def test_line_of_the_gate_covers_a_command_only_with_its_program_its_flags_and_their_values():
    promised = line("python -m step_grpo.main --config=configs/a.py --workdir=x --config.seed=1")
    run = "offline python -m step_grpo.main --config=configs/a.py:runlocal --workdir=y --config.seed={} --b=c"
    assert line(run.format(1)).covers(promised)
    assert not line(run.format(2)).covers(promised)
    assert not line(run.format(1).replace("a.py", "b.py")).covers(promised)
    assert not line(run.format(1).replace("step_grpo.main", "step_grpo.sft")).covers(promised)
    assert not line("python -m step_grpo.main --config=configs/a.py --config.seed=1").covers(promised)
    alone = line("python -m step_grpo.main --config=configs/a.py")
    assert not alone.covers(line("STEP_GRPO_PROCESS=1 python -m step_grpo.main --config=configs/a.py"))
    assert line_of(["python", "tests/fake_hub.py", "pip", "install", "x"]).program == "pip"
