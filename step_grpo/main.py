"""The training run: rollout -> reward -> advantages -> update -> log -> save.

`python -m step_grpo.main --config=configs/tiny.py --workdir=DIR`

Run the same line again to go on from the newest checkpoint in the workdir. With --requeue a run that was
asked to stop exits with 75, not with 0, for schedulers that start a job again only where it has failed.
"""

import json
import math
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict
from rich.console import Console

import step_grpo
from step_grpo import checkpoint, cli, distributed, functions, paths, sinks
from step_grpo.card import card_of
from step_grpo.compile_time import compile_seconds
from step_grpo.config import validate
from step_grpo.data.prompts import EncodedPrompt, checksum, encode_prompts
from step_grpo.data.sources import load_questions, take
from step_grpo.errors import UserError
from step_grpo.evaluate import (
    decode_ready,
    evaluate,
    evaluation_engine,
    evaluation_prompts,
    summarise,
    write_completions,
)
from step_grpo.export import export_model, remove_debris
from step_grpo.grpo.advantages import advantages, mixed_groups
from step_grpo.grpo.loss import token_weights
from step_grpo.grpo.packing import Sample, pack, stack
from step_grpo.grpo.settings import GrpoSettings
from step_grpo.grpo.update import Measurements, TrainBatch, TrainState, Update, adamw, make_update
from step_grpo.guards import SkippedUpdates, averaged, warn
from step_grpo.html_report.page import write_report
from step_grpo.mesh import mesh_of, place_rows, row_shares, shardings, share_of
from step_grpo.metrics import MetricsWriter, read_metrics
from step_grpo.model import lora, qwen
from step_grpo.model.attention import choose_attention
from step_grpo.model.load import Description, load_model
from step_grpo.partial_rollout import PartialRollout, kept_rollout
from step_grpo.preemption import Notice, StoppedError, Watched
from step_grpo.report import evaluation_table, live_figures, progress_bar
from step_grpo.reward import rewards
from step_grpo.reward.grading import Grader
from step_grpo.rollout.engine import RolloutEngine, RolloutStats, build_engine
from step_grpo.rollout.phases import REASONS, Machine
from step_grpo.rollout.policies import Policy
from step_grpo.rollout_log import RolloutLog, kept_rollouts
from step_grpo.scoring import Scored, exchange, score_completions
from step_grpo.workdir import locked, once

TRAINING_STREAM = 0  # folded into the seed, so that evaluation and training never share randomness


def main(config: ConfigDict, workdir: Path = Path("workdir"), requeue: bool = False) -> None:
    """Trains, evaluates before and after, and writes checkpoint, export, metrics and result to `workdir`.

    Asked to stop by SIGTERM or Ctrl-C, it saves what is done and returns; with `requeue` it then exits with
    75, for schedulers that start a job again only where it has failed.
    """
    validate(config)
    distributed.start(config, workdir)
    try:
        with Notice() as notice:  # JAX, which joins the processes, has a handler of its own
            train(config, workdir, notice)
    except StoppedError as stopped:
        print(stopped, flush=True)
        if requeue:
            sys.exit(os.EX_TEMPFAIL)


def train(config: ConfigDict, workdir: Path, notice: Notice) -> None:
    """The run, which looks for a notice wherever it may end.

    Raises:
        StoppedError: it was asked to stop; its last step is saved.
    """
    started = time.monotonic()
    own = functions.load(config)
    sinks.prepare(config.log)

    # ------------------------------------------------------------------ model
    mesh = mesh_of(config.mesh, config.rollout.lanes, config.grpo.rows)
    sampling = share_of(mesh, jax.process_index())
    described, params = load_model(config.model, config.seed, mesh, lora.keeper(config))
    notice.stop_if_asked()
    trained, frozen = freeze(described.config, params, config, mesh)
    whole = lora.attacher(config.lora)
    update = build_update(described.config, config, optimizer_of(config.grpo), mesh)
    state = update.init(trained)

    # ------------------------------------------------------------------ questions
    questions, held_out, data = load_prompts(described, config)
    own.rehearse([prompt.question for prompt in questions[:2]], config.rollout.samples)

    # ------------------------------------------------------------------ rollout, grading, evaluation
    rollout = training_engine(described, config, sampling)
    plain = evaluation_engine(described, config, sampling)
    run_key = jax.random.fold_in(jax.random.key(config.seed), TRAINING_STREAM)

    with (
        locked(workdir),
        Grader(config.reward.grading_workers, config.reward.grading_deadline) as grader,
        checkpoint.Saver(workdir, described, config, data) as saver,
    ):
        progress, state = go_on(workdir, state, described, config, data)
        notice.stop_if_asked()

        watched = notice.watched(plain)
        measure = Timed(partial(measure_model, described, watched, held_out, grader, mesh, config, workdir))
        roll_out = Rounds(notice.watched(rollout), described.tokenizer, questions, grader, config)
        before = once(
            workdir / "evaluation_before.json",
            {"config": checkpoint.bound_fields(config), "version": step_grpo.__version__, "data": data},
            workdir / "completions_before.jsonl",
            lambda: measure(whole(frozen.first, frozen.base), "before"),
        )

        # -------------------------------------------------------------- loop
        with (
            MetricsWriter(distributed.only_first(workdir / "metrics.jsonl"), progress.step) as lines,
            RolloutLog(distributed.only_first(workdir / "rollouts.jsonl"), progress.step) as rollouts,
            sinks.opened(workdir, config, lines) as metrics,
            progress_bar("training", config.steps, progress.step) as bar,
        ):
            skipped = SkippedUpdates(workdir, config, progress.skipped)
            for step in range(progress.step, config.steps):
                clock = Stopwatch(bar.stage)
                ready = decode_ready(
                    whole(state.params, frozen.base), described.config, config.model.dtype, mesh
                )
                key = jax.random.fold_in(run_key, step)
                with kept_rollout(workdir, step + 1, ready, key, questions, config) as kept:
                    scored, stats, cursor = sample_groups(
                        partial(roll_out, ready, clock, kept), progress.cursor, key, config
                    )
                del ready, kept  # the update needs the room
                reward, own_figures = own.judge(scored, reward_groups(scored, config))
                samples = training_samples(scored, advantages(config.grpo.advantage, reward), config)
                samples = trained_groups(samples, scored, config)
                clock.lap("grading_seconds", "update")
                state, measured = update_policy(
                    update, state, frozen, samples, config, mesh, partial(skipped.look, step + 1)
                )
                clock.lap("update_seconds")

                figures = {
                    **rollout_figures(scored, reward, stats, rollout.machine),
                    **measured,
                    **clock.laps,
                    **sampling_figures(scored, samples, config),
                    **own_figures,
                }
                metrics.write(step + 1, figures)
                rollouts.write(step + 1, kept_rollouts(scored, reward, described.tokenizer, config))
                warn(step + 1, figures, lines.first("tokens"), config.warn)
                skipped.stop_if_too_many()
                bar.update(step + 1, **live_figures(figures))
                progress = checkpoint.Progress(step + 1, cursor, skipped.in_a_row)
                saver.offer(progress, state, figures)
        after = measure(whole(state.params, frozen.base), "after")

        # -------------------------------------------------------------- result
        result = {
            "before": before,
            "after": after,
            "exits": mean_exits(read_metrics(workdir / "metrics.jsonl")) if distributed.is_first() else {},
            "seconds": time.monotonic() - started,
            "evaluation_seconds": measure.seconds,
            "seed": config.seed,
        }
        saver.finish()
        finish(workdir, result, described, whole(state.params, frozen.base), config, notice)


def go_on(
    workdir: Path,
    state: TrainState,
    described: Description,
    config: ConfigDict,
    data: Mapping[str, str],
) -> tuple[checkpoint.Progress, TrainState]:
    """`checkpoint.restore`; what an interruption has left goes, and so does the result of an earlier run.

    Only what has come to its end has a result. A run that is refused leaves everything where it is.
    """
    progress, state = checkpoint.restore(workdir, state, described, config, data)
    if distributed.is_first():
        checkpoint.put_away(workdir, progress.step, config)
        remove_debris(workdir / "export")
        (workdir / "result.json").unlink(missing_ok=True)
    return progress, state


def finish(
    workdir: Path,
    result: dict[str, Any],
    described: Description,
    params: qwen.Params,
    config: ConfigDict,
    notice: Notice,
) -> None:
    """Writes the export, the report and `result.json`, shows the closing table, says where everything is.

    `result.json` is the last, for it says that the run has come to its end.

    Raises:
        StoppedError: it was asked to stop before that.
    """
    evaluations = {name: result[name] for name in ("before", "after")}
    card = card_of(config.to_dict(), result, read_metrics(workdir / "metrics.jsonl"))
    exported = export_model(workdir, described, params, card=card, dtype=config.export_dtype)
    notice.stop_if_asked()
    if distributed.is_first():
        write_report(workdir, result)
        paths.write_text(workdir / "result.json", json.dumps(result, indent=2) + "\n")
    Console().print(evaluation_table(evaluations, result["exits"]))
    print(f"metrics: {workdir / 'metrics.jsonl'}")
    print(f"result: {workdir / 'result.json'}")
    print(f"checkpoint: {checkpoint.saved_steps(workdir)[-1]}")
    print(f"export: {exported}")
    print(f"report: {workdir / 'report.html'}")


# ---------------------------------------------------------------------- questions


def load_prompts(
    described: Description, config: ConfigDict
) -> tuple[Sequence[EncodedPrompt], Sequence[EncodedPrompt], dict[str, str]]:
    """The prompts to train on, those to evaluate on, and checksums of both by the fields they come from.

    Raises:
        UserError: a question is among both, or another process has other questions.
    """
    questions = training_questions(described.tokenizer, config)
    held_out = evaluation_prompts(described, config)
    assert_disjoint(questions, held_out)
    vocabulary = {"config.model.tokenizer": checkpoint.vocabulary_of(described.tokenizer)}
    data = {"config.data": checksum(questions), "config.eval.data": checksum(held_out)}
    distributed.agree_on(vocabulary | data)
    return questions, held_out, data


def training_questions(tokenizer: Any, config: ConfigDict) -> Sequence[EncodedPrompt]:
    """All training questions as prompts; the over-long ones are left out and counted."""
    questions = load_questions(config.data)
    prompts = encode_prompts(
        tokenizer,
        list(questions),
        instruction=config.data.instruction,
        max_prompt_tokens=config.rollout.max_prompt_tokens,
    )
    if prompts.dropped:
        print(
            f"{prompts.dropped} training prompts are longer than config.rollout.max_prompt_tokens: left out"
        )
    if not prompts.kept:
        raise UserError("config.rollout.max_prompt_tokens: every training prompt is longer; raise it")
    return prompts.kept


def assert_disjoint(training: Sequence[EncodedPrompt], held_out: Sequence[EncodedPrompt]) -> None:
    """Refuses to evaluate on a question that is trained on.

    Raises:
        UserError: with the number of shared questions and one of them.
    """
    shared = {p.ids for p in training} & {p.ids for p in held_out}
    if shared:
        example = next(p.question.question for p in held_out if p.ids in shared)
        raise UserError(
            f"config.eval.data: {len(shared)} questions are also in config.data, such as {example[:80]!r}; "
            "evaluate on another split"
        )


def take_prompts(
    prompts: Sequence[EncodedPrompt], cursor: int, config: ConfigDict
) -> tuple[list[EncodedPrompt], int]:
    """The prompts of one step, and the cursor behind them."""
    indices, cursor = take(len(prompts), cursor, config.prompts_per_step, config.seed)
    return [prompts[i] for i in indices], cursor


# ---------------------------------------------------------------------- rollout


def training_engine(described: Description, config: ConfigDict, mesh: Mesh) -> RolloutEngine:
    """Sampling with the settings of `config.rollout`, cut short as `config.rollout.exit` says."""
    rollout = config.rollout
    return build_engine(
        described,
        rollout,
        mesh,
        config.model.dtype,
        truncate=rollout.exit != "none",
        temperature=rollout.temperature,
        top_k=rollout.top_k,
        top_p=rollout.top_p,
        min_p=rollout.min_p,
        max_response=rollout.max_response_tokens,
        attention=choose_attention(config.model.attention, mesh),
    )


class Sampled(NamedTuple):
    """Completions, ordered by prompt and sample, what they cost, and the cursor behind their prompts."""

    scored: list[Scored]
    stats: RolloutStats
    cursor: int


@dataclass(frozen=True)
class Rounds:
    """Makes and grades the completions of the next `prompts_per_step` prompts."""

    rollout: Watched
    tokenizer: Any
    questions: Sequence[EncodedPrompt]
    grader: Grader
    config: ConfigDict

    def __call__(
        self, ready: qwen.Params, clock: "Stopwatch", kept: PartialRollout, cursor: int, key: jax.Array
    ) -> Sampled:
        """The same in every process, each of which makes its share.

        Args:
            ready: of `decode_ready`.
            clock: of the step.
            kept: what an interrupted run has made of it, and what this one makes.
            cursor: before the round.
            key: of the round.
        """
        batch, cursor = take_prompts(self.questions, cursor, self.config)
        mine = distributed.share(batch, "config.prompts_per_step")
        ids, samples = [prompt.ids for prompt in mine], self.config.rollout.samples
        total = len(ids) * samples
        clock.show("rollout", 0, total)
        completions, stats = self.rollout(
            ready,
            ids,
            samples,
            key,
            lambda finished: clock.show("rollout", finished, total),
            known=kept.of_round(cursor),
            on_finished=partial(kept.add, cursor),
            on_drop=kept.write,
        )
        clock.lap("rollout_seconds", "grading")
        triggers = tuple(self.config.rollout.triggers)
        closed = self.config.reward.closed_thinking
        scored = score_completions(
            self.tokenizer, mine, completions, self.grader, triggers, closed_thinking=closed
        )
        scored, stats = exchange(scored, stats, batch)
        clock.lap("grading_seconds")
        return Sampled(scored, stats, cursor)


def sample_groups(
    roll_out: Callable[[int, jax.Array], Sampled], cursor: int, key: jax.Array, config: ConfigDict
) -> Sampled:
    """The completions of a step; with dynamic sampling, of as many rounds of prompts as it takes.

    A round follows while fewer than `prompts_per_step` groups are mixed and rounds are left. It depends on
    the cursor and on completions that every process has, so all processes take the same rounds, and a run
    that is resumed takes those of one that was not. The first round is that of a run without.

    Args:
        roll_out: (cursor, key) -> the completions of the next `prompts_per_step` prompts.
        cursor: before the step.
        key: of the step.
        config: of the run.

    Source: Yu et al. 2025, DAPO (arXiv 2503.14476).
    """
    sampled = roll_out(cursor, key)
    for number in range(1, config.grpo.dynamic_sampling):
        if len(mixed_groups(grouped_correct(sampled.scored, config))) >= config.prompts_per_step:
            break
        # A key of its own: where there are few questions, one may come again within the step.
        more = roll_out(sampled.cursor, jax.random.fold_in(key, number))
        costs = zip(astuple(sampled.stats), astuple(more.stats), strict=True)
        stats = RolloutStats(*(one + other for one, other in costs))
        sampled = Sampled(sampled.scored + more.scored, stats, more.cursor)
    return sampled


def trained_groups(samples: Sequence[Sample], scored: Sequence[Scored], config: ConfigDict) -> list[Sample]:
    """What is trained on of the samples of a step: all, or the first `prompts_per_step` mixed groups.

    There are fewer where the rounds of dynamic sampling did not find as many, perhaps none.
    """
    if not config.grpo.dynamic_sampling:
        return list(samples)
    size = config.rollout.samples
    kept = mixed_groups(grouped_correct(scored, config))[: config.prompts_per_step]
    return [sample for group in kept for sample in samples[group * size : (group + 1) * size]]


def grouped_correct(scored: Sequence[Scored], config: ConfigDict) -> np.ndarray:
    """Which completions are correct, bool `[prompts, samples]`."""
    return np.array([s.grade.correct for s in scored]).reshape(-1, config.rollout.samples)


# ---------------------------------------------------------------------- rewards


def reward_groups(scored: Sequence[Scored], config: ConfigDict) -> np.ndarray:
    """Rewards `[prompts, samples]` of completions that are ordered by prompt and sample.

    An answer that could not be graded counts as wrong here, and is counted in the metrics.
    """

    def grouped(values: Sequence[float]) -> np.ndarray:
        return np.array(values).reshape(-1, config.rollout.samples)

    return rewards.score(
        config.reward.name,
        grouped([s.grade.correct for s in scored]),
        grouped([s.grade.formatted for s in scored]),
        grouped([s.steps for s in scored]),
        grouped([len(s.completion.tokens) for s in scored]),
        alpha=config.reward.alpha,
        beta=config.reward.beta,
        baseline=config.reward.baseline,
        length_penalty=config.reward.length_penalty,
        penalty_from=config.reward.penalty_from,
        max_tokens=config.rollout.max_response_tokens,
    )


# ---------------------------------------------------------------------- update


class Frozen(NamedTuple):
    """The weights of a run that no update changes.

    Attributes:
        base: what the trained adapter lies beside; None where all weights are trained.
        first: what is trained, as it was before the first step, a copy; weights in the type of the compute,
            which loses nothing: they are cast to it wherever they are read.
        reference: what the KL compares with; None for the base without an adapter.
    """

    base: qwen.Params | None
    first: qwen.Params
    reference: qwen.Params | None


def freeze(
    cfg: qwen.QwenConfig, params: qwen.Params, config: ConfigDict, mesh: Mesh
) -> tuple[qwen.Params, Frozen]:
    """What is trained, and what stays as it was loaded or begun."""
    if config.lora.rank:
        adapter = lora.init_adapter(cfg, config.lora.rank, tuple(config.lora.targets), config.seed)
        where = shardings(mesh, lora.adapter_axes(cfg, config.lora.targets), adapter)
        adapter = jax.device_put(adapter, where)
        return adapter, Frozen(base=params, first=jax.tree.map(jnp.copy, adapter), reference=None)
    # Always a copy: the update gives its own weights away.
    first = jax.tree.map(partial(jnp.array, dtype=config.model.dtype), params)
    return params, Frozen(base=None, first=first, reference=first)


def optimizer_of(config: ConfigDict) -> Any:
    """AdamW with the settings of `config.grpo`."""
    return adamw(
        config.learning_rate,
        b1=config.b1,
        b2=config.b2,
        weight_decay=config.weight_decay,
        grad_clip=config.grad_clip,
        moments_dtype=config.moments_dtype,
    )


def build_update(cfg: qwen.QwenConfig, config: ConfigDict, optimizer: Any, mesh: Mesh) -> Update:
    """The jitted functions of the update for a model whose weights lie on a mesh."""
    dtype = jnp.dtype(config.model.dtype)
    attention = choose_attention(config.model.attention, mesh, spread_rows=True)
    settings = GrpoSettings(
        clip_low=config.grpo.clip_low,
        clip_high=config.grpo.clip_high,
        ratio=config.grpo.ratio,
        sequence_clip_low=config.grpo.sequence_clip_low,
        sequence_clip_high=config.grpo.sequence_clip_high,
        dual_clip=config.grpo.dual_clip,
        kl_coef=config.grpo.kl_coef,
        temperature=config.rollout.temperature,
        logprob_chunk=config.grpo.logprob_chunk,
    )
    return make_update(
        lambda params, tokens, positions, segments: qwen.forward(
            params, cfg, tokens, positions, segments, dtype, attention, config.model.remat
        ),
        lambda params: params["embed_VD"] if cfg.tied else params["head_DV"],
        settings,
        optimizer,
        vocab_axis=0 if cfg.tied else 1,
        attach=lora.attacher(config.lora),
        mesh=mesh,
    )


def training_samples(scored: Sequence[Scored], advantages: np.ndarray, config: ConfigDict) -> list[Sample]:
    """What the update trains on, in the order of `scored`; `advantages` are `[prompts, samples]`."""
    return [
        Sample(
            prompt_ids=np.array(s.prompt.ids),
            completion_ids=s.completion.tokens,
            advantage=float(advantage),
            sampler_logprobs=s.completion.logprobs,
            loss_mask=np.where(s.completion.forced & (not config.grpo.train_forced_tokens), 0.0, 1.0),
        )
        for s, advantage in zip(scored, advantages.ravel(), strict=True)
    ]


def weighted(samples: Sequence[Sample], config: ConfigDict) -> list[Sample]:
    """The samples of one update with the weights that make its loss the mean that the config names."""
    weights = token_weights(
        [sample.loss_mask.sum() for sample in samples],
        config.grpo.loss_mean,
        max_response_tokens=config.rollout.max_response_tokens,
    )
    return [replace(s, weight=float(weight)) for s, weight in zip(samples, weights, strict=True)]


def update_policy(
    update: Update,
    state: TrainState,
    frozen: Frozen,
    samples: Sequence[Sample],
    config: ConfigDict,
    mesh: Mesh,
    look: Callable[[Sequence[Measurements], Sequence[TrainBatch]], None] = lambda *_: None,
) -> tuple[TrainState, dict[str, float]]:
    """One pass over a rollout batch: an update for every `prompts_per_update` prompts.

    The old log-probs of the whole batch come first, all from the policy that made it. `look` is shown the
    measurements and the batch of every update. Without any sample there is no update.

    Returns:
        The state, and the measurements averaged over the updates (`guards.averaged`).
    """
    if not samples:
        return state, averaged([])
    per_update = config.grpo.prompts_per_update * config.rollout.samples
    shape = {"row_length": config.grpo.row_length, "rows": config.grpo.rows or row_shares(mesh)}

    def compared(part: Sequence[Sample]) -> tuple[TrainBatch, np.int32]:
        batches = pack(part, **shape)
        count = np.int32(len(batches))
        # One shape for every update, even for one whose every sample fills a row.
        placed = place_rows(mesh, stack(batches, math.ceil(per_update / shape["rows"])), axis=1)
        old = placed.sampler_logprobs
        if config.grpo.old_logprobs == "trainer":
            old = update.logprobs(state.params, placed, count, frozen.base).logprobs
        ref = update.logprobs(frozen.reference, placed, count, frozen.base).logprobs
        return TrainBatch(placed, old, ref), count

    firsts = range(0, len(samples), per_update)
    minibatches = [compared(weighted(samples[i : i + per_update], config)) for i in firsts]
    measured: list[Measurements] = []
    for batch, count in minibatches:
        grads, sums = update.accumulate(state.params, *update.start(state.params), batch, count, frozen.base)
        state, measurements = update.apply(state, grads, sums)
        del grads  # as large as the params; the next update begins with zeros that would lie beside them
        measured.append(measurements)
    values = jax.device_get(measured)
    look(values, [batch for batch, _ in minibatches])
    return state, averaged(values)


# ---------------------------------------------------------------------- what is logged


def rollout_figures(
    scored: Sequence[Scored], reward: np.ndarray, stats: RolloutStats, machine: Machine
) -> dict[str, float]:
    """Figures of one rollout batch, all plain numbers."""
    completions = [s.completion for s in scored]
    confidences = np.concatenate([c.confidences for c in completions])
    tokens = sum(len(c.tokens) for c in completions)
    reasons = Counter(c.reason for c in completions)
    figures = {
        "reward": float(reward.mean()),
        "reward_std": float(reward.std()),
        "equal_groups": float(np.mean(np.ptp(reward, axis=1) == 0)),
        "reward_error": standard_error(reward),
        "accuracy": float(np.mean([s.grade.correct for s in scored])),
        "formatted": float(np.mean([s.grade.formatted for s in scored])),
        "grading_failures": float(sum(s.grade.error is not None for s in scored)),
        "tokens": tokens / len(scored),
        "truncated": float(np.mean([len(c.tokens) >= machine.max_response for c in completions])),
        "steps": float(np.mean([s.steps for s in scored])),
        "forced_tokens": float(sum(c.forced.sum() for c in completions)) / len(scored),
        "probes": len(confidences) / len(scored),
        "probe_tokens": sum(c.probe_tokens for c in completions) / len(scored),
        "generated_per_second": (tokens - stats.known_tokens) / stats.seconds,
        "prefill_seconds": stats.prefill_seconds,
        "decode_seconds": stats.decode_seconds,
        "lane_use": stats.live_steps / max(stats.lane_steps, 1),
    }
    each = {
        "accuracy": np.array([s.grade.correct for s in scored]),
        "tokens": np.array([len(c.tokens) for c in completions]),
        "steps": np.array([s.steps for s in scored]),
    }
    figures |= {f"{n}_error": standard_error(v.reshape(reward.shape)) for n, v in each.items()}
    figures |= {f"exit_{reason}": reasons[reason] / len(scored) for reason in REASONS}
    return figures | confidence_figures(confidences, machine.policy)


def standard_error(values: np.ndarray) -> float:
    """The standard error of the mean of values `[prompts, samples]`; of a single prompt there is none: NaN.

    Prompts are drawn, and completions of one prompt resemble each other, so it is that of the prompts' means.
    """
    means = values.mean(axis=1)
    return float(means.std(ddof=1) / math.sqrt(len(means))) if len(means) > 1 else math.nan


def sampling_figures(
    scored: Sequence[Scored], samples: Sequence[Sample], config: ConfigDict
) -> dict[str, float]:
    """Rounds of dynamic sampling and the groups that they gave to train on; nothing without it."""
    if not config.grpo.dynamic_sampling:
        return {}
    size = config.rollout.samples
    return {
        "rounds": len(scored) / (size * config.prompts_per_step),
        "trained_groups": len(samples) / size,
    }


def confidence_figures(confidences: np.ndarray, policy: Policy | None) -> dict[str, float]:
    """Percentiles of a batch's probe confidences and the share that passed; nothing without a probe."""
    if not policy or not len(confidences):
        return {}
    p10, p50, p90 = np.percentile(confidences, [10, 50, 90])
    largest = confidences.max()
    return {
        "confidence_p10": float(p10),
        "confidence_p50": float(p50),
        "confidence_p90": float(p90),
        "confidence_max": float(largest),
        "confidence_above_delta": float(np.mean(policy.passes(confidences))),
    }


def mean_exits(lines: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Share of all training completions that left the thinking for each reason that occurred."""
    shares = {reason: float(np.mean([line[f"exit_{reason}"] for line in lines])) for reason in REASONS}
    return {reason: share for reason, share in shares.items() if share}


def measure_model(
    described: Description,
    engine: Watched,
    held_out: Sequence[EncodedPrompt],
    grader: Grader,
    mesh: Mesh,
    config: ConfigDict,
    workdir: Path,
    params: qwen.Params,
    name: str,
) -> dict[str, Any]:
    """The figures of a model on the held-out questions; its completions go to `completions_NAME.jsonl`."""
    ready = decode_ready(params, described.config, config.model.dtype, mesh)
    scored, _ = evaluate(described, engine, ready, held_out, config, grader, f"evaluation {name}")
    where = distributed.only_first(workdir / f"completions_{name}.jsonl")
    write_completions(where, scored, described.eos_ids)
    return summarise(scored, described.eos_ids)


class Timed:
    """An evaluation that notes in `seconds`, by its name, how long it took."""

    def __init__(self, measure: Callable[[qwen.Params, str], dict[str, Any]]):
        self._measure, self.seconds = measure, dict[str, float]()

    def __call__(self, params: qwen.Params, name: str) -> dict[str, Any]:
        """What the evaluation returns."""
        began = time.monotonic()
        found = self._measure(params, name)
        self.seconds[name] = time.monotonic() - began
        return found


class Stopwatch:
    """Seconds of the stages of a step, and `compile_seconds`, which are part of them.

    Attributes:
        show: is told each stage as it begins, and may be told how far it is.
        laps: seconds by name.
    """

    def __init__(self, show: Callable[..., None] = lambda *_: None):
        self.show = show
        self.laps: dict[str, float] = {"compile_seconds": 0.0}
        self._since, self._compiled = time.monotonic(), compile_seconds()

    def lap(self, name: str, following: str = "") -> None:
        """Ends a stage, `following` begins; the times of a stage that comes again add up."""
        self.show(following)
        now = time.monotonic()
        self.laps[name], self._since = self.laps.get(name, 0.0) + now - self._since, now
        compiled = compile_seconds()
        self.laps["compile_seconds"] += compiled - self._compiled
        self._compiled = compiled


if __name__ == "__main__":
    cli.run(main)
