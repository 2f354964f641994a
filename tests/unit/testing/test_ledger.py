"""The ledger checker finds every single change to a history that was good."""

import random
from dataclasses import dataclass, field

import msgspec
import pytest

from trunkline.testing import (
    Entry,
    Journal,
    Kind,
    Place,
    Verdict,
    check,
    check_conservation,
    check_offsets,
    read_journal,
)

HISTORIES = 4000
INSIDE = (Kind.BEGIN, Kind.END)


@dataclass
class History:
    """What a run with crashes, redeliveries, dead letters and refused publishes may have written."""

    produced: list[Entry] = field(default_factory=list)
    consumed: list[Entry] = field(default_factory=list)
    redelivered: set[tuple[str, str, int]] = field(default_factory=set)
    killed_after: set[int] = field(default_factory=set)
    """Indexes into `produced` of last entries before a kill, per key."""

    def verdict(self) -> Verdict:
        return check(
            self.produced,
            self.consumed,
            drained=True,
            deliveries=True,
            acks=True,
            redeliveries=len(self.redelivered),
        )


def good_history(rng: random.Random) -> History:
    history = History()
    stored: list[tuple[str, str, int]] = []
    for producer in ("p1", "p2")[: rng.randint(1, 2)]:
        produce(history, stored, rng, producer)
    consume(history, stored, rng)
    return history


def produce(history: History, stored: list[tuple[str, str, int]], rng: random.Random, producer: str) -> None:
    keys = ["a", "b", "c"][: rng.randint(1, 3)]
    seqs = dict.fromkeys(keys, 0)
    add = history.produced.append
    for _life in range(rng.randint(1, 3)):
        add(Entry(Kind.BEGIN, producer))
        open_: dict[str, int] = {}
        last: dict[str, int] = {}
        for _step in range(rng.randint(1, 10)):
            key = rng.choice(keys)
            if key in open_:
                seq = open_.pop(key)
                end = rng.choices([Kind.OK, Kind.FAIL, Kind.UNKNOWN], [8, 1, 1])[0]
                if end is Kind.OK or (end is Kind.UNKNOWN and rng.random() < 0.5):
                    stored.append((producer, key, seq))
                last[key] = len(history.produced)
                add(Entry(end, producer, key, seq))
            else:
                seqs[key] += 1
                open_[key] = seqs[key]
                last[key] = len(history.produced)
                add(Entry(Kind.INVOKE, producer, key, seqs[key]))
        if rng.random() < 0.4:  # killed: what is open may or may not be stored
            stored += [(producer, key, seq) for key, seq in open_.items() if rng.random() < 0.5]
            history.killed_after.update(last.values())
        else:
            for key, seq in open_.items():
                add(Entry(Kind.OK, producer, key, seq))
                stored.append((producer, key, seq))
            add(Entry(Kind.END, producer))


def consume(history: History, stored: list[tuple[str, str, int]], rng: random.Random) -> None:
    lanes: dict[tuple[str, str], list[int]] = {}
    for producer, key, seq in sorted(stored):
        lanes.setdefault((producer, key), []).append(seq)
    while lanes:
        (producer, key), seqs = rng.choice(sorted(lanes.items()))
        seq = seqs.pop(0)
        if not seqs:
            del lanes[producer, key]
        end = rng.choices([Kind.EFFECT, Kind.DEAD, Kind.EXPIRED], [8, 1, 1])[0]
        kinds = [Kind.DELIVERED, end, Kind.ACKED]
        if rng.random() < 0.2:  # a crash before the effect, or between effect and ack
            kinds = rng.choice([[Kind.DELIVERED, *kinds], [Kind.DELIVERED, end, Kind.DELIVERED, Kind.ACKED]])
            history.redelivered.add((producer, key, seq))
        history.consumed += [Entry(kind, producer, key, seq) for kind in kinds]


def histories(count: int = HISTORIES):
    for seed in range(count):
        rng = random.Random(seed)
        history = good_history(rng)
        if history.produced and history.consumed:
            yield seed, rng, history


def identity(entry: Entry) -> tuple[str, str, int]:
    return entry.producer, entry.key, entry.seq


def pick(rng: random.Random, history: History) -> tuple[list[Entry], int]:
    """Return a list of entries and an index into it, of an entry about a message."""
    entries = rng.choice([history.produced, history.consumed])
    return entries, rng.choice([n for n, entry in enumerate(entries) if entry.kind not in INSIDE])


def test_good_histories_pass():
    passed = 0
    for seed, _, history in histories():
        verdict = history.verdict()
        assert verdict.passed, f"seed {seed}: {verdict.describe()}"
        passed += 1
    assert passed > HISTORIES * 0.9


def test_a_deleted_entry_is_found():
    silent = found = 0
    for seed, rng, history in histories():
        good = history.verdict()
        entries, index = pick(rng, history)
        entry = entries.pop(index)
        verdict = history.verdict()
        if not verdict.passed:
            found += 1
        elif entries is history.produced and index in history.killed_after:
            silent += 1  # as if it had been killed a moment earlier: nothing can tell
        elif entry.kind is Kind.DELIVERED and identity(entry) in history.redelivered:
            assert verdict.counts["redelivered"] == good.counts["redelivered"] - 1
        else:
            raise AssertionError(f"seed {seed}: deleting {entry} was not found")
    assert found > 20 * silent


def test_a_duplicated_entry_is_found():
    for seed, rng, history in histories():
        entries, index = pick(rng, history)
        entries.insert(index, entries[index])
        assert not history.verdict().passed, f"seed {seed}: doubling {entries[index]} was not found"


def test_two_swapped_entries_of_one_key_are_found():
    found = 0
    for seed, rng, history in histories():
        entries, index = pick(rng, history)
        first = entries[index]
        others = [
            n
            for n, entry in enumerate(entries)
            if (entry.producer, entry.key) == (first.producer, first.key)
            and entry != first
            and entry.kind not in INSIDE
            and not {identity(entry), identity(first)} & history.redelivered
            # The same message, or the same act on two messages: what else can be swapped may be concurrent.
            and (entry.seq == first.seq or (entry.kind == first.kind and entry.kind in (Kind.EFFECT, Kind.INVOKE)))
        ]
        if not others:
            continue
        other = rng.choice(others)
        entries[index], entries[other] = entries[other], entries[index]
        assert not history.verdict().passed, f"seed {seed}: swapping {first} and {entries[index]} was not found"
        found += 1
    assert found > HISTORIES / 3


def test_an_invented_entry_is_found():
    for seed, rng, history in histories():
        entries, index = pick(rng, history)
        old = entries[index]
        new = rng.choice(
            [
                msgspec.structs.replace(old, producer="p9"),
                msgspec.structs.replace(old, key="z"),
                msgspec.structs.replace(old, seq=old.seq + 1000),
                msgspec.structs.replace(old, seq=0),
                msgspec.structs.replace(old, kind=rng.choice([Kind.OK, Kind.FAIL, Kind.UNKNOWN]), seq=old.seq + 50),
            ]
        )
        entries.insert(index, new)
        if new.kind is Kind.INVOKE and new.key == "z" and new.seq == 1:
            continue  # a first publish of a new key is no contradiction
        assert not history.verdict().passed, f"seed {seed}: inventing {new} was not found"


def test_an_effect_of_a_failed_publish_is_unexpected():
    produced = [Entry(Kind.BEGIN, "p"), Entry(Kind.INVOKE, "p", "k", 1), Entry(Kind.FAIL, "p", "k", 1)]
    verdict = check(produced, [Entry(Kind.EFFECT, "p", "k", 1)], drained=True)
    assert verdict.counts["UNEXPECTED"] == 1


def test_an_effect_of_an_unknown_publish_is_recovered_and_counted():
    produced = [Entry(Kind.BEGIN, "p"), Entry(Kind.INVOKE, "p", "k", 1)]
    verdict = check(produced, [Entry(Kind.EFFECT, "p", "k", 1)], drained=True)
    assert verdict.passed
    assert verdict.counts["RECOVERED"] == 1


def test_nothing_passes_before_it_was_drained():
    assert not check([], [], drained=False).passed
    assert "proves nothing" in check([], [], drained=False).describe()


def test_order_does_not_count_for_keys_without_one():
    produced = [Entry(Kind.BEGIN, "p")]
    for seq in (1, 2):
        produced += [Entry(Kind.INVOKE, "p", "queue", seq), Entry(Kind.OK, "p", "queue", seq)]
    effects = [Entry(Kind.EFFECT, "p", "queue", 2), Entry(Kind.EFFECT, "p", "queue", 1)]
    assert check(produced, effects, drained=True).counts["ORDER"] == 1
    assert check(produced, effects, drained=True, ordered=lambda key: key != "queue").passed


def test_a_journal_is_read_as_it_was_written(tmp_path):
    path = tmp_path / "journal"
    with Journal(path) as journal:
        journal.add(Kind.BEGIN, "p")
        journal.add(Kind.INVOKE, "p", "k", 1)
    with Journal(path) as journal:
        journal.add(Kind.OK, "p", "k", 1)
    assert list(read_journal(path)) == [
        Entry(Kind.BEGIN, "p"),
        Entry(Kind.INVOKE, "p", "k", 1),
        Entry(Kind.OK, "p", "k", 1),
    ]


def test_a_torn_line_is_an_error_not_a_shorter_history(tmp_path):
    path = tmp_path / "journal"
    path.write_bytes(b'["begin","p","",0]\n["invo')
    with pytest.raises(msgspec.DecodeError):
        list(read_journal(path))
    assert [entry.kind for entry in read_journal(path, growing=True)] == [Kind.BEGIN]


def test_a_long_history_passes():
    produced = [Entry(Kind.BEGIN, "p")]
    size = 50_000

    def publishes():
        yield from produced
        for seq in range(1, size + 1):
            yield Entry(Kind.INVOKE, "p", "k", seq)
            yield Entry(Kind.OK, "p", "k", seq)

    verdict = check(publishes(), (Entry(Kind.EFFECT, "p", "k", seq) for seq in range(1, size + 1)), drained=True)
    assert verdict.passed
    assert verdict.counts["effects"] == size


PLACES = [Place("r1", p, o, f"m{p}.{o}") for p in (0, 1) for o in range(5)] + [
    Place("r2", 0, o, f"m0.{o}") for o in (3, 4)
]


def offsets(places):
    verdict = Verdict(drained=True)
    check_offsets(verdict, places)
    return verdict


def test_a_log_read_twice_from_an_earlier_place_is_good():
    assert offsets(PLACES).passed


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        (Place("r3", 0, 2, "m0.3"), "partition 0 offset 2: m0.2 and m0.3"),
        (Place("r3", 1, 9, "m0.3"), "m0.3 at (0, 3) and (1, 9)"),
        (Place("r2", 0, 3, "m0.3"), "r2: partition 0 offset 3 after 4"),
    ],
)
def test_what_no_log_can_show_is_found(wrong, text):
    verdict = offsets([*PLACES, wrong])
    assert not verdict.passed
    assert text in verdict.examples["OFFSET"]


@pytest.mark.parametrize(
    ("found", "text"),
    [
        ({"handled": ["a"], "dead": ["b"], "waiting": ["c", "c"]}, None),
        ({"handled": ["a"], "dead": ["b"], "waiting": ["c"]}, "c is nowhere"),
        ({"handled": ["a", "b"], "dead": ["b"], "waiting": ["c", "c"]}, "b in dead, once more than it was stored"),
        ({"handled": ["a", "b", "x"], "waiting": ["c", "c"]}, "x in handled, once more than it was stored"),
    ],
)
def test_every_message_is_in_one_place(found, text):
    verdict = Verdict(drained=True)
    check_conservation(verdict, ["a", "b", "c", "c"], found)
    assert verdict.examples.get("CONSERVATION", []) == ([text] if text else [])
    assert verdict.passed == (text is None)
