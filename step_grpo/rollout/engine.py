"""The host loop of the rollout: a queue of completions to make, and lanes that are never left idle."""

import math
import time
import zlib
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from step_grpo.data.prompts import THINK_END, think_end_id
from step_grpo.errors import UserError
from step_grpo.mesh import axis_size, replicated
from step_grpo.model import qwen
from step_grpo.model.attention import XLA, Attention
from step_grpo.model.load import Description
from step_grpo.rollout import decode
from step_grpo.rollout.phases import DONE, REASONS, Machine
from step_grpo.rollout.policies import Built, Policy, build_policy, encode
from step_grpo.rollout.programs import Programs, annex_lanes, make_ladder, round_up, shape_of
from step_grpo.rollout.triggers import Vocabulary, build_vocabulary, reach, token_bytes

SEGMENT_STEPS = 64  # steps between two looks of the host at the lanes, at most
ANNEX_TURNS = 2  # the last completions go to the annex once its lanes hold them in so many turns
LOOK_COST = 0.3  # what a look takes, in steps: about so much for a small model, less for a large one
CLOSING = f"\n{THINK_END}\n\n"  # appended where the machine ends the thinking
REFILL_SHARE = 16  # one lane in so many is expected to become free between two looks: prompts made at a time
SHRINK_AFTER = 16  # looks in a row at which a smaller cache would do, before it is made: a copy of all of it


@dataclass(frozen=True)
class Completion:
    """One finished completion."""

    prompt: int  # index into the prompts of the call
    sample: int  # number within its group
    tokens: np.ndarray  # [n] int32, EOS and forced tokens included
    logprobs: np.ndarray  # [n] float32, tempered, of the token that was recorded
    forced: np.ndarray  # [n] bool
    reason: str  # why the thinking ended, one of REASONS
    confidences: np.ndarray  # [probes] float32 scores of the checks, as the exit policy defines them
    probe_tokens: int  # steps spent in probes


@dataclass
class RolloutStats:
    """What a rollout cost."""

    seconds: float = 0.0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    compile_seconds: float = 0.0  # of the first call
    steps: int = 0  # decode steps, summed over the devices
    lane_steps: int = 0  # steps of the slowest device times the lanes of all: those that wait count too
    live_steps: int = 0  # those that carried an unfinished completion
    prefilled: int = 0  # prompt tokens, padding included
    resizes: int = 0  # times the cache grew, shrank or was packed
    moves: int = 0  # times completions moved to the annex
    known_tokens: int = 0  # of completions that the caller had already


class Told(NamedTuple):
    """What the host reads of all lanes behind a segment, at one go, `[B]` each as in `phases.Lane`."""

    phase: np.ndarray
    kv_length: np.ndarray
    length: np.ndarray
    reason: np.ndarray
    probes: np.ndarray
    probe_tokens: np.ndarray


@dataclass
class Pool:
    """Lanes of one shape: their state, and what the host knows of them."""

    state: decode.RolloutState
    owner: list[list[tuple[int, int] | None]]  # [devices][lanes of a device] completion; None: a free lane
    kv_length: np.ndarray  # [devices, lanes of a device] tokens in the cache
    told: Told | None = None  # of the last segment

    @classmethod
    def of(cls, state: decode.RolloutState, devices: int) -> "Pool":
        """A state in which all lanes are free."""
        lanes = len(state.lane.phase) // devices
        return cls(state, [[None] * lanes for _ in range(devices)], np.zeros((devices, lanes), np.int32))

    @property
    def lanes(self) -> int:
        """Of a device."""
        return self.kv_length.shape[1]

    @property
    def capacity(self) -> int:
        """Tokens that fit into a lane's cache."""
        return shape_of(self.state).capacity

    def live(self) -> list[int]:
        """Completions in hand of each device."""
        return [sum(o is not None for o in owners) for owners in self.owner]

    def longer(self, tokens: int) -> list[list[int]]:
        """Live lanes of each device that hold more than `tokens`."""
        return [
            [lane for lane, owner in enumerate(owners) if owner is not None and held[lane] > tokens]
            for owners, held in zip(self.owner, self.kv_length, strict=True)
        ]

    def longest(self) -> int:
        """Tokens in the fullest cache of a live lane."""
        held = [[o is not None for o in owners] for owners in self.owner]
        return int(self.kv_length[np.array(held)].max(initial=0))


@dataclass
class Ready:
    """A batch of prefilled prompts whose completions have not all started."""

    prefilled: decode.Prefilled
    waiting: list[deque[tuple[int, int, int]]]  # of each device: row, prompt, sample


class RolloutEngine:
    """Makes completions of prompts; knows nothing of rewards.

    A completion depends on the parameters, its prompt, its sample number and the key alone: not on the
    number of lanes, nor on what runs beside it. Each device runs lanes of its own; nothing passes between
    devices.
    """

    def __init__(
        self,
        cfg: qwen.QwenConfig,
        machine: Machine,
        vocab: Vocabulary,
        *,
        lanes: int,
        max_prompt: int,
        dtype: Any,
        mesh: Mesh,
        judge_params: qwen.Params | None = None,
        attention: Attention = XLA,
        rebatch: bool = True,
    ):
        """Remembers the settings; the programs are compiled at the first call.

        Args:
            cfg: architecture.
            machine: settings of the rollout.
            vocab: token tables, on every device.
            lanes: completions made at a time, over all devices, a multiple of their number; 0 for as many
                as the devices' free memory holds at the first call.
            max_prompt: tokens of the longest prompt.
            dtype: of the cache; int8 is quantised.
            mesh: from `share_of`, or with `data` alone. What is said of a device holds for each part of
                `data`; its `tensor` devices work on the same lanes.
            judge_params: of the second model that the machine's exit policy asks, on every device.
            attention: the implementation.
            rebatch: False for static batches: no lane is refilled or packed before all are done.
        """
        self.rebatch = rebatch
        self.cfg, self.machine, self.vocab = cfg, machine, vocab
        self.lanes, self.max_prompt, self.dtype, self.mesh = lanes, max_prompt, dtype, mesh
        self._judge_params, self._attention = judge_params, attention
        self._programs: Programs | None = None

    @property
    def capacity(self) -> int:
        """Tokens that fit into a lane's full cache: prompt, response, and a check behind them."""
        return self.max_prompt + self.machine.max_response + self.machine.check_room

    @property
    def _groups(self) -> int:
        """Groups of devices with lanes of their own."""
        return axis_size(self.mesh, "data")

    @property
    def _has_annex(self) -> bool:
        """Where the cost of attention follows the capacity, not the lengths in use, an annex saves time."""
        return self._attention.kind == "xla" and self.rebatch

    def compile(self, params: qwen.Params, completions: int) -> Programs:
        """Compiles every program that calls can need; later calls of this method return what is there.

        Args:
            params: `qwen.decode_params`, on the devices.
            completions: that a call makes; more lanes than that are not made.
        """
        if self._programs is None:
            lanes = self.lanes or self._lanes_that_fit(completions)
            self._programs = self.programs(lanes).compile(params)
        return self._programs

    def programs(self, lanes: int) -> Programs:
        """The programs for so many lanes over all devices, not yet compiled."""
        ladder = make_ladder(lanes, self.capacity, self.max_prompt, self._groups, annex=self._has_annex)
        return Programs(
            self.cfg,
            self.machine,
            self.vocab,
            self._judge_params,
            ladder,
            rows=max(1, lanes // self._groups // REFILL_SHARE),
            dtype=self.dtype,
            mesh=self.mesh,
            attention=self._attention,
        )

    def _lanes_that_fit(self, completions: int) -> int:
        wanted = round_up(completions, self._groups) // self._groups
        spread = axis_size(self.mesh, "tensor")
        lane = lane_bytes(self.cfg, self.machine, self.vocab, self.capacity, self.dtype, spread)
        free = [free_bytes(d) for d in self.mesh.devices.flat]
        return self._groups * lanes_that_fit(free, lane, wanted, annex=self._has_annex)

    def __call__(
        self,
        params: qwen.Params,
        prompts: Sequence[Sequence[int]],
        samples: int,
        run_key: jax.Array,
        on_progress: Callable[[int], None] = lambda finished: None,
        limits: Sequence[int] | None = None,
        known: Sequence[Completion] = (),
        on_finished: Callable[[Sequence[Completion]], None] = lambda completions: None,
    ) -> tuple[list[Completion], RolloutStats]:
        """Makes `samples` completions of each prompt.

        Args:
            params: `qwen.decode_params`.
            prompts: token ids, each at most `max_prompt` long.
            samples: completions a prompt.
            run_key: folded from seed and step; the engine folds in the rest.
            on_progress: called with the number of finished completions after each segment.
            limits: tokens that each completion may have, at most the machine's, by prompt and sample; None
                for the machine's.
            known: completions that an earlier, interrupted call has made; they are not made again.
            on_finished: called with what a segment finished, before `on_progress`.

        Returns:
            The completions, ordered by prompt and sample, and the cost.

        Raises:
            ValueError: a prompt is empty or too long.
        """
        check_prompts(prompts, self.max_prompt)
        stats, started = RolloutStats(), time.monotonic()
        programs = self.compile(params, len(prompts) * samples)
        stats.compile_seconds = time.monotonic() - started
        run_key = jax.device_put(run_key, replicated(self.mesh))
        limits = limits or [self.machine.max_response] * (len(prompts) * samples)
        # Devices that share lanes exchange parts at every step: all must take as many.
        in_step = axis_size(self.mesh, "tensor") > 1
        work = _Work(programs, prompts, samples, limits, self._groups, in_step, self.rebatch, stats, known)
        finished = list(known)
        stats.known_tokens = sum(len(c.tokens) for c in known)
        while len(finished) < len(prompts) * samples:
            work.fill(params)
            pool, steps = work.fit()
            work.advance(pool, params, run_key, steps)
            made = work.harvest(pool)
            finished += made
            on_finished(made)
            on_progress(len(finished))
        finished.sort(key=lambda c: (c.prompt, c.sample))
        stats.seconds = time.monotonic() - started
        return finished, stats


@dataclass
class _Work:
    """One call of the engine: what is queued, prefilled and in the lanes."""

    programs: Programs
    prompts: Sequence[Sequence[int]]
    samples: int
    limits: Sequence[int]
    devices: int
    in_step: bool  # no device ends a segment before the others
    rebatch: bool  # lanes are refilled and packed as completions end
    stats: RolloutStats
    known: Sequence[Completion]  # not to be made
    ready: list[Ready] = field(default_factory=list)
    finished: int = 0
    roomy: int = 0  # looks in a row at which a smaller cache would have done

    def __post_init__(self):
        made = {(c.prompt, c.sample) for c in self.known}
        self.wanted = [
            [sample for sample in range(self.samples) if (prompt, sample) not in made]
            for prompt in range(len(self.prompts))
        ]
        self.queue = deque(prompt for prompt, samples in enumerate(self.wanted) if samples)
        ladder = self.programs.ladder
        self.main = Pool.of(self.programs.empty(ladder.shapes[0]), self.devices)
        self.annex = None
        if ladder.annex:
            self.annex = Pool.of(self.programs.empty(ladder.annex_shapes[0]), self.devices)

    @property
    def pending(self) -> bool:
        """Whether completions wait for a lane."""
        return bool(self.queue) or bool(self.ready)

    # ------------------------------------------------------------------ filling lanes

    def fill(self, params: qwen.Params) -> None:
        """Starts waiting completions in all free lanes; a prompt is prefilled once for its whole group."""
        if not self.rebatch and any(self.main.live()):
            return
        while True:
            for ready in self.ready:
                self._insert(ready)
            self.ready = [r for r in self.ready if any(r.waiting)]
            waiting = [sum(len(r.waiting[d]) for r in self.ready) for d in range(self.devices)]
            if not self.queue or not any(
                None in owners and not n for owners, n in zip(self.main.owner, waiting, strict=True)
            ):
                break
            # Whoever would be hungry at the next look is served with those that are now.
            spare = max(1, self.main.lanes // REFILL_SHARE)
            self.ready.append(self._prefill(params, [n <= spare for n in waiting]))

    def _prefill(self, params: qwen.Params, hungry: list[bool]) -> Ready:
        """The next prompts of the queue, for the devices that need some."""
        started, rows = time.monotonic(), self.programs.rows
        waiting: list[deque[tuple[int, int, int]]] = [deque() for _ in range(self.devices)]
        chosen: dict[int, int] = {}  # row over all devices -> prompt
        for row in range(rows):  # row by row, so that a short queue is shared
            for device in range(self.devices):
                if self.queue and hungry[device]:
                    prompt = self.queue.popleft()
                    chosen[device * rows + row] = prompt
                    waiting[device].extend((row, prompt, sample) for sample in self.wanted[prompt])
        longest = max(len(self.prompts[p]) for p in chosen.values())
        width = next(w for w in self.programs.ladder.widths if w >= longest)
        tokens = np.zeros((self.devices * rows, width), np.int32)
        lengths = np.ones(self.devices * rows, np.int32)
        for row, prompt in chosen.items():
            lengths[row] = len(self.prompts[prompt])
            tokens[row, : lengths[row]] = self.prompts[prompt]
        prefilled = jax.block_until_ready(self.programs.prefill(params, tokens, lengths))
        self.stats.prefilled += tokens.size
        self.stats.prefill_seconds += time.monotonic() - started
        return Ready(prefilled, waiting)

    def _insert(self, ready: Ready) -> None:
        lanes = self.main.lanes
        row, prompt_id, sample_id, limit = (np.zeros((self.devices, lanes), np.int32) for _ in range(4))
        row -= 1
        for device, waiting in enumerate(ready.waiting):
            owners = self.main.owner[device]
            for lane in range(lanes):
                if owners[lane] is None and waiting:
                    row[device, lane], prompt, sample = waiting.popleft()
                    owners[lane] = prompt, sample
                    prompt_id[device, lane], sample_id[device, lane] = identity(self.prompts[prompt]), sample
                    limit[device, lane] = self.limits[prompt * self.samples + sample]
                    self.main.kv_length[device, lane] = len(self.prompts[prompt])
        if (row >= 0).any():
            width = ready.prefilled.cache[0].capacity
            self._grow_for(width + self.programs.judge_prefix)
            self.main.state = self.programs.insert(
                self.main.state,
                ready.prefilled,
                row.ravel(),
                prompt_id.ravel(),
                sample_id.ravel(),
                limit.ravel(),
            )

    # ------------------------------------------------------------------ shapes

    def fit(self) -> tuple[Pool, int]:
        """Gives the lanes the smallest shapes that hold the next segment; who takes it, and its steps.

        The annex waits until its lanes are full or nothing else is left: so few lanes are best advanced when
        none of them is free. In the end the other lanes wait for it, and move there as its own become free.
        """
        if self.rebatch and not self.pending and self._pack():
            assert self.annex
            return self.annex, self._steps_to_look()
        # In a small cache a long segment would make many lanes look too long for it.
        steps = min(self._steps_to_look(), self.main.capacity // 8)
        if not self._make_room(steps + self.programs.judge_ahead):
            assert self.annex
            return self.annex, self._steps_to_look()
        self._grow_for(self.main.longest() + steps + self.programs.judge_ahead)
        return self.main, steps

    def _steps_to_look(self) -> int:
        """Steps until the host looks at the lanes again.

        Where completions take `n` steps, `k` steps without a look leave `k / 2n` of the lanes idle, and looks
        take `LOOK_COST / k` of the time: least in sum at the `k` returned. Every device takes as many: one
        that stopped when its own lanes are free would wait for the others.
        """
        lifetime = self.stats.live_steps / max(self.finished, 1)
        return min(max(round(math.sqrt(2 * lifetime * LOOK_COST)), 1), SEGMENT_STEPS)

    def _pack(self) -> bool:
        """Into fewer lanes, if those in use fit there; returns whether the annex has or awaits them all."""
        ladder = self.programs.ladder
        live = self.main.live()
        if self.annex and max(live) <= ANNEX_TURNS * self.annex.lanes:
            room = [self.annex.lanes - n for n in self.annex.live()]
            if any(n and r for n, r in zip(live, room, strict=True)):
                self._move(self.main.longer(-1))
            if not any(self.main.live()):
                self._keep_live(self.annex, ladder.annex)
            return True
        self._keep_live(self.main, ladder.packed)
        return False

    def _make_room(self, ahead: int) -> bool:
        """Moves lanes that need more than the cache holds to the annex, if that is where they belong.

        They do where the annex has lanes for all of them; else the cache is to grow. A larger cache shrinks
        once the annex could for a while have taken all that need it.

        Args:
            ahead: tokens that each lane may come to hold beyond those that it does.

        Returns:
            False where the annex must first free lanes for them.
        """
        aside = self.annex.lanes if self.annex else 0
        capacities = self.programs.ladder.capacities
        capacity = self.main.capacity
        if capacity > capacities[0]:
            smaller = capacities[capacities.index(capacity) - 1]
            fits = max(map(len, self.main.longer(smaller - ahead))) <= aside
            self.roomy = self.roomy + 1 if fits else 0
            if self.roomy >= SHRINK_AFTER:
                capacity = smaller
        long = self.main.longer(capacity - ahead)
        if capacity == capacities[-1] or max(map(len, long)) > aside:
            return True
        if self.annex and any(long):
            room = [aside - n for n in self.annex.live()]
            if any(len(lanes) > r for lanes, r in zip(long, room, strict=True)):
                return False
            self._move(long)
        if capacity < self.main.capacity:
            self._resize(capacity)
        return True

    def _grow_for(self, tokens: int) -> None:
        """Grows the cache, a rung at a time, to the least capacity for `tokens`, or to the largest."""
        largest = self.programs.ladder.capacities[-1]
        for capacity in self.programs.ladder.capacities:
            if self.main.capacity < min(tokens, largest) and self.main.capacity < capacity:
                self._resize(capacity)

    def _resize(self, capacity: int) -> None:
        self.main.state = self.programs.resize(self.main.state, capacity)
        self.stats.resizes += 1
        self.roomy = 0

    def _keep_live(self, pool: Pool, packed: Sequence[int]) -> None:
        """Packs a pool, a rung at a time, into the fewest lanes that hold what is live on each device.

        Args:
            pool: the lanes.
            packed: their numbers over all devices, the most first.
        """
        for lanes in packed:
            fewer = lanes // self.devices
            if max(pool.live()) <= fewer < pool.lanes:
                self._keep(pool, fewer)

    def _keep(self, pool: Pool, fewer: int) -> None:
        """Keeps the live lanes of each device, filled up with free ones to `fewer`."""
        kept = np.zeros((self.devices, fewer), np.int32)
        for device, owners in enumerate(pool.owner):
            live = [lane for lane, owner in enumerate(owners) if owner is not None]
            free = [lane for lane, owner in enumerate(owners) if owner is None]
            kept[device] = (live + free)[:fewer]
            pool.owner[device] = [owners[lane] for lane in kept[device]]
        pool.kv_length = np.take_along_axis(pool.kv_length, kept, axis=1)
        pool.state = self.programs.pack(pool.state, kept.ravel())
        self.stats.resizes += 1

    def _move(self, lanes: list[list[int]]) -> None:
        """Moves these lanes of each device to free ones of the annex, as many as there are."""
        main, annex = self.main, self.annex
        assert annex
        row = np.full((self.devices, annex.lanes), -1, np.int32)
        for device, moving in enumerate(lanes):
            free = [i for i, owner in enumerate(annex.owner[device]) if owner is None]
            for lane, to in zip(moving, free, strict=False):
                row[device, to] = lane
                annex.owner[device][to], main.owner[device][lane] = main.owner[device][lane], None
                annex.kv_length[device, to] = main.kv_length[device, lane]
        main.state, annex.state = self.programs.move(main.state, annex.state, row.ravel())
        self.stats.moves += 1

    # ------------------------------------------------------------------ tokens

    def advance(self, pool: Pool, params: qwen.Params, run_key: jax.Array, steps: int) -> None:
        """One segment of at most `steps`; it ends early where far more lanes than expected are free."""
        started = time.monotonic()
        burst = 4 * max(1, pool.lanes // REFILL_SHARE)
        stop = [max(n - burst, 0) if self.pending and self.rebatch else 0 for n in pool.live()]
        if self.in_step:
            stop = [-1] * self.devices
        pool.state, taken = self.programs.segment(
            params, run_key, pool.state, np.int32(steps), np.array(stop, np.int32)
        )
        lane = pool.state.lane
        taken, pool.told = jax.device_get((taken, Told(*(getattr(lane, name) for name in Told._fields))))
        self.stats.steps += int(taken.steps.sum())
        # A device that left its loop early, or has nothing to do, waits for the others.
        self.stats.lane_steps += int(taken.steps.max()) * self.devices * pool.lanes
        self.stats.live_steps += int(taken.live_steps.sum())
        self.stats.decode_seconds += time.monotonic() - started

    def harvest(self, pool: Pool) -> list[Completion]:
        """Takes the finished completions out of their lanes and frees them."""
        state, told, shape = pool.state, pool.told, pool.kv_length.shape
        assert told
        pool.kv_length = told.kv_length.reshape(shape).copy()
        phase = told.phase.reshape(shape)
        ready = [
            (device, lane, owner)
            for device, owners in enumerate(pool.owner)
            for lane, owner in enumerate(owners)
            if owner is not None and phase[device, lane] == DONE
        ]
        if not ready:
            return []
        written = Written(
            *jax.device_get((state.probed.confidences, state.tokens, state.logprobs, state.forced))
        )
        for device, lane, _ in ready:
            pool.owner[device][lane] = None
        self.finished += len(ready)
        return [
            completion_of(told, written, device * shape[1] + lane, prompt, sample)
            for device, lane, (prompt, sample) in ready
        ]


class Written(NamedTuple):
    """What the host reads of finished lanes, leaves `[B, ...]` as in the rollout's state."""

    confidences: np.ndarray
    tokens: np.ndarray
    logprobs: np.ndarray
    forced: np.ndarray


def completion_of(told: Told, written: Written, b: int, prompt: int, sample: int) -> Completion:
    """Lane `b` of what was written."""
    n = told.length[b]
    return Completion(
        prompt=prompt,
        sample=sample,
        tokens=written.tokens[b, :n].copy(),
        logprobs=written.logprobs[b, :n].copy(),
        forced=written.forced[b, :n].copy(),
        reason=REASONS[told.reason[b]],
        confidences=written.confidences[b, : told.probes[b]].copy(),
        probe_tokens=int(told.probe_tokens[b]),
    )


def identity(prompt: Sequence[int]) -> int:
    """A number in [0, 2**31) that stands for a prompt, whatever its place in the batch."""
    return zlib.crc32(np.asarray(prompt, np.int32).tobytes()) & 0x7FFFFFFF


def check_prompts(prompts: Sequence[Sequence[int]], longest: int) -> None:
    """Raises ValueError for a prompt that is empty or longer than the cache has room for."""
    for i, prompt in enumerate(prompts):
        if not 0 < len(prompt) <= longest:
            raise ValueError(f"prompt {i} has {len(prompt)} tokens; expected 1 to {longest}")


# ---------------------------------------------------------------------- how many lanes

MEMORY_SHARE = 0.6  # of what is free; the rest is for growing, which needs the old cache beside the new one
LANES_WITHOUT_LIMIT = 64  # a device, where it does not tell its memory (the CPU): more are no faster
MOST_LANES = 512  # a device; beyond, a step is bound by compute and takes as much longer


def free_bytes(device: jax.Device) -> int | None:
    """Free memory of a device, None where it does not tell."""
    memory = device.memory_stats()
    if not memory or "bytes_limit" not in memory:
        return None
    return memory["bytes_limit"] - memory["bytes_in_use"]


def lane_bytes(
    cfg: qwen.QwenConfig, machine: Machine, vocab: Vocabulary, capacity: int, dtype: Any, spread: int = 1
) -> int:
    """Memory of one lane with a full cache on each of the `spread` devices that share it.

    Float32 logits of a few copies are included.
    """
    back = reach(vocab.triggers)
    state = jax.eval_shape(lambda: decode.empty_state(cfg, machine, 1, capacity, dtype, back))

    def size(tree):
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))

    caches = size((state.cache, state.judge_cache))
    return size(state) - caches + (caches + 4 * 4 * cfg.vocab_size) // spread


def lanes_that_fit(free: Sequence[int | None], lane: int, wanted: int, *, annex: bool) -> int:
    """Lanes of each device: as many as the poorest has memory for, never more than `wanted`.

    Args:
        free: bytes free on each device, None where it does not tell.
        lane: bytes of a lane.
        wanted: completions a device makes.
        annex: there is one beside the lanes.

    Raises:
        UserError: not even one lane fits.
    """
    known = [f for f in free if f is not None]
    most = min(int(f * MEMORY_SHARE) // lane for f in known) if known else LANES_WITHOUT_LIMIT
    if most < 1:
        raise UserError(
            f"a device has {min(known) / 2**30:.2f} GiB free and one lane of the rollout takes "
            f"{lane / 2**30:.2f} GiB; lower config.rollout.max_response_tokens, raise config.mesh.tensor (it "
            "spreads a lane over devices), or use more devices"
        )
    lanes = min(most, wanted, MOST_LANES)
    while known and annex and lanes + annex_lanes(lanes) > most:
        lanes -= 1
    return lanes if lanes < 8 else lanes // 8 * 8


def build_engine(
    described: Description,
    config: ConfigDict,
    mesh: Mesh,
    dtype: Any,
    *,
    truncate: bool,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    max_response: int,
    attention: Attention = XLA,
) -> RolloutEngine:
    """The engine of a model: its token tables and the settings of a config's `rollout` part, in tokens.

    Args:
        described: the model but its weights.
        config: the `rollout` part of a config; its lanes are shared among the processes.
        mesh: from `share_of`, or with `data` alone.
        dtype: of the compute.
        truncate: False for plain sampling whatever `config.exit` says.
        temperature: of the sampling, as are the next three.
        top_k: 0 for no limit.
        top_p: 1 for no limit.
        min_p: 0 for no limit.
        max_response: tokens of a completion.
        attention: the implementation.
    """
    tokenizer = described.tokenizer
    policy, judge_params = build_policy(config, tokenizer, dtype) if truncate else Built(None, None)
    sampling = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    machine = build_machine(described, config, policy, max_response, sampling)
    texts = token_bytes(tokenizer, described.config.vocab_size)
    delimiters = tuple(config.verifier.delimiters) if machine.judge else ()
    vocab = build_vocabulary(texts, tuple(config.triggers), delimiters)
    return RolloutEngine(
        described.config,
        machine,
        jax.device_put(vocab, replicated(mesh)),
        lanes=config.lanes // jax.process_count(),
        max_prompt=config.max_prompt_tokens,
        dtype=jnp.dtype(config.cache_dtype or dtype),
        mesh=mesh,
        attention=attention,
        judge_params=jax.device_put(judge_params, replicated(mesh)),
        rebatch=config.rebatch,
    )


def build_machine(
    described: Description,
    config: ConfigDict,
    policy: Policy | None,
    max_response: int,
    sampling: Mapping[str, Any],
) -> Machine:
    """The settings of a rollout, in tokens; the arguments are those of `build_engine`."""
    return Machine(
        policy=policy,
        max_response=max_response,
        think_budget=int(config.think_ratio * max_response),
        budget_margin=config.budget_margin,
        max_probes=config.max_probes,
        max_repetitions=config.max_repetitions,
        think_end=think_end_id(described.tokenizer),
        eos=described.eos_ids,
        closing=encode(described.tokenizer, CLOSING),
        **sampling,
    )
