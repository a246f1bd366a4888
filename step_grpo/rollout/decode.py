"""The jitted part of the rollout: lanes advance together, one token a step, whatever their phase."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from step_grpo.model import qwen
from step_grpo.model.attention import XLA, Attention
from step_grpo.model.cache import Cache, copy_lanes, empty_cache
from step_grpo.rollout import phases
from step_grpo.rollout.phases import DONE, THINK, Lane, Machine, Observation, Probed
from step_grpo.rollout.sampling import sample, sample_key
from step_grpo.rollout.triggers import Vocabulary


class RolloutState(NamedTuple):
    """All that the decode loop carries, one pytree."""

    lane: Lane  # leaves [B]
    probed: Probed  # [B, P] and [B, max_probes]
    tokens: jax.Array  # [B, R] the completions so far
    logprobs: jax.Array  # [B, R] of each recorded token, tempered
    forced: jax.Array  # [B, R] recorded by the machine, not sampled
    words: jax.Array  # [B, R, 2] see phases.read_text
    cache: Cache


def empty_state(cfg: qwen.QwenConfig, machine: Machine, lanes: int, capacity: int, dtype) -> RolloutState:
    """A state in which every lane is free; `capacity` tokens fit into each lane's cache."""
    B, R = lanes, machine.max_response
    lane = fresh_lanes(
        jnp.zeros(B, jnp.int32), jnp.zeros(B, jnp.int32), jnp.ones(B, jnp.int32), jnp.zeros(B, jnp.int32)
    )
    return RolloutState(
        lane=lane._replace(phase=jnp.full(B, DONE, jnp.int32)),
        probed=Probed(jnp.zeros((B, machine.max_probe_tokens)), jnp.zeros((B, machine.max_probes))),
        tokens=jnp.zeros((B, R), jnp.int32),
        logprobs=jnp.zeros((B, R)),
        forced=jnp.zeros((B, R), bool),
        words=jnp.zeros((B, R if machine.truncate else 0, 2), jnp.uint32),
        cache=empty_cache(cfg.layers, B, cfg.kv_heads, capacity, cfg.head_dim, dtype),
    )


def fresh_lanes(
    prompt_id: jax.Array, sample_id: jax.Array, prompt_length: jax.Array, last_token: jax.Array
) -> Lane:
    """Lanes at the start of their completions, all arguments `[B]`.

    The cache counts one token less than the prompt: the first step feeds the prompt's last token again, at
    its own position, and so yields the logits of the first completion token like any other step.
    """
    zero = jnp.zeros_like(prompt_id)
    no_hash = zero.astype(jnp.uint32)
    scalars = dict.fromkeys(Lane._fields, zero)
    scalars |= {
        "prompt_id": prompt_id,
        "sample_id": sample_id,
        "phase": zero + THINK,
        "token_in": last_token,
        "kv_length": prompt_length - 1,
        "held_logprob": zero.astype(jnp.float32),
        "exit_logprob": zero.astype(jnp.float32),
        "chunk_hash": no_hash,
        "previous_hash": no_hash,
        "word_hash": no_hash,
        "after_letter": zero.astype(bool),
    }
    return Lane(**scalars)


def refill(
    cfg: qwen.QwenConfig,
    params: qwen.Params,
    state: RolloutState,
    prompts: jax.Array,
    lengths: jax.Array,
    row: jax.Array,
    prompt_id: jax.Array,
    sample_id: jax.Array,
    *,
    attention: Attention = XLA,
) -> RolloutState:
    """Prefills each prompt once and starts a completion of it in every lane that asks for it.

    Args:
        cfg: architecture.
        params: `qwen.decode_params`.
        state: lanes; those with `row >= 0` are overwritten.
        prompts: `[Q, T]` prompts, padded on the right.
        lengths: `[Q]` tokens in each prompt.
        row: `[B]` prompt that a lane takes, -1 for a lane that goes on undisturbed.
        prompt_id: `[B]` identity of that prompt, for randomness.
        sample_id: `[B]` number of the completion within its group.
        attention: the implementation.
    """
    cache = copy_lanes(state.cache, qwen.prefill(params, cfg, prompts, attention), row)
    at = jnp.maximum(row, 0)
    last_token = prompts[at, lengths[at] - 1]
    fresh = fresh_lanes(prompt_id, sample_id, lengths[at], last_token)
    return state._replace(lane=phases.select(row >= 0, fresh, state.lane), cache=cache)


def decode_segment(
    cfg: qwen.QwenConfig,
    machine: Machine,
    params: qwen.Params,
    vocab: Vocabulary,
    run_key: jax.Array,
    state: RolloutState,
    max_steps: jax.Array,
    stop_live: jax.Array,
    *,
    attention: Attention = XLA,
) -> tuple[RolloutState, jax.Array]:
    """Advances all lanes by up to `max_steps` tokens, until at most `stop_live` lanes are not DONE.

    Returns:
        The state, and the number of steps taken, `[1]`: one entry a device where lanes are sharded.
    """

    def go_on(carry):
        step, state = carry
        return (step < max_steps) & (jnp.sum(state.lane.phase != DONE) > stop_live)

    def advance(carry):
        step, state = carry
        return step + 1, decode_step(cfg, machine, params, vocab, run_key, state, attention)

    steps, state = jax.lax.while_loop(go_on, advance, (jnp.int32(0), state))
    return state, steps[None]


def decode_step(
    cfg: qwen.QwenConfig,
    machine: Machine,
    params: qwen.Params,
    vocab: Vocabulary,
    run_key: jax.Array,
    state: RolloutState,
    attention: Attention = XLA,
) -> RolloutState:
    """One token for every lane."""
    lane = state.lane
    logits_BV, cache = qwen.decode(params, cfg, lane.token_in, state.cache, lane.kv_length, attention)
    keys = jax.vmap(sample_key, (None, 0, 0, 0))(run_key, lane.prompt_id, lane.sample_id, lane.length)
    seen = observe(machine, vocab, lane, state.words, logits_BV, keys)
    start = lane.length
    lane = lane._replace(kv_length=lane.kv_length + 1)
    lane, probed, emit = phases.step_lanes(machine, lane, state.probed, seen)
    words = state.words
    if machine.truncate:
        lane, words = phases.read_text(lane, words, vocab, emit, start)
    rows = jnp.arange(start.shape[0])
    at = jnp.where(emit.valid, start, machine.max_response)  # out of range: dropped
    return RolloutState(
        lane=lane,
        probed=probed,
        tokens=state.tokens.at[rows, at].set(emit.token, mode="drop"),
        logprobs=state.logprobs.at[rows, at].set(emit.logprob, mode="drop"),
        forced=state.forced.at[rows, at].set(emit.forced, mode="drop"),
        words=words,
        cache=cache,
    )


def observe(
    machine: Machine,
    vocab: Vocabulary,
    lane: Lane,
    words_BR: jax.Array,
    logits_BV: jax.Array,
    keys_B: jax.Array,
) -> Observation:
    """Everything that the phases may look at, `[B]` each."""
    token = sample(logits_BV, keys_B, temperature=machine.temperature, top_p=machine.top_p)
    normaliser = jax.nn.logsumexp(logits_BV, axis=-1)
    tempered_BV, tempered_normaliser = logits_BV, normaliser
    if machine.temperature not in (0, 1):
        tempered_BV = logits_BV / machine.temperature
        tempered_normaliser = jax.nn.logsumexp(tempered_BV, axis=-1)
    chosen = jnp.take_along_axis(tempered_BV, token[:, None], axis=1)[:, 0]
    nothing = jnp.zeros_like(lane.chunk_hash)
    return Observation(
        token=token.astype(jnp.int32),
        logprob=chosen - tempered_normaliser,
        greedy=jnp.argmax(logits_BV, axis=-1).astype(jnp.int32),
        greedy_logprob=jnp.max(logits_BV, axis=-1) - normaliser,
        closing_logprobs=tempered_BV[:, jnp.array(machine.closing)] - tempered_normaliser[:, None],
        is_trigger=jnp.where(
            lane.after_letter, vocab.trigger_after_letter[token], vocab.trigger_after_other[token]
        ),
        finished_chunk_hash=phases.finished_chunk_hash(lane, words_BR) if machine.truncate else nothing,
    )
