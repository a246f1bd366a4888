"""Each benchmark, tiny: what its last line says, never how fast it was."""

import json

import numpy as np
import pytest

from benchmarks import lanes, probe, rollout, timing


def last_line(capsys):
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_lanes_tells_the_share_of_live_lane_steps(capsys):
    result = lanes.main(["--lanes=16", "--per_lane=8", "--median=6", "--longest=40"])
    assert result == last_line(capsys)
    assert 0 < result["live_share_static"] < 1
    assert 0 < result["live_share"] <= 1


def test_static_share_is_that_of_a_schedule_written_out():
    lengths = np.array([3, 1, 2, 5, 4])
    steps = [[3, 1], [2, 5], [4, 0]]
    live = sum(sum(t < n for n in batch) for batch in steps for t in range(max(batch)))
    spent = sum(2 for batch in steps for _ in range(max(batch)))
    assert lanes.static_share(lengths, 2) == live / spent


def test_drawn_lengths_are_log_normal_with_sigma_one():
    drawn = np.log(lanes.draw_lengths(20_000, 1000, 10**9, seed=0))
    assert np.median(drawn) == pytest.approx(np.log(1000), abs=0.03)
    assert np.std(drawn) == pytest.approx(1, abs=0.02)


def test_probe_tells_what_the_abort_saves_and_that_nothing_else_changes(capsys):
    result = probe.main(
        ["--probes=24", "--samples=2", "--lanes=16", "--tokens=8", "--longest=80", "--repeats=1"]
    )
    assert result == last_line(capsys)
    assert result["exits_equal"] is True
    assert result["probes"] >= 24 and 0 < result["declined"] < result["probes"]
    assert 0 <= result["probe_tokens_saved"] <= result["answer_tokens_saved"] <= 1
    assert isinstance(result["machine_overhead"], float)


def test_rollout_tells_every_ratio(capsys):
    sizes = "--prompts=4 --samples=2 --repeats=1 --lanes=8 --tokens=8 --longest=64 --batches 8"
    result = rollout.main(sizes.split())
    assert result == last_line(capsys)
    for name in ("plain_vs_generate", "natural_vs_generate", "truncated_vs_restart"):
        assert result[name]["low"] <= result[name]["median"] <= result[name]["high"]
        assert (name in result["floor"]) == (result[name]["median"] < rollout.GOALS[name])
    assert "vs_tunix" in result and result["settings"]["prompts"] == 4


def test_ratios_are_taken_pair_by_pair():
    """A machine that becomes twice as slow in between changes no ratio."""
    ratio = timing.paired(np.array([30.0, 15.0, 16.0]), np.array([10.0, 5.0, 4.0]))
    assert (ratio.median, ratio.low, ratio.high, ratio.pairs) == (3, 3, 4, 3)
