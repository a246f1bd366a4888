"""Makes the folder that STEP_GRPO_TEST_DATA names from the Hugging Face Hub: `fetch_test_data.py FOLDER`."""

import json
import sys
from pathlib import Path

from huggingface_hub import snapshot_download

from step_grpo.config import data_config
from step_grpo.data.benchmarks import BENCHMARKS
from step_grpo.data.sources import load_questions

TOKENIZER = "Qwen/Qwen3-0.6B"
NAMES = ("gsm8k", "math500", "aime24", "olympiadbench")


def main(folder: str) -> None:
    """Writes the tokenizer and four benchmarks."""
    files = ["tokenizer.json", "tokenizer_config.json"]
    snapshot_download(TOKENIZER, allow_patterns=files, local_dir=Path(folder, "qwen3_tokenizer"))
    benchmarks = Path(folder, "benchmarks")
    benchmarks.mkdir(parents=True, exist_ok=True)
    for name in NAMES:
        rows = load_questions(data_config(**BENCHMARKS[name].data))
        lines = (json.dumps({"problem": row.question, "answer": row.answer}) + "\n" for row in rows)
        (benchmarks / BENCHMARKS[name].file).write_text("".join(lines), encoding="utf-8")
        print(f"{len(rows)} questions in {benchmarks / BENCHMARKS[name].file}")


if __name__ == "__main__":
    main(*sys.argv[1:])
