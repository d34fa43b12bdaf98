"""Metric families as plain numbers: the source of a scrape's text, and its conversion to ``prometheus_client``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal

import msgspec
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from caesura_metrics_exporter.metrics.series import Buckets, Counts, Histogram, Labels, cumulative


class Family(msgspec.Struct, frozen=True):
    """Counters or gauges of one name. ``values`` is never changed: a thread may read it."""

    name: str
    """For a counter without its ``_total``."""
    text: str
    kind: Literal["counter", "gauge"]
    names: Labels
    values: dict[Labels, float]

    def metric(self) -> Metric:
        """The ``prometheus_client`` representation."""
        make = CounterMetricFamily if self.kind == "counter" else GaugeMetricFamily
        family = make(self.name, self.text, labels=self.names)
        for labels, value in self.values.items():
            family.add_metric(labels, value)
        return family


class HistogramFamily(msgspec.Struct, frozen=True):
    """Classic histograms of one name; as ``Family``."""

    name: str
    text: str
    names: Labels
    bounds: tuple[float, ...]
    values: dict[Labels, Buckets]

    def metric(self) -> Metric:
        """The ``prometheus_client`` representation."""
        family = HistogramMetricFamily(self.name, self.text, labels=self.names)
        for labels, values in self.values.items():
            family.add_metric(labels, buckets=cumulative(self.bounds, values), sum_value=values[1])
        return family


def counter(name: str, text: str, counts: Counts) -> Family:
    """A counter family; the exposition adds ``_total`` to the name."""
    return Family(name, text, "counter", counts.names, counts.copied())


def histogram(name: str, text: str, values: Histogram) -> HistogramFamily:
    """A classic histogram family."""
    return HistogramFamily(name, text, values.names, values.bounds, values.copied())


def gauge(
    name: str,
    text: str,
    names: tuple[str, ...],
    values: Mapping[Any, float] | Iterable[tuple[tuple[str, ...], float]],
) -> Family:
    """A gauge family; ``names`` are the label names, ``values`` numbers by label values, which are copied."""
    return Family(name, text, "gauge", names, dict(values))


def number(name: str, text: str, value: float) -> Family:
    """A gauge without labels."""
    return Family(name, text, "gauge", (), {(): value})


def states(
    labels: tuple[str, ...], known: tuple[str, ...], current: str
) -> list[tuple[tuple[str, ...], float]]:
    """One series per state, with its name as the last label: 1 for the current one, 0 for the others."""
    return [((*labels, state), float(state == current)) for state in known]
