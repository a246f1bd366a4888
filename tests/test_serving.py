"""What docs/serving.md shows."""

import re
from pathlib import Path

DOCS = Path(__file__).parents[1] / "docs" / "serving.md"


def test_python_of_the_page_runs_and_the_model_answers(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shown: dict[str, object] = {}
    for code in re.findall(r"```python\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL):
        exec(code, shown)
    assert "</think>" in str(shown["answer"])
    assert re.search(r"\\boxed\{-?\d+\}", capsys.readouterr().out)
