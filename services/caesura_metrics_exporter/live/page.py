"""The live page over HTTP: ``/``, its files, ``/live/state`` and ``/live/events``. Reads only; nothing here commands.

The page shows more than ``/metrics`` does (names of VMs, reasons), to every client that reaches the port. A web site that a user
visits could reach it too, by a DNS name that it points at this machine (DNS rebinding): such a request carries that name
as its Host, so unknown names are refused.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Awaitable, Callable, Sequence
from importlib import resources
from importlib.metadata import version

from aiohttp import web

from caesura.runtime.listen import own_host
from caesura_metrics_exporter.live.stream import LiveStream, TooManyReaders

HEARTBEAT_S = 5.0  # s: the page considers a stream dead after three missed ones; proxies cut silent connections, some after 30
STALL_S = 30.0  # s for which a reader may read nothing before its connection is cut
LIFETIME_S = 600.0  # s: then the page is asked to reconnect, so that an abandoned one does not keep its slot
_LOOK_S = 1.0  # s between two checks whether a silent reader is still connected
_CHUNK = 65536  # bytes: the most that waits in memory for one reader, in addition to shared data
_RETRY_MS = 1000
_TYPES = {".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml", ".html": "text/html"}
_FILES = ("index.html", "style.css", "page.js", "model.js", "chart.js", "tables.js", "mark.svg")

SECURITY_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
}

_Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class LivePage:
    """The routes; give ``extend`` to ``serve_health``.

    Args:
        page_hosts: host names under which the page may be requested, in addition to those that nobody else can own.
        heartbeat_s: seconds between two beats on an idle stream.
        stall_s: seconds for which a reader may read nothing.
        lifetime_s: seconds after which a stream is ended, for the page to open the next.
    """

    def __init__(
        self,
        stream: LiveStream,
        *,
        page_hosts: Sequence[str] = (),
        heartbeat_s: float = HEARTBEAT_S,
        stall_s: float = STALL_S,
        lifetime_s: float = LIFETIME_S,
    ) -> None:
        self._stream = stream
        self._page_hosts = frozenset(each.lower() for each in page_hosts)
        self._heartbeat_s = heartbeat_s
        self._stall_s = stall_s
        self._lifetime_s = lifetime_s

    def extend(self, app: web.Application) -> None:
        """Add the routes."""
        for name in _FILES:
            path = "/" if name == "index.html" else f"/page/{name}"
            app.router.add_get(path, self._guarded(_file(name)))
        app.router.add_get("/live/state", self._guarded(_not_across_sites(self._state)))
        events = self._guarded(_not_across_sites(self._events))
        app.router.add_get("/live/events", events, allow_head=False)
        app.on_shutdown.append(self._close)

    async def _close(self, _: web.Application) -> None:
        self._stream.close()

    def _guarded(self, handler: _Handler) -> _Handler:
        async def handle(request: web.Request) -> web.StreamResponse:
            if not own_host(request.headers.get("Host", ""), self._page_hosts):
                return _say(
                    421,
                    f"This is not known to be {request.headers.get('Host')!r}. If it is: name it in "
                    "CAESURA_METRICS_EXPORTER_PAGE_HOSTS.",
                )
            return await handler(request)

        return handle

    async def _state(self, _: web.Request) -> web.Response:
        headers = {**SECURITY_HEADERS, "Cache-Control": "no-store"}
        return web.Response(body=self._stream.state(), content_type="application/json", headers=headers)

    async def _events(self, request: web.Request) -> web.StreamResponse:
        try:
            with self._stream.reading():
                return await self._follow(request)
        except TooManyReaders as error:
            return _say(503, str(error), {"Retry-After": "10"})

    async def _follow(self, request: web.Request) -> web.StreamResponse:
        headers = {
            **SECURITY_HEADERS,
            "Content-Type": "text/event-stream",
            "Cache-Control": "no-store",
            "X-Accel-Buffering": "no",  # otherwise nginx would buffer events
        }
        response = web.StreamResponse(headers=headers)
        try:
            await response.prepare(request)
            await self._send(response, b"retry: %d\n\n" % _RETRY_MS)
            await self._tell(request, response)
        except TimeoutError:
            if request.transport is not None:
                request.transport.abort()  # it does not read: discard its buffer, too
        except ConnectionError:
            pass  # it disconnected
        return response

    async def _tell(self, request: web.Request, response: web.StreamResponse) -> None:
        loop = asyncio.get_running_loop()
        end = loop.time() + self._lifetime_s
        cursor = self._stream.cursor(request.headers.get("Last-Event-ID", ""))
        while not self._stream.closing:
            head, body, cursor = self._stream.event(cursor)
            await self._send(response, head)
            for at in range(0, len(body), _CHUNK):
                await self._send(response, body[at : at + _CHUNK])
            beat_at = loop.time() + self._heartbeat_s
            while not await self._stream.wait(cursor, min(_LOOK_S, self._heartbeat_s)):
                if request.transport is None:
                    return  # it disconnected
                if loop.time() >= beat_at:
                    await self._send(response, self._stream.beat())
                    beat_at = loop.time() + self._heartbeat_s
                if loop.time() >= end:
                    break
            if loop.time() >= end:
                await self._send(response, b"event: again\ndata: {}\n\n")
                return

    async def _send(self, response: web.StreamResponse, data: bytes | memoryview) -> None:
        async with asyncio.timeout(self._stall_s):
            await response.write(data)


def _not_across_sites(handler: _Handler) -> _Handler:
    """A page of another site could not read the answer, but would occupy one of the few streams."""

    async def handle(request: web.Request) -> web.StreamResponse:
        asked = request.headers
        if asked.get("Sec-Fetch-Site") == "cross-site" and asked.get("Sec-Fetch-Mode") != "navigate":
            return _say(403, "This is for the page itself, not for pages of other sites.")
        return await handler(request)

    return handle


def _file(name: str) -> _Handler:
    body = (resources.files("caesura_metrics_exporter.live") / "static" / name).read_bytes()
    if name == "index.html":
        body = body.replace(b"{{version}}", version("caesura").encode())
    kind = _TYPES[name[name.rindex(".") :]]
    tag = f'"{hashlib.sha256(body).hexdigest()[:16]}"'
    headers = {**SECURITY_HEADERS, "Cache-Control": "no-cache", "ETag": tag}

    async def serve(request: web.Request) -> web.Response:
        if request.headers.get("If-None-Match") == tag:
            return web.Response(status=304, headers=headers)
        return web.Response(body=body, content_type=kind, charset="utf-8", headers=headers)

    return serve


def _say(status: int, text: str, headers: dict[str, str] | None = None) -> web.Response:
    return web.Response(status=status, text=text + "\n", headers={**SECURITY_HEADERS, **(headers or {})})
