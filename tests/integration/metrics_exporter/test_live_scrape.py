"""A scrape is written out in a thread from a copy: it says the same, and the fold goes on meanwhile."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from typing import Any

import aiohttp
import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from caesura.bus.local_broker import free_port
from caesura.bus.memory import MemoryBroker, MemoryBus
from caesura.bus.port import Delivery
from caesura.contract import messages as m
from caesura.contract.codec import encode
from caesura.contract.topics import channel_of
from caesura.runtime.health import serve_health
from caesura_metrics_exporter.metrics.exposition import Renderer
from caesura_metrics_exporter.metrics.scrape import Scrape
from caesura_metrics_exporter.service import MetricsExporter
from caesura_metrics_exporter.settings import MetricsExporterSettings
from caesura_testing.patience import patient

_CHANGES_BY_ITSELF = (
    "caesura_exporter_scrape_duration",
    "caesura_exporter_handler",
    "caesura_exporter_age_seconds",
)


def resumed(number: int) -> Delivery:
    now = datetime.now(UTC)
    message = m.VmResumed(
        vm=f"vm-{number}",
        host="host-1",
        set=f"set-{number}",
        update_domain=0,
        operation="op",
        method="freeze",
        pause_s=1.5,
        budget_s=5,
        within_budget=True,
        resumed_by="updater",
        at=now,
    )
    payload = encode(message, source="/test", event_id=str(number), time=now)
    where: dict[str, Any] = {"host": "host-1", "set": message.set, "ud": 0, "vm": message.vm}
    return Delivery(channel_of(m.VmResumed).topic(**where), payload)


async def exporter_with(pauses: int) -> MetricsExporter:
    exporter = MetricsExporter(MetricsExporterSettings(), MemoryBus(MemoryBroker()))
    for number in range(pauses):
        await exporter.deliver(resumed(number))
    return exporter


def lines(text: str) -> list[str]:
    return [each for each in text.splitlines() if not each.startswith(_CHANGES_BY_ITSELF)]


async def test_a_copy_stays_as_it_is_while_messages_are_folded() -> None:
    exporter = await exporter_with(3)
    copied = exporter.collector().families()
    before = Renderer().render(copied, modern=False)
    await exporter.deliver(resumed(3))
    await exporter.deliver(resumed(0))
    assert Renderer().render(copied, modern=False) == before
    assert lines(Renderer().render(exporter.collector().families(), modern=False)) != lines(before)


@pytest.mark.parametrize("encoding", ["identity", "gzip"])
async def test_the_formats_and_names_that_are_asked_for(encoding: str) -> None:
    exporter = await exporter_with(2)
    listen = f"127.0.0.1:{free_port()}"
    scrape = Scrape(exporter.collector())
    async with (
        serve_health(listen, {}, CollectorRegistry(), metrics=scrape.handle),
        aiohttp.ClientSession(f"http://{listen}", headers={"Accept-Encoding": encoding}) as session,
    ):
        plain = await session.get("/metrics")
        assert plain.content_type == "text/plain"
        assert plain.headers.get("Content-Encoding", "identity") == encoding
        assert 'caesura_pause_seconds_count{fleet="default",method="freeze",set="set-1"' in await plain.text()
        accept = {"Accept": "application/openmetrics-text; version=1.0.0"}
        modern = await session.get("/metrics", headers=accept)
        assert modern.content_type == "application/openmetrics-text"
        assert (await modern.text()).endswith("# EOF\n")
        one = await session.get("/metrics", params={"name[]": "caesura_freezes_total"})
        samples = [each for each in (await one.text()).splitlines() if not each.startswith("#")]
        assert all(each.startswith("caesura_freezes_total{") for each in samples)


class Gate(Collector):
    """Is not done before the event loop has said so: on the loop itself this would never end."""

    def __init__(self, loop: asyncio.AbstractEventLoop, opened: asyncio.Event) -> None:
        self._loop = loop
        self._opened = opened

    def collect(self) -> list[GaugeMetricFamily]:
        asyncio.run_coroutine_threadsafe(self._opened.wait(), self._loop).result(10)
        return [GaugeMetricFamily("gate", "Open.", value=1)]


async def test_messages_are_folded_while_a_scrape_is_written_out() -> None:
    exporter = await exporter_with(1)
    opened = asyncio.Event()
    scrape = Scrape(exporter.collector(), [Gate(asyncio.get_running_loop(), opened)])
    listen = f"127.0.0.1:{free_port()}"
    async with (
        serve_health(listen, {}, CollectorRegistry(), metrics=scrape.handle),
        aiohttp.ClientSession(f"http://{listen}") as session,
    ):
        asked = asyncio.create_task(session.get("/metrics"))
        async with asyncio.timeout(patient(10)):
            while not scrape._one.locked():  # noqa: ASYNC110 - the request is on its way
                await asyncio.sleep(0.005)
        await exporter.deliver(resumed(7))
        opened.set()
        text = await (await asked).text()
    assert 'gate{fleet="default"} 1.0' in text
    assert 'set="set-0"' in text
    assert 'set="set-7"' not in text, "what came later is for the next scrape"
