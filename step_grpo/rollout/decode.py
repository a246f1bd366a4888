"""The jitted part of the rollout: lanes advance together, one token a step, whatever their phase."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from step_grpo.model import qwen
from step_grpo.model.attention import XLA, Attention
from step_grpo.model.cache import Cache, copy_lanes, empty_cache, with_capacity
from step_grpo.rollout import phases
from step_grpo.rollout.phases import DONE, THINK, Lane, Machine, Observation, Probed
from step_grpo.rollout.policies import Judge, Look
from step_grpo.rollout.sampling import sample, sample_key
from step_grpo.rollout.triggers import Found, Recent, Vocabulary, nothing_recent

NO_PROBE = -(2**30)  # a place so far back that no gap from it is too small


class RolloutState(NamedTuple):
    """All that the decode loop carries, one pytree."""

    lane: Lane  # leaves [B]
    probed: Probed  # [B, P] and [B, max_probes]
    tokens: jax.Array  # [B, R] the completions so far
    logprobs: jax.Array  # [B, R] of each recorded token, tempered
    forced: jax.Array  # [B, R] recorded by the machine, not sampled
    words: jax.Array  # [B, R, 2] see phases.read_text; [B, 0, 2] in plain sampling
    recent: Recent  # [B, M]
    cache: Cache
    judge_cache: Cache  # of the second model; empty where there is none


class Prefilled(NamedTuple):
    """Prompts that completions can start from, leaves `[Q, ...]`."""

    cache: Cache  # T tokens
    judge_cache: Cache  # likewise, its prefix before the prompt; empty where there is no second model
    length: jax.Array
    last_token: jax.Array


class Taken(NamedTuple):
    """What a segment did, `[1]` each: one entry a device where lanes are sharded."""

    steps: jax.Array
    live_steps: jax.Array  # summed over the lanes that were not DONE


def empty_state(
    cfg: qwen.QwenConfig,
    machine: Machine,
    lanes: int,
    capacity: int,
    dtype,
    reach: int,
    attention: Attention = XLA,
) -> RolloutState:
    """A state in which every lane is free.

    Args:
        cfg: architecture.
        machine: settings of the rollout.
        lanes: their number.
        capacity: tokens that fit into each lane's cache.
        dtype: of the cache.
        reach: `triggers.reach` of the vocabulary.
        attention: that will read the cache.
    """
    B, R = lanes, machine.max_response
    lane = fresh_lanes(
        jnp.zeros(B, jnp.int32), jnp.zeros(B, jnp.int32), jnp.ones(B, jnp.int32), jnp.zeros(B, jnp.int32)
    )
    return RolloutState(
        lane=lane._replace(phase=jnp.full(B, DONE, jnp.int32)),
        probed=Probed(jnp.zeros((B, machine.max_notes)), jnp.zeros((B, machine.max_probes))),
        tokens=jnp.zeros((B, R), jnp.int32),
        logprobs=jnp.zeros((B, R)),
        forced=jnp.zeros((B, R), bool),
        words=jnp.zeros((B, R if machine.truncate else 0, 2), jnp.uint32),
        recent=nothing_recent(B, reach),
        cache=lane_cache(cfg, B, capacity, dtype, attention),
        judge_cache=lane_cache(machine.judge.config, B, capacity, dtype, attention) if machine.judge else (),
    )


def lane_cache(cfg: qwen.QwenConfig, lanes: int, capacity: int, dtype, attention: Attention) -> Cache:
    """An empty cache of a model."""
    sizes = cfg.layers, lanes, cfg.kv_heads, capacity, cfg.head_dim
    return empty_cache(*sizes, dtype, keys_as_columns=attention.keys_as_columns)


def fresh_lanes(
    prompt_id: jax.Array, sample_id: jax.Array, prompt_length: jax.Array, last_token: jax.Array
) -> Lane:
    """Lanes at the start of their completions, all arguments `[B]`; nothing limits their lengths.

    The cache counts one token less than the prompt: the first step feeds the prompt's last token again, at
    its own position, and so yields the logits of the first completion token like any other step.
    """
    zero = jnp.zeros_like(prompt_id)
    no_hash = zero.astype(jnp.uint32)
    scalars = dict.fromkeys(Lane._fields, zero)
    scalars |= {
        "prompt_id": prompt_id,
        "sample_id": sample_id,
        "limit": jnp.full_like(prompt_id, jnp.iinfo(jnp.int32).max),
        "phase": zero + THINK,
        "token_in": last_token,
        "kv_length": prompt_length - 1,
        "held_logprob": zero.astype(jnp.float32),
        "exit_logprob": zero.astype(jnp.float32),
        "chunk_hash": no_hash,
        "previous_hash": no_hash,
        "word_hash": no_hash,
        "last_probe": zero + NO_PROBE,
    }
    return Lane(**scalars)


def prefill(
    cfg: qwen.QwenConfig,
    judge: Judge | None,
    params: qwen.Params,
    judge_params: qwen.Params | None,
    prompts: jax.Array,
    lengths: jax.Array,
    attention: Attention = XLA,
) -> Prefilled:
    """Runs prompts through the model, and behind a prefix of its own through the judge, if there is one.

    Args:
        cfg: architecture.
        judge: the second model.
        params: `qwen.decode_params`.
        judge_params: of the second model.
        prompts: `[Q, T]` prompts, padded on the right.
        lengths: `[Q]` tokens in each prompt.
        attention: the implementation.
    """
    judge_cache: Cache = ()
    if judge and judge_params is not None:
        prefix = jnp.broadcast_to(jnp.array(judge.prefix, jnp.int32), (len(prompts), len(judge.prefix)))
        prefixed = jnp.concatenate([prefix, prompts], axis=1)
        judge_cache = qwen.prefill(judge_params, judge.config, prefixed, attention)
    last = jnp.take_along_axis(prompts, lengths[:, None] - 1, axis=1)[:, 0]
    return Prefilled(qwen.prefill(params, cfg, prompts, attention), judge_cache, lengths, last)


def insert(
    state: RolloutState,
    prefilled: Prefilled,
    row: jax.Array,
    prompt_id: jax.Array,
    sample_id: jax.Array,
    limit: jax.Array,
) -> RolloutState:
    """Starts a completion in every lane that asks for one; the prompt's cache is copied, not made again.

    Args:
        state: lanes; those with `row >= 0` are overwritten.
        prefilled: prompts.
        row: `[B]` prompt that a lane takes, -1 for a lane that goes on undisturbed.
        prompt_id: `[B]` identity of that prompt, for randomness.
        sample_id: `[B]` number of the completion within its group.
        limit: `[B]` tokens that the completion may have.
    """
    at = jnp.maximum(row, 0)
    fresh = fresh_lanes(prompt_id, sample_id, prefilled.length[at], prefilled.last_token[at])
    fresh = fresh._replace(limit=limit)
    return state._replace(
        lane=phases.select(row >= 0, fresh, state.lane),
        cache=copy_lanes(state.cache, prefilled.cache, row),
        judge_cache=copy_lanes(state.judge_cache, prefilled.judge_cache, row),
    )


def resize(state: RolloutState, capacity: int) -> RolloutState:
    """Gives each lane's cache room for `capacity` tokens; a smaller one must hold what is in use."""
    cache, judge_cache = with_capacity(state.cache, capacity), with_capacity(state.judge_cache, capacity)
    return state._replace(cache=cache, judge_cache=judge_cache)


def pack(state: RolloutState, lanes: jax.Array) -> RolloutState:
    """Keeps the lanes `[B']` and forgets the others."""
    return jax.tree.map(lambda x: x[lanes], state)


def move(source: RolloutState, target: RolloutState, row: jax.Array) -> tuple[RolloutState, RolloutState]:
    """Takes lanes out of one state into another whose cache has more room.

    Args:
        source: `[B]` lanes; those that are taken are DONE afterwards.
        target: `[A]` lanes.
        row: `[A]` lane of `source` that a lane of `target` takes, -1 for one that stays as it is.

    Returns:
        The source and the target.
    """

    def take(old, new):
        chosen = (row >= 0).reshape(-1, *[1] * (old.ndim - 1))
        return jnp.where(chosen, new[jnp.maximum(row, 0)], old)

    def bare(state):
        return state._replace(cache=(), judge_cache=())

    moved = jax.tree.map(take, bare(target), bare(source))
    gone = jnp.any(jnp.arange(len(source.lane.phase))[:, None] == row, axis=1)
    lane = source.lane._replace(phase=jnp.where(gone, DONE, source.lane.phase))
    return source._replace(lane=lane), moved._replace(
        cache=copy_lanes(target.cache, source.cache, row),
        judge_cache=copy_lanes(target.judge_cache, source.judge_cache, row),
    )


def decode_segment(
    cfg: qwen.QwenConfig,
    machine: Machine,
    params: qwen.Params,
    vocab: Vocabulary,
    run_key: jax.Array,
    state: RolloutState,
    max_steps: jax.Array,
    stop_live: jax.Array,
    judge_params: qwen.Params | None = None,
    attention: Attention = XLA,
) -> tuple[RolloutState, Taken]:
    """Advances all lanes by up to `max_steps` tokens, until at most `stop_live` `[1]` of them are not DONE.

    Arrays of one entry are one entry a device where lanes are sharded.
    """

    def live(state):
        return jnp.sum(state.lane.phase != DONE)

    def go_on(carry):
        taken, state = carry
        return (taken.steps < max_steps) & (live(state) > stop_live[0])

    def advance(carry):
        taken, state = carry
        taken = Taken(taken.steps + 1, taken.live_steps + live(state))
        return taken, decode_step(cfg, machine, params, vocab, run_key, state, judge_params, attention)

    taken, state = jax.lax.while_loop(go_on, advance, (Taken(jnp.int32(0), jnp.int32(0)), state))
    return state, Taken(taken.steps[None], taken.live_steps[None])


def decode_step(
    cfg: qwen.QwenConfig,
    machine: Machine,
    params: qwen.Params,
    vocab: Vocabulary,
    run_key: jax.Array,
    state: RolloutState,
    judge_params: qwen.Params | None = None,
    attention: Attention = XLA,
) -> RolloutState:
    """One token for every lane."""
    lane = state.lane
    logits_BV, cache = qwen.decode(params, cfg, lane.token_in, state.cache, lane.kv_length, attention)
    asked_BV, judge_cache = logits_BV, state.judge_cache
    if machine.judge and judge_params is not None:
        token, length = phases.judge_input(machine, lane)
        asked_BV, judge_cache = qwen.decode(
            judge_params, machine.judge.config, token, judge_cache, length, attention
        )
    keys = jax.vmap(sample_key, (None, 0, 0, 0, 0))(
        run_key, lane.prompt_id, lane.sample_id, lane.length, lane.drawn
    )
    seen, chunk_hash = observe(machine, vocab, state, logits_BV, asked_BV, keys)
    lane = lane._replace(kv_length=lane.kv_length + 1)
    lane, probed, emit = phases.step_lanes(machine, lane, state.probed, seen)
    position = lane.length - 1  # of the recorded token, if any
    words, recent = state.words, state.recent
    if machine.truncate:
        here = Recent(position, emit.closing_logprob, chunk_hash)
        lane, words, recent = phases.read_text(lane, words, recent, vocab, emit, here)
    if machine.judge:
        lane = phases.read_delimiters(lane, vocab, emit)
    rows = jnp.arange(position.shape[0])
    at = jnp.where(emit.valid, position, machine.max_response)  # out of range: dropped
    return RolloutState(
        lane=lane,
        probed=probed,
        tokens=state.tokens.at[rows, at].set(emit.token, mode="drop"),
        logprobs=state.logprobs.at[rows, at].set(emit.logprob, mode="drop"),
        forced=state.forced.at[rows, at].set(emit.forced, mode="drop"),
        words=words,
        recent=recent,
        cache=cache,
        judge_cache=judge_cache,
    )


def observe(
    machine: Machine,
    vocab: Vocabulary,
    state: RolloutState,
    logits_BV: jax.Array,
    asked_BV: jax.Array,
    keys_B: jax.Array,
) -> tuple[Observation, jax.Array]:
    """Everything that the phases may look at, `[B]` each; and the hash of the chunk if it ended here.

    Log-probs of sampled and forced tokens are those of the whole tempered softmax, whatever top-k, top-p and
    min-p leave of it: they are compared with the trainer's, which knows no such limits.

    Args:
        machine: settings.
        vocab: token tables.
        state: before the step.
        logits_BV: of the model, behind the token just fed.
        asked_BV: of the model that checks ask, the same or the judge.
        keys_B: of the token to sample.
    """
    lane = state.lane
    token = sample(
        logits_BV,
        keys_B,
        temperature=machine.temperature,
        top_k=machine.top_k,
        top_p=machine.top_p,
        min_p=machine.min_p,
    ).astype(jnp.int32)
    normaliser = jax.nn.logsumexp(logits_BV, axis=-1)
    tempered_BV, tempered_normaliser = logits_BV, normaliser
    if machine.temperature not in (0, 1):
        tempered_BV = logits_BV / machine.temperature
        tempered_normaliser = jax.nn.logsumexp(tempered_BV, axis=-1)
    chosen = jnp.take_along_axis(tempered_BV, token[:, None], axis=1)[:, 0]
    closing_logprobs = tempered_BV[:, jnp.array(machine.closing)] - tempered_normaliser[:, None]
    here = Recent(lane.length, closing_logprobs[:, 0], jnp.zeros_like(lane.chunk_hash))
    found = Found(jnp.zeros_like(token, bool), jnp.zeros_like(token, bool), here)
    if machine.truncate:
        here = here._replace(chunk_hash=phases.finished_chunk_hash(lane, state.words))
        found = phases.watch_text(lane, state.recent, vocab, token, here)
    nothing = jnp.zeros_like(token)
    look, is_delimiter = Look(nothing, nothing.astype(jnp.float32)), nothing > 0
    if machine.policy:
        look = machine.policy.look(asked_BV)
    if machine.judge:
        delimiters = vocab.delimiters
        is_delimiter = delimiters.confirms[lane.delimiter_state, delimiters.token_class[token]]
    seen = Observation(
        token=token,
        logprob=chosen - tempered_normaliser,
        look=look,
        closing_logprobs=closing_logprobs,
        is_delimiter=is_delimiter,
        is_trigger=found.confirmed,
        pieces=lane.length - found.begin.position,
        exit_logprob=found.begin.closing_logprob,
        finished_chunk_hash=found.begin.chunk_hash,
        recorded=jnp.take_along_axis(state.tokens, lane.length[:, None], axis=1)[:, 0],
    )
    return seen, here.chunk_hash
