"""Workdirs in a bucket: nothing appended or renamed, nothing half-written taken for whole."""

import json

import pytest
from fake_bucket import install

from step_grpo import checkpoint, cli, paths
from step_grpo.errors import UserError
from step_grpo.export import MANIFEST, check_out, export, write_hf_folder
from step_grpo.metrics import MetricsWriter, read_metrics
from step_grpo.model.load import save_description
from step_grpo.model.weights import load_checkpoint, load_params, resolve_checkpoint

WORKDIR = paths.folder("gs://bucket/run")


@pytest.fixture
def bucket(monkeypatch, tmp_path):
    return install(monkeypatch, tmp_path)


def names(bucket, folder):
    """The objects in a folder."""
    prefix = f"bucket/{folder}/"
    return sorted(name.removeprefix(prefix) for name in bucket.objects if name.startswith(prefix))


def order(bucket, folder):
    """What was done to the objects in a folder, in order."""
    prefix = f"bucket/{folder}/"
    return [(verb, name.removeprefix(prefix)) for verb, name in bucket.log if name.startswith(prefix)]


def test_every_line_of_metrics_is_in_the_bucket_as_soon_as_it_is_written(bucket):
    path = WORKDIR / "metrics.jsonl"
    with MetricsWriter(path) as metrics:
        for step in (1, 2, 3):
            metrics.write(step, {"loss": step / 2, "note": "ü"})
            assert [line["step"] for line in read_metrics(path)] == list(range(1, step + 1))
    with MetricsWriter(path, first_step=2) as metrics:
        metrics.write(3, {"loss": 9.0})
    assert [line["loss"] for line in read_metrics(path)] == [0.5, 1.0, 9.0]


def test_marker_is_the_last_to_come_and_the_first_to_go(bucket):
    for text in ("old", "new"):
        with paths.replaced(WORKDIR, marker="mark") as partial:
            assert not (WORKDIR / "mark").exists()
            paths.write_text(partial / "rest", text)
            paths.write_text(partial / "mark", text)
    paths.remove(WORKDIR, marker="mark")
    written, deleted = [("write", "rest"), ("write", "mark")], [("delete", "mark"), ("delete", "rest")]
    assert order(bucket, "run") == [*written, *deleted, *written, *deleted]


def test_folder_without_its_marker_is_no_checkpoint(bucket):
    for name in ("000001/params/x", "000001/run.json", "000002/params/x"):
        paths.write_text(WORKDIR / "checkpoints" / name, "{}")
    assert [str(path) for path in checkpoint.saved_steps(WORKDIR)] == ["gs://bucket/run/checkpoints/000001"]
    assert checkpoint.saved_steps(paths.folder("gs://bucket/nothing")) == []


@pytest.fixture(scope="module")
def tiny():
    return load_checkpoint(resolve_checkpoint("builtin:tiny"))


def write_export(tiny, out):
    return write_hf_folder(
        out,
        load_params(tiny),
        tiny.hf_config,
        tiny.generation,
        tokenizer_folder=tiny.folder,
        card={},
        dtype="float32",
    )


def test_export_in_a_bucket_holds_the_same_bytes_as_on_disk(bucket, tiny, tmp_path):
    write_export(tiny, "gs://bucket/out")
    local = write_export(tiny, tmp_path / "out")
    assert names(bucket, "out") == sorted(path.name for path in local.iterdir())
    for path in local.iterdir():
        assert bucket.objects[f"bucket/out/{path.name}"] == path.read_bytes()


def test_export_can_be_interrupted_at_any_object_and_written_again(bucket, tiny):
    write_export(tiny, "gs://bucket/out")
    whole, steps = dict(bucket.objects), len(bucket.log)
    write_export(tiny, "gs://bucket/out")
    done = bucket.log[steps:]
    assert done[0] == ("delete", "bucket/out/config.json") and done[-1] == ("write", "bucket/out/config.json")
    state = dict(whole)
    for verb, name in done[:-1]:
        state = (
            {**state, name: whole[name]} if verb == "write" else {k: v for k, v in state.items() if k != name}
        )
        bucket.objects = dict(state)
        assert "bucket/out/config.json" not in bucket.objects
        check_out(paths.folder("gs://bucket/out"))
    write_export(tiny, "gs://bucket/out")
    assert bucket.objects == whole


def test_export_refuses_a_folder_of_something_else(bucket, tiny):
    paths.write_text(paths.folder("gs://bucket/out/thesis.tex"), "x")
    with pytest.raises(UserError, match="no previous export"):
        write_export(tiny, "gs://bucket/out")


def test_export_reads_a_folder_in_a_bucket(bucket, tiny, tmp_path):
    write_export(tiny, "gs://bucket/out")
    again = export("gs://bucket/out", tmp_path / "again")
    for path in again.iterdir():
        assert path.name == MANIFEST or bucket.objects[f"bucket/out/{path.name}"] == path.read_bytes()


def test_description_is_the_same_in_a_bucket_and_on_disk(bucket, tmp_path):
    described = checkpoint.open_model("builtin:tiny").described
    save_description(described, WORKDIR / "model")
    save_description(described, tmp_path / "model")
    assert names(bucket, "run/model") == sorted(path.name for path in (tmp_path / "model").iterdir())
    assert checkpoint.read_description(WORKDIR / "model").hf_config == described.hf_config


# ---------------------------------------------------------------- the command line


def parse(workdir):
    def main(workdir: cli.Path) -> None: ...

    return cli.parse(main, ["program", f"--workdir={workdir}"])["workdir"]


def test_workdir_in_a_bucket_is_tried_before_the_run(bucket, monkeypatch):
    assert str(parse("gs://bucket/a/b")) == "gs://bucket/a/b"
    assert bucket.objects == {} and bucket.log

    def deny(*_, **__):
        raise PermissionError("no rights")

    monkeypatch.setattr(bucket, "_open", deny)
    with pytest.raises(UserError, match=r"--workdir=gs://bucket/a: cannot be written \(no rights\)"):
        parse("gs://bucket/a")


@pytest.mark.parametrize("wrong", ["gs://", "gs://bucket", "gs://bucket/", "gs:///folder"])
def test_bucket_without_a_folder_is_refused(wrong):
    with pytest.raises(UserError, match="gs://BUCKET/FOLDER"):
        parse(wrong)


def test_local_folder_stays_a_local_path(tmp_path):
    assert parse(tmp_path) == tmp_path and type(paths.folder("a")) is type(tmp_path)


def test_missing_client_of_the_bucket_is_told(monkeypatch):
    pytest.importorskip("fsspec")
    monkeypatch.setitem(__import__("sys").modules, "gcsfs", None)
    with pytest.raises(UserError, match=r"pip install 'step_grpo\[gcs\]'"):
        parse("gs://bucket/folder")


def test_written_json_is_read_back(bucket):
    paths.write_text(WORKDIR / "a.json", json.dumps({"a": "ü"}, ensure_ascii=False))
    assert json.loads((WORKDIR / "a.json").read_text(encoding="utf-8")) == {"a": "ü"}
