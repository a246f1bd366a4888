"""The state machine of the truncated rollout: THINK, PROBE, ANSWER, DONE (arXiv 2604.16890, Section 3.2).

Everything here is a pure function of one lane's scalars; `step_lanes` runs it over all lanes at once.
A step receives what the model says after the last token (`Observation`) and decides three things: which
token is recorded in the completion (if any), which token is fed next, and where the cache stands.

A probe feeds the inducing prompt and decodes greedily behind the text, without recording anything; when it
ends, the lane's length in the cache is set back to where the probe began. What the probe wrote there lies
beyond the length, is never read, and is written over. Randomness is folded from the position in the
completion, which a probe does not advance, so a declined probe leaves no trace.

Whether a trigger stands is known only when what follows it is: "Wait" may go on as "Waiting". So its tokens
are recorded like any others, and the sampled token that confirms it starts the probe as if it had never been
written: the lane goes back to the place of the trigger's first token, and the confirming token is held. Where
the probe is declined, PUT_BACK feeds the recorded tokens again, for the cache, and then records the held one.
Where it is not, the answer is written over them.
"""

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from step_grpo.rollout.exits import probe_confidence, probe_is_hopeless
from step_grpo.rollout.triggers import Found, Recent, Vocabulary, find_trigger, remember

THINK, PROBE, ANSWER, DONE, PUT_BACK = range(5)

# Why a completion left THINK. `length`: plain sampling met the response budget while still thinking.
REASONS = ("unfinished", "natural", "early_exit", "budget", "rep", "eos", "length")
UNFINISHED, NATURAL, EARLY_EXIT, BUDGET, REPETITION, EOS, LENGTH = range(len(REASONS))


@dataclass(frozen=True)
class Machine:
    """The static settings of a rollout, in tokens; hashable, so that a change is a new program."""

    truncate: bool  # False: plain sampling, no probes, no budgets but the response's
    max_response: int
    think_budget: int
    budget_margin: int
    max_probes: int
    max_probe_tokens: int
    max_repetitions: int
    delta: float
    strict: bool
    early_abort: bool  # end a probe once it cannot exit any more; decides alike, in fewer steps
    temperature: float
    top_p: float
    think_end: int
    eos: tuple[int, ...]
    inducing: tuple[int, ...]
    closing: tuple[int, ...]


class Lane(NamedTuple):
    """One lane's scalars (with a leading `B` everywhere but inside the phase functions)."""

    prompt_id: jax.Array  # identity for randomness
    sample_id: jax.Array
    phase: jax.Array
    reason: jax.Array
    token_in: jax.Array  # fed at the next step
    kv_length: jax.Array  # tokens in the cache
    length: jax.Array  # tokens recorded in the completion
    queued: jax.Array  # tokens of the phase's forced text already fed or recorded
    probes: jax.Array  # finished probes
    probe_length: jax.Array
    probe_tokens: jax.Array  # steps spent in probes
    held: jax.Array  # the token that confirmed the trigger which a probe holds back
    held_logprob: jax.Array
    pieces: jax.Array  # tokens recorded from the trigger's first on, which stand before the held one
    exit_logprob: jax.Array  # of the first closing token where the trigger began
    resume: jax.Array  # kv_length to return to after the probe
    repetitions: jax.Array
    chunks: jax.Array  # triggers seen
    text_state: jax.Array  # of the automaton that finds triggers, after the recorded text
    chunk_start: jax.Array  # position in the completion
    chunk_hash: jax.Array  # sum over the distinct words of the chunk so far
    previous_hash: jax.Array  # of the chunk before
    word_hash: jax.Array  # of the word that is being written


class Observation(NamedTuple):
    """What one lane sees at a step."""

    token: jax.Array  # sampled
    logprob: jax.Array  # of `token`, tempered
    greedy: jax.Array  # most probable token
    greedy_logprob: jax.Array  # its log-prob, untempered
    closing_logprobs: jax.Array  # `[C]` of the closing tokens, tempered
    is_trigger: jax.Array  # `token` shows that a trigger stands, in the text before it or in its own
    pieces: jax.Array  # tokens recorded since that trigger began
    exit_logprob: jax.Array  # of the first closing token where it began, tempered
    finished_chunk_hash: jax.Array  # the chunk's word set if it ended there
    recorded: jax.Array  # the token that stands in the place of `token` already, in PUT_BACK


class Emit(NamedTuple):
    """What one lane records at a step."""

    valid: jax.Array
    token: jax.Array
    logprob: jax.Array
    forced: jax.Array  # put in by the machine
    closing_logprob: jax.Array  # of the first closing token in its place, tempered


class Probed(NamedTuple):
    """What one lane's probe has seen: `[P]` top-1 log-probs, and `[max_probes]` confidences."""

    top1_logprobs: jax.Array
    confidences: jax.Array


def step_lanes(machine: Machine, lane: Lane, probed: Probed, seen: Observation) -> tuple[Lane, Probed, Emit]:
    """One transition of every lane; all leaves carry a leading `B`."""
    return jax.vmap(partial(step_lane, machine))(lane, probed, seen)


def step_lane(machine: Machine, lane: Lane, probed: Probed, seen: Observation) -> tuple[Lane, Probed, Emit]:
    """One transition of one lane, `lane.kv_length` already counting the token just fed."""
    phases = (think_and_watch if machine.truncate else think, probe, answer, done, put_back)
    branches = [partial(phase, machine) for phase in phases]
    return jax.lax.switch(lane.phase, branches, lane, probed, seen)


def think(machine: Machine, lane: Lane, probed: Probed, seen: Observation):
    """THINK of plain sampling: record the sampled token; the answer follows when the model says so."""
    full = lane.length + 1 >= machine.max_response
    reason = first_reason(
        (is_eos(machine, seen.token), EOS), (seen.token == machine.think_end, NATURAL), (full, LENGTH)
    )
    lane = leave_thinking(machine, lane, reason, queued=len(machine.closing))
    lane = lane._replace(
        phase=jnp.where(full | (reason == EOS), DONE, lane.phase), token_in=seen.token, length=lane.length + 1
    )
    return lane, probed, sampled_emit(seen)


def think_and_watch(machine: Machine, lane: Lane, probed: Probed, seen: Observation):
    """THINK of the truncated rollout: a trigger starts a probe or counts as a repetition."""
    same = (lane.chunks > 0) & (seen.finished_chunk_hash == lane.previous_hash)
    repetitions = lane.repetitions + (seen.is_trigger & same)
    repeating = seen.is_trigger & (repetitions >= machine.max_repetitions)
    probing = seen.is_trigger & ~repeating & (lane.probes < machine.max_probes)

    at_trigger = lane._replace(
        repetitions=repetitions,
        chunks=lane.chunks + 1,
        previous_hash=seen.finished_chunk_hash,
    )
    lane = select(seen.is_trigger, at_trigger, lane)
    before = lane._replace(length=lane.length - seen.pieces, kv_length=lane.kv_length - seen.pieces)
    exit_here, exit_emit = begin_answer(
        machine, before, jnp.int32(REPETITION), seen.exit_logprob, before.kv_length
    )
    probe_here = before._replace(
        phase=jnp.int32(PROBE),
        token_in=jnp.int32(machine.inducing[0]),
        queued=jnp.int32(1),
        probe_length=jnp.int32(0),
        held=seen.token,
        held_logprob=seen.logprob,
        pieces=seen.pieces,
        exit_logprob=seen.exit_logprob,
        resume=before.kv_length,
    )
    go_on, emit = record_thought(machine, lane, sampled_emit(seen))
    return (
        select(repeating, exit_here, select(probing, probe_here, go_on)),
        probed,
        select(repeating, exit_emit, emit._replace(valid=~probing)),
    )


def record_thought(machine: Machine, lane: Lane, emit: Emit) -> tuple[Lane, Emit]:
    """Records a token of the thinking, and leaves THINK if it is the last one."""
    spent = lane.length + 1 >= machine.think_budget
    natural = emit.token == machine.think_end
    reason = first_reason((is_eos(machine, emit.token), EOS), (natural, NATURAL), (spent, BUDGET))
    lane = leave_thinking(machine, lane, reason, queued=jnp.where(natural, len(machine.closing), 0))
    lane = lane._replace(
        phase=jnp.where(reason == EOS, DONE, lane.phase), token_in=emit.token, length=lane.length + 1
    )
    return lane, emit


def probe(machine: Machine, lane: Lane, probed: Probed, seen: Observation):
    """PROBE: feed the inducing prompt, then the greedy answer; at its end exit, or begin to put the trigger back."""
    lane = lane._replace(probe_tokens=lane.probe_tokens + 1)
    inducing = lane.queued < len(machine.inducing)
    induce = lane._replace(
        token_in=jnp.array(machine.inducing)[jnp.minimum(lane.queued, len(machine.inducing) - 1)],
        queued=lane.queued + 1,
    )
    top1_logprobs = probed.top1_logprobs.at[lane.probe_length].set(seen.greedy_logprob)
    length = lane.probe_length + 1
    closed = seen.greedy == machine.think_end
    confidence = probe_confidence(top1_logprobs, length, closed, strict=machine.strict)
    ended = closed | is_eos(machine, seen.greedy) | (length >= machine.max_probe_tokens)
    if machine.early_abort:
        hopeless = ~ended & probe_is_hopeless(top1_logprobs, length, delta=machine.delta)
        # What the answer so far would score; never above delta. How it would have ended is not known.
        so_far = probe_confidence(top1_logprobs, length, closed, strict=False)
        confidence, ended = jnp.where(hopeless, so_far, confidence), ended | hopeless
    decoding = lane._replace(token_in=seen.greedy, probe_length=length)

    near_budget = lane.length >= machine.think_budget - machine.budget_margin
    reason = first_reason((confidence > machine.delta, EARLY_EXIT), (near_budget, BUDGET))
    counted = lane._replace(probes=lane.probes + 1)
    exited, exit_emit = begin_answer(machine, counted, reason, lane.exit_logprob, lane.resume)
    declined, put_back_emit = put_back_next(
        machine, counted._replace(kv_length=lane.resume), seen.recorded, lane.exit_logprob
    )
    nothing = put_back_emit._replace(valid=jnp.bool_(False))

    exits = reason != UNFINISHED
    after = select(inducing, induce, select(~ended, decoding, select(exits, exited, declined)))
    emit = select(inducing | ~ended, nothing, select(exits, exit_emit, put_back_emit))
    finished = ~inducing & ended
    probed = Probed(
        top1_logprobs=jnp.where(inducing, probed.top1_logprobs, top1_logprobs),
        confidences=jnp.where(
            finished, probed.confidences.at[lane.probes].set(confidence), probed.confidences
        ),
    )
    return after, probed, emit


def put_back(machine: Machine, lane: Lane, probed: Probed, seen: Observation):
    """PUT_BACK: after a declined probe, feed the trigger's recorded tokens again; then record the held one."""
    lane = lane._replace(probe_tokens=lane.probe_tokens + 1)
    lane, emit = put_back_next(machine, lane, seen.recorded, seen.closing_logprobs[0])
    return lane, probed, emit


def put_back_next(
    machine: Machine, lane: Lane, recorded: jax.Array, closing_logprob: jax.Array
) -> tuple[Lane, Emit]:
    """The next token that a probe held back: one that is recorded already, or at last the held one."""
    again = lane._replace(
        phase=jnp.int32(PUT_BACK), token_in=recorded, length=lane.length + 1, pieces=lane.pieces - 1
    )
    held = Emit(jnp.bool_(True), lane.held, lane.held_logprob, jnp.bool_(False), closing_logprob)
    last, emit = record_thought(machine, lane, held)
    more = lane.pieces > 0
    return select(more, again, last), emit._replace(valid=~more)


def answer(machine: Machine, lane: Lane, probed: Probed, seen: Observation):
    """ANSWER: record what is left of the closing text, then sample to the end."""
    closing = lane.queued < len(machine.closing)
    at = jnp.minimum(lane.queued, len(machine.closing) - 1)
    token = jnp.where(closing, jnp.array(machine.closing)[at], seen.token)
    ended = (~closing & is_eos(machine, seen.token)) | (lane.length + 1 >= machine.max_response)
    lane = lane._replace(
        phase=jnp.where(ended, DONE, ANSWER),
        token_in=token,
        queued=lane.queued + closing,
        length=lane.length + 1,
    )
    logprob = jnp.where(closing, seen.closing_logprobs[at], seen.logprob)
    return lane, probed, Emit(jnp.bool_(True), token, logprob, closing, seen.closing_logprobs[0])


def done(machine: Machine, lane: Lane, probed: Probed, seen: Observation):
    """DONE: nothing is recorded; the cache does not grow."""
    del machine
    lane = lane._replace(kv_length=lane.kv_length - 1)
    return lane, probed, sampled_emit(seen)._replace(valid=jnp.bool_(False))


def begin_answer(
    machine: Machine, lane: Lane, reason: jax.Array, logprob: jax.Array, kv_length: jax.Array
) -> tuple[Lane, Emit]:
    """Into ANSWER in place of a trigger: the first closing token is recorded at once."""
    token = jnp.int32(machine.closing[0])
    lane = lane._replace(
        phase=jnp.int32(ANSWER),
        reason=reason,
        token_in=token,
        kv_length=kv_length,
        length=lane.length + 1,
        queued=jnp.int32(1),
    )
    return lane, Emit(jnp.bool_(True), token, logprob, jnp.bool_(True), logprob)


def leave_thinking(machine: Machine, lane: Lane, reason: jax.Array, queued) -> Lane:
    """Into ANSWER if there is a reason to; `queued` closing tokens count as written already."""
    del machine
    leaves = reason != UNFINISHED
    return lane._replace(
        phase=jnp.where(leaves, ANSWER, THINK), reason=reason, queued=jnp.where(leaves, queued, lane.queued)
    )


def first_reason(*cases: tuple[jax.Array, int]) -> jax.Array:
    """The reason of the first case that holds, else UNFINISHED."""
    return jnp.select([case for case, _ in cases], [jnp.int32(r) for _, r in cases], jnp.int32(UNFINISHED))


def is_eos(machine: Machine, token: jax.Array) -> jax.Array:
    """Whether `token` is any of the end tokens."""
    return jnp.isin(token, jnp.array(machine.eos))


def sampled_emit(seen: Observation) -> Emit:
    """Records the sampled token."""
    return Emit(jnp.bool_(True), seen.token, seen.logprob, jnp.bool_(False), seen.closing_logprobs[0])


def select(condition: jax.Array, chosen, other):
    """`jnp.where` over two trees of one lane's values."""
    return jax.tree.map(partial(jnp.where, condition), chosen, other)


def watch_text(
    lane: Lane, recent: Recent, vocab: Vocabulary, token_B: jax.Array, here: Recent
) -> Found:
    """The trigger that a token would confirm behind each lane's text; `here` is what the token meets, `[B]`.

    A chunk that is over before it began, because the trigger begins in the last token of the one before, is
    empty like one of no token.
    """
    found = find_trigger(vocab.triggers, recent, lane.text_state, token_B, here)
    begin = found.begin
    chunk_hash = jnp.where(begin.position > lane.chunk_start, begin.chunk_hash, mix(jnp.uint32(0)))
    return found._replace(begin=begin._replace(chunk_hash=chunk_hash))


def read_text(
    lane: Lane, words_BR: jax.Array, recent: Recent, vocab: Vocabulary, emit: Emit, here: Recent
) -> tuple[Lane, jax.Array, Recent]:
    """Updates what a lane knows of its own text by one recorded token: words, chunk, triggers.

    Two chunks hold the same set of space-separated words exactly when the sums over their distinct words'
    mixed hashes agree (up to a chance of about 2**-32). A word counts when it is first met in its chunk,
    which is looked up among the words that ended at each position of it. A chunk begins behind the last
    token of a trigger, and ends before the first one of the next.

    Args:
        lane: after the transition, leaves `[B]`.
        words_BR: `[B, R, 2]` hashes of the words that ended at each position (0: none).
        recent: of the text before the token.
        vocab: token tables.
        emit: what was recorded, leaves `[B]`.
        here: what the token met, `[B]`; its position is that of the recorded token.

    Returns:
        The lane, the words and the memory after the token.
    """
    token, start = emit.token, here.position
    found = find_trigger(vocab.triggers, recent, lane.text_state, token, here)
    opens = emit.valid & found.confirmed
    lane = open_chunk(lane, opens & found.ends_before, start)
    opens_after = opens & ~found.ends_before
    spaced = emit.valid & ~opens_after & vocab.has_space[token]
    joined = lane.word_hash * vocab.prefix_power[token] + vocab.prefix_hash[token]
    prefix = mix(joined)
    inside = mix(vocab.inside_hash[token])
    has_inside = spaced & vocab.has_inside[token] & (inside != prefix)
    total = lane.chunk_hash
    total += jnp.where(spaced & is_new(lane, words_BR, prefix, start), prefix, jnp.uint32(0))
    total += jnp.where(has_inside & is_new(lane, words_BR, inside, start), inside, jnp.uint32(0))
    ended = jnp.stack([jnp.where(spaced, prefix, 0), jnp.where(has_inside, inside, 0)], axis=-1)
    rows = jnp.arange(words_BR.shape[0])
    at = jnp.where(emit.valid, start, words_BR.shape[1])
    words_BR = words_BR.at[rows, at].set(ended, mode="drop")
    word = jnp.where(vocab.has_space[token], vocab.suffix_hash[token], joined)
    after = vocab.triggers.next_state[lane.text_state, vocab.triggers.token_class[token]]
    lane = lane._replace(
        chunk_hash=total,
        word_hash=jnp.where(emit.valid, word, lane.word_hash),
        text_state=jnp.where(emit.valid, after, lane.text_state),
    )
    recent = remember(recent, jnp.where(emit.valid, vocab.size[token], 0), here)
    return open_chunk(lane, opens_after, start + 1), words_BR, recent


def open_chunk(lane: Lane, opens_B: jax.Array, start_B: jax.Array) -> Lane:
    """Begins a new chunk at position `start_B` of the lanes where `opens_B`."""
    fresh = lane._replace(
        chunk_start=start_B, chunk_hash=jnp.zeros_like(lane.chunk_hash), word_hash=jnp.zeros_like(lane.word_hash)
    )
    return select(opens_B, fresh, lane)


def finished_chunk_hash(lane: Lane, words_BR: jax.Array) -> jax.Array:
    """`[B]` hash of the word set of each lane's chunk if it ended now, its last word included."""
    last = mix(lane.word_hash)
    return lane.chunk_hash + jnp.where(is_new(lane, words_BR, last, lane.length), last, jnp.uint32(0))


def is_new(lane: Lane, words_BR: jax.Array, word_B: jax.Array, end_B: jax.Array) -> jax.Array:
    """`[B]` whether a word has not ended in the lane's chunk before position `end_B`."""
    at_R = jnp.arange(words_BR.shape[1])
    inside = (at_R >= lane.chunk_start[:, None]) & (at_R < end_B[:, None])
    return ~jnp.any((words_BR == word_B[:, None, None]).any(-1) & inside, axis=1)


def mix(value: jax.Array) -> jax.Array:
    """Scrambles a polynomial hash so that sums of hashes stay distinct; never 0."""
    value = (value ^ (value >> 16)) * jnp.uint32(0x7FEB352D)
    value = (value ^ (value >> 15)) * jnp.uint32(0x846CA68B)
    return jnp.maximum(value ^ (value >> 16), jnp.uint32(1))
