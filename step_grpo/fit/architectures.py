"""The architectures of published models, so that no weights and no network are needed to compile for them."""

from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download, try_to_load_from_cache
from ml_collections import ConfigDict

from step_grpo import paths
from step_grpo.errors import UserError
from step_grpo.hub import offline
from step_grpo.model.weights import read_json, resolve_checkpoint


def _qwen3(width: int, ffn: int, layers: int, heads: int, *, tied: bool) -> dict[str, Any]:
    return {
        "model_type": "qwen3",
        "vocab_size": 151936,
        "hidden_size": width,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "rope_theta": 1e6,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": tied,
    }


def _qwen2(vocab: int, width: int, ffn: int, heads: int, kv_heads: int) -> dict[str, Any]:
    return {
        "model_type": "qwen2",
        "vocab_size": vocab,
        "hidden_size": width,
        "intermediate_size": ffn,
        "num_hidden_layers": 28,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "rope_theta": 1e4,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
    }


PUBLISHED = {
    "Qwen/Qwen3-0.6B": _qwen3(1024, 3072, 28, 16, tied=True),
    "Qwen/Qwen3-1.7B": _qwen3(2048, 6144, 28, 16, tied=True),
    "Qwen/Qwen3-4B": _qwen3(2560, 9728, 36, 32, tied=True),
    "Qwen/Qwen3-8B": _qwen3(4096, 12288, 36, 32, tied=False),
    "Qwen/Qwen3-14B": _qwen3(5120, 17408, 40, 40, tied=False),
    "Qwen/Qwen3-32B": _qwen3(5120, 25600, 64, 64, tied=False),
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B": _qwen2(151936, 1536, 8960, 12, 2),
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B": _qwen2(152064, 3584, 18944, 28, 4),
}
"""What the `config.json` of each model on the Hub says of its sizes."""


def architecture_of(model: ConfigDict) -> dict[str, Any]:
    """The contents of the `config.json` of `config.model`; of a model on the Hub no weights are fetched.

    Raises:
        UserError: it is neither known, nor a folder, nor to be had from the Hub.
    """
    if not model.checkpoint:
        return model.architecture.to_dict()
    name = model.checkpoint
    if paths.is_remote(name):
        return read_json(paths.folder(name) / "config.json")
    if name.startswith("builtin:") or Path(name).expanduser().is_dir():
        return read_json(resolve_checkpoint(name) / "config.json")
    cached = try_to_load_from_cache(name, "config.json")
    if isinstance(cached, str):
        return read_json(Path(cached))
    if name in PUBLISHED:
        return dict(PUBLISHED[name])
    try:
        return read_json(Path(hf_hub_download(name, "config.json", local_files_only=offline())))
    except Exception as error:  # whatever the Hub's client raises
        raise UserError(
            f"config.model.checkpoint: the config.json of {name!r} is not to be had ({error}); known without "
            f"a network are {', '.join(PUBLISHED)}"
        ) from error
