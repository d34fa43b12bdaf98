"""The metrics of every service about its bus."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from caesura.bus.port import BusStats
from caesura.bus.rates import LIMITS
from caesura.contract.codec import ContractError

# Exposed from zero on: otherwise the first error of a kind would not count as an increase.
_ERROR_KINDS = tuple(sorted({ContractError.kind, *(each.kind for each in ContractError.__subclasses__())}))


def bus_families(stats: BusStats, decode_errors: Mapping[str, int]) -> Iterator[Metric]:
    """Metric families of one bus connection, for a custom collector."""
    yield GaugeMetricFamily(
        "caesura_bus_connected", "1 while connected to the broker, else 0.", float(stats.connected)
    )
    yield GaugeMetricFamily(
        "caesura_bus_backlog_messages", "Messages received and not yet handled.", stats.backlog
    )
    yield CounterMetricFamily("caesura_bus_connects", "Successful connects to the broker.", stats.connects)
    yield CounterMetricFamily("caesura_bus_received", "Messages received.", stats.received)
    yield CounterMetricFamily("caesura_bus_published", "Messages that the broker accepted.", stats.published)
    yield CounterMetricFamily(
        "caesura_bus_publish_failures", "Publishes that failed.", stats.publish_failures
    )
    yield CounterMetricFamily(
        "caesura_bus_dropped", "QoS 0 messages dropped because the handler was too slow.", stats.dropped
    )
    refused = CounterMetricFamily(
        "caesura_bus_refused",
        "Messages above the rate of their writer, or retained where nothing is, by the writer's party.",
        labels=["writer"],
    )
    for party in LIMITS:
        refused.add_metric([party], stats.refused.get(party, 0))
    yield refused
    errors = CounterMetricFamily(
        "caesura_bus_decode_errors", "Messages that broke the contract.", labels=["kind"]
    )
    for kind, count in sorted((dict.fromkeys(_ERROR_KINDS, 0) | dict(decode_errors)).items()):
        errors.add_metric([kind], count)
    yield errors
