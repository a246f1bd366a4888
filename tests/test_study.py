"""The study: which commands run, that nothing runs twice, and what becomes of their completions."""

import json
from itertools import pairwise

import numpy as np
import pytest
from ml_collections import ConfigDict
from short_run import ROOT

from step_grpo import cli, statistics, study
from step_grpo.calibration import calibration
from step_grpo.config import validate
from step_grpo.errors import UserError
from step_grpo.study import stages_of
from step_grpo.study_config import row, study_config, validate_study
from step_grpo.study_results import beside, escaped, latex, markdown, pareto_front, picture

QUESTIONS = 12


def make_study(**fields) -> ConfigDict:
    rows = {
        "vanilla": row("vanilla", "untrained"),
        "better": row("Better", train=["reward.beta=0"]),
        "sft": row("SFT", "imitate", evaluate=["eval.exit=none"]),
    }
    return study_config(rows, seeds=(0, 1), **fields)


class Commands:
    """Stands for the processes: notes every command, and leaves what the real one would leave."""

    def __init__(self):
        self.run_so_far: list[list[str]] = []
        self.failing = ""

    def __call__(self, command, log, compiled):
        del log, compiled
        flags = dict(part.removeprefix("--").split("=", 1) for part in command if part.startswith("--"))
        self.run_so_far.append(command)
        if self.failing and self.failing in flags["workdir"]:
            return 1
        folder = study.Path(flags["workdir"])
        if "step_grpo.evaluate" in command:
            write_completions(folder, flags)
            steps = 300 if flags.get("config.rollout.rebatch") else 200
            cost = {"seconds": steps / 50, "lane_steps": steps, "live_share": 120 / steps}
            (folder / "evaluation.json").write_text(json.dumps({"cost": cost}))
        elif "step_grpo.probing" in command:
            assert study.Path(flags["completions"]).is_file() and flags["questions"] == "256"
            right = "training" in flags["checkpoint"]
            figures = calibration(np.array([0.97, 0.4]), np.array([right, False]), 0.95)
            (folder / "calibration.json").write_text(json.dumps({"completions": QUESTIONS, **figures}))
        else:
            (folder / "result.json").write_text("{}")
            write_metrics(folder, int(flags["config.seed"]))
        return 0


def thought(first: int, trained: bool) -> str:
    """Right from the second line on; without training a needless check follows."""
    lines = [f"{first}+25={first + 25}.", f"{first + 25}-8={first + 17}."]
    lines += [] if trained else [f"Wait, check: {first}+25={first + 25}, yes."]
    return "<think>\n" + "\n".join(lines) + "\n</think>\n\nThe answer is \\boxed{1}."


def write_completions(folder, flags):
    """Shorter answers where something was trained; each seed has other ones."""
    trained = "training" in flags["checkpoint"]
    rng = np.random.default_rng([int(flags["config.seed"]), trained])
    with (folder / "completions.jsonl").open("w") as file:
        for question in range(QUESTIONS):
            for _ in range(2):
                tokens = int(rng.integers(10, 20)) + (0 if trained else 30)
                figures = {"correct": bool(rng.random() < 0.7), "tokens": tokens, "steps": tokens // 10}
                asked = {"id": f"q/{question}", "prompt": f"Compute {question}+25-8."}
                figures["truncated"] = bool(rng.random() < 0.3)
                line = {**asked, "text": thought(question, trained), **figures}
                file.write(json.dumps(line) + "\n")


def write_metrics(folder, seed):
    """Two steps, the second one shorter and better."""
    steps = [
        {"accuracy": 0.5, "exit_early_exit": 0.25, "equal_groups": 0.5, "tokens": 30 + seed},
        {"accuracy": 0.7, "exit_early_exit": 0.15, "equal_groups": 0.0, "tokens": 20 + seed},
    ]
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(step)}\n" for step in steps))


@pytest.fixture(name="commands")
def stub_commands(monkeypatch):
    stub = Commands()
    monkeypatch.setattr(study, "run_python", stub)
    return stub


def test_training_comes_before_its_evaluation_and_every_seed_has_its_own(tmp_path):
    config = make_study(
        train=("steps=1",), evaluate=("eval.samples=2",), splits={"test": ("x=1",), "ood": ()}
    )
    stages = list(stages_of("better", config, tmp_path))
    assert [(s.seed, s.kind, s.folder.name) for s in stages] == [
        (0, "train", "training"),
        (0, "evaluate", "ood"),
        (0, "evaluate", "test"),
        (0, "evaluate", "test_static"),
        (1, "train", "training"),
        (1, "evaluate", "ood"),
        (1, "evaluate", "test"),
        (0, "probe", "probes"),
    ]
    training, ood, test, _ = stages[4:]
    assert stages[3].command[-1] == "--config.rollout.rebatch=False"
    assert training.command[:2] == ("-m", "step_grpo.main")
    assert [part.removeprefix("--config.") for part in training.command[-4:]] == [
        "seed=1",
        "model.checkpoint=builtin:tiny",
        "steps=1",
        "reward.beta=0",
    ]
    assert f"--checkpoint={training.folder / 'export'}" in test.command
    assert test.command[-3:] == ("--config.seed=1", "--config.eval.samples=2", "--config.x=1")
    assert "--config.x=1" not in ood.command
    for one, other in pairwise(stages):
        assert one.folder != other.folder


def test_untrained_rows_are_evaluated_as_they_are(tmp_path):
    stages = list(stages_of("vanilla", make_study(), tmp_path))
    assert {s.kind for s in stages} == {"evaluate", "probe"}
    assert all("--checkpoint=builtin:tiny" in s.command for s in stages)


def test_verifier_is_trained_and_then_judges_the_untrained_model(tmp_path):
    rows = {"flash": row("F", "verifier", train=["a=1"], evaluate=["b=2"])}
    config = study_config(rows, seeds=(0, 1))
    training, evaluation, static = [s for s in stages_of("flash", config, tmp_path) if s.seed == 0]
    assert training.command[:2] == ("-m", "step_grpo.train_verifier") and training.kind == "verifier"
    assert training.command[-1] == "--config.a=1"
    assert evaluation.command[1] == "step_grpo.evaluate"
    assert "--checkpoint=builtin:tiny" in evaluation.command
    assert evaluation.command[-3:] == (
        "--config.b=2",
        "--config.eval.exit=verifier",
        f"--config.rollout.verifier.checkpoint={training.folder / 'export'}",
    )
    assert static.command[-4:-1] == evaluation.command[-3:]
    judged = [s.command for s in stages_of("flash", config, tmp_path) if s.seed == 1][1]
    assert "seed1" in judged[-1]  # each seed has a verifier of its own


def test_study_runs_every_command_once_and_only_what_is_missing(tmp_path, commands, capsys):
    study.main(make_study(), tmp_path)
    assert len(commands.run_so_far) == 4 + 6 + 6
    study.main(make_study(), tmp_path)
    assert len(commands.run_so_far) == 16
    (tmp_path / "rows/sft/seed1/test/evaluation.json").unlink()
    study.main(make_study(), tmp_path)
    assert len(commands.run_so_far) == 17
    assert "1 to run" in capsys.readouterr().out
    for name in ("results.json", "results.md", "results.tex", "pareto.png", "calibration.png"):
        assert (tmp_path / name).stat().st_size > 100


def test_commands_share_what_they_compile_unless_the_environment_says_where(tmp_path, monkeypatch):
    kept = ("JAX_COMPILATION_CACHE_DIR", "GLIBC_TUNABLES")
    shown = ("-c", f"import os; print(*(os.environ[name] for name in {kept}))")
    for name in kept:
        monkeypatch.setenv(name, "")
    assert study.run_python(shown, tmp_path / "log.txt", tmp_path / "compiled") == 0
    for name in kept:
        monkeypatch.delenv(name)
    assert study.run_python(shown, tmp_path / "log.txt", tmp_path / "compiled") == 0
    mine = f"{tmp_path / 'compiled'} glibc.malloc.hugetlb=1"
    assert (tmp_path / "log.txt").read_text() == f" \n{mine}\n"


def test_failed_command_stops_its_seed_alone_and_is_told(tmp_path, commands, capsys):
    commands.failing = "better/seed0/training"
    with pytest.raises(UserError, match=r"1 commands failed.*better, seed 0: train training ended with 1"):
        study.main(make_study(), tmp_path)
    done = json.loads((tmp_path / "results.json").read_text())["splits"]["test"]
    assert list(done) == ["vanilla", "sft"]
    assert (tmp_path / "rows/better/seed1/test/evaluation.json").exists()
    assert not (tmp_path / "rows/better/seed0/test").exists()
    assert "log.txt" in capsys.readouterr().out


def test_first_row_that_failed_leaves_the_others_without_a_table(tmp_path, commands):
    """There is nothing to compare them with; run again, the same line mends it."""
    commands.failing = "vanilla/seed1"
    with pytest.raises(UserError, match=r"1 commands failed.*vanilla, seed 1: evaluate test ended with 1"):
        study.main(make_study(), tmp_path)
    assert (tmp_path / "rows/sft/seed1/test/evaluation.json").exists()
    assert not (tmp_path / "results.json").exists()
    commands.failing = ""
    study.main(make_study(), tmp_path)
    assert json.loads((tmp_path / "results.json").read_text())["rows"] == ["vanilla", "better", "sft"]


def test_finished_study_is_written_once_more_and_not_for_every_row(tmp_path, commands, monkeypatch):
    study.main(make_study(), tmp_path)
    written = []
    monkeypatch.setattr(study, "write_results", lambda *arguments: written.append(arguments[2]))
    study.main(make_study(), tmp_path)
    assert written == [["vanilla", "better", "sft"]]


def test_folder_of_another_command_is_refused(tmp_path, commands):
    study.main(make_study(), tmp_path)
    with pytest.raises(UserError, match="rows/vanilla/seed0/test was made with other settings"):
        study.main(make_study(evaluate=("eval.samples=9",)), tmp_path)


def test_only_some_rows_and_the_one_they_are_compared_with(tmp_path, commands):
    study.main(make_study(), tmp_path, only="sft")
    assert list(json.loads((tmp_path / "results.json").read_text())["splits"]["test"]) == ["vanilla", "sft"]
    with pytest.raises(UserError, match="no row 'best'; there are vanilla, better, sft"):
        study.main(make_study(), tmp_path, only="best")


def with_own_row(**fields) -> ConfigDict:
    """The study of `make_study`, and a row of somebody's own in its middle."""
    study_of = make_study().unlock()
    study_of.rows["mine"] = ConfigDict(row("Mine", train=["reward.beta=1"]))
    study_of.order = ("vanilla", "mine", "better", "sft")
    study_of.update(fields)
    return study_of.lock()


def test_row_of_ones_own_stands_among_those_of_an_earlier_study(tmp_path, commands):
    study.main(make_study(), tmp_path / "published")
    study.main(with_own_row(), tmp_path / "whole")
    commands.run_so_far.clear()
    published = tmp_path / "published" / "results.json"
    study.main(with_own_row(), tmp_path / "own", beside=str(published))
    assert len(commands.run_so_far) == 4 + 6  # of the first row, and of one's own
    for name in ("results.json", "results.md", "results.tex", "pareto.png"):
        assert (tmp_path / "own" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    study.main(with_own_row(), tmp_path / "own", only="sft", beside=str(published))
    assert len(commands.run_so_far) == 4 + 6 + 6  # asked for by name
    assert json.loads((tmp_path / "own" / "results.json").read_text())["rows"] == ["vanilla", "better", "sft"]


def test_rows_that_another_first_row_was_the_base_of_are_named(tmp_path, commands):
    study.main(make_study(), tmp_path / "published")
    published = tmp_path / "published" / "results.json"
    results = json.loads(published.read_text())
    results["splits"]["test"]["vanilla"] |= {"accuracy": 0.125, "tokens": 77.0}
    published.write_text(json.dumps(results))
    study.main(with_own_row(), tmp_path / "own", beside=str(published))
    said = "whose first row had an accuracy of 12.5 % with 77.0 tokens: Better, SFT."
    assert said in (tmp_path / "own" / "results.md").read_text()
    with pytest.raises(UserError, match="has rows of two runs with different first rows"):
        study.main(with_own_row(), tmp_path / "own", beside=str(tmp_path / "own" / "results.json"))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"seeds": (0,)}, r"with config.seeds \[0, 1\]; here it is \[0\]"),
        ({"evaluate": ("eval.samples=9",)}, r"with config.evaluate \[\]; here it is \['eval.samples=9'\]"),
        ({"rows": {"sft": row("SFT", "imitate")}}, "with config.rows.sft {'evaluate': "),
        ({"order": ("mine", "sft")}, "with the first of config.order vanilla; here it is mine"),
    ],
)
def test_earlier_study_of_other_settings_is_refused(change, said, tmp_path, commands):
    study.main(make_study(), tmp_path / "published")
    ran = len(commands.run_so_far)
    with pytest.raises(UserError, match=said):
        study.main(
            with_own_row(**change), tmp_path / "own", beside=str(tmp_path / "published" / "results.json")
        )
    assert len(commands.run_so_far) == ran


def test_rows_are_compared_with_others_than_the_first_too(tmp_path, commands):
    study.main(make_study(also_against=("better",)), tmp_path / "published")
    published = tmp_path / "published" / "results.json"
    results = json.loads(published.read_text())
    found = results["splits"]["test"]
    assert {row: list(own["against"]) for row, own in found.items()} == {
        "vanilla": ["better"],
        "better": [],
        "sft": ["better"],
    }
    for own in (found["vanilla"], found["sft"]):
        difference = own["against"]["better"]["tokens"]["mean"]
        assert difference == pytest.approx(own["tokens"] - found["better"]["tokens"])
    table = (tmp_path / "published" / "results.md").read_text().partition("## Against Better\n")[2]
    assert [line.split(" | ")[0] for line in table.split("\n")[3:5]] == ["| vanilla", "| SFT"]
    # Of a row that is not run here there are no completions to compare one's own with.
    config = with_own_row(also_against=("better",))
    study.main(config, tmp_path / "own", beside=str(published))
    results_here = json.loads((tmp_path / "own" / "results.json").read_text())
    own = results_here["splits"]["test"]
    assert all(own[row] == found[row] for row in found) and own["mine"]["against"] == {}
    assert "earlier" not in results_here  # the first row is as it was
    # Run here with another outcome, it is not the row that the carried ones were compared with.
    found["better"]["tokens"] += 1
    published.write_text(json.dumps(results))
    study.main(config, tmp_path / "own", only="better,mine", beside=str(published))
    own = json.loads((tmp_path / "own" / "results.json").read_text())["splits"]["test"]
    assert own["sft"]["against"] == {} and list(own["mine"]["against"]) == ["better"]
    assert list(own["vanilla"]["against"]) == ["better"]  # with the one that was run here


@pytest.mark.parametrize("text", [None, "{", "[]", '{"study": {}}'])
def test_file_that_is_no_earlier_study_is_refused(text, tmp_path, commands):
    path = tmp_path / "results.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=r"--beside: .*results.json is not a results.json of step_grpo.study"):
        study.main(make_study(), tmp_path / "own", beside=str(path))
    assert not commands.run_so_far


def test_earlier_study_that_lacks_figures_is_refused(tmp_path, commands):
    study.main(make_study(), tmp_path / "published")
    path = tmp_path / "published" / "results.json"
    results = json.loads(path.read_text())
    del results["splits"]["test"]["sft"]
    path.write_text(json.dumps(results))
    with pytest.raises(UserError, match="lacks figures of some of its rows"):
        study.main(make_study(), tmp_path / "own", beside=str(path))


def test_figures_are_those_of_all_seeds_together(tmp_path, commands):
    study.main(make_study(), tmp_path)
    found = json.loads((tmp_path / "results.json").read_text())["splits"]["test"]
    folders = {name: [tmp_path / f"rows/{name}/seed{seed}/test" for seed in (0, 1)] for name in found}
    lines = {
        name: [json.loads(line) for f in own for line in (f / "completions.jsonl").read_text().splitlines()]
        for name, own in folders.items()
    }
    for name, own in found.items():
        assert own["accuracy"] == pytest.approx(np.mean([line["correct"] for line in lines[name]]))
        assert own["tokens"] == pytest.approx(np.mean([line["tokens"] for line in lines[name]]))
        assert own["tokens_low"] < own["tokens"] < own["tokens_high"]
        cut = np.mean([line["truncated"] for line in lines[name]])
        assert own["truncated"] == pytest.approx(cut) and cut > 0
        assert np.mean(own["tokens_of_seeds"]) == pytest.approx(own["tokens"])
    saved = found["better"]["against_base"]["tokens_relative"]
    assert saved["mean"] == pytest.approx(found["better"]["tokens"] / found["vanilla"]["tokens"] - 1)
    assert saved["p_value"] < 0.05 and "against_base" not in found["vanilla"]


def test_seeds_are_tabled_where_there_are_several(tmp_path, commands):
    study.main(make_study(), tmp_path)
    found = json.loads((tmp_path / "results.json").read_text())["splits"]["test"]["better"]
    accuracy, tokens = found["accuracy_of_seeds"], found["tokens_of_seeds"]
    cells = [*(f"{100 * one:.1f}" for one in accuracy), *(f"{one:.1f}" for one in tokens)]
    table = (tmp_path / "results.md").read_text().partition("## test, seed by seed\n")[2]
    assert f"| Better | {' | '.join(cells)} |" in table and len(set(tokens)) == 2
    study.main(study_config(make_study().rows.to_dict(), seeds=(0,)), tmp_path / "one")
    assert "seed by seed" not in (tmp_path / "one" / "results.md").read_text()


def test_static_batches_are_compared_on_the_same_completions(tmp_path, commands):
    study.main(make_study(), tmp_path)
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["rebatching"]["better"]["lane_steps_saved"] == pytest.approx(1 / 3)
    assert "| Better | 60% | 40% | 33% | 33% |" in (tmp_path / "results.md").read_text()
    path = tmp_path / "rows/sft/seed0/test_static/completions.jsonl"
    path.write_text(path.read_text().replace('"tokens": 1', '"tokens": 2'))
    with pytest.raises(UserError, match="test_static: static batches gave other completions"):
        study.main(make_study(), tmp_path)


def test_what_the_thoughts_do_is_read_from_the_texts(tmp_path, commands):
    study.main(make_study(), tmp_path)
    found = json.loads((tmp_path / "results.json").read_text())["learnt"]
    assert {name: own["after"] for name, own in found.items()} == {"vanilla": 1.0, "better": 0.0, "sft": 0.0}
    assert {name: own["redundant"] for name, own in found.items()} == {"vanilla": 1, "better": 0, "sft": 0}
    assert all((own["before"], own["early"], own["left_it"]) == (2.0, 0.0, 0.0) for own in found.values())
    text = (tmp_path / "results.md").read_text()
    assert "| vanilla | 2.00 | 1.00 | 0.0% | 0.0% | 100.0% | 0.00 | 1.00 | 0.00 | 0.00 |" in text
    for path in tmp_path.glob("rows/better/seed0/test*/completions.jsonl"):
        path.write_text(path.read_text().replace("</think>", ""))
    study.main(make_study(), tmp_path)
    assert "| Better | 2.00 | 0.00 | 0.0% | 0.0% | 50.0% | 0.00 |" in (tmp_path / "results.md").read_text()
    for path in tmp_path.glob("rows/*/seed*/test*/completions.jsonl"):
        path.write_text(path.read_text().replace("Compute", "Work out"))
    study.main(make_study(), tmp_path)
    assert "What the thoughts do" not in (tmp_path / "results.md").read_text()


def test_what_rollouts_trained_a_row_is_read_from_its_metrics(tmp_path, commands):
    study.main(make_study(), tmp_path)
    found = json.loads((tmp_path / "results.json").read_text())["rollouts"]
    assert found["vanilla"] is None and found["sft"] is None  # one untrained, one trained on texts
    wanted = {"accuracy": 0.6, "exited": 0.2, "equal_groups": 0.25, "first": 30.5, "last": 20.5}
    assert found["better"] == pytest.approx(wanted)
    text = (tmp_path / "results.md").read_text()
    assert "| Better | 60.0% | 20.0% | 25.0% | 30.5 | 20.5 |" in text
    assert text.partition("What the rollouts were")[2].partition("##")[0].count("| SFT |") == 0


def test_probes_come_last_and_ask_of_the_evaluation_what_it_was_asked(tmp_path):
    config = make_study(splits={"test": ("x=1",)}, evaluate=("eval.samples=2",), probed_questions=9)
    evaluation, probe = (stage for stage in stages_of("sft", config, tmp_path) if stage.seed == 0 and
                         stage.folder.name in ("test", "probes"))  # fmt: skip
    assert list(stages_of("sft", config, tmp_path))[-1] == probe
    assert probe.command[:2] == ("-m", "step_grpo.probing") and "--questions=9" in probe.command
    assert f"--completions={evaluation.folder / 'completions.jsonl'}" in probe.command
    told = ("--checkpoint", "--config.")
    asked = [
        {part for part in s.command if part.startswith(told)} - {f"--workdir={s.folder}"}
        for s in (evaluation, probe)
    ]
    assert asked[0] == asked[1]


def test_completions_that_were_cut_short_are_not_probed(tmp_path):
    cut = row("cut", "untrained", evaluate=["eval.exit=confidence"])
    plain = row("plain", "untrained", evaluate=["eval.exit=confidence", "eval.exit=none"])
    config = study_config({"a": cut, "b": plain, "f": row("F", "verifier")}, seeds=(0,))
    probed = [name for name in "abf" if any(s.kind == "probe" for s in stages_of(name, config, tmp_path))]
    assert probed == ["b"]


def test_workdir_from_before_there_were_probes_is_gone_on_with(tmp_path, commands):
    study.main(make_study(), tmp_path)
    before = [*tmp_path.glob("rows/*/seed0/probes/c*.json"), tmp_path / "seconds.json"]
    seconds = json.loads(before.pop().read_text())
    (tmp_path / "seconds.json").write_text(json.dumps({k: seconds[k] for k in seconds if k != "probe"}))
    for path in before:
        path.unlink()
    commands.run_so_far.clear()
    study.main(make_study(), tmp_path)
    assert [command[1] for command in commands.run_so_far] == ["step_grpo.probing"] * 3


def test_calibration_stands_in_the_table(tmp_path, commands):
    study.main(make_study(), tmp_path)
    found = json.loads((tmp_path / "results.json").read_text())["calibration"]
    assert list(found) == ["vanilla", "better", "sft"]
    text = (tmp_path / "results.md").read_text()
    assert "| vanilla | 12 | 2 | 0.685 | 0.0% | 0.685 | 50.0% | 0.0% |" in text
    assert "| Better | 12 | 2 | 0.685 | 50.0% | 0.215 | 50.0% | 100.0% |" in text


def test_seeds_are_further_samples_of_each_question():
    one = statistics.Outcomes(*[np.arange(6).reshape(3, 2) + 10 * i for i in range(5)])
    both = beside([one, one])
    assert both.tokens.shape == (3, 4)
    np.testing.assert_array_equal(both.tokens[:, 2:], one.tokens)


def test_pareto_front_is_what_nothing_beats():
    points = {"a": (10, 0.5), "b": (20, 0.7), "c": (20, 0.6), "d": (15, 0.4), "e": (30, 0.7), "f": (10, 0.5)}
    figures = {name: {"tokens": tokens, "accuracy": share} for name, (tokens, share) in points.items()}
    assert pareto_front(figures) == ["a", "f", "b"]


def test_picture_marks_variants_hollow_and_has_room_for_the_legend_of_every_row():
    own = {"tokens": 10.0, "tokens_low": 9.0, "tokens_high": 12.0}
    own |= {"accuracy": 0.5, "accuracy_low": 0.4, "accuracy_high": 0.7}
    titles = {f"row{i}": f"{'  ' * (i % 2)}Row {i}" for i in range(40)}
    figure = picture(dict.fromkeys(titles, own), titles, ["row0"])
    figure.draw_without_rendering()
    [axes] = figure.axes
    assert [bar[0].get_markerfacecolor() == "white" for bar in axes.containers] == [False, True] * 20
    legend = axes.get_legend()
    assert [text.get_text().strip() for text in legend.get_texts()][1:] == [f"Row {i}" for i in range(40)]
    assert legend.get_window_extent().height < figure.bbox.height


def test_tables_hold_every_row_and_mark_what_is_significant():
    ends = {f"{name}{end}": 1.0 for name in ("accuracy", "tokens", "steps") for end in ("", "_low", "_high")}
    against = {name: {"mean": -0.3, "low": -0.4, "high": -0.2, "p_value": p} for name, p in
               (("accuracy", 0.2), ("tokens_relative", 0.001))}  # fmt: skip
    ends |= {"tokens_median": 7.0, "truncated": 0.125}
    figures = {"v": {**ends, "questions": 5}, "b_1": {**ends, "against_base": against}}
    text = markdown({"test": figures}, {"v": "vanilla", "b_1": "50 % & more"})
    assert "| 50 % & more | 100.0 (100.0 to 100.0) " in text
    assert "| -30.0 (-40.0 to -20.0) | -30.0* (-40.0 to -20.0) |" in text
    assert r"50 \% \& more &" in latex({"test": figures}, {"v": "vanilla", "b_1": "50 % & more"})
    assert escaped("a_b") == r"a\_b"


@pytest.mark.parametrize("arg", ["", ":penalty", ":extended", ":short"])
def test_overrides_of_the_configs_are_fields_of_what_they_run(arg, tmp_path):
    config = cli.load_config(str(ROOT / "configs/study_tiny.py") + arg)
    validate_study(config)
    for field in config.rows:
        for stage in stages_of(field, config, tmp_path):
            command = [part.replace("=configs/", f"={ROOT}/configs/") for part in stage.command[2:]]
            module = __import__(stage.command[1], fromlist=["main"])
            validate(cli.parse(module.main, [stage.command[1], *command])["config"])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"order": ("best",)}, r"config.order is \('best',\); it must be rows, each once; there are better"),
        ({"order": ()}, "config.order is"),
        ({"pictured": "ood"}, "config.pictured is 'ood'"),
        ({"probed_questions": -1}, "config.probed_questions is -1"),
        ({"reliability": ("best",)}, r"config.reliability is \('best',\); it must be rows; there are better"),
        ({"seeds": (1, 1)}, "config.seeds is .* different numbers"),
        ({"evaluate": ("eval.samples",)}, "config.evaluate is .* tuple of overrides"),
        ({"rows": {"x": row("x", "trained")}}, "config.rows.x.kind is 'trained'; it must be 'untrained' or"),
        ({"rows": {"x": row("x", "untrained", train=["a=1"])}}, "config.rows.x.train is .* not trained"),
    ],
)
def test_mistakes_in_the_config_are_told_before_anything_runs(fields, message):
    config = make_study().unlock()
    config.update(fields)
    with pytest.raises(UserError, match=message):
        validate_study(config)
