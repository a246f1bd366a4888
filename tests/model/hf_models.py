"""Random checkpoints that transformers itself writes, shared by the tests of this folder."""

import functools
import json
import re
from pathlib import Path

import jax
import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from step_grpo.model.qwen import forward, unembed

VOCAB = 102
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}<think>"
SMALL = {
    "vocab_size": VOCAB,
    "intermediate_size": 56,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "eos_token_id": 7,
}
FAMILIES = {
    # the width of the heads is not D / N, and the base of the rotation is Qwen3's own
    "qwen3_tied": {"model_type": "qwen3", "hidden_size": 48, "head_dim": 16, "tie_word_embeddings": True},
    "qwen3_untied": {"model_type": "qwen3", "hidden_size": 40, "head_dim": 12, "tie_word_embeddings": False},
    "qwen2_tied": {"model_type": "qwen2", "hidden_size": 32, "tie_word_embeddings": True},
    "r1_distill": {"model_type": "qwen2", "hidden_size": 48, "tie_word_embeddings": False},
}
THETA = {"qwen3_tied": 1e6, "qwen3_untied": 1e6, "qwen2_tied": 1e6, "r1_distill": 1e4}
DTYPES = ("float32", "float16", "bfloat16")


def write_checkpoint(folder: Path, family: str, dtype: str = "float32", sharded: bool = False) -> Path:
    """Lets transformers write a model whose every weight is random, norms and biases too."""
    fields = {**SMALL, **FAMILIES[family]}
    rope = {"rope_theta": THETA[family], "rope_type": "default"}
    config = AutoConfig.for_model(fields.pop("model_type"), rope_parameters=rope, **fields)
    model = AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(len(family))
    with torch.no_grad():
        for weight in model.parameters():
            noise = torch.randn(weight.shape, generator=generator)
            weight.copy_(noise * weight.shape[1] ** -0.5 if weight.ndim == 2 else 0.7 + 0.5 * noise)
    model.generation_config.eos_token_id = [7, 9]
    model.to(getattr(torch, dtype)).save_pretrained(folder, max_shard_size="30KB" if sharded else "1GB")
    write_tokenizer(folder)
    return folder


def write_tokenizer(folder: Path) -> None:
    """A word-level tokenizer with a chat template."""
    words = {f"w{i}": i for i in range(VOCAB)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="w7", pad_token="w9", unk_token="w0")
    fast.chat_template = TEMPLATE
    fast.save_pretrained(folder)


def transformers_logits(folder: Path, tokens: np.ndarray) -> np.ndarray:
    """Logits `[B, T, V]` of transformers in float32, computed from the same files."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return model(torch.tensor(tokens)).logits.numpy()


@functools.partial(jax.jit, static_argnames="cfg")
def packed_logits(params, cfg, tokens_BT, positions_BT, segments_BT):
    """Our logits `[B, T, V]` of packed rows in float32."""
    return unembed(params, forward(params, cfg, tokens_BT, positions_BT, segments_BT, np.float32))


def our_logits(params, cfg, tokens: np.ndarray) -> np.ndarray:
    """Our logits `[B, T, V]` of whole rows."""
    positions = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
    return np.asarray(packed_logits(params, cfg, tokens, positions, np.ones_like(tokens)))


def random_tokens(rows: int, length: int) -> np.ndarray:
    return np.random.default_rng(rows * 1000 + length).integers(0, VOCAB, (rows, length))


def edit_json(path: Path, **fields) -> None:
    """Sets fields of a JSON file; None deletes."""
    value = {**json.loads(path.read_text()), **fields}
    path.write_text(json.dumps({name: field for name, field in value.items() if field is not None}))


def one_line(message: str) -> bool:
    return "\n" not in message and re.search(r"\S", message) is not None
