"""Accuracy and length of a model on held-out questions, by plain sampling (or see config.eval.exit).

`python -m step_grpo.evaluate --config=configs/tiny.py --checkpoint=builtin:tiny --workdir=DIR`

Without `--checkpoint` the model of the config is evaluated as it is before training. Other flags:

--benchmarks=gsm8k,math500,aime24   these, by name, in place of config.eval.data
--data_dir=FOLDER                   their questions from files of this folder, not from the Hub
--against=DIR                       differences from an evaluation that this command left in DIR
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict
from rich.console import Console

from step_grpo import cli, distributed, outcomes, paths, statistics
from step_grpo.checkpoint import open_model
from step_grpo.config import validate
from step_grpo.data.benchmarks import BENCHMARKS, benchmark_data, chosen
from step_grpo.data.prompts import EncodedPrompt, Prompts, checksum, encode_prompts
from step_grpo.data.sources import load_questions
from step_grpo.errors import UserError
from step_grpo.mesh import mesh_of, seen_from, shardings, share_of
from step_grpo.model import qwen
from step_grpo.model.attention import choose_attention
from step_grpo.model.linear import axes_of
from step_grpo.model.load import Description, load_model
from step_grpo.outcomes import Recorded, outcomes_of
from step_grpo.preemption import Watched
from step_grpo.report import evaluation_table, progress_bar, results_latex, results_markdown
from step_grpo.reward.grading import Grader
from step_grpo.rollout.engine import RolloutEngine, RolloutStats, build_engine
from step_grpo.scoring import Scored, exchange, score_completions
from step_grpo.statistics import Outcomes

EVALUATION_STREAM = 1  # folded into the seed, so that evaluation and training never share randomness


def main(
    config: ConfigDict,
    checkpoint: str = "",
    workdir: Path = Path("workdir"),
    benchmarks: str = "",
    data_dir: str = "",
    against: str = "",
) -> None:
    """Evaluates a model, and writes every completion, all figures and, of several benchmarks, their table."""
    validate(config)
    names = chosen(benchmarks)
    distributed.start(config, workdir, checkpoint=checkpoint, benchmarks=benchmarks)
    bases = {name: read_base(against, name) for name in names or [""]} if against else {}
    mesh = mesh_of(config.mesh, config.rollout.lanes)
    described, weights = model_of(config, checkpoint, mesh)
    tasks = benchmark_tasks(described, config, names, data_dir) or [Task("", *_held_out(described, config))]
    distributed.agree_on({f"data {task.name}".strip(): checksum(task.prompts) for task in tasks})
    engine = evaluation_engine(described, config, share_of(mesh, jax.process_index()))
    params = decode_ready(weights, described.config, config.model.dtype, mesh)
    # Now, for the largest one: lanes that were counted for a small one would be too few.
    engine.compile(params, config.eval.samples * max(len(task.prompts) for task in tasks))
    measured: dict[str, dict[str, Any]] = {}
    runs: dict[str, Recorded] = {}
    with Grader(config.reward.grading_workers, config.reward.grading_deadline) as grader:
        for task in tasks:
            title = f"evaluating {task.name}".strip()
            scored, stats = evaluate(described, engine, params, task.prompts, config, grader, title)
            paths.make(workdir / task.name)
            write_completions(
                distributed.only_first(workdir / task.name / "completions.jsonl"), scored, described.eos_ids
            )
            measured[task.name] = {**summarise(scored, described.eos_ids), "left_out": task.left_out}
            measured[task.name]["cost"] = cost_of(stats)
            runs[task.name] = outcomes.recorded(scored, outcomes_of(scored, described.eos_ids))
    compared = {name: outcomes.on_common_questions(bases[name], runs[name]) for name in bases}
    for name, pair in compared.items():
        measured[name]["against"] = outcomes.comparison(*pair)
    if names:
        settings = {"checkpoint": checkpoint or config.model.checkpoint, "against": against}
        settings |= {"seed": config.seed, **config.eval.to_dict()}
        del settings["data"], settings["questions"]  # of the config's own evaluation
        average = averages({name: run.outcomes for name, run in runs.items()}, compared)
        write_results(workdir, measured, average, settings)
    else:
        written = json.dumps(measured[""], indent=2) + "\n"
        distributed.only_first(workdir / "evaluation.json").write_text(written, encoding="utf-8")
        print(f"completions: {workdir / 'completions.jsonl'}\nfigures: {workdir / 'evaluation.json'}")
    shown = {BENCHMARKS[name].title if name else "": figures for name, figures in measured.items()}
    Console().print(evaluation_table(shown))


def model_of(config: ConfigDict, checkpoint: str, mesh: Mesh) -> tuple[Description, qwen.Params]:
    """The model that a checkpoint holds; without one, that of the config as it is before training."""
    if not checkpoint:
        return load_model(config.model, config.seed, mesh)
    opened = open_model(checkpoint, mesh)
    return opened.described, opened.params


# ---------------------------------------------------------------------- what is asked


@dataclass(frozen=True)
class Task:
    """Questions that are evaluated together; the name is that of a benchmark, or empty for the config's."""

    name: str
    prompts: Sequence[EncodedPrompt]
    left_out: int  # questions that were too long


def benchmark_tasks(
    described: Description, config: ConfigDict, names: Sequence[str], data_dir: str
) -> list[Task]:
    """The first `eval.benchmark_questions` questions of each benchmark."""
    tasks = []
    for name in names:
        data = benchmark_data(name, data_dir)
        where = f"--benchmarks={name}: data"
        found = _asked(described, config, data, config.eval.benchmark_questions, where, at_most=True)
        tasks.append(Task(name, found.kept, found.dropped))
    return tasks


def evaluation_prompts(described: Description, config: ConfigDict) -> list[EncodedPrompt]:
    """The first `eval.questions` questions of the evaluation data that are not too long."""
    return _held_out(described, config)[0]


def _held_out(described: Description, config: ConfigDict) -> tuple[list[EncodedPrompt], int]:
    found = _asked(
        described, config, config.eval.data, config.eval.questions, "config.eval.data", at_most=False
    )
    return found.kept, found.dropped


def _asked(
    described: Description, config: ConfigDict, data: ConfigDict, count: int, where: str, *, at_most: bool
) -> Prompts:
    """The first `count` questions of a source as prompts, all of them if it is 0.

    Raises:
        UserError: there are fewer questions (unless `at_most`), or none is short enough.
    """
    questions = load_questions(data, where=where)
    count = count or len(questions)
    if count > len(questions):
        if not at_most:
            raise UserError(
                f"config.eval.questions is {count}, but config.eval.data has {len(questions)} questions"
            )
        count = len(questions)
    prompts = encode_prompts(
        described.tokenizer,
        [questions[i] for i in range(count)],
        instruction=data.instruction,
        max_prompt_tokens=config.rollout.max_prompt_tokens,
    )
    if prompts.dropped:
        print(
            f"{prompts.dropped} evaluation prompts are longer than config.rollout.max_prompt_tokens: left out"
        )
    if not prompts.kept:
        raise UserError("config.rollout.max_prompt_tokens: every evaluation prompt is longer; raise it")
    return prompts


# ---------------------------------------------------------------------- sampling


def evaluation_engine(described: Description, config: ConfigDict, mesh: Mesh) -> RolloutEngine:
    """Sampling with the settings of `config.eval`, plain or cut short as `config.eval.exit` says."""
    rollout = config.rollout.copy_and_resolve_references().unlock()
    rollout.exit = config.eval.exit
    return build_engine(
        described,
        rollout,
        mesh,
        config.model.dtype,
        truncate=config.eval.exit != "none",
        temperature=config.eval.temperature,
        top_k=config.eval.top_k,
        top_p=config.eval.top_p,
        min_p=config.eval.min_p,
        max_response=config.eval.max_response_tokens,
        attention=choose_attention(config.model.attention, mesh),
    )


def greedy_engine(
    described: Description, config: ConfigDict, mesh: Mesh, *, max_prompt: int, max_response: int
) -> RolloutEngine:
    """Plain greedy decoding of prompts that may be longer than a question, such as parts of completions.

    Args:
        described: the model but its weights.
        config: the whole config.
        mesh: from `share_of`.
        max_prompt: tokens of the longest prompt.
        max_response: tokens of a completion.
    """
    rollout = config.rollout.copy_and_resolve_references().unlock()
    rollout.max_prompt_tokens = max_prompt
    return build_engine(
        described,
        rollout,
        mesh,
        config.model.dtype,
        truncate=False,
        temperature=0.0,
        top_k=0,
        top_p=1.0,
        min_p=0.0,
        max_response=max_response,
        attention=choose_attention(config.model.attention, mesh),
    )


def decode_ready(params: qwen.Params, cfg: qwen.QwenConfig, dtype: str, mesh: Mesh) -> qwen.Params:
    """The weights as this process's rollout reads them: a copy for each of its groups of devices.

    Args:
        params: on the devices of `mesh`.
        cfg: architecture.
        dtype: of the copy.
        mesh: from `make_mesh`; the result lies on `share_of` it.
    """
    where = decode_shardings(params, cfg, dtype, mesh)
    layers = where.pop("layers")
    beside = {name: weight for name, weight in params.items() if name != "layers"}
    ready = jax.jit(qwen.decode_rest, static_argnums=1, out_shardings=where)(beside, dtype)
    cut = jax.jit(qwen.decode_layer, static_argnums=2, out_shardings=layers[0])
    count = range(qwen.layer_count(params))
    ready["layers"] = tuple(cut(params["layers"], np.int32(layer), dtype) for layer in count)
    mine = share_of(mesh, jax.process_index())
    return jax.tree.map(lambda weight: seen_from(mine, weight), ready)


def decode_shardings(params: qwen.Params, cfg: qwen.QwenConfig, dtype: str, mesh: Mesh) -> Any:
    """Where each array of `qwen.decode_params` lies; the arguments are those of `decode_ready`, or shapes."""
    shapes = jax.eval_shape(partial(qwen.decode_params, dtype=dtype), params)
    whole = qwen.decode_axes(cfg)
    layers = tuple(
        {name: axes_of(names[name], weight) for name, weight in layer.items()}
        for names, layer in zip(whole["layers"], shapes["layers"], strict=True)
    )
    return shardings(mesh, {**whole, "layers": layers}, shapes)


def evaluate(
    described: Description,
    engine: RolloutEngine | Watched,
    params: qwen.Params,
    prompts: Sequence[EncodedPrompt],
    config: ConfigDict,
    grader: Grader,
    title: str,
) -> tuple[list[Scored], RolloutStats]:
    """`eval.samples` completions a prompt, scored, ordered by prompt and sample; and what they cost.

    The same in every process.

    Args:
        described: the model but its weights.
        engine: from `evaluation_engine`.
        params: from `decode_ready`.
        prompts: from `evaluation_prompts`.
        config: the whole config.
        grader: running.
        title: of the progress bar.
    """
    key = jax.random.fold_in(jax.random.key(config.seed), EVALUATION_STREAM)
    mine = distributed.share(prompts, "config.eval.questions")
    samples = config.eval.samples
    with progress_bar(title, len(mine) * samples) as bar:
        completions, stats = engine(params, [p.ids for p in mine], samples, key, bar.update)
    scored = score_completions(
        described.tokenizer,
        mine,
        completions,
        grader,
        tuple(config.rollout.triggers),
        closed_thinking=config.reward.closed_thinking,
    )
    return exchange(scored, stats, prompts)


# ---------------------------------------------------------------------- figures


def cost_of(stats: RolloutStats) -> dict[str, float]:
    """What the sampling of an evaluation cost: seconds without compilation, and steps of the lanes."""
    return {
        "seconds": stats.seconds - stats.compile_seconds,
        "lane_steps": stats.lane_steps,
        "live_share": stats.live_steps / max(stats.lane_steps, 1),
    }


def summarise(scored: Sequence[Scored], eos_ids: Sequence[int]) -> dict[str, Any]:
    """The figures of an evaluation (`statistics.figures`), and how many answers could not be graded.

    Args:
        scored: from `evaluate`.
        eos_ids: of the model.
    """
    failures = sum(s.grade.error is not None for s in scored)
    return {**statistics.figures(outcomes_of(scored, eos_ids)), "grading_failures": failures}


def averages(
    measured: Mapping[str, Outcomes], compared: Mapping[str, tuple[Outcomes, Outcomes]]
) -> dict[str, Any]:
    """Figures averaged over benchmarks, each counting the same; with differences where there are any.

    Args:
        measured: the outcomes of each benchmark.
        compared: of each, those of the base run and of this one on the same questions.
    """

    def means(runs: Iterable[Outcomes], name: str) -> list[np.ndarray]:
        return [getattr(run, name).mean(axis=1) for run in runs]

    found: dict[str, Any] = {"benchmarks": len(measured)}
    for figure, name in (("accuracy", "correct"), ("tokens", "tokens"), ("steps", "steps")):
        interval = statistics.average_interval(means(measured.values(), name))
        found |= statistics.named(figure, interval)
        if compared:
            bases = means((base for base, _ in compared.values()), name)
            others = means((other for _, other in compared.values()), name)
            against = found.setdefault("against", {})
            against[figure] = vars(statistics.average_difference(bases, others))
            if figure == "tokens":
                against["tokens_relative"] = vars(statistics.average_saving(bases, others))
    return found


def read_base(against: str, name: str) -> Recorded:
    """The run that a benchmark is compared with.

    Args:
        against: what `--against` says.
        name: of the benchmark, or empty for `config.eval.data`.
    """
    return outcomes.read_recorded(outcomes.find_completions(paths.folder(against), name))


# ---------------------------------------------------------------------- what is written


def write_results(
    workdir: Path, measured: Mapping[str, Any], average: Mapping[str, Any], settings: Mapping[str, Any]
) -> None:
    """`results.json`, and the same as a table in Markdown and in LaTeX."""
    results = {"settings": settings, "benchmarks": measured, "average": average}
    titled = {BENCHMARKS[name].title: figures for name, figures in measured.items()}
    texts = {
        "results.json": json.dumps(results, indent=2) + "\n",
        "results.md": results_markdown(titled, average),
        "results.tex": results_latex(titled, average),
    }
    for name, text in texts.items():
        distributed.only_first(workdir / name).write_text(text, encoding="utf-8")
        print(f"results: {workdir / name}")


def write_completions(path: Path, scored: Sequence[Scored], eos_ids: Sequence[int]) -> None:
    """One JSON object a line for every completion; one that ends with none of `eos_ids` is `truncated`."""
    with path.open("w", encoding="utf-8") as file:
        for s in scored:
            record = {
                "id": s.prompt.question.id,
                "sample": s.completion.sample,
                "prompt": s.prompt.question.question,
                "answer": s.prompt.question.answer,
                "text": s.text,
                "token_ids": s.completion.tokens.tolist(),
                "correct": s.grade.correct,
                "formatted": s.grade.formatted,
                "grading_error": s.grade.error,
                "tokens": len(s.completion.tokens),
                "steps": s.steps,
                "exit_reason": s.completion.reason,
                "truncated": int(s.completion.tokens[-1]) not in eos_ids,
            }
            file.write(json.dumps(record, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    cli.run(main)
