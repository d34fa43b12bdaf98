"""A copy of what the exporter knows, that stands still while it is read. Pure.

Writing out the series of a large fleet takes seconds: too long for the event loop, so a thread does it, and the loop goes
on folding meanwhile. The copy takes milliseconds: what is frozen (messages, label values) is shared, not copied.
"""

from __future__ import annotations

import copy
from typing import Any, TypeVar

import msgspec

from caesura_metrics_exporter.series import Seen

_PACKAGE = __name__.partition(".")[0]

T = TypeVar("T")


def still(value: T) -> T:
    """A copy of everything in ``value`` that can change: containers, structs that are not frozen, our own objects.

    Everything else is shared; so is what only remembers repetitions, which is never written out.
    """
    return _still(value)  # type: ignore[no-any-return]


def _still(value: Any) -> Any:
    kind = type(value)
    if kind in {str, int, float, bool, tuple, type(None), Seen}:
        return value
    if kind is list:
        # Buckets of histograms are most of what there is.
        return value[:] if value and type(value[0]) is int else [_still(each) for each in value]
    if isinstance(value, dict):
        made = copy.copy(value)
        for key, each in value.items():
            if type(each) not in {int, float, str, bool}:
                made[key] = _still(each)
        return made
    if isinstance(value, set):
        return value.copy()
    if isinstance(value, msgspec.Struct):
        if kind.__struct_config__.frozen:
            return value
        return kind(**{name: _still(getattr(value, name)) for name in kind.__struct_fields__})
    if kind.__module__.partition(".")[0] == _PACKAGE and hasattr(value, "__dict__"):
        made = copy.copy(value)
        for name, each in vars(value).items():
            setattr(made, name, _still(each))
        return made
    return value
