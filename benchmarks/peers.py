"""What the rollout is compared with: transformers' `generate`, a restart loop on it, and Tunix's sampler."""

import importlib.util
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from step_grpo.model.qwen import QwenConfig
from step_grpo.rollout.phases import Machine

Prompts = Sequence[Sequence[int]]


class Generate:
    """transformers' `generate` in static batches, float32, with a cache, on all cores."""

    def __init__(self, folder: Path, pad: int, seed: int = 0):
        """Loads the model.

        Args:
            folder: of a Hugging Face checkpoint.
            pad: token that fills rows up.
            seed: of torch's sampling.
        """
        torch.manual_seed(seed)
        torch.set_num_threads(len(os.sched_getaffinity(0)))
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.model.generation_config = GenerationConfig()  # nothing but what a call says
        self.pad = pad

    def __call__(self, prompts: Prompts, max_new: int, ends: Sequence[int], batch: int) -> list[list[int]]:
        """Samples one completion a prompt at temperature 1, the one of `ends` that ended it included.

        Args:
            prompts: token ids, taken `batch` at a time in their order.
            max_new: tokens of the longest completion.
            ends: tokens that end a completion; empty: all are `max_new` long.
            batch: rows of a static batch.
        """
        done: list[list[int]] = []
        for part in batched(prompts, batch):
            done += [cut(row, ends) for row in self._run(part, max_new, ends, do_sample=True).sequences]
        return done

    def greedy(
        self, prompts: Prompts, max_new: int, ends: Sequence[int], batch: int
    ) -> list[tuple[list[int], np.ndarray]]:
        """The most probable continuation of each prompt, with the log-probs of its tokens."""
        done = []
        for part in batched(prompts, batch):
            out = self._run(part, max_new, ends, do_sample=False, output_logits=True)
            top = torch.stack([torch.log_softmax(x, -1).amax(-1) for x in out.logits], dim=1).numpy()
            for row, logprobs in zip(out.sequences, top, strict=True):
                tokens = cut(row, ends)
                done.append((tokens, logprobs[: len(tokens)]))
        return done

    def _run(self, prompts: Prompts, max_new: int, ends: Sequence[int], **settings: Any) -> Any:
        """One batch, padded on the left; `sequences` of what it returns are the new tokens alone."""
        width = max(map(len, prompts))
        tokens = torch.full((len(prompts), width), self.pad)
        mask = torch.zeros_like(tokens)
        for i, prompt in enumerate(prompts):
            tokens[i, width - len(prompt) :] = torch.tensor(prompt)
            mask[i, width - len(prompt) :] = 1
        sampling = {"temperature": 1.0, "top_p": 1.0, "top_k": 0} if settings["do_sample"] else {}
        with torch.inference_mode():
            out = self.model.generate(
                input_ids=tokens,
                attention_mask=mask,
                generation_config=GenerationConfig(
                    max_new_tokens=max_new,
                    eos_token_id=list(ends) or None,
                    pad_token_id=self.pad,
                    use_cache=True,
                    return_dict_in_generate=True,
                    **sampling,
                    **settings,
                ),
            )
        out.sequences = out.sequences[:, width:]
        return out


def batched(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    """The items, `size` at a time."""
    for start in range(0, len(items), size):
        yield items[start : start + size]


def cut(row: torch.Tensor, ends: Sequence[int]) -> list[int]:
    """A row up to and with its first end."""
    tokens: list[int] = row.tolist()
    stop = next((i for i, token in enumerate(tokens) if token in ends), len(tokens))
    return tokens[: stop + 1]


# ---------------------------------------------------------------------- stop, probe, restart


@dataclass
class Text:
    """A completion in the making."""

    prompt: tuple[int, ...]
    tokens: list[int] = field(default_factory=list)
    reason: str = ""  # empty while it thinks under watch
    ended: bool = False
    probes: int = 0
    repetitions: int = 0
    chunk_start: int = 0
    words: set[bytes] | None = None  # of the chunk before

    @property
    def ids(self) -> list[int]:
        """Prompt and completion."""
        return [*self.prompt, *self.tokens]


class RestartLoop:
    """The truncated rollout as a loop around `generate` (arXiv 2504.15895).

    Each round sends the whole text of every completion that still thinks, in batches of like lengths, up
    to the next trigger; then, in batches again, the texts with the inducing prompt. Answers, which need no
    watch any more, wait for one last round in full batches.
    """

    def __init__(
        self, generate: Generate, machine: Machine, triggers: Sequence[int], texts: list[bytes], batch: int
    ):
        """Settings as the engine has them.

        Args:
            generate: the model.
            machine: of the truncated rollout.
            triggers: tokens that open a step.
            texts: bytes of each token.
            batch: rows of a static batch.
        """
        self.generate, self.machine, self.triggers = generate, machine, tuple(triggers)
        self.texts, self.batch = texts, batch

    def __call__(self, prompts: Sequence[tuple[int, ...]]) -> list[Text]:
        """One completion a prompt."""
        texts = [Text(prompt) for prompt in prompts]
        while thinking := [t for t in texts if not t.reason and not t.ended]:
            stopped = [(t, token) for t, token in self._think(thinking) if token is not None]
            self._probe([(t, token) for t, token in stopped if self._may_probe(t, token)])
        self._finish([t for t in texts if not t.ended])
        return texts

    def _think(self, texts: list[Text]) -> Iterator[tuple[Text, int | None]]:
        """Up to the next trigger, which is handed back and not yet part of the text."""
        m = self.machine
        for part in batched(sorted(texts, key=lambda t: len(t.ids)), self.batch):
            room = m.think_budget - min(len(t.tokens) for t in part)
            made = self.generate([t.ids for t in part], room, (*self.triggers, *m.eos), self.batch)
            for text, more in zip(part, made, strict=True):
                new = more[: m.think_budget - len(text.tokens)]
                stop = new[-1] if new[-1] in self.triggers else None
                text.tokens += new if stop is None else new[:-1]
                text.ended = new[-1] in m.eos
                if m.think_end in new:
                    text.reason, stop = "natural", None
                elif stop is None and not text.ended:
                    self._close(text, "budget")
                yield text, stop

    def _may_probe(self, text: Text, trigger: int) -> bool:
        """Looks for repetition; a completion that was probed often enough goes on without probes."""
        spoken = b"".join(self.texts[t] for t in text.tokens[text.chunk_start :])
        words = set(spoken.split(b" "))
        text.repetitions += words == text.words
        text.words = words
        if text.repetitions >= self.machine.max_repetitions:
            self._close(text, "rep")
            return False
        if text.probes >= self.machine.max_probes:
            self._put_back(text, trigger)
            return False
        return True

    def _probe(self, stopped: list[tuple[Text, int]]) -> None:
        """Asks for a tentative answer; exits, or puts the trigger back."""
        m = self.machine
        for part in batched(sorted(stopped, key=lambda s: len(s[0].ids)), self.batch):
            asked = [[*text.ids, *m.policy.question] for text, _ in part]
            answers = self.generate.greedy(asked, m.policy.max_notes, (m.think_end, *m.eos), self.batch)
            for (text, trigger), (answer, logprobs) in zip(part, answers, strict=True):
                text.probes += 1
                valid = len(answer) >= 2 and (answer[-1] == m.think_end or not m.policy.strict)
                if valid and np.exp(np.mean(logprobs[1:])) > m.policy.delta:
                    self._close(text, "early_exit")
                elif len(text.tokens) >= m.think_budget - m.budget_margin:
                    self._close(text, "budget")
                else:
                    self._put_back(text, trigger)

    def _put_back(self, text: Text, trigger: int) -> None:
        text.tokens.append(trigger)
        text.chunk_start = len(text.tokens)
        if len(text.tokens) >= self.machine.think_budget:
            self._close(text, "budget")

    def _close(self, text: Text, reason: str) -> None:
        text.reason = reason
        text.tokens += self.machine.closing

    def _finish(self, texts: list[Text]) -> None:
        """Samples all that is left, to the end."""
        m = self.machine
        for part in batched(sorted(texts, key=lambda t: len(t.ids)), self.batch):
            room = m.max_response - min(len(t.tokens) for t in part)
            for text, new in zip(
                part, self.generate([t.ids for t in part], room, m.eos, self.batch), strict=True
            ):
                text.tokens = (text.tokens + new)[: m.max_response]
                text.ended = True


# ---------------------------------------------------------------------- Tunix


def tunix_missing() -> str:
    """Why Tunix's sampler cannot run here; empty where it can."""
    if importlib.util.find_spec("tunix") is None:
        return "google-tunix is not installed"
    return ""


class TunixSampler:
    """Tunix's own sampler over its own Qwen3, with the same weights, in static batches."""

    def __init__(self, folder: Path, cfg: QwenConfig, pad: int, capacity: int):
        """Loads the model.

        Args:
            folder: of a Hugging Face checkpoint.
            cfg: its architecture.
            pad: token that fills rows up.
            capacity: tokens of the longest prompt, rounded up to a power of two, and completion.
        """
        import jax  # noqa: PLC0415 (an optional peer brings its own imports)
        from tunix.generate.sampler import CacheConfig, Sampler  # noqa: PLC0415
        from tunix.models.qwen3 import model, params  # noqa: PLC0415

        config = model.ModelConfig(
            num_layers=cfg.layers,
            vocab_size=cfg.vocab_size,
            embed_dim=cfg.width,
            hidden_dim=cfg.ffn,
            num_heads=cfg.heads,
            head_dim=cfg.head_dim,
            num_kv_heads=cfg.kv_heads,
            rope_theta=int(cfg.rope_theta),
            norm_eps=cfg.rms_eps,
            use_tied_embedding=cfg.tied,
        )
        loaded = params.create_model_from_safe_tensors(str(folder), config, dtype=jax.numpy.float32)
        cache = CacheConfig(capacity, cfg.layers, cfg.kv_heads, cfg.head_dim)
        self.sampler, self.calls = Sampler(loaded, _Ids(pad), cache), 0

    def __call__(self, prompts: Prompts, max_new: int, ends: Sequence[int], batch: int) -> list[int]:
        """Tokens of one completion a prompt, at temperature 1, their ends included."""
        lengths = []
        for part in batched(prompts, batch):
            self.calls += 1
            out = self.sampler(
                [" ".join(map(str, prompt)) for prompt in part],
                max_new,
                eos_tokens=list(ends),
                temperature=1.0,
                top_p=1.0,
                seed=self.calls,
            )
            lengths += [min(len(tokens) + 1, max_new) for tokens in out.tokens]  # it cuts the end off
        return lengths


class _Ids:
    """A tokenizer whose text is the token ids."""

    def __init__(self, pad: int):
        self.pad = pad

    def encode(self, text: str) -> list[int]:
        return [int(token) for token in text.split()]

    def decode(self, ids: list[int]) -> str:
        return " ".join(map(str, ids))

    def bos_id(self) -> int:
        return 0  # taken as none

    def eos_id(self) -> int:
        return self.pad

    def pad_id(self) -> int:
        return self.pad
