"""Share of lane-steps that carry a live sample when lengths are heavy-tailed.

`python -m benchmarks.lanes`: lengths are log-normal with sigma 1 and there are 32 times as many samples as
lanes. The real engine runs a small random model, in which no token ends a completion, and is given the length
of each as its limit; so for several draws of the lengths. A device that waits for others is charged for as
long as it waits. The last line is one JSON object:

- `live_share`: lane-steps with a live sample over all lane-steps, with refill and packing, the median over
  the draws, and `live_share_low`, the least of them;
- `live_share_static`: the same lengths in static batches that last as long as their longest sample, likewise
  the median.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.timing import conditions, plain
from benchmarks.workload import tiny_config
from step_grpo.mesh import make_mesh, replicated, use_all_cores
from step_grpo.model import qwen
from step_grpo.model.load import load_model, random_model
from step_grpo.rollout.engine import build_engine

MODEL = {
    "model_type": "qwen3",
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "head_dim": 8,
}


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs the benchmark and prints its figures; returns the JSON object."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.lanes", description=__doc__)
    parser.add_argument("--lanes", type=int, default=64)
    parser.add_argument("--per_lane", type=int, default=32, help="samples a lane")
    parser.add_argument("--median", type=int, default=32, help="tokens of the median sample")
    parser.add_argument("--longest", type=int, default=2048, help="longer samples are cut to this")
    parser.add_argument("--seeds", type=int, default=5, help="draws of the lengths, from seed 0 on")
    args = parser.parse_args(argv)
    use_all_cores()
    shares, static, tokens = [], [], 0
    for seed in range(args.seeds):
        wanted = draw_lengths(args.lanes * args.per_lane, args.median, args.longest, seed)
        made, stats = run(args.lanes, wanted)
        assert made == wanted.tolist(), "the engine did not keep to the lengths it was given"
        shares.append(stats.live_steps / stats.lane_steps)
        static.append(static_share(wanted, args.lanes))
        tokens += int(wanted.sum())
        print(f"lengths of seed {seed}, up to {wanted.max()}: {shares[-1]:.3f}, static {static[-1]:.3f}")
    result = {
        "live_share": float(np.median(shares)),
        "live_share_low": min(shares),
        "live_share_static": float(np.median(static)),
        "tokens": tokens,
        "settings": {**vars(args), **conditions()},
    }
    result = plain(result)
    print(json.dumps(result))
    return result


def draw_lengths(count: int, median: float, longest: int, seed: int) -> np.ndarray:
    """Log-normal lengths `[count]` with sigma 1, whole, in `1..longest`."""
    drawn = median * np.exp(np.random.default_rng(seed).standard_normal(count))
    return np.clip(np.round(drawn), 1, longest).astype(np.int32)


def static_share(lengths: np.ndarray, lanes: int) -> float:
    """The share of live lane-steps if `lanes` samples at a time ran until the longest of them is done."""
    batches = [lengths[start : start + lanes] for start in range(0, len(lengths), lanes)]
    return float(lengths.sum() / sum(lanes * batch.max() for batch in batches))


def run(lanes: int, lengths: np.ndarray) -> tuple[list[int], Any]:
    """The engine on a random model: the lengths of its completions, and its statistics."""
    config = tiny_config(lanes)
    tokenizer = load_model(config.model, seed=0)[0].tokenizer
    described, params = random_model({**MODEL, "vocab_size": len(tokenizer)}, tokenizer, seed=0)
    described = replace(described, eos_ids=(-1,))  # no token ends a completion
    mesh = make_mesh(lanes)
    engine = build_engine(
        described,
        config.rollout,
        mesh,
        "float32",
        truncate=False,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        min_p=0.0,
        max_response=int(lengths.max()),
    )
    ready = jax.device_put(qwen.decode_params(params, jnp.float32), replicated(mesh))
    prompts = [(3 + i % (len(tokenizer) - 3),) for i in range(len(lengths))]
    completions, stats = engine(ready, prompts, 1, jax.random.key(0), limits=lengths.tolist())
    return [len(completion.tokens) for completion in completions], stats


if __name__ == "__main__":
    main()
