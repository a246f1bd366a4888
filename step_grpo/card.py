"""What a model card says of a run: metadata that the Hub reads, and the course of the training."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

CURVE = ("step", "reward", "accuracy", "tokens", "steps", "exit_early_exit", "kl")
ROWS = 12  # of the table of the training, at most
MEASURES = {
    "accuracy": "accuracy",
    "tokens": "mean tokens a completion",
    "steps": "mean semantic steps a completion",
}
LICENSES = {
    "builtin:": "apache-2.0",
    "Qwen/Qwen3-": "apache-2.0",
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-": "mit",
}
"""Of weights to begin from, by the beginning of their name; of others nothing is said."""
_NO_NAME = re.compile(r"[^\w .-]")  # characters that no architecture has in its name


def card_of(
    settings: Mapping[str, Any], result: Mapping[str, Any], lines: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """What is kept of a run for its card.

    Args:
        settings: its config.
        result: of its `result.json`; empty where it is not finished.
        lines: of its `metrics.jsonl`.
    """
    measured = {name: result[name] for name in ("before", "after", "exits") if name in result}
    return {"settings": settings, "measured": measured, "curve": curve_of(lines)}


def curve_of(lines: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The figures of at most `ROWS` steps, evenly spread, the first and the last among them."""
    count = min(ROWS, len(lines))
    picked = [round(i * (len(lines) - 1) / max(count - 1, 1)) for i in range(count)]
    return [{name: lines[i].get(name) for name in CURVE} for i in picked]


def front_matter(card: Mapping[str, Any], name: str, library: str) -> str:
    """The YAML block that the Hub reads.

    Args:
        card: `settings` and `measured`, as in `card_of`; what is not known is left out.
        name: of the model, for its results.
        library: that loads it.
    """
    settings = card.get("settings") or {}
    begun = (settings.get("model") or {}).get("checkpoint") or ""
    data = settings.get("data") or {}
    after = (card.get("measured") or {}).get("after")
    written = ModelCardData(
        library_name=library,
        pipeline_tag="text-generation",
        tags=["step-grpo", "grpo", "reasoning"],
        base_model=begun if on_hub(begun) else None,
        license=next((known for start, known in LICENSES.items() if begun.startswith(start)), None),
        datasets=[data["name"]] if data.get("source") == "hf" else None,
        model_name=_NO_NAME.sub("", name),
        eval_results=_results((settings.get("eval") or {}).get("data") or {}, after) if after else None,
    )
    return f"---\n{written.to_yaml()}\n---"


def on_hub(name: str) -> bool:
    """Whether a name of weights is one on the Hub, and not a folder."""
    return re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None and not Path(name).exists()


def _results(data: Mapping[str, Any], after: Mapping[str, Any]) -> list[EvalResult]:
    source, name = data.get("source", "unknown"), data.get("name", "")
    title = name if source in ("hf", "tfds") else Path(name).name  # no path of the author's machine
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=title if source == "hf" else source,
            dataset_name=title or source,
            dataset_config=data.get("subset") or None,
            dataset_split=data.get("split") or None,
            metric_type=measure,
            metric_name=described,
            metric_value=after[measure],
        )
        for measure, described in MEASURES.items()
        if measure in after
    ]
