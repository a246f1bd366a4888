"""Exports on the Hub: the real client against a server of this machine."""

import fake_hub
import pytest
from huggingface_hub import constants

from step_grpo import cli
from step_grpo.errors import UserError
from step_grpo.export import export, main
from step_grpo.push import check, push

TOKEN = "hf_verysecret"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An export of the built-in model."""
    return export("builtin:tiny", tmp_path_factory.mktemp("pushed") / "out")


@pytest.fixture
def hub(monkeypatch):
    with fake_hub.running() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # its servers are elsewhere
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield hub


@pytest.fixture
def nobody(monkeypatch, tmp_path):
    """No token anywhere."""
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def refusal(call, *args, **kwargs) -> str:
    with pytest.raises(UserError) as caught:
        call(*args, **kwargs)
    assert "\n" not in str(caught.value) and TOKEN not in str(caught.value)
    return str(caught.value)


def test_command_exports_and_uploads_the_same_files_in_one_commit(hub, tmp_path, capsys):
    out = tmp_path / "out"
    flags = [f"--out={out}", "--push-to-hub=org/tiny", "--private"]
    cli.run(main, ["export", "--checkpoint=builtin:tiny", *flags])
    uploaded = hub.models["org/tiny"]
    assert {name: data for name, data in uploaded.items() if name != ".gitattributes"} == contents(out)
    assert {"model.safetensors", "README.md", "tokenizer.json"} <= uploaded.keys()
    assert hub.private == {"org/tiny"} and hub.commits == 1
    assert hub.tokens == {f"Bearer {TOKEN}"}
    said = capsys.readouterr()
    assert said.out.split() == [str(out), f"{hub.url}/org/tiny/commit/{'2' * 40}"]
    assert TOKEN not in said.out + said.err


def test_model_is_public_unless_asked_otherwise(hub, folder):
    push(folder, "org/tiny", private=False)
    assert hub.commits == 1 and not hub.private


def test_upload_over_an_older_one_leaves_no_weights_of_that(hub, folder):
    older = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    kept = ["notes.md", "model-q4.gguf", "onnx/model.onnx"]
    names = [*older, "model.safetensors.index.json", "config.json", *kept]
    hub.models["org/tiny"] = dict.fromkeys(names, b"old")
    push(folder, "org/tiny", private=False)
    assert hub.models["org/tiny"].keys() == contents(folder).keys() | set(kept)
    assert hub.models["org/tiny"]["config.json"] == contents(folder)["config.json"]


def test_what_is_to_be_private_is_never_put_into_a_public_model(hub, folder):
    hub.models["org/tiny"] = {}
    assert "is public" in refusal(push, folder, "org/tiny", private=True)
    assert hub.commits == 0 and not hub.models["org/tiny"]
    hub.private.add("org/tiny")
    push(folder, "org/tiny", private=True)
    assert hub.commits == 1


def test_without_a_token_nothing_is_exported_or_asked(hub, nobody, tmp_path):
    said = refusal(main, "builtin:tiny", tmp_path / "out", push_to_hub="org/tiny")
    assert "hf auth login" in said and "HF_TOKEN" in said
    assert not (tmp_path / "out").exists() and not hub.requests


@pytest.mark.parametrize("name", ["tiny", "a/b/c", "org/..", "org/", "/tiny", "org/ti ny"])
def test_name_that_is_none_is_told_before_anything_is_done(hub, tmp_path, name):
    assert f"--push-to-hub={name}: " in refusal(main, "builtin:tiny", tmp_path / "out", push_to_hub=name)
    assert not (tmp_path / "out").exists() and not hub.requests


def test_private_without_a_name_is_refused(tmp_path):
    assert "--push-to-hub=USER/NAME" in refusal(main, "builtin:tiny", tmp_path / "out", private=True)


def test_nothing_is_uploaded_when_the_export_fails(hub, tmp_path):
    assert "'int8'" in refusal(main, "builtin:tiny", tmp_path / "out", "int8", push_to_hub="org/tiny")
    assert not hub.requests


@pytest.mark.parametrize(
    ("path", "status", "said"),
    [
        ("/api/repos/create", 401, "hf auth login"),
        ("/api/models/org/tiny/preupload/main", 403, "the right to write"),
        ("/api/models/org/tiny/commit/main", 403, "the right to write"),
        ("/api/models/org/tiny/commit/main", 400, "you cannot do that here"),
    ],
)
def test_refusal_of_the_hub_is_one_line(hub, folder, path, status, said):
    hub.refuse[path] = status
    message = refusal(push, folder, "org/tiny", private=False)
    assert f"{status}" in message and said in message
    assert hub.commits == 0


def test_hub_that_does_not_answer_is_told(hub, folder, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert "ConnectError" in refusal(push, folder, "org/tiny", private=False)


def test_offline_mode_is_told(hub, folder, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE" in refusal(push, folder, "org/tiny", private=False)


def test_token_that_is_no_header_is_not_quoted(hub, folder, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", f"{TOKEN}\x0bx")
    assert "the upload failed" in refusal(push, folder, "org/tiny", private=False)
    assert not hub.commits


def test_names_of_people_and_organisations_pass(hub):
    check("org/Qwen3-0.6B_step-grpo")
