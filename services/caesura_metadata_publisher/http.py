"""HTTP around the publisher: one aiohttp application per listener. All rules are in ``request``."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager

import structlog
from aiohttp import web

from caesura.runtime.connections import Bounds, fair_share
from caesura.runtime.health import serve_app
from caesura.runtime.listen import own_host
from caesura_metadata_publisher.listeners import Listener
from caesura_metadata_publisher.request import (
    MAX_BODY_BYTES,
    HttpResponse,
    Request,
    foreign_host,
    parse,
    service_error,
)
from caesura_metadata_publisher.service import MetadataPublisher

_SHUTDOWN_S = 1.0  # s: requests in flight at the end take milliseconds; an approval that waits for a lost bus is cut off

_BODY_S = 10.0  # s for a body of some kilobytes

_log = structlog.get_logger("caesura.metadata")


@asynccontextmanager
async def serve_metadata(
    publisher: MetadataPublisher, listeners: Sequence[Listener], http_hosts: Sequence[str] = ()
) -> AsyncIterator[tuple[str, ...]]:
    """Serve every listener while the block runs; gives the addresses, with real ports where 0 was asked for.

    Raises:
        ListenError: naming the address that cannot be opened, and why.
    """
    async with AsyncExitStack() as stack:
        addresses = []
        bounds = Bounds(connections=fair_share(len(listeners), Bounds.connections))
        for listener in listeners:
            app = metadata_app(publisher, listener, http_hosts)
            served = serve_app(app, listener.listen, shutdown_s=_SHUTDOWN_S, bounds=bounds)
            addresses.append(await stack.enter_async_context(served))
        _log.info("metadata.listening", listeners=len(addresses))
        yield tuple(addresses)


def metadata_app(
    publisher: MetadataPublisher, listener: Listener, http_hosts: Sequence[str] = ()
) -> web.Application:
    """The HTTP API as the VM of ``listener`` sees it; ``http_hosts`` as in the settings."""
    known = frozenset(each.lower() for each in http_hosts)

    async def handle(request: web.Request) -> web.StreamResponse:
        try:
            async with asyncio.timeout(_BODY_S):
                body = await _read(request) if request.method == "POST" else b""
        except TimeoutError:
            raise web.HTTPRequestTimeout from None  # it closes the connection, too
        headers = {name.lower(): value for name, value in request.headers.items()}
        parsed: Request | HttpResponse
        if own_host(headers.get("host", "localhost"), known):
            parsed = parse(request.method, request.path, list(request.query.items()), headers, body)
        else:
            parsed = foreign_host(headers["host"])
        try:
            answer = parsed if isinstance(parsed, HttpResponse) else await publisher.answer(listener, parsed)
        except Exception:  # noqa: BLE001 - a client must get the documented 500, not aiohttp's page
            _log.exception("metadata.failed", vm=listener.vm, method=request.method, path=request.path)
            answer = service_error("Unexpected failure.")
        publisher.answers[_endpoint(request.path), _method(request.method), answer.status] += 1
        return _response(answer)

    app = web.Application()
    app.router.add_route("*", "/{path:.*}", handle)
    return app


async def _read(request: web.Request) -> bytes | None:
    """The body, None if it is too large; the Content-Type is ignored."""
    body = bytearray()
    async for chunk in request.content.iter_chunked(16 * 1024):
        body += chunk
        if len(body) > MAX_BODY_BYTES:
            return None
    return bytes(body)


def _response(answer: HttpResponse) -> web.Response:
    headers = {"Server": "caesura", **answer.headers}
    if answer.body:
        headers["Content-Type"] = answer.content_type
    return web.Response(status=answer.status, body=answer.body, headers=headers)


def _endpoint(path: str) -> str:
    # A bounded label: what a client invents does not become a time series.
    second = path.split("/")[2].lower() if path.count("/") >= 2 else ""
    return second if second in {"scheduledevents", "instance", "versions"} else "other"


def _method(method: str) -> str:
    return method if method in {"GET", "POST"} else "other"
