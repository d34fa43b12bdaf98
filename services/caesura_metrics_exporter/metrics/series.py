"""Counters and histograms as plain numbers, by label values. Pure; the Prometheus adapter is in ``metrics``.

They are grouped by their first label (a set or a host), so that the cost of removing one depends on its own series, not on
all of them. ``copied`` returns numbers that do not change while a scrape is rendered.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left
from collections.abc import Iterator

Labels = tuple[str, ...]
Buckets = tuple[tuple[int, ...], float]
"""The number of observations in each single bucket, the last one for those above all bounds; and the sum of all observations."""


class Counts:
    """A counter per combination of label values. ``names`` are the label names."""

    def __init__(self, *names: str) -> None:
        self.names = names
        self._values: dict[str, dict[Labels, float]] = {}

    def add(self, *labels: str, by: float = 1.0) -> None:
        """Count up."""
        _check(self.names, labels)
        group = self._values.setdefault(_first(labels), {})
        group[labels] = group.get(labels, 0.0) + by

    def copied(self) -> dict[Labels, float]:
        """Maps label values to numbers."""
        made: dict[Labels, float] = {}
        for group in self._values.values():
            made.update(group)
        return made

    def items(self) -> Iterator[tuple[Labels, float]]:
        """Label values and numbers, sorted."""
        return iter(sorted(self.copied().items()))

    def forget(self, name: str, value: str) -> None:
        """Drop the series with this value of the first label; nothing if the first label is another one."""
        if self.names[:1] == (name,):
            self._values.pop(value, None)


class Histogram:
    """A classic histogram per combination of label values.

    Args:
        bounds: upper bounds of the buckets, rising; one for +Inf is added.
    """

    def __init__(self, bounds: tuple[float, ...], *names: str) -> None:
        self.names = names
        self.bounds = bounds
        self._values: dict[str, dict[Labels, tuple[list[int], list[float]]]] = {}

    def expect(self, *labels: str) -> None:
        """Expose these label values without an observation yet."""
        self._of(labels)

    def observe(self, value: float, *labels: str) -> None:
        """Add one observation."""
        buckets, total = self._of(labels)
        buckets[bisect_left(self.bounds, value)] += 1
        total[0] += value

    def copied(self) -> dict[Labels, Buckets]:
        """Maps label values to buckets and sum."""
        return {
            labels: (tuple(buckets), total[0])
            for group in self._values.values()
            for labels, (buckets, total) in group.items()
        }

    def items(self) -> Iterator[tuple[Labels, list[tuple[str, float]], float]]:
        """Label values, cumulative buckets as (upper bound, count), and the sum; sorted."""
        for labels, values in sorted(self.copied().items()):
            yield labels, cumulative(self.bounds, values), values[1]

    def forget(self, name: str, value: str) -> None:
        """As in ``Counts``."""
        if self.names[:1] == (name,):
            self._values.pop(value, None)

    def _of(self, labels: Labels) -> tuple[list[int], list[float]]:
        _check(self.names, labels)
        group = self._values.setdefault(_first(labels), {})
        values = group.get(labels)
        if values is None:
            values = group[labels] = ([0] * (len(self.bounds) + 1), [0.0])
        return values


def ends(bounds: tuple[float, ...]) -> tuple[str, ...]:
    """Upper bounds as values of the label ``le``."""
    return (*(f"{bound:g}" for bound in bounds), "+Inf")


def cumulative(bounds: tuple[float, ...], values: Buckets) -> list[tuple[str, float]]:
    """Cumulative buckets as in Prometheus: (upper bound, number of observations up to that)."""
    total = 0
    found: list[tuple[str, float]] = []
    for end, count in zip(ends(bounds), values[0], strict=True):
        total += count
        found.append((end, total))
    return found


class Largest:
    """Numbers by name, and which of them is the largest by magnitude; for equal magnitudes, the first by name.

    A query costs the logarithm of their number, however many changed: outdated entries of the heap are
    dropped when they reach its top, or all at once when most are outdated.
    """

    def __init__(self) -> None:
        self._values: dict[str, float] = {}
        self._heap: list[tuple[float, str]] = []

    def __len__(self) -> int:
        return len(self._values)

    def put(self, name: str, value: float) -> None:
        """Set the name's number."""
        self._values[name] = value
        heapq.heappush(self._heap, (-abs(value), name))
        if len(self._heap) > 2 * len(self._values) + 8:
            self._heap = [(-abs(each), known) for known, each in self._values.items()]
            heapq.heapify(self._heap)

    def drop(self, name: str) -> None:
        """Remove the name's number."""
        self._values.pop(name, None)

    def top(self) -> tuple[str, float] | None:
        """Name and number of the largest; None if there is none."""
        while self._heap:
            magnitude, name = self._heap[0]
            value = self._values.get(name)
            if value is not None and -abs(value) == magnitude:
                return name, value
            heapq.heappop(self._heap)
        return None


def _first(labels: Labels) -> str:
    return labels[0] if labels else ""


def _check(names: Labels, labels: Labels) -> None:
    if len(labels) != len(names):
        raise ValueError(f"labels {names} were given {labels}")
