"""``/live``, ``/ready`` and ``/metrics`` for every service.

``/live`` answers 200 while the event loop turns. ``/ready`` runs the named pings (broker, store, driver):
200 when all are well, else 503 with the names and reasons. ``/metrics`` is the service's own registry.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError
from aiohttp.log import server_logger
from prometheus_client import CollectorRegistry
from prometheus_client.aiohttp import make_aiohttp_handler

from caesura.runtime.errors import CaesuraError
from caesura.runtime.listen import parse_listen

_WHY = 200  # characters of what was wrong with a request: a header may be long
_SHUTDOWN_S = 2.0  # s: most answers take less; what does not end by itself is cut

Ping = Callable[[], str]
"""Empty text when well, else what is wrong."""

MetricsHandler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class ListenError(CaesuraError):
    """A listener could not be opened."""


class _OneLine(logging.Filter):
    """What a client did wrong is one line of a log: aiohttp gives it a traceback, which anybody could have us write."""

    def filter(self, record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        if isinstance(error, HttpProcessingError | web.RequestPayloadError | ConnectionError):
            why = ascii(" ".join(str(error).split()))[1:-1]
            record.msg, record.args = "%s: %s: %s", (record.getMessage(), type(error).__name__, why[:_WHY])
            record.exc_info = record.exc_text = None
            record.levelno, record.levelname = logging.WARNING, "WARNING"
        return True


_ONE_LINE = _OneLine()


async def open_site(runner: web.AppRunner, listen: str) -> None:
    """Open one listener of an aiohttp runner.

    Raises:
        ListenAddressError: it is no address.
        ListenError: saying which address and why, for example that it is in use.
    """
    server_logger.addFilter(_ONE_LINE)  # the same one each time: added once
    where = parse_listen(listen)
    site: web.BaseSite
    try:
        if isinstance(where, str):
            Path(where).unlink(missing_ok=True)  # noqa: ASYNC240 - a stale socket of our own, once at start
            site = web.UnixSite(runner, where)
        else:
            site = web.TCPSite(runner, *where)
        await site.start()
    except OSError as error:
        raise ListenError(
            f"cannot listen on {listen}: {error.strerror or error}. Choose another address or stop what uses it."
        ) from error


def health_app(
    pings: Mapping[str, Ping], registry: CollectorRegistry, metrics: MetricsHandler | None = None
) -> web.Application:
    """The three endpoints as an aiohttp application, to be served or mounted.

    ``metrics`` answers /metrics in the place of what writes ``registry`` out on the event loop.
    """

    async def live(_: web.Request) -> web.Response:
        return web.json_response({"status": "live"})

    async def ready(_: web.Request) -> web.Response:
        wrong = {name: why for name, ping in pings.items() if (why := ping())}
        body = {"status": "not ready" if wrong else "ready", "wrong": wrong, "pings": sorted(pings)}
        return web.json_response(body, status=503 if wrong else 200)

    app = web.Application()
    app.router.add_get("/live", live)
    app.router.add_get("/ready", ready)
    app.router.add_get("/metrics", metrics or make_aiohttp_handler(registry))
    return app


@asynccontextmanager
async def serve_health(
    listen: str,
    pings: Mapping[str, Ping],
    registry: CollectorRegistry,
    *,
    extend: Callable[[web.Application], None] | None = None,
    metrics: MetricsHandler | None = None,
) -> AsyncIterator[None]:
    """Serve health on ``listen`` while the block runs; with an empty ``listen``, serve nothing.

    ``extend`` adds what the service serves besides; for ``metrics`` see ``health_app``.
    """
    if not listen:
        yield
        return
    app = health_app(pings, registry, metrics)
    if extend is not None:
        extend(app)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=_SHUTDOWN_S)
    await runner.setup()
    try:
        await open_site(runner, listen)
        yield
    finally:
        await asyncio.shield(runner.cleanup())
