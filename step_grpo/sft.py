"""Supervised fine-tuning on a corpus of completions; makes the tiny model that over-thinks.

`python -m step_grpo.sft --config=configs/tiny_sft.py --workdir=DIR`
"""

import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from step_grpo import cli, distributed
from step_grpo.config import validate_sft
from step_grpo.data.arithmetic import Habits
from step_grpo.data.prompts import encode_prompts
from step_grpo.data.sources import Question
from step_grpo.data.tasks import Problem, draw, families
from step_grpo.data.tiny_tokenizer import build_tokenizer
from step_grpo.export import export_model
from step_grpo.grpo.logprobs import token_logprobs
from step_grpo.grpo.packing import PackedBatch, Sample, pack
from step_grpo.grpo.update import adamw
from step_grpo.mesh import make_mesh, place_rows
from step_grpo.metrics import MetricsWriter
from step_grpo.model import qwen
from step_grpo.model.attention import XLA, Attention, choose_attention
from step_grpo.model.load import random_model
from step_grpo.report import progress_bar
from step_grpo.workdir import locked

CORPUS_BLOCK = 512  # completions drawn and packed at a time


def main(config: ConfigDict, workdir: Path = Path("workdir/sft")) -> None:
    """Trains and writes a Hugging Face folder to `workdir/export`."""
    validate_sft(config)
    started = time.monotonic()
    distributed.start(config, workdir)
    tokenizer = corpus_tokenizer(config)
    devices = make_mesh(config.rows)
    described, params = random_model(config.architecture.to_dict(), tokenizer, config.seed, devices)
    optimizer = make_optimizer(config)
    attention = choose_attention("auto", devices, spread_rows=True)
    on_batch = partial(
        train_step, described.config, config.dtype, optimizer, attention=attention, remat=config.remat
    )
    step_fn = jax.jit(on_batch, donate_argnums=(0, 1))
    opt_state = jax.jit(optimizer.init)(params)
    batches = corpus_batches(config, tokenizer)
    with locked(workdir):
        with (
            MetricsWriter(distributed.only_first(workdir / "metrics.jsonl")) as metrics,
            progress_bar("fine-tuning", config.steps) as bar,
        ):
            for step in range(config.steps):
                params, opt_state, loss = step_fn(params, opt_state, place_rows(devices, next(batches)))
                if (step + 1) % config.log_every == 0 or step + 1 == config.steps:
                    figures = {"loss": float(loss), "seconds": time.monotonic() - started}
                    metrics.write(step + 1, figures)
                    bar.update(step + 1, loss=figures["loss"])
        card = {"settings": config.to_dict(), "measured": {"loss": float(loss)}}
        out = export_model(workdir, described, params, card=card, dtype=config.export_dtype)
        print(f"checkpoint: {out}")


def make_optimizer(config: ConfigDict) -> optax.GradientTransformation:
    """AdamW, warmed up and then decayed to nothing along a cosine."""
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, config.learning_rate, config.warmup_steps, config.steps, 0.0
    )
    return adamw(
        schedule,
        b1=config.b1,
        b2=config.b2,
        weight_decay=config.weight_decay,
        grad_clip=config.grad_clip,
        moments_dtype=config.moments_dtype,
    )


def train_step(
    cfg: qwen.QwenConfig,
    dtype: str,
    optimizer: optax.GradientTransformation,
    params: qwen.Params,
    opt_state: optax.OptState,
    batch: PackedBatch,
    attention: Attention = XLA,
    remat: str = "full",
) -> tuple[qwen.Params, optax.OptState, jax.Array]:
    """One step on the mean cross-entropy of the completion tokens of a packed batch."""

    def loss_fn(params):
        tokens = batch.tokens, batch.positions, batch.segment_ids
        hidden = qwen.forward(params, cfg, *tokens, jnp.dtype(dtype), attention, remat)
        logprobs = token_logprobs(
            hidden,
            params["embed_VD"] if cfg.tied else params["head_DV"],
            batch.targets,
            vocab_axis=0 if cfg.tied else 1,
            mesh=attention.rows_over,
        ).logprobs
        return -jnp.sum(logprobs * batch.mask) / jnp.maximum(jnp.sum(batch.mask), 1)

    loss, grads = jax.value_and_grad(loss_fn)(params)
    updates, opt_state = optimizer.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state, loss


def corpus_tokenizer(config: ConfigDict) -> Any:
    """The tokenizer whose tokens are those of the families in the corpus."""
    chosen = families(config.tasks, "config.tasks")
    return build_tokenizer([phrase for family in chosen for phrase in family.phrases])


def corpus_batches(config: ConfigDict, tokenizer: Any) -> Iterator[PackedBatch]:
    """Packed batches of the corpus without end, never the same problem twice but by chance."""
    rng = np.random.default_rng(config.seed)
    chosen = [
        replace(family, habits=author(family.habits, config.habits))
        for family in families(config.tasks, "config.tasks")
    ]
    in_turn = [chosen[i % len(chosen)] for i in range(CORPUS_BLOCK)]
    while True:
        problems: list[Problem] = [draw(family, "train", rng) for family in in_turn]
        questions = [Question(p.question, p.question, str(p.answer)) for p in problems]
        prompts = encode_prompts(
            tokenizer, questions, instruction=config.instruction, max_prompt_tokens=config.row_length
        )
        thoughts = [f.over_thinking(p, rng, f.habits) for f, p in zip(in_turn, problems, strict=True)]
        texts = [thought + tokenizer.eos_token for thought in thoughts]
        completions = tokenizer(texts, add_special_tokens=False)["input_ids"]
        samples = [supervised(p.ids, c) for p, c in zip(prompts.kept, completions, strict=True)]
        fitting = [sample for sample in samples if len(sample) <= config.row_length]
        batches = pack(fitting, row_length=config.row_length, rows=config.rows)
        for i in rng.permutation(len(batches)):
            yield batches[i]


def author(habits: Habits, wanted: ConfigDict) -> Habits:
    """The habits of a family as `config.habits` wants them."""
    changes = wanted.to_dict()
    return replace(habits.slipping(changes.pop("carelessness")), **changes)


def supervised(prompt: tuple[int, ...], completion: list[int]) -> Sample:
    """A sample whose every completion token is trained on."""
    ones = np.ones(len(completion), np.float32)
    return Sample(np.array(prompt), np.array(completion), 1.0, ones, ones)


if __name__ == "__main__":
    cli.run(main)
