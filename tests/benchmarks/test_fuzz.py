"""The targets of `python -m benchmarks.fuzz`, a few hundred cases each."""

import json

import numpy as np
import pytest

from benchmarks import fuzz
from benchmarks.fuzz import Counter

CASES = {"config": 200, "jsonl": 200, "parquet": 60, "hf": 20, "triggers": 400, "phases": 40}


@pytest.mark.parametrize("name", fuzz.TARGETS)
def test_target_finds_nothing(name):
    counter = Counter()
    fuzz.TARGETS[name](CASES[name], 1, counter)
    assert counter.cases == CASES[name]


def test_failing_target_is_counted_and_told(monkeypatch, capsys):
    monkeypatch.setattr(fuzz, "validate", lambda config: 1 // 0)
    told = fuzz.run_target("config", 5, 0)
    assert told["failures"] == 1
    assert "ZeroDivisionError" in capsys.readouterr().err


def test_last_line_counts_every_target(monkeypatch, capsys):
    ran = {"cases": 3, "failures": 0, "seconds": 0.0}
    monkeypatch.setattr(fuzz, "run_target", lambda *arguments: ran)
    result = fuzz.main(["--cases=100"])
    assert result == json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["cases"] == 3 * len(fuzz.TARGETS) and set(fuzz.SHARES) == set(fuzz.TARGETS)
    assert sum(fuzz.SHARES.values()) == pytest.approx(1)


def test_completions_of_made_up_models_reach_every_phase():
    """Else the comparison would compare less than it says."""
    rng, reasons, probes = np.random.default_rng(0), set(), 0
    for limits in fuzz.MACHINES:
        restated = fuzz.Restated(fuzz.machine_of(**limits), fuzz.made_up_model(rng))
        for i in range(60):
            *_, reason, scores = restated((fuzz.first_token(i),), None, 0, 0)
            reasons.add(reason)
            probes += len(scores)
    assert reasons >= {"natural", "early_exit", "budget", "rep", "eos"} and probes > 100
