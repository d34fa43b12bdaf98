"""The allowed words for a value that is not one of them: msgspec does not list them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import msgspec
from msgspec import inspect

_STEP = re.compile(r"\.(\w+)|\[")
"""One step of the path in an error: a key, or an element, numbered or not."""


def describe_error(error: msgspec.ValidationError, wanted: Any) -> str:
    """The error's text; if ``wanted`` allows only certain words, these are listed before the location.

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
    """The words that are allowed ``steps`` below a type; empty if there is no such location."""
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
