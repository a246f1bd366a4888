"""The page of a run, read without a browser."""

import dataclasses
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from html_report_files import HOSTILE, metrics, rollout, write_workdir

from step_grpo.errors import UserError
from step_grpo.html_report import charts, figures, viewer
from step_grpo.html_report.page import write_report
from step_grpo.html_report.picture import draw_run
from step_grpo.html_report.read import read_rows, read_run
from step_grpo.statistics import wilson_interval

VOID = {"meta", "link", "input", "br", "img", "rect", "line", "path", "circle"}


class Page(HTMLParser):
    """Elements of a page: tables by the id of their figure, scripts, attributes; and whether tags nest."""

    def __init__(self, text: str):
        super().__init__()
        self.tables: dict[str, list[list[str]]] = {}
        self.pictures: dict[str, int] = {}
        self.scripts: list[tuple[dict[str, str | None], str]] = []
        self.attributes: list[tuple[str, str, str | None]] = []
        self._open: list[str] = []
        self._figure, self._cell = "", False
        self.feed(text)
        self.close()
        assert not self._open

    def handle_starttag(self, tag, attrs):
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag not in VOID:
            self._open.append(tag)
        if tag == "figure":
            self._figure = dict(attrs)["id"]
        elif tag == "tr" and self._figure:
            self.tables.setdefault(self._figure, []).append([])
        elif tag in ("th", "td") and self._figure:
            self.tables[self._figure][-1].append("")
            self._cell = True
        elif tag == "path" and self._figure:
            self.pictures[self._figure] = self.pictures.get(self._figure, 0) + 1
        elif tag == "script":
            self.scripts.append((dict(attrs), ""))

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag):
        assert self._open.pop() == tag
        if tag == "figure":
            self._figure = ""
        self._cell &= tag not in ("th", "td")

    def handle_data(self, data):
        if self._cell and self._figure:
            self.tables[self._figure][-1][-1] += data
        if self._open and self._open[-1] == "script":
            attributes, text = self.scripts[-1]
            self.scripts[-1] = attributes, text + data

    def texts(self):
        """The JSON that the script shows."""
        (text,) = [text for attributes, text in self.scripts if attributes.get("type") == "application/json"]
        return json.loads(text)


def page_of(folder):
    return Page(write_report(folder).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    return page_of(write_workdir(tmp_path_factory.mktemp("run")))


# ---------------------------------------------------------------------- figures


def drawn():
    for curves in (*figures.CURVES, figures.SPEED):
        for name, said in curves.names.items():
            if any(name in line for line in metrics()):
                yield curves.key, name, said
    for reason in ("early_exit", "natural"):
        yield "exits", f"exit_{reason}", reason
    for name, said in figures.STAGES.items():
        yield "time", name, said
    yield "confidence", "confidence_p90", "90 %"


@pytest.mark.parametrize(("figure", "name", "said"), list(drawn()))
def test_figures_of_the_page_are_those_of_the_metrics(page, figure, name, said):
    heads, *rows = page.tables[figure]
    shown = {float(row[0]): row[heads.index(said)] for row in rows}
    assert list(shown) == [line["step"] for line in metrics()]
    for line in metrics():
        value = line.get(name)
        assert (
            shown[line["step"]] == ""
            if value is None
            else float(shown[line["step"]]) == pytest.approx(value, rel=1e-5)
        )


def test_interval_is_two_standard_errors_on_either_side_and_a_share_stays_one(page):
    heads, *rows = page.tables["accuracy"]
    low, high = map(float, rows[0][heads.index("accuracy, 95 % interval")].split(" to "))
    assert (low, high) == pytest.approx((0.45 - 1.96 * 0.04, 0.45 + 1.96 * 0.04), abs=1e-4)
    certain = figures.with_interval(
        [{"a": 0.99, "a_error": 0.1}], "a", charts.Series("a", [0.99], "c1"), True
    )
    assert list(certain.high) == [1.0]


def test_time_is_the_sum_of_the_steps_and_the_evaluations(tmp_path):
    run = read_run(write_workdir(tmp_path))
    spent = {part.name: part for part in figures.time_spent(run)}
    seconds = {
        "rollout": 15.0,
        "grading": 1.5,
        "update": 9.0,
        "evaluation before": 4.0,
        "evaluation after": 3.0,
    }
    compiling = spent.pop("compiling, in rollout and update")
    assert {name: part.seconds for name, part in spent.items()} == seconds
    assert sum(part.share for part in spent.values()) == pytest.approx(1)
    assert compiling.seconds == 3.0
    whole = {part.name: part.seconds for part in figures.time_spent(dataclasses.replace(run, seconds=40.0))}
    assert whole["loading, saving and the rest"] == 40.0 - sum(seconds.values())


def test_calibration_is_that_of_a_loop_over_the_probes():
    rng = np.random.default_rng(0)
    rows = [
        {"confidence": float(c), "correct": bool(rng.random() < c**2)} for c in [*rng.random(300), 0.0, 1.0]
    ]
    bins, error = figures.calibration(rows)
    wanted = 0.0
    for i in range(10):
        inside = [
            r for r in rows if i / 10 <= r["confidence"] < (i + 1) / 10 or (i == 9 and r["confidence"] == 1)
        ]
        right = sum(r["correct"] for r in inside)
        wanted += abs(right - sum(r["confidence"] for r in inside)) / len(rows)
        assert (bins[i].count, bins[i].accuracy) == (len(inside), pytest.approx(right / len(inside)))
        assert (bins[i].low, bins[i].high) == wilson_interval(right, len(inside))
    assert error == pytest.approx(wanted)


def test_stacked_areas_fill_the_height_where_the_shares_sum_to_one():
    layers = [charts.Series("a", [0.25, 0.5], "c1"), charts.Series("b", [0.75, 0.5], "c2")]
    drawing = charts.stacked_chart("t", [1, 2], layers, share=True)
    low, high = re.findall(r'd="M([^"]*)" class="area', drawing)
    points = [[tuple(map(float, p.split(","))) for p in path.split("L")] for path in (low, high)]
    assert points[1][:2] == [(charts.LEFT, charts.TOP), (charts.RIGHT, charts.TOP)]
    assert points[0][2:] == [(charts.RIGHT, charts.BOTTOM), (charts.LEFT, charts.BOTTOM)]
    assert points[0][:2] == points[1][:1:-1]  # the second lies upon the first


def test_curve_is_broken_where_a_value_is_missing():
    drawing = charts.line_chart(
        "t", [1, 2, 3, 4, 5, 6], [charts.Series("a", [1, 2, None, 4, None, 6.0], "c1")]
    )
    assert drawing.count('class="line c1"') == 1
    assert drawing.count("<circle") == 2


@pytest.mark.parametrize(
    ("low", "high"), [(0.0, 1.0), (3.0, 3.0), (0.0, 0.0), (-2e-7, 9e-7), (17.0, 83219.0)]
)
def test_ticks_are_round_and_enclose_the_range(low, high):
    ticks = charts.nice_ticks(low, high)
    assert ticks[0] <= low + 1e-12 and ticks[-1] >= high - 1e-12 and 2 <= len(ticks) <= 8
    steps = np.diff(ticks)
    assert np.allclose(steps, steps[0])


def test_histogram_counts_every_value_once(tmp_path):
    completions = {"before": [{"tokens": t} for t in (1, 1, 50, 100)], "after": [{"tokens": 7}]}
    figure = figures.lengths_figure(completions)
    assert [sum(int(row[i]) for row in figure.table.rows) for i in (1, 2)] == [4, 1]


# ---------------------------------------------------------------------- texts


def strings(value):
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for inside in value.values() if isinstance(value, dict) else value:
            yield from strings(inside)


def test_what_others_wrote_adds_no_markup(tmp_path, page):
    """Every text is hostile: the page has the same elements and attributes as with tame ones."""
    (tmp_path / HOSTILE.replace("/", "")[:40]).mkdir()
    folder = write_workdir(tmp_path / HOSTILE.replace("/", "")[:40], hostile=HOSTILE)
    hostile = page_of(folder)
    assert {tag for tag, *_ in hostile.attributes} == {tag for tag, *_ in page.attributes}
    assert {name for _, name, _ in hostile.attributes} == {name for _, name, _ in page.attributes}
    assert len(hostile.scripts) == 2
    assert sum(HOSTILE in said for said in strings(hostile.texts())) == 3  # and none of it is lost
    assert "+50.0 points" in (folder / "report.html").read_text(encoding="utf-8")  # nor are the evaluations


def test_page_loads_nothing_and_lets_only_its_own_script_run(page):
    loads = {"src", "href", "action", "data", "poster", "srcset", "xlink:href"}
    addresses = [value for _, name, value in page.attributes if name in loads]
    assert addresses
    assert all(value.startswith("#") or value == "data:," for value in addresses)
    assert not [name for _, name, _ in page.attributes if name.startswith("on") or name == "style"]
    (policy,) = [v for tag, name, v in page.attributes if tag == "meta" and v and "default-src" in v]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert re.search(r"script-src 'sha256-[A-Za-z0-9+/=]{44}'", policy)


def test_pairs_are_the_same_question_before_and_after_with_its_probes_in_order(page):
    first, second = page.texts()["pairs"]
    assert (first["id"], first["before"]["correct"], first["after"]["correct"]) == ("q1", False, True)
    kinds = [s["kind"] for s in first["before"]["segments"]]
    assert kinds == ["text", "probe", "trigger", "text", "probe", "trigger", "text", "exit", "text"]
    asked = [s["confidence"] for s in first["before"]["segments"] if s["kind"] == "probe"]
    assert asked == [0.25, 0.75]
    assert not [s for s in second["before"]["segments"] if s["kind"] == "probe"]


def test_probes_that_fit_neither_evaluation_or_both_are_shown_with_none(tmp_path):
    folder = write_workdir(tmp_path)
    (folder / "completions_after.jsonl").write_text((folder / "completions_before.jsonl").read_text())
    segments = [
        s for side in ("before", "after") for p in viewer.pairs(read_run(folder)) for s in p[side]["segments"]
    ]
    assert "trigger" in {s["kind"] for s in segments}
    assert "probe" not in {s["kind"] for s in segments}


def test_texts_beyond_the_budget_are_left_out_evenly():
    rows = [{"step": i} for i in range(100)]
    kept = viewer.spread(rows, [10] * 100, most=250)
    assert [row["step"] for row in kept] == list(range(0, 100, 4))
    assert viewer.spread(rows, [10] * 100, most=1000) == rows
    assert len(viewer.spread(rows[:1], [10**9])) == 1


def test_probes_are_also_found_where_the_readme_lets_them_be_written(tmp_path):
    folder = write_workdir(tmp_path)
    here = page_of(folder).tables["reliability"]
    (folder / "probes").mkdir()
    (folder / "probes.jsonl").rename(folder / "probes" / "probes.jsonl")
    assert page_of(folder).tables["reliability"] == here and len(here) == 3


# ---------------------------------------------------------------------- the picture of a run


@pytest.mark.parametrize("everything", [True, False])
def test_picture_is_drawn_also_without_evaluations(everything, tmp_path):
    run = read_run(write_workdir(tmp_path, everything=everything))
    for name in ("run.png", "run.svg"):
        draw_run(run, tmp_path / "images" / name)
    assert (tmp_path / "images" / "run.png").read_bytes().startswith(b"\x89PNG")
    drawn = (tmp_path / "images" / "run.svg").read_text(encoding="utf-8")
    assert drawn.count("<!-- right answers, % -->") == 1
    ends = {f"{name}-{when}" for name in ("accuracy", "tokens", "steps") for when in ("before", "after")}
    assert {end for end in ends if f'id="{end}"' in drawn} == (ends if everything else set())


def test_picture_of_another_kind_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"run\.gif: it must end in \.png or \.svg"):
        draw_run(read_run(write_workdir(tmp_path)), tmp_path / "run.gif")


# ---------------------------------------------------------------------- what is not there


def test_missing_parts_are_told_and_the_rest_is_drawn(tmp_path):
    text = write_report(write_workdir(tmp_path, everything=False)).read_text(encoding="utf-8")
    page = Page(text)
    assert "accuracy" in page.tables and "lengths" not in page.tables
    for said in (
        "There is no evaluation in this workdir",
        "It needs completions_before.jsonl or completions_after.jsonl",
        "this workdir has no rollouts.jsonl",
        "in a probes.jsonl or probes/probes.jsonl; this workdir has none",
        "There are no completions of an evaluation",
        "The settings are not there",
    ):
        assert said in text, said


def test_run_that_goes_on_has_no_after_and_a_torn_line_is_not_read(tmp_path):
    folder = write_workdir(tmp_path)
    for name in ("result.json", "completions_after.jsonl"):
        (folder / name).unlink()
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "acc')
    text = write_report(folder).read_text(encoding="utf-8")
    assert "the run has not come to its end" in text
    assert "before: 50.0 %" not in text
    assert len(Page(text).tables["accuracy"]) == 1 + len(metrics())


def test_single_step_and_a_step_without_exits_are_drawn(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 1, "accuracy": 0.5, "exit_natural": 1.0}\n{"step": 2}\n'
    )
    assert page_of(tmp_path).pictures["exits"] == 1
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "accuracy": 0.5, "exit_natural": 1.0}\n')
    assert page_of(tmp_path).pictures["exits"] == 1


def test_line_ends_of_unicode_inside_a_text_split_no_line(tmp_path):
    rows = [{"text": "a\u2028b\x85c"}, {"text": "d"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows))
    assert read_rows(tmp_path / "rows.jsonl") == rows


def test_folder_that_is_no_run_is_refused_by_name(tmp_path):
    with pytest.raises(UserError, match=f"{tmp_path} has no metrics.jsonl"):
        write_report(tmp_path)


# ---------------------------------------------------------------------- a real run


def test_run_leaves_a_page_of_its_own_figures(finished_run):
    page = Page((finished_run.workdir / "report.html").read_text(encoding="utf-8"))
    heads, *rows = page.tables["tokens"]
    shown = [float(row[heads.index("tokens")]) for row in rows]
    assert shown == pytest.approx([line["tokens"] for line in finished_run.metrics], rel=1e-5)
    texts = page.texts()
    assert len(texts["rollouts"]) == finished_run.config.log.rollouts * finished_run.config.steps
    assert len(texts["pairs"]) == finished_run.config.eval.questions


def test_rollout_of_these_tests_looks_like_one_of_a_run(finished_run):
    real = read_rows(finished_run.workdir / "rollouts.jsonl")
    assert {name: type(v) for name, v in real[0].items()} == {
        name: type(v) for name, v in rollout(1, "natural", True).items()
    }
