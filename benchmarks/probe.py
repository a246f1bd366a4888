"""What probes cost: with and without the early abort, and the machine when no trigger fires.

`python -m benchmarks.probe` runs plain rollouts of the built-in tiny model against the same ones under a
machine whose triggers never fire, and then truncated rollouts until 10,000 probes are done, once with the
early abort and once without. The last line is one JSON object:

- `probe_tokens_saved`: share of all that is fed for declined probes that the early abort saves: the inducing
  prompt, the tentative answer, and the trigger that is put back;
- `answer_tokens_saved`: the same, of the tentative answers alone, which are all that is decoded: no abort can
  save the others, for a probe begins with the one and goes on with the other, whatever it finds;
- `forced_tokens`: those others;
- `exits_equal`: every completion is the same, token for token, and ends its thinking for the same reason;
- `machine_overhead`: extra time of the machine over plain sampling of the same tokens, median over pairs, and
  `machine_overhead_cpu`, extra CPU time, which other programs on the machine disturb less.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from benchmarks.timing import Rates, conditions, interleave, plain
from benchmarks.workload import Workload, count_tokens, make_engine, tiny_config, tiny_workload
from step_grpo.mesh import use_all_cores
from step_grpo.reward.steps import trigger_pattern
from step_grpo.rollout.engine import Completion, RolloutEngine, build_engine
from step_grpo.rollout.triggers import token_bytes

KEY = 7


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs the benchmark and prints its figures; returns the JSON object."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.probe", description=__doc__)
    parser.add_argument("--probes", type=int, default=10_000)
    parser.add_argument("--samples", type=int, default=5, help="completions a prompt")
    parser.add_argument("--lanes", type=int, default=128)
    parser.add_argument("--longest", type=int, default=256, help="tokens of a truncated completion")
    parser.add_argument("--tokens", type=int, default=128, help="of the longest completion in the timing")
    parser.add_argument("--repeats", type=int, default=9, help="counted pairs of the timing")
    args = parser.parse_args(argv)
    use_all_cores()
    unwatched, watched = plain_and_machine(args.lanes, args.tokens, args.repeats)
    wall, cpu = unwatched.over(watched), unwatched.cpu_over(watched)
    print(f"time of the machine with no trigger firing / plain: {wall}, CPU {cpu}")
    result = early_abort(args.probes, args.samples, args.lanes, args.longest)
    result = plain(
        {
            **result,
            "machine_overhead": wall.median - 1,
            "machine_overhead_cpu": cpu.median - 1,
            "machine_over_plain": wall,
            "machine_over_plain_cpu": cpu,
            "settings": {**vars(args), **conditions()},
        }
    )
    print(json.dumps(result))
    return result


# ---------------------------------------------------------------------- the early abort


def early_abort(probes: int, samples: int, lanes: int, longest: int) -> dict[str, Any]:
    """Truncated rollouts with and without the early abort, on as many prompts as make `probes` probes."""
    work = tiny_workload(min(10_000, 4 * probes), tiny_config(lanes, longest))
    quick = make_engine(work, truncate=True)
    full = make_engine(replace(work, config=tiny_config(lanes, longest, early_abort=False)), truncate=True)
    with_abort: list[Completion] = []
    without: list[Completion] = []
    start, step = 0, -(-probes // samples)  # about one probe a completion
    while count_probes(without) < probes:
        prompts = work.prompts[start : start + step]
        if not prompts:
            raise ValueError(f"{len(work.prompts)} prompts made fewer than {probes} probes; ask for fewer")
        start, step = start + step, -(-step // 8)
        with_abort += run(quick, work, prompts, samples)
        without += run(full, work, prompts, samples)
    inducing = len(quick.machine.policy.question)
    answers = exit_answer_tokens(work, without, start, samples)
    exited = [c for c in without if c.reason == "early_exit"]
    exits = len(exited)
    for c, answer in zip(exited, answers, strict=True):
        alone = len(c.confidences) == 1
        assert not alone or c.probe_tokens == answer + inducing - 1, "the answers are not the engine's"
    declined = count_probes(without) - exits
    kept_tokens = sum(answers) + exits * (inducing - 1)  # its first token is fed in the step of the trigger
    before = sum(c.probe_tokens for c in without) - kept_tokens
    after = sum(c.probe_tokens for c in with_abort) - kept_tokens
    texts = token_bytes(work.described.tokenizer, work.described.config.vocab_size)
    triggers, think_end = work.config.rollout.triggers, quick.machine.think_end
    put_back = sum(put_back_tokens(c, texts, triggers, think_end) for c in without)
    forced = declined * (inducing - 1) + put_back
    return {
        "probe_tokens_saved": (before - after) / max(before, 1),
        "answer_tokens_saved": (before - after) / max(before - forced, 1),
        "exits_equal": same_exits(with_abort, without),
        "probes": count_probes(without),
        "declined": declined,
        "declined_tokens": before,
        "declined_tokens_with_abort": after,
        "forced_tokens": forced,
    }


def run(engine: RolloutEngine, work: Workload, prompts: Sequence[tuple[int, ...]], samples: int):
    """The completions; the same for both engines wherever their probes decide alike."""
    return engine(work.params, prompts, samples, jax.random.key(KEY))[0]


def count_probes(completions: Sequence[Completion]) -> int:
    """Finished probes."""
    return sum(len(c.confidences) for c in completions)


def put_back_tokens(
    completion: Completion, texts: Sequence[bytes], triggers: Sequence[str], think_end: int
) -> int:
    """Steps in which triggers that probes had held back were fed again.

    Every trigger of the thinking is probed, until no more may be, and what stands in the text was put back:
    the tokens from its first one on, without the one that showed that it stands.

    Args:
        completion: of a policy that checks at every trigger.
        texts: bytes of each token.
        triggers: words.
        think_end: token.
    """
    thought = completion.tokens.tolist()
    if completion.forced.any():
        thought = thought[: int(np.argmax(completion.forced))]
    elif think_end in thought:
        thought = thought[: thought.index(think_end) + 1]
    pieces = pieces_of_triggers([texts[token] for token in thought], triggers)
    return sum(pieces[: len(completion.confidences)])


def pieces_of_triggers(parts: Sequence[bytes], triggers: Sequence[str]) -> list[int]:
    """Of each trigger that stands in a text, the tokens from its first one to the one that shows it."""
    holder = [at for at, part in enumerate(parts) for _ in part]
    words = tuple(word.encode().decode("latin-1") for word in triggers)
    text = b"".join(parts).decode("latin-1")
    spans = [match.span() for match in trigger_pattern(words).finditer(text)]
    return [holder[end] - holder[begin] for begin, end in spans if end < len(text)]


def same_exits(one: Sequence[Completion], other: Sequence[Completion]) -> bool:
    """Whether two runs differ in nothing that a reader of the completions can see."""
    return len(one) == len(other) and all(
        a.reason == b.reason
        and len(a.confidences) == len(b.confidences)
        and np.array_equal(a.tokens, b.tokens)
        for a, b in zip(one, other, strict=True)
    )


def exit_answer_tokens(
    work: Workload, completions: Sequence[Completion], prompts: int, samples: int
) -> list[int]:
    """Tokens of the tentative answers that led to an exit, decoded once more, greedily, behind the text.

    Args:
        work: model and settings.
        completions: of the first prompts, by prompt and sample, in one or more calls of the engine.
        prompts: how many prompts there were.
        samples: completions a prompt.
    """
    machine = make_engine(work, truncate=True).machine
    asked = []
    for c, prompt in zip(
        completions, [p for p in work.prompts[:prompts] for _ in range(samples)], strict=True
    ):
        if c.reason == "early_exit":
            thought = c.tokens[: int(np.argmax(c.forced))].tolist()
            asked.append((*prompt, *thought, *machine.policy.question))
    if not asked:
        return []
    longest = max(map(len, asked))
    engine = build_engine(
        replace(work.described, eos_ids=(machine.think_end, *machine.eos)),
        longer_prompts(work.config.rollout, longest),
        work.mesh,
        work.config.model.dtype,
        truncate=False,
        temperature=0.0,
        top_k=0,
        top_p=1.0,
        min_p=0.0,
        max_response=machine.policy.max_notes,
    )
    return [len(c.tokens) for c in engine(work.params, asked, 1, jax.random.key(0))[0]]


def longer_prompts(rollout: ConfigDict, longest: int) -> ConfigDict:
    """The settings with room for prompts of `longest` tokens."""
    changed = rollout.copy_and_resolve_references().unlock()
    changed.max_prompt_tokens = longest
    return changed.lock()


# ---------------------------------------------------------------------- the machine


def plain_and_machine(lanes: int, tokens: int, repeats: int) -> tuple[Rates, Rates]:
    """Rates of plain sampling and of the truncated rollout when no trigger ever fires.

    The same completions on both sides, at most `tokens` long, two for each lane.
    """
    config = tiny_config(lanes).copy_and_resolve_references().unlock()
    config.rollout.think_ratio = 1e6  # the thinking budget is never met
    config.rollout.triggers = ("<unk>",)  # that the model never says
    work = tiny_workload(lanes, config.lock())
    unwatched = make_engine(work, truncate=False, max_response=tokens)
    watched = make_engine(work, truncate=True, max_response=tokens)
    made: dict[str, list[Completion]] = {}

    def rollout(name: str, engine: RolloutEngine) -> int:
        made[name] = run(engine, work, work.prompts, 2)
        return count_tokens(made[name])

    rates = interleave(
        {"plain": lambda: rollout("plain", unwatched), "machine": lambda: rollout("machine", watched)},
        repeats,
    )
    assert count_probes(made["machine"]) == 0, "a trigger fired"
    assert same_exits(made["plain"], made["machine"]), "the machine changed the completions"
    return rates["plain"], rates["machine"]


if __name__ == "__main__":
    main()
