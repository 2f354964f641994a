"""What the account of a run takes for one message, and what it lets pass."""

from __future__ import annotations

import pytest

from trunkline import Stream, Topic
from trunkline.message import Message
from trunkline.outcome import ACK, DeadLetter
from trunkline.store import Unit
from trunkline.testing.simulator.account import Account, Expected
from trunkline.transport import Delivery, Staged, Subscription

facts = Stream("account-facts", key="key")
reader = Subscription("reader", facts)
LABEL = reader.label


def message(number: str, tenant: str | None = None) -> Message:
    return Message(number, "fact", "/test", b"{}", 0.0, "key", tenantid=tenant)


def handled(one: Message, position: int, outcome=ACK, *, duplicate: bool = False, staged=()) -> Unit:
    unit = Unit((Delivery(reader, one, None, "key", position, 0),), lambda _unit, _error: None)
    unit.outcome, unit.duplicate, unit.staged = outcome, duplicate, staged
    return unit


def account_of(channel=facts, *, late=frozenset(), holding=frozenset({LABEL})) -> Account:
    return Account(Expected({channel.name: [LABEL]}, {LABEL: {"fact"}}, late, holding))


def closed(account: Account) -> list[str]:
    account.close(set(), allow_dead=True)
    return [violation.promise for violation in account.violations]


def test_one_id_of_two_tenants_is_two_messages():
    account = account_of()
    for tenant in ("one", "two"):
        account.offered(message("1", tenant))
        account.confirmed.add(account_subject := next(reversed(account.messages)))
        account.was_stored(facts, message("1", tenant), [LABEL])
        assert tenant in account_subject
    account.committed(handled(message("1", "one"), 1))
    assert closed(account) == ["nothing lost"]


def test_what_a_duplicate_staged_is_not_to_leave():
    account = account_of()
    other = message("2")
    account.committed(handled(message("1"), 1, duplicate=True, staged=(Staged(facts, other),)))
    account.was_stored(facts, other, [LABEL])
    assert closed(account) == ["nothing invented"]


@pytest.mark.parametrize(("holding", "promises"), [({LABEL}, ["order per key"]), (set(), [])])
def test_a_dead_letter_may_be_overtaken_only_where_it_holds_nothing(holding, promises):
    account = account_of(holding=holding)
    account.committed(handled(message("1"), 1, DeadLetter("handler", "no")))
    account.committed(handled(message("2"), 2))
    account.committed(handled(message("1"), 1))
    assert closed(account) == promises


@pytest.mark.parametrize(("there", "promises"), [([LABEL], ["nothing lost"]), ([], [])])
def test_who_comes_late_misses_what_was_published_before(there, promises):
    topic = Topic("account-topic")
    account = account_of(topic, late={LABEL})
    account.offered(message("1"))
    account.confirmed.update(account.messages)
    account.was_stored(topic, message("1"), there)
    assert closed(account) == promises
