"""The coordinator's own metrics; those of the fleet are the exporter's."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from caesura.bus.metrics import bus_families

if TYPE_CHECKING:
    from caesura_coordinator.service import Coordinator


class CoordinatorCollector(Collector):
    """Reads the coordinator's state at scrape time."""

    def __init__(self, coordinator: Coordinator) -> None:
        self._coordinator = coordinator

    def collect(self) -> Iterator[Metric]:
        """All families; called by prometheus_client."""
        coordinator = self._coordinator
        yield GaugeMetricFamily(
            "caesura_coordinator_epoch",
            "Epoch that this coordinator has claimed; 0 before the claim.",
            coordinator.authority.epoch,
        )
        yield GaugeMetricFamily(
            "caesura_coordinator_leads",
            "1 if this coordinator leads, 0 if it stands by.",
            float(coordinator.is_leader),
        )
        yield GaugeMetricFamily(
            "caesura_coordinator_active_rollouts",
            "Rollouts that hold their sets or wait for them: running, aborting or halted.",
            len(coordinator.repository.active),
        )
        yield GaugeMetricFamily(
            "caesura_coordinator_queued_rollouts",
            "Those of the active rollouts that wait for others which hold one of their sets.",
            sum(bool(each.queued_behind) for each in coordinator.repository.active),
        )
        yield GaugeMetricFamily(
            "caesura_coordinator_outbox_messages",
            "Messages stored and not yet accepted by the broker.",
            coordinator.waiting(),
        )
        yield GaugeMetricFamily(
            "caesura_coordinator_outbox_refused_messages",
            "Those of the outbox messages whose topic the broker refuses.",
            coordinator.publisher.refused,
        )
        yield GaugeMetricFamily(
            "caesura_coordinator_outbox_unreadable_messages",
            "Messages that a previous run stored and this one cannot read: kept, but not published.",
            coordinator.outbox.unreadable,
        )
        yield GaugeMetricFamily(
            "caesura_coordinator_store_unsynced_commits",
            "Decisions that are not on disk yet, or not in the database: none of them is published.",
            coordinator.commits.committed - coordinator.commits.on_disk,
        )
        yield from bus_families(coordinator.bus.stats, coordinator.post.decode_errors)
