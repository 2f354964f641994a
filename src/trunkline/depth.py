"""How deep values of a type can be nested, from the type alone.

Invariant: what is called shallow here cannot be decoded to anything deeper. Read next: codec.py.
"""

from __future__ import annotations

from typing import Any

from msgspec import inspect

_NESTED = (inspect.StructType, inspect.DataclassType, inspect.TypedDictType)
_OPEN = (inspect.AnyType, inspect.RawType, inspect.CustomType)


def is_deep(cls: type, limit: int) -> bool:
    """Return whether values of `cls` may be nested deeper than `limit` levels: it is open or contains itself."""
    return _is_nested(inspect.type_info(cls), limit)


def _is_nested(info: Any, limit: int, outside: tuple[Any, ...] = ()) -> bool:
    if isinstance(info, inspect.UnionType):
        return any(_is_nested(member, limit, outside) for member in info.types)
    if isinstance(info, _OPEN) or len(outside) == limit or any(info is other for other in outside):
        return True
    inside = (*outside, info)
    if isinstance(info, inspect.CollectionType):
        return _is_nested(info.item_type, limit, inside)
    if isinstance(info, inspect.TupleType):
        return any(_is_nested(item, limit, inside) for item in info.item_types)
    if isinstance(info, inspect.DictType):
        return _is_nested(info.value_type, limit, inside)
    return isinstance(info, _NESTED) and any(_is_nested(field.type, limit, inside) for field in info.fields)
