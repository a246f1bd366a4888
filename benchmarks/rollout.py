"""Tokens a second of the rollout against transformers, a restart loop on it, and Tunix, in one run.

`python -m benchmarks.rollout` takes the built-in tiny model; with `--shape=qwen3_0p6b` random weights of that
shape, and then plain sampling at equal lengths alone. Float32, the same weights and prompts on all sides. The
last line is one JSON object:

- `plain_vs_generate`: equal lengths, no token ends a completion;
- `natural_vs_generate`: natural lengths, tokens of completions a second; padding and probes do not count;
- `truncated_vs_restart`: truncated rollouts, likewise;
- `vs_tunix`: as `natural_vs_generate`, null where `google-tunix` is not installed;
- `floor`: for each figure below its goal, the rate at which weights and the cache in use could be read at the
  measured memory bandwidth, and the share of it that was reached.

Each ratio is the median over pairs of runs that took turns, with the smallest and the largest. `cpu` holds
the same ratios in CPU time, which other programs on the machine disturb less.
"""

import argparse
import json
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks.peers import Generate, RestartLoop, TunixSampler, tunix_missing
from benchmarks.timing import Rates, conditions, interleave, memory_bandwidth, plain
from benchmarks.workload import (
    SHAPES,
    Workload,
    count_tokens,
    make_engine,
    random_workload,
    tiny_config,
    tiny_workload,
)
from step_grpo.mesh import use_all_cores
from step_grpo.rollout.engine import Completion, RolloutEngine, RolloutStats
from step_grpo.rollout.triggers import token_bytes

GOALS = {"plain_vs_generate": 1.5, "natural_vs_generate": 3.0, "truncated_vs_restart": 8.0}
GOAL_OF_SHAPE = 1.0  # plain_vs_generate of a random model of a real shape


class Ours:
    """An engine on a workload; every run has a key of its own."""

    def __init__(self, work: Workload, engine: RolloutEngine, prompts: int, samples: int):
        self.work, self.engine, self.samples, self.runs = work, engine, samples, 0
        self.prompts = work.prompts[:prompts]
        self.completions: list[Completion] = []
        self.stats: RolloutStats | None = None

    def __call__(self) -> int:
        """Tokens of the completions."""
        self.runs += 1
        key = jax.random.key(self.runs)
        self.completions, self.stats = self.engine(self.work.params, self.prompts, self.samples, key)
        return count_tokens(self.completions)

    def floor(self, bandwidth: float) -> float:
        """Tokens a second if the last run had only read the weights at each step and the cache in use."""
        assert self.stats is not None
        positions = 0
        for completion in self.completions:
            prompt, made = len(self.prompts[completion.prompt]), len(completion.tokens)
            positions += made * prompt + made * (made + 1) // 2
            positions += completion.probe_tokens * (prompt + made)
        read = self.stats.steps * self.work.weight_bytes + positions * self.work.kv_bytes
        return count_tokens(self.completions) * bandwidth / read


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs the benchmark and prints its figures; returns the JSON object."""
    args = parse(argv)
    use_all_cores()
    if args.shape:
        with tempfile.TemporaryDirectory(prefix="benchmark_") as folder:
            result = shape(args, Path(folder))
    else:
        result = tiny(args)
    result = plain({**result, "settings": {**vars(args), **conditions()}})
    print(json.dumps(result))
    return result


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line; what is not given depends on the model."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.rollout", description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, help="random weights of this shape")
    parser.add_argument("--prompts", type=int, help="256; 8 for a shape")
    parser.add_argument("--samples", type=int, help="completions a prompt: 5; 1 for a shape")
    parser.add_argument("--repeats", type=int, default=3, help="counted runs of each side")
    parser.add_argument("--lanes", type=int, help="of our engine: 256; 8 for a shape")
    parser.add_argument("--devices", type=int, help="of our engine: all; 1 for a shape")
    parser.add_argument("--tokens", type=int, help="length at equal lengths: 192; 32 for a shape")
    parser.add_argument("--longest", type=int, default=256, help="tokens at most at natural lengths")
    parser.add_argument("--batches", type=int, nargs="+", help="sizes tried: 64 128 256; 8 for a shape")
    args = parser.parse_args(argv)
    ours = {"prompts": 256, "samples": 5, "lanes": 256, "tokens": 192, "batches": [64, 128, 256]}
    theirs = {"prompts": 8, "samples": 1, "lanes": 8, "tokens": 32, "batches": [8], "devices": 1}
    for name, value in (theirs if args.shape else ours).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    return args


def tiny(args: argparse.Namespace) -> dict[str, Any]:
    """The tiny model: equal lengths, natural lengths, truncated rollouts."""
    work = tiny_workload(args.prompts, tiny_config(args.lanes, args.longest))
    peer = Generate(work.folder, work.described.tokenizer.pad_token_id)
    flat = [prompt for prompt in work.prompts for _ in range(args.samples)]
    longest, ends = work.config.rollout.max_response_tokens, work.described.eos_ids

    equal, equal_run, equal_batch = at_equal_lengths(args, work, peer)

    batch = fastest(args.batches, flat, lambda part, b: lengths(peer(part, longest, ends, b)))
    plain_run = Ours(work, make_engine(work, truncate=False), args.prompts, args.samples)
    contestants: dict[str, Callable[[], float]] = {
        "ours": plain_run,
        "generate": lambda: lengths(peer(flat, longest, ends, batch)),
    }
    if reason := tunix_missing():
        print(f"vs_tunix: not measured, {reason}")
    else:
        sampler = TunixSampler(
            work.folder, work.described.config, work.described.tokenizer.pad_token_id, 32 + longest
        )
        contestants["tunix"] = lambda: sum(sampler(flat, longest, ends, batch))
    natural = interleave(contestants, args.repeats)
    report("natural lengths", natural)

    truncated_run = Ours(work, make_engine(work, truncate=True), args.prompts, args.samples)
    loops = {b: restart_loop(work, peer, truncated_run.engine, b) for b in args.batches}
    restart_batch = fastest(args.batches, flat, lambda part, b: lengths([t.tokens for t in loops[b](part)]))
    loop = loops[restart_batch]
    truncated = interleave(
        {"ours": truncated_run, "restart": lambda: lengths([t.tokens for t in loop(flat)])}, args.repeats
    )
    report("truncated rollouts", truncated)
    ours_exits = Counter(c.reason for c in truncated_run.completions)
    print(f"exits, ours: {dict(ours_exits)}; restart loop: {dict(Counter(t.reason for t in loop(flat)))}")

    pairs: dict[str, tuple[Rates, Rates] | None] = {
        "plain_vs_generate": (equal["ours"], equal["generate"]),
        "natural_vs_generate": (natural["ours"], natural["generate"]),
        "truncated_vs_restart": (truncated["ours"], truncated["restart"]),
        "vs_tunix": (natural["ours"], natural["tunix"]) if "tunix" in natural else None,
    }
    runs = {
        "plain_vs_generate": equal_run,
        "natural_vs_generate": plain_run,
        "truncated_vs_restart": truncated_run,
    }
    batches = {"batch_equal": equal_batch, "batch_natural": batch, "batch_restart": restart_batch}
    return {**figures(pairs, GOALS, runs), **batches}


def shape(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """A random model of a real shape: equal lengths alone."""
    config = tiny_config(args.lanes)
    work = random_workload(args.shape, args.prompts, config, args.devices, folder)
    peer = Generate(folder, work.described.tokenizer.pad_token_id)
    equal, run, batch = at_equal_lengths(args, work, peer)
    pairs: dict[str, tuple[Rates, Rates] | None] = {
        "plain_vs_generate": (equal["ours"], equal["generate"]),
        "natural_vs_generate": None,
        "truncated_vs_restart": None,
        "vs_tunix": None,
    }
    found = figures(pairs, {"plain_vs_generate": GOAL_OF_SHAPE}, {"plain_vs_generate": run})
    return {**found, "batch_equal": batch}


def at_equal_lengths(
    args: argparse.Namespace, work: Workload, peer: Generate
) -> tuple[dict[str, Rates], Ours, int]:
    """Plain sampling of completions that are all `args.tokens` long.

    Twice as many completions as lanes, if the prompts and samples are enough, so that lanes are filled anew
    once.

    Returns:
        The rates, our run, and the batch that was fastest for `generate`.
    """
    samples = min(args.samples, -(-2 * args.lanes // len(work.prompts)))
    prompts = min(len(work.prompts), -(-2 * args.lanes // samples))
    flat = [prompt for prompt in work.prompts[:prompts] for _ in range(samples)]
    batch = fastest(args.batches, flat, lambda part, b: lengths(peer(part, args.tokens // 4, (), b)))
    run = Ours(
        work, make_engine(work, truncate=False, max_response=args.tokens, endless=True), prompts, samples
    )
    rates = interleave(
        {"ours": run, "generate": lambda: lengths(peer(flat, args.tokens, (), batch))}, args.repeats
    )
    report(f"equal lengths, {len(flat)} completions of {args.tokens} tokens", rates)
    return rates, run, batch


def fastest(batches: Sequence[int], flat: list, work: Callable[[list, int], float]) -> int:
    """The batch size with the best rate on as many completions as the largest of them holds."""
    part = flat[: max(batches)]
    if len(batches) == 1:
        return batches[0]
    rates = interleave({str(b): lambda b=b: work(part, b) for b in batches}, 1, warm_up=False)
    return max(batches, key=lambda b: rates[str(b)].wall[0])


def restart_loop(work: Workload, peer: Generate, engine: RolloutEngine, batch: int) -> RestartLoop:
    """The peer of the truncated rollout with the engine's own settings."""
    texts = token_bytes(work.described.tokenizer, work.described.config.vocab_size)
    words = {trigger.encode() for trigger in work.config.rollout.triggers}
    triggers = [i for i, text in enumerate(texts) if text.strip() in words]
    return RestartLoop(peer, engine.machine, triggers, texts, batch)


def figures(
    pairs: dict[str, tuple[Rates, Rates] | None], goals: dict[str, float], runs: dict[str, Ours]
) -> dict[str, Any]:
    """The ratios of each pair of contestants, and the floor of each figure that is below its goal."""
    ratios = {name: pair and pair[0].over(pair[1]) for name, pair in pairs.items()}
    cpu = {name: pair and pair[0].cpu_over(pair[1]) for name, pair in pairs.items()}
    missed = {}
    for name, goal in goals.items():
        pair, ratio = pairs[name], ratios[name]
        if pair is not None and ratio is not None and ratio.median < goal:
            missed[name] = float(pair[0].wall.max())
            print(f"{name}: {ratio.median:.3g}, goal {goal}")
    return {**ratios, "cpu": cpu, "floor": floors(missed, runs)}


def floors(missed: dict[str, float], runs: dict[str, Ours]) -> dict[str, Any]:
    """What memory bandwidth allows, and the share of it that was reached.

    Args:
        missed: our best tokens a second, of figures below their goals.
        runs: ours, by figure.
    """
    if not missed:
        return {}
    bandwidth = memory_bandwidth()
    print(f"measured memory bandwidth: {bandwidth / 1e9:.1f} GB/s")
    found = {}
    for name, rate in missed.items():
        limit = runs[name].floor(bandwidth)
        print(
            f"{name}: reading weights and the cache in use allows {limit:.4g} tokens/s, "
            f"reached {rate / limit:.1%} of it"
        )
        found[name] = {"tokens_per_second": rate, "limit": limit, "share": rate / limit}
    return {"bandwidth": bandwidth, **found}


def report(title: str, rates: dict[str, Rates]) -> None:
    """The rates of one comparison, and ours over each other."""
    print(title)
    for name, measured in rates.items():
        ratio = ""
        if name != "ours":
            ratio = (
                f"   ours / {name}: {rates['ours'].over(measured)}, CPU {rates['ours'].cpu_over(measured)}"
            )
        print(f"  {name:10} {np.median(measured.wall):10.0f} tokens/s{ratio}")


def lengths(completions: list[list[int]]) -> int:
    """Tokens in all."""
    return sum(map(len, completions))


if __name__ == "__main__":
    main()
