"""LoRA (arXiv 2106.09685) and QLoRA: two thin matrices beside a frozen weight, and nothing else is trained.

The adapter is a tree of its own, `{"layers": {"wq_DNH": {"a": [L, D, r], "b": [L, r, N, H]}, ...}}`. It is
what a run trains and checkpoints; `attach` puts it beside the weights of the base. Without it, the base is
the policy that training began with: the reference costs no memory.
"""

import math
import zlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from step_grpo.model.linear import Adapted, Weight
from step_grpo.model.qwen import Params, QwenConfig, abstract_params, logical_axes
from step_grpo.model.rounding import round_off
from step_grpo.model.weights import DTYPES, RULES, Rule, save_tensors, write_json

ADAPTER_STREAM = 2  # folded into the seed; training and evaluation are 0 and 1
TARGETS: dict[str, Rule] = {
    rule.hf.split(".")[-2]: rule for rule in RULES if rule.hf.endswith("_proj.weight")
}
"""The weights that can have an adapter, by the names that PEFT calls their modules."""


@partial(jax.jit, static_argnames=("cfg", "rank", "targets"))
def init_adapter(cfg: QwenConfig, rank: int, targets: tuple[str, ...], seed: int) -> Params:
    """A float32 adapter that changes nothing yet: `a` uniform as in PEFT, `b` zero.

    Args:
        cfg: architecture.
        rank: r.
        targets: of `TARGETS`.
        seed: of the run; the numbers of a weight depend on nothing else but its name.
    """
    weights = abstract_params(cfg)["layers"]
    stream = jax.random.fold_in(jax.random.key(seed), ADAPTER_STREAM)
    layers = {}
    for rule in (TARGETS[name] for name in targets):
        inputs, outputs = split_axes(rule, weights[rule.ours].shape[1:])
        key = jax.random.fold_in(stream, zlib.crc32(rule.ours.encode()))
        # Kaiming's uniform with a slope of sqrt(5), which is what torch.nn.Linear and PEFT begin with
        bound = math.prod(inputs) ** -0.5
        shape = cfg.layers, *inputs, rank
        layers[rule.ours] = {
            "a": jax.random.uniform(key, shape, jnp.float32, -bound, bound),
            "b": jnp.zeros((cfg.layers, rank, *outputs), jnp.float32),
        }
    return {"layers": layers}


def adapter_axes(cfg: QwenConfig, targets: Sequence[str]) -> Params:
    """The tree of logical axis names of an adapter: those of the weight, and none for the rank."""
    axes = logical_axes(cfg)["layers"]
    layers = {}
    for rule in (TARGETS[name] for name in targets):
        stacked, *own = axes[rule.ours]
        inputs, outputs = split_axes(rule, tuple(own))
        layers[rule.ours] = {"a": (stacked, *inputs, None), "b": (stacked, None, *outputs)}
    return {"layers": layers}


def split_axes(rule: Rule, of_axes: tuple[Any, ...]) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """What belongs to the input axes of a weight, and what to its output axes; both without `L`."""
    inputs = len(rule.axes[1])  # a file has [out, in]
    return of_axes[:inputs], of_axes[inputs:]


def attach(scale: float, adapter: Params | None, base: Params) -> Params:
    """The base with an adapter beside its weights, nothing copied; the base itself without one.

    Args:
        scale: alpha / r.
        adapter: as `init_adapter` makes it.
        base: weights of `step_grpo.model.qwen`.
    """
    if adapter is None:
        return base
    beside = {
        name: Adapted(base["layers"][name], pair["a"], pair["b"], scale)
        for name, pair in adapter["layers"].items()
    }
    return {**base, "layers": {**base["layers"], **beside}}


# ---------------------------------------------------------------------- what a config makes of it


def keeper(config: ConfigDict) -> Callable[[str, jax.Array], Weight]:
    """The form in which a run keeps each weight that it loads: (our name, float32 weight) -> weight.

    A frozen weight needs no more digits than the compute has, a trained one stays in float32. Every weight
    that could have an adapter is rounded, if any is.
    """
    dtype = jnp.dtype(config.model.dtype if config.lora.rank else "float32")
    inputs = {rule.ours: len(rule.axes[1]) for rule in TARGETS.values()}

    def keep(name: str, weight: jax.Array) -> Weight:
        if config.lora.base == "dense" or name not in inputs:
            return weight.astype(dtype)
        # along the last of its input axes; `L` is the first of all
        return round_off(weight, config.lora.base, inputs[name] - weight.ndim, dtype)

    return keep


def attacher(lora: ConfigDict) -> Callable[[Params | None, Params | None], Any]:
    """The function from what is trained and what is frozen to the whole model.

    Args:
        lora: `config.lora`; with rank 0 what is trained is the whole.
    """
    return partial(attach, lora.alpha / lora.rank) if lora.rank else lambda trained, frozen: trained


# ---------------------------------------------------------------------- PEFT's files


def save_adapter(adapter: Params, settings: ConfigDict, base: str, folder: Path, *, dtype: str) -> None:
    """Writes `adapter_config.json` and `adapter_model.safetensors` as `peft` reads them.

    Args:
        adapter: as `init_adapter` makes it.
        settings: `config.lora` of its run.
        base: folder or Hub name of the model that it belongs to.
        folder: an existing folder.
        dtype: "float32", "float16" or "bfloat16".
    """
    tensors = {
        name: np.ascontiguousarray(tensor.astype(DTYPES[dtype])) for name, tensor in _peft_tensors(adapter)
    }
    save_tensors(tensors, folder / "adapter_model.safetensors")
    fields = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": settings.rank,
        "lora_alpha": settings.alpha,
        "target_modules": sorted(settings.targets),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    write_json(folder / "adapter_config.json", fields)


def _peft_tensors(adapter: Params) -> Iterator[tuple[str, np.ndarray]]:
    """Names and matrices `[r, in]` and `[out, r]`: torch stores a linear map as `[out, in]`."""
    for rule in TARGETS.values():
        pair = adapter["layers"].get(rule.ours, {"a": (), "b": ()})
        for layer, (a, b) in enumerate(zip(pair["a"], pair["b"], strict=True)):
            module = "base_model.model." + rule.hf.format(layer).removesuffix(".weight")
            yield f"{module}.lora_A.weight", np.asarray(a).reshape(-1, a.shape[-1]).T
            yield f"{module}.lora_B.weight", np.asarray(b).reshape(b.shape[0], -1).T
