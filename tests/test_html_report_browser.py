"""The page of a run in a browser: headless Chromium, where there is one.

`STEP_GRPO_TEST_SCREENSHOTS=DIR` keeps a picture of each width and colour scheme, to be looked at.
"""

import os
import shutil
from pathlib import Path

import pytest
from html_report_files import HOSTILE, metrics, write_workdir

from step_grpo.html_report.page import write_report

sync_api = pytest.importorskip(
    "playwright.sync_api", reason="playwright is not there: pip install -e '.[test]'"
)
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(
    not CHROMIUM, reason="no chromium on the PATH (Debian: apt-get install chromium)"
)
FLAGS = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)
LOOKS = [(width, scheme) for width in (1280, 390) for scheme in ("light", "dark")]


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=list(FLAGS))
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> Path:
    """A report whose every text from outside tries to run a script."""
    return write_report(write_workdir(tmp_path_factory.mktemp("run"), hostile=HOSTILE))


@pytest.fixture
def opened(browser, report, request):
    """The page, at a width and in a colour scheme; in the end it asked for and complained of nothing."""
    width, scheme = getattr(request, "param", LOOKS[0])
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    said, asked = [], []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda sent: asked.append(sent.url))
    page.goto(report.as_uri())
    yield page
    assert page.evaluate("window.hacked") is None
    page.close()
    assert said == []
    assert asked == [report.as_uri()]


def detail(page, name):
    return page.locator(f"[data-list={name}] .detail")


@pytest.mark.parametrize("opened", LOOKS, indirect=True, ids=[f"{w}-{s}" for w, s in LOOKS])
def test_nothing_serious_is_found_by_axe_and_nothing_is_wider_than_the_screen(opened, request):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    opened.evaluate("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
    found = axe.run(opened).response
    bad = [
        (v["id"], v["nodes"][0]["html"])
        for v in found["violations"]
        if v["impact"] in ("serious", "critical")
    ]
    assert bad == []
    assert "color-contrast" in {rule["id"] for rule in found["passes"]}
    width = opened.viewport_size["width"]
    assert opened.evaluate("document.documentElement.scrollWidth") <= width
    if folder := os.environ.get("STEP_GRPO_TEST_SCREENSHOTS"):
        opened.screenshot(path=Path(folder) / f"{request.node.callspec.id}.png", full_page=True)


def test_colours_follow_the_scheme(browser, report):
    def colours(scheme):
        page = browser.new_page(color_scheme=scheme)
        page.goto(report.as_uri())
        found = page.evaluate(
            "(({color, backgroundColor: back}) => [color, back])(getComputedStyle(document.body))"
        )
        page.close()
        return found

    light, dark = colours("light"), colours("dark")
    assert light[0] != dark[0] and light[1] != dark[1]


def test_script_in_a_completion_stays_text(opened):
    assert HOSTILE in detail(opened, "rollouts").locator("pre").inner_text()
    assert HOSTILE in detail(opened, "pairs").locator("pre").first.inner_text()
    assert opened.locator("img").count() == 0
    assert opened.locator("script").count() == 2


def test_marks_show_trigger_probes_exit_and_forced_tokens(opened):
    text = detail(opened, "rollouts").locator("pre")
    assert text.locator("mark.trigger").all_inner_texts() == ["Wait"]
    assert text.locator(".probe").all_inner_texts() == ["probe 0.500", "probe 0.980"]
    assert text.locator(".probe.passed").all_inner_texts() == ["probe 0.980"]
    assert text.locator(".exit").all_inner_texts() == ["exit: early_exit"]
    assert "</think>" in text.locator("mark.forced").inner_text()
    asked = detail(opened, "pairs").locator(".probe").all_inner_texts()
    assert asked == ["probe 0.250: 7 (wrong)", "probe 0.750: 7 (right)"]


def test_filters_leave_what_fits_and_say_how_many(opened):
    viewer = opened.locator("[data-list=rollouts]")
    shown, count = viewer.locator("option[value]", has_text="step"), viewer.locator("output")
    assert (shown.count(), count.inner_text()) == (3, "(3 of 3)")
    viewer.locator("[name=reason]").select_option("early_exit")
    assert count.inner_text() == "(2 of 3)"
    viewer.locator("[name=correct]").select_option("wrong")
    assert shown.all_inner_texts() == ["step 3 · wrong · early_exit · 20 tokens"]
    viewer.locator("[name=text]").fill("no such text")
    assert count.inner_text() == "(0 of 3)"
    assert detail(opened, "rollouts").inner_text() == "Nothing fits these filters."
    pairs = opened.locator("[data-list=pairs]")
    pairs.locator("[name=change]").select_option("wrong to right")
    assert pairs.locator("output").inner_text() == "(1 of 2)"


def test_lists_are_read_by_keyboard_alone(opened):
    opened.keyboard.press("Tab")
    assert opened.evaluate("document.activeElement.textContent") == "Skip to the figures"
    opened.keyboard.press("Enter")
    reached = set()
    for _ in range(80):
        opened.keyboard.press("Tab")
        reached.add(opened.evaluate("document.activeElement.id || document.activeElement.name"))
        if opened.evaluate("document.activeElement.id") == "pick-rollouts":
            break
    assert {"reason", "correct", "text", "pick-rollouts"} <= reached
    opened.keyboard.press("ArrowDown")
    assert "natural: the model closed" in detail(opened, "rollouts").inner_text()
    for key in ("Tab", "Tab", "Enter"):  # previous, next
        opened.keyboard.press(key)
    assert "wrong" in detail(opened, "rollouts").inner_text()
    assert "early exit: a probe passed" in detail(opened, "rollouts").inner_text()


def test_pointer_tells_the_figures_of_the_step_below_it(opened):
    plot = opened.locator("#tokens .plot svg")
    plot.scroll_into_view_if_needed()
    box = plot.bounding_box()
    plot.hover(position={"x": box["width"] * 348 / 360, "y": 60})
    last = metrics()[-1]
    said = opened.locator("#tokens .tip").inner_text().split("\n")
    assert said[:2] == [f"step {last['step']}", f"tokens {last['tokens']:g}"]
