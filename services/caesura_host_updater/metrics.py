"""What the host updater reports of itself on ``/metrics``; the fleet's numbers come from the exporter."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from caesura.bus.metrics import bus_families
from caesura.bus.port import BusStats
from caesura.contract.messages import OperationReported
from caesura_host_updater.operation.state import Operation

# s: from a live hand-over to beyond the largest budget, with a boundary at it
_BUCKETS = (0.001, 0.005, 0.01, 0.05, 0.1, 0.25, 0.5, 1, 2, 5, 10, 15, 20, 30, 60)


class _BusCollector(Collector):
    def __init__(self, stats: BusStats, decode_errors: Mapping[str, int]) -> None:
        self._stats = stats
        self._decode_errors = decode_errors

    def collect(self) -> Iterator[Metric]:
        """The families of the bus."""
        return bus_families(self._stats, self._decode_errors)


class HostMetrics:
    """Counters of this host updater."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry
        self._pause = Histogram(
            "caesura_host_updater_pause_seconds",
            "Seconds that a VM was paused, from just before its freeze to just after its resume.",
            buckets=_BUCKETS,
            registry=registry,
        )
        self._over = Counter(
            "caesura_host_updater_budget_overruns_total",
            "Pauses longer than their budget.",
            registry=registry,
        )
        self._operations = Counter(
            "caesura_host_updater_operations_total",
            "Operations by how they ended.",
            ["status"],
            registry=registry,
        )
        self._guard = Counter(
            "caesura_host_updater_guard_fires_total",
            "Operations whose VMs the pause guard resumed.",
            registry=registry,
        )

    def observe_bus(self, stats: BusStats, decode_errors: Mapping[str, int]) -> None:
        """Show the bus connection too."""
        self._registry.register(_BusCollector(stats, decode_errors))

    def observe_gauges(
        self,
        *,
        outbox: Callable[[], int],
        refused: Callable[[], int],
        clocks: Callable[[], int],
        busy: Callable[[], bool],
    ) -> None:
        """Numbers that are read at scrape time."""
        gauges: tuple[tuple[str, str, Callable[[], float]], ...] = (
            ("outbox_messages", "Facts that the broker has not accepted yet.", outbox),
            ("outbox_refused_messages", "Facts and statuses on topics that the broker refuses.", refused),
            ("clock_waits", "Resumed VMs whose clock is not judged yet.", clocks),
            ("operation_active", "1 while an operation is under way, else 0.", lambda: float(busy())),
        )
        for name, text, read in gauges:
            Gauge(f"caesura_host_updater_{name}", text, registry=self._registry).set_function(read)

    def finished(self, report: OperationReported, state: Operation | None) -> None:
        """An operation ended; ``state`` is None if it never began."""
        self._operations.labels(report.status).inc()
        if state is None:
            return
        for vm in state.vms:
            if vm.frozen_at is not None:
                self._pause.observe(vm.pause_s)
                if vm.pause_s > state.budget_s:
                    self._over.inc()
        if any(vm.resumed_by == "guard" for vm in state.vms):
            self._guard.inc()
