"""Checkpoints that lie, disks that are full, and two runs in one workdir."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from short_run import ROOT, short_config

from step_grpo import checkpoint, cli
from step_grpo.checkpoint import Progress, Saver, kept, restore
from step_grpo.errors import TransientError, UserError
from step_grpo.grpo.update import TrainState
from step_grpo.workdir import locked, once

CONFIG = short_config({"steps": 9})
SIZE = 50_000  # numbers in a weight: more than a limit below allows to write


def state_of(step: int) -> TrainState:
    """Some weights that say which step they are of."""
    params = {"w": jax.random.normal(jax.random.key(step), (SIZE,)), "b": jnp.full(3, step, jnp.float32)}
    return TrainState(jnp.int32(step), params, optax.adam(1e-3).init(params))


@pytest.fixture(scope="module")
def described():
    return checkpoint.open_model("builtin:tiny").described


@pytest.fixture(scope="module")
def saved(described, tmp_path_factory):
    """A workdir with the checkpoints of steps 1 and 2; copy it, never write to it."""
    workdir = tmp_path_factory.mktemp("saved")
    with Saver(workdir, described, CONFIG) as saver:
        for step in (1, 2):
            saver.save(Progress(step, 4 * step, step - 1), state_of(step))
    return workdir


@pytest.fixture
def workdir(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "run")


def assert_is(step: int, found: tuple[Progress, TrainState]) -> None:
    """The whole state of a step, and where it stood."""
    progress, state = found
    assert progress == Progress(step, 4 * step, step - 1)
    jax.tree.map(np.testing.assert_array_equal, state, state_of(step))


def files_of(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


# ---------------------------------------------------------------------- saving


def test_what_is_given_away_behind_a_save_is_saved_as_it_was(described, tmp_path):
    """The next update writes into the buffers of the state while the thread still writes them to the disk."""
    overwrite = jax.jit(lambda s: jax.tree.map(lambda x: x * 0 - 7, s), donate_argnums=0)
    state = state_of(5)
    with Saver(tmp_path, described, CONFIG) as saver:
        saver.save(Progress(5, 20, 4), state)
        for _ in range(3):
            state = overwrite(state)
    assert_is(5, restore(tmp_path, state_of(0), described, CONFIG))


def test_run_file_lists_every_other_file_with_its_size(saved):
    folder = saved / "checkpoints" / "000002"
    run = json.loads((folder / "run.json").read_text())
    assert run["files"] == {
        name: (folder / name).stat().st_size for name in files_of(folder) if name != "run.json"
    }
    assert (run["step"], run["cursor"], run["skipped"]) == (2, 8, 1)
    assert {"config", "version", "vocabulary"} <= run.keys()


def kept_by_hand(steps, newest, every, values):
    """Restated: go through the steps one by one."""
    stay, best = [], None
    for place, step in enumerate(steps):
        if len(steps) - place <= newest or (every > 0 and step % every == 0):
            stay.append(step)
        if step in values and (best is None or values[step] >= values[best]):
            best = step
    return {*stay} | ({best} if best is not None else set())


@given(
    st.sets(st.integers(1, 30)),
    st.integers(1, 4),
    st.integers(0, 6),
    st.dictionaries(st.integers(1, 30), st.integers(0, 3)),
)
def test_kept_are_the_newest_every_so_manieth_and_the_best(steps, newest, every, values):
    assert kept(sorted(steps), newest, every, values) == kept_by_hand(sorted(steps), newest, every, values)


@pytest.mark.parametrize(("best", "stays"), [("reward", 2), ("-reward", 1), ("", None)])
def test_best_by_a_metric_stays_beside_the_last(described, tmp_path, best, stays):
    config = short_config({"steps": 9, "keep_checkpoints": 1, "keep_best": best})
    (tmp_path / "metrics.jsonl").write_text(
        "".join(f'{{"step": {s}, "reward": {r}}}\n' for s, r in ((1, 0.1), (2, 0.9), (3, 0.5), (4, 0.2)))
    )
    with Saver(tmp_path, described, config) as saver:
        for step in range(1, 5):
            saver.offer(Progress(step, 0), state_of(step), {"reward": 0.0})
    there = [int(path.name) for path in checkpoint.saved_steps(tmp_path)]
    assert there == ([stays, 4] if stays else [4])


def test_best_by_something_that_is_no_metric_is_refused_after_the_first_step(described, tmp_path):
    config = short_config({"keep_best": "acuracy", "save_every": 5})
    with pytest.raises(UserError, match=r"config\.keep_best is 'acuracy'.*accuracy, reward"):
        Saver(tmp_path, described, config).offer(Progress(1, 0), state_of(1), {"reward": 0, "accuracy": 1})


# ---------------------------------------------------------------------- a full disk


@contextmanager
def no_file_above(size: int):
    """The kernel refuses to let any file of this process grow beyond so many bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)


@pytest.mark.parametrize("limit", [1_000, 60_000])
def test_save_without_room_names_the_checkpoint_to_go_on_from_and_leaves_nothing(workdir, described, limit):
    """Room for no tokenizer, and for the tokenizer but no weights."""
    saver = Saver(workdir, described, CONFIG)
    with no_file_above(limit), pytest.raises(TransientError) as caught:
        saver.save(Progress(3, 12, 2), state_of(3))
        saver.finish()
    assert "000003 cannot be written" in str(caught.value)
    assert f"goes on from {workdir / 'checkpoints' / '000002'}" in str(caught.value)
    assert sorted(p.name for p in (workdir / "checkpoints").iterdir()) == ["000001", "000002"]
    assert_is(2, restore(workdir, state_of(0), described, CONFIG))
    saver.save(Progress(3, 12, 2), state_of(3))  # there is room again
    saver.finish()
    assert_is(3, restore(workdir, state_of(0), described, CONFIG))


@contextmanager
def file_system(folder, *options: str):
    """A small file system of its own in a folder."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", ",".join(options), "none", str(folder)]
    if os.geteuid() or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("only root may mount file systems, and here not even root")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_save_on_a_disk_that_is_full_goes_on_from_the_one_before(saved, described, tmp_path):
    with file_system(tmp_path / "disk", "size=16m"):
        workdir = shutil.copytree(saved, tmp_path / "disk" / "run")
        free = os.statvfs(workdir)
        (tmp_path / "disk" / "other").write_bytes(bytes(free.f_bavail * free.f_bsize - 100_000))
        saver = Saver(workdir, described, CONFIG)
        with pytest.raises(UserError, match=r"000003 cannot be written.*goes on from .*000002"):
            saver.save(Progress(3, 12, 2), state_of(3))
            saver.finish()
        assert sorted(p.name for p in (workdir / "checkpoints").iterdir()) == ["000001", "000002"]
        assert_is(2, restore(workdir, state_of(0), described, CONFIG))
        (tmp_path / "disk" / "other").unlink()
        saver.save(Progress(3, 12, 2), state_of(3))
        saver.finish()
        assert_is(3, restore(workdir, state_of(0), described, CONFIG))


def test_workdir_on_a_disk_that_is_read_only_is_refused_by_name(tmp_path):
    with (
        file_system(tmp_path / "disk", "ro"),
        pytest.raises(UserError, match=r"disk/run cannot be written .Read-only file system.; name another"),
        locked(tmp_path / "disk" / "run"),
    ):
        pass


def test_full_disk_elsewhere_is_one_line(capsys):
    def main() -> None:
        with open("/dev/full", "w") as file:
            file.write("x" * 10)

    with pytest.raises(SystemExit) as ended:
        cli.run(main, ["program"])
    assert ended.value.code == 75
    told = "No space left on device; make room or give the rights, and run the same line again"
    assert capsys.readouterr().err == f"step_grpo: error: {told}\n"


# ---------------------------------------------------------------------- checkpoints that lie


def damage(folder, how: str) -> str:
    """Breaks a checkpoint; returns what the message must name."""
    if how == "run":
        (folder / "run.json").write_text('{"step": 2, "curs')
        return "run.json"
    if how == "no run":
        (folder / "run.json").unlink()
        return "run.json"
    largest = max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    if how == "params":
        largest = max((folder / "params").rglob("*"), key=lambda p: p.stat().st_size * p.is_file())
    name = str(largest.relative_to(folder))
    if how == "missing":
        largest.unlink()
    elif how == "garbled":  # of the right size
        for file in (p for p in (folder / "params").rglob("*") if p.is_file()):
            file.write_bytes(bytes(file.stat().st_size))
        return "params does not load"
    else:
        largest.write_bytes(largest.read_bytes()[:-1])
    return name


@pytest.mark.parametrize("how", ["run", "no run", "missing", "truncated", "params", "garbled"])
def test_damaged_checkpoint_is_named_and_the_one_before_it_is_taken(workdir, described, how, capsys):
    folder = workdir / "checkpoints" / "000002"
    named = damage(folder, how)
    assert_is(1, restore(workdir, state_of(0), described, CONFIG))
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"warning: {folder} is ") and named in line and line.endswith("it is left out")


def test_no_run_begins_anew_over_damaged_checkpoints(workdir, described):
    for step in ("000001", "000002"):
        damage(workdir / "checkpoints" / step, "truncated")
    with pytest.raises(UserError, match="checkpoints: none is whole; delete the folder"):
        restore(workdir, state_of(0), described, CONFIG)


def test_damaged_checkpoint_is_not_opened(workdir):
    damage(workdir / "checkpoints" / "000002", "truncated")
    with pytest.raises(UserError, match=r"000002 is damaged: .* bytes"):
        checkpoint.open_model(workdir)


def test_another_architecture_is_refused_by_its_field(workdir, described):
    other = described.hf_config | {"num_hidden_layers": 77}
    with pytest.raises(UserError, match=r"num_hidden_layers=\d+, config\.model has 77; use a new --workdir"):
        restore(workdir, state_of(0), _with(described, hf_config=other), CONFIG)


def test_another_vocabulary_is_refused(workdir, described):
    class Other:
        def get_vocab(self):
            return described.tokenizer.get_vocab() | {"another": 10**6}

    with pytest.raises(UserError, match="another vocabulary"):
        restore(workdir, state_of(0), _with(described, tokenizer=Other()), CONFIG)


def _with(described, **fields):
    import dataclasses

    return dataclasses.replace(described, **fields)


def test_weights_of_other_shapes_are_never_half_loaded(workdir, described):
    wrong = TrainState(jnp.int32(0), {"w": jnp.zeros(7), "b": jnp.zeros(3)}, state_of(0).opt_state)
    with pytest.raises(UserError, match="none is whole"):
        restore(workdir, wrong, described, CONFIG)


# ---------------------------------------------------------------------- one run a workdir

HOLD = """
import sys, time
from pathlib import Path
from step_grpo.workdir import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def test_second_run_in_a_workdir_is_refused_until_the_first_is_dead(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout
    assert process.stdout.readline() == "held\n"
    with (
        pytest.raises(UserError, match=f"a run is there already .process {process.pid} on "),
        locked(tmp_path),
    ):
        pass
    process.kill()
    process.wait()
    process.stdout.close()
    for _ in range(2):
        with locked(tmp_path):
            pass


def test_workdir_that_cannot_be_written_is_refused_by_name():
    with (
        pytest.raises(UserError, match="--workdir=/proc/run cannot be written"),
        locked(Path("/proc/run")),
    ):
        pass


# ---------------------------------------------------------------------- done once


def test_measured_once_under_the_same_facts(tmp_path):
    path, leaves, calls = tmp_path / "known.json", tmp_path / "leaves", []

    def measure():
        assert not path.exists()  # nothing vouches for `leaves` while it is written
        leaves.write_text("x")
        calls.append(1)
        return {"accuracy": 0.1 + 0.2}

    assert [once(path, {"seed": 1}, leaves, measure) for _ in range(2)] == [{"accuracy": 0.1 + 0.2}] * 2
    assert len(calls) == 1
    once(path, {"seed": 2}, leaves, measure)
    leaves.unlink()
    once(path, {"seed": 2}, leaves, measure)
    path.write_text('{"facts": {"seed": 2}, "res')
    once(path, {"seed": 2}, leaves, measure)
    assert len(calls) == 4
