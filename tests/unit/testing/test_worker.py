"""The worker of fault tests: what its handlers do."""

import pytest

from tests.unit.rig import Rig, until
from trunkline.clock import ManualClock
from trunkline.testing.ledger import Kind, read_journal
from trunkline.testing.lines import Line, Spec
from trunkline.testing.worker import Consumer, Host, Plan


@pytest.mark.blocking_calls("workers write their journals at once")
async def test_a_handler_fails_once_for_a_message_however_many_processes_try_it(tmp_path):
    spec = Spec("queue", "worker-jobs")
    plan = Plan(
        role="consume", transport="", store="", lines=[spec], journal=str(tmp_path / "j"), name="worker", fail_every=97
    )  # fmt: skip
    rig = Rig(f"sqlite:///{tmp_path}/t.db", ManualClock())

    def seen(kind):
        return sum(1 for entry in read_journal(tmp_path / "j") if entry.kind is kind)

    first, second = Consumer(plan, Host()), Consumer(plan, Host())
    async with rig.run(first.service) as app:
        await app.publish(Line(spec).message(97, "key0", producer="p"))
        await until(lambda: "parked" in rig.kinds())
    async with rig.run(second.service):
        await rig.clock.advance(1)
        await until(lambda: seen(Kind.DELIVERED) == 2)
    assert seen(Kind.EFFECT) == 1
