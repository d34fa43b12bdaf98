"""``/live``, ``/ready`` and ``/metrics`` for every service.

``/live`` answers 200 while the event loop runs. ``/ready`` runs the named pings (broker, store, driver):
200 when all are well, else 503 with the names and reasons. ``/metrics`` is the service's own registry.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError
from aiohttp.log import server_logger
from prometheus_client import CollectorRegistry
from prometheus_client.aiohttp import make_aiohttp_handler

from caesura.runtime.connections import Bounds, Gate, bound_sockets
from caesura.runtime.errors import CaesuraError
from caesura.runtime.fleet_label import registry_of_fleet
from caesura.runtime.listen import parse_listen

_WHY = 200  # characters of the error in a request: a header may be long
_SHUTDOWN_S = 2.0  # s: most answers take less; the others are cut

Ping = Callable[[], str]
"""Empty text if healthy, else what is wrong."""

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

MetricsHandler = Handler

LowLevelHandler = Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]

Refusal = Callable[[str], web.StreamResponse]
"""The answer to what is not HTTP."""

DEFAULT_BOUNDS = Bounds()


class ListenError(CaesuraError):
    """A listener could not be opened."""


class _OneLine(logging.Filter):
    """Logs a client's error as one line: aiohttp logs a traceback, which any client could provoke."""

    def filter(self, record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        if isinstance(error, HttpProcessingError | web.RequestPayloadError | ConnectionError):
            why = ascii(" ".join(str(error).split()))[1:-1]
            record.msg, record.args = "%s: %s: %s", (record.getMessage(), type(error).__name__, why[:_WHY])
            record.exc_info = record.exc_text = None
            record.levelno, record.levelname = logging.WARNING, "WARNING"
        return True


_ONE_LINE = _OneLine()


@asynccontextmanager
async def serve_app(
    app: web.Application,
    listen: str | socket.socket,
    *,
    shutdown_s: float = _SHUTDOWN_S,
    bounds: Bounds = DEFAULT_BOUNDS,
) -> AsyncIterator[str]:
    """Serve ``app`` on one listener while the block runs; yields its address, with the actual port if 0 was requested.

    Args:
        listen: an address, or a bound socket, which is closed at the end.
        shutdown_s: seconds that requests in flight get at the end; longer ones are cut.
        bounds: how many connections are allowed, and how long one may take to send its request.

    Raises:
        ListenAddressError: it is not an address.
        ListenError: saying which address and why, for example that it is in use.
    """
    gates: list[Gate] = []

    @web.middleware
    async def timed(request: web.Request, handler: Handler) -> web.StreamResponse:
        connection = gates[0].connection(request.protocol)
        if connection is None:
            return await handler(request)
        connection.began()
        try:
            return await handler(request)
        finally:
            connection.answered()

    app.middlewares.append(timed)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=shutdown_s, keepalive_timeout=bounds.idle_s)
    async with _serve(runner, listen, bounds, gates) as address:
        yield address


@asynccontextmanager
async def serve_requests(
    handler: LowLevelHandler,
    refuse: Refusal,
    listen: str | socket.socket,
    *,
    shutdown_s: float = _SHUTDOWN_S,
    bounds: Bounds = DEFAULT_BOUNDS,
) -> AsyncIterator[str]:
    """As ``serve_app``, without routes: every request goes to one handler, and every answer is the service's own.

    Args:
        handler: answers what is HTTP; it must not raise. A body is given to it as it was sent, however it is encoded.
        refuse: answers what is not HTTP; its argument is what the parser did not understand.

    Raises:
        ListenAddressError, ListenError: as ``serve_app``.
    """
    gates: list[Gate] = []

    async def timed(request: web.BaseRequest) -> web.StreamResponse:
        connection = gates[0].connection(request.protocol)
        if connection is None:
            return await handler(request)
        connection.began()
        try:
            return await handler(request)
        finally:
            connection.answered()

    server = _RefusingServer(
        timed, refuse, access_log=None, keepalive_timeout=bounds.idle_s, auto_decompress=False
    )
    runner = web.ServerRunner(server, shutdown_timeout=shutdown_s)
    async with _serve(runner, listen, bounds, gates) as address:
        yield address


class _RefusingServer(web.Server):
    """Its connections answer what is not HTTP by ``refuse``, not by aiohttp's page."""

    def __init__(self, handler: LowLevelHandler, refuse: Refusal, **options: Any) -> None:
        super().__init__(handler, **options)
        self._options = options
        self.refuse = refuse

    def __call__(self) -> web.RequestHandler:
        return _RefusingProtocol(self, loop=self._loop, **self._options)


class _RefusingProtocol(web.RequestHandler):
    __slots__ = ("_refuse",)

    def __init__(self, server: _RefusingServer, **options: Any) -> None:
        super().__init__(server, **options)
        self._refuse = server.refuse

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        # For its log line, and for its error where an answer was begun.
        ours = super().handle_error(request, status, exc, message)
        return self._refuse(message or "") if isinstance(exc, HttpProcessingError) else ours


@asynccontextmanager
async def _serve(
    runner: web.BaseRunner,
    listen: str | socket.socket,
    bounds: Bounds,
    gates: list[Gate],
) -> AsyncIterator[str]:
    server_logger.addFilter(_ONE_LINE)  # the same filter each time: added only once
    where = parse_listen(listen) if isinstance(listen, str) else listen
    await runner.setup()
    server = runner.server
    assert server is not None  # noqa: S101 - set up above
    gate = Gate(server, listen if isinstance(listen, str) else _address(listen), bounds)
    gates.append(gate)
    try:
        try:
            if isinstance(where, socket.socket):
                sockets = [where]
            else:
                if isinstance(where, str):
                    Path(where).unlink(missing_ok=True)  # noqa: ASYNC240 - a stale socket of our own, once at start
                sockets = await bound_sockets(where)
            for each in sockets:
                gate.listen(each)
        except OSError as error:
            raise ListenError(
                f"cannot listen on {listen}: {error.strerror or error}. Choose another address or stop what uses it."
            ) from error
        yield _address(sockets[0])
    finally:
        gate.close()
        await asyncio.shield(runner.cleanup())


def _address(opened: socket.socket) -> str:
    address = opened.getsockname()
    if isinstance(address, str):
        return f"unix:{address}"
    host = f"[{address[0]}]" if ":" in address[0] else address[0]
    return f"{host}:{address[1]}"


def health_app(
    pings: Mapping[str, Ping],
    registry: CollectorRegistry,
    metrics: MetricsHandler | None = None,
    *,
    fleet: str = "default",
) -> web.Application:
    """The three endpoints as an aiohttp application, to be served or mounted.

    ``metrics`` answers /metrics instead of the default, which renders ``registry`` on the event loop, with ``fleet`` as a label.
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
    app.router.add_get("/metrics", metrics or make_aiohttp_handler(registry_of_fleet(registry, fleet)))
    return app


@asynccontextmanager
async def serve_health(
    listen: str,
    pings: Mapping[str, Ping],
    registry: CollectorRegistry,
    *,
    extend: Callable[[web.Application], None] | None = None,
    metrics: MetricsHandler | None = None,
    bounds: Bounds = DEFAULT_BOUNDS,
    fleet: str = "default",
) -> AsyncIterator[None]:
    """Serve health on ``listen`` while the block runs; with an empty ``listen``, serve nothing.

    ``extend`` adds the service's other routes; for ``metrics`` and ``fleet`` see ``health_app``, for ``bounds``
    ``serve_app``.
    """
    if not listen:
        yield
        return
    app = health_app(pings, registry, metrics, fleet=fleet)
    if extend is not None:
        extend(app)
    async with serve_app(app, listen, bounds=bounds):
        yield
