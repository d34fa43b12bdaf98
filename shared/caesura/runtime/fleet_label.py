"""The label ``fleet`` on every sample of a service: several fleets may share one Prometheus."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Protocol

from prometheus_client.core import Metric
from prometheus_client.registry import Collector, CollectorRegistry

LABEL = "fleet"


class Metrics(Protocol):
    """What gives metrics: a registry, or a collector."""

    def collect(self) -> Iterable[Metric]:
        """All of them, as they are now."""


class OfFleet(Collector):
    """The metrics of another collector or registry, with the name of the fleet as a label of each sample. One that has it keeps its own."""

    def __init__(self, metrics: Metrics, fleet: str) -> None:
        self._metrics = metrics
        self._fleet = fleet

    def collect(self) -> Iterator[Metric]:
        """All of them, as they are now."""
        for each in self._metrics.collect():
            labelled = Metric(each.name, each.documentation, each.type, each.unit)
            labelled.samples = [
                sample._replace(labels={LABEL: self._fleet, **sample.labels}) for sample in each.samples
            ]
            yield labelled


def registry_of_fleet(metrics: Metrics, fleet: str) -> CollectorRegistry:
    """A registry with the same metrics, each of this fleet."""
    registry = CollectorRegistry()
    registry.register(OfFleet(metrics, fleet))
    return registry
