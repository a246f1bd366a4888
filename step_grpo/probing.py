r"""Probes of finished completions: what early exit would have seen, and whether it can be trusted.

`python -m step_grpo.probing --config=configs/tiny.py --checkpoint=builtin:tiny \
    --completions=DIR/completions.jsonl --workdir=DIR2`

Reads what `step_grpo.evaluate` has written. At every trigger in the thinking of a completion the model is
asked for a tentative answer, as the probe of a truncated rollout would (`config.rollout`: inducing prompt,
`max_probe_tokens`, `strict`), however many there are. Left in DIR2 are `probes.jsonl`, `calibration.json`,
and a reliability diagram, `calibration.png`. The checkpoint must be the one that was evaluated. Other flags:

--questions=256     the first sample of the first so many questions alone; without it every completion
--benchmark=gsm8k   whose questions they are, where they are not those of config.eval.data
"""

import json
from bisect import bisect_right
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from step_grpo import cli, distributed, paths
from step_grpo.calibration import calibration, draw_reliability
from step_grpo.config import validate
from step_grpo.data.benchmarks import benchmark_data, chosen
from step_grpo.data.prompts import EncodedPrompt, encode_prompts, think_end_id
from step_grpo.data.sources import Question
from step_grpo.errors import UserError
from step_grpo.evaluate import decode_ready, greedy_engine, model_of
from step_grpo.mesh import mesh_of, share_of
from step_grpo.model import qwen
from step_grpo.model.load import Description
from step_grpo.report import progress_bar
from step_grpo.reward.boxes import last_box
from step_grpo.reward.grading import Grade, Grader
from step_grpo.rollout.exits import probe_confidence
from step_grpo.rollout.policies import encode
from step_grpo.rollout.triggers import TriggerTable, build_triggers, token_bytes


@dataclass(frozen=True)
class Probe:
    """A place at which a completion is asked for its answer."""

    prompt: EncodedPrompt
    sample: int
    position: int  # tokens of the completion that stand before the trigger
    prefix: tuple[int, ...]  # these


@dataclass(frozen=True)
class Tentative:
    """What a probe gets to hear."""

    tokens: tuple[int, ...]  # `</think>` or EOS included
    confidence: float


def main(
    config: ConfigDict,
    completions: str,
    checkpoint: str = "",
    workdir: Path = Path("workdir/probes"),
    questions: str = "0",
    benchmark: str = "",
) -> None:
    """Finds the triggers, asks, grades, and writes what came of it."""
    validate(config)
    if not questions.isdigit():
        raise UserError(f"--questions={questions}: it must be a number; 0 for every completion")
    data = benchmark_data(chosen(benchmark)[0]) if benchmark else config.eval.data
    flags = {"checkpoint": checkpoint, "completions": completions, "questions": questions}
    distributed.start(config, workdir, benchmark=benchmark, **flags)
    records = read_completions(paths.folder(completions), int(questions))
    mesh = mesh_of(config.mesh, config.rollout.lanes)
    described, params = model_of(config, checkpoint, mesh)
    probes = find_probes(described, records, data, tuple(config.rollout.triggers))
    answers = tentative_answers(described, params, probes, config, mesh)
    texts = [said(described, answer, config.rollout.inducing_prompt) for answer in answers]
    with Grader(config.reward.grading_workers, config.reward.grading_deadline) as grader:
        asked = [probe.prompt.question for probe in probes]
        grades = grader.grade_many(texts, [q.answer for q in asked], [q.grading for q in asked])
    paths.make(workdir)
    write_probes(distributed.only_first(workdir / "probes.jsonl"), probes, answers, texts, grades)
    confidence = np.array([answer.confidence for answer in answers])
    figures = calibration(confidence, np.array([g.correct for g in grades], bool), config.rollout.delta)
    figures = {"completions": len(records), **figures}
    if distributed.is_first():
        with paths.written_locally(workdir) as local:
            draw_reliability({Path(completions).parent.name: figures}, local / "calibration.png")
    # Last: where it is there, everything is.
    written = json.dumps(figures, indent=2) + "\n"
    distributed.only_first(workdir / "calibration.json").write_text(written, encoding="utf-8")
    print(f"{told(figures)}\nprobes: {workdir / 'probes.jsonl'}\npicture: {workdir / 'calibration.png'}")


# ---------------------------------------------------------------------- where completions are probed


def read_completions(path: Path, questions: int) -> list[dict[str, Any]]:
    """The records of a `completions.jsonl`.

    Args:
        path: the file.
        questions: the first completion of the first so many questions alone; 0 for all.

    Raises:
        UserError: no such file, not one of ours, or empty.
    """
    try:
        # Not `splitlines`, which also splits at line ends of Unicode that a completion may hold.
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
        known = [(row["id"], row["sample"], row["prompt"], row["answer"], row["token_ids"]) for row in rows]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"--completions={path} is not a completions.jsonl of step_grpo.evaluate "
            f"({type(error).__name__}: {error})"
        ) from None
    if not known:
        raise UserError(f"--completions={path} is empty; name what an evaluation wrote")
    if not questions:
        return rows
    first = {(row["id"], row["prompt"]): row for row in reversed(rows)}
    wanted = list(dict.fromkeys((row["id"], row["prompt"]) for row in rows))[:questions]
    return [first[question] for question in wanted]


def find_probes(
    described: Description,
    records: Sequence[Mapping[str, Any]],
    data: ConfigDict,
    triggers: tuple[str, ...],
) -> list[Probe]:
    """Every place in the thinking of completions where a rollout without limits would probe.

    Args:
        described: the model but its weights.
        records: of completions.
        data: what is said of the questions: instruction and grading.
        triggers: words that open a step.
    """
    asked = [Question(r["id"], r["prompt"], r["answer"], data.grading) for r in records]
    longest = np.iinfo(np.int32).max  # they were short enough when they were answered
    prompts = encode_prompts(
        described.tokenizer, asked, instruction=data.instruction, max_prompt_tokens=longest
    )
    texts = token_bytes(described.tokenizer, described.config.vocab_size)
    table = jax.tree.map(np.asarray, build_triggers(texts, triggers))
    sizes = [len(text) for text in texts]
    stops = {think_end_id(described.tokenizer), *described.eos_ids}
    return [
        Probe(prompt, record["sample"], position, tuple(record["token_ids"][:position]))
        for record, prompt in zip(records, prompts.kept, strict=True)
        for position in trigger_positions(record["token_ids"], table, sizes, stops)
    ]


def trigger_positions(
    tokens: Sequence[int], table: TriggerTable, sizes: Sequence[int], stops: Collection[int]
) -> list[int]:
    """The tokens in which the standalone triggers of a thinking begin, as the decode loop finds them.

    Args:
        tokens: of a completion.
        table: on the host.
        sizes: bytes of each token of the vocabulary.
        stops: tokens that end the thinking; such a one may still confirm a trigger.
    """
    found: list[int] = []
    ends: list[int] = []  # bytes up to the end of each token
    state, size = 0, 0
    for token in tokens:
        reading = state, table.token_class[token]
        if table.confirms[reading]:
            found.append(bisect_right(ends, size - int(table.bytes_back[reading])))
        if token in stops:
            break
        state = int(table.next_state[reading])
        size += sizes[token]
        ends.append(size)
    return found


# ---------------------------------------------------------------------- what is answered


def tentative_answers(
    described: Description,
    params: qwen.Params,
    probes: Sequence[Probe],
    config: ConfigDict,
    mesh: Mesh,
) -> list[Tentative]:
    """The greedy answers behind the inducing prompt, and their confidence (arXiv 2604.16890, Eq. 2).

    The engine's plain sampling makes them: prefixes are its prompts, and at temperature 0 its log-probs are
    those of the most probable tokens.

    Args:
        described: the model but its weights.
        params: on the devices of `mesh`.
        probes: the places.
        config: the whole config.
        mesh: of the run.

    Returns:
        One for each probe; the same in every process.
    """
    if not probes:
        return []
    rollout, closing = config.rollout, think_end_id(described.tokenizer)
    question = encode(described.tokenizer, rollout.inducing_prompt)
    prompts = [(*probe.prompt.ids, *probe.prefix, *question) for probe in probes]
    engine = greedy_engine(
        replace(described, eos_ids=(*described.eos_ids, closing)),  # either ends a tentative answer
        config,
        share_of(mesh, jax.process_index()),
        max_prompt=max(map(len, prompts)),
        max_response=rollout.max_probe_tokens,
    )
    ready = decode_ready(params, described.config, config.model.dtype, mesh)
    mine = distributed.share(prompts, "--completions: probes")
    with progress_bar("probing", len(mine)) as bar:
        answers, _ = engine(ready, mine, 1, jax.random.key(config.seed), bar.update)
    P = rollout.max_probe_tokens
    tokens_NP = np.array([padded(answer.tokens, P) for answer in answers])
    logprobs_NP = jnp.array([padded(answer.logprobs, P) for answer in answers])
    lengths_N = np.array([len(answer.tokens) for answer in answers])
    closed_N = jnp.array([answer.tokens[-1] == closing for answer in answers])
    confidence_N = probe_confidence(logprobs_NP, jnp.asarray(lengths_N), closed_N, strict=rollout.strict)
    everyone = distributed.gather(
        {"tokens": tokens_NP, "length": lengths_N, "confidence": np.asarray(confidence_N)}
    )
    found: list[Tentative] = [Tentative((), 0.0)] * len(probes)
    for process, theirs in enumerate(everyone):
        found[process :: jax.process_count()] = [
            Tentative(tuple(tokens[:length].tolist()), float(confidence))
            for tokens, length, confidence in zip(*theirs.values(), strict=True)
        ]
    return found


def padded(values: np.ndarray, size: int) -> np.ndarray:
    """`[size]`: the values, then zeros."""
    return np.pad(values, (0, size - len(values)))


def said(described: Description, answer: Tentative, inducing_prompt: str) -> str:
    """The inducing prompt, which may open a box, and the tentative answer behind it."""
    return inducing_prompt + described.tokenizer.decode(answer.tokens, skip_special_tokens=True)


# ---------------------------------------------------------------------- what is written


def write_probes(
    path: Path,
    probes: Sequence[Probe],
    answers: Sequence[Tentative],
    texts: Sequence[str],
    grades: Sequence[Grade],
) -> None:
    """One JSON object a line for every probe; `answer` is null where no box was closed."""
    with path.open("w", encoding="utf-8") as file:
        for probe, answer, text, grade in zip(probes, answers, texts, grades, strict=True):
            record = {
                "id": probe.prompt.question.id,
                "sample": probe.sample,
                "position": probe.position,
                "confidence": answer.confidence,
                "answer": last_box(text),
                "correct": grade.correct,
            }
            file.write(json.dumps(record, ensure_ascii=False) + "\n")


def told(figures: Mapping[str, Any]) -> str:
    """The figures in a line."""
    if not figures["count"]:
        return f"no triggers in the thinking of {figures['completions']} completions: nothing to probe"
    above = figures["precision_above_delta"]
    right = "" if above is None else f", of which {above:.1%} are right"
    return (
        f"{figures['count']} probes: confidence {figures['confidence']:.3f}, right {figures['accuracy']:.1%},"
        f" ECE {figures['ece']:.3f}; {figures['share_above_delta']:.1%} above {figures['delta']:g}{right}"
    )


if __name__ == "__main__":
    cli.run(main)
