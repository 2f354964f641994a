"""Run the suite on all transports, or those named, and write results and support matrix: `make matrix`."""

import asyncio
import logging
import sys
import tempfile
from pathlib import Path

from tests.conformance.transports import TRANSPORTS, make_bench
from trunkline.testing.conformance import cases, result_of
from trunkline.testing.conformance.matrix import Report, page, read_reports, write_report
from trunkline.transport import parse_address

RESULTS = Path(__file__).parent / "results"
PAGE = Path(__file__).parents[2] / "docs" / "reference" / "support-matrix.md"


async def record(name: str) -> Report:
    setup = TRANSPORTS[name]
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for case in cases():
            bench = await make_bench(setup, Path(folder), case)
            result = await result_of(case, bench)
            print(f"{name}: {result.outcome:7} {result.case} ({result.seconds:.1f} s) {result.note[:200]}", flush=True)
            results.append(result)
    store = parse_address(bench.store_url).scheme
    return Report(name, setup.scheme, store, setup.setting, bench.capabilities, results)


def main(names: list[str]) -> int:
    logging.getLogger("trunkline").setLevel(logging.CRITICAL)
    RESULTS.mkdir(exist_ok=True)
    failed = 0
    for name in names or TRANSPORTS:
        report = asyncio.run(record(name))
        failed += sum(result.outcome == "failed" for result in report.results)
        write_report(report, RESULTS / f"{name}.json")
    PAGE.write_text(page(read_reports(RESULTS)), encoding="utf-8")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
