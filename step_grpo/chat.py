"""Watch a model think: its text as it is decoded, and every probe with its tentative answer.

`python -m step_grpo.chat --checkpoint=builtin:tiny`

Each line that is typed is a question of its own, put to the model as in training; with `--question=TEXT` it
is that one, and the program ends. At every trigger the probe of a truncated rollout is shown: its tentative
answer, its confidence, and where early exit would have stopped. The text is that of plain sampling; with
`--truncated` the thinking is cut there, as in a training rollout. Other flags:

--config=FILE       settings of sampling and probes (`config.eval`, `config.rollout`); without it those of the
                    run that made the checkpoint, or the paper's
--temperature=0     in place of config.eval.temperature

The same question is answered as `step_grpo.evaluate` answers it with the same config; asked again, it gets
the next sample. The model runs on one device. Ctrl-C or the end of the input ends the program.
"""

import codecs
import math
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict
from rich.console import Console
from rich.text import Text

from step_grpo import cli
from step_grpo.checkpoint import Opened, open_model
from step_grpo.config import base_config, validate
from step_grpo.data.prompts import encode_prompts
from step_grpo.data.sources import Question
from step_grpo.errors import UserError
from step_grpo.evaluate import EVALUATION_STREAM, decode_ready
from step_grpo.mesh import make_mesh
from step_grpo.model import qwen
from step_grpo.model.attention import Attention, choose_attention
from step_grpo.model.load import Description
from step_grpo.reward.boxes import last_box
from step_grpo.rollout import decode
from step_grpo.rollout.engine import build_machine, identity
from step_grpo.rollout.phases import ANSWER, DONE, PROBE, REASONS, Machine
from step_grpo.rollout.policies import confidence_policy
from step_grpo.rollout.programs import halvings
from step_grpo.rollout.triggers import Vocabulary, build_vocabulary, reach, token_bytes

UNLIMITED = 2**30  # tokens, or chunks that repeat
LEAST_CAPACITY = 256  # tokens in the cache of a completion that begins
CAPACITIES = 4  # sizes of the cache, each twice the one before; a larger one is taken when it is needed
STYLES = {"thinking": "cyan", "answer": "bold", "forced": "magenta"}
UNPRINTABLE = dict.fromkeys((*range(9), *range(11, 32), *range(127, 160)), "\N{REPLACEMENT CHARACTER}")


def main(
    checkpoint: str,
    config: ConfigDict | None = None,
    question: str = "",
    temperature: str = "",
    truncated: bool = False,
) -> None:
    """Answers a question, or one after the other."""
    if config is not None:
        validate(config)
    opened = open_model(checkpoint)
    config = with_temperature(default_config(opened) if config is None else config, temperature)
    talk = Talk(opened.described, opened.params, config, truncated=truncated)
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a model may write what the terminal cannot show
    console = Console(highlight=False, soft_wrap=True)
    if question:
        show(console, talk, question, 0)
        return
    if sys.stdin.isatty():
        styles = Text.assemble(*((f"{part} ", style) for part, style in STYLES.items()))
        console.print(styles, "- a question a line, Ctrl-D to end")
    asked: Counter[str] = Counter()
    try:
        for line in typed(console):
            try:
                show(console, talk, line, asked[line])
            except UserError as error:
                console.print(str(error), style="red", markup=False)
            asked[line] += 1
    except KeyboardInterrupt:
        console.print()


def typed(console: Console) -> Iterator[str]:
    """The lines of the input that are not blank, to its end; asked for where somebody types them."""
    while True:
        try:
            line = console.input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return
        if line:
            yield line


# ---------------------------------------------------------------------- settings


def default_config(opened: Opened) -> ConfigDict:
    """The config of the run that made a checkpoint; else the paper's, cut down to the model's window."""
    config = base_config().copy_and_resolve_references().unlock()
    if opened.settings:
        config.update(opened.settings)
        return config.lock()
    window = opened.described.hf_config.get("max_position_embeddings", UNLIMITED)
    config.rollout.max_prompt_tokens = min(config.rollout.max_prompt_tokens, window // 4)
    config.eval.max_response_tokens = min(config.eval.max_response_tokens, window // 2)
    if jax.default_backend() == "cpu":
        config.model.dtype = "float32"  # no slower there
    return config.lock()


def with_temperature(config: ConfigDict, temperature: str) -> ConfigDict:
    """The config with what `--temperature` says, if anything.

    Raises:
        UserError: it is no number, or below 0.
    """
    if not temperature:
        return config
    config = config.copy_and_resolve_references().unlock()
    try:
        config.eval.temperature = float(temperature)
    except ValueError:
        config.eval.temperature = math.nan
    if not 0 <= config.eval.temperature < math.inf:
        raise UserError(f"--temperature={temperature}: it must be a number, 0 or above")
    return config.lock()


def watching(machine: Machine) -> Machine:
    """The same machine, probing at every trigger and ending the thinking for no reason: plain sampling."""
    assert machine.policy
    return replace(
        machine,
        policy=replace(machine.policy, delta=math.inf),  # type: ignore[type-var]  # a dataclass, as all are
        think_budget=UNLIMITED,
        budget_margin=0,
        max_repetitions=UNLIMITED,
        max_probes=machine.max_response,
    )


# ---------------------------------------------------------------------- decoding


class View(NamedTuple):
    """What the host sees of the lane after a step."""

    phase: int
    reason: int
    length: int  # of the completion
    token: int  # the last one of it
    forced: bool
    kv_length: int
    probes: int  # that have ended
    confidence: float  # of the last one
    probe_length: int
    queued: int
    token_in: int  # fed next


class Talk:
    """A model in one lane, advanced a token at a time by the rollout's own step."""

    def __init__(
        self, described: Description, params: qwen.Params, config: ConfigDict, *, truncated: bool = False
    ):
        """Compiles nothing yet.

        Args:
            described: the model but its weights.
            params: its weights, on one device.
            config: `eval` says how it samples, `rollout` how it is probed.
            truncated: end the thinking as a rollout does.
        """
        tokenizer, rollout, of_eval = described.tokenizer, config.rollout, config.eval
        self.described, self.config, self.truncated = described, config, truncated
        dtype = config.model.dtype
        policy = replace(confidence_policy(rollout, tokenizer, dtype).policy, early_abort=False)  # type: ignore
        sampling = {name: of_eval[name] for name in ("temperature", "top_k", "top_p", "min_p")}
        machine = build_machine(described, rollout, policy, of_eval.max_response_tokens, sampling)
        self.machine = machine if truncated else watching(machine)
        self.texts = token_bytes(tokenizer, described.config.vocab_size)
        self.vocab = build_vocabulary(self.texts, tuple(rollout.triggers))
        self.reach = reach(self.vocab.triggers)
        self.key = jax.random.fold_in(jax.random.key(config.seed), EVALUATION_STREAM)
        alone = make_mesh(data=1, devices=jax.devices()[:1])
        self.params = decode_ready(params, described.config, dtype, alone)
        attention = choose_attention(config.model.attention, alone)
        self.widths = halvings(rollout.max_prompt_tokens, 3, 32, 32)
        longest = rollout.max_prompt_tokens + self.machine.max_response + self.machine.check_room
        self.capacities = halvings(longest, CAPACITIES, max(LEAST_CAPACITY, self.widths[-1]), 64)
        cfg = described.config
        cache = jnp.dtype(rollout.cache_dtype or dtype)
        empty = partial(
            decode.empty_state, cfg, self.machine, 1, self.capacities[0], cache, self.reach, attention
        )
        self._prefill = jax.jit(partial(decode.prefill, cfg, None, attention=attention))
        self._start = jax.jit(lambda *arguments: decode.insert(empty(), *arguments))
        self._resize = jax.jit(decode.resize, static_argnums=1)
        self._step = jax.jit(partial(step, cfg, self.machine, attention), donate_argnums=3)

    def prompt(self, question: str) -> tuple[int, ...]:
        """The tokens that ask a question.

        Raises:
            UserError: it is too long.
        """
        most = self.config.rollout.max_prompt_tokens
        instruction = self.config.eval.data.instruction
        found = encode_prompts(
            self.described.tokenizer,
            [Question("", question, "")],
            instruction=instruction,
            max_prompt_tokens=most,
        )
        if not found.kept:
            raise UserError(f"the question is longer than config.rollout.max_prompt_tokens, {most}")
        return found.kept[0].ids

    def views(self, prompt: Sequence[int], sample: int) -> Iterator[View]:
        """Decodes a completion; what the lane looks like after each step.

        Args:
            prompt: token ids.
            sample: number of the completion, for randomness.
        """
        width = next(w for w in self.widths if w >= len(prompt))
        tokens = np.zeros((1, width), np.int32)
        tokens[0, : len(prompt)] = prompt
        prefilled = self._prefill(self.params, None, tokens, np.array([len(prompt)], np.int32))
        lane = (0, identity(prompt), sample, self.machine.max_response)
        state = self._start(prefilled, *(np.array([number], np.int32) for number in lane))
        capacities, kv_length = list(self.capacities), len(prompt)
        while True:
            if kv_length >= capacities[0] and len(capacities) > 1:
                del capacities[0]
                state = self._resize(state, capacities[0])
            state, view = self._step(self.params, self.vocab, self.key, state)
            view = View(*(value.item() for value in jax.device_get(view)))
            kv_length = view.kv_length
            yield view
            if view.phase == DONE:
                return

    def __call__(self, question: str, sample: int = 0) -> Iterator["Piece | Probe | End"]:
        """Answers a question, as it happens."""
        assert self.machine.policy
        views = self.views(self.prompt(question), sample)
        stops = self.described.eos_ids, self.machine.think_end
        return events(views, self.texts, self.reach, len(self.machine.policy.question), *stops)


def step(
    cfg: qwen.QwenConfig,
    machine: Machine,
    attention: Attention,
    params: qwen.Params,
    vocab: Vocabulary,
    run_key: jax.Array,
    state: decode.RolloutState,
) -> tuple[decode.RolloutState, View]:
    """`decode.decode_step` of a single lane, and what the host wants to know of it."""
    state = decode.decode_step(cfg, machine, params, vocab, run_key, state, attention=attention)
    lane = jax.tree.map(lambda x: x[0], state.lane)
    last = jnp.maximum(lane.length - 1, 0)
    seen: dict[str, Any] = {
        "phase": lane.phase,
        "reason": lane.reason,
        "length": lane.length,
        "token": state.tokens[0, last],
        "forced": state.forced[0, last],
        "kv_length": lane.kv_length,
        "probes": lane.probes,
        "confidence": state.probed.confidences[0, jnp.maximum(lane.probes - 1, 0)],
        "probe_length": lane.probe_length,
        "queued": lane.queued,
        "token_in": lane.token_in,
    }
    return state, View(**seen)


# ---------------------------------------------------------------------- what is to be shown


@dataclass(frozen=True)
class Piece:
    """A token of the completion."""

    token: int
    text: str  # empty for EOS, and for all but the last of the tokens that share a character
    part: str  # a key of `STYLES`


@dataclass(frozen=True)
class Probe:
    """A probe that has ended."""

    position: int  # tokens of the completion before it
    confidence: float
    text: str  # the tentative answer, without the token that ended it


@dataclass(frozen=True)
class End:
    """The completion is complete."""

    reason: str  # why the thinking ended, one of `phases.REASONS`


def events(
    views: Iterable[View],
    texts: Sequence[bytes],
    reach: int,
    question: int,
    eos: Sequence[int],
    think_end: int,
) -> Iterator[Piece | Probe | End]:
    """Turns what a lane does into what is to be shown, in the order of the text.

    While thinking, the last tokens may turn out to be a trigger, which a probe holds back: they are shown
    once this is no longer possible.

    Args:
        views: after each step.
        texts: bytes of each token.
        reach: bytes between the beginning of a trigger and the token that confirms it, at most.
        question: tokens of the inducing prompt.
        eos: tokens that end a completion.
        think_end: `</think>`.
    """
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    written: list[tuple[int, bool]] = []  # tokens, and whether they were forced
    shown = position = probes = 0
    tentative: list[int] = []
    part = "thinking"
    for view in views:
        if view.probes > probes:
            probes = view.probes
            answer = b"".join(texts[token] for token in tentative).decode("utf-8", "replace")
            yield Probe(position, view.confidence, answer)
        if view.phase == PROBE:
            if not view.probe_length:
                position, tentative = view.length, []
            elif view.queued == question:
                tentative.append(view.token_in)
        del written[view.length :]
        if view.length > len(written):
            written.append((view.token, view.forced))
        end = len(written)
        if view.phase not in (PROBE, ANSWER, DONE):
            end = shown + settled([token for token, _ in written[shown:]], texts, reach)
        for token, forced in written[shown:end]:
            text = "" if token in eos else decoder.decode(texts[token])
            yield Piece(token, text, "forced" if forced else part)
            part = "answer" if forced or token == think_end else part
        shown = max(shown, end)
    yield End(REASONS[view.reason])


def settled(tokens: Sequence[int], texts: Sequence[bytes], reach: int) -> int:
    """How many of the last tokens of a thinking are not among its last `reach` bytes."""
    count = len(tokens)
    while count and reach > 0:
        count -= 1
        reach -= len(texts[tokens[count]])
    return count


def show(console: Console, talk: Talk, question: str, sample: int) -> None:
    """Prints an answer as it is made, its probes, and what early exit saves or would have saved.

    Raises:
        UserError: the question is too long.
    """
    rollout = talk.config.rollout
    counts: Counter[str] = Counter()
    probes, stopped = 0, None
    for event in talk(question, sample):
        if isinstance(event, Piece):
            counts[event.part] += 1
            say(console, event.text, STYLES[event.part])
        elif isinstance(event, Probe):
            probes += 1
            passes = event.confidence > rollout.delta and probes <= rollout.max_probes
            told = f"probe: {tentative_answer(rollout.inducing_prompt, event)}, {event.confidence:.3f}"
            if passes and stopped is None:
                stopped = event.position
                told += ", stops here" if talk.truncated else ", would stop here"
            say(console, f"[{told}] ", "black on green" if passes else "black on yellow")
        else:
            line = summary(counts, probes, stopped, event.reason, talk.truncated)
            console.print(f"\n\n{line}", style="dim")


def say(console: Console, text: str, style: str) -> None:
    """Prints a part of a line, without what would control the terminal."""
    console.print(Text(text.translate(UNPRINTABLE), style), end="")


def tentative_answer(inducing_prompt: str, probe: Probe) -> str:
    """The content of the box that a probe filled in; all it said where none was closed."""
    box = last_box(inducing_prompt + probe.text)
    return " ".join((probe.text if box is None else box).split())


def summary(counts: Counter[str], probes: int, stopped: int | None, reason: str, truncated: bool) -> str:
    """A line about a completion.

    Args:
        counts: tokens of each part.
        probes: their number.
        stopped: tokens of the thinking before the first probe that passes; None if none does.
        reason: why the thinking ended.
        truncated: it was cut at that probe.
    """
    thought = counts["thinking"]
    line = f"{thought} tokens of thinking ({reason}), {counts['answer']} of answer, {probes} probes"
    if stopped is not None and not truncated:
        line += f"; early exit would have left out {thought - stopped} of {thought}"
    return line


if __name__ == "__main__":
    cli.run(main)
