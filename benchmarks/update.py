"""Tokens a second of the GRPO update against a plain padded step in JAX and TRL's loss on torch, in one run.

`python -m benchmarks.update` takes the built-in tiny model; with `--shape=qwen3_0p6b` random weights of that
shape. Float32, the same weights and tokens on all sides; lengths of completions are log-normal with sigma 1,
cut at `--longest`. What counts is tokens of prompts and completions; padding does not. Timed is one update:
rows made from sequences, loss, gradient, one AdamW step. The log-probs of the old policy and of the reference
are given to all sides. First it is checked that loss and gradient of all sides agree. The last line is one
JSON object:

- `speed_vs_padded`: against rows padded to the longest sequence, logits `[B, T, V]`, no recomputation;
- `speed_vs_trl`: against TRL's GRPO loss on transformers' model, restated on torch (`update_peers.TrlStep`);
  in each repetition with the number of threads that was fastest, for where other programs run, torch's
  threads may wait for each other ten times as long as they compute;
- `matmul_peak_share`: useful FLOPs a second over those of one large float32 product on the same cores, taken
  in turn with the update. Useful is three times the forward pass: weights at every token, causal attention
  within each sequence, the output head at tokens of completions. Recomputation does not count; with all of
  it (`--remat=full`, the default of the tiny model) the share cannot be above 0.75;
- `memory_vs_padded`: peak memory of the padded step over ours (one pair: it does not vary). For both it is
  the larger of the two programs of a step, gradient and AdamW: arguments, temporaries and outputs that reuse
  no argument, as compiled, on all devices together, and the moments, which stay alive beside the first;
- `memory_vs_padded_remat`: the same where the padded step recomputes its layers too;
- `memory`: bytes; that of `trl` is how much a process of its own grows, null where that cannot be told.

Each ratio is the median over pairs of runs that took turns, with the smallest and the largest. `cpu` holds
the ratios of speed in CPU time, which other programs on the machine disturb less.
"""

import argparse
import json
import math
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
from jax.sharding import Mesh
from ml_collections import ConfigDict
from safetensors.numpy import save_file

from benchmarks.lanes import draw_lengths
from benchmarks.timing import Rates, Ratio, conditions, interleave, plain
from benchmarks.update_peers import (
    Padded,
    PaddedStep,
    Scored,
    TrlBatch,
    TrlStep,
    pad_for_trl,
    pad_right,
    trl_memory,
)
from benchmarks.workload import SHAPES, encode, tiny_config
from step_grpo.fit.flops import forward_flops
from step_grpo.grpo.advantages import group_advantages
from step_grpo.grpo.packing import PackedBatch, Sample, pack, stack, unpack
from step_grpo.grpo.settings import GrpoSettings
from step_grpo.grpo.update import TrainBatch, TrainState, Update
from step_grpo.main import build_update, optimizer_of
from step_grpo.mesh import make_mesh, over_data, place_rows, replicated, use_all_cores
from step_grpo.model import qwen
from step_grpo.model.load import Description, load_model, random_model, save_description
from step_grpo.model.weights import WEIGHTS, load_checkpoint, load_params, resolve_checkpoint, save_params

GOALS = {"speed_vs_padded": 1.5, "memory_vs_padded": 2.0, "matmul_peak_share": 0.7}
TOLERANCE = 1e-4  # relative, of loss and gradient
CHECKED = 8  # samples


@dataclass
class Job:
    """A model, the samples of one update, and how they are cut into micro-batches."""

    described: Description
    folder: Path  # of the same weights
    config: ConfigDict
    mesh: Mesh
    optimizer: optax.GradientTransformation
    state: TrainState  # both sides in JAX train this one
    batch: list[Scored] = field(default_factory=list)

    @property
    def settings(self) -> GrpoSettings:
        """Of the loss."""
        return GrpoSettings(temperature=self.config.rollout.temperature)

    @property
    def tokens(self) -> int:
        """Of prompts and completions."""
        return sum(len(scored.sample) for scored in self.batch)

    @property
    def trained(self) -> int:
        """Tokens of completions."""
        return sum(len(scored.old) for scored in self.batch)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs the benchmark and prints its figures; returns the JSON object."""
    args = parse(argv)
    use_all_cores()
    with tempfile.TemporaryDirectory(prefix="benchmark_") as folder:
        result = measure(args, Path(folder))
    result = plain({**result, "settings": {**vars(args), **conditions()}})
    print(json.dumps(result))
    return result


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line; what is not given depends on the model."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.update", description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, help="random weights of this shape")
    parser.add_argument("--prompts", type=int, help="24; 4 for a shape")
    parser.add_argument("--samples", type=int, help="completions a prompt: 8; 5 for a shape")
    parser.add_argument("--median", type=int, default=64, help="tokens of the median completion")
    parser.add_argument("--longest", type=int, default=256, help="longer completions are cut to this")
    parser.add_argument("--rows", type=int, help="of a micro-batch: 16; 2 for a shape")
    parser.add_argument("--row_length", type=int, help="tokens of a packed row: 320; 512 for a shape")
    parser.add_argument("--devices", type=int, help="that share the rows: 0, all; 1 for a shape")
    parser.add_argument(
        "--remat", choices=qwen.REMAT, help="what our side recomputes: full; none for a shape"
    )
    parser.add_argument("--threads", type=int, nargs="+", help="of torch: 1 and all; all for a shape")
    parser.add_argument("--repeats", type=int, help="counted runs of each side: 3; 1 for a shape")
    parser.add_argument("--product", type=int, default=2048, help="rows and columns of the products")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    tiny: dict[str, Any] = {
        "prompts": 24,
        "samples": 8,
        "rows": 16,
        "row_length": 320,
        "remat": "full",
    }
    large: dict[str, Any] = {
        "prompts": 4,
        "samples": 5,
        "rows": 2,
        "row_length": 512,
        "remat": "none",
    }
    cores = len(os.sched_getaffinity(0))
    tiny |= {"devices": 0, "repeats": 3, "threads": sorted({1, cores})}
    large |= {"devices": 1, "repeats": 1, "threads": [cores]}
    chosen = large if args.shape else tiny
    for name, value in chosen.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    return args


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All figures of one model."""
    job = make_job(args, folder)
    ours, padded = Ours(job), PaddedSide(job)
    job.batch = make_batch(args, job, ours)
    describe(job, ours, padded)
    in_jax: dict[str, Ours | PaddedSide] = {"ours": ours, "padded": padded}
    in_jax["padded_remat"] = PaddedSide(job, remat=True)
    memory: dict[str, Any] = {name: side.programs.peak_bytes(job) for name, side in in_jax.items()}
    trl = TrlSide(job)
    print("of ours, MB:", {name: round(size / 1e6) for name, size in ours.programs.bytes(job).items()})
    memory["trl"], reason = trl_memory(job.folder, trl.padded(job.batch)[:1], job.settings)
    print("peak memory, MB:", {name: size and round(size / 1e6) for name, size in memory.items()}, reason)

    agreement = check_agreement(job, ours, padded, trl)
    product = fastest_product(job.mesh, args.product)
    sides: dict[str, Callable[[], float]] = {"ours": ours, "padded": padded, "product": product}
    on_torch = {f"trl {threads}": partial(trl, threads) for threads in args.threads}
    if args.shape:  # not all of it fits into memory at one time
        rates = interleave(sides, args.repeats)
        jax.tree.map(lambda array: array.delete(), job.state)
        rates |= interleave(on_torch, args.repeats)
    else:
        rates = interleave({**sides, **on_torch}, args.repeats)
    rates["trl"] = fastest_of([rates[name] for name in on_torch])
    print("ours, seconds:", ", ".join(f"{part} {spent:.3g}" for part, spent in ours.profile.items()))
    return {**figures(job, rates, memory), "memory": memory, "agreement": agreement, "profile": ours.profile}


def make_job(args: argparse.Namespace, folder: Path) -> Job:
    """The model on the devices, in training, with no samples yet."""
    config = tiny_config(lanes=1).unlock()
    config.rollout.max_response_tokens = args.longest
    config.model.remat = args.remat
    config.grpo.update(rows=args.rows, row_length=args.row_length, learning_rate=1e-5)
    described, params = load_model(config.model, seed=0)
    if args.shape:
        described, params = random_model(SHAPES[args.shape], described.tokenizer, seed=0)
        save_params(params, described.hf_config, folder, dtype="float32")
        save_description(described, folder)
    else:
        folder = resolve_checkpoint(config.model.checkpoint)
    mesh = make_mesh(args.rows, *([args.devices] if args.devices else []))
    optimizer = optimizer_of(config.grpo)
    params = jax.device_put(params, replicated(mesh))
    state = TrainState(jnp.int32(0), params, jax.jit(optimizer.init)(params))
    return Job(described, folder, config, mesh, optimizer, jax.device_put(state, replicated(mesh)))


def make_batch(args: argparse.Namespace, job: Job, ours: "Ours") -> list[Scored]:
    """Samples of one update: real prompts, log-normal completions of random tokens, random rewards.

    The old policy and the reference are the policy with noise on its log-probs, wide enough that every clip
    is reached.
    """
    rng = np.random.default_rng(args.seed)
    prompts = encode(job.described.tokenizer, args.prompts, job.config)
    lengths = draw_lengths(args.prompts * args.samples, args.median, args.longest, args.seed)
    # transformers gives the embedding of the padding token no gradient.
    words = np.delete(np.arange(job.described.config.vocab_size), job.described.tokenizer.pad_token_id)
    advantages = group_advantages(rng.random((args.prompts, args.samples))).ravel()
    samples = [
        Sample(
            prompt_ids=np.array(prompts[i // args.samples]),
            completion_ids=rng.choice(words, length),
            advantage=float(advantages[i]),
            sampler_logprobs=np.zeros(length, np.float32),
            loss_mask=np.ones(length, np.float32),
        )
        for i, length in enumerate(lengths)
    ]
    packed = pack(samples, row_length=args.row_length, rows=args.rows)
    placed = place_rows(job.mesh, stack(packed, len(packed)), axis=1)
    found = ours.update.logprobs(job.state.params, placed, len(packed)).logprobs

    def noisy(logprobs: np.ndarray) -> np.ndarray:
        return (logprobs + 0.5 * rng.standard_normal(len(logprobs))).astype(np.float32)

    of_samples = unpack(list(np.asarray(found)), packed)
    return [Scored(s, noisy(lp), noisy(lp)) for s, lp in zip(samples, of_samples, strict=True)]


# ---------------------------------------------------------------------- the sides


class Ours:
    """The update of `step_grpo` on packed rows."""

    def __init__(self, job: Job):
        self.job = job
        self.update: Update = build_update(job.described.config, job.config, job.optimizer, job.mesh)
        self.profile: dict[str, float] = {}  # seconds of the last run

    def __call__(self) -> int:
        """One update; the useful tokens."""
        started = time.perf_counter()
        batch = self.packed(self.job.batch)
        packed = time.perf_counter()
        grads, sums = jax.block_until_ready(self.accumulate(*batch))
        summed = time.perf_counter()
        self.job.state, measured = jax.block_until_ready(self.programs.applying(self.job.state, grads, sums))
        done = time.perf_counter()
        assert measured.trained_tokens == self.job.trained
        self.profile = {"pack": packed - started, "gradient": summed - packed, "adamw": done - summed}
        return self.job.tokens

    def packed(self, batch: Sequence[Scored]) -> tuple[TrainBatch, int]:
        """The micro-batches on the devices, and how many hold samples."""
        grpo = self.job.config.grpo
        rows = pack([s.sample for s in batch], row_length=grpo.row_length, rows=grpo.rows)
        most = math.ceil(len(self.job.batch) / grpo.rows)
        old, ref = ([place([getattr(s, name) for s in batch], p) for p in rows] for name in ("old", "ref"))
        behind = [np.zeros_like(old[0])] * (most - len(rows))
        whole = TrainBatch(stack(rows, most), np.stack([*old, *behind]), np.stack([*ref, *behind]))
        return place_rows(self.job.mesh, whole, axis=1), len(rows)

    def accumulate(self, batch: TrainBatch, count: int) -> Any:
        """Sums of gradients and losses."""
        params = self.job.state.params
        return self.programs.summing(params, *self.update.start(params), batch, np.int32(count))

    def gradient(self, batch: Sequence[Scored]) -> tuple[float, qwen.Params]:
        """Token means of loss and gradient, on the host."""
        grads, sums = self.accumulate(*self.packed(batch))
        return float(sums.loss / sums.tokens), on_host(grads, float(sums.tokens))

    @cached_property
    def programs(self) -> "Programs":
        """Compiled for the shape that all updates have."""
        state, update = self.job.state, cast(Any, self.update)
        sums = update.start(state.params)
        batch, count = self.packed(self.job.batch)
        return Programs(
            update.accumulate.lower(state.params, *sums, batch, np.int32(count)).compile(),
            update.apply.lower(state, *sums).compile(),
        )


class PaddedSide:
    """The plain padded step on the same sequences."""

    def __init__(self, job: Job, *, remat: bool = False):
        self.job = job
        self.step = PaddedStep(job.described.config, job.settings, job.optimizer, remat=remat)

    def __call__(self) -> int:
        """One update; the useful tokens."""
        grads, _ = self.accumulate(self.padded(self.job.batch))
        state = self.job.state
        tokens = jnp.float32(self.job.trained)
        params, moments = self.programs.applying(state.params, state.opt_state, grads, tokens)
        self.job.state = jax.block_until_ready(TrainState(state.step + 1, params, moments))
        return self.job.tokens

    def padded(self, batch: Sequence[Scored]) -> list[Padded]:
        """The micro-batches on the devices, as wide as the longest sequence of the whole update."""
        width = max(len(s.sample) for s in self.job.batch)
        rows = list(pad_right(batch, self.job.config.grpo.rows, width))
        return jax.device_put(rows, over_data(self.job.mesh))

    def accumulate(self, batches: Sequence[Padded]) -> Any:
        """Sums of gradients and losses."""
        grads, loss = self.step.start(self.job.state.params)
        for batch in batches:
            grads, loss = self.programs.summing(self.job.state.params, grads, loss, batch)
        return grads, loss

    def gradient(self, batch: Sequence[Scored]) -> tuple[float, qwen.Params]:
        """Token means of loss and gradient, on the host."""
        grads, loss = self.accumulate(self.padded(batch))
        tokens = float(sum(len(s.old) for s in batch))
        return float(loss) / tokens, on_host(grads, tokens)

    @cached_property
    def programs(self) -> "Programs":
        """Compiled for the first micro-batch, whose shape all have."""
        state = self.job.state
        grads, loss = self.step.start(state.params)
        batch = self.padded(self.job.batch)[0]
        return Programs(
            self.step.accumulate.lower(state.params, grads, loss, batch).compile(),
            self.step.apply.lower(state.params, state.opt_state, grads, jnp.float32(1)).compile(),
        )


class TrlSide:
    """TRL's step on torch; the model is loaded at the first use."""

    def __init__(self, job: Job):
        self.job = job
        self.step: TrlStep | None = None

    def __call__(self, threads: int) -> int:
        """One update on so many threads; the useful tokens."""
        if self.step is None:
            self.step = self.load()
        torch.set_num_threads(threads)
        self.step.step(self.padded(self.job.batch))
        return self.job.tokens

    def load(self) -> TrlStep:
        """The model and its optimizer."""
        grpo = self.job.config.grpo
        rates = {"learning_rate": grpo.learning_rate, "weight_decay": grpo.weight_decay}
        return TrlStep(self.job.folder, self.job.settings, **rates)

    def padded(self, batch: Sequence[Scored]) -> list[TrlBatch]:
        """The micro-batches, as wide as the longest prompt and the longest completion of the whole update."""
        prompt = max(len(s.sample.prompt_ids) for s in self.job.batch)
        completion = max(len(s.old) for s in self.job.batch)
        return list(pad_for_trl(batch, self.job.config.grpo.rows, prompt, completion))

    def gradient(self, batch: Sequence[Scored]) -> tuple[float, qwen.Params]:
        """Token means of loss and gradient, with our names and axes by way of a checkpoint."""
        with tempfile.TemporaryDirectory(prefix="benchmark_") as name:
            step = self.load()
            loss = step.gradient(self.padded(batch))
            save_file(step.named_gradients(), Path(name) / WEIGHTS)
            save_description(self.job.described, Path(name))
            del step
            return loss, jax.device_get(load_params(load_checkpoint(name)))


def place(values: Sequence[np.ndarray], packed: PackedBatch) -> np.ndarray:
    """Figures of completion tokens, an array a sample, to where they stand in packed rows; 0 elsewhere."""
    starts = np.cumsum([0, *map(len, values)])
    index = starts[packed.sample_ids] + packed.completion_index
    return np.where(packed.completion_index >= 0, np.concatenate(values)[index.clip(0, starts[-1] - 1)], 0)


def on_host(grads: qwen.Params, tokens: float) -> qwen.Params:
    """Sums of gradients as token means in NumPy."""
    return jax.tree.map(lambda grad: np.asarray(grad) / np.float32(tokens), grads)


# ---------------------------------------------------------------------- agreement


def check_agreement(job: Job, ours: Ours, padded: PaddedSide, trl: TrlSide) -> dict[str, float]:
    """Relative differences of ours to each peer on a few samples, in loss and gradient.

    Of the gradient it is the largest over the weights, each in the Euclidean norm.

    Raises:
        SystemExit: one is above `TOLERANCE`.
    """
    few = job.batch[:CHECKED]
    loss, grads = ours.gradient(few)
    found: dict[str, float] = {}
    peers: dict[str, PaddedSide | TrlSide] = {"padded": padded, "trl": trl}
    for name, peer in peers.items():
        loss_peer, grads_peer = peer.gradient(few)
        found[f"loss_{name}"] = abs(loss - loss_peer) / abs(loss_peer)
        apart = jax.tree.map(lambda a, b: norm(a - b) / norm(b), grads, grads_peer)
        found[f"gradient_{name}"] = float(np.max(jax.tree.leaves(apart)))
    print("relative differences:", ", ".join(f"{name} {value:.1e}" for name, value in found.items()))
    if not all(difference <= TOLERANCE for difference in found.values()):  # NaN is no agreement
        raise SystemExit(f"the sides do not compute the same: {found}, at most {TOLERANCE} is right")
    return found


def norm(values: np.ndarray) -> float:
    """Euclidean norm."""
    return float(np.linalg.norm(values.astype(np.float64)))


# ---------------------------------------------------------------------- memory


class Programs(NamedTuple):
    """The two compiled programs of a step."""

    summing: Any  # the gradient of a micro-batch, added up
    applying: Any  # AdamW

    def peak_bytes(self, job: Job) -> int:
        """Peak memory of a step on all devices together."""
        return max(self.bytes(job).values())

    def bytes(self, job: Job) -> dict[str, int]:
        """What is alive during each program, on all devices together."""
        moments = sum(leaf.nbytes for leaf in jax.tree.leaves(job.state.opt_state))
        alone = {"gradient": alive(self.summing) + moments, "adamw": alive(self.applying)}
        return {name: job.mesh.size * size for name, size in alone.items()}


def alive(program: Any) -> int:
    """Arguments, temporaries, and outputs that reuse no argument, bytes a device."""
    plan = program.memory_analysis()
    outputs = plan.output_size_in_bytes - plan.alias_size_in_bytes
    return plan.argument_size_in_bytes + plan.temp_size_in_bytes + outputs


# ---------------------------------------------------------------------- FLOPs


def useful_flops(cfg: qwen.QwenConfig, batch: Sequence[Sample]) -> float:
    """Of one update without recomputation: three times those of the forward pass."""
    forward = forward_flops(cfg, [len(s) for s in batch], sum(len(s.completion_ids) for s in batch))
    return 3.0 * forward


def fastest_product(mesh: Mesh, size: int) -> Callable[[], float]:
    """The fastest way to large float32 products on all cores: torch, or JAX on one or all devices.

    Returns:
        A function that makes some and returns their FLOPs.
    """
    rng = np.random.default_rng(0)
    left, right = (rng.standard_normal((size, size), np.float32) for _ in range(2))
    multiply = jax.jit(lambda a, b: a @ b)
    everywhere = [[jax.device_put(x, device) for x in (left, right)] for device in mesh.devices.flat]
    tensors = torch.from_numpy(left), torch.from_numpy(right)
    repeats, flops = 8, 2.0 * size**3

    def on_devices(count: int) -> float:
        for _ in range(repeats // count):
            jax.block_until_ready([multiply(*pair) for pair in everywhere[:count]])
        return repeats * flops

    def in_torch() -> float:
        for _ in range(repeats):
            tensors[0] @ tensors[1]
        return repeats * flops

    ways = {f"JAX, {n} devices": lambda n=n: on_devices(n) for n in {1, mesh.size}} | {"torch": in_torch}
    rates = interleave(ways, 2)
    best = max(ways, key=lambda way: rates[way].wall.max())
    print("float32 products, GFLOP/s:", {way: round(r.wall.max() / 1e9) for way, r in rates.items()})
    return ways[best]


# ---------------------------------------------------------------------- what is said


def describe(job: Job, ours: Ours, padded: PaddedSide) -> None:
    """How much there is to do, and how much padding each layout has."""
    print(f"{len(job.batch)} samples, {job.tokens} tokens, {job.trained} of them trained")
    packed, count = ours.packed(job.batch)
    layouts = {
        "packed": [packed.packed.tokens.shape[1:]] * count,
        "padded": [batch.tokens.shape for batch in padded.padded(job.batch)],
    }
    for name, shapes in layouts.items():
        positions = sum(rows * width for rows, width in shapes)
        print(f"  {name}: {len(shapes)} micro-batches of {shapes[0]}, {job.tokens / positions:.1%} useful")


def figures(job: Job, rates: dict[str, Rates], memory: dict[str, Any]) -> dict[str, Any]:
    """The ratios, and what is below its goal."""
    flops = useful_flops(job.described.config, [s.sample for s in job.batch])
    a_token = flops / job.tokens
    computed = Rates(rates["ours"].wall * a_token, rates["ours"].cpu * a_token)
    pairs = {
        "speed_vs_padded": (rates["ours"], rates["padded"]),
        "speed_vs_trl": (rates["ours"], rates["trl"]),
        "matmul_peak_share": (computed, rates["product"]),
    }
    ratios = {name: first.over(second) for name, (first, second) in pairs.items()}
    for name in ("padded", "padded_remat"):
        ratios[f"memory_vs_{name}"] = once(memory[name] / memory["ours"])
    cpu = {name: first.cpu_over(second) for name, (first, second) in pairs.items()}
    for name, measured in rates.items():
        if name != "product":
            print(f"  {name:8} {np.median(measured.wall):10.0f} tokens/s")
    for name, ratio in ratios.items():
        goal = f", goal {GOALS[name]}" if name in GOALS else ""
        print(f"{name}: {ratio}{f', CPU {cpu[name]}' if name in cpu else ''}{goal}")
    per_second = {name: float(np.median(rates[name].wall)) for name in ("ours", "padded", "trl")}
    return {
        **ratios,
        "cpu": cpu,
        "tokens_per_second": per_second,
        "matmul_peak": float(np.median(rates["product"].wall)),
        "useful_flops": flops,
        "below_goal": [name for name, goal in GOALS.items() if ratios[name].median < goal],
    }


def fastest_of(rates: Sequence[Rates]) -> Rates:
    """The best of several ways to do the same, repetition by repetition."""
    return Rates(np.max([r.wall for r in rates], axis=0), np.max([r.cpu for r in rates], axis=0))


def once(value: float) -> Ratio:
    """A ratio that does not vary."""
    return Ratio(value, value, value, 1)


if __name__ == "__main__":
    main()
