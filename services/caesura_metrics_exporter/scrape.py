"""``/metrics`` of the exporter: copied on the event loop, written out and compressed in a thread."""

from __future__ import annotations

import asyncio
import gzip
from collections.abc import Iterable, Sequence

from aiohttp import web
from prometheus_client import CollectorRegistry
from prometheus_client.core import Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from caesura_metrics_exporter.still import still

_GZIP_LEVEL = 1  # series are alike: more work makes them hardly smaller


class Scrape:
    """A handler for aiohttp. Scrapes are served one after the other: each may be tens of megabytes.

    Args:
        collector: what is written out, copied for each scrape.
        others: collectors that may be read from a thread as they are.
    """

    def __init__(self, collector: Collector, others: Sequence[Collector] = ()) -> None:
        self._collector = collector
        self._others = others
        self._one = asyncio.Lock()

    async def handle(self, request: web.Request) -> web.Response:
        """Answer one scrape, in the format and with the names (``name[]``) that it asks for."""
        names = request.query.getall("name[]", [])
        zipped = "gzip" in request.headers.get("Accept-Encoding", "")
        async with self._one:
            copied = (still(self._collector), *self._others)
            accept = request.headers.get("Accept", "")
            body, kind = await asyncio.to_thread(_write, copied, accept, names, zipped)
        headers = {"Content-Type": kind, **({"Content-Encoding": "gzip"} if zipped else {})}
        return web.Response(body=body, headers=headers)


def _write(
    collectors: Iterable[Collector], accept: str, names: Sequence[str], zipped: bool
) -> tuple[bytes, str]:
    registry = CollectorRegistry()
    encoder, kind = choose_encoder(accept)
    wanted = _Wanted(collectors, frozenset(names))
    registry.register(wanted)
    text = encoder(registry)
    return (gzip.compress(text, _GZIP_LEVEL) if zipped else text), kind


class _Wanted(Collector):
    """Some collectors' families, those of other names left out where names are given."""

    def __init__(self, collectors: Iterable[Collector], names: frozenset[str]) -> None:
        self._collectors = collectors
        self._names = names

    def collect(self) -> Iterable[Metric]:
        """As they come."""
        for collector in self._collectors:
            for family in collector.collect():
                if not self._names:
                    yield family
                    continue
                family.samples = [each for each in family.samples if each.name in self._names]
                if family.samples:
                    yield family
