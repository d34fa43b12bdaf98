"""The metrics exporter's shell: reads the whole bus and folds it into ``Tally``, ``Fleet`` and ``Live``."""

from __future__ import annotations

import time
from collections.abc import Callable

import structlog

from caesura.bus.port import Bus, Delivery
from caesura.contract.codec import ContractError, decode
from caesura.contract.messages import HostInventory
from caesura.contract.topics import PREFIX
from caesura_metrics_exporter.fleet import Fleet
from caesura_metrics_exporter.live import Live
from caesura_metrics_exporter.metrics import FleetCollector, SelfStats
from caesura_metrics_exporter.series import Histogram
from caesura_metrics_exporter.settings import MetricsExporterSettings
from caesura_metrics_exporter.stream import LiveStream
from caesura_metrics_exporter.tally import Tally

_HANDLER_BUCKETS = (0.00005, 0.0001, 0.00025, 0.0005, 0.001, 0.005, 0.01, 0.1)

_log = structlog.get_logger("caesura.exporter")


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
        self.tally = Tally()
        self.fleet = Fleet()
        self.live = Live()
        self.stream = LiveStream(self.live, wall, monotonic, self.broker_ping)

    def collector(self) -> FleetCollector:
        """What is registered with Prometheus."""
        return FleetCollector(self.tally, self.fleet, self._own, self._bus, self._monotonic)

    def broker_ping(self) -> str:
        """For /ready."""
        stats = self._bus.stats
        return "" if stats.connected else f"not connected: {stats.last_error or 'still trying'}"

    async def run_bus(self) -> None:
        """Keep the connection; deliver."""
        await self._bus.run(self.deliver)

    async def drain(self) -> None:
        """Leave the bus; the broker keeps the session."""
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
        except ContractError as error:
            self._own.decode_errors[error.kind] += 1
            _log.warning("bus.message_refused", topic=delivery.topic, kind=error.kind, why=error.why)
            return
        now_s = self._monotonic()
        if isinstance(received.message, HostInventory):  # often enough, and not with each message of a storm
            for set_name in self.fleet.forget_empty_sets(now_s):
                self.tally.forget_set(set_name)
        fresh = self.tally.take(received)
        self.fleet.take(received.message, now_s, fresh=fresh, stored=delivery.retained)
        self.live.take(received, self._wall(), now_s, fresh=fresh)

    def _cleared(self, topic: str) -> None:
        before = set(self.fleet.hosts)
        self.fleet.clear(topic)
        self.live.clear(topic, self._wall(), self._monotonic())
        for host in before - set(self.fleet.hosts):
            _log.info("exporter.host_forgotten", host=host)
            self.tally.forget_host(host)
