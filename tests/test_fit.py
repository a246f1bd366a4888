"""The fit check: what it counts, what it concludes, and, where there is libtpu, that it compiles."""

import dataclasses
import importlib.util
import json
import math
import subprocess
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from step_grpo import cli, paths
from step_grpo.config import base_config
from step_grpo.errors import UserError
from step_grpo.fit import check, solve, table
from step_grpo.fit.__main__ import check as run_check
from step_grpo.fit.__main__ import main
from step_grpo.fit.architectures import PUBLISHED, architecture_of
from step_grpo.fit.chips import CHIPS, GIB, chip_count, chip_of
from step_grpo.fit.compile import Result, Task, bytes_asked, measure, measure_sizes, problem_of
from step_grpo.fit.flops import forward_flops
from step_grpo.fit.hlo import Traffic, kernels, traffic
from step_grpo.fit.programs import STAGES, Sizes, beside
from step_grpo.model import qwen

ROOT = Path(__file__).parents[1]
needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed (pip install 'jax[tpu]')"
)

# ---------------------------------------------------------------------- collectives

HLO = """
%add.1 (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}

%all-reduce-scatter.3 (input.1: f32[64,32]) -> f32[16,32] {
  %input.1 = f32[64,32]{1,0:T(8,128)} parameter(0)
  %all-reduce.9 = f32[64,32]{1,0:T(8,128)} all-reduce(%input.1), channel_id=3, replica_groups={{0,1,2,3}}, to_apply=%add.1
  ROOT %slice = f32[16,32]{1,0:T(8,128)} dynamic-slice(%all-reduce.9), dynamic_slice_sizes={16,32}
}

%body.1 (p: (s32[], bf16[8,16])) -> (s32[], bf16[8,16]) {
  %p = (s32[], bf16[8,16]{1,0:T(8,128)(2,1)}) parameter(0)
  %w = bf16[2,16]{1,0} get-tuple-element(%p), index=1
  %all-gather-start.1 = (bf16[2,16]{1,0}, bf16[8,16]{1,0}) all-gather-start(%w), channel_id=1, replica_groups=[1,4]<=[4], dimensions={0}
  %all-gather-done.1 = bf16[8,16]{1,0} all-gather-done(%all-gather-start.1)
  %kernel = bf16[8,16]{1,0} custom-call(%all-gather-done.1), custom_call_target="tpu_custom_call"
  %scattered = f32[16,32]{1,0:T(8,128)} fusion(%g), kind=kCustom, calls=%all-reduce-scatter.3
  ROOT %t = (s32[], bf16[8,16]{1,0}) tuple(%i, %kernel)
}

%condition.1 (p.2: (s32[], bf16[8,16])) -> pred[] {
  %limit = s32[]{:T(128)} constant(36), metadata={op_name="x"}
  %p.2 = (s32[], bf16[8,16]{1,0}) parameter(0)
  %i.2 = s32[] get-tuple-element(%p.2), index=0
  ROOT %lt = pred[] compare(%i.2, %limit), direction=LT
}

%condition.2 (p.3: (s32[], bf16[8,16])) -> pred[] {
  %p.3 = (s32[], bf16[8,16]{1,0}) parameter(0)
  ROOT %and = pred[] and(%a, %b)
}

%body.2 (p.4: (s32[], bf16[8,16])) -> (s32[], bf16[8,16]) {
  %p.4 = (s32[], bf16[8,16]{1,0}) parameter(0)
  %scatter = f32[4]{0} reduce-scatter(%p.4), replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_1'}, dimensions={0}, to_apply=%add.1
  ROOT %loop = (s32[], bf16[8,16]{1,0}) while(%p.4), condition=%condition.1, body=%body.1
}

ENTRY %main (a: bf16[8,16]) -> bf16[8,16] {
  %a = bf16[8,16]{1,0} parameter(0)
  %sums = (f32[4]{0:T(128)}, /*index=1*/f32[4,3]{0,1:T(4,128)}) all-reduce(%u, %v), channel_id=2, replica_groups={{0,1,2,3}}, to_apply=%add.1
  %permuted = (f32[6]{0}, f32[6]{0}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%a), source_target_pairs={{0,1}}
  %loop.1 = (s32[], bf16[8,16]{1,0}) while(%z), condition=%condition.1, body=%body.1
  ROOT %loop.2 = (s32[], bf16[8,16]{1,0}) while(%loop.1), condition=%condition.2, body=%body.2
}
"""  # noqa: E501


def test_collectives_count_as_often_as_their_loops_run():
    assert set(traffic(HLO)) == {
        Traffic("all-reduce", 1, 4 * 4 + 4 * 12, False),
        Traffic("collective-permute", 1, 24, False),
        Traffic("all-gather", 36, 36 * 8 * 16 * 2, False),
        Traffic("reduce-scatter", 36, 36 * 64 * 32 * 4, False),
        # A loop of unknown length: one round of it, with the 36 rounds of the loop inside.
        Traffic("all-gather", 36, 36 * 8 * 16 * 2, True),
        Traffic("reduce-scatter", 36 + 1, 36 * 64 * 32 * 4 + 4 * 4 * 4, True),
    }
    assert kernels(HLO) == 1


def test_collectives_of_a_compiled_program_have_the_bytes_that_were_exchanged():
    mesh = Mesh(np.array(jax.devices()[:4]), ("x",), axis_types=(AxisType.Auto,))
    spread = PartitionSpec("x")

    def on_each(block):
        def layer(i, block):
            whole = jax.lax.all_gather(block, "x", tiled=True) * (i + 1.0)
            return jax.lax.psum_scatter(jnp.sin(whole), "x", tiled=True)

        block = jax.lax.fori_loop(0, 7, layer, block)
        return block + jax.lax.psum(block.sum(), "x")

    program = jax.jit(jax.shard_map(on_each, mesh=mesh, in_specs=spread, out_specs=spread, check_vma=False))
    x = jax.ShapeDtypeStruct((64, 8), jnp.float32, sharding=NamedSharding(mesh, spread))
    found = {t.kind: t for t in traffic(program.lower(x).compile().as_text())}
    whole = 64 * 8 * 4
    assert found["all-gather"] == Traffic("all-gather", 7, 7 * whole, False)
    assert found["reduce-scatter"] == Traffic("reduce-scatter", 7, 7 * whole, False)
    assert found["all-reduce"] == Traffic("all-reduce", 1, 4, False)


# ---------------------------------------------------------------------- FLOPs and architectures


def test_flops_of_a_forward_pass_are_those_of_its_products():
    cfg = qwen.QwenConfig(
        vocab_size=24, width=16, layers=3, heads=4, kv_heads=2, head_dim=8, ffn=20, rope_theta=1e4,
        rms_eps=1e-6, tied=False, qk_norm=True, qkv_bias=False,
    )  # fmt: skip
    T = 6
    params = qwen.abstract_params(cfg)
    rows = jax.ShapeDtypeStruct((1, T), jnp.int32)

    def logits(params, tokens, positions, segments):
        hidden = qwen.forward(params, cfg, tokens, positions, segments, jnp.float32)
        return qwen.unembed(params, hidden)

    def products(jaxpr, times=1):
        """Counts every product in a traced program; a scan as often as it runs."""
        total = 0
        for equation in jaxpr.eqns:
            if equation.primitive.name == "dot_general":
                ((contracted, _), _), left = equation.params["dimension_numbers"], equation.invars[0].aval
                inner = math.prod(left.shape[i] for i in contracted)
                total += times * 2 * inner * math.prod(equation.outvars[0].aval.shape)
            for value in equation.params.values():
                inside = getattr(value, "jaxpr", value)
                if hasattr(inside, "eqns"):
                    total += products(inside, times * equation.params.get("length", 1))
        return total

    counted = products(jax.make_jaxpr(logits)(params, rows, rows, rows).jaxpr)
    # Traced attention computes all pairs; a query needs those that it may see.
    all_pairs, seen = T * T, T * (T + 1) // 2
    unseen = (all_pairs - seen) * 4 * cfg.layers * cfg.heads * cfg.head_dim
    assert forward_flops(cfg, [T], T) == counted - unseen
    assert forward_flops(cfg, [2, 4], 0) < forward_flops(cfg, [6], 0)


@pytest.mark.parametrize(
    ("name", "billions"),  # of the model cards
    [("0.6B", 0.6), ("1.7B", 1.7), ("4B", 4.0), ("8B", 8.2), ("14B", 14.8), ("32B", 32.8)],
)
def test_published_architecture_has_the_published_number_of_weights(name, billions):
    cfg = qwen.config_from_hf(PUBLISHED[f"Qwen/Qwen3-{name}"])
    count = sum(math.prod(x.shape) for x in jax.tree.leaves(qwen.abstract_params(cfg)))
    assert count == pytest.approx(billions * 1e9, rel=0.02)


@pytest.mark.parametrize(("name", "billions"), [("1.5B", 1.78), ("7B", 7.62)])
def test_published_architecture_of_the_distilled_models(name, billions):
    cfg = qwen.config_from_hf(PUBLISHED[f"deepseek-ai/DeepSeek-R1-Distill-Qwen-{name}"])
    count = sum(math.prod(x.shape) for x in jax.tree.leaves(qwen.abstract_params(cfg)))
    assert count == pytest.approx(billions * 1e9, rel=0.005)
    assert cfg.qkv_bias and not cfg.tied


def test_architecture_needs_no_network(monkeypatch):
    monkeypatch.setattr("step_grpo.fit.architectures.hf_hub_download", lambda *a, **k: pytest.fail("network"))
    assert architecture_of(base_config().model)["num_hidden_layers"] == 36


def test_architecture_is_read_from_a_bucket_as_a_run_does(tmp_path):
    from fake_bucket import install

    with pytest.MonkeyPatch.context() as patch:
        install(patch, tmp_path)
        config = base_config().unlock()
        config.model.checkpoint = "gs://bucket/models/qwen"
        paths.write_text(paths.folder(config.model.checkpoint) / "config.json", '{"hidden_size": 7}')
        assert architecture_of(config.model) == {"hidden_size": 7}


# ---------------------------------------------------------------------- slices


def test_slices_are_counted_and_wrong_ones_refused():
    assert (chip_count("v5p:2x2x4"), chip_of("v6e:2x4").hbm) == (16, 31.25 * GIB)
    for wrong in ("v5p", "v5p:2x2", "v9:2x2", "v5e:2xx2", "v5e:0x2"):
        with pytest.raises(UserError, match="--topology"):
            chip_of(wrong)
    assert check.larger_slice("v5p:2x2x1", 4) == "v5p:2x2x2"
    assert check.larger_slice(f"v5e:{CHIPS['v5e'].slices[-1]}", 1) == ""
    assert (check.larger_slice("v6e:2x2", 4), check.larger_slice("v6e:2x4", 4)) == ("v6e:2x4", "")
    assert (check.larger_slice("v6e:2x4", 2), check.larger_slice("v5e:4x4", 2)) == ("v6e:4x4", "")


# ---------------------------------------------------------------------- the largest size


@pytest.mark.parametrize("start", [1, 3, 40])
@pytest.mark.parametrize("slope", [1.0, 7.0, 30.0])
def test_largest_size_is_one_that_was_seen_to_fit_and_the_next_does_not(start, slope):
    def peak(n):
        calls.append(n)
        return 100 + 7.3 * n

    calls = []
    most = int((300 - 100) / 7.3)
    found = solve.largest(peak, (start, 100 + 7.3 * start), slope, 300, 512, tries=6)
    assert found == most and (found in calls or found == start)
    assert len(calls) == len(set(calls))


def test_largest_size_where_the_compiler_tells_nothing_of_what_is_too_large():
    found = solve.largest(lambda n: 10.0 * n if n <= 13 else math.inf, (1, 10.0), 1.0, 1000, 64, tries=8)
    assert found == 13
    assert solve.largest(lambda n: math.inf, (8, math.inf), 1.0, 10, 64) == 0


# ---------------------------------------------------------------------- the verdict

HELD = {
    "base": 0, "params": 8, "embeddings": 0, "moments": 16, "reference": 8, "gradients": 8,
    "decode weights": 4, "tables": 0, "batches": 1, "other batches": 1, "cache": 1, "prompts": 0,
}  # fmt: skip


def stub_sizes(task):
    held = {name: size * GIB for name, size in HELD.items()}
    return Sizes(held, 10**9, 2, 2, 2, (1, 2, 2), 100, True)


def stub_measure(task):
    """Peaks as they would be: caches of the lanes, the params and gradients, and a GiB for each row."""
    arguments = {"log-probs": 8, "accumulate": 16, "apply": 32, "weights": 8, "prefill": 4}.get(
        task.program, 4 + task.lanes
    )
    own = {"accumulate": task.rows, "grow": 0.5 * task.lanes, "weights": 0}.get(task.program, 0.5)
    return Result((arguments + own) * GIB, arguments=arguments * GIB, temporaries=int(own * GIB))


def verdict_of(topology="v5p:2x2x1", lanes=0, config=None):
    plan = check.make_plan(config or base_config(), topology, lanes, stub_sizes)
    return check.Verdict(plan, check.compile_all(plan, stub_measure, plan.programs))


def test_peak_of_a_program_counts_what_lies_beside_its_arguments():
    verdict = verdict_of(lanes=8)
    assert verdict.plan.task.lanes == 4
    assert verdict.totals["grow"] == (4 + 4 + 0.5 * 4 + 8 + 16 + 8 + 4) * GIB
    assert verdict.totals["accumulate"] == (16 + 2 + 16 + 8 + 1) * GIB
    assert verdict.totals["apply"] == (32 + 0.5 + 8 + 1) * GIB
    assert beside("segment", stub_sizes(None).held, 7) == (8 + 16 + 8) * GIB


def test_every_array_of_the_run_is_an_argument_or_lies_beside():
    held = set(HELD)
    assert set(STAGES) == {
        "weights",
        "prefill",
        "insert",
        "segment",
        "grow",
        "log-probs",
        "accumulate",
        "apply",
    }
    assert all(set(names) <= held for names in STAGES.values())


def test_lanes_and_rows_are_the_most_that_fit():
    verdict = verdict_of()
    lanes, rows = check.largest_lanes(verdict, stub_measure), check.largest_rows(verdict, stub_measure)
    limit = verdict.plan.limit / GIB
    assert 40 + 1.5 * lanes <= limit < 40 + 1.5 * (lanes + 1)
    assert rows % 2 == 0 and 41 + rows <= limit < 41 + rows + 2


def exit_code(topology, lanes=0, **fields):
    config = base_config().unlock()
    config.grpo.update(fields)
    return run_check(config, topology, lanes, search=True, measure=stub_measure, measure_sizes=stub_sizes)


def test_exit_code_says_whether_it_fits(capsys):
    assert exit_code("v5p:2x2x1") == 0
    assert "It fits v5p:2x2x1" in capsys.readouterr().out
    assert exit_code("v6e:2x4") == 1
    said = " ".join(capsys.readouterr().out.split())
    assert "needs 43.00 GiB of 31.25 GiB" in said or "does not fit v6e:2x4" in said
    assert "config.grpo.moments_dtype=bfloat16" in said and "v6e:4x4" in said


@pytest.mark.parametrize(
    ("topology", "groups_here", "advised"),
    [("v5p:2x2x2", 2, True), ("v5p:2x2x2", 1, False), ("v5e:4x8", 4, False), ("v6e:4x4", 4, True)],
)
def test_only_what_can_work_is_advised_of_the_mesh(topology, groups_here, advised):
    def sizes(task):
        held = dict.fromkeys(HELD, 40 * GIB)
        return stub_sizes(task)._replace(held=held, groups_here=groups_here, mesh=(1, 4, 1))

    plan = check.make_plan(base_config(), topology, 8, sizes)
    said = check.advice(check.Verdict(plan, check.compile_all(plan, stub_measure, plan.programs)))
    assert any("config.mesh.tensor" in line for line in said) is advised


def test_failure_of_the_compiler_is_told_in_its_words_and_not_taken_for_a_size(capsys):
    def fails(task):
        if task.program != "segment":
            return stub_measure(task)
        return Result(math.inf, fits=False, problem="INTERNAL: Mosaic failed to compile [x]\nat line 7")

    code = run_check(base_config(), "v5p:2x2x1", 0, search=True, measure=fails, measure_sizes=stub_sizes)
    said = " ".join(capsys.readouterr().out.split())
    assert code == 1 and said.endswith(
        "It does not compile for v5p:2x2x1: - segment: INTERNAL: Mosaic failed to compile [x]"
    )
    assert "does not fit" not in said and "inf" not in said and "would help" not in said


def test_nothing_of_the_environment_makes_the_compiler_try_less_hard(monkeypatch):
    def run(*_, env, **__):
        seen.update(env)
        return subprocess.CompletedProcess([], 0, b'[{"peak": 1}]', b"")

    seen = {}
    for name in ("JAX_EXEC_TIME_OPTIMIZATION_EFFORT", "XLA_FLAGS", "KEPT"):
        monkeypatch.setenv(name, "-1.0")
    monkeypatch.setattr("step_grpo.fit.compile.subprocess.run", run)
    assert measure(Task(base_config(), "v5p:2x2x1", "segment")).peak == 1
    assert seen["KEPT"] == "-1.0" and seen["JAX_PLATFORMS"] == "cpu"
    assert not {"JAX_EXEC_TIME_OPTIMIZATION_EFFORT", "XLA_FLAGS"} & seen.keys()


def test_too_many_lanes_are_told_with_the_number_that_fits(capsys):
    assert exit_code("v5p:2x2x1", lanes=200) == 1
    said = " ".join(capsys.readouterr().out.split())
    most = check.largest_lanes(verdict_of(), stub_measure)
    assert f"lower config.rollout.lanes to {2 * most}" in said


def test_too_many_rows_are_told_with_the_number_that_fits(capsys):
    assert exit_code("v5p:2x2x1", rows=80) == 1
    assert "lower config.grpo.rows to" in " ".join(capsys.readouterr().out.split())


def test_program_that_the_compiler_refuses_for_its_size_does_not_fit(capsys):
    def refused(task):
        result = stub_measure(task)
        return result._replace(peak=120 * GIB, fits=False) if task.program == "accumulate" else result

    config = base_config()
    code = run_check(config, "v5p:2x2x1", 0, search=False, measure=refused, measure_sizes=stub_sizes)
    assert code == 1 and "accumulate needs" in " ".join(capsys.readouterr().out.split())


def test_problem_is_the_first_line_of_the_last_exception():
    said = "Traceback:\nValueError: x\njax.errors.JaxRuntimeError: INTERNAL: no\n%while = s32\n"
    assert problem_of(said) == "jax.errors.JaxRuntimeError: INTERNAL: no"
    assert (problem_of("killed\n\n"), problem_of("")) == ("killed", "")


def test_size_is_read_from_the_messages_of_the_compiler():
    first = "Ran out of memory on HBM, the total memory required for HLO temporaries (464.00G) exceeds available HBM (15.75G)."  # noqa: E501
    second = (
        "Ran out of memory in memory space hbm. Used 33.34G of 31.25G hbm. Exceeded hbm capacity by 2.09G."
    )
    assert bytes_asked(first) == 464 * GIB and bytes_asked(second) == 33.34 * GIB
    assert bytes_asked("Mosaic failed to compile") is None


@pytest.mark.parametrize(
    "arguments",
    [
        ["--topology=v9:1x1"],
        ["--topology=v5p:2x2x1", "--lanes=many"],
        ["--topology=v5p:2x2x1", "--largest=maybe"],
    ],
)
def test_mistakes_end_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.run(main, ["fit", f"--config={ROOT / 'configs/qwen3_8b.py'}", *arguments])
    assert ended.value.code == 2 and "step_grpo: error" in capsys.readouterr().err


def test_without_libtpu_it_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr("step_grpo.fit.compile.importlib.util.find_spec", lambda name: None)
    with pytest.raises(SystemExit) as ended:
        cli.run(main, ["fit", f"--config={ROOT / 'configs/qwen3_8b.py'}", "--topology=v5p:2x2x1"])
    assert ended.value.code == 2 and "pip install 'jax[tpu]'" in capsys.readouterr().err


# ---------------------------------------------------------------------- the table


def test_table_takes_the_smallest_slice_that_fits_and_compiles_nothing_twice(tmp_path):
    def sizes_of(tasks):
        return [table_sizes(task) for task in tasks]

    def table_sizes(task):
        devices, tensor = chip_count(task.topology), task.config.mesh.tensor
        if tensor == 4:
            return "no such mesh"
        share = {
            "moments": 8 if task.config.grpo.moments_dtype == "float32" else 4,
            "decode weights": 2 / tensor,
        }
        each = {"params": 4, "reference": 4, "gradients": 4, **share}
        held = {
            name: int(8e9 * size / (1 if name == "decode weights" else devices))
            for name, size in each.items()
        }
        held |= {
            "base": 0,
            "embeddings": 0,
            "tables": 0,
            "batches": 0,
            "other batches": 0,
            "cache": GIB // tensor,
            "prompts": 0,
        }
        fsdp = devices // tensor
        return Sizes(held, 8 * 10**9, fsdp, fsdp, fsdp, (1, fsdp, tensor), 640, True)

    def measured(task):
        calls.append(task)
        too_large = task.program == "accumulate" and task.config.mesh.tensor == 2
        return Result(200 * GIB if too_large else GIB, fits=not too_large)

    calls = []
    known = table.Remembered(tmp_path / "fit.jsonl", measured)
    cell = table.Cell("Qwen/Qwen3-8B", "v5p")
    found = table.search(cell, known, sizes_of)
    assert found.topology == "v5p:2x2x1" and found.mesh == (1, 4, 1) and found.moments == "float32"
    assert {task.topology for task in calls} == {"v5p:2x2x1"} and found.peak < chip_of("v5p:2x2x1").hbm
    count = len(calls)
    again = table.Remembered(tmp_path / "fit.jsonl", measured)
    assert table.search(cell, again, sizes_of) == found and len(calls) == count
    page = table.render({cell: found, table.Cell("Qwen/Qwen3-8B", "v5e"): None})
    assert "v5p:2x2x1 (fsdp 4, tensor 1)" in page and "none of its slices" in page


def test_table_has_every_cell_in_its_place_and_every_result_in_a_line_of_its_own(tmp_path, monkeypatch):
    """Cells are looked for side by side, and the later ones are found first."""
    measured = []

    def slow_then_quick(task):
        time.sleep(0.2 if task.topology == "v5e" else 0.0)
        measured.append(task)
        return Result(peak=1.0)

    def search(cell, known, sizes_of):
        known(Task(table.config_for(cell, 1, "float32"), cell.chip, "apply"))
        return table.Found(f"{cell.chip}:1x1", (1, 1, 1), "float32", 1, "apply", GIB)

    monkeypatch.setattr(table, "require_libtpu", lambda: None)
    monkeypatch.setattr(table, "measure", slow_then_quick)
    monkeypatch.setattr(table, "search", search)
    monkeypatch.setattr(table, "chip_of", lambda topology: CHIPS["v5e"])
    table.main(str(tmp_path / "fit.md"), str(tmp_path / "fit.jsonl"), only="Qwen3-8B")
    rows = [line for line in (tmp_path / "fit.md").read_text().splitlines() if line.startswith("| Qwen3-8B")]
    assert len(rows) == len(table.MODES)
    for row in rows:
        texts = row.split(" | ")[1:]
        assert [text.partition(":")[0] for text in texts] == list(CHIPS)
    lines = [json.loads(line)["task"] for line in (tmp_path / "fit.jsonl").read_text().splitlines()]
    assert sorted(lines) == sorted(map(table.name_of, measured)) and len(lines) == 2 * len(CHIPS)


def test_table_begins_no_further_cell_behind_one_that_fails(tmp_path, monkeypatch):
    begun = []

    def search(cell, known, sizes_of):
        begun.append(cell)
        time.sleep(0.05)
        raise UserError("no compiler")

    monkeypatch.setattr(table, "require_libtpu", lambda: None)
    monkeypatch.setattr(table, "search", search)
    with pytest.raises(UserError, match="no compiler"):
        table.main(str(tmp_path / "fit.md"), str(tmp_path / "fit.jsonl"))
    assert len(begun) <= 2 * check.SIDE_BY_SIDE


# ---------------------------------------------------------------------- with the compiler


def small_task(program, **fields):
    """A narrow model of two layers with short texts, its heads over two devices."""
    config = cli.load_config(f"{ROOT / 'configs/qwen3_8b.py'}:runlocal").unlock()
    config.model.architecture.update(
        hidden_size=256, head_dim=128, num_attention_heads=4, num_key_value_heads=2, intermediate_size=512
    )
    config.model.dtype = "bfloat16"
    config.mesh.update(data=1, fsdp=2, tensor=2)
    config.grpo.rows = 0
    config.update_from_flattened_dict(fields)
    return Task(config, "v5e:2x2", program, lanes=4, rows=2)


@pytest.fixture
def importable(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


@needs_libtpu
@pytest.mark.parametrize("program", ["segment", "accumulate"])
def test_programs_compile_with_kernels_over_a_mesh(program, importable):
    result = measure(small_task(program))
    assert not result.problem and result.fits and result.kernels > 0, result
    assert result.peak >= result.arguments > 0
    assert "all-reduce" in {t.kind for t in result.traffic}


@needs_libtpu
@pytest.mark.parametrize("base", ["dense", "nf4"])
def test_programs_of_an_adapter_compile(base, importable):
    fields = {"lora.rank": 8, "lora.base": base}
    sizes = measure_sizes(small_task("sizes", **fields))
    assert 0 < sizes.held["params"] < sizes.held["base"]
    for program in ("weights", "accumulate"):
        result = measure(small_task(program, **fields))
        assert not result.problem and result.fits, result


@needs_libtpu
def test_program_that_is_too_large_does_not_fit(importable):
    task = small_task("grow")
    result = measure(dataclasses.replace(task, lanes=2**18))
    assert not result.fits and not result.problem and result.peak > chip_of(task.topology).hbm


@needs_libtpu
def test_sizes_are_those_of_the_arguments(importable):
    sizes, result = measure_sizes(small_task("sizes")), measure(small_task("apply"))
    state = sizes.held["params"] + sizes.held["moments"] + sizes.held["gradients"]
    assert result.arguments == pytest.approx(state, rel=0.1)


@needs_libtpu
def test_weights_over_the_devices_of_a_host_are_refused_where_that_does_not_compile(importable):
    task = small_task("sizes", **{"mesh.fsdp": 16, "rollout.lanes": 64})
    with pytest.raises(UserError, match=r"config\.mesh\.tensor is 2, .* 32 chips .*mesh\.tensor=1,"):
        measure_sizes(dataclasses.replace(task, topology="v5e:4x8"))
    task.config.mesh.update(fsdp=32, tensor=1)
    assert measure_sizes(dataclasses.replace(task, topology="v5e:4x8")).mesh == (1, 32, 1)


@needs_libtpu
def test_mesh_that_needs_more_devices_is_a_mistake(importable):
    task = small_task("sizes")
    task.config.mesh.fsdp = 16
    with pytest.raises(UserError, match="needs 32 devices"):
        measure_sizes(task)
