"""The committed studies: their tables are those of their figures, and the pages repeat them."""

import json
from typing import Any

import pytest
from pages import ROOT

from step_grpo import cli
from step_grpo.study_results import every_table, latex, pareto_front, titles_of

STUDIES = {  # folder -> config
    "study_tiny": "study_tiny.py",
    "study_tiny_early": "study_tiny.py:early",
    "study_tiny_extended": "study_tiny.py:extended",
    "study_tiny_penalty": "study_tiny.py:penalty",
}


def results_of(name: str) -> dict[str, Any]:
    return json.loads((ROOT / "results" / name / "results.json").read_text(encoding="utf-8"))


def short_table(results: dict[str, Any]) -> str:
    """What the README shows of a study: accuracy, tokens, and the differences from the first row."""
    figures, titles = results["splits"][results["study"]["pictured"]], titles_of(results)
    lines = ["| | accuracy, % | tokens | accuracy, points | tokens, % |", "| --- | --- | --- | --- | --- |"]
    for row, own in figures.items():
        cells = [titles[row].strip(), f"{100 * own['accuracy']:.1f}", f"{own['tokens']:.1f}"]
        for name in ("accuracy", "tokens_relative"):
            found = own.get("against_base", {}).get(name)
            mean, low, high = (100 * found[end] for end in ("mean", "low", "high")) if found else (0, 0, 0)
            cells.append(f"{mean:+.1f} ({low:+.1f} to {high:+.1f})" if found else "")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize("name", STUDIES)
def test_tables_are_of_the_figures(name):
    results, folder = results_of(name), ROOT / "results" / name
    assert (folder / "results.md").read_text(encoding="utf-8") == every_table(results)
    assert (folder / "results.tex").read_text(encoding="utf-8") == latex(
        results["splits"], titles_of(results)
    )
    assert results["pareto"] == pareto_front(results["splits"][results["study"]["pictured"]])


@pytest.mark.parametrize("name", STUDIES)
def test_studies_are_of_their_config(name):
    """A config that is changed without running the study again would speak of other rows."""
    config = cli.load_config(str(ROOT / "configs" / STUDIES[name]))
    results = results_of(name)
    assert results["study"] == json.loads(json.dumps(config.to_dict()))
    assert results["rows"] == list(config.order)
    for split in config.splits:
        assert set(results["splits"][split]) == set(results["rows"])


def test_the_readme_repeats_the_table():
    assert short_table(results_of("study_tiny")) in (ROOT / "README.md").read_text(encoding="utf-8")


def lost(found: dict[str, float]) -> str:
    """A difference of accuracy, as the pages tell how far a row is behind."""
    mean, high, low = (f"{-100 * found[end]:.1f}" for end in ("mean", "low", "high"))
    return f"{mean} points ({low} to {high})"


def test_the_readme_says_what_the_table_says():
    figures = results_of("study_tiny")["splits"]["test"]
    weak = results_of("study_tiny_penalty")["splits"]["test"]["grpo_lp_weak"]
    said = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    own = figures["step_grpo"]["against_base"]
    cheap = figures["no_step_reward"]["against_base"]["tokens_relative"]["mean"]
    assert f"saves {-100 * own['tokens_relative']['mean']:.1f} % of the tokens" in said
    assert f"without the step reward {-100 * cheap:.1f} % of the tokens are saved" in said
    assert f"it is {lost(own['accuracy'])} behind vanilla" in said
    behind = {
        "leave out what steps do not count, and is {} behind Step-GRPO": figures["grpo_lp"],
        "a format that asks for a closed thinking it is {} behind": weak,
        "without the dynamic rollout {} of accuracy are lost": figures["no_dynamic_rollout"],
        "with the mean over all samples {}": figures["mean_over_all"],
    }
    for sentence, row in behind.items():
        assert sentence.format(lost(row["against"]["step_grpo"]["accuracy"])) in said
