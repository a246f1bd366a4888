"""Writes a Hugging Face folder that transformers and vLLM load, or the adapter of a LoRA run for `peft`.

`python -m step_grpo.export --checkpoint=WORKDIR --out=FOLDER [--dtype=bfloat16] [--kind=adapter]
[--push-to-hub=USER/NAME [--private]]`
"""

import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from step_grpo import cli, paths, push
from step_grpo.card import CURVE, card_of, front_matter
from step_grpo.checkpoint import RUN, open_model, saved_steps
from step_grpo.distributed import is_first
from step_grpo.errors import TransientError, UserError
from step_grpo.metrics import read_metrics
from step_grpo.model import lora
from step_grpo.model.load import Description, save_description
from step_grpo.model.qwen import Params
from step_grpo.model.weights import (
    TOKENIZER_FILES,
    check_dtype,
    read_json,
    resolve_checkpoint,
    save_params,
    write_json,
)

MANIFEST = "step_grpo_export.json"  # marks a folder as an export: its card, and the names of its files
CLASSES = {"qwen3": "Qwen3ForCausalLM", "qwen2": "Qwen2ForCausalLM"}


def export(checkpoint: str | Path, out: str | Path, *, dtype: str | None = None) -> Path:
    """Writes `checkpoint` as a Hugging Face folder.

    Args:
        checkpoint: a run's workdir or one of its checkpoints, a Hugging Face folder, its Hub name, or
            `builtin:tiny`.
        out: the folder to make; a previous export there is replaced.
        dtype: "float32", "float16" or "bfloat16"; None keeps the stored one, or
            for a run the one of its config.

    Returns:
        `out`.

    Raises:
        UserError: the checkpoint does not load, or `out` holds something else than an export.
    """
    check_out(paths.folder(out))
    source = open_model(checkpoint)
    return write_hf_folder(
        out,
        source.params,
        source.described.hf_config,
        source.described.generation,
        tokenizer_folder=source.folder,
        card=run_card(checkpoint, source.settings) if source.settings else _manifest(source.folder)["card"],
        dtype=dtype or source.dtype,
    )


def export_adapter(checkpoint: str | Path, out: str | Path, *, dtype: str | None = None) -> Path:
    """Writes the adapter of a LoRA run as a folder that `peft` loads; the arguments are those of `export`.

    Raises:
        UserError: the checkpoint does not load or is of no LoRA run, or `out` holds something else.
    """
    check_out(paths.folder(out))
    source = open_model(checkpoint)
    if source.adapter is None:
        raise UserError(f"--kind=adapter: {checkpoint} is of no run with config.lora.rank above 0")
    return write_adapter_folder(
        out,
        source.adapter,
        source.described.hf_config,
        ConfigDict(source.settings),
        tokenizer_folder=source.folder,
        card=run_card(checkpoint, source.settings),
        dtype=dtype or source.dtype,
    )


def export_model(
    workdir: Path, described: Description, params: Params, *, card: dict[str, Any], dtype: str
) -> Path:
    """What a finished training leaves: `workdir/model`, its description, and `workdir/export`.

    Args:
        workdir: of the run.
        described: the checkpoint that was trained.
        params: its weights now.
        card: as in `write_hf_folder`.
        dtype: likewise.

    Returns:
        The export.

    Raises:
        UserError: as in `write_hf_folder`.
    """
    if is_first():
        save_description(described, workdir / "model")
    return write_hf_folder(
        workdir / "export",
        params,
        described.hf_config,
        described.generation,
        tokenizer_folder=workdir / "model",
        card=card,
        dtype=dtype,
    )


def write_hf_folder(
    out: str | Path,
    params: Params,
    hf_config: dict[str, Any],
    generation: dict[str, Any],
    *,
    tokenizer_folder: str | Path,
    card: dict[str, Any],
    dtype: str,
) -> Path:
    """Writes weights, configs, tokenizer and model card; `out` appears only when it is complete.

    Where weights are spread over several processes, all call it, and the first one writes.

    Args:
        out: the folder to make; a previous export there is replaced.
        params: weights of `step_grpo.model.qwen`.
        hf_config: contents of the checkpoint's `config.json`.
        generation: contents of its `generation_config.json`; {} makes one of the ids that end a text.
        tokenizer_folder: where the tokenizer and its chat template are, copied as they are.
        card: `settings` (a config), `measured` (figures, those under `before` and `after` side by side) and
            `curve` (a line of figures a step), all optional, nested dictionaries of JSON values.
        dtype: "float32", "float16" or "bfloat16".

    Returns:
        `out`.

    Raises:
        UserError: an unknown dtype, no tokenizer, or `out` holds something else than an export.
    """
    if not is_first():
        save_params(params, hf_config, Path(os.devnull), dtype=dtype)  # takes part, writes nothing
        return paths.folder(out)

    def fill(folder: Path) -> None:
        save_params(params, hf_config, folder, dtype=dtype)
        write_json(folder / "config.json", _export_config(hf_config, dtype))
        write_json(folder / "generation_config.json", generation or _generation(hf_config))
        text = model_card(card, _export_config(hf_config, dtype))
        (folder / "README.md").write_text(text, encoding="utf-8")

    return _write_folder(out, fill, tokenizer_folder, card=card, dtype=dtype)


def write_adapter_folder(
    out: str | Path,
    adapter: Params,
    hf_config: dict[str, Any],
    config: ConfigDict,
    *,
    tokenizer_folder: str | Path,
    card: dict[str, Any],
    dtype: str,
) -> Path:
    """Writes an adapter for `peft`, with tokenizer and model card; `out` appears only when it is complete.

    Args:
        out: the folder to make; a previous export there is replaced.
        adapter: of `step_grpo.model.lora`.
        hf_config: contents of the `config.json` of its base.
        config: of the run, which names the base.
        tokenizer_folder: as in `write_hf_folder`, and so are `card` and `dtype`.
        card: `settings` and `measured`.
        dtype: "float32", "float16" or "bfloat16".

    Returns:
        `out`.

    Raises:
        UserError: as in `write_hf_folder`, or the base is random weights, which `peft` could not find.
    """
    name = config.model.checkpoint
    if not name:
        raise UserError("config.model.checkpoint is empty: an adapter of random weights is of no use alone")
    is_folder = name.startswith("builtin:") or Path(name).expanduser().is_dir()
    base = str(resolve_checkpoint(name).absolute()) if is_folder else name

    def fill(folder: Path) -> None:
        lora.save_adapter(adapter, config.lora, base, folder, dtype=dtype)
        text = model_card(card, _export_config(hf_config, dtype), "peft")
        (folder / "README.md").write_text(text, encoding="utf-8")

    return _write_folder(out, fill, tokenizer_folder, card=card, dtype=dtype)


def _write_folder(
    out: str | Path,
    fill: Callable[[Path], None],
    tokenizer_folder: str | Path,
    *,
    card: dict[str, Any],
    dtype: str,
) -> Path:
    """Makes an export of what `fill` writes, model card and all, and the tokenizer."""
    out = paths.folder(out if paths.is_remote(out) else os.path.abspath(out))
    tokenizer_folder = paths.fetched(paths.folder(tokenizer_folder))
    check_out(out)
    check_dtype(dtype)
    if not (tokenizer_folder / "tokenizer.json").is_file():
        raise UserError(
            f"{tokenizer_folder}: tokenizer.json is missing; put the model's tokenizer files there"
        )
    parent = Path(tempfile.gettempdir()) if paths.is_remote(out) else out.parent
    partial = parent / f".{out.name}.{os.getpid()}.partial"
    try:
        partial.mkdir(parents=True)
        fill(partial)
        for name in TOKENIZER_FILES:
            if (tokenizer_folder / name).is_file():
                shutil.copyfile(tokenizer_folder / name, partial / name)
        files = sorted(path.name for path in partial.iterdir())
        write_json(partial / MANIFEST, {"card": card, "files": [*files, MANIFEST]})
        (_send if paths.is_remote(out) else _replace)(partial, out)
    except OSError as error:
        raise TransientError(f"{out}: cannot be written ({error.strerror or error})") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return out


def check_out(out: Path) -> None:
    """Refuses to write over anything but an empty folder or a previous export.

    Raises:
        UserError: naming what is in the way.
    """
    remote = paths.is_remote(out)
    if not (out.exists() if remote else os.path.lexists(out)):
        return
    if not out.is_dir() or (not remote and out.is_symlink()):
        raise UserError(f"{out}: is a file or a link; name a folder that does not exist yet")
    found = {path.name for path in out.iterdir()}
    if found and MANIFEST not in found:
        raise UserError(f"{out}: is not empty and no previous export; name another folder")
    if foreign := sorted(found - set(_manifest(out)["files"])):
        raise UserError(
            f"{out}: {foreign[0]!r} is not of the previous export; move it or name another folder"
        )


def run_card(checkpoint: str | Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What there is to say of a run's checkpoint; of its evaluations, only if it is where the run ended.

    Args:
        checkpoint: a run's workdir or one of its checkpoints.
        settings: its config.
    """
    folder = paths.folder(checkpoint)
    workdir = folder if saved_steps(folder) else folder.parent.parent
    newest = saved_steps(workdir)[-1:]
    folder = newest[0] if folder == workdir else folder
    step = read_json(folder / RUN)["step"]
    ended = [folder] == newest and step == settings["steps"] and (workdir / "result.json").is_file()
    result = read_json(workdir / "result.json") if ended else {}
    lines = read_metrics(workdir / "metrics.jsonl")
    return card_of(settings, result, [line for line in lines if line["step"] <= step])


def model_card(card: Mapping[str, Any], hf_config: Mapping[str, Any], library: str = "transformers") -> str:
    """The README.md of an export: metadata, settings and measured figures, every value escaped."""
    measured = dict(card.get("measured") or {})
    before, after = (dict(flatten(measured.pop(key, None) or {})) for key in ("before", "after"))
    compared = [(name, before.get(name, ""), after.get(name, "")) for name in {**before, **after}]
    curve = [[line.get(name) for name in CURVE] for line in card.get("curve") or ()]
    parts = [
        front_matter(card, f"{hf_config['architectures'][0]} by step_grpo", library),
        f"# {escape(hf_config['architectures'][0])} written by step_grpo",
        "Step-GRPO ([arXiv 2604.16890](https://arxiv.org/abs/2604.16890)) trains a reasoning model to stop"
        " when it has the answer; inference is plain sampling with the tokenizer and chat template here.",
        f"Weights are stored in {escape(hf_config['dtype'])}.",
        *_section("Measured", ("figure", "before", "after"), compared),
        *_section("" if compared else "Measured", ("figure", "value"), flatten(measured)),
        *_section("Training", CURVE, curve),
        *_section("Settings", ("setting", "value"), flatten(card.get("settings") or {})),
    ]
    return "\n\n".join(parts) + "\n"


def flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of a nested dictionary under dotted names."""
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def escape(value: Any) -> str:
    """A value as literal text of a Markdown table cell: one line, nothing in it is markup.

    What could be markup in Markdown or HTML becomes a character reference.
    """
    if isinstance(value, float):
        value = f"{value:.6g}"
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    text = "".join(c for c in " ".join(text.split()) if c.isprintable())
    markup = r"[^\w\s.,;/+='\"%-]|(?<![^\W_])_|_(?![^\W_])"  # an underscore inside a word is none
    return re.sub(markup, lambda match: f"&#{ord(match[0])};", text)


def _section(title: str, columns: tuple[str, ...], rows: Any) -> Iterator[str]:
    """A heading and a table, or nothing where there are no rows."""
    lines = [f"| {' | '.join(escape(cell) for cell in row)} |" for row in rows]
    if lines and title:
        yield f"## {title}"
    if lines:
        yield "\n".join([f"| {' | '.join(columns)} |", f"|{' --- |' * len(columns)}", *lines])


def _manifest(folder: Path) -> dict[str, Any]:
    """Card and file names of an export; both empty for any other folder."""
    found = read_json(folder / MANIFEST) if (folder / MANIFEST).exists() else {"card": {}, "files": []}
    if not isinstance(found.get("card"), dict) or not isinstance(found.get("files"), list):
        raise UserError(f"{folder / MANIFEST}: 'card' or 'files' is missing; delete the file or the folder")
    return found


def _export_config(hf_config: dict[str, Any], dtype: str) -> dict[str, Any]:
    """`config.json` of the export: class and dtype set, the dtype also under its older name if used."""
    older = {"torch_dtype": dtype} if "torch_dtype" in hf_config else {}
    return {**hf_config, "architectures": [CLASSES[hf_config["model_type"]]], "dtype": dtype, **older}


def _generation(hf_config: dict[str, Any]) -> dict[str, Any]:
    """A `generation_config.json` for a checkpoint that has none."""
    eos = hf_config.get("eos_token_id")
    return {} if eos is None else {"eos_token_id": eos}


def _replace(partial: Path, out: Path) -> None:
    """Moves a complete folder to its name, over an empty folder or a previous export."""
    old = out.parent / f".{out.name}.{os.getpid()}.old"
    if out.exists():
        out.rename(old)
    partial.rename(out)
    shutil.rmtree(old, ignore_errors=True)


def remove_debris(out: Path) -> None:
    """Deletes what interrupted exports to a folder have left beside it; none may be under way."""
    if paths.is_remote(out):
        return
    for path in out.parent.glob(f".{out.name}.*"):
        if re.fullmatch(r"\d+\.(partial|old)", path.name.removeprefix(f".{out.name}.")):
            shutil.rmtree(path, ignore_errors=True)


def _send(partial: Path, out: Path) -> None:
    """Copies a complete folder into a bucket, over nothing or a previous export.

    Nobody loads an export without its `config.json`, so that is the first to go and the last to come; at any
    time a manifest names whatever is there.
    """
    order = ["config.json", *_manifest(out)["files"]]
    for name in sorted(set(order) - {MANIFEST}, key=order.index):
        (out / name).unlink(missing_ok=True)
    names = sorted(path.name for path in partial.iterdir())
    for name in sorted(names, key=lambda name: (name != MANIFEST, name == "config.json")):
        paths.send(partial / name, out / name)


def main(
    checkpoint: str,
    out: Path,
    dtype: str = "",
    kind: str = "merged",
    push_to_hub: str = "",
    private: bool = False,
) -> None:
    """The command line; an empty dtype keeps the stored one, `kind` is `merged` or `adapter`."""
    kinds = {"merged": export, "adapter": export_adapter}
    if kind not in kinds:
        raise UserError(f"--kind is {kind!r}; it must be 'merged' or 'adapter'")
    if private and not push_to_hub:
        raise UserError("--private is of a model on the Hub; name it with --push-to-hub=USER/NAME")
    if push_to_hub:
        push.check(push_to_hub)
    folder = kinds[kind](checkpoint, out, dtype=dtype or None)
    print(folder)
    if push_to_hub:
        print(push.push(folder, push_to_hub, private=private))


if __name__ == "__main__":
    cli.run(main)
