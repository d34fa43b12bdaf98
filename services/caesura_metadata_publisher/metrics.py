"""The publisher's own metrics."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from caesura.bus.metrics import bus_families
from caesura.bus.port import Bus
from caesura_metadata_publisher.service import MetadataPublisher


class PublisherCollector(Collector):
    """Reads the publisher's live counters at scrape time."""

    def __init__(self, publisher: MetadataPublisher, bus: Bus) -> None:
        self._publisher = publisher
        self._bus = bus

    def collect(self) -> Iterator[Metric]:
        """Every metric of the publisher."""
        requests = CounterMetricFamily(
            "caesura_metadata_requests",
            "HTTP requests of workloads, by endpoint, method and status.",
            labels=["endpoint", "method", "status"],
        )
        for (endpoint, method, status), count in self._publisher.answers.items():
            requests.add_metric([endpoint, method, str(status)], count)
        yield requests
        yield CounterMetricFamily(
            "caesura_metadata_approvals",
            "Approvals taken from workloads and passed on.",
            value=self._publisher.approvals,
        )
        yield GaugeMetricFamily(
            "caesura_metadata_approvals_pending",
            "Approvals that the document does not show yet.",
            value=self._publisher.pending,
        )
        yield from bus_families(self._bus.stats, self._publisher.decode_errors)
