"""A model as a run needs it: weights, architecture, tokenizer, and what an export must carry along."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from step_grpo import paths
from step_grpo.data.prompts import load_tokenizer
from step_grpo.errors import UserError
from step_grpo.model.linear import Weight
from step_grpo.model.qwen import Params, QwenConfig, config_from_hf, logical_axes
from step_grpo.model.weights import (
    TOKENIZER_FILES,
    checksum,
    lay_out,
    load_checkpoint,
    load_params,
    random_checkpoint,
    resolve_checkpoint,
    write_json,
)


@dataclass(frozen=True)
class Description:
    """All of a model but its weights."""

    config: QwenConfig
    hf_config: dict[str, Any]  # contents of config.json
    generation: dict[str, Any]  # contents of generation_config.json
    eos_ids: tuple[int, ...]
    tokenizer: Any
    weights: str = ""  # `weights.checksum` of the files that the weights came from, if they did


def load_model(
    config: ConfigDict,
    seed: int,
    mesh: Mesh | None = None,
    keep: Callable[[str, jax.Array], Weight] = lambda name, weight: weight,
) -> tuple[Description, Params]:
    """Loads `config.model`: a checkpoint, or random weights of a given architecture.

    Args:
        config: the `model` part of a config.
        seed: of the random weights.
        mesh: over which the weights are to lie; None for one device.
        keep: (our name, float32 weight) -> the form to keep it in.

    Raises:
        UserError: the checkpoint or the tokenizer does not load, or they do not fit each other.
    """
    if config.checkpoint:
        checkpoint = load_checkpoint(resolve_checkpoint(config.checkpoint))
        tokenizer = load_tokenizer(config.tokenizer or str(checkpoint.folder))
        described = Description(
            checkpoint.config,
            checkpoint.hf_config,
            checkpoint.generation,
            checkpoint.eos_ids,
            tokenizer,
            checksum(checkpoint),
        )
        check_vocabulary(described)
        return described, load_params(checkpoint, mesh, keep=keep)
    described, params = random_model(
        config.architecture.to_dict(), load_tokenizer(config.tokenizer), seed, mesh
    )
    kept = jax.tree.map_with_path(
        lambda path, weight, axes: lay_out(keep(path[-1].key, weight), axes, mesh),
        params,
        logical_axes(described.config),
    )
    return described, kept


def random_model(
    architecture: dict[str, Any], tokenizer: Any, seed: int, mesh: Mesh | None = None
) -> tuple[Description, Params]:
    """Random weights around a tokenizer, which says where texts end."""
    hf_config, params = random_checkpoint(architecture, seed, mesh)
    ids = [tokenizer.eos_token_id, tokenizer.pad_token_id]
    eos_ids = tuple(dict.fromkeys(i for i in ids if i is not None))
    hf_config = {**hf_config, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    generation = {"eos_token_id": list(eos_ids), "pad_token_id": tokenizer.pad_token_id, "do_sample": True}
    described = Description(config_from_hf(hf_config), hf_config, generation, eos_ids, tokenizer)
    check_vocabulary(described)
    return described, params


def check_vocabulary(described: Description) -> None:
    """Refuses a tokenizer with ids that the model has no embedding for, or a model that knows no end.

    Raises:
        UserError: naming both sizes.
    """
    known, size = len(described.tokenizer), described.config.vocab_size
    if known > size:
        raise UserError(f"config.model.tokenizer has {known} tokens, but the model only {size}; use its own")
    if not described.eos_ids:
        raise UserError("config.model.checkpoint: no eos_token_id in config.json or generation_config.json")


def save_description(described: Description, folder: Path) -> None:
    """Writes configs and tokenizer, the part of a Hugging Face folder that is not weights."""
    source = Path(described.tokenizer.name_or_path)
    with paths.written_locally(folder) as local:
        write_json(local / "config.json", described.hf_config)
        write_json(local / "generation_config.json", described.generation)
        if (source / "tokenizer.json").is_file():
            for name in TOKENIZER_FILES:
                if (source / name).is_file():
                    shutil.copyfile(source / name, local / name)
        else:
            described.tokenizer.save_pretrained(local)
