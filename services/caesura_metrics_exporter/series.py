"""Counters and histograms as plain numbers, by label values. Pure; the Prometheus adapter is in ``metrics``."""

from __future__ import annotations

from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Hashable, Iterator

Labels = tuple[str, ...]


class Counts:
    """A counter per combination of label values. ``names`` are the label names."""

    def __init__(self, *names: str) -> None:
        self.names = names
        self._values: dict[Labels, float] = {}

    def add(self, *labels: str, by: float = 1.0) -> None:
        """Count up."""
        self._check(labels)
        self._values[labels] = self._values.get(labels, 0.0) + by

    def items(self) -> Iterator[tuple[Labels, float]]:
        """Label values and numbers."""
        return iter(sorted(self._values.items()))

    def forget(self, name: str, value: str) -> None:
        """Drop what carries this label value; nothing if there is no such label."""
        if name in self.names:
            at = self.names.index(name)
            self._values = {labels: count for labels, count in self._values.items() if labels[at] != value}

    def _check(self, labels: Labels) -> None:
        if len(labels) != len(self.names):
            raise ValueError(f"labels {self.names} were given {labels}")


class Histogram:
    """A classic histogram per combination of label values.

    Args:
        bounds: upper bounds of the buckets, rising; one for +Inf is added.
    """

    def __init__(self, bounds: tuple[float, ...], *names: str) -> None:
        self.names = names
        self.bounds = bounds
        self._buckets: dict[Labels, list[int]] = {}
        self._sums: dict[Labels, float] = {}

    def expect(self, *labels: str) -> None:
        """Show these label values, with no observation as yet."""
        if len(labels) != len(self.names):
            raise ValueError(f"labels {self.names} were given {labels}")
        if labels not in self._buckets:
            self._buckets[labels] = [0] * (len(self.bounds) + 1)
            self._sums[labels] = 0.0

    def observe(self, value: float, *labels: str) -> None:
        """Take one value."""
        self.expect(*labels)
        self._buckets[labels][bisect_left(self.bounds, value)] += 1
        self._sums[labels] += value

    def items(self) -> Iterator[tuple[Labels, list[tuple[str, float]], float]]:
        """Label values, cumulative buckets as (upper bound, count), and the sum."""
        ends = [*(f"{bound:g}" for bound in self.bounds), "+Inf"]
        for labels, buckets in sorted(self._buckets.items()):
            total = 0
            cumulative: list[tuple[str, float]] = []
            for end, count in zip(ends, buckets, strict=True):
                total += count
                cumulative.append((end, total))
            yield labels, cumulative, self._sums[labels]

    def forget(self, name: str, value: str) -> None:
        """Drop what carries this label value; nothing if there is no such label."""
        if name in self.names:
            at = self.names.index(name)
            for labels in [labels for labels in self._buckets if labels[at] == value]:
                del self._buckets[labels], self._sums[labels]


class Seen:
    """Remembers the newest ``limit`` keys, to tell a repetition."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._keys: OrderedDict[Hashable, None] = OrderedDict()

    def first(self, key: Hashable) -> bool:
        """True the first time ``key`` is given, false while it is remembered."""
        if key in self._keys:
            self._keys.move_to_end(key)
            return False
        self._keys[key] = None
        if len(self._keys) > self._limit:
            self._keys.popitem(last=False)
        return True
