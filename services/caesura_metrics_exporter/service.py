"""The metrics exporter's shell: reads the whole bus and folds it into ``Tally``, ``Fleet`` and ``Live``."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import structlog

from caesura.bus.port import Bus, Delivery
from caesura.contract.codec import ContractError, decode
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
        self._own = SelfStats(handler=Histogram(_HANDLER_BUCKETS))
        self.tally = Tally()
        self.fleet = Fleet()
        self.live = Live()
        self.stream = LiveStream(self.live, wall, self.broker_ping)

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

    async def run_forgetting(self) -> None:
        """Drop the series of hosts that are gone."""
        while True:
            await asyncio.sleep(self._settings.forget_after_s / 10)
            self.forget_stale()

    def forget_stale(self) -> None:
        """Drop what belongs to hosts that were not heard of for ``forget_after_s``."""
        for host in self.fleet.stale_hosts(self._monotonic(), self._settings.forget_after_s):
            _log.info("exporter.host_forgotten", host=host)
            self._forget(host)

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
        fresh = self.tally.take(received)
        self.fleet.take(received.message, self._monotonic(), fresh=fresh)
        self.live.take(received, self._wall(), fresh=fresh)

    def _cleared(self, topic: str) -> None:
        before = set(self.fleet.hosts)
        self.fleet.clear(topic)
        self.live.clear(topic, self._wall())
        for host in before - set(self.fleet.hosts):
            self._forget(host)

    def _forget(self, host: str) -> None:
        self.fleet.forget_host(host)
        self.tally.forget_host(host)
        self.live.forget_host(host)
