"""The host loop alone: programs that only count, so that whole rollouts are scheduled in seconds."""

from types import SimpleNamespace

import numpy as np
import pytest

from benchmarks.lanes import draw_lengths
from step_grpo.rollout import programs
from step_grpo.rollout.engine import RolloutStats, Told, _Work
from step_grpo.rollout.phases import DONE, THINK


class CountingPrograms:
    """Lanes that count to their limits, and nothing else: what `programs.Programs` is to the engine."""

    judge_prefix = judge_ahead = 0

    def __init__(self, ladder, rows, devices):
        self.ladder, self.rows, self.devices = ladder, rows, devices

    def empty(self, shape):
        lane = SimpleNamespace(**{name: np.zeros(shape.lanes, int) for name in (*Told._fields, "limit")})
        lane.phase += DONE
        rows = np.zeros((shape.lanes, 0))
        return SimpleNamespace(
            lane=lane,
            probed=SimpleNamespace(confidences=rows),
            tokens=rows,
            logprobs=rows,
            forced=rows,
            cache=[SimpleNamespace(capacity=shape.capacity)],
        )

    def prefill(self, params, tokens, lengths):
        return SimpleNamespace(cache=[SimpleNamespace(capacity=tokens.shape[1])])

    def insert(self, state, prefilled, row, prompt_id, sample_id, limit):
        assert np.all(state.lane.phase[row >= 0] == DONE)
        for name, value in {"phase": THINK, "length": 0, "kv_length": 0, "limit": limit}.items():
            held = getattr(state.lane, name)
            held[:] = np.where(row >= 0, value, held)
        return state

    def segment(self, params, run_key, state, max_steps, stop_live):
        lane, steps, live_steps = state.lane, [], []
        for device, stop in enumerate(stop_live):
            mine = np.arange(len(lane.phase)) // (len(lane.phase) // self.devices) == device
            steps.append(0)
            live_steps.append(0)
            while steps[-1] < max_steps and (live := mine & (lane.phase != DONE)).sum() > stop:
                steps[-1] += 1
                live_steps[-1] += live.sum()
                lane.length += live
                lane.kv_length += live
                lane.phase[live & (lane.length >= lane.limit)] = DONE
        assert lane.kv_length.max() <= state.cache[0].capacity
        return state, SimpleNamespace(steps=np.array(steps), live_steps=np.array(live_steps))

    def resize(self, state, capacity):
        state.cache[0].capacity = capacity
        return state

    def pack(self, state, lanes):
        of_device = np.repeat(np.arange(self.devices), len(lanes) // self.devices)
        kept = of_device * (len(state.lane.phase) // self.devices) + lanes
        for name, held in vars(state.lane).items():
            setattr(state.lane, name, held[kept])
        return state

    def move(self, state, annex, row):
        of_device = np.repeat(np.arange(self.devices), len(row) // self.devices)
        source = (of_device * (len(state.lane.phase) // self.devices) + row)[row >= 0]
        for name, held in vars(annex.lane).items():
            held[row >= 0] = getattr(state.lane, name)[source]
        state.lane.phase[source] = DONE
        return state, annex


@pytest.mark.parametrize(("devices", "seed"), [(1, 0), (2, 1), (2, 3)])
def test_lanes_are_busy_when_lengths_are_heavy_tailed(devices, seed, monkeypatch):
    """The schedule of `benchmarks.lanes`: 90 % of all lane-steps carry a completion, the end included."""
    lengths = draw_lengths(64 * 32, 32, 2048, seed)
    ladder = programs.make_ladder(64, 32 + int(lengths.max()), 32, devices, annex=True)
    counting, stats = CountingPrograms(ladder, max(1, 64 // devices // 16), devices), RolloutStats()
    monkeypatch.setattr("step_grpo.rollout.engine.jax.device_get", lambda tree: tree)
    work = _Work(counting, [(3,)] * len(lengths), 1, lengths.tolist(), devices, False, True, stats, [])
    finished = []
    while len(finished) < len(lengths):
        work.fill(None)
        pool, steps = work.fit()
        work.advance(pool, None, None, steps)
        finished += work.harvest(pool)
    assert stats.live_steps == lengths.sum()
    assert stats.live_steps / stats.lane_steps >= 0.9
