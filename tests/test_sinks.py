"""TensorBoard and Weights & Biases follow metrics.jsonl."""

import json
import math
import sys
from types import ModuleType, SimpleNamespace

import pytest
from fake_bucket import install
from short_run import short_config

from step_grpo import paths, sinks
from step_grpo.errors import UserError
from step_grpo.metrics import MetricsWriter, read_metrics


def run(workdir, log, steps, first_step=0):
    """Writes steps as `main` does, after going on from `first_step`."""
    config = short_config({"log": log})
    with (
        MetricsWriter(workdir / "metrics.jsonl", first_step) as lines,
        sinks.opened(workdir, config, lines) as metrics,
    ):
        for step in steps:
            metrics.write(step, {"accuracy": step / 7, "exit_rep": 0.0, "loss": math.nan, "own/x": None})


def drawn(lines):
    """Points as the sinks should have them: step, name, value, of all that is a number."""
    return [
        (line["step"], name, value)
        for line in lines
        for name, value in line.items()
        if name != "step" and value is not None
    ]


# ---------------------------------------------------------------------- TensorBoard


def points(folder):
    """What TensorBoard itself reads."""
    loader = pytest.importorskip("tensorboard.backend.event_processing.event_file_loader")
    from tensorboard.util.tensor_util import make_ndarray

    return [
        (event.step, value.tag, float(make_ndarray(value.tensor)))
        for path in sorted(folder.glob("events.out.tfevents.*"))
        for event in loader.EventFileLoader(str(path)).Load()
        for value in event.summary.value
    ]


def test_event_files_are_metrics_jsonl_also_after_an_interruption(tmp_path):
    pytest.importorskip("tensorboard")
    for steps, first_step in ((range(1, 4), 0), (range(3, 5), 2), (range(5, 6), 4)):
        run(tmp_path, {"tensorboard": True}, steps, first_step)
        expected = drawn(read_metrics(tmp_path / "metrics.jsonl"))
        found = points(tmp_path / "tensorboard")
        assert [point[:2] for point in found] == [point[:2] for point in expected]
        assert [point[2] for point in found] == pytest.approx([point[2] for point in expected])
    assert [step for step, name, _ in found if name == "accuracy"] == [1, 2, 3, 4, 5]


def test_event_files_in_a_bucket_are_whole_after_each_step_and_never_two(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    bucket = install(monkeypatch, tmp_path)
    workdir = paths.folder("gs://bucket/run")

    def fetched():
        for file in (there := tmp_path / "there").glob("*"):
            file.unlink()
        there.mkdir(exist_ok=True)
        for name, data in bucket.objects.items():
            if "tensorboard" in name:
                (there / name.rpartition("/")[2]).write_bytes(data)
        return [point[0] for point in points(there) if point[1] == "accuracy"]

    run(workdir, {"tensorboard": True}, [1, 2, 3])
    assert fetched() == [1, 2, 3]
    run(workdir, {"tensorboard": True}, [3, 4], first_step=2)
    assert fetched() == [1, 2, 3, 4]
    assert sum("tensorboard" in name for name in bucket.objects) == 1


def test_step_is_in_the_event_file_when_write_returns(tmp_path):
    pytest.importorskip("tensorboard")
    board = sinks.TensorBoard(tmp_path, [{"step": 1, "loss": 2.0}])
    assert points(tmp_path) == [(1, "loss", 2.0)]
    board.write(2, {"loss": 1.5})
    assert points(tmp_path) == [(1, "loss", 2.0), (2, "loss", 1.5)]
    board.close()


def test_sink_chosen_in_the_middle_of_a_run_gets_its_beginning(tmp_path):
    pytest.importorskip("tensorboard")
    run(tmp_path, {}, [1, 2])
    assert not (tmp_path / "tensorboard").exists()
    run(tmp_path, {"tensorboard": True}, [3], 2)
    assert [p[0] for p in points(tmp_path / "tensorboard") if p[1] == "accuracy"] == [1, 2, 3]


def test_writing_event_files_needs_neither_torch_nor_tensorflow():
    pytest.importorskip("tensorboard")
    code = (
        "import sys, tempfile; from step_grpo.sinks import TensorBoard; from pathlib import Path\n"
        "TensorBoard(Path(tempfile.mkdtemp()), [{'step': 1, 'loss': 2.0}]).close()\n"
        "print(sorted({'torch', 'tensorflow'} & set(sys.modules)))"
    )
    import subprocess

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


# ---------------------------------------------------------------------- Weights & Biases


class FakeWandb(ModuleType):
    """As much of the package as is used; remembers what it was told."""

    Error = type("Error", (Exception,), {})

    def __init__(self):
        super().__init__("wandb")
        self.__spec__ = SimpleNamespace(name="wandb")
        self.inits, self.logged, self.finished, self.logins = [], [], 0, 0
        self.refuse = ""

    def Settings(self, **settings):
        return settings

    def login(self):
        self.logins += 1
        if self.refuse:
            raise self.Error(self.refuse)
        return True

    def init(self, **arguments):
        if self.refuse:
            raise self.Error(self.refuse)
        self.inits.append(arguments)
        return SimpleNamespace(log=self._log, finish=self._finish)

    def _log(self, figures, step, commit):
        if self.refuse:
            raise OSError(self.refuse)
        assert commit
        self.logged.append((step, figures))

    def _finish(self):
        self.finished += 1


@pytest.fixture
def wandb(monkeypatch):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    return fake


def test_run_of_wandb_goes_on_under_its_id_and_gets_no_step_twice(tmp_path, wandb):
    run(tmp_path, {"wandb": "steps"}, [1, 2, 3])
    run(tmp_path, {"wandb": "steps"}, [3, 4], first_step=2)
    first, second = wandb.inits
    assert first["id"] == second["id"] and second["resume"] == "allow"
    assert first["project"] == "steps" and first["config"]["seed"] == 0
    assert [step for step, _ in wandb.logged] == [1, 2, 3, 4]
    assert wandb.logged[0][1] == {"accuracy": 1 / 7, "exit_rep": 0.0}
    assert wandb.finished == 2


def test_wandb_gets_what_it_lacks_and_a_run_for_each_project(tmp_path, wandb):
    run(tmp_path, {}, [1, 2])
    run(tmp_path, {"wandb": "one"}, [3], 2)
    assert [step for step, _ in wandb.logged] == [1, 2, 3]
    run(tmp_path, {"wandb": "two"}, [], 3)
    assert [step for step, _ in wandb.logged] == [1, 2, 3, 1, 2, 3]
    assert wandb.inits[0]["id"] != wandb.inits[1]["id"]


@pytest.mark.parametrize("left", ["", "{", "[]", '{"project": "p"}', '{"project": "p", "id": "", "step": 3}'])
def test_note_cut_short_begins_a_new_run(tmp_path, wandb, left):
    (tmp_path / sinks.WANDB_RUN).write_text(left)
    run(tmp_path, {"wandb": "p"}, [1])
    note = json.loads((tmp_path / sinks.WANDB_RUN).read_text())
    assert note == {"project": "p", "id": wandb.inits[0]["id"], "step": 1}


def test_run_goes_on_without_a_sink_that_fails_in_the_middle(tmp_path, wandb, capsys):
    config = short_config({"log": {"wandb": "steps"}})
    with (
        MetricsWriter(tmp_path / "metrics.jsonl") as lines,
        sinks.opened(tmp_path, config, lines) as metrics,
    ):
        metrics.write(1, {"loss": 1.0})
        wandb.refuse = "no\nspace"
        metrics.write(2, {"loss": 1.0})
        wandb.refuse = ""
        metrics.write(3, {"loss": 1.0})
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3]
    assert [step for step, _ in wandb.logged] == [1]
    assert capsys.readouterr().out == "warning: wandb failed (no space); metrics.jsonl has every step\n"


def test_refusal_of_wandb_is_told_before_anything_is_made(tmp_path, wandb):
    wandb.refuse = "api_key not configured (no-tty).\nmore"
    log = short_config({"log": {"wandb": "steps"}}).log
    with pytest.raises(UserError, match=r"api_key not configured \(no-tty\); log in with `wandb login`"):
        sinks.prepare(log)
    with pytest.raises(UserError, match=r"config\.log\.wandb is 'steps': api_key"):
        run(tmp_path, {"wandb": "steps"}, [1])


def test_offline_nobody_has_to_log_in(wandb, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    sinks.prepare(short_config({"log": {"wandb": "steps"}}).log)
    assert wandb.logins == 0


def test_real_wandb_writes_offline_and_goes_on(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    run(tmp_path, {"wandb": "steps"}, [1, 2])
    run(tmp_path, {"wandb": "steps"}, [2, 3], first_step=1)
    runs = sorted(path.name for path in (tmp_path / "wandb").glob("offline-run-*"))
    note = json.loads((tmp_path / sinks.WANDB_RUN).read_text())
    assert note["step"] == 3 and len(runs) == 2
    assert all(name.endswith(note["id"]) for name in runs)
    assert all(list((tmp_path / "wandb" / name).glob("*.wandb")) for name in runs)


# ---------------------------------------------------------------------- what is missing


@pytest.mark.parametrize(
    ("package", "log"), [("wandb", {"wandb": "p"}), ("tensorboard", {"tensorboard": True})]
)
def test_missing_package_is_told_with_the_extra_that_brings_it(monkeypatch, package, log):
    find = sinks.importlib.util.find_spec
    monkeypatch.setattr(
        sinks.importlib.util, "find_spec", lambda name: None if name == package else find(name)
    )
    with pytest.raises(UserError, match=rf"config\.log\.{package}: .*pip install 'step_grpo\[{package}\]'"):
        sinks.prepare(short_config({"log": log}).log)
