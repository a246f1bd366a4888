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


def lost(found: dict[str, Any]) -> str:
    """How far a row is behind another in accuracy, as the pages write it."""
    mean, high, low = (f"{-100 * found['accuracy'][end]:.1f}" for end in ("mean", "low", "high"))
    return f"{mean} points ({low} to {high})".replace("-0.0", "0.0")


def gained(found: dict[str, Any]) -> list[str]:
    """How far a row is ahead of another in accuracy: points, and the ends of the interval."""
    return [f"{100 * found['accuracy'][end]:.1f}" for end in ("mean", "low", "high")]


def saved(found: dict[str, Any], digits: int = 1) -> str:
    """The tokens that a row saves against another."""
    return f"{-100 * found['tokens_relative']['mean']:.{digits}f} %"


def seeds_of(figures: dict[str, Any]) -> str:
    """The accuracy of three seeds, in percent."""
    first, second, third = (f"{100 * a:.1f}" for a in figures["accuracy_of_seeds"])
    return f"{first}, {second} and {third} %"


def sentences() -> dict[str, list[str]]:
    """What the pages say of the study's figures; by page."""
    results, penalty = results_of("study_tiny"), results_of("study_tiny_penalty")
    test, rollouts = results["splits"]["test"], results["rollouts"]
    early = {row: f"{100 * own['early']:.1f} %" for row, own in results["learnt"].items()}
    vanilla = {row: own["against_base"] for row, own in test.items() if row != "vanilla"}
    step = {row: own["against"]["step_grpo"] for row, own in test.items() if row != "step_grpo"}
    weak, stopped = (penalty["splits"]["test"][row] for row in ("grpo_lp_weak", "grpo_lp_stopped"))
    weak_harder = penalty["splits"]["ood"]["grpo_lp_weak"]["against"]["step_grpo"]
    harder = results["splits"]["ood"]["step_grpo"]["against_base"]
    behind_weak, behind_stopped = (lost(row["against"]["step_grpo"]) for row in (weak, stopped))
    return {
        "README.md": [
            f"saves {saved(vanilla['step_grpo'])} of the tokens",
            f"it is {lost(vanilla['step_grpo'])} behind vanilla",
            f"leave out what steps do not count, and is {lost(step['grpo_lp'])} behind Step-GRPO",
            f"while it has the tokens of Step-GRPO, it is {behind_stopped} behind",
            f"a format that asks for a closed thinking, {behind_weak}",
            f"without the step reward {saved(vanilla['no_step_reward'])} of the tokens are saved",
            f"with the mean over all samples {lost(step['mean_over_all'])} of accuracy are lost",
            f"without the dynamic rollout it is {lost(step['no_dynamic_rollout'])}",
        ],
        "results/study_tiny/README.md": [
            f"{early['step_grpo']} of Step-GRPO's completions never reach the right answer, "
            f"and {early['vanilla']} of vanilla's",
            f"In the end Step-GRPO is {lost(vanilla['step_grpo'])} behind",
            f"With {saved(step['grpo_lp'], 0)} fewer tokens than Step-GRPO it is "
            f"{lost(step['grpo_lp'])} behind",
            f"its seeds have {seeds_of(test['grpo_lp'])}",
            f"is {lost(step['deer_sft'])} behind Step-GRPO",
            f"and needs {saved(step['deer_sft'], 0)[1:]} more tokens",
            f"**GRPO** is the most accurate, with {100 * test['grpo']['accuracy']:.1f} %, and saves "
            f"{saved(vanilla['grpo'], 0)} of the tokens",
            f"without it tokens fall by {saved(vanilla['no_step_reward'])}, not "
            f"{saved(vanilla['step_grpo']).removesuffix(' %')}",
            f"With the mean over all samples the model is {lost(step['mean_over_all'])} behind",
            f"Without the dynamic rollout it is {lost(step['no_dynamic_rollout'])} behind",
            f"{100 * rollouts['step_grpo']['exited']:.1f} % of Step-GRPO's rollouts are cut short",
            "Step-GRPO has {} points more there than vanilla ({} to {}), with ".format(*gained(harder))
            + f"{saved(harder, 0)} fewer tokens",
        ],
        "results/study_tiny_penalty/README.md": [
            f"**GRPO+LP, stopped after 64 updates** is {behind_stopped} behind Step-GRPO",
            f"**GRPO+LP, penalty 0.1, thinking closed** is {behind_weak} behind",
            f"the seeds have {seeds_of(stopped)}, and those of Step-GRPO "
            f"{seeds_of(test['step_grpo']).removesuffix(' %')}",
            f"({100 * penalty['learnt']['grpo_lp_stopped']['early']:.1f} in place of {early['step_grpo']})",
            f"the seeds have {seeds_of(weak)}",
            f"saves {saved(weak['against']['step_grpo'], 0)} of Step-GRPO's tokens with that",
            "On `ood` it has {} points more than Step-GRPO ({} to {})".format(*gained(weak_harder)),
            f"(p = {weak_harder['accuracy']['p_value']:.2f})",
        ],
    }


def test_pages_say_what_the_tables_say():
    for page, said in sentences().items():
        text = " ".join((ROOT / page).read_text(encoding="utf-8").split())
        assert [sentence for sentence in said if sentence not in text] == [], page


def test_step_grpo_is_what_the_readme_says():
    """On the front, within the noise of vanilla with far fewer tokens, ahead of GRPO+LP at as many tokens."""
    assert "step_grpo" in results_of("study_tiny")["pareto"]
    own = results_of("study_tiny")["splits"]["test"]["step_grpo"]["against_base"]
    assert own["accuracy"]["low"] < 0 < own["accuracy"]["high"]
    assert own["tokens_relative"]["high"] < -0.3
    stopped = results_of("study_tiny_penalty")["splits"]["test"]["grpo_lp_stopped"]["against"]["step_grpo"]
    assert stopped["tokens_relative"]["low"] < 0 < stopped["tokens_relative"]["high"]
    assert stopped["accuracy"]["high"] < 0
