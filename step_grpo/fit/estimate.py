"""How long a step might take, from a chip's published peaks. Nothing was run: an estimate, and no more.

Decoding reads weights and caches from memory once a token, prefill and update are bound by products. The
shares of the peaks that are reached are assumptions, stated here and printed with the result.
"""

from typing import NamedTuple

from ml_collections import ConfigDict

from step_grpo.fit.chips import Chip
from step_grpo.fit.flops import forward_flops
from step_grpo.model.qwen import QwenConfig

PRODUCT_SHARE = 0.45  # of the FLOP/s, in prefill and update
MEMORY_SHARE = 0.6  # of the bandwidth, while decoding
LINK_SHARE = 0.5  # of the links between chips, while decoding; the update hides its own
LANE_USE = 0.85  # of the lanes carry a completion, over a rollout
RESPONSE_SHARE = 0.4  # of the longest response is the mean one
PROMPT_SHARE = 0.1  # of the longest prompt, likewise


class Estimate(NamedTuple):
    """Of one step: seconds, and FLOPs over all chips."""

    prefill_seconds: float
    decode_seconds: float
    logprob_seconds: float
    update_seconds: float
    rollout_flops: float
    logprob_flops: float
    update_flops: float

    @property
    def seconds(self) -> float:
        """Of the step."""
        return self.prefill_seconds + self.decode_seconds + self.logprob_seconds + self.update_seconds


def estimate(
    cfg: QwenConfig, config: ConfigDict, chip: Chip, chips: int, lanes: int, groups: int, exchanged: int
) -> Estimate:
    """An estimate of a step.

    Args:
        cfg: architecture.
        config: of the run.
        chip: of the slice.
        chips: in it.
        lanes: of a group.
        groups: of devices with lanes of their own.
        exchanged: bytes that a device sends around in one decode step.
    """
    prompt = max(1, int(PROMPT_SHARE * config.rollout.max_prompt_tokens))
    response = max(1, int(RESPONSE_SHARE * config.rollout.max_response_tokens))
    prompts, completions = config.prompts_per_step, config.prompts_per_step * config.rollout.samples
    speed = chips * chip.flops * PRODUCT_SHARE

    prefill = prompts * forward_flops(cfg, [prompt], 0)
    forward = completions * forward_flops(cfg, [prompt + response], response)
    decode = completions * forward_flops(cfg, [prompt + response], response) - completions * forward_flops(
        cfg, [prompt], 0
    )
    forwards = 2 if config.grpo.old_logprobs == "trainer" else 1  # old policy and reference, or it alone
    backward = 3 + (config.model.remat == "full")  # a backward pass is two; and the forward pass anew

    devices = chips * chip.devices / groups
    read = decode_bytes(cfg, config, lanes, prompt + response / 2) / devices
    a_step = read / (chip.hbm_bandwidth / chip.devices * MEMORY_SHARE)
    a_step += exchanged / (chip.ici_bandwidth / chip.devices * LINK_SHARE)
    steps = completions * response / (lanes * groups * LANE_USE)
    bound = decode / speed
    return Estimate(
        prefill_seconds=prefill / speed,
        decode_seconds=max(steps * a_step, bound),
        logprob_seconds=forwards * forward / speed,
        update_seconds=backward * forward / speed,
        rollout_flops=prefill + decode,
        logprob_flops=forwards * forward,
        update_flops=backward * forward,
    )


def decode_bytes(cfg: QwenConfig, config: ConfigDict, lanes: int, context: float) -> float:
    """What one decode step of a group reads: the weights once, and the cache of every lane."""
    width = 4 if config.model.dtype == "float32" else 2
    layer = cfg.width * cfg.head_dim * (2 * cfg.heads + 2 * cfg.kv_heads) + 3 * cfg.width * cfg.ffn
    weights = width * (cfg.layers * layer + cfg.width * cfg.vocab_size)
    a_number = 1 if config.rollout.cache_dtype == "int8" else width
    return weights + lanes * context * 2 * cfg.layers * cfg.kv_heads * cfg.head_dim * a_number
