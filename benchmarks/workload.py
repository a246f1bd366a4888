"""What the rollout benchmarks run: a model, prompts, and engines around them."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from step_grpo.config import base_config, data_config
from step_grpo.data.prompts import encode_prompts
from step_grpo.data.sources import load_questions
from step_grpo.evaluate import decode_ready
from step_grpo.mesh import make_mesh, replicated
from step_grpo.model import qwen
from step_grpo.model.load import Description, load_model, random_model, save_description
from step_grpo.model.weights import resolve_checkpoint, save_params
from step_grpo.rollout.engine import Completion, RolloutEngine, build_engine

SHAPES = {
    "qwen3_0p6b": {
        "model_type": "qwen3",
        "vocab_size": 151936,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "rope_theta": 1e6,
        "tie_word_embeddings": True,
    }
}


@dataclass(frozen=True)
class Workload:
    """A model in float32 with the same weights in a Hugging Face folder, and prompts for it."""

    described: Description
    params: qwen.Params  # as the rollout reads them
    folder: Path
    prompts: list[tuple[int, ...]]
    config: ConfigDict
    mesh: Mesh

    @property
    def weight_bytes(self) -> int:
        """Of one copy of the weights."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self.params))

    @property
    def kv_bytes(self) -> int:
        """Of the keys and values of one token."""
        cfg = self.described.config
        return 2 * 4 * cfg.layers * cfg.kv_heads * cfg.head_dim


def tiny_config(lanes: int, longest: int = 256, *, early_abort: bool = True) -> ConfigDict:
    """The built-in tiny model on its own questions, by default with the budgets of `configs/tiny.py`."""
    config = base_config().unlock()
    config.model.checkpoint, config.model.dtype = "builtin:tiny", "float32"
    config.data = data_config(source="arithmetic", split="train", count=10_000)
    config.rollout.update(
        lanes=lanes,
        max_prompt_tokens=32,
        max_response_tokens=longest,
        budget_margin=16,
        early_abort=early_abort,
    )
    return config.lock()


def tiny_workload(prompts: int, config: ConfigDict) -> Workload:
    """The tiny model and the first training questions."""
    described, params = load_model(config.model, seed=0)
    mesh = make_mesh(config.rollout.lanes)
    return Workload(
        described,
        decode_ready(jax.device_put(params, replicated(mesh)), described.config, config.model.dtype, mesh),
        resolve_checkpoint(config.model.checkpoint),
        encode(described.tokenizer, prompts, config),
        config,
        mesh,
    )


def random_workload(shape: str, prompts: int, config: ConfigDict, devices: int, folder: Path) -> Workload:
    """Random weights of one of `SHAPES`, also written to `folder`; the tokenizer is the tiny model's.

    Args:
        shape: key of `SHAPES`.
        prompts: how many.
        config: from `tiny_config`.
        devices: that hold the weights and share the lanes; a large model runs best on one.
        folder: an existing folder.
    """
    tokenizer = load_model(config.model, seed=0)[0].tokenizer
    described, params = random_model(SHAPES[shape], tokenizer, seed=0)
    save_params(params, described.hf_config, folder, dtype="float32")
    save_description(described, folder)
    mesh = make_mesh(config.rollout.lanes, devices)
    ready = decode_ready(jax.device_put(params, replicated(mesh)), described.config, config.model.dtype, mesh)
    return Workload(described, ready, folder, encode(tokenizer, prompts, config), config, mesh)


def encode(tokenizer: Any, count: int, config: ConfigDict) -> list[tuple[int, ...]]:
    """The first `count` prompts of `config.data`."""
    questions = load_questions(data_config(**{**config.data.to_dict(), "count": count}), where="config.data")
    chosen = [questions[i] for i in range(count)]
    encoded = encode_prompts(
        tokenizer,
        chosen,
        instruction=config.data.instruction,
        max_prompt_tokens=config.rollout.max_prompt_tokens,
    )
    return [prompt.ids for prompt in encoded.kept]


def make_engine(
    work: Workload, *, truncate: bool, max_response: int | None = None, endless: bool = False
) -> RolloutEngine:
    """An engine at temperature 1.

    Args:
        work: model and settings.
        truncate: with the state machine of the truncated rollout.
        max_response: tokens, by default the config's.
        endless: no token ends a completion: all are `max_response` long.
    """
    described = replace(work.described, eos_ids=(-1,)) if endless else work.described
    return build_engine(
        described,
        work.config.rollout,
        work.mesh,
        work.config.model.dtype,
        truncate=truncate,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        min_p=0.0,
        max_response=max_response or work.config.rollout.max_response_tokens,
    )


def count_tokens(completions: Iterable[Completion]) -> int:
    """Tokens of completions; what was spent on padding and probes is not among them."""
    return sum(len(completion.tokens) for completion in completions)
