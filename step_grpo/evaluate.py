"""Accuracy and length of a model on held-out questions, by plain sampling.

`python -m step_grpo.evaluate --config=configs/tiny.py --checkpoint=builtin:tiny --workdir=DIR`
"""

import json
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict
from rich.console import Console

from step_grpo import cli, distributed, paths
from step_grpo.checkpoint import open_model
from step_grpo.config import validate
from step_grpo.data.prompts import EncodedPrompt, encode_prompts
from step_grpo.data.sources import load_questions
from step_grpo.errors import UserError
from step_grpo.mesh import mesh_of, seen_from, shardings, share_of
from step_grpo.model import qwen
from step_grpo.model.attention import choose_attention
from step_grpo.model.linear import axes_of
from step_grpo.model.load import Description
from step_grpo.report import evaluation_table, progress_bar
from step_grpo.reward.grading import Grader
from step_grpo.rollout.engine import RolloutEngine, build_engine
from step_grpo.scoring import Scored, exchange, score_completions

EVALUATION_STREAM = 1  # folded into the seed, so that evaluation and training never share randomness


def main(config: ConfigDict, checkpoint: str, workdir: Path = Path("workdir")) -> None:
    """Evaluates a checkpoint and writes `completions.jsonl` and `evaluation.json`."""
    validate(config)
    distributed.start(config, workdir, checkpoint=checkpoint)
    mesh = mesh_of(config.mesh, config.rollout.lanes)
    opened = open_model(checkpoint, mesh)
    described = opened.described
    prompts = evaluation_prompts(described, config)
    engine = evaluation_engine(described, config, share_of(mesh, jax.process_index()))
    params = decode_ready(opened.params, described.config, config.model.dtype, mesh)
    with Grader(config.reward.grading_workers, config.reward.grading_deadline) as grader:
        scored = evaluate(described, engine, params, prompts, config, grader, "evaluating")
    figures = summarise(scored)
    paths.make(workdir)
    write_completions(distributed.only_first(workdir / "completions.jsonl"), scored)
    written = json.dumps(figures, indent=2) + "\n"
    distributed.only_first(workdir / "evaluation.json").write_text(written, encoding="utf-8")
    Console().print(evaluation_table({"": figures}))
    print(f"completions: {workdir / 'completions.jsonl'}\nfigures: {workdir / 'evaluation.json'}")


def evaluation_prompts(described: Description, config: ConfigDict) -> list[EncodedPrompt]:
    """The first `eval.questions` questions of the evaluation data that are not too long."""
    data = config.eval.data
    questions = load_questions(data, where="config.eval.data")
    count = config.eval.questions or len(questions)
    if count > len(questions):
        raise UserError(
            f"config.eval.questions is {count}, but config.eval.data has {len(questions)} questions"
        )
    chosen = [questions[i] for i in range(count)]
    prompts = encode_prompts(
        described.tokenizer,
        chosen,
        instruction=data.instruction,
        max_prompt_tokens=config.rollout.max_prompt_tokens,
    )
    if prompts.dropped:
        print(
            f"{prompts.dropped} evaluation prompts are longer than config.rollout.max_prompt_tokens: left out"
        )
    if not prompts.kept:
        raise UserError("config.rollout.max_prompt_tokens: every evaluation prompt is longer; raise it")
    return prompts.kept


def evaluation_engine(described: Description, config: ConfigDict, mesh: Mesh) -> RolloutEngine:
    """Plain sampling with the settings of `config.eval`."""
    return build_engine(
        described,
        config.rollout,
        mesh,
        config.model.dtype,
        truncate=False,
        temperature=config.eval.temperature,
        top_k=config.eval.top_k,
        top_p=config.eval.top_p,
        min_p=config.eval.min_p,
        max_response=config.eval.max_response_tokens,
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
    ready = jax.jit(qwen.decode_params, static_argnums=1, out_shardings=where)(params, dtype)
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
    engine: RolloutEngine,
    params: qwen.Params,
    prompts: Sequence[EncodedPrompt],
    config: ConfigDict,
    grader: Grader,
    title: str,
) -> list[Scored]:
    """One completion a prompt, scored; the same in every process, each of which made its share.

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
    with progress_bar(title, len(mine)) as bar:
        completions, stats = engine(params, [p.ids for p in mine], 1, key, bar.update)
    scored = score_completions(described.tokenizer, mine, completions, grader, tuple(config.rollout.triggers))
    return exchange(scored, stats, prompts)[0]


def summarise(scored: Sequence[Scored]) -> dict[str, Any]:
    """Accuracy with its 95 % interval, mean tokens and steps, and how many answers could not be graded."""
    correct = sum(s.grade.correct for s in scored)
    low, high = wilson_interval(correct, len(scored))
    return {
        "accuracy": correct / len(scored),
        "accuracy_low": low,
        "accuracy_high": high,
        "tokens": float(np.mean([len(s.completion.tokens) for s in scored])),
        "steps": float(np.mean([s.steps for s in scored])),
        "questions": len(scored),
        "grading_failures": sum(s.grade.error is not None for s in scored),
    }


def wilson_interval(successes: int, trials: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's score interval of a proportion, 95 % by default (Wilson 1927)."""
    share = successes / trials
    centre = (share + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z / (1 + z * z / trials) * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    return max(0.0, centre - half), min(1.0, centre + half)


def write_completions(path: Path, scored: Sequence[Scored]) -> None:
    """One JSON object a line for every completion."""
    with path.open("w", encoding="utf-8") as file:
        for s in scored:
            record = {
                "id": s.prompt.question.id,
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
            }
            file.write(json.dumps(record, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    cli.run(main)
