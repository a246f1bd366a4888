"""A workdir as a short run leaves it, made by hand: what the page's tests read."""

import json
from pathlib import Path
from typing import Any

HOSTILE = "</script><script>window.hacked = 1</script><img src=x onerror='window.hacked = 1'>\u2028&lt;b&gt;"


def metrics(steps: int = 6) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl; a figure is missing from step 2, and one is null in step 3."""
    lines = []
    for step in range(1, steps + 1):
        line = {
            "step": step,
            **{"accuracy": 0.4 + 0.05 * step, "accuracy_error": 0.04, "tokens": 100.5 - step, "steps": 3.25},
            **{"tokens_error": 2.5, "kl": 0.001 * step, "entropy": 0.1 / step, "sampler_gap": 1e-7 * step},
            **{"clipped_low": 0.01, "clipped_high": 0.002, "dual_clipped": 0.0, "sampler_gap_rms": 4e-7},
            **{"exit_early_exit": 0.25, "exit_natural": 0.75, "exit_rep": 0.0, "confidence_p10": 0.2},
            **{"confidence_p50": 0.9, "confidence_p90": 0.99, "confidence_above_delta": 0.5},
            **{
                "rollout_seconds": 2.5,
                "grading_seconds": 0.25,
                "update_seconds": 1.5,
                "compile_seconds": 0.5,
            },
            "generated_per_second": 1000.0 + step,
        }
        lines.append(line)
    del lines[1]["kl"]
    lines[2]["entropy"] = None
    return lines


def evaluation(accuracy: float, tokens: float) -> dict[str, Any]:
    """What `evaluate.summarise` returns, in small."""
    figures: dict[str, Any] = {"tokens_median": tokens, "truncated": 0.0, "questions": 2, "samples": 1}
    for name, value in (("accuracy", accuracy), ("tokens", tokens), ("steps", 2.0)):
        figures |= {name: value, f"{name}_low": value - 0.1, f"{name}_high": value + 0.1}
    return figures


def completion(number: int, text: str, correct: bool) -> dict[str, Any]:
    """A line of completions_*.jsonl."""
    return {
        **{"id": f"q{number}", "sample": 0, "prompt": f"What is {number}?", "answer": str(number)},
        **{"text": text, "correct": correct, "tokens": len(text), "steps": 1 + text.count("Wait")},
        **{"exit_reason": "natural", "truncated": False},
    }


def rollout(step: int, reason: str, correct: bool, text: str = "1+1=2.") -> dict[str, Any]:
    """A line of rollouts.jsonl with a declined probe, and one that passed where it exits early."""
    segments: list[dict[str, Any]] = [
        {"kind": "text", "text": f"<think>\n{text}\n"},
        {"kind": "probe", "confidence": 0.5},
        {"kind": "trigger", "text": "Wait"},
        {"kind": "text", "text": ", check.\n"},
    ]
    if reason == "early_exit":
        segments.append({"kind": "probe", "confidence": 0.98})
    segments.append({"kind": "exit", "reason": reason})
    segments.append({"kind": "forced", "text": "\n</think>\n\n"})
    segments.append({"kind": "text", "text": r"The answer is \boxed{2}."})
    return {
        **{"step": step, "id": "q", "sample": 0, "prompt": "1+1", "answer": "2", "reason": reason},
        **{"correct": correct, "formatted": True, "reward": 0.5, "advantage": -0.5, "tokens": 20, "steps": 2},
        **{"confidences": [s["confidence"] for s in segments if s["kind"] == "probe"], "segments": segments},
    }


def probes() -> list[dict[str, Any]]:
    """Lines of probes.jsonl for the completion of question 1 before."""
    row = {"id": "q1", "sample": 0, "answer": "7"}
    return [
        {**row, "position": 9, "confidence": 0.75, "correct": True},
        {**row, "position": 3, "confidence": 0.25, "correct": False},
    ]


def write_workdir(folder: Path, *, everything: bool = True, hostile: str = "") -> Path:
    """Writes a whole run, or nothing but its metrics; `hostile` stands in every text that others write."""

    def jsonl(name: str, rows: list[dict[str, Any]]) -> None:
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / name).write_text(text, encoding="utf-8")

    jsonl("metrics.jsonl", metrics())
    if not everything:
        return folder
    before, after = evaluation(0.5, 100.0), evaluation(1.0, 60.0)
    result = {"before": before, "after": after, "evaluation_seconds": {"before": 4.0, "after": 3.0}}
    (folder / "result.json").write_text(json.dumps(result))
    config = {"config.rollout.triggers": ["Wait"], "config.model.checkpoint": f"builtin:tiny{hostile}"}
    remembered = {"facts": {"config": config, "version": "0.1.0"}, "result": before}
    (folder / "evaluation_before.json").write_text(json.dumps(remembered))
    long = "<think>\n3+4=8.\nWait, 3+4=7.\nWait, yes.\n</think>\n\nSo \\boxed{7}."
    short = "<think>\n3+4=7.\n</think>\n\nSo \\boxed{7}."
    jsonl("completions_before.jsonl", [completion(1, long + hostile, False), completion(2, short, True)])
    jsonl("completions_after.jsonl", [completion(1, short + hostile, True), completion(2, short, True)])
    jsonl(
        "rollouts.jsonl",
        [
            rollout(1, "early_exit", True, hostile or "1+1=2."),
            rollout(2, "natural", False),
            rollout(3, "early_exit", False),
        ],
    )
    jsonl("probes.jsonl", probes())
    return folder
