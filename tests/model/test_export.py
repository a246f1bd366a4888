"""The export: transformers loads it, it loses nothing, and it never overwrites what is not its own."""

import json
from pathlib import Path

import hf_models
import jax
import numpy as np
import pytest
import torch
import yaml
from hf_models import DTYPES, FAMILIES, one_line, our_logits, random_tokens, transformers_logits
from test_checkpoint import no_file_above
from transformers import AutoModelForCausalLM, AutoTokenizer

from step_grpo import cli
from step_grpo import export as export_module
from step_grpo.errors import TransientError, UserError
from step_grpo.export import MANIFEST, escape, export, main, model_card, write_hf_folder
from step_grpo.model.weights import load_checkpoint, load_params

CARD = {
    "settings": {"seed": 0, "rollout": {"delta": 0.95, "triggers": ["Wait"]}},
    "measured": {
        "before": {"accuracy": 0.81, "tokens": 210.5},
        "after": {"accuracy": 0.82, "tokens": 120.25},
        "exits": {"early_exit": 31, "natural": 7},
        "seconds": 212.0,
    },
}


@pytest.fixture
def folder(tmp_path):
    return hf_models.write_checkpoint(tmp_path / "source", "qwen3_tied")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def refusal(call, *args, **kwargs) -> str:
    with pytest.raises(UserError) as caught:
        call(*args, **kwargs)
    assert one_line(str(caught.value))
    return str(caught.value)


def write(out: Path, folder: Path, **changes) -> Path:
    source = load_checkpoint(folder)
    arguments = {
        "params": load_params(source),
        "hf_config": source.hf_config,
        "generation": source.generation,
        "tokenizer_folder": folder,
        "card": CARD,
        "dtype": "float32",
        **changes,
    }
    return write_hf_folder(out, **arguments)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_export_import_export_is_the_identity(tmp_path, family, dtype):
    folder = hf_models.write_checkpoint(tmp_path / "source", family, dtype, sharded=True)
    first = export(folder, tmp_path / "first")
    second = export(first, tmp_path / "second")
    assert contents(first) == contents(second)
    assert {"model.safetensors", "config.json", "generation_config.json", "README.md"} <= contents(
        first
    ).keys()
    imported = load_checkpoint(second)
    assert imported.config == load_checkpoint(folder).config
    assert imported.dtype == dtype
    jax.tree.map(np.testing.assert_array_equal, load_params(load_checkpoint(folder)), load_params(imported))


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_loads_the_export_and_computes_the_same(tmp_path, family):
    folder = hf_models.write_checkpoint(tmp_path / "source", family, "bfloat16")
    out = export(folder, tmp_path / "out")
    tokens = random_tokens(2, 17)
    np.testing.assert_array_equal(transformers_logits(out, tokens), transformers_logits(folder, tokens))
    source = load_checkpoint(out)
    assert (
        np.abs(
            our_logits(load_params(source), source.config, tokens) - transformers_logits(out, tokens)
        ).max()
        < 1e-4
    )

    model, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(info.values()), info
    assert type(model).__name__ == model.config.architectures[0]
    assert model.dtype == torch.bfloat16
    tied = model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    assert tied == hf_models.FAMILIES[family]["tie_word_embeddings"]


def test_greedy_text_is_the_same_before_and_after(folder, tmp_path):
    out = export(folder, tmp_path / "out")
    prompt = torch.tensor(random_tokens(1, 5))
    texts = [
        AutoModelForCausalLM.from_pretrained(where, dtype=torch.float32).generate(
            prompt, max_new_tokens=20, do_sample=False
        )
        for where in (folder, out)
    ]
    assert torch.equal(*texts)


def test_chosen_dtype_is_stored_and_declared(folder, tmp_path):
    out = export(folder, tmp_path / "out", dtype="bfloat16")
    assert load_checkpoint(out).dtype == "bfloat16"
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    assert AutoModelForCausalLM.from_pretrained(out).dtype == torch.bfloat16


def test_older_name_of_the_dtype_is_kept_in_step(folder, tmp_path):
    hf_models.edit_json(folder / "config.json", dtype=None, torch_dtype="float32")
    config = json.loads((export(folder, tmp_path / "out", dtype="float16") / "config.json").read_text())
    assert config["dtype"] == config["torch_dtype"] == "float16"


def test_both_eos_ids_survive(folder, tmp_path):
    hf_models.edit_json(folder / "config.json", eos_token_id=45)
    hf_models.edit_json(
        folder / "generation_config.json", eos_token_id=[45, 43], temperature=0.6, do_sample=True
    )
    out = export(folder, tmp_path / "out")
    assert load_checkpoint(out).eos_ids == (45, 43)
    generation = AutoModelForCausalLM.from_pretrained(out).generation_config
    assert generation.eos_token_id == [45, 43] and generation.temperature == 0.6


def test_checkpoint_without_generation_config_gets_one_that_stops(folder, tmp_path):
    (folder / "generation_config.json").unlink()
    hf_models.edit_json(folder / "config.json", eos_token_id=[7, 8])
    out = export(folder, tmp_path / "out")
    assert AutoModelForCausalLM.from_pretrained(out).generation_config.eos_token_id == [7, 8]


def test_tokenizer_and_chat_template_are_copied_verbatim(folder, tmp_path):
    out = export(folder, tmp_path / "out")
    copied = [name for name in contents(folder) if "token" in name or "template" in name]
    assert len(copied) >= 3
    for name in copied:
        assert contents(out)[name] == contents(folder)[name]
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.chat_template == hf_models.TEMPLATE
    text = tokenizer.apply_chat_template([{"role": "user", "content": "w1 w2"}], tokenize=False)
    assert text == "<|im_start|>w1 w2<|im_end|><think>"


# ---- the model card --------------------------------------------------------------------------------------


def test_card_has_front_matter_settings_and_figures(folder, tmp_path):
    text = (write(tmp_path / "out", folder) / "README.md").read_text()
    _, front, body = text.split("---\n", 2)
    assert yaml.safe_load(front)["library_name"] == "transformers"
    assert "step-grpo" in yaml.safe_load(front)["tags"]
    for row in (
        "| figure | before | after |",
        "| accuracy | 0.81 | 0.82 |",
        "| tokens | 210.5 | 120.25 |",
        "| exits.early_exit | 31 |",
        "| seconds | 212 |",
        "| rollout.delta | 0.95 |",
    ):
        assert row in body.splitlines(), row


def test_card_survives_a_second_export(folder, tmp_path):
    first = write(tmp_path / "first", folder)
    assert contents(first) == contents(export(first, tmp_path / "second"))


def test_card_without_figures_has_no_empty_table():
    text = model_card({}, {"architectures": ["Qwen3ForCausalLM"], "dtype": "float32"})
    assert "|" not in text and "##" not in text


@pytest.mark.parametrize(
    "value",
    [
        "a | b",
        "<script>alert(1)</script>",
        "[link](https://example.org)",
        "![](x)",
        "`code`",
        "**bold** _it_ ~~no~~",
        "two\nlines\n## heading",
        "&lt;",
        "back\\slash",
        "\u202eleft\x00",
        "$x$ #1 @user",
    ],
)
def test_escaped_value_is_one_cell_of_literal_text(value):
    import html

    text = escape(value)
    assert not set(text.replace("&#", "")) & set("|<>[]()`*_~\n\\$@!#\u202e\x00")
    assert html.unescape(text) == "".join(c for c in " ".join(value.split()) if c.isprintable())


def test_card_holds_what_a_model_wrote_as_text_alone():
    wrote = '<script src="//x"></script> ![](x) | <img onerror=alert(1)>'
    card = model_card(
        {"settings": {"data": {wrote: wrote}}, "measured": {"sample": wrote, "before": {wrote: wrote}}},
        {"architectures": [wrote], "dtype": wrote},
    )
    assert "&#60;script" in card and not set("<>") & set(card)
    assert card.count("](") == 1  # the card's own link to the paper


def test_ordinary_setting_names_stay_readable():
    assert escape("grpo.prompts_per_update") == "grpo.prompts_per_update"
    assert escape(1e-6) == "1e-06" and escape(True) == "true" and escape(None) == "null"


# ---- what is refused -------------------------------------------------------------------------------------


def test_previous_export_is_replaced(folder, tmp_path):
    out = export(folder, tmp_path / "out", dtype="bfloat16")
    assert export(folder, out) == out
    assert contents(out) == contents(export(folder, tmp_path / "other"))


def test_export_onto_itself_changes_nothing(folder, tmp_path):
    out = write(tmp_path / "out", folder)
    before = contents(out)
    assert contents(export(out, out)) == before


def test_empty_folder_is_filled(folder, tmp_path):
    (tmp_path / "out").mkdir()
    assert (export(folder, tmp_path / "out") / "config.json").exists()


@pytest.mark.parametrize("kind", ["stranger", "source", "file", "link", "dangling"])
def test_what_is_no_export_is_never_overwritten(folder, tmp_path, kind):
    out = folder if kind == "source" else tmp_path / "out"
    if kind == "stranger":
        out.mkdir()
        (out / "thesis.tex").write_text("years of work")
    elif kind == "file":
        out.write_text("years of work")
    elif kind in ("link", "dangling"):
        out.symlink_to(folder if kind == "link" else tmp_path / "nowhere")
    before = contents(out) if out.is_dir() else None
    message = refusal(export, folder, out)
    assert str(out) in message
    assert (
        "no previous export" if out.is_dir() and not out.is_symlink() else "is a file or a link"
    ) in message
    assert before == (contents(out) if out.is_dir() else None)


def test_file_added_to_an_export_is_never_deleted(folder, tmp_path):
    out = export(folder, tmp_path / "out")
    (out / "notes.txt").write_text("mine")
    assert "'notes.txt'" in refusal(export, folder, out)
    assert (out / "notes.txt").read_text() == "mine"


def test_failure_leaves_the_previous_export_and_no_debris(folder, tmp_path, monkeypatch):
    out = export(folder, tmp_path / "out")
    before = contents(out)

    def fail(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export_module, "model_card", fail)
    assert "No space left" in refusal(export, folder, out)
    assert contents(out) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]


@pytest.mark.parametrize("limit", [100, 20_000])
def test_disk_that_is_full_is_one_line_and_leaves_the_previous_export(folder, tmp_path, limit):
    """Room for no file, and for all but the weights."""
    out = export(folder, tmp_path / "out")
    before = contents(out)
    with no_file_above(limit), pytest.raises(TransientError, match=r"out: cannot be written .File too large"):
        export(folder, out)
    assert contents(out) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]


def test_missing_tokenizer_is_named(folder, tmp_path):
    (folder / "tokenizer.json").unlink()
    assert "tokenizer.json" in refusal(export, folder, tmp_path / "out")
    assert "tokenizer.json is missing" in refusal(write, tmp_path / "out", folder)
    assert not (tmp_path / "out").exists()


def test_unknown_dtype_is_named(folder, tmp_path):
    assert "'int8'" in refusal(export, folder, tmp_path / "out", dtype="int8")


def test_damaged_manifest_is_named(folder, tmp_path):
    out = export(folder, tmp_path / "out")
    (out / MANIFEST).write_text('{"files": 3}')
    assert MANIFEST in refusal(export, folder, out)


# ---- the command line ------------------------------------------------------------------------------------


def test_command_exports_and_prints_the_folder(folder, tmp_path, capsys):
    out = tmp_path / "out"
    cli.run(main, ["export", f"--checkpoint={folder}", f"--out={out}", "--dtype=float16"])
    assert capsys.readouterr().out.split() == [str(out)]
    assert load_checkpoint(out).dtype == "float16"


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ([], "--checkpoint"),
        (["--checkpoint=nowhere"], "--out"),
        (["--checkpoint=nowhere", "--out=x"], "--checkpoint: 'nowhere'"),
        (["--checkpoit=nowhere", "--out=x"], "checkpoit"),
        (["stray", "--checkpoint=nowhere", "--out=x"], "stray"),
    ],
)
def test_wrong_command_is_one_line_and_exit_code_2(tmp_path, capsys, monkeypatch, arguments, named):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        cli.run(main, ["export", *arguments])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1 and named in error
    assert not list(tmp_path.iterdir())
