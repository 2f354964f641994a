"""The support matrix is what the recorded results give, and has every case and transport in it."""

from tests.conformance.record import PAGE, RESULTS
from tests.conformance.transports import TRANSPORTS
from trunkline.testing.conformance import cases
from trunkline.testing.conformance.matrix import page, read_reports


def test_the_page_is_what_the_results_give():
    assert PAGE.read_text(encoding="utf-8") == page(read_reports(RESULTS)), "run: make matrix"


def test_every_transport_has_results_of_every_case():
    reports = {report.name: report for report in read_reports(RESULTS)}
    assert sorted(reports) == sorted(TRANSPORTS)
    for report in reports.values():
        assert sorted(result.case for result in report.results) == sorted(case.name for case in cases()), report.name


def test_no_recorded_case_fails():
    failed = [
        f"{report.name}: {result.case}"
        for report in read_reports(RESULTS)
        for result in report.results
        if result.outcome == "failed"
    ]
    assert not failed
