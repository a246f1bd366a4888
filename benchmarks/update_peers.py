"""What the update is compared with: a plain padded GRPO step in JAX, and TRL's GRPO loss on torch.

Both are written for themselves and share no loss, no log-probs and no packing with `step_grpo.grpo`. They
take a batch in micro-batches of as many sequences as ours has rows, padded to the longest sequence of all.
"""

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
from transformers import AutoModelForCausalLM

from step_grpo.grpo.packing import Sample
from step_grpo.grpo.settings import GrpoSettings
from step_grpo.model import qwen
from step_grpo.model.attention import XLA, full_attention


@dataclass(frozen=True)
class Scored:
    """A sample with the log-probs of its completion tokens under the two policies that the loss knows."""

    sample: Sample
    old: np.ndarray  # f32 [C]
    ref: np.ndarray  # f32 [C]


class Padded(NamedTuple):
    """Sequences padded on the right, all `[B, T]`; position t predicts the token at t + 1."""

    tokens: Any
    targets: Any
    mask: Any  # 1 where the target is a completion token
    advantages: Any
    old: Any
    ref: Any


class TrlBatch(NamedTuple):
    """What TRL's loss takes: prompts `[B, P]` padded on the left, completions `[B, C]` on the right."""

    prompt_ids: np.ndarray
    prompt_mask: np.ndarray
    completion_ids: np.ndarray
    completion_mask: np.ndarray
    advantages: np.ndarray  # [B]
    old_per_token_logps: np.ndarray
    ref_per_token_logps: np.ndarray


def pad_right(batch: Sequence[Scored], rows: int, width: int) -> Iterator[Padded]:
    """Micro-batches of `rows` sequences padded to `width`; the last is filled up with empty rows."""
    for start in range(0, len(batch), rows):
        whole = Padded(*(np.zeros((rows, width), kind) for kind in (np.int32,) * 2 + (np.float32,) * 4))
        for row, scored in enumerate(batch[start : start + rows]):
            prompt, completion = scored.sample.prompt_ids, scored.sample.completion_ids
            text = np.concatenate([prompt, completion])
            answered = slice(len(prompt) - 1, len(text) - 1)
            whole.tokens[row, : len(text)] = text
            whole.targets[row, : len(text) - 1] = text[1:]
            whole.mask[row, answered] = scored.sample.loss_mask
            whole.advantages[row, answered] = scored.sample.advantage
            whole.old[row, answered] = scored.old
            whole.ref[row, answered] = scored.ref
        yield whole


def pad_for_trl(batch: Sequence[Scored], rows: int, prompt: int, completion: int) -> Iterator[TrlBatch]:
    """Micro-batches of at most `rows` sequences, prompts and completions padded to the given widths."""

    def left(values: np.ndarray) -> np.ndarray:
        return np.pad(values, (prompt - len(values), 0))

    def right(values: np.ndarray) -> np.ndarray:
        return np.pad(values, (0, completion - len(values)))

    for start in range(0, len(batch), rows):
        part = batch[start : start + rows]
        yield TrlBatch(
            np.stack([left(s.sample.prompt_ids) for s in part]),
            np.stack([left(np.ones_like(s.sample.prompt_ids)) for s in part]),
            np.stack([right(s.sample.completion_ids) for s in part]),
            np.stack([right(np.ones_like(s.sample.completion_ids)) for s in part]),
            np.array([s.sample.advantage for s in part], np.float32),
            np.stack([right(s.old) for s in part]),
            np.stack([right(s.ref) for s in part]),
        )


# ---------------------------------------------------------------------- JAX, padded


def padded_loss(
    params: qwen.Params, batch: Padded, cfg: qwen.QwenConfig, settings: GrpoSettings, *, remat: bool
) -> jax.Array:
    """The loss summed over trained tokens, from the logits `[B, T, V]` of all of them.

    Args:
        params: f32 weights.
        batch: padded.
        cfg: the architecture.
        settings: of the loss; those of its chunks are not read.
        remat: layers are computed anew in the backward pass.
    """
    positions = jnp.broadcast_to(jnp.arange(batch.tokens.shape[1]), batch.tokens.shape)
    rope = qwen.rope_table(positions, cfg)

    def body(x_BTD, weights):
        return qwen.layer(cfg, weights, x_BTD, rope, lambda q, k, v: (full_attention(XLA, q, k, v), None))

    x_BTD = params["embed_VD"][batch.tokens]
    x_BTD, _ = jax.lax.scan(jax.checkpoint(body) if remat else body, x_BTD, params["layers"])
    logits_BTV = qwen.unembed(params, qwen.rms_norm(x_BTD, params["final_norm_D"], cfg.rms_eps))
    every = jax.nn.log_softmax(logits_BTV / settings.temperature)
    logprobs = jnp.take_along_axis(every, batch.targets[..., None], axis=-1)[..., 0]

    ratio = jnp.exp(logprobs - batch.old)
    clipped = jnp.clip(ratio, 1 - settings.clip_low, 1 + settings.clip_high)
    gain = jnp.minimum(ratio * batch.advantages, clipped * batch.advantages)
    worst = settings.dual_clip * batch.advantages
    gain = jnp.where(batch.advantages < 0, jnp.maximum(gain, worst), gain)
    log_ratio = batch.ref - logprobs
    kl = jnp.exp(log_ratio) - log_ratio - 1
    return jnp.sum(batch.mask * (settings.kl_coef * kl - gain))


class PaddedStep:
    """A plain step: full logits, every activation kept, gradients of the micro-batches added up, AdamW."""

    def __init__(
        self,
        cfg: qwen.QwenConfig,
        settings: GrpoSettings,
        optimizer: optax.GradientTransformation,
        *,
        remat: bool = False,
    ):
        """Nothing is compiled yet.

        Args:
            cfg: the architecture.
            settings: of the loss.
            optimizer: the same as ours.
            remat: layers are computed anew in the backward pass.
        """
        loss = jax.value_and_grad(partial(padded_loss, cfg=cfg, settings=settings, remat=remat))

        def accumulate(params, grads, total, batch):
            value, more = loss(params, batch)
            return jax.tree.map(jnp.add, grads, more), total + value

        def apply(params, opt_state, grads, tokens):
            grads = jax.tree.map(lambda grad: grad / tokens, grads)
            updates, opt_state = optimizer.update(grads, opt_state, params)
            return optax.apply_updates(params, updates), opt_state

        # Not jitted: the zeros lie on the devices of the params.
        self.start = lambda params: (jax.tree.map(jnp.zeros_like, params), jnp.zeros(()))
        self.accumulate = jax.jit(accumulate, donate_argnums=(1, 2))
        self.apply = jax.jit(apply, donate_argnums=(0, 1))


# ---------------------------------------------------------------------- torch, TRL's loss


class TrlStep:
    """TRL's GRPO step without its trainer: the same model of transformers, loss and optimizer, float32.

    The loss is `GRPOTrainer`'s with `loss_type="dapo"` (token mean over the update batch), `delta` for the
    dual clip and `beta` for the KL, restated; TRL's own needs a trainer around it. Gradient checkpointing is
    off, which is faster and takes more memory.
    """

    def __init__(self, folder: Path, settings: GrpoSettings, *, learning_rate: float, weight_decay: float):
        """Loads the model.

        Args:
            folder: of a Hugging Face checkpoint.
            settings: of the loss.
            learning_rate: of AdamW.
            weight_decay: of AdamW.
        """
        torch.set_num_threads(len(os.sched_getaffinity(0)))
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).train()
        self.settings = settings
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), learning_rate, weight_decay=weight_decay, fused=True
        )

    def step(self, batches: Sequence[TrlBatch]) -> None:
        """One update."""
        self.gradient(batches)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()

    def gradient(self, batches: Sequence[TrlBatch]) -> float:
        """Sets the gradients to those of the token mean; returns the loss."""
        self.optimizer.zero_grad()
        tokens = float(sum(batch.completion_mask.sum() for batch in batches))
        total = 0.0
        for batch in batches:
            loss = self._loss(batch) / tokens
            loss.backward()
            total += loss.item()
        return total

    def named_gradients(self) -> dict[str, np.ndarray]:
        """The gradient of each tensor, by its name in a checkpoint."""
        return {name: weight.grad.numpy() for name, weight in self.model.named_parameters()}

    def _logprobs(self, batch: TrlBatch) -> torch.Tensor:
        """Log-probs of the completions' tokens, `[B, C]`."""
        ids = torch.from_numpy(np.concatenate([batch.prompt_ids, batch.completion_ids], axis=1)).long()
        mask = torch.from_numpy(np.concatenate([batch.prompt_mask, batch.completion_mask], axis=1)).long()
        kept = batch.completion_ids.shape[1]
        out = self.model(input_ids=ids, attention_mask=mask, logits_to_keep=kept + 1, use_cache=False)
        logits = out.logits[:, :-1] / self.settings.temperature
        targets = ids[:, -kept:, None]
        # A row at a time, as TRL does, so that no [B, C, V] is made beside the logits.
        log_z = torch.stack([torch.logsumexp(row, dim=-1) for row in logits])
        return torch.gather(logits, -1, targets)[..., 0] - log_z

    def _loss(self, batch: TrlBatch) -> torch.Tensor:
        """Summed over the completions' tokens."""
        bounds = self.settings
        mask, advantages, old, ref = (
            torch.from_numpy(np.asarray(x, np.float32))
            for x in (
                batch.completion_mask,
                batch.advantages[:, None],
                batch.old_per_token_logps,
                batch.ref_per_token_logps,
            )
        )
        logprobs = self._logprobs(batch)
        coef_1 = torch.exp(logprobs - old)
        coef_2 = torch.clamp(coef_1, 1 - bounds.clip_low, 1 + bounds.clip_high)
        coef_1 = torch.clamp(coef_1, max=bounds.dual_clip)
        loss = -torch.min(coef_1 * advantages, coef_2 * advantages)
        kl = torch.exp(ref - logprobs) - (ref - logprobs) - 1
        return ((loss + bounds.kl_coef * kl) * mask).sum()


# ---------------------------------------------------------------------- peak memory of torch


def trl_memory(folder: Path, batches: Sequence[TrlBatch], settings: GrpoSettings) -> tuple[int | None, str]:
    """How much a process of its own grows by the model and one step.

    Returns:
        Bytes, and ""; or None, and the reason.
    """
    if not os.access("/proc/self/clear_refs", os.W_OK):
        return None, "this system does not reset the peak of a process (no /proc/self/clear_refs)"
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(_grown, folder, batches, settings).result(), ""


def _grown(folder: Path, batches: Sequence[TrlBatch], settings: GrpoSettings) -> int:
    """Peak resident bytes during a step over those before the model was loaded; in a process of its own."""
    before = _resident("VmRSS")
    step = TrlStep(folder, settings, learning_rate=0.0, weight_decay=0.0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak while loading is not that of the step
    step.step(batches)
    return _resident("VmHWM") - before


def _resident(field: str) -> int:
    """`VmRSS` (now) or `VmHWM` (peak) of this process, bytes."""
    status = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in status if line.startswith(field + ":"))
