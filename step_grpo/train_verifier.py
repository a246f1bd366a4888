"""Trains the verifier of FlashThink: a model that says whether a reasoning so far suffices.

`python -m step_grpo.train_verifier --config=configs/tiny.py --workdir=DIR`

FlashThink (arXiv 2505.13949) cuts the reasoning into chunks at delimiters. Behind each, a second model judges
from the question and the reasoning so far whether the right answer can be given now; a yes ends the thinking.
Its variant with a tuned verifier, FT2, fits that model to the data and to the model that thinks.

The model of the config answers as many prompts as a run of `step_grpo.main` would see (`steps`,
`prompts_per_step`, `rollout`), by plain sampling. Of each thinking a few prefixes are drawn that end at one
of `config.rollout.verifier.delimiters`. Behind each the thinking is closed, and the model answers: if it is
right, the prefix suffices. A copy of the model is then trained to say yes or no, by
`config.verifier_training`. `prefixes.jsonl`, `metrics.jsonl`, `result.json` and `export` are left in DIR; the
export is a `config.rollout.verifier.checkpoint`.

Choices of this implementation: the answer that labels a prefix is decoded greedily, once; the verifier starts
from the model itself, whose tokenizer it must share; it is trained on the one token of its verdict, in the
words of `config.rollout`; both verdicts count the same in total, however many prefixes have each, so that 0.5
is the threshold at which both kinds of mistake weigh alike; a prefix that several completions share counts
once, and delimiters that `config.rollout.max_probes` would leave unjudged are not drawn.
"""

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from step_grpo import cli, distributed
from step_grpo.config import validate
from step_grpo.data.prompts import EncodedPrompt, think_end_id
from step_grpo.errors import UserError
from step_grpo.evaluate import decode_ready, greedy_engine
from step_grpo.grpo.packing import PackedBatch, Sample, pack, unpack
from step_grpo.imitate import fine_tune, finish, sample
from step_grpo.mesh import mesh_of, place_rows, replicated, row_shares, share_of
from step_grpo.model import qwen
from step_grpo.model.attention import Attention, choose_attention
from step_grpo.model.load import Description, load_model
from step_grpo.report import progress_bar
from step_grpo.reward.grading import Grader
from step_grpo.rollout.engine import CLOSING
from step_grpo.rollout.policies import Verifier, encode, verifier_of
from step_grpo.rollout.triggers import TriggerTable, build_delimiters, token_bytes
from step_grpo.scoring import Scored
from step_grpo.workdir import locked

PREFIX_STREAM = 2  # of the seed: which prefixes are drawn
HELD_OUT = 8  # one prompt in so many is not trained on


@dataclass(frozen=True)
class Prefix:
    """A reasoning that stops at a delimiter, which is its last token."""

    prompt: EncodedPrompt
    tokens: tuple[int, ...]


def main(config: ConfigDict, workdir: Path = Path("workdir/verifier")) -> None:
    """Samples, cuts, labels, fine-tunes, measures, and exports."""
    validate(config)
    if config.lora.rank:
        raise UserError("config.lora.rank is above 0; a verifier is trained with all weights, set it to 0")
    distributed.start(config, workdir)
    mesh = mesh_of(config.mesh, config.rollout.lanes, config.verifier_training.rows)
    described, params = load_model(config.model, config.seed, mesh)
    policy = verifier_of(config.rollout, described.tokenizer, described.config)
    check_room(policy, config)
    with locked(workdir):
        scored = sample(described, params, without_exits(config), mesh)
        prefixes = draw_prefixes(scored, described, config)
        if not prefixes:
            raise UserError(
                f"config.rollout.verifier.delimiters: {len(scored)} completions hold none of "
                f"{tuple(config.rollout.verifier.delimiters)!r} in their thinking"
            )
        suffices = label(described, params, prefixes, config, mesh)
        held_out = set_aside(prefixes)
        if not held_out.any():
            raise UserError(
                f"config.prompts_per_step: raise it or config.steps; one prompt in {HELD_OUT} is held out"
            )
        write_prefixes(
            distributed.only_first(workdir / "prefixes.jsonl"),
            prefixes,
            suffices,
            held_out,
            described.tokenizer,
        )
        trained = [prefix for prefix, aside in zip(prefixes, held_out, strict=True) if not aside]
        samples = verdict_samples(policy, trained, suffices[~held_out], described.tokenizer, config.rollout)
        asked = [prefix for prefix, aside in zip(prefixes, held_out, strict=True) if aside]
        measured = partial(measure, described, policy, asked, suffices[held_out], config, mesh)
        result: dict[str, Any] = {
            "prefixes": len(prefixes),
            "trained_on": len(trained),
            "untrained": measured(params),
        }
        params, losses = fine_tune(
            described, params, samples, config, config.verifier_training, mesh, workdir
        )
        result |= {**measured(params), "loss": losses[-1]}
        print(
            f"{len(asked)} held-out prefixes, {result['sufficient']:.1%} of them sufficient: "
            f"accuracy {result['accuracy']:.3f}, AUC {result['auc'] or 0:.3f}"
        )
        finish(described, params, config, workdir, result)


def check_room(policy: Verifier, config: ConfigDict) -> None:
    """Refuses rows that are too short for the longest prefix and what stands around it.

    Raises:
        UserError: naming the length that would do.
    """
    rollout = config.rollout
    around = len(policy.judge.prefix) + len(policy.question) + 1
    needed = around + rollout.max_prompt_tokens + think_budget(rollout)
    if config.grpo.row_length < needed:
        raise UserError(
            f"config.grpo.row_length is {config.grpo.row_length}, but a verifier reads up to {needed} "
            "tokens: raise it, or shorten config.rollout.verifier.question"
        )


def without_exits(config: ConfigDict) -> ConfigDict:
    """The same with plain sampling."""
    plain = config.copy_and_resolve_references().unlock()
    plain.rollout.exit = "none"
    return plain.lock()


# ---------------------------------------------------------------------- prefixes


def think_budget(rollout: ConfigDict) -> int:
    """Tokens that a truncated rollout may think."""
    return int(rollout.think_ratio * rollout.max_response_tokens)


def draw_prefixes(scored: Sequence[Scored], described: Description, config: ConfigDict) -> list[Prefix]:
    """At most `config.verifier_training.prefixes` of each completion, drawn by the seed, none twice."""
    rollout = config.rollout
    texts = token_bytes(described.tokenizer, described.config.vocab_size)
    delimiters = jax.tree.map(np.asarray, build_delimiters(texts, tuple(rollout.verifier.delimiters)))
    stops = {think_end_id(described.tokenizer), *described.eos_ids}
    rng = np.random.default_rng([config.seed, PREFIX_STREAM])
    found: dict[tuple[tuple[int, ...], tuple[int, ...]], Prefix] = {}
    for s in scored:
        tokens = s.completion.tokens[: think_budget(rollout)].tolist()
        ends = delimiter_ends(tokens, delimiters, stops)[: rollout.max_probes]
        count = min(config.verifier_training.prefixes, len(ends))
        for i in sorted(rng.choice(len(ends), count, replace=False)) if count else ():
            prefix = Prefix(s.prompt, tuple(tokens[: ends[i]]))
            found.setdefault((prefix.prompt.ids, prefix.tokens), prefix)
    return list(found.values())


def delimiter_ends(tokens: Sequence[int], delimiters: TriggerTable, stops: Collection[int]) -> list[int]:
    """The lengths of a completion's prefixes at which the decode loop would ask a verifier.

    Args:
        tokens: of the completion.
        delimiters: on the host.
        stops: tokens that end the thinking.
    """
    ends, state = [], 0
    for length, token in enumerate(tokens, 1):
        if token in stops:
            break
        reading = state, delimiters.token_class[token]
        if delimiters.confirms[reading]:
            ends.append(length)
        state = int(delimiters.next_state[reading])
    return ends


def label(
    described: Description, params: qwen.Params, prefixes: Sequence[Prefix], config: ConfigDict, mesh: Mesh
) -> np.ndarray:
    """Whether each prefix suffices: the model, made to answer behind it, is right.

    What is graded is the whole completion, as where a verifier cuts it short: the prefix, the closing text
    and the answer, which has the tokens that are left.

    Returns:
        bool, one a prefix; the same in every process.
    """
    closing = encode(described.tokenizer, CLOSING)
    mine = distributed.share(prefixes, "config.prompts_per_step")
    room = [max(1, config.rollout.max_response_tokens - len(p.tokens) - len(closing)) for p in mine]
    longest = max(len(p.tokens) for p in prefixes) + len(closing)
    engine = greedy_engine(
        described,
        config,
        share_of(mesh, jax.process_index()),
        max_prompt=config.rollout.max_prompt_tokens + longest,
        max_response=max(room),
    )
    ready = decode_ready(params, described.config, config.model.dtype, mesh)
    with progress_bar("answering", len(mine)) as bar:
        asked = [(*p.prompt.ids, *p.tokens, *closing) for p in mine]
        answers, _ = engine(ready, asked, 1, jax.random.key(config.seed), bar.update, room)
    texts = [
        described.tokenizer.decode([*p.tokens, *closing, *answer.tokens], skip_special_tokens=True)
        for p, answer in zip(mine, answers, strict=True)
    ]
    questions = [p.prompt.question for p in mine]
    with Grader(config.reward.grading_workers, config.reward.grading_deadline) as grader:
        grades = grader.grade_many(texts, [q.answer for q in questions], [q.grading for q in questions])
    suffices = np.zeros(len(prefixes), bool)
    for process, said in enumerate(
        distributed.gather({"right": np.array([g.correct for g in grades], bool)})
    ):
        suffices[process :: jax.process_count()] = said["right"]
    return suffices


def set_aside(prefixes: Sequence[Prefix]) -> np.ndarray:
    """Which prefixes are held out, `[n]` bool: those of every `HELD_OUT`-th prompt, all of them."""
    number = {ids: i for i, ids in enumerate(dict.fromkeys(prefix.prompt.ids for prefix in prefixes))}
    return np.array([number[prefix.prompt.ids] % HELD_OUT == HELD_OUT - 1 for prefix in prefixes])


def write_prefixes(
    path: Path, prefixes: Sequence[Prefix], suffices: np.ndarray, held_out: np.ndarray, tokenizer: Any
) -> None:
    """One JSON object a line for every prefix."""
    with path.open("w", encoding="utf-8") as file:
        for prefix, enough, aside in zip(prefixes, suffices.tolist(), held_out.tolist(), strict=True):
            record = {
                "id": prefix.prompt.question.id,
                "prompt": prefix.prompt.question.question,
                "answer": prefix.prompt.question.answer,
                "text": tokenizer.decode(prefix.tokens),
                "token_ids": prefix.tokens,
                "suffices": enough,
                "held_out": aside,
            }
            file.write(json.dumps(record, ensure_ascii=False) + "\n")


# ---------------------------------------------------------------------- what is learnt


def verdict_samples(
    policy: Verifier, prefixes: Sequence[Prefix], suffices: np.ndarray, tokenizer: Any, rollout: ConfigDict
) -> list[Sample]:
    """What the verifier reads, then the one token of the right verdict, which alone is trained on.

    Its mask is a weight: that of both verdicts together is the same, the mean over all 1.

    Raises:
        UserError: all prefixes suffice, or none does.
    """
    count = int(np.sum(suffices))
    if count in (0, len(suffices)):
        raise UserError(
            f"{'all' if count else 'none'} of {len(suffices)} prefixes suffice: nothing to tell apart; "
            "raise config.steps or config.prompts_per_step, or take other config.rollout.verifier.delimiters"
        )
    spoken = (
        first_spoken(tokenizer, rollout.no_words, policy.no),
        first_spoken(tokenizer, rollout.yes_words, policy.yes),
    )
    of_verdict = len(suffices) - count, count
    return [
        Sample(
            np.array(policy.reads(prefix.prompt.ids, prefix.tokens)),
            np.array([spoken[enough]]),
            1.0,
            np.ones(1, np.float32),
            np.full(1, len(suffices) / (2 * of_verdict[enough]), np.float32),
        )
        for prefix, enough in zip(prefixes, suffices.astype(int).tolist(), strict=True)
    ]


def first_spoken(tokenizer: Any, words: Sequence[str], tokens: Collection[int]) -> int:
    """The first token of the first word that begins with one of `tokens`."""
    return next(first for word in words if (first := encode(tokenizer, word)[0]) in tokens)


# ---------------------------------------------------------------------- how good it is


def measure(
    described: Description,
    policy: Verifier,
    prefixes: Sequence[Prefix],
    suffices: np.ndarray,
    config: ConfigDict,
    mesh: Mesh,
    params: qwen.Params,
) -> dict[str, float | None]:
    """How well a verifier tells which prefixes suffice.

    Returns:
        The share that suffices, the accuracy at `config.rollout.verifier.threshold`, and the AUC.
    """
    odds = verdict_odds(described, policy, prefixes, config, mesh, params)
    passes = policy.passes(np.asarray(jax.nn.sigmoid(odds)))
    return {
        "sufficient": float(np.mean(suffices)),
        "accuracy": float(np.mean(passes == suffices)),
        "auc": area_under_curve(odds, suffices),
    }


def verdict_odds(
    described: Description,
    policy: Verifier,
    prefixes: Sequence[Prefix],
    config: ConfigDict,
    mesh: Mesh,
    params: qwen.Params,
) -> np.ndarray:
    """Log-odds of yes that a verifier gives each prefix, float32, as in the decode loop but for rounding."""
    one = np.ones(1, np.float32)
    samples = [
        Sample(np.array(policy.reads(p.prompt.ids, p.tokens)), np.array([policy.yes[0]]), 1.0, one, one)
        for p in prefixes
    ]
    rows = config.verifier_training.rows or row_shares(mesh)
    batches = pack(samples, row_length=config.grpo.row_length, rows=rows)
    attention = choose_attention(config.model.attention, mesh, spread_rows=True)
    on_batch = partial(odds_of_rows, described.config, config.model.dtype, policy, attention)
    run = jax.jit(on_batch, out_shardings=replicated(mesh))
    odds = [np.asarray(run(params, place_rows(mesh, batch))) for batch in batches]
    return np.concatenate(unpack(odds, batches))


def odds_of_rows(
    cfg: qwen.QwenConfig,
    dtype: str,
    policy: Verifier,
    attention: Attention,
    params: qwen.Params,
    batch: PackedBatch,
) -> jax.Array:
    """Log-odds of yes behind every token of packed rows, `[B, T]`."""
    tokens = batch.tokens, batch.positions, batch.segment_ids
    hidden_BTD = qwen.forward(params, cfg, *tokens, jnp.dtype(dtype), attention)
    narrow_DV = qwen.head(params)[:, jnp.array(policy.yes + policy.no)].astype(hidden_BTD.dtype)
    logits_BTV = jnp.einsum("BTD,DV->BTV", hidden_BTD, narrow_DV, preferred_element_type=jnp.float32)
    return policy.look(logits_BTV.reshape(-1, logits_BTV.shape[-1])).note.reshape(batch.tokens.shape)


def area_under_curve(scores: np.ndarray, positive: np.ndarray) -> float | None:
    """Area under the ROC curve: how often a positive scores above a negative, ties counting half.

    By the ranks of Mann and Whitney (1947). None where one of the kinds is missing.
    """
    positives, negatives = int(np.sum(positive)), int(np.sum(~positive))
    if not positives or not negatives:
        return None
    _, which, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[which]  # from 1; ties share the mean of theirs
    above = ranks[positive].sum() - positives * (positives + 1) / 2
    return float(above / (positives * negatives))


if __name__ == "__main__":
    cli.run(main)
