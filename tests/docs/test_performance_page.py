"""The page of figures says what the last run of the benchmarks wrote."""

from xml.etree import ElementTree as ET

import pytest

from benchmarks import curves, plot, report
from benchmarks.__main__ import PICTURES
from benchmarks.cases import Goal


@pytest.mark.parametrize("suite", PICTURES)
def test_the_page_shows_the_results_that_were_last_written(suite):
    page = report.PAGE.read_text(encoding="utf-8")
    assert report.with_block(page, suite) == page


def test_the_readme_shows_the_same_figures():
    readme = report.README.read_text(encoding="utf-8")
    assert report.readme_with_speed(readme) == readme


def test_the_readme_leaves_out_what_the_results_do_not_have(monkeypatch):
    results = {suite: report.load(suite) for suite in PICTURES}
    results["embedded"] = [result for result in results["embedded"] if result["against"] != "huey"]
    monkeypatch.setattr(report, "load", results.__getitem__)
    readme = report.readme_with_speed(report.README.read_text(encoding="utf-8"))
    assert "| persist-queue |" in readme
    assert "| huey |" not in readme


def test_each_result_says_what_was_measured_where():
    results = [result for suite in PICTURES for result in report.load(suite)]
    assert len(results) > 10
    for result in results:
        assert {"case", "value", "unit", "ratio", "against", "goal", "met", "machine", "versions"} <= set(result)


SVG = "{http://www.w3.org/2000/svg}"


def drawn():
    return ET.fromstring(plot.svg(report.load("embedded")))


def texts(root, kind=None):
    return [text for text in root.iter(f"{SVG}text") if kind in (None, text.get("class"))]


@pytest.mark.parametrize("suite", PICTURES)
def test_the_picture_shows_the_results_that_were_last_written(suite):
    assert report.plot_path(suite).read_text(encoding="utf-8") == PICTURES[suite](report.load(suite))


def test_the_picture_says_what_it_is_where_and_when_it_was_measured():
    root, machine = drawn(), report.load("embedded")[0]["machine"]
    words = " ".join(text.text for text in texts(root))
    assert all(fact in words for fact in (machine["measured"], machine["processor"], machine["system"]))
    assert all(legend in words for legend in ("Trunkline, goal missed", "compared with", "goal; if it is a ratio"))
    assert float(root.get("height")) < 1300


def test_each_goal_is_drawn_and_each_missed_one_is_marked():
    root, cases = drawn(), {}
    for result in report.load("embedded"):
        if result["goal"]:
            cases.setdefault(result["case"], []).append(result["met"])
    missed = sum(False in met for met in cases.values())
    assert len(texts(root, "missed")) == missed
    assert all(text.text.endswith(": missed") for text in texts(root, "missed"))
    assert (
        len([line for line in root.iter(f"{SVG}line") if line.get("class") == "goal"]) == len(cases) + 1
    )  # the legend
    bars = [bar for bar in root.iter(f"{SVG}rect") if bar.get("class") == "missed"]
    assert len(bars) == missed + 1


def test_a_goal_that_is_a_ratio_stands_where_the_figure_would_have_to_be():
    goal = Goal(0.8, of="ratio").text("/s")
    result = report.load("embedded")[0] | {
        "case": "speed", "value": 400.0, "unit": "/s", "against_value": 1000.0, "goal": goal, "met": False,
    }  # fmt: skip
    root = ET.fromstring(plot.svg([result]))
    (_, line) = root.iter(f"{SVG}line")  # the first is the legend's
    (_, bar) = (bar for bar in root.iter(f"{SVG}rect") if bar.get("class") == "missed")
    assert float(line.get("x1")) == plot.BARS + plot.ROOM * 0.8
    assert float(bar.get("width")) == plot.ROOM * 0.4
    (verdict,) = texts(root, "missed")
    assert verdict.text == f"goal {goal.replace('against', 'the other')}: missed"


def test_no_goal_runs_through_a_word_and_no_word_leaves_the_picture():
    root = drawn()
    lines = [(float(line.get("x1")), float(line.get("y1")), float(line.get("y2"))) for line in root.iter(f"{SVG}line")]
    for text in texts(root):
        width = len(text.text) * (9.5 if text.get("class") == "title" else 8 if text.get("class") == "head" else 7)
        x, y = float(text.get("x")), float(text.get("y"))
        left = x - width if text.get("text-anchor") == "end" else x
        assert left >= 0
        assert left + width <= plot.WIDTH
        assert not [at for at, top, end in lines if left < at < left + width and top < y and y - 9 < end], text.text


def test_scaling_is_drawn_as_a_line_for_each_broker_that_passes_through_what_was_measured():
    results = report.load("scaling")
    root = ET.fromstring(curves.svg(results))
    brokers = {result["case"].rpartition(", ")[0] for result in results}
    lines = [line for line in root.iter(f"{SVG}polyline") if "leader" not in line.get("class")]
    assert len(lines) == len(curves.PANELS) * len(brokers)
    assert sum(len(line.get("points").split()) for line in lines) == len(results) + len(lines)  # and where each begins
    assert all(len([text for text in texts(root) if text.text == broker]) == len(curves.PANELS) for broker in brokers)


def test_no_word_of_a_line_touches_another_and_none_leaves_the_picture():
    boxes = []
    for text in texts(ET.fromstring(curves.svg(report.load("scaling")))):
        width = len(text.text) * (9.5 if text.get("class") == "title" else 7.5)
        x, y = float(text.get("x")), float(text.get("y"))
        left = x - width * {"start": 0, "middle": 0.5, "end": 1}[text.get("text-anchor")]
        assert left >= 0
        assert left + width <= curves.WIDTH
        assert not [words for words, a, b, c in boxes if a < left + width and left < b and abs(c - y) < 12], text.text
        boxes.append((text.text, left, left + width, y))
