"""The page of figures says what the last run of the benchmarks wrote."""

import json
from pathlib import Path

from benchmarks import report

ROOT = Path(__file__).parents[2]


def test_the_page_shows_the_results_that_were_last_written():
    page = report.PAGE.read_text(encoding="utf-8")
    assert report.with_block(page, "embedded") == page


def test_the_readme_shows_the_same_figures():
    readme = report.README.read_text(encoding="utf-8")
    assert report.readme_with_speed(readme) == readme


def test_each_result_says_what_was_measured_where():
    results = json.loads((ROOT / "benchmarks" / "results" / "embedded.json").read_text(encoding="utf-8"))
    assert len(results) > 10
    for result in results:
        assert {"case", "value", "unit", "ratio", "against", "goal", "met", "machine", "versions"} <= set(result)
