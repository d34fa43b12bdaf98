"""What could have been written in the place of a word that is none of the allowed ones: msgspec does not say it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import msgspec
from msgspec import inspect

_STEP = re.compile(r"\.(\w+)|\[")
"""One step of the path in an error: a key, or an element, be it numbered or not."""


def describe_error(error: msgspec.ValidationError, wanted: Any) -> str:
    """The error's text; where ``wanted`` allows certain words only, these are named before the place.

    Args:
        error: what ``msgspec.convert`` to ``wanted`` raised.
        wanted: the type, for example a struct.
    """
    what, at, place = str(error).partition(" - at ")
    if not what.startswith("Invalid enum value"):
        return str(error)
    steps = [found[1] or "" for found in _STEP.finditer(place)]
    for allowed in _allowed(inspect.type_info(wanted), steps):
        *others, last = map(repr, allowed)
        what += f": write {', '.join(others)}{' or ' if others else ''}{last}"
    return f"{what}{at}{place}"


def _allowed(kind: inspect.Type, steps: list[str]) -> Iterator[tuple[object, ...]]:
    """The words that are allowed ``steps`` below a type; nothing if it has no such place."""
    if isinstance(kind, inspect.Metadata):
        yield from _allowed(kind.type, steps)
    elif isinstance(kind, inspect.UnionType):
        for each in kind.types:
            yield from _allowed(each, steps)
    elif not steps:
        if isinstance(kind, inspect.LiteralType):
            yield kind.values
    elif isinstance(kind, inspect.StructType):
        for field in kind.fields:
            if field.encode_name == steps[0]:
                yield from _allowed(field.type, steps[1:])
    elif isinstance(kind, inspect.ListType | inspect.VarTupleType):
        yield from _allowed(kind.item_type, steps[1:])
    elif isinstance(kind, inspect.DictType):
        yield from _allowed(kind.value_type, steps[1:])
