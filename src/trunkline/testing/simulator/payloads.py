"""Something to do for a system of which nothing is known but its types.

Invariant: the same seed makes the same payloads; fields of the same name that look like ids are equal in the n-th
payload of each type, so that an order and its cancellation belong together. Read next: simulation.py.
"""

from __future__ import annotations

import base64
import datetime as dt
import decimal
import hashlib
import uuid
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
from msgspec import inspect as kinds

from trunkline.channel import message_type
from trunkline.clock import Draws
from trunkline.errors import ConfigurationError
from trunkline.service import System
from trunkline.testing.simulator.simulation import Client, Workload

EACH = 3
"""Payloads of each type."""
DEPTH = 4
"""How deep values are nested before what may be left out is left out."""
_IDS = ("id", "_id", "key", "_number", "reference", "sku")
_MONEY = ("cents", "amount", "price", "total")
_FEW = ("count", "quantity", "qty", "number", "version")
_NAMES = ("Ada", "Grace", "Edsger", "Barbara", "Tony", "Frances", "Donald", "Radia")
_DAY = dt.datetime(2024, 1, 1, tzinfo=dt.UTC)


def outside_types(system: System) -> list[type]:
    """Return the types that a system handles and does not publish: what comes from outside."""
    given = {cls for service in system.services for one in service.handlers for cls in one.gives}
    given |= {cls for service in system.services for one in service.backgrounds for cls in one.gives}
    taken = [cls for service in system.services for handler in service.handlers for cls in handler.takes]
    return [cls for cls in dict.fromkeys(taken) if cls not in given and message_type(cls) is not None]


def workload_of(system: System) -> Workload:
    """Return a workload that publishes a few payloads of each type that comes from outside.

    Raises: ConfigurationError E713 if there is no such type, E710 if one cannot be made.
    """
    types = outside_types(system)
    if not types:
        raise ConfigurationError(
            "E713", f"nothing comes into {system.name} from outside: it publishes whatever it handles",
            "write a Simulation with a workload, and name it",
        )  # fmt: skip
    for cls in types:
        make(cls, Draws(0), 1)

    async def workload(sim: Client) -> None:
        draws = Draws(f"{sim.seed} payloads")
        for number in range(1, EACH + 1):
            for cls in types:
                await sim.publish(make(cls, draws, number))

    return workload


def make(cls: type, draws: Draws, number: int) -> Any:
    """Return a payload of a type: a Struct, a dataclass, an attrs class or a TypedDict.

    Args:
        number: makes ids.
    Raises: ConfigurationError E710 if its type does not say what it may be.
    """
    try:
        return msgspec.convert(_Maker(draws, number).value(kinds.type_info(cls), "", 0), cls)
    except (TypeError, ValueError, _NoValueError) as error:
        why = str(error).splitlines()[0]
        raise ConfigurationError(
            "E710", f"no {cls.__name__} can be made from its type: {why}",
            "write a Simulation with a workload that publishes one, and name it",
        ) from error  # fmt: skip


class _NoValueError(Exception):
    """Nothing can be made for a type."""


class _Maker:
    """Makes values of one payload."""

    def __init__(self, draws: Draws, number: int) -> None:
        self._draws = draws
        self._number = number

    def value(self, kind: kinds.Type, name: str, depth: int) -> Any:
        """Return a value as `msgspec.convert` takes it.

        Args:
            name: of the field.
        """
        if isinstance(kind, kinds.Metadata):
            return self.value(kind.type, name, depth)
        found = _MAKERS.get(type(kind))
        if found is None:
            raise _NoValueError(f"{name or 'it'} is {type(kind).__name__.removesuffix('Type')}")
        return found(self, kind, name, depth)

    def whole(self, kind: Any, name: str, _depth: int) -> int:
        low, high = (1, 9) if name.endswith(_FEW) else (100, 100_000) if name.endswith(_MONEY) else (1, 1000)
        low, high = _within(kind, low, high, 1)
        step = kind.multiple_of or 1
        return self._draws.randint(-(-low // step), high // step) * step

    def fraction(self, kind: Any, _name: str, _depth: int) -> float:
        low, high = _within(kind, 1, 1000, 0.01)
        return round(self._draws.uniform(low, high), 2)

    def text(self, kind: kinds.StrType, name: str, _depth: int) -> str:
        if kind.pattern is not None:
            raise _NoValueError(f"{name} must match {kind.pattern!r}")
        text = self._word(name)
        if kind.min_length is not None:
            text = text.ljust(kind.min_length, "x")
        return text if kind.max_length is None else text[-kind.max_length :]

    def _word(self, name: str) -> str:
        lower = name.lower()
        if lower.endswith(_IDS):
            stem = lower.removesuffix("_id").removesuffix("_number").strip("_") or "id"
            return f"{stem}-{self._number}"
        if "mail" in lower:
            return f"{self._draws.choice(_NAMES).lower()}@example.org"
        if lower.endswith("currency"):
            return "EUR"
        return (
            self._draws.choice(_NAMES) if lower.endswith("name") else f"{lower or 'text'} {self._draws.randint(1, 99)}"
        )

    def raw(self, kind: Any, _name: str, _depth: int) -> str:
        size = max(kind.min_length or 0, min(8, kind.max_length or 8))
        return base64.b64encode(self._draws.randbytes(size)).decode()

    def moment(self, kind: Any, _name: str, _depth: int) -> dt.datetime:
        when = _DAY + dt.timedelta(minutes=self._draws.randint(0, 500_000))
        return when.replace(tzinfo=None) if kind.tz is False else when

    def items(self, kind: Any, name: str, depth: int) -> list[Any]:
        low, high = kind.min_length or 0, kind.max_length
        if depth >= DEPTH:
            count = low
        else:
            count = self._draws.randint(max(low, 1), max(low, 3)) if high is None or high > 0 else 0
        count = count if high is None else min(count, high)
        return [self.value(kind.item_type, name.removesuffix("s"), depth + 1) for _ in range(count)]

    def mapping(self, kind: kinds.DictType, name: str, depth: int) -> dict[Any, Any]:
        count = max(kind.min_length or 0, 0 if depth >= DEPTH else 1)
        return {
            self.value(kind.key_type, "key", depth + 1): self.value(kind.value_type, name, depth + 1)
            for _ in range(count)
        }

    def several(self, kind: kinds.TupleType, name: str, depth: int) -> list[Any]:
        return [self.value(one, name, depth + 1) for one in kind.item_types]

    def one_of(self, kind: kinds.UnionType, name: str, depth: int) -> Any:
        some = [one for one in kind.types if not isinstance(one, kinds.NoneType)]
        if kind.includes_none and (depth >= DEPTH or not some):
            return None
        return self.value(self._draws.choice(some), name, depth)

    def record(self, kind: Any, _name: str, depth: int) -> Any:
        """A Struct, dataclass, attrs class, TypedDict or named tuple."""
        made = {
            field.encode_name: self.value(field.type, field.name, depth + 1)
            for field in kind.fields
            if field.required or depth < DEPTH
        }
        tag = getattr(kind, "tag", None)
        if getattr(kind, "array_like", False) or isinstance(kind, kinds.NamedTupleType):
            return ([] if tag is None else [tag]) + list(made.values())
        return made if tag is None else {kind.tag_field: tag, **made}

    def member(self, values: Sequence[Any]) -> Any:
        return self._draws.choice(values)

    def identity(self, _kind: Any, name: str, _depth: int) -> uuid.UUID:
        return uuid.UUID(bytes=hashlib.sha256(f"{name} {self._number}".encode()).digest()[:16], version=5)

    def days(self) -> dt.datetime:
        return _DAY + dt.timedelta(minutes=self._draws.randint(0, 500_000))


def _within(kind: Any, low: float, high: float, step: float) -> tuple[Any, Any]:
    """Return the range that a number's constraints leave of a plausible one."""
    width = high - low
    least = kind.ge if kind.gt is None else kind.gt + step
    most = kind.le if kind.lt is None else kind.lt - step
    if least is not None and low < least:
        low, high = least, max(high, least + width)
    if most is not None and high > most:
        low, high = (low if low <= most else most - width if least is None else least), most
    return low, high


_MAKERS: dict[type, Callable[[_Maker, Any, str, int], Any]] = {
    kinds.NoneType: lambda *_: None,
    kinds.AnyType: lambda maker, _kind, name, _depth: maker._word(name),  # noqa: SLF001 - part of it
    kinds.BoolType: lambda maker, *_: maker.member((False, True)),
    kinds.IntType: _Maker.whole,
    kinds.FloatType: _Maker.fraction,
    kinds.StrType: _Maker.text,
    kinds.BytesType: _Maker.raw,
    kinds.ByteArrayType: _Maker.raw,
    kinds.DateTimeType: _Maker.moment,
    kinds.DateType: lambda maker, *_: maker.days().date(),
    kinds.TimeType: lambda maker, *_: maker.days().time(),
    kinds.TimeDeltaType: lambda maker, *_: dt.timedelta(minutes=maker.member(range(1, 600))),
    kinds.UUIDType: _Maker.identity,
    kinds.DecimalType: lambda maker, *_: decimal.Decimal(maker.member(range(100, 100_000))) / 100,
    kinds.EnumType: lambda maker, kind, *_: maker.member([one.value for one in kind.cls]),
    kinds.LiteralType: lambda maker, kind, *_: maker.member(kind.values),
    kinds.ListType: _Maker.items,
    kinds.SetType: _Maker.items,
    kinds.FrozenSetType: _Maker.items,
    kinds.VarTupleType: _Maker.items,
    kinds.CollectionType: _Maker.items,
    kinds.TupleType: _Maker.several,
    kinds.DictType: _Maker.mapping,
    kinds.UnionType: _Maker.one_of,
    kinds.StructType: _Maker.record,
    kinds.DataclassType: _Maker.record,
    kinds.TypedDictType: _Maker.record,
    kinds.NamedTupleType: _Maker.record,
}
