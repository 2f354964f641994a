"""Every transport passes the suite that we give to the writers of transports."""

import pytest

from tests.conformance.transports import TRANSPORTS, make_bench
from trunkline.testing.conformance import cases, run_case


@pytest.fixture(params=[pytest.param(name, marks=pytest.mark.xdist_group(f"suite-{name}")) for name in TRANSPORTS])
async def bench(request, tmp_path):
    # One worker per broker: the suite restarts it.
    case = request.node.callspec.params["case"]
    async with await make_bench(TRANSPORTS[request.param], tmp_path, case) as made:
        yield made


@pytest.mark.timeout(300)
@pytest.mark.parametrize("case", cases(), ids=str)
async def test_conformance(case, bench):
    if reason := case.not_applicable(bench):
        pytest.skip(reason)
    await run_case(case, bench)
