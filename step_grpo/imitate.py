"""DEER+SFT: fine-tunes a model on its own completions, those that a probe cut short and that are right.

`python -m step_grpo.imitate --config=configs/tiny.py --workdir=DIR`

The baseline of Step-GRPO (arXiv 2604.16890) that learns without a reward, from completions that DEER's probe
(arXiv 2504.15895) cut short. The untrained model answers as many prompts as a run of `step_grpo.main` with
the same config would see (`steps`, `prompts_per_step`, `rollout`). Correct completions that ended early are
kept and trained on for `config.imitation.epochs`, every token of the completion alike. `rollouts.jsonl`,
`metrics.jsonl`, `result.json` and `export` are left in DIR.
"""

import json
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from step_grpo import cli, distributed, paths
from step_grpo.config import validate
from step_grpo.errors import UserError
from step_grpo.evaluate import decode_ready, write_completions
from step_grpo.export import export_model
from step_grpo.grpo.packing import PackedBatch, Sample, pack
from step_grpo.grpo.update import adamw, moments_beside
from step_grpo.main import TRAINING_STREAM, take_prompts, training_engine, training_questions
from step_grpo.mesh import mesh_of, place_rows, row_shares, share_of
from step_grpo.metrics import MetricsWriter
from step_grpo.model import qwen
from step_grpo.model.attention import choose_attention
from step_grpo.model.load import Description, load_model
from step_grpo.report import progress_bar
from step_grpo.reward.grading import Grader
from step_grpo.scoring import Scored, exchange, score_completions
from step_grpo.sft import supervised, train_step
from step_grpo.workdir import locked


def main(config: ConfigDict, workdir: Path = Path("workdir/imitation")) -> None:
    """Samples, keeps, fine-tunes, and exports."""
    validate(config)
    if config.rollout.exit == "none":
        raise UserError("config.rollout.exit is 'none': nothing is cut short; name what ends the thinking")
    if config.lora.rank:
        raise UserError("config.lora.rank is above 0; this baseline trains all weights, set it to 0")
    distributed.start(config, workdir)
    mesh = mesh_of(config.mesh, config.rollout.lanes, config.imitation.rows)
    described, params = load_model(config.model, config.seed, mesh)
    with locked(workdir):
        scored = sample(described, params, config, mesh)
        write_completions(distributed.only_first(workdir / "rollouts.jsonl"), scored, described.eos_ids)
        samples = kept(scored)
        if not samples:
            raise UserError(
                f"none of {len(scored)} completions was cut short and right: lower config.rollout.delta, or "
                f"look at {workdir / 'rollouts.jsonl'}"
            )
        print(f"{len(samples)} of {len(scored)} completions were cut short and are right: trained on")
        params, losses = fine_tune(described, params, samples, config, config.imitation, mesh, workdir)
        finish(
            described,
            params,
            config,
            workdir,
            {"kept": len(samples), "sampled": len(scored), "loss": losses[-1]},
        )


# ---------------------------------------------------------------------- what is imitated


def sample(described: Description, params: qwen.Params, config: ConfigDict, mesh: Mesh) -> list[Scored]:
    """The untrained model's completions of all steps, graded; `main` makes the same in its first."""
    rollout = training_engine(described, config, share_of(mesh, jax.process_index()))
    ready = decode_ready(params, described.config, config.model.dtype, mesh)
    questions = training_questions(described.tokenizer, config)
    key = jax.random.fold_in(jax.random.key(config.seed), TRAINING_STREAM)
    found: list[Scored] = []
    cursor = 0
    with (
        Grader(config.reward.grading_workers, config.reward.grading_deadline) as grader,
        progress_bar("sampling", config.steps) as bar,
    ):
        for step in range(config.steps):
            batch, cursor = take_prompts(questions, cursor, config)
            mine = distributed.share(batch, "config.prompts_per_step")
            completions, stats = rollout(
                ready, [p.ids for p in mine], config.rollout.samples, jax.random.fold_in(key, step)
            )
            scored = score_completions(
                described.tokenizer, mine, completions, grader, tuple(config.rollout.triggers)
            )
            found += exchange(scored, stats, batch)[0]
            bar.update(step + 1, right=sum(s.grade.correct for s in found), completions=len(found))
    return found


def kept(scored: Sequence[Scored]) -> list[Sample]:
    """The correct completions that a probe ended, as samples whose every completion token is trained on."""
    return [
        supervised(s.prompt.ids, s.completion.tokens.tolist())
        for s in scored
        if s.grade.correct and s.completion.reason == "early_exit"
    ]


# ---------------------------------------------------------------------- how


def fine_tune(
    described: Description,
    params: qwen.Params,
    samples: Sequence[Sample],
    config: ConfigDict,
    settings: ConfigDict,
    mesh: Mesh,
    workdir: Path,
) -> tuple[qwen.Params, list[float]]:
    """AdamW on the mean cross-entropy of the tokens, a batch of packed rows a step.

    Args:
        described: the model but its weights.
        params: consumed.
        samples: what is trained on; the mask of a token is its weight in the mean.
        config: the whole config.
        settings: the part with the `epochs`, the `learning_rate` and the `rows` of a batch.
        mesh: from `mesh_of`.
        workdir: for `metrics.jsonl`.

    Returns:
        The weights, and the loss of every step.
    """
    grpo = config.grpo
    batches = list(shuffled(samples, config, settings.epochs, settings.rows or row_shares(mesh)))
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, settings.learning_rate, max(1, len(batches) // 20), len(batches) + 1, 0.0
    )
    optimizer = adamw(
        schedule,
        b1=grpo.b1,
        b2=grpo.b2,
        weight_decay=grpo.weight_decay,
        grad_clip=grpo.grad_clip,
        moments_dtype=grpo.moments_dtype,
    )
    attention = choose_attention(config.model.attention, mesh, spread_rows=True)
    on_batch = partial(
        train_step,
        described.config,
        config.model.dtype,
        optimizer,
        attention=attention,
        remat=config.model.remat,
    )
    step_fn = jax.jit(on_batch, donate_argnums=(0, 1))
    shapes = jax.eval_shape(optimizer.init, params)
    opt_state = jax.jit(optimizer.init, out_shardings=moments_beside(optimizer, shapes, params))(params)
    losses: list[float] = []
    with (
        MetricsWriter(distributed.only_first(workdir / "metrics.jsonl")) as metrics,
        progress_bar("fine-tuning", len(batches)) as bar,
    ):
        for step, batch in enumerate(batches, 1):
            params, opt_state, loss = step_fn(params, opt_state, place_rows(mesh, batch))
            losses.append(float(loss))
            metrics.write(step, {"loss": losses[-1]})
            bar.update(step, loss=losses[-1])
    return params, losses


def shuffled(samples: Sequence[Sample], config: ConfigDict, epochs: int, rows: int) -> Iterator[PackedBatch]:
    """The packed batches of all epochs, in an order that follows from the seed."""
    for epoch in range(epochs):
        rng = np.random.default_rng([config.seed, epoch])
        order = rng.permutation(len(samples))
        batches = pack([samples[i] for i in order], row_length=config.grpo.row_length, rows=rows)
        for i in rng.permutation(len(batches)):
            yield batches[i]


def finish(
    described: Description, params: qwen.Params, config: ConfigDict, workdir: Path, result: dict[str, Any]
) -> None:
    """Writes the export and, when it is there, `result.json`."""
    card = {"settings": config.to_dict(), "measured": result}
    out = export_model(workdir, described, params, card=card, dtype=config.export_dtype)
    if distributed.is_first():
        paths.write_text(workdir / "result.json", json.dumps(result, indent=2) + "\n")
    print(f"export: {out}")


if __name__ == "__main__":
    cli.run(main)
