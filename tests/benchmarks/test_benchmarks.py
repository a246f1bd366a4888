"""Each benchmark, tiny: what its last line says, never how fast it was."""

import json

import numpy as np
import pytest

from benchmarks import lanes, peers, probe, rollout, timing
from step_grpo.rollout.engine import Completion
from step_grpo.rollout.phases import Machine
from step_grpo.rollout.policies import Confidence


def last_line(capsys):
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_lanes_tells_the_share_of_live_lane_steps(capsys):
    result = lanes.main(["--lanes=16", "--per_lane=8", "--median=6", "--longest=40", "--seeds=2"])
    assert result == last_line(capsys)
    assert 0 < result["live_share_static"] < 1
    assert 0 < result["live_share_low"] <= result["live_share"] <= 1


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
    decoded = result["declined_tokens"] - result["forced_tokens"]
    assert 2 * result["declined"] <= decoded <= 20 * result["declined"]  # all that is no answer is taken off


def test_put_back_tokens_are_those_of_the_triggers_that_stand_in_the_thinking():
    texts = [b"a", b"Wait", b"W", b"ait", b",", b"</think>", b"ing"]

    def put_back(tokens, probes, forced=0):
        made = Completion(
            prompt=0,
            sample=0,
            tokens=np.array(tokens),
            logprobs=np.zeros(len(tokens)),
            forced=np.arange(len(tokens)) >= len(tokens) - forced,
            reason="",
            confidences=np.zeros(probes),
            probe_tokens=0,
        )
        return probe.put_back_tokens(made, texts, ("Wait",), think_end=5)

    assert put_back([0, 4, 1, 4, 0, 4, 2, 3, 4], 2) == 1 + 2
    assert put_back([0, 4, 1, 4, 0, 4, 2, 3, 4], 1) == 1  # the second was not probed any more
    assert put_back([4, 1, 4, 5, 4, 1, 4], 1) == 1  # the second stands in the answer
    assert put_back([4, 1, 4, 0, 4, 5, 4], 2, forced=3) == 1  # the second probe ended the thinking
    assert put_back([4, 1, 6, 4, 1], 0) == 0  # Waiting, and one that nothing has confirmed


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


class Repeater:
    """A `Generate` that thinks in chunks of one of its words and a trigger, and is sure of nothing."""

    def __init__(self, words):
        self.words, self.rounds = words, 0

    def __call__(self, prompts, max_new, ends, batch):
        self.rounds += 1
        chunk = [self.words[self.rounds % len(self.words)], 1] if 1 in ends else [2]
        return [chunk[:max_new] for _ in prompts]

    def greedy(self, prompts, max_new, ends, batch):
        return [([0, 0], np.array([-9.0, -9.0])) for _ in prompts]


@pytest.mark.parametrize(("words", "reason", "length"), [((5,), "rep", 7), ((5, 6, 7), "budget", 12)])
def test_restart_loop_watches_budget_and_repetition_when_no_probe_is_left(words, reason, length):
    policy = Confidence(question=(8,), max_notes=4, delta=0.5, strict=False, early_abort=False)
    machine = Machine(
        policy=policy, max_response=20, think_budget=12, budget_margin=0, max_probes=2, max_repetitions=3,
        temperature=1.0, top_p=1.0, think_end=3, eos=(2,), closing=(4, 3, 4),
    )  # fmt: skip
    texts = [b"x", b" Wait", b"<eos>", b"</think>", b"\n", b" a", b" b", b" c", b"?"]
    (text,) = peers.RestartLoop(Repeater(words), machine, [1], texts, batch=1)([(0,)])
    assert (text.reason, text.probes) == (reason, 2)
    assert text.tokens[length:] == [4, 3, 4, 2]  # the thinking ended where it was to
