"""A copy for a scrape shares what cannot change, and nothing else."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from caesura_metrics_exporter.series import Histogram
from caesura_metrics_exporter.still import still


class Frozen(msgspec.Struct, frozen=True):
    """Cannot change."""

    number: int = 1


class Open(msgspec.Struct):
    """Can."""

    number: int = 1


@pytest.mark.parametrize(
    ("value", "change"),
    [
        ({1, 2}, lambda value: value.add(3)),
        ([1, 2], lambda value: value.append(3)),
        ([{"a": 1}], lambda value: value[0].update(a=2)),
        ({"a": {"b": 1}}, lambda value: value["a"].update(b=2)),
        ({"a": {1}}, lambda value: value["a"].add(2)),
        ({"a": Open()}, lambda value: setattr(value["a"], "number", 2)),
    ],
)
def test_what_changes_later_does_not_change_the_copy(value: Any, change: Any) -> None:
    copied, same = still(value), still(value)
    change(value)
    assert copied == same
    assert copied != value


def test_what_is_counted_later_is_not_in_the_copy() -> None:
    histogram = Histogram((1.0, 2.0))
    copied = still(histogram)
    histogram.observe(1.5)
    assert vars(copied) != vars(histogram)


def test_what_cannot_change_is_shared() -> None:
    value = Frozen()
    assert still({"a": value})["a"] is value
