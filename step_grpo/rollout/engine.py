"""The host loop of the rollout: a queue of completions to make, and lanes that are never left idle."""

import time
import zlib
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec
from ml_collections import ConfigDict

from step_grpo.data.prompts import think_end_id
from step_grpo.mesh import replicated
from step_grpo.model import qwen
from step_grpo.model.attention import XLA, Attention
from step_grpo.model.load import Description
from step_grpo.rollout import decode
from step_grpo.rollout.phases import DONE, REASONS, Machine
from step_grpo.rollout.triggers import Vocabulary, build_vocabulary, token_bytes

SEGMENT_STEPS = 64  # steps between two looks of the host at the lanes
CLOSING = "\n</think>\n\n"  # appended where the machine ends the thinking
REFILL_SHARE = 8  # lanes are refilled once this part of them (1 in 8) is free


@dataclass(frozen=True)
class Completion:
    """One finished completion."""

    prompt: int  # index into the prompts of the call
    sample: int  # number within its group
    tokens: np.ndarray  # [n] int32, EOS and forced tokens included
    logprobs: np.ndarray  # [n] float32, tempered, of the token that was recorded
    forced: np.ndarray  # [n] bool
    reason: str  # why the thinking ended, one of REASONS
    confidences: np.ndarray  # [probes] float32
    probe_tokens: int  # steps spent in probes


@dataclass(frozen=True)
class RolloutStats:
    """What a rollout cost."""

    seconds: float
    steps: int  # decode steps, summed over the devices
    lane_steps: int  # steps times the lanes of a device
    prefilled: int  # prompt tokens, padding included


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
        attention: Attention = XLA,
    ):
        """Prepares the programs; they compile when first used.

        Args:
            cfg: architecture.
            machine: settings of the rollout.
            vocab: token tables.
            lanes: completions made at a time, over all devices; a multiple of their number.
            max_prompt: tokens of the longest prompt.
            dtype: of the cache; int8 is quantised.
            mesh: with one axis, `data`.
            attention: the implementation.
        """
        self.machine, self.vocab, self.lanes, self.max_prompt, self.mesh = (
            machine,
            vocab,
            lanes,
            max_prompt,
            mesh,
        )
        local, all_ = PartitionSpec("data"), PartitionSpec()

        def program(function, in_specs, out_specs, donate=()):
            sharded = jax.shard_map(
                function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
            )
            return jax.jit(sharded, donate_argnums=donate)

        empty = partial(decode.empty_state, cfg, machine, lanes // mesh.size, self.capacity, dtype)
        self._empty = program(empty, (), local)
        self._refill = program(
            partial(decode.refill, cfg, attention=attention),
            (all_, local, all_, all_, local, local, local),
            local,
            donate=1,
        )
        self._segment = program(
            partial(decode.decode_segment, cfg, machine, attention=attention),
            (all_, all_, all_, local, all_, all_),
            (local, local),
            donate=3,
        )

    @property
    def capacity(self) -> int:
        """Tokens that fit into a lane's cache: prompt, response, and a probe behind it."""
        probe = len(self.machine.inducing) + self.machine.max_probe_tokens if self.machine.truncate else 0
        return _round_up(self.max_prompt + self.machine.max_response + probe, 64)

    def __call__(
        self,
        params: qwen.Params,
        prompts: Sequence[Sequence[int]],
        samples: int,
        run_key: jax.Array,
        on_progress: Callable[[int], None] = lambda finished: None,
    ) -> tuple[list[Completion], RolloutStats]:
        """Makes `samples` completions of each prompt.

        Args:
            params: `qwen.decode_params`.
            prompts: token ids, each at most `max_prompt` long.
            samples: completions a prompt.
            run_key: folded from seed and step; the engine folds in the rest.
            on_progress: called with the number of finished completions after each segment.

        Returns:
            The completions, ordered by prompt and sample, and the cost.

        Raises:
            ValueError: a prompt is empty or too long.
        """
        check_prompts(prompts, self.max_prompt)
        started = time.monotonic()
        queue = deque((p, s) for p in range(len(prompts)) for s in range(samples))
        total = len(queue)
        state = self._empty()
        owner: list[tuple[int, int] | None] = [None] * self.lanes
        finished: list[Completion] = []
        steps = prefilled = 0
        while len(finished) < total:
            while queue and None in owner:
                state, tokens = self._fill(params, state, prompts, queue, owner)
                prefilled += tokens
            live = sum(o is not None for o in owner)
            stop_live = max(live - max(1, self.lanes // REFILL_SHARE), 0) if queue else 0
            state, taken = self._segment(
                params,
                self.vocab,
                run_key,
                state,
                jnp.int32(SEGMENT_STEPS),
                jnp.int32(stop_live // self.mesh.size),
            )
            steps += int(np.sum(taken))
            finished += harvest(state, owner)
            on_progress(len(finished))
        finished.sort(key=lambda c: (c.prompt, c.sample))
        stats = RolloutStats(
            time.monotonic() - started, steps, steps * self.lanes // self.mesh.size, prefilled
        )
        return finished, stats

    def _fill(self, params, state, prompts, queue, owner):
        """Gives free lanes their next completions; one call prefills a fixed number of prompts."""
        rows = max(1, self.lanes // REFILL_SHARE)
        lengths = np.ones(rows, np.int32)
        width = _round_up(max(len(p) for p in prompts), 32)
        tokens = np.zeros((rows, width), np.int32)
        row, prompt_id, sample_id = (np.zeros(self.lanes, np.int32) for _ in range(3))
        row -= 1
        in_row: dict[int, int] = {}
        for b in range(self.lanes):
            if owner[b] is not None:
                continue
            if not queue or (queue[0][0] not in in_row and len(in_row) == rows):
                break
            owner[b] = p, s = queue.popleft()
            if p not in in_row:
                in_row[p] = len(in_row)
                lengths[in_row[p]] = len(prompts[p])
                tokens[in_row[p], : len(prompts[p])] = prompts[p]
            row[b], prompt_id[b], sample_id[b] = in_row[p], identity(prompts[p]), s
        state = self._refill(params, state, tokens, lengths, row, prompt_id, sample_id)
        return state, rows * width


def harvest(state: decode.RolloutState, owner: list[tuple[int, int] | None]) -> list[Completion]:
    """Takes the finished completions out of their lanes and frees them in `owner`."""
    phase = np.asarray(state.lane.phase)
    ready = [b for b, o in enumerate(owner) if o is not None and phase[b] == DONE]
    if not ready:
        return []
    fields = (state.lane, state.probed.confidences, state.tokens, state.logprobs, state.forced)
    lane, confidences, tokens, logprobs, forced = jax.device_get(fields)
    completions = []
    for b in ready:
        prompt, sample = owner[b] or (0, 0)
        n = lane.length[b]
        completions.append(
            Completion(
                prompt=prompt,
                sample=sample,
                tokens=tokens[b, :n].copy(),
                logprobs=logprobs[b, :n].copy(),
                forced=forced[b, :n].copy(),
                reason=REASONS[lane.reason[b]],
                confidences=confidences[b, : lane.probes[b]].copy(),
                probe_tokens=int(lane.probe_tokens[b]),
            )
        )
        owner[b] = None
    return completions


def identity(prompt: Sequence[int]) -> int:
    """A number in [0, 2**31) that stands for a prompt, whatever its place in the batch."""
    return zlib.crc32(np.asarray(prompt, np.int32).tobytes()) & 0x7FFFFFFF


def check_prompts(prompts: Sequence[Sequence[int]], longest: int) -> None:
    """Raises ValueError for a prompt that is empty or longer than the cache has room for."""
    for i, prompt in enumerate(prompts):
        if not 0 < len(prompt) <= longest:
            raise ValueError(f"prompt {i} has {len(prompt)} tokens; expected 1 to {longest}")


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def build_engine(
    described: Description,
    config: ConfigDict,
    mesh: Mesh,
    dtype: Any,
    *,
    truncate: bool,
    temperature: float,
    top_p: float,
    max_response: int,
    attention: Attention = XLA,
) -> RolloutEngine:
    """The engine of a model: its token tables and the settings of a config's `rollout` part, in tokens."""
    tokenizer = described.tokenizer

    def encode(text: str) -> tuple[int, ...]:
        return tuple(tokenizer.encode(text, add_special_tokens=False))

    machine = Machine(
        truncate=truncate,
        max_response=max_response,
        think_budget=int(config.think_ratio * max_response),
        budget_margin=config.budget_margin,
        max_probes=config.max_probes,
        max_probe_tokens=config.max_probe_tokens,
        max_repetitions=config.max_repetitions,
        delta=config.delta,
        strict=config.strict,
        temperature=temperature,
        top_p=top_p,
        think_end=think_end_id(tokenizer),
        eos=described.eos_ids,
        inducing=encode(config.inducing_prompt),
        closing=encode(CLOSING),
    )
    texts = token_bytes(tokenizer, described.config.vocab_size)
    vocab = build_vocabulary(texts, tuple(config.triggers))
    return RolloutEngine(
        described.config,
        machine,
        jax.device_put(vocab, replicated(mesh)),
        lanes=config.lanes,
        max_prompt=config.max_prompt_tokens,
        dtype=jnp.dtype(config.cache_dtype or dtype),
        mesh=mesh,
        attention=attention,
    )
