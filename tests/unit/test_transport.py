"""What a Subscription says to transports."""

from datetime import UTC, datetime, timedelta, timezone

import pytest

from trunkline import Stream
from trunkline.transport import Subscription

LOG = Stream("log")
NOON = datetime(2025, 11, 1, 12, tzinfo=UTC)


@pytest.mark.parametrize(
    "start",
    [NOON, NOON + timedelta(microseconds=999_999), NOON.astimezone(timezone(timedelta(hours=-8)))],
    ids=str,
)
def test_a_time_to_start_at_is_its_second_whatever_the_zone(start):
    assert Subscription("replay", LOG, start).since_s == NOON.timestamp()


def test_a_time_before_the_epoch_is_the_first_second():
    assert Subscription("replay", LOG, datetime(1, 1, 1, tzinfo=timezone(timedelta(hours=14)))).since_s == 1


@pytest.mark.parametrize("start", ["earliest", "latest"])
def test_a_word_is_no_time(start):
    assert Subscription("replay", LOG, start).since_s is None
