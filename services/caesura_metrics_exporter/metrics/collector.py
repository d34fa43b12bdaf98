"""The Prometheus adapter: turns ``FactCounters`` and ``FleetMetricsView`` into metric families at scrape time."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import version

import msgspec
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from caesura.bus.metrics import bus_families
from caesura.bus.port import Bus
from caesura_metrics_exporter.metrics.counters import FactCounters
from caesura_metrics_exporter.metrics.current_state import FleetMetricsView
from caesura_metrics_exporter.metrics.exposition import AnyFamily
from caesura_metrics_exporter.metrics.families import Family, counter, gauge, histogram, number
from caesura_metrics_exporter.metrics.fleet_families import fleet_families
from caesura_metrics_exporter.metrics.series import Histogram


class SelfStats(msgspec.Struct):
    """The exporter's metrics about itself."""

    handler: Histogram
    """Seconds to fold one message."""
    began_s: float
    """Start time, seconds on its monotonic clock."""
    last_message_at: float = 0.0
    """Unix time of the last message, seconds; 0 before the first."""
    decode_errors: Counter[str] = msgspec.field(default_factory=Counter)


class FleetCollector(Collector):
    """All metrics of the exporter, copied at scrape time: what is removed from the fold disappears here.

    Args:
        foreign: maps a host to the number of VMs that it names without owning them.
    """

    def __init__(
        self,
        counters: FactCounters,
        fleet: FleetMetricsView,
        own: SelfStats,
        bus: Bus,
        monotonic: Callable[[], float],
        foreign: Callable[[], Mapping[str, int]],
        name: str = "default",
    ) -> None:
        self._monotonic = monotonic
        self._counters = counters
        self._fleet = fleet
        self._own = own
        self._bus = bus
        self._foreign = foreign
        self._name = name
        self._version = version("caesura")  # reads a file

    def collect(self) -> Iterator[Metric]:
        """Every metric family, as ``prometheus_client`` objects."""
        started = time.perf_counter()
        yield from (family.metric() for family in self.families())
        yield scrape_duration(time.perf_counter() - started).metric()

    def families(self) -> list[AnyFamily]:
        """Every family except the scrape's own. They do not change while messages are folded."""
        return [
            *self._facts(),
            *fleet_families(self._fleet, self._monotonic(), self._foreign()),
            *(_of_metric(each) for each in bus_families(self._bus.stats, self._own.decode_errors)),
            *self._itself(),
        ]

    def _itself(self) -> Iterator[AnyFamily]:
        yield Family(
            "caesura_bus_reconnects",
            "Connects to the broker after the first.",
            "counter",
            (),
            {(): max(0, self._bus.stats.connects - 1)},
        )
        yield histogram("caesura_exporter_handler_seconds", "Seconds to fold one message.", self._own.handler)
        yield number(
            "caesura_exporter_last_message_timestamp_seconds",
            "When the last message arrived, unix time; 0 before the first.",
            self._own.last_message_at,
        )
        # Counters start with the exporter: shortly after its start, everything in them is new. Not a time stamp, since two
        # wall clocks may differ.
        yield number(
            "caesura_exporter_age_seconds",
            "Seconds since the exporter's start, by its monotonic clock.",
            self._monotonic() - self._own.began_s,
        )
        yield gauge(
            "caesura_exporter_build_info",
            "Version of Caesura, and the name of the fleet.",
            ("version", "fleet"),
            [((self._version, self._name), 1.0)],
        )

    def _facts(self) -> Iterator[AnyFamily]:
        counters = self._counters
        yield counter("caesura_messages", "Messages read from the bus, by type.", counters.messages)
        yield counter(
            "caesura_messages_repeated", "Messages that repeated a known fact, by type.", counters.duplicates
        )
        yield histogram(
            "caesura_pause_seconds", "How long VMs were paused, host monotonic clock.", counters.pauses
        )
        yield counter("caesura_freezes", "VMs frozen.", counters.freezes)
        yield counter(
            "caesura_pause_overruns", "Pauses that lasted longer than their budget.", counters.overruns
        )
        yield counter(
            "caesura_pauses_resumed_by_guard",
            "Pauses that the pause guard had to end.",
            counters.guard_resumes,
        )
        yield counter(
            "caesura_memory_proofs", "Proofs that guest memory stayed as it was.", counters.memory_proofs
        )
        yield histogram(
            "caesura_clock_error_seconds",
            "Absolute guest clock error before and after the sync.",
            counters.clock_errors,
        )
        yield counter("caesura_clock_syncs", "Verdicts on guest clocks after a resume.", counters.clock_syncs)
        yield counter("caesura_clock_sync_runs", "Clock-syncs that agents ran.", counters.agent_syncs)
        yield counter("caesura_wave_transitions", "Waves that reached a status.", counters.waves)
        yield counter("caesura_events", "Scheduled events that reached a status.", counters.events)
        yield histogram(
            "caesura_event_notice_seconds", "Publication of an event to NotBefore.", counters.notice
        )
        yield histogram(
            "caesura_event_approval_delay_seconds",
            "Publication of an event to its approval.",
            counters.approval_delay,
        )
        yield counter("caesura_event_approvals", "Approvals that workloads gave.", counters.approvals)
        yield counter("caesura_vm_readiness", "Answers of agents to scheduled events.", counters.readiness)
        yield counter("caesura_hooks", "Hooks that ended.", counters.hooks)
        yield histogram("caesura_hook_seconds", "How long hooks ran.", counters.hook_seconds)
        yield counter("caesura_operations", "Reports of commanded operations.", counters.operations)
        yield counter(
            "caesura_commands", "Commands sent to hosts, repetitions not counted.", counters.commands
        )
        yield counter("caesura_updates", "Updates that ended.", counters.updates)
        yield histogram("caesura_update_seconds", "How long updates ran.", counters.update_seconds)
        yield histogram(
            "caesura_operation_overhead_seconds",
            "Longest pause of an operation minus its update's own seconds.",
            counters.overhead,
        )
        yield counter(
            "caesura_foreign_facts",
            "Facts of a host about a VM that belongs to another one; no other metric counts them.",
            counters.foreign,
        )
        yield counter("caesura_requests", "Operators' requests that were answered.", counters.requests)


def scrape_duration(seconds: float) -> Family:
    """The last family of a scrape."""
    return number("caesura_exporter_scrape_duration_seconds", "Seconds to compute this scrape.", seconds)


def _of_metric(metric: Metric) -> Family:
    """Counters and gauges of the bus, which every service creates with ``prometheus_client``."""
    names = tuple(next((sample.labels for sample in metric.samples), {}))
    values = {tuple(sample.labels[name] for name in names): sample.value for sample in metric.samples}
    if metric.type == "counter":
        return Family(metric.name, metric.documentation, "counter", names, values)
    if metric.type == "gauge":
        return Family(metric.name, metric.documentation, "gauge", names, values)
    raise TypeError(f"{metric.name} is a {metric.type}, which cannot be rendered yet")
