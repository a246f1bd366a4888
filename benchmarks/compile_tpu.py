"""Compiles the rollout and training attention for TPUs on a machine that has none, and checks what came out.

`python -m benchmarks.compile_tpu --topology=v5e:2x2 --shape=qwen3_0p6b`

For each topology and shape of model four programs are compiled as the devices would run them:

- `prefill`: prompts through the model;
- `insert`: their cache into that of the lanes;
- `segment`: the decode loop with the whole state machine of the truncated rollout;
- `attention`: one layer's attention of training rows, forward and backward.

All but `insert` must contain Pallas kernels, and the temporaries of `insert` and `segment` must be well below
the size of the cache: a copy of it in the loop would show. Nothing is run, so this says nothing of speed.

Needs libtpu (`pip install 'jax[tpu]'`). Each program is compiled in a process of its own.
"""

import argparse
import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from functools import partial
from typing import Any

TOPOLOGIES = ("v5e:2x2", "v5p:2x2x1", "v6e:2x4", "tpu7x:2x2x1")
PROGRAMS = ("prefill", "insert", "segment", "attention")
QWEN3 = {
    "vocab_size": 151936, "kv_heads": 8, "head_dim": 128, "rope_theta": 1e6, "rms_eps": 1e-6, "qk_norm": True,
    "qkv_bias": False,
}  # fmt: skip
SHAPES = {
    "qwen3_0p6b": {**QWEN3, "width": 1024, "layers": 28, "heads": 16, "ffn": 3072, "tied": True},
    "qwen3_8b": {**QWEN3, "width": 4096, "layers": 36, "heads": 32, "ffn": 12288, "tied": False},
}
# No chip is asked for, and none must be: what libtpu would look for on a real host is answered here.
WITHOUT_TPU = {
    "JAX_PLATFORMS": "cpu",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "JAX_ENABLE_COMPILATION_CACHE": "false",  # to read a program back takes the chip that it is for
}
MOST_TEMPORARIES = 0.25  # of the cache
SMALL_VOCABULARY = 97  # a size that no table has along another axis


@dataclasses.dataclass(frozen=True)
class Task:
    """One program to compile; sizes in tokens but for `lanes`, which counts those of a device."""

    topology: str
    shape: str
    program: str
    lanes: int
    capacity: int
    prompt: int
    row_length: int
    cache_dtype: str = ""
    layers: int = 0  # 0: the model's own number
    attention: str = "auto"


def missing_libtpu() -> str:
    """Why nothing can be compiled here; empty where it can."""
    found = importlib.util.find_spec("libtpu") is not None
    return "" if found else "libtpu is not installed (pip install 'jax[tpu]')"


def compile_task(task: Task) -> dict[str, Any]:
    """Compiles one program in a process of its own; an error of the compiler is part of the result."""
    with tempfile.TemporaryDirectory() as logs:
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.compile_tpu", "--child", json.dumps(dataclasses.asdict(task))],
            env={**os.environ, **WITHOUT_TPU, "TPU_LOG_DIR": logs},
            capture_output=True,
            text=True,
            check=False,
        )
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        why = next((line for line in lines if "exceed" in line), lines[-1] if lines else "")
        return {"ok": False, "error": why.strip()[:300]}
    return json.loads(done.stdout.splitlines()[-1])


# ---------------------------------------------------------------- in the child


def measure(task: Task) -> dict[str, Any]:
    """Lowers and compiles the program, and looks at its text and its memory."""
    import jax  # noqa: PLC0415 (the environment must be set before)

    mesh = topology_mesh(task.topology)
    program, arguments, cache = build(task, mesh)
    cache_bytes = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache)) / mesh.size
    began = time.monotonic()
    compiled = program.lower(*arguments).compile()
    memory = compiled.memory_analysis()
    kernels = compiled.as_text().count('custom_call_target="tpu_custom_call"')
    small = not cache_bytes or memory.temp_size_in_bytes < MOST_TEMPORARIES * cache_bytes
    return {
        "ok": small and (kernels > 0 or task.program == "insert"),
        "seconds": round(time.monotonic() - began, 1),
        "kernels": kernels,
        "cache_mib": round(cache_bytes / 2**20),
        "temporaries_mib": round(memory.temp_size_in_bytes / 2**20),
        "peak_mib": round(memory.peak_memory_in_bytes / 2**20),
    }


def topology_mesh(name: str):
    """All devices of a topology along the axis `data`."""
    import jax  # noqa: PLC0415
    import numpy as np  # noqa: PLC0415
    from jax.experimental import topologies  # noqa: PLC0415

    devices = topologies.get_topology_desc(platform="tpu", topology_name=name).devices
    return jax.sharding.Mesh(np.array(devices), ("data",), axis_types=(jax.sharding.AxisType.Auto,))


def build(task: Task, mesh):
    """The jitted program, its abstract arguments, and the abstract cache if it holds one of the lanes."""
    import jax  # noqa: PLC0415
    import jax.numpy as jnp  # noqa: PLC0415
    from jax.sharding import NamedSharding, PartitionSpec  # noqa: PLC0415

    from step_grpo.model import qwen  # noqa: PLC0415
    from step_grpo.model.attention import choose_attention, full_attention  # noqa: PLC0415
    from step_grpo.rollout import decode  # noqa: PLC0415
    from step_grpo.rollout.triggers import reach  # noqa: PLC0415

    cfg = qwen.QwenConfig(**SHAPES[task.shape])
    cfg = dataclasses.replace(cfg, layers=task.layers or cfg.layers)
    everywhere, spread = PartitionSpec(), PartitionSpec("data")

    def placed(tree, spec):
        sharding = NamedSharding(mesh, spec)
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)

    def placed_each(values, specs):
        return tuple(placed(value, spec) for value, spec in zip(values, specs, strict=True))

    def on_devices(function, specs, donate=()):
        sharded = jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=spread, check_vma=False)
        return jax.jit(sharded, donate_argnums=donate)

    def integers(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.int32)

    if task.program == "attention":
        attention = choose_attention(task.attention, mesh, spread_rows=True)

        def loss(q, k, v, segments):
            return jnp.sum(full_attention(attention, q, k, v, segments).astype(jnp.float32))

        row = (mesh.size, task.row_length)
        q, k = (
            jax.ShapeDtypeStruct((*row, n, cfg.head_dim), jnp.bfloat16) for n in (cfg.heads, cfg.kv_heads)
        )
        arguments = placed((q, k, k, integers(*row)), spread)
        return jax.jit(jax.grad(loss, argnums=(0, 1, 2))), arguments, ()

    attention = choose_attention(task.attention, mesh)
    machine, vocab = truncated_machine(task), small_vocabulary()
    params = jax.eval_shape(lambda p: qwen.decode_params(p, jnp.bfloat16), qwen.abstract_params(cfg))
    dtype = jnp.dtype(task.cache_dtype or "bfloat16")
    longest = reach(vocab.triggers)
    lanes = task.lanes * mesh.size
    sizes = lanes, task.capacity, dtype, longest
    state = jax.eval_shape(partial(decode.empty_state, cfg, machine, *sizes, attention))
    prefill = partial(decode.prefill, cfg, None, attention=attention)
    rows, each_lane = mesh.size * max(1, task.lanes // 16), integers(lanes)
    prompts = params, None, integers(rows, task.prompt), integers(rows)
    prompt_specs = everywhere, everywhere, spread, spread
    if task.program == "prefill":
        return on_devices(prefill, prompt_specs), placed_each(prompts, prompt_specs), ()
    if task.program == "insert":
        values = state, jax.eval_shape(prefill, *prompts), *[each_lane] * 4
        specs = (spread,) * len(values)
        return on_devices(decode.insert, specs, donate=0), placed_each(values, specs), state.cache
    key = jax.eval_shape(lambda: jax.random.key(0))
    values = params, grown_vocabulary(vocab, cfg.vocab_size), key, state, integers(), integers(mesh.size)
    specs = everywhere, everywhere, everywhere, spread, everywhere, spread
    segment = partial(decode.decode_segment, cfg, machine, attention=attention)
    return on_devices(segment, specs, donate=3), placed_each(values, specs), state.cache


def truncated_machine(task: Task):
    """The paper's settings with the token ids of Qwen3's tokenizer; the response fills the cache."""
    from step_grpo.rollout.phases import Machine  # noqa: PLC0415
    from step_grpo.rollout.policies import Confidence  # noqa: PLC0415

    response = task.capacity - task.prompt - 64
    inducing = (198, 334, 19357, 21806, 334, 198, 79075)
    return Machine(
        policy=Confidence(question=inducing, max_notes=20, delta=0.95, strict=True, early_abort=True),
        max_response=response, think_budget=int(0.9 * response), budget_margin=50, max_probes=10,
        max_repetitions=3, temperature=1.0, top_p=1.0, think_end=151668, eos=(151645, 151643),
        closing=(198, 151668, 271),
    )  # fmt: skip


def small_vocabulary():
    """Token tables of a few texts."""
    from step_grpo.rollout.triggers import build_vocabulary  # noqa: PLC0415

    return build_vocabulary([b"Wait", *(b" %d" % i for i in range(SMALL_VOCABULARY - 1))], ("Wait",))


def grown_vocabulary(vocab, size: int):
    """The abstract tables of a vocabulary of `size`."""
    import jax  # noqa: PLC0415

    def grown(table):
        shape = tuple(size if n == SMALL_VOCABULARY else n for n in table.shape)
        return jax.ShapeDtypeStruct(shape, table.dtype)

    return jax.tree.map(grown, vocab)


# ---------------------------------------------------------------- the command


def main() -> None:
    """Compiles what the command line asks for; ends with status 1 if a check failed."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--topology", action="append", help=f"default: {', '.join(TOPOLOGIES)}")
    parser.add_argument("--shape", action="append", choices=SHAPES, help="default: qwen3_0p6b")
    parser.add_argument("--program", action="append", choices=PROGRAMS, help="default: all")
    parser.add_argument("--lanes", type=int, default=16, help="of a device")
    parser.add_argument("--capacity", type=int, default=4096, help="tokens of a lane's cache")
    parser.add_argument("--prompt", type=int, default=512, help="tokens of a prompt, padded")
    parser.add_argument("--row_length", type=int, default=18432, help="tokens of a training row")
    parser.add_argument("--cache_dtype", default="", choices=("", "int8"))
    parser.add_argument("--layers", type=int, default=0, help="0: the model's own number")
    parser.add_argument("--attention", default="auto", choices=("auto", "xla"), help="xla shows the copies")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(measure(Task(**json.loads(args.child)))))
        return
    reason = missing_libtpu()
    if reason:
        print(reason)
        print(json.dumps({"skipped": reason}))
        return
    results = []
    columns = ("ok", "seconds", "kernels", "cache_mib", "temporaries_mib", "peak_mib")
    print(f"{'shape':12}{'topology':14}{'program':11}" + "".join(f"{name:>17}" for name in columns))
    for shape in args.shape or ["qwen3_0p6b"]:
        for topology in args.topology or TOPOLOGIES:
            for program in args.program or PROGRAMS:
                sizes = (args.lanes, args.capacity, args.prompt, args.row_length)
                kind = (args.cache_dtype, args.layers, args.attention)
                result = compile_task(Task(topology, shape, program, *sizes, *kind))
                results.append({"shape": shape, "topology": topology, "program": program, **result})
                cells = "".join(f"{result.get(name, '')!s:>17}" for name in columns)
                print(f"{shape:12}{topology:14}{program:11}{cells}  {result.get('error', '')}", flush=True)
    passed = all(result["ok"] for result in results)
    print(json.dumps({"all_ok": passed, "programs": results}))
    sys.exit(not passed)


if __name__ == "__main__":
    main()
