"""The state machine of the truncated rollout: THINK, PROBE, ANSWER, DONE (arXiv 2604.16890, Section 3.2).

Everything here is a pure function of one lane's scalars; `step_lanes` runs it over all lanes at once.
A step receives what the model says after the last token (`Observation`) and decides three things: which
token is recorded in the completion (if any), which token is fed next, and where the cache stands.

A probe is a check of the exit policy (`policies`): it feeds a question behind the text and reads the answer,
without recording anything; when it ends, the lane's length in the cache is set back to where it began. What
it wrote there lies beyond the length, is never read, and is written over. Randomness is folded from the
position in the completion, which a probe does not advance, so a declined probe leaves no trace. An exit goes
back behind tokens that were sampled; what is sampled in their places anew has noise of its own (`drawn`).

Whether a trigger stands is known only when what follows it is: "Wait" may go on as "Waiting". So its tokens
are recorded like any others, and the sampled token that confirms it starts the probe as if it had never been
written: the lane goes back to the place of the trigger's first token, and the confirming token is held. Where
the probe is declined, PUT_BACK feeds the recorded tokens again, for the cache, and then records the held one.
Where it is not, the answer is written over them.

A check by a second model, a judge, begins at a delimiter, which is held until it ends and recorded whatever
its outcome. Meanwhile the lane stands still: it feeds the delimiter again and again, in the same place.
"""

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from step_grpo.rollout.policies import Judge, Look, Policy
from step_grpo.rollout.triggers import Found, Recent, Vocabulary, find_trigger, remember

THINK, PROBE, ANSWER, DONE, PUT_BACK = range(5)

# Why a completion left THINK. `length`: it met its limit while still thinking.
REASONS = ("unfinished", "natural", "early_exit", "budget", "rep", "eos", "length")
UNFINISHED, NATURAL, EARLY_EXIT, BUDGET, REPETITION, EOS, LENGTH = range(len(REASONS))


@dataclass(frozen=True)
class Machine:
    """The static settings of a rollout, in tokens; hashable, so that a change is a new program."""

    policy: Policy | None  # None: plain sampling, no probes, no budgets but the response's
    max_response: int
    think_budget: int
    budget_margin: int
    max_probes: int
    max_repetitions: int
    temperature: float
    top_p: float
    think_end: int
    eos: tuple[int, ...]
    closing: tuple[int, ...]
    top_k: int = 0
    min_p: float = 0.0

    @property
    def truncate(self) -> bool:
        """Whether there is anything but plain sampling."""
        return self.policy is not None

    @property
    def judge(self) -> Judge | None:
        """The second model that checks ask, if there is one."""
        return self.policy.judge if self.policy else None

    @property
    def max_notes(self) -> int:
        """What a check reads at most: `P`."""
        return self.policy.max_notes if self.policy else 0

    @property
    def check_room(self) -> int:
        """Tokens that a check needs in a cache besides prompt and response."""
        if not self.policy:
            return 0
        return self.judge_ahead or len(self.policy.question) + self.policy.max_notes

    @property
    def judge_ahead(self) -> int:
        """Tokens that a judge's cache holds beyond the lane's own, at most: its prefix, and the question."""
        return len(self.judge.prefix) + len(self.policy.question) if self.policy and self.judge else 0


class Lane(NamedTuple):
    """One lane's scalars (with a leading `B` everywhere but inside the phase functions)."""

    prompt_id: jax.Array  # identity for randomness
    sample_id: jax.Array
    limit: jax.Array  # tokens that the completion may have
    phase: jax.Array
    reason: jax.Array
    token_in: jax.Array  # fed at the next step
    kv_length: jax.Array  # tokens in the cache
    length: jax.Array  # tokens recorded in the completion
    queued: jax.Array  # tokens of the phase's forced text already fed or recorded
    probes: jax.Array  # finished probes
    probe_length: jax.Array  # distributions read
    probe_tokens: jax.Array  # steps spent in probes
    last_probe: jax.Array  # where the last one began, a position in the completion
    held: jax.Array  # the token that confirmed the trigger which a probe holds back, or the delimiter
    held_logprob: jax.Array
    pieces: jax.Array  # tokens recorded from the trigger's first on, which stand before the held one
    drawn: jax.Array  # the noise of positions below this one has chosen tokens that an exit discarded
    exit_logprob: jax.Array  # of the first closing token where the trigger began
    resume: jax.Array  # kv_length to return to after the probe
    repetitions: jax.Array
    chunks: jax.Array  # triggers seen
    text_state: jax.Array  # of the automaton that finds triggers, after the recorded text
    delimiter_state: jax.Array  # of the one that finds delimiters
    chunk_start: jax.Array  # position in the completion
    chunk_hash: jax.Array  # sum over the distinct words of the chunk so far
    previous_hash: jax.Array  # of the chunk before
    word_hash: jax.Array  # of the word that is being written


class Observation(NamedTuple):
    """What one lane sees at a step."""

    token: jax.Array  # sampled
    logprob: jax.Array  # of `token`, tempered
    look: Look  # of the exit policy, at the distribution of whom it asks
    closing_logprobs: jax.Array  # `[C]` of the closing tokens, tempered
    is_delimiter: jax.Array  # `token` completes a delimiter
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
    """What one lane's probe has noted, `[P]`, and the scores of those that ended, `[max_probes]`."""

    notes: jax.Array
    confidences: jax.Array


def step_lanes(machine: Machine, lane: Lane, probed: Probed, seen: Observation) -> tuple[Lane, Probed, Emit]:
    """One transition of every lane; all leaves carry a leading `B`."""
    return jax.vmap(partial(step_lane, machine))(lane, probed, seen)


def step_lane(machine: Machine, lane: Lane, probed: Probed, seen: Observation) -> tuple[Lane, Probed, Emit]:
    """One transition of one lane, `lane.kv_length` already counting the token just fed."""
    # Plain sampling never comes to PROBE; `done` keeps its place.
    phases = (
        (think_and_watch, probe, answer, done, put_back) if machine.truncate else (think, done, answer, done)
    )
    branches = [partial(phase, machine) for phase in phases]
    return jax.lax.switch(lane.phase, branches, lane, probed, seen)


def think(machine: Machine, lane: Lane, probed: Probed, seen: Observation):
    """THINK of plain sampling: record the sampled token; the answer follows when the model says so."""
    full = lane.length + 1 >= lane.limit
    reason = first_reason(
        (is_eos(machine, seen.token), EOS), (seen.token == machine.think_end, NATURAL), (full, LENGTH)
    )
    lane = leave_thinking(machine, lane, reason, queued=len(machine.closing))
    lane = lane._replace(
        phase=jnp.where(full | (reason == EOS), DONE, lane.phase), token_in=seen.token, length=lane.length + 1
    )
    return lane, probed, sampled_emit(seen)


def think_and_watch(machine: Machine, lane: Lane, probed: Probed, seen: Observation):
    """THINK of the truncated rollout: a probe where the policy wants one; a trigger counts repetitions."""
    assert machine.policy
    same = (lane.chunks > 0) & (seen.finished_chunk_hash == lane.previous_hash)
    repetitions = lane.repetitions + (seen.is_trigger & same)
    repeating = seen.is_trigger & (repetitions >= machine.max_repetitions)
    at_trigger = lane._replace(
        repetitions=repetitions,
        chunks=lane.chunks + 1,
        previous_hash=seen.finished_chunk_hash,
    )
    lane = select(seen.is_trigger, at_trigger, lane)
    before = lane._replace(length=lane.length - seen.pieces, kv_length=lane.kv_length - seen.pieces)
    since_last = before.length - lane.last_probe
    probing = machine.policy.may_check(seen.is_trigger, seen.is_delimiter, since_last)
    probing &= ~repeating & (lane.probes < machine.max_probes)
    exit_here, exit_emit = begin_answer(
        machine, before, jnp.int32(REPETITION), seen.exit_logprob, seen.pieces
    )
    probe_here = begin_probe(machine, lane, before, seen)
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
    full = lane.length + 1 >= lane.limit
    reason = first_reason(
        (is_eos(machine, emit.token), EOS), (natural, NATURAL), (spent, BUDGET), (full, LENGTH)
    )
    lane = leave_thinking(machine, lane, reason, queued=jnp.where(natural, len(machine.closing), 0))
    lane = lane._replace(
        phase=jnp.where(full | (reason == EOS), DONE, lane.phase),
        token_in=emit.token,
        length=lane.length + 1,
    )
    return lane, emit


def begin_probe(machine: Machine, lane: Lane, before: Lane, seen: Observation) -> Lane:
    """Into PROBE: behind the text `before` the trigger, which is held with all that follows it.

    A judge reads the sampled delimiter first, which stays where it is.
    """
    assert machine.policy
    question = jnp.int32(machine.policy.question[0])
    start, token_in, queued, pieces, exit_logprob = before, question, 1, seen.pieces, seen.exit_logprob
    if machine.judge:
        start, token_in, queued = lane, seen.token, 0
        pieces, exit_logprob = jnp.int32(0), seen.closing_logprobs[0]
    return start._replace(
        phase=jnp.int32(PROBE),
        token_in=token_in,
        queued=jnp.int32(queued),
        probe_length=jnp.int32(0),
        last_probe=start.length,
        held=seen.token,
        held_logprob=seen.logprob,
        pieces=pieces,
        exit_logprob=exit_logprob,
        resume=start.kv_length,
    )


def probe(machine: Machine, lane: Lane, probed: Probed, seen: Observation):
    """PROBE: feed the question, then read the answer; at its end exit, or begin to put back what is held."""
    assert machine.policy
    lane = lane._replace(probe_tokens=lane.probe_tokens + 1)
    question = machine.policy.question
    asking = lane.queued < len(question)
    asked = jnp.array(question)[jnp.minimum(lane.queued, len(question) - 1)]
    notes = probed.notes.at[lane.probe_length].set(seen.look.note)
    length = lane.probe_length + 1
    closed = seen.look.token == machine.think_end
    reading = machine.policy.read(notes, length, closed, closed | is_eos(machine, seen.look.token))
    go_on = lane._replace(
        token_in=jnp.where(asking, asked, seen.look.token),
        queued=lane.queued + asking,
        probe_length=jnp.where(asking, lane.probe_length, length),
    )
    if machine.judge:  # who is fed by `judge_input`
        go_on = go_on._replace(token_in=lane.held, kv_length=lane.resume)

    near_budget = lane.length >= machine.think_budget - machine.budget_margin
    passes = machine.policy.passes(reading.score)
    reason = first_reason((passes, EARLY_EXIT), (near_budget, BUDGET))
    counted = lane._replace(probes=lane.probes + 1, kv_length=lane.resume)
    end_probe = exit_aside if machine.judge else exit_behind
    exited, exit_emit = end_probe(machine, counted, reason)
    declined, put_back_emit = put_back_next(machine, counted, seen.recorded, lane.exit_logprob)

    finished, exits = ~asking & reading.ended, reason != UNFINISHED
    after = select(finished, select(exits, exited, declined), go_on)
    emit = select(exits, exit_emit, put_back_emit)
    probed = Probed(
        notes=jnp.where(asking, probed.notes, notes),
        confidences=jnp.where(
            finished, probed.confidences.at[lane.probes].set(reading.score), probed.confidences
        ),
    )
    return after, probed, emit._replace(valid=emit.valid & finished)


def judge_input(machine: Machine, lane: Lane) -> tuple[jax.Array, jax.Array]:
    """The token that a judge is fed beside the lane's own, `[B]`, and its place in the judge's cache.

    It is the lane's own, behind the judge's prefix; during a check, once the delimiter is fed, the question.
    The judge's length follows from the lane's, so that a check that ends leaves nothing to be undone.
    """
    assert machine.policy and machine.judge
    asked = jnp.where(lane.phase == PROBE, lane.queued, 0)
    question = jnp.array((0, *machine.policy.question))[asked]
    token = jnp.where(asked > 0, question, lane.token_in)
    return token, len(machine.judge.prefix) + lane.kv_length + asked


def exit_behind(machine: Machine, lane: Lane, reason: jax.Array) -> tuple[Lane, Emit]:
    """Out of a check into ANSWER, in place of the held trigger."""
    return begin_answer(machine, lane, reason, lane.exit_logprob, lane.pieces)


def exit_aside(machine: Machine, lane: Lane, reason: jax.Array) -> tuple[Lane, Emit]:
    """Out of a judge's check into ANSWER: the held delimiter is recorded, the closing text follows."""
    full = lane.length + 1 >= lane.limit
    lane = leave_thinking(machine, lane, reason, queued=0)
    lane = lane._replace(phase=jnp.where(full, DONE, lane.phase), token_in=lane.held, length=lane.length + 1)
    emit = Emit(jnp.bool_(True), lane.held, lane.held_logprob, jnp.bool_(False), lane.exit_logprob)
    return lane, emit


def put_back(machine: Machine, lane: Lane, probed: Probed, seen: Observation):
    """PUT_BACK: after a declined probe, feed the recorded tokens again; then record the held one."""
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
    ended = (~closing & is_eos(machine, seen.token)) | (lane.length + 1 >= lane.limit)
    lane = lane._replace(
        phase=jnp.where(ended, DONE, ANSWER),
        token_in=token,
        queued=lane.queued + closing,
        length=lane.length + 1,
    )
    logprob = jnp.where(closing, seen.closing_logprobs[at], seen.logprob)
    return lane, probed, Emit(jnp.bool_(True), token, logprob, closing, seen.closing_logprobs[0])


def done(machine: Machine, lane: Lane, probed: Probed, seen: Observation):
    """DONE: nothing is recorded, and the cache counts as empty, so that kernels read nothing of it."""
    del machine
    lane = lane._replace(kv_length=jnp.zeros_like(lane.kv_length))
    return lane, probed, sampled_emit(seen)._replace(valid=jnp.bool_(False))


def begin_answer(
    machine: Machine, lane: Lane, reason: jax.Array, logprob: jax.Array, pieces: jax.Array
) -> tuple[Lane, Emit]:
    """Into ANSWER in place of a trigger: the first closing token is recorded at once.

    Args:
        machine: settings.
        lane: behind the text before the trigger.
        reason: to leave the thinking.
        logprob: of the closing token.
        pieces: tokens that were recorded from the trigger's first on; they and the one that confirmed it are
            discarded, and with them their noise.
    """
    token = jnp.int32(machine.closing[0])
    lane = lane._replace(
        phase=jnp.where(lane.length + 1 >= lane.limit, DONE, ANSWER),
        reason=reason,
        token_in=token,
        length=lane.length + 1,
        queued=jnp.int32(1),
        drawn=lane.length + pieces + 1,
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


def watch_text(lane: Lane, recent: Recent, vocab: Vocabulary, token_B: jax.Array, here: Recent) -> Found:
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


def read_delimiters(lane: Lane, vocab: Vocabulary, emit: Emit) -> Lane:
    """Updates the automaton that finds delimiters by one recorded token, leaves `[B]`."""
    after = vocab.delimiters.next_state[lane.delimiter_state, vocab.delimiters.token_class[emit.token]]
    return lane._replace(delimiter_state=jnp.where(emit.valid, after, lane.delimiter_state))


def open_chunk(lane: Lane, opens_B: jax.Array, start_B: jax.Array) -> Lane:
    """Begins a new chunk at position `start_B` of the lanes where `opens_B`."""
    no_hash = jnp.zeros_like(lane.chunk_hash)
    fresh = lane._replace(chunk_start=start_B, chunk_hash=no_hash, word_hash=no_hash)
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
