"""Any bytes on any decoder: the declared error or a value, never anything else. 100,000 inputs in all."""

import contextlib
import random

import msgspec
import pytest

from trunkline import App, Message, Queue, Service, Struct
from trunkline.channel import message_type
from trunkline.errors import DecodeError
from trunkline.message import from_binary, from_structured, pack, to_structured, unpack

jobs = Queue("fuzz-jobs")


class Inner(Struct):
    name: str
    amounts: list[int]


@jobs.command
class FuzzJob(Struct):
    number: int
    inner: Inner
    rest: dict[str, object] | None = None


GOOD = b'{"number":1,"inner":{"name":"x","amounts":[1,2,3]},"rest":{"a":[{"b":null}]}}'
SEED = Message("id-1", "fuzz.job", "fuzz", GOOD, 1.5, partitionkey="k", extensions={"xone": "1"})
BITS = [
    b"[",
    b"{",
    b"}",
    b"]",
    b'"',
    b"\\",
    b"\x00",
    b"\xff",
    b"9" * 40,
    b"-",
    b"1e999",
    b"null",
    b":",
    b",",
    b"\xc0\x80",
    b"[" * 90,
]


def mutated(seed: bytes, rng: random.Random) -> bytes:
    data = bytearray(seed)
    for _ in range(rng.randint(1, 6)):
        at = rng.randrange(len(data) + 1)
        match rng.randrange(4):
            case 0:
                data[at:at] = rng.choice(BITS)
            case 1:
                del data[at : at + rng.randint(1, 12)]
            case 2:
                data[at : at + 1] = bytes([rng.randrange(256)])
            case _:
                data[at:at] = data[: rng.randint(0, len(data))]
    return bytes(data)


def decode_job(data: bytes) -> object:
    declared = message_type(FuzzJob)
    assert declared is not None
    return declared.decode(msgspec.structs.replace(SEED, data=data))


def decode_headers(data: bytes) -> object:
    pairs = [line.split("=", 1) for line in data.decode("latin-1").split(";") if "=" in line]
    return from_binary(dict(pairs), data)


HEADERS = (
    b"ce-specversion=1.0;ce-id=1;ce-source=s;ce-type=t;ce-time=2026-01-01T00:00:00Z;ce-priority=3;content-type=a/b"
)


@pytest.mark.parametrize(
    ("decode", "seed", "allowed"),
    [
        (unpack, pack(SEED), (msgspec.DecodeError, UnicodeDecodeError, RecursionError)),
        (from_structured, to_structured(SEED), (DecodeError,)),
        (decode_job, GOOD, (DecodeError,)),
        (decode_headers, HEADERS, (DecodeError,)),
    ],
    ids=["envelope", "structured", "payload", "headers"],
)
def test_a_decoder_gives_a_value_or_its_own_error(decode, seed, allowed):
    rng = random.Random(20260101)
    read = 0
    for _ in range(25_000):
        with contextlib.suppress(*allowed):
            decode(mutated(seed, rng))
            read += 1
    assert 0 < read < 25_000, "both outcomes were met"


async def test_each_envelope_becomes_an_effect_or_a_dead_letter():
    rng = random.Random(7)
    service, handled = Service("fuzz"), []

    @service.handle
    async def work(job: FuzzJob) -> None:
        handled.append(job)

    async with App(service, "memory:") as app:
        events = [msgspec.structs.replace(SEED, id=f"id-{n}", data=mutated(GOOD, rng)) for n in range(2_000)]
        for event in events:
            await app.publish(event, to=jobs)
        await app._consumers[0].lanes.idle()
        while app.transport.readers["fuzz@fuzz-jobs"].waiting():
            await app._consumers[0].lanes.idle()
            await app.clock.sleep(0)
        await app._consumers[0].lanes.idle()
        dead = await app.store.dead_letters(limit=10_000)
        assert len(handled) + len(dead) == 2_000
        assert {row.code for row in dead} <= {"E410", "E411", "E412"}
        assert handled
        assert dead
