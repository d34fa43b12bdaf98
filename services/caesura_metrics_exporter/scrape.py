"""``/metrics`` of the exporter: numbers are copied on the event loop, and written out and compressed in a thread."""

from __future__ import annotations

import asyncio
import gzip
import time
from collections.abc import Sequence

from aiohttp import web
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from caesura_metrics_exporter.exposition import AnyFamily, Renderer, encoded
from caesura_metrics_exporter.metrics import FleetCollector, scrape_duration

_GZIP_LEVEL = 1  # series are alike: more work makes them hardly smaller


class Scrape:
    """A handler for aiohttp. Scrapes are served one after the other: each may be megabytes.

    Args:
        collector: what is written out, copied for each scrape.
        others: collectors that may be read from a thread as they are.
    """

    def __init__(self, collector: FleetCollector, others: Sequence[Collector] = ()) -> None:
        self._collector = collector
        self._others = others
        self._one = asyncio.Lock()
        self._renderer = Renderer()

    async def handle(self, request: web.Request) -> web.Response:
        """Answer one scrape, in the format and with the names (``name[]``) that it asks for."""
        names = frozenset(request.query.getall("name[]", []))
        accept = request.headers.get("Accept", "")
        zipped = "gzip" in request.headers.get("Accept-Encoding", "")
        async with self._one:
            began = time.perf_counter()
            families = self._collector.families()
            body, kind = await asyncio.to_thread(self._write, families, began, accept, names, zipped=zipped)
        headers = {"Content-Type": kind, **({"Content-Encoding": "gzip"} if zipped else {})}
        return web.Response(body=body, headers=headers)

    def _write(
        self, families: list[AnyFamily], began: float, accept: str, names: frozenset[str], *, zipped: bool
    ) -> tuple[bytes, str]:
        _, kind = choose_encoder(accept)
        others = [metric for collector in self._others for metric in collector.collect()]
        if names or "escaping=dots" in kind or "escaping=values" in kind:
            families = [*families, scrape_duration(time.perf_counter() - began)]
            text = encoded([*(each.metric() for each in families), *others], accept, names)
        else:
            modern = kind.startswith("application/openmetrics-text")
            written = self._renderer.render(families, modern=modern)
            rest = encoded(others, accept)
            took = self._renderer.render([scrape_duration(time.perf_counter() - began)], modern=modern)
            text = b"".join((written.encode(), took.encode(), rest))
        return (gzip.compress(text, _GZIP_LEVEL) if zipped else text), kind
