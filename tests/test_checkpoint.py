"""Checkpoints that lie, disks that are full, and two runs in one workdir."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from fake_bucket import install
from hypothesis import given
from hypothesis import strategies as st
from short_run import ROOT, short_config

from step_grpo import checkpoint, cli, paths
from step_grpo.checkpoint import Progress, Saver, kept, put_away, restore
from step_grpo.errors import TransientError, UserError
from step_grpo.grpo.update import TrainState
from step_grpo.preemption import StoppedError
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


def test_every_save_gives_the_free_pages_of_the_heap_back(described, tmp_path, monkeypatch):
    trims: list[None] = []
    monkeypatch.setattr(checkpoint.heap, "trim", lambda: trims.append(None))
    with Saver(tmp_path, described, CONFIG) as saver:
        saver.save(Progress(1, 1), state_of(1))
        saver.save(Progress(2, 2), state_of(2))
    assert len(trims) == 2


def test_run_file_lists_every_other_file_with_its_size(saved):
    folder = saved / "checkpoints" / "000002"
    run = json.loads((folder / "run.json").read_text())
    assert run["files"] == {
        name: (folder / name).stat().st_size for name in files_of(folder) if name != "run.json"
    }
    assert (run["step"], run["cursor"], run["skipped"]) == (2, 8, 1)
    assert {"config", "version", "vocabulary"} <= run.keys()


def test_all_of_a_checkpoint_and_its_lines_are_on_the_disk_before_it_has_its_name(
    described, tmp_path, monkeypatch
):
    """A loss of power behind the renaming could leave names without contents."""
    real, synced, workdir = os.fsync, [], tmp_path / "run"
    folder = workdir / "checkpoints"
    workdir.mkdir()
    for name in ("metrics.jsonl", "rollouts.jsonl"):
        (workdir / name).write_text("{}\n")

    def fsync(descriptor):
        synced.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")))
        real(descriptor)

    def rename(path, target):
        needed = [path, *path.rglob("*"), workdir / "metrics.jsonl", workdir / "rollouts.jsonl"]
        assert not set(needed) - set(synced)
        synced.clear()
        os.rename(path, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "rename", rename)
    with Saver(workdir, described, CONFIG) as saver:
        saver.save(Progress(1, 4, 0), state_of(1))
    assert synced[0] == folder and (folder / "000001").is_dir()


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


def test_second_half_of_a_save_that_fails_waits_for_the_first_and_leaves_nothing(
    workdir, described, monkeypatch
):
    """The first half would make the folder anew after it was taken away."""
    real, written = checkpoint.ocp.save_async, []

    def save_async(path, tree):
        if path.name == "optimizer":
            raise OSError("no space")
        written.append(real(path, tree))
        return SimpleNamespace(result=lambda: (time.sleep(0.2), written[0].result()))

    monkeypatch.setattr(checkpoint.ocp, "save_async", save_async)
    with pytest.raises(UserError, match=r"000003 cannot be written .no space"):
        Saver(workdir, described, CONFIG).save(Progress(3, 12, 2), state_of(3))
    written[0].result()
    assert sorted(p.name for p in (workdir / "checkpoints").iterdir()) == ["000001", "000002"]


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
    elif how == "flipped":  # loads as it is
        data = bytearray(largest.read_bytes())
        data[len(data) // 2] ^= 1
        largest.write_bytes(data)
        return "the values of "
    elif how == "copy":
        shutil.rmtree(folder)
        shutil.copytree(folder.with_name("000001"), folder)
        return "a copy of that of step 1"
    else:
        largest.write_bytes(largest.read_bytes()[:-1])
    return name


@pytest.mark.parametrize(
    "how", ["run", "no run", "missing", "truncated", "params", "garbled", "flipped", "copy"]
)
def test_damaged_checkpoint_is_named_and_the_one_before_it_is_taken(workdir, described, how, capsys):
    folder = workdir / "checkpoints" / "000002"
    named = damage(folder, how)
    assert_is(1, restore(workdir, state_of(0), described, CONFIG))
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"warning: {folder} is ") and named in line and line.endswith("it is left out")


@pytest.mark.parametrize("how", ["truncated", "no run"])
def test_no_run_begins_anew_over_damaged_checkpoints(workdir, described, how):
    for step in ("000001", "000002"):
        damage(workdir / "checkpoints" / step, how)
    with pytest.raises(UserError, match="checkpoints: none is whole; delete the folder"):
        restore(workdir, state_of(0), described, CONFIG)


def test_damaged_checkpoint_is_not_opened(workdir):
    damage(workdir / "checkpoints" / "000002", "truncated")
    with pytest.raises(UserError, match=r"000002 is damaged: .* bytes"):
        checkpoint.open_model(workdir)


def test_weights_with_a_flipped_bit_are_not_opened(described, tmp_path):
    params = checkpoint.open_model("builtin:tiny").params
    config = short_config({"keep_checkpoints": 1})
    with Saver(tmp_path, described, config) as saver:
        saver.save(Progress(1, 0), TrainState(jnp.int32(1), params, ()))
    damage(tmp_path / "checkpoints" / "000001", "flipped")
    with pytest.raises(
        UserError, match=r"000001 is damaged: the values of params/.* are not those that were"
    ):
        checkpoint.open_model(tmp_path)


def test_checkpoint_from_before_there_were_checksums_is_taken(workdir, described):
    path = workdir / "checkpoints" / "000002" / "run.json"
    run = json.loads(path.read_text())
    assert set(run.pop("checksums")) >= {"params/w", "params/b", "optimizer/step"}
    path.write_text(json.dumps(run))
    assert_is(2, restore(workdir, state_of(0), described, CONFIG))


def test_run_that_goes_on_behind_a_damaged_checkpoint_keeps_its_own_and_names_it(described, tmp_path):
    """With one checkpoint to be kept, a damaged one of a later step must not be that one."""
    config = short_config({"keep_checkpoints": 1, "keep_every": 10})
    folder = tmp_path / "checkpoints"
    with Saver(tmp_path, described, config) as saver:
        for step in (10, 20):
            saver.save(Progress(step, 4 * step, step - 1), state_of(step))
    damage(folder / "000020", "truncated")
    progress, _ = restore(tmp_path, state_of(0), described, config)
    assert progress.step == 10
    put_away(tmp_path, 10, config)
    assert sorted(p.name for p in folder.iterdir()) == ["000010", "000020.damaged"]
    with (
        pytest.raises(StoppedError, match=f"goes on from {folder / '000013'}"),
        Saver(tmp_path, described, config) as saver,
    ):
        saver.offer(Progress(13, 52, 12), state_of(13), {})
        raise StoppedError
    assert_is(13, restore(tmp_path, state_of(0), described, config))
    with Saver(tmp_path, described, config) as saver:
        saver.save(Progress(20, 80, 19), state_of(20))
    assert sorted(p.name for p in folder.iterdir()) == ["000010", "000020"]


def test_checkpoint_that_is_saved_stays_whatever_else_is_there(workdir, described):
    folder, config = workdir / "checkpoints", short_config({"keep_checkpoints": 1})
    with (
        pytest.raises(StoppedError, match=f"goes on from {folder / '000003'}"),
        Saver(workdir, described, config) as saver,
    ):
        shutil.copytree(folder / "000002", folder / "000009")
        saver.save(Progress(3, 12, 2), state_of(3))
        raise StoppedError
    assert_is(3, restore(workdir, state_of(0), described, CONFIG))


def test_folder_of_another_name_is_no_checkpoint_and_steps_are_sorted_as_numbers(workdir, described):
    shutil.copytree(workdir / "checkpoints" / "000002", workdir / "checkpoints" / "000002.bak")
    with Saver(workdir, described, short_config({"keep_checkpoints": 2})) as saver:
        for step in (999_999, 1_000_000):
            saver.save(Progress(step, 4 * step, step - 1), state_of(step))
    assert [p.name for p in checkpoint.saved_steps(workdir)] == ["999999", "1000000"]
    assert (workdir / "checkpoints" / "000002.bak").is_dir()
    assert_is(1_000_000, restore(workdir, state_of(0), described, CONFIG))


def test_what_interrupted_saves_have_left_is_deleted_once_a_run_goes_on(workdir):
    folder = workdir / "checkpoints"
    for left in (".000005.partial/params", "000000/params", "000002.bak"):
        (folder / left).mkdir(parents=True)
    put_away(workdir, 2, short_config({"keep_checkpoints": 1}))
    assert sorted(p.name for p in folder.iterdir()) == ["000002", "000002.bak"]


def test_run_that_goes_on_in_a_bucket_deletes_what_has_no_marker(monkeypatch, tmp_path):
    bucket = install(monkeypatch, tmp_path)
    workdir = paths.folder("gs://bucket/run")
    for name in ("000001/params/x", "000001/run.json", "000002/params/x"):
        paths.write_text(workdir / "checkpoints" / name, "{}")
    put_away(workdir, 1, CONFIG)
    assert sorted(bucket.objects) == [
        f"bucket/run/checkpoints/000001/{name}" for name in ("params/x", "run.json")
    ]


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


def test_other_questions_are_refused_by_the_field_they_come_from(described, tmp_path):
    """As a data file gives that was changed behind the run."""
    data = {"config.data": "3 prompts with the checksum a", "config.eval.data": "2 prompts"}
    with Saver(tmp_path, described, CONFIG, data) as saver:
        saver.save(Progress(1, 4, 0), state_of(1))
    assert_is(1, restore(tmp_path, state_of(0), described, CONFIG, data))
    assert_is(1, restore(tmp_path, state_of(0), described, CONFIG))
    with pytest.raises(UserError, match=r"config\.data gave 3 prompts .* a, and now gives 3 prompts .* b"):
        restore(tmp_path, state_of(0), described, CONFIG, {**data, "config.data": "3 prompts with b"})


def test_checkpoint_from_before_questions_were_noted_is_taken(workdir, described):
    path = workdir / "checkpoints" / "000002" / "run.json"
    run = json.loads(path.read_text())
    del run["data"]
    path.write_text(json.dumps(run))
    assert_is(2, restore(workdir, state_of(0), described, CONFIG, {"config.data": "3 prompts"}))


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
