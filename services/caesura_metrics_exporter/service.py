"""The metrics exporter's shell: reads the whole bus and passes each message on, in this order.

``StateFold`` folds what is state; ``FactCounters`` counts it, and says whether it is new; ``FleetMetricsView`` and ``LivePageState`` show it.
A *resumed* fact takes the same way: its pause is observed in the histograms, ends in the current state, and is drawn on the live page.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from msgspec.structs import replace

from caesura.bus.messaging import MessageClient
from caesura.bus.port import Bus, Delivery
from caesura.bus.refusal_log import RefusalLog
from caesura.bus.resync import Resync
from caesura.contract.codec import ContractError, decode
from caesura.contract.envelope import source_of
from caesura.contract.messages import (
    ExporterResyncRequested,
    FleetResyncRequested,
    HostInventory,
    VmClockSynced,
    VmFrozen,
    VmResumed,
)
from caesura.contract.parts import PARTS, Joiner
from caesura.contract.topics import PREFIX, match_topic
from caesura.runtime.logs import get_logger
from caesura.runtime.sampler import Sampler
from caesura_metrics_exporter.live.page_state import LivePageState
from caesura_metrics_exporter.live.stream import LiveStream
from caesura_metrics_exporter.metrics.collector import FleetCollector, SelfStats
from caesura_metrics_exporter.metrics.counters import FactCounters
from caesura_metrics_exporter.metrics.current_state import FleetMetricsView
from caesura_metrics_exporter.metrics.series import Histogram
from caesura_metrics_exporter.settings import MetricsExporterSettings
from caesura_metrics_exporter.state_fold import StateFold

_HANDLER_BUCKETS = (0.00005, 0.0001, 0.00025, 0.0005, 0.001, 0.005, 0.01, 0.1)

_log = get_logger("caesura.exporter")


def filters() -> tuple[str, ...]:
    """Everything."""
    return (f"{PREFIX}/#",)


class MetricsExporter:
    """Counts what happens on the bus. Nothing is persisted: Prometheus keeps the history."""

    def __init__(
        self,
        settings: MetricsExporterSettings,
        bus: Bus,
        *,
        monotonic: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._settings = settings
        self._bus = bus
        self._monotonic = monotonic
        self._wall = wall
        self._own = SelfStats(handler=Histogram(_HANDLER_BUCKETS), began_s=monotonic())
        self.counters = FactCounters()
        self._folded = StateFold()
        self.fleet = FleetMetricsView(self._folded)
        self._joiner = Joiner()
        self._ownership = self._folded.state.ownership
        self._sampled = Sampler()
        self._refused = RefusalLog()
        self.resync = Resync(
            MessageClient(bus, source_of(settings.fleet, "exporter", settings.instance)),
            enabled=settings.broker_retained == "ignored",
            request=lambda: ExporterResyncRequested(instance=settings.instance),
            instance=settings.instance,
        )
        self.live = LivePageState(self._folded)
        self.stream = LiveStream(self.live, wall, monotonic, self.broker_ping)

    def collector(self) -> FleetCollector:
        """The collector to register with Prometheus."""
        foreign = self._ownership.foreign
        return FleetCollector(
            self.counters, self.fleet, self._own, self._bus, self._monotonic, foreign, self._settings.fleet
        )

    def broker_ping(self) -> str:
        """For /ready."""
        stats = self._bus.stats
        return "" if stats.connected else f"not connected: {stats.last_error or 'still trying'}"

    async def run_bus(self) -> None:
        """Keep the connection; deliver."""
        await self._bus.run(self.deliver, self._on_connected)

    async def _on_connected(self) -> None:
        self.resync.connected()

    async def drain(self) -> None:
        """Disconnect from the bus; the broker keeps the session."""
        await self._bus.close()

    async def deliver(self, delivery: Delivery) -> None:
        """Fold one delivery; give this to ``Bus.run``."""
        began = time.perf_counter()
        self._own.last_message_at = self._wall()
        if delivery.payload:
            self._take(delivery)
        else:
            self._cleared(delivery.topic)
        self._own.handler.observe(time.perf_counter() - began)

    def _take(self, delivery: Delivery) -> None:
        try:
            received = decode(delivery.topic, delivery.payload)
            if received.channel.message in PARTS.values():
                self.counters.take(received)
            whole = self._joiner.take(received)
        except ContractError as error:
            self._own.decode_errors[error.kind] += 1
            self._refused.say(delivery.topic, error)
            return
        if whole is None:
            return
        received = whole
        now_s = self._monotonic()
        message = received.message
        if isinstance(message, FleetResyncRequested):
            self.resync.observed(message)
        if isinstance(message, VmFrozen | VmResumed | VmClockSynced):
            if not self._ownership.may_speak(message.host, message.vm):
                self._foreign(message)
                return
        elif isinstance(message, HostInventory):  # often enough, and not with each message of a storm
            for set_name in self.fleet.forget_empty_sets(now_s):
                self.counters.forget_set(set_name)
        step = self._folded.take(message, now_s)
        if isinstance(message, HostInventory):
            received = replace(received, message=self._folded.state.inventories[message.host])
        fresh = self.counters.take(received)
        self.fleet.take(received.message, now_s, fresh=fresh, stored=delivery.retained, step=step)
        self.live.take(received, self._wall(), now_s, fresh=fresh, step=step)

    def _foreign(self, fact: VmFrozen | VmResumed | VmClockSynced) -> None:
        """Messages of a host about another's VM are only counted."""
        self.counters.foreign.add(fact.host)
        left_out = self._sampled.due(fact.host)
        if left_out is not None:
            owner = self._ownership.owner_of(fact.vm)
            _log.warning(
                "fact.of_foreign_vm",
                host=fact.host,
                vm=fact.vm,
                belongs_to=owner,
                kind=fact.TYPE,
                left_out=left_out,
            )

    def _cleared(self, topic: str) -> None:
        place = match_topic(topic)
        host = place[1].get("host", "") if place is not None else ""
        known = host in self.fleet.hosts
        now_s = self._monotonic()
        step = self._folded.clear(topic, now_s)
        self.fleet.clear(topic, now_s, step)
        self._joiner.clear(topic)
        self.live.clear(topic, self._wall(), now_s, step)
        if known and host not in self.fleet.hosts:
            _log.info("exporter.host_forgotten", host=host)
            self.counters.forget_host(host)
