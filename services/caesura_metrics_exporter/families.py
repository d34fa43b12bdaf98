"""Numbers by label values to Prometheus metric families."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)

from caesura_metrics_exporter.series import Counts, Histogram


def counter(name: str, text: str, counts: Counts) -> Metric:
    """A counter family; the exposition adds ``_total`` to the name."""
    family = CounterMetricFamily(name, text, labels=counts.names)
    for labels, value in counts.items():
        family.add_metric(labels, value)
    return family


def histogram(name: str, text: str, values: Histogram) -> Metric:
    """A classic histogram family."""
    family = HistogramMetricFamily(name, text, labels=values.names)
    for labels, buckets, total in values.items():
        family.add_metric(labels, buckets=buckets, sum_value=total)
    return family


def gauge(
    name: str, text: str, names: tuple[str, ...], values: Iterable[tuple[tuple[str, ...], float]]
) -> Metric:
    """A gauge family; ``names`` are the label names, ``values`` pairs of label values and number."""
    family = GaugeMetricFamily(name, text, labels=names)
    for labels, value in values:
        family.add_metric(labels, value)
    return family


def states(
    labels: tuple[str, ...], known: tuple[str, ...], current: str
) -> list[tuple[tuple[str, ...], float]]:
    """One series a state, its name as the last label: 1 for the current one, 0 for the others."""
    return [((*labels, state), float(state == current)) for state in known]
