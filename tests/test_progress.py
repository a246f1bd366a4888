"""The live view."""

import io

import pytest
from rich.console import Console

from step_grpo import report
from step_grpo.report import ProgressBar, live_figures
from step_grpo.rollout.phases import REASONS

FIGURES = {
    "accuracy": 0.75,
    "tokens": 100.25,
    "steps": 3.0,
    "reward": 0.5,
    "kl": 0.001,
    "generated_per_second": 5300.0,
    **{f"exit_{reason}": 0.0 for reason in REASONS},
    "exit_natural": 0.25,
    "exit_early_exit": 0.75,
}
SHOWN = (
    "tokens/s 5300.0",
    "accuracy 0.75",
    "tokens 100.2",
    "steps 3",
    "exits ",
    "early_exit 75%",
    "natural 25%",
)


@pytest.fixture
def clock(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(report.time, "monotonic", lambda: now[0])
    return now


def test_plain_lines_have_stage_time_left_and_figures(clock, capsys):
    bar = ProgressBar(Console(file=io.StringIO()), "training", 10, done=4)
    bar.stage("rollout", 0, 384)
    clock[0] += 60
    bar.update(6, **live_figures(FIGURES))  # two steps in a minute: two more minutes
    clock[0] += 11
    bar.stage("rollout", 128, 384)
    first, second, third = capsys.readouterr().out.splitlines()
    assert first == "training 4/10  rollout 0/384"
    assert second.startswith("training 6/10  left 0:02:00  tokens/s") and "budget" not in second
    assert all(part in second for part in SHOWN)
    assert third.startswith("training 6/10  left 0:02:22  rollout 128/384  tokens/s")


def test_plain_lines_are_few_but_the_last_is_there(clock, capsys):
    bar = ProgressBar(Console(file=io.StringIO()), "training", 20)
    for step in range(1, 21):
        clock[0] += 1
        bar.update(step)
    assert [line.split()[1] for line in capsys.readouterr().out.splitlines()] == ["1/20", "12/20", "20/20"]


def test_terminal_shows_bar_stage_and_figures_in_its_width(capsys):
    file = io.StringIO()
    bar = ProgressBar(Console(file=file, force_terminal=True, width=100), "training", 10, done=4)
    with bar.progress:
        bar.update(6, **live_figures(FIGURES))
        bar.stage("rollout", 128, 384)
    text = file.getvalue()
    assert "rollout 128/384" in text and "6/10" in text and "left" in text
    assert all(part in text for part in SHOWN)
    assert capsys.readouterr().out == ""
