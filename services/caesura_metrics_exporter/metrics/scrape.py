"""``/metrics`` of the exporter: numbers are copied at once, lines rendered in short turns, and compressed in a thread.

Lines are not rendered in a thread: beside a busy event loop it would hold the interpreter for only a small part
of the time, and a scrape took three times as long.
"""

from __future__ import annotations

import asyncio
import gzip
import time
from collections.abc import AsyncIterator, Iterable, Sequence

from aiohttp import web
from prometheus_client.core import Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from caesura.runtime.fleet_label import OfFleet
from caesura_metrics_exporter.metrics.collector import FleetCollector, scrape_duration
from caesura_metrics_exporter.metrics.exposition import AnyFamily, Renderer, encoded

_GZIP_LEVEL = 1  # series are alike: a higher level makes them hardly smaller
_TURN_S = 0.02  # s of rendering, after which other tasks run


class Scrape:
    """A handler for aiohttp. Scrapes are served one at a time: each may have megabytes.

    Args:
        collector: the metrics to render, copied for each scrape.
        others: collectors that a thread may read directly.
        fleet: the name that every series has as a label.
    """

    def __init__(
        self, collector: FleetCollector, others: Sequence[Collector] = (), *, fleet: str = "default"
    ) -> None:
        self._collector = collector
        self._others = [OfFleet(each, fleet) for each in others]
        self._fleet = fleet
        self._one = asyncio.Lock()
        self._renderer = Renderer(fleet)

    async def handle(self, request: web.Request) -> web.Response:
        """Answer one scrape, in the requested format and with the requested names (``name[]``)."""
        names = frozenset(request.query.getall("name[]", []))
        accept = request.headers.get("Accept", "")
        zipped = "gzip" in request.headers.get("Accept-Encoding", "")
        async with self._one:
            began = time.perf_counter()
            _, kind = choose_encoder(accept)
            families = self._collector.families()
            if names or "escaping=dots" in kind or "escaping=values" in kind:
                body = await asyncio.to_thread(self._encoded, families, began, accept, names, zipped=zipped)
            else:
                modern = kind.startswith("application/openmetrics-text")
                parts = [part async for part in self._in_turns(families, modern=modern)]
                took = scrape_duration(time.perf_counter() - began)
                parts += self._renderer.parts([took], modern=modern)
                body = await asyncio.to_thread(self._joined, parts, accept, zipped=zipped)
        headers = {"Content-Type": kind, **({"Content-Encoding": "gzip"} if zipped else {})}
        return web.Response(body=body, headers=headers)

    async def _in_turns(self, families: Iterable[AnyFamily], *, modern: bool) -> AsyncIterator[str]:
        until = time.perf_counter() + _TURN_S
        for part in self._renderer.parts(families, modern=modern):
            yield part
            if time.perf_counter() > until:
                await asyncio.sleep(0)
                until = time.perf_counter() + _TURN_S

    def _joined(self, parts: Iterable[str], accept: str, *, zipped: bool) -> bytes:
        others = (metric for collector in self._others for metric in collector.collect())
        body = "".join(parts).encode() + encoded(others, accept)
        return gzip.compress(body, _GZIP_LEVEL) if zipped else body

    def _encoded(
        self, families: Iterable[AnyFamily], began: float, accept: str, names: frozenset[str], *, zipped: bool
    ) -> bytes:
        """As ``prometheus_client`` does it: slow, but for every request."""
        ours = [*families, scrape_duration(time.perf_counter() - began)]
        metrics: list[Metric] = list(OfFleet(_Copied(ours), self._fleet).collect())
        metrics += [metric for collector in self._others for metric in collector.collect()]
        body = encoded(metrics, accept, names)
        return gzip.compress(body, _GZIP_LEVEL) if zipped else body


class _Copied(Collector):
    """Families that do not change."""

    def __init__(self, families: Iterable[AnyFamily]) -> None:
        self._families = families

    def collect(self) -> list[Metric]:
        """As ``prometheus_client`` has them."""
        return [family.metric() for family in self._families]
