"""The table and the picture of a study, from what its evaluations left in their folders."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from ml_collections import ConfigDict

from step_grpo import statistics
from step_grpo.calibration import draw_reliability
from step_grpo.data.prompts import THINK_END
from step_grpo.data.tasks.reading import family_of, read
from step_grpo.data.tasks.thoughts import VERDICTS
from step_grpo.errors import UserError
from step_grpo.metrics import read_metrics
from step_grpo.outcomes import Recorded, on_common_questions, read_recorded
from step_grpo.statistics import Outcomes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TRAINING = "training"  # folder of a seed with its training
STATIC = "static"  # ends the name of an evaluation in static batches
PROBES = "probes"  # folder of a row's first seed with the probes of its completions
NOT_SHARED = ("order", "rows", "seconds", "reliability")  # in these a study may differ from an earlier one
Figures = dict[str, Any]


Results = dict[str, Any]  # what `results.json` holds
OF_A_ROW = ("rebatching", "learnt", "rollouts", "calibration")  # parts with an entry a row


def write_results(
    config: ConfigDict, workdir: Path, rows: Sequence[str], earlier: Results | None = None
) -> Results:
    """Writes `results.json`, `results.md`, `results.tex`, `pareto.png` and `calibration.png`.

    Args:
        config: of the study.
        workdir: of the study.
        rows: the finished ones, the first of `config.order` first.
        earlier: whose other rows stand beside these, of `read_earlier`.

    Returns:
        What `results.json` holds.
    """
    results = results_of(config, workdir, rows)
    if earlier is not None:
        results = beside_earlier(results, earlier)
    splits, calibrated, titles = results["splits"], results["calibration"], titles_of(results)
    pictured = splits[config.pictured]
    (workdir / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    (workdir / "results.md").write_text(every_table(results), encoding="utf-8")
    (workdir / "results.tex").write_text(latex(splits, titles), encoding="utf-8")
    picture(pictured, titles, results["pareto"]).savefig(workdir / "pareto.png", dpi=150)
    curves = {titles[row]: calibrated[row] for row in config.reliability if row in calibrated}
    if curves:
        draw_reliability(curves, workdir / "calibration.png")
    return results


def results_of(config: ConfigDict, workdir: Path, rows: Sequence[str]) -> Results:
    """All figures of these rows, from what their commands left in the workdir."""
    order = sorted(config.splits, key=lambda split: split != config.pictured)
    splits = {split: split_figures(config, workdir, rows, split) for split in order}
    return {
        "study": json.loads(json.dumps(config.to_dict())),
        "rows": list(rows),
        "splits": splits,
        "pareto": pareto_front(splits[config.pictured]),
        "rebatching": {row: rebatching(config, workdir, row) for row in rows},
        "learnt": {row: learnt(config, workdir, row) for row in rows},
        "rollouts": {row: rollouts(config, workdir, row) for row in rows},
        "calibration": calibrations(config, workdir, rows),
    }


def read_earlier(path: Path, config: ConfigDict) -> Results:
    """The `results.json` of a study that differs from this one in nothing but which rows it has.

    Raises:
        UserError: no such file, not one of ours, of two runs, or of other settings, naming the first.
    """
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        then, known = results["study"], set(results["rows"])
        parts = [*results["splits"].values(), *(results[part] for part in OF_A_ROW[:-1])]
        whole = all(known == set(part) for part in parts)
        now = json.loads(json.dumps(config.to_dict()))
        first = {"the first of config.order": (then["order"][0], now["order"][0])}
        shared = {f"config.{name}": (then[name], now[name]) for name in now if name not in NOT_SHARED}
        rows = {
            f"config.rows.{row}": (then["rows"][row], now["rows"][row]) for row in known & set(now["rows"])
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"--beside: {path} is not a results.json of step_grpo.study ({type(error).__name__}: {error})"
        ) from None
    if not whole:
        raise UserError(f"--beside: {path} lacks figures of some of its rows")
    if "earlier" in results:
        raise UserError(f"--beside: {path} has rows of two runs with different first rows; name one of them")
    for name, (there, here) in (first | shared | rows).items():
        if there != here:
            raise UserError(f"--beside: {path} was made with {name} {there}; here it is {here}")
    return results


def beside_earlier(own: Results, earlier: Results) -> Results:
    """Own figures, and those of the rows that only the earlier study has.

    A row's figures are of its own completions and the first row's alone. Where the first row came out as
    before, which it does on the same kind of machine, all are those of one run; where it did not, `earlier`
    of the results says which rows were compared with another one, and what that was.
    """
    order = own["study"]["order"]
    carried = [row for row in order if row in earlier["rows"] and row not in own["rows"]]

    def both(mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> dict[str, Any]:
        found = {**mine, **{row: theirs[row] for row in carried if row in theirs}}
        return {row: found[row] for row in order if row in found}

    def both_splits(mine: Mapping[str, Figures], theirs: Mapping[str, Figures]) -> dict[str, Figures]:
        found = both(mine, theirs)
        same = {row for row in found if row in theirs and alone(found[row]) == alone(theirs[row])}
        for row in same:  # of two rows that are as before the difference is, too
            known = {name: one for name, one in theirs[row]["against"].items() if name in same}
            found[row] = {**found[row], "against": known | (mine[row]["against"] if row in mine else {})}
        return found

    splits = {split: both_splits(mine, earlier["splits"][split]) for split, mine in own["splits"].items()}
    results = {**own, "rows": [row for row in order if row in {*own["rows"], *carried}], "splits": splits}
    results["pareto"] = pareto_front(splits[own["study"]["pictured"]])
    results |= {part: both(own[part], earlier[part]) for part in OF_A_ROW}
    base = {split: figures[order[0]] for split, figures in earlier["splits"].items()}
    if carried and any(alone(base[split]) != alone(figures[order[0]]) for split, figures in splits.items()):
        results["earlier"] = {"rows": carried, "first_row": base}
    return results


def alone(figures: Figures) -> Figures:
    """The figures of a row without its differences from rows other than the first."""
    return {name: value for name, value in figures.items() if name != "against"}


def titles_of(results: Mapping[str, Any]) -> dict[str, str]:
    """The titles of the rows, by their names, of what `results.json` holds."""
    rows = results["study"]["rows"]
    return {name: rows[name]["title"] for name in results["rows"]}


def every_table(results: Mapping[str, Any]) -> str:
    """What `results.md` holds, of what `results.json` holds."""
    titles = titles_of(results)
    return (
        markdown(results["splits"], titles)
        + earlier_markdown(results, titles)
        + against_markdown(results, titles)
        + seeds_markdown(results, titles)
        + learnt_markdown(results["learnt"], titles)
        + rollouts_markdown(results["rollouts"], titles)
        + calibration_markdown(results["calibration"], titles)
        + rebatching_markdown(results["rebatching"], titles)
    )


def split_figures(config: ConfigDict, workdir: Path, rows: Sequence[str], split: str) -> dict[str, Figures]:
    """The figures of each row on one split."""
    runs = {row: read_seeds(workdir, row, config.seeds, split) for row in rows}
    base = runs[config.order[0]]
    figures = {row: row_figures(row != config.order[0], base, run) for row, run in runs.items()}
    for row, own in figures.items():
        others = [other for other in config.also_against if other in runs and other != row]
        own["against"] = {other: differences(*on_common(runs[other], runs[row])) for other in others}
    return figures


def read_seeds(workdir: Path, row: str, seeds: Sequence[int], split: str) -> list[Recorded]:
    """What a row did on a split, for each seed."""
    folders = [workdir / "rows" / row / f"seed{seed}" / split for seed in seeds]
    return [read_recorded(folder / "completions.jsonl") for folder in folders]


def row_figures(compared: bool, base: Sequence[Recorded], runs: Sequence[Recorded]) -> Figures:
    """Means over seeds with their intervals, each seed's own, and the differences from the base row.

    A question counts by its mean over seeds and completions, and intervals resample questions; what another
    seed of the training would change is in the figures of the seeds.

    Args:
        compared: False for the base row itself.
        base: of the base row.
        runs: of this row, in the order of the same seeds.
    """
    merged_base, merged = on_common(base, runs)
    of_seeds = [run.outcomes for run in runs]
    found: Figures = {
        **statistics.named("accuracy", statistics.accuracy_interval(merged.correct)),
        **statistics.named("tokens", statistics.mean_interval(merged.tokens.mean(axis=1))),
        **statistics.named("steps", statistics.mean_interval(merged.steps.mean(axis=1))),
        "tokens_median": float(np.median(merged.tokens)),
        "truncated": float(merged.truncated.mean()),
        "questions": len(merged.correct),
        "accuracy_of_seeds": [float(run.correct.mean()) for run in of_seeds],
        "tokens_of_seeds": [float(run.tokens.mean()) for run in of_seeds],
    }
    if compared:
        found["against_base"] = differences(merged_base, merged)
    return found


def on_common(base: Sequence[Recorded], runs: Sequence[Recorded]) -> tuple[Outcomes, Outcomes]:
    """All seeds together, of two rows on the questions that both were asked."""
    pairs = [on_common_questions(b, r) for b, r in zip(base, runs, strict=True)]
    return beside([pair[0] for pair in pairs]), beside([pair[1] for pair in pairs])


def differences(base: Outcomes, other: Outcomes) -> dict[str, Figures]:
    """What `statistics.compare` finds, as JSON."""
    return {name: vars(difference) for name, difference in statistics.compare(base, other).items()}


def beside(runs: Sequence[Outcomes]) -> Outcomes:
    """The completions of several runs on the same questions, as more samples of each question."""
    names = ("correct", "tokens", "steps", "truncated", "votes")
    return Outcomes(**{name: np.concatenate([getattr(run, name) for run in runs], axis=1) for name in names})


def learnt(config: ConfigDict, workdir: Path, row: str) -> Figures | None:
    """What a row's thoughts do with their steps, read from the texts of the pictured split, all seeds.

    Returns:
        Means over completions: lines `before` the first right answer, that one included, and `after` it; the
        share of completions that `reached` it, and of these how many `left_it` again; `early`, the share that
        ended without it; `closed`, the share that closed the thinking. Then checks a completion by what they
        did (`step_grpo.data.tasks.reading`). None for questions that are not of the built-in families.
    """
    counted: list[dict[str, int]] = []
    for seed in config.seeds:
        path = workdir / "rows" / row / f"seed{seed}" / config.pictured / "completions.jsonl"
        # Not `splitlines`, which also splits at line ends of Unicode that a completion may hold.
        for line in path.read_text(encoding="utf-8").removesuffix("\n").split("\n"):
            said = json.loads(line)
            if family_of(said["prompt"]) is None:
                return None
            closed = {"closed": int(THINK_END in said["text"])}
            counted.append({**read(said["prompt"], said["text"]).counts(), **closed})
    means = {name: float(np.mean([one[name] for one in counted])) for name in counted[0]}
    left = float(np.mean([one["reached"] and not one["ends_right"] for one in counted]))
    reached = means["reached"]
    return {
        **{name: means[name] for name in ("before", "after", "reached", "closed", *VERDICTS)},
        "left_it": left / reached if reached else 0.0,
        "early": 1 - reached,
    }


def learnt_markdown(figures: Mapping[str, Figures | None], titles: Mapping[str, str]) -> str:
    """The same as a table; nothing where no row could be read."""
    read_rows = {row: own for row, own in figures.items() if own}
    if not read_rows:
        return ""
    head = ["", "lines to the right answer", "lines after it", "never reached it", "left it again"]
    head += ["thinking closed", *(f"{verdict} checks" for verdict in VERDICTS)]
    lines = ["", "## What the thoughts do", "", *table_head(head)]
    for row, own in read_rows.items():
        cells = [
            f"{own['before']:.2f}",
            f"{own['after']:.2f}",
            f"{own['early']:.1%}",
            f"{own['left_it']:.1%}",
            f"{own['closed']:.1%}",
        ]
        cells += [f"{own[verdict]:.2f}" for verdict in VERDICTS]
        lines.append(f"| {titles[row]} | {' | '.join(cells)} |")
    lines += [
        "",
        "Means over completions, read from the texts. A useful check repairs a slip, a redundant one "
        "confirms what is right, a missed one lets a slip pass, a harmful one replaces what was right. The "
        "thinking is closed by its tag, which the format asks for with `reward.closed_thinking` alone.",
    ]
    return "\n".join(lines) + "\n"


def rollouts(config: ConfigDict, workdir: Path, row: str) -> Figures | None:
    """What a row's training was given to learn from: means over its steps, and over the seeds.

    Returns:
        The share of completions that were right (`accuracy`) and that the exit policy cut short (`exited`),
        of groups with one reward for all (`equal_groups`), and tokens a completion in the `first` and the
        `last` step. None for a row that no rollouts trained.
    """
    if config.rows[row].kind != "train":
        return None
    folders = [workdir / "rows" / row / f"seed{seed}" / TRAINING for seed in config.seeds]
    seeds = [read_metrics(folder / "metrics.jsonl") for folder in folders]
    steps = [step for lines in seeds for step in lines]
    names = {"accuracy": "accuracy", "exited": "exit_early_exit", "equal_groups": "equal_groups"}
    return {
        **{name: float(np.mean([step[column] for step in steps])) for name, column in names.items()},
        "first": float(np.mean([lines[0]["tokens"] for lines in seeds])),
        "last": float(np.mean([lines[-1]["tokens"] for lines in seeds])),
    }


def rollouts_markdown(figures: Mapping[str, Figures | None], titles: Mapping[str, str]) -> str:
    """The same as a table; nothing where no row was trained by rollouts."""
    trained = {row: own for row, own in figures.items() if own}
    if not trained:
        return ""
    head = ("", "right", "cut short by an exit", "groups of one reward", "tokens, first step", "last step")
    lines = ["", "## What the rollouts were", "", *table_head(head)]
    for row, own in trained.items():
        cells = [f"{own[name]:.1%}" for name in ("accuracy", "exited", "equal_groups")]
        cells += [f"{own[name]:.1f}" for name in ("first", "last")]
        lines.append(f"| {titles[row]} | {' | '.join(cells)} |")
    lines += ["", "Of the completions that trained a row: means over the steps and the seeds."]
    return "\n".join(lines) + "\n"


def calibrations(config: ConfigDict, workdir: Path, rows: Sequence[str]) -> dict[str, Figures]:
    """What `step_grpo.probing` found of each row that was probed."""
    folders = {row: workdir / "rows" / row / f"seed{config.seeds[0]}" / PROBES for row in rows}
    files = {row: folder / "calibration.json" for row, folder in folders.items()}
    return {
        row: json.loads(file.read_text(encoding="utf-8")) for row, file in files.items() if file.is_file()
    }


def calibration_markdown(figures: Mapping[str, Figures], titles: Mapping[str, str]) -> str:
    """The same as a table; nothing where no row was probed."""
    if not figures:
        return ""
    delta = next(iter(figures.values()))["delta"]
    head = ("", "completions", "probes", "confidence", "right", "ECE", f"above {delta:g}", "of these right")
    lines = ["", "## Whether the confidence of a probe can be trusted", "", *table_head(head)]
    for row, own in figures.items():
        cells = [str(own["completions"]), str(own["count"])]
        shares = [own["accuracy"], own["share_above_delta"], own["precision_above_delta"]]
        right, above, precise = ("" if share is None else f"{share:.1%}" for share in shares)
        mean, ece = ("" if own[name] is None else f"{own[name]:.3f}" for name in ("confidence", "ece"))
        cells += [mean, right, ece, above, precise]
        lines.append(f"| {titles[row]} | {' | '.join(cells)} |")
    lines += [
        "",
        "Means over probes, one at every trigger of a completion, of the first seed; probes of one "
        "completion resemble each other. ECE is the mean distance of confidence and share right in ten bins "
        f"of equal width; early exit stops where the confidence is above {delta:g}. Rows whose completions "
        "were cut short while evaluating are left out.",
    ]
    return "\n".join(lines) + "\n"


def rebatching(config: ConfigDict, workdir: Path, row: str) -> Figures:
    """What refilling and packing lanes saved while a row was evaluated, against static batches (DREX).

    Of the first seed on the pictured split. Both make the same completions, so that their lane-steps compare
    without noise; seconds are those of two runs at different times.

    Raises:
        UserError: they made different completions.
    """
    folder = workdir / "rows" / row / f"seed{config.seeds[0]}"
    folders = [folder / config.pictured, folder / f"{config.pictured}_{STATIC}"]
    own_tokens, tokens = (read_recorded(f / "completions.jsonl").outcomes.tokens for f in folders)
    if not np.array_equal(own_tokens, tokens):
        raise UserError(f"{folders[1]}: static batches gave other completions than refilled lanes")
    costs = [json.loads((f / "evaluation.json").read_text(encoding="utf-8"))["cost"] for f in folders]
    own, static = costs
    return {
        "refilled": own,
        "static": static,
        "lane_steps_saved": 1 - own["lane_steps"] / static["lane_steps"],
        "seconds_saved": 1 - own["seconds"] / static["seconds"],
    }


def rebatching_markdown(figures: Mapping[str, Figures], titles: Mapping[str, str]) -> str:
    """The same as a table."""
    head = ("", "live share", "in static batches", "lane-steps saved", "time saved")
    lines = ["", "## Refilled and packed lanes against static batches", "", *table_head(head)]
    for row, own in figures.items():
        shares = [own["refilled"]["live_share"], own["static"]["live_share"]]
        cells = [*shares, own["lane_steps_saved"], own["seconds_saved"]]
        lines.append(f"| {titles[row]} | {' | '.join(f'{cell:.0%}' for cell in cells)} |")
    return "\n".join(lines) + "\n"


def pareto_front(figures: Mapping[str, Figures]) -> list[str]:
    """The rows that no other beats in tokens or in accuracy without losing in the other.

    Returns:
        Their names, by tokens.
    """

    def beats(one: Figures, other: Figures) -> bool:
        no_worse = one["tokens"] <= other["tokens"] and one["accuracy"] >= other["accuracy"]
        return no_worse and (one["tokens"] < other["tokens"] or one["accuracy"] > other["accuracy"])

    front = [row for row, own in figures.items() if not any(beats(other, own) for other in figures.values())]
    return sorted(front, key=lambda row: figures[row]["tokens"])


# ---------------------------------------------------------------------- tables

HEAD = (
    *("", "accuracy, %", "tokens", "median", "steps", "cut off, %"),
    *("against the first row: accuracy, points", "tokens, %"),
)


def table_head(names: Sequence[str]) -> list[str]:
    """The first two lines of a Markdown table."""
    return [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]


def table_rows(figures: Mapping[str, Figures], titles: Mapping[str, str]) -> list[tuple[str, ...]]:
    """The cells of a split's table; intervals in brackets, a star where a difference is significant."""

    def interval(own: Figures, name: str, scale: float, digits: int) -> str:
        mean, low, high = (scale * own[f"{name}{end}"] for end in ("", "_low", "_high"))
        return f"{mean:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"

    def difference(own: Figures, name: str) -> str:
        return told(own["against_base"][name]) if "against_base" in own else ""

    return [
        (
            titles[row],
            interval(own, "accuracy", 100, 1),
            interval(own, "tokens", 1, 1),
            f"{own['tokens_median']:.0f}",
            interval(own, "steps", 1, 2),
            f"{100 * own['truncated']:.1f}",
            difference(own, "accuracy"),
            difference(own, "tokens_relative"),
        )
        for row, own in figures.items()
    ]


def told(found: Mapping[str, float]) -> str:
    """A difference in hundredths with its interval, and a star where it is significant."""
    mean, low, high = (100 * found[end] for end in ("mean", "low", "high"))
    star = "*" if found["p_value"] < 1 - statistics.LEVEL else ""
    return f"{mean:+.1f}{star} ({low:+.1f} to {high:+.1f})"


def markdown(splits: Mapping[str, Mapping[str, Figures]], titles: Mapping[str, str]) -> str:
    """A table for each split."""
    lines: list[str] = []
    for split, figures in splits.items():
        questions = next(iter(figures.values()))["questions"]
        lines += [f"## {split}, {questions} questions", "", *table_head(HEAD)]
        lines += [f"| {' | '.join(cells)} |" for cells in table_rows(figures, titles)]
        lines.append("")
    lines.append(
        "Means over completions with 95 % intervals, bootstrapped over questions, all seeds' completions of "
        "a question together; cut off: by the length limit; * differs from the first row at the 5 % level "
        "(paired bootstrap)."
    )
    return "\n".join(lines) + "\n"


def earlier_markdown(results: Mapping[str, Any], titles: Mapping[str, str]) -> str:
    """Which rows another first row was the base of; nothing where all have the same."""
    if "earlier" not in results:
        return ""
    base = results["earlier"]["first_row"][results["study"]["pictured"]]
    names = ", ".join(titles[row].strip() for row in results["earlier"]["rows"])
    return (
        f"\nOf an earlier run, whose first row had an accuracy of {100 * base['accuracy']:.1f} % with "
        f"{base['tokens']:.1f} tokens: {names}.\n"
    )


def against_markdown(results: Mapping[str, Any], titles: Mapping[str, str]) -> str:
    """A table for each row of `config.also_against`: how the others differ from it, on every split."""
    lines: list[str] = []
    for name in results["study"]["also_against"]:
        splits = results["splits"]
        head = ["", *(f"{split}: {what}" for split in splits for what in ("accuracy, points", "tokens, %"))]
        rows = []
        for row in results["rows"]:
            found = [figures[row]["against"].get(name) for figures in splits.values()]
            if all(found):
                cells = [told(one[what]) for one in found for what in ("accuracy", "tokens_relative")]
                rows.append(f"| {' | '.join([titles[row], *cells])} |")
        if rows:
            lines += ["", f"## Against {titles[name].strip()}", "", *table_head(head), *rows]
    return "".join(f"{line}\n" for line in lines)


def seeds_markdown(results: Mapping[str, Any], titles: Mapping[str, str]) -> str:
    """What each seed came to on the pictured split; nothing where there is one seed."""
    seeds = results["study"]["seeds"]
    if len(seeds) < 2:
        return ""
    split = results["study"]["pictured"]
    names = [f"{what}, seed {seed}" for what in ("accuracy, %", "tokens") for seed in seeds]
    lines = ["", f"## {split}, seed by seed", "", *table_head(["", *names])]
    for row, own in results["splits"][split].items():
        cells = [f"{100 * one:.1f}" for one in own["accuracy_of_seeds"]]
        cells += [f"{one:.1f}" for one in own["tokens_of_seeds"]]
        lines.append(f"| {' | '.join([titles[row], *cells])} |")
    lines += [
        "",
        "Intervals above are of other questions; this is what another training, or sampling, changes.",
    ]
    return "".join(f"{line}\n" for line in lines)


def latex(splits: Mapping[str, Mapping[str, Figures]], titles: Mapping[str, str]) -> str:
    """The same tables for a paper; they need the package booktabs."""
    lines: list[str] = []
    for split, figures in splits.items():
        lines += [f"% {split}", rf"\begin{{tabular}}{{l{'r' * (len(HEAD) - 1)}}}", r"\toprule"]
        lines += [" & ".join(map(escaped, HEAD)) + r" \\", r"\midrule"]
        lines += [" & ".join(map(escaped, cells)) + r" \\" for cells in table_rows(figures, titles)]
        lines += [r"\bottomrule", r"\end{tabular}", ""]
    return "\n".join(lines)


def escaped(text: str) -> str:
    """Text as LaTeX writes it."""
    return "".join(f"\\{character}" if character in "%&_#$" else character for character in text)


# ---------------------------------------------------------------------- the picture


def picture(figures: Mapping[str, Figures], titles: Mapping[str, str], front: Sequence[str]) -> "Figure":
    """Accuracy against tokens, a point a row with its intervals, and the Pareto front.

    Rows whose title is indented are variants of a method: their marks are hollow.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415 (slow to import)
    from matplotlib.figure import Figure  # noqa: PLC0415

    figure = Figure(figsize=(9, max(6.0, 1.5 + 0.18 * len(figures))), layout="constrained")  # for the legend
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.plot(
        [figures[row]["tokens"] for row in front],
        [100 * figures[row]["accuracy"] for row in front],
        color="0.6", linestyle="--", zorder=1, label="Pareto front",
    )  # fmt: skip
    marks = "osD^vP*X<>pHh8d"
    for i, (row, own) in enumerate(figures.items()):
        x, y = own["tokens"], 100 * own["accuracy"]
        axes.errorbar(
            x, y,
            xerr=[[x - own["tokens_low"]], [own["tokens_high"] - x]],
            yerr=[[y - 100 * own["accuracy_low"]], [100 * own["accuracy_high"] - y]],
            fmt=marks[i % len(marks)], color=f"C{i % 10}", capsize=2, elinewidth=0.8, label=titles[row],
            markerfacecolor="white" if titles[row].startswith(" ") else f"C{i % 10}",
        )  # fmt: skip
    axes.set_xlabel("tokens a completion, mean")
    axes.set_ylabel("accuracy, %")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure
