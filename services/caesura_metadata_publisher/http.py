"""HTTP around the publisher: one listener a VM. All rules are in ``request``; no answer is aiohttp's own."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager

from aiohttp import HttpVersion11, web

from caesura.runtime.activation import check_all_used, socket_for
from caesura.runtime.connections import Bounds, fair_share
from caesura.runtime.health import LowLevelHandler, serve_requests
from caesura.runtime.listen import own_host
from caesura.runtime.logs import get_logger
from caesura_metadata_publisher.events_document import unchanged
from caesura_metadata_publisher.listeners import Listener
from caesura_metadata_publisher.polls import KnownPolls
from caesura_metadata_publisher.request import (
    MAX_BODY_BYTES,
    HttpResponse,
    ReadEvents,
    Request,
    bad_request,
    foreign_host,
    not_http,
    parse,
    service_error,
    too_slow,
)
from caesura_metadata_publisher.service import MetadataPublisher

_SHUTDOWN_S = 1.0  # s: requests in flight at the end take milliseconds; an approval that waits for a lost bus is cut off

_BODY_S = 10.0  # s for a body of some kilobytes

_log = get_logger("caesura.metadata")


@asynccontextmanager
async def serve_metadata(
    publisher: MetadataPublisher,
    listeners: Sequence[Listener],
    http_hosts: Sequence[str] = (),
    inherited: Sequence[socket.socket] = (),
    connections: int = Bounds.connections,
) -> AsyncIterator[tuple[str, ...]]:
    """Serve every listener while the block runs; gives the addresses, with real ports where 0 was asked for.

    Args:
        http_hosts: as in the settings.
        connections: the most that one listener has at once.
        inherited: sockets that the service manager opened; the other addresses are opened here.

    Raises:
        ListenAddressError: a listener's address is wrong, or an inherited socket belongs to none.
        ListenError: naming the address that cannot be opened, and why.
    """
    check_all_used((each.listen for each in listeners), inherited)
    async with AsyncExitStack() as stack:
        addresses = []
        bounds = Bounds(connections=fair_share(len(listeners), connections))
        for listener in listeners:
            served = serve_requests(
                metadata_handler(publisher, listener, http_hosts),
                refusal(publisher),
                socket_for(listener.listen, inherited) or listener.listen,
                shutdown_s=_SHUTDOWN_S,
                bounds=bounds,
            )
            addresses.append(await stack.enter_async_context(served))
        _log.info("metadata.listening", listeners=len(addresses))
        yield tuple(addresses)


def metadata_handler(
    publisher: MetadataPublisher, listener: Listener, http_hosts: Sequence[str] = ()
) -> LowLevelHandler:
    """The HTTP API as the VM of ``listener`` sees it; ``http_hosts`` as in the settings."""
    known = frozenset(each.lower() for each in http_hosts)
    polls = KnownPolls()
    counts = publisher.answers

    async def handle(request: web.BaseRequest) -> web.StreamResponse:
        poll = polls.match(request)
        if poll is not None and (document := publisher.polled(listener.vm, poll.version)) is not None:
            modified = not poll.if_none_match or not unchanged(poll.if_none_match, document.etag)
            counts["scheduledevents", "GET", 200 if modified else 304] += 1
            return polls.answer(document, modified=modified)
        path = ""
        try:
            path = request.path
            parsed = await _parsed(publisher, listener, request, known)
            answer = parsed if isinstance(parsed, HttpResponse) else await publisher.answer(listener, parsed)
            if isinstance(parsed, ReadEvents) and answer.status in {200, 304}:
                polls.accepted(request, parsed.version)
        except Exception:  # noqa: BLE001 - a client must get the documented 500, not aiohttp's page
            _log.exception("metadata.failed", vm=listener.vm, method=request.method, path=path)
            answer = service_error("Unexpected failure.")
        publisher.answers[_endpoint(path), _method(request.method), answer.status] += 1
        return _response(answer)

    return handle


def refusal(publisher: MetadataPublisher) -> Callable[[str], web.StreamResponse]:
    """The answer to what is not HTTP."""

    def refuse(why: str) -> web.StreamResponse:
        answer = not_http(why)
        publisher.answers["other", "other", answer.status] += 1
        return _response(answer)

    return refuse


async def _parsed(
    publisher: MetadataPublisher, listener: Listener, request: web.BaseRequest, known: frozenset[str]
) -> Request | HttpResponse:
    """The request, or the answer that refuses it."""
    headers: dict[str, str] = {}
    for name, value in request.headers.items():
        headers.setdefault(name.lower(), value)  # the first counts, as in ``polls``
    host = headers.get("host")
    if host is None and request.version >= HttpVersion11:
        return bad_request("The Host header is missing.")  # RFC 9112, section 3.2
    if host is not None and not own_host(host, known):
        return foreign_host(host)
    refused = publisher.refuses(listener.vm)
    if refused is not None:
        return refused
    try:
        body = await _body(request) if request.method == "POST" else b""
    except TimeoutError:
        return too_slow()
    except web.RequestPayloadError as error:
        return not_http(str(error))
    return parse(request.method, request.path, list(request.query.items()), headers, body)


async def _body(request: web.BaseRequest) -> bytes | None:
    """The body, None if it is too large; the Content-Type is ignored.

    Raises:
        TimeoutError: it does not arrive.
        web.RequestPayloadError: it is not what its headers say.
    """
    if request.headers.get("Expect", "").lower() == "100-continue" and request.version >= HttpVersion11:
        # PowerShell's Invoke-RestMethod waits for it.
        await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        request.writer.output_size = 0
    body = bytearray()
    async with asyncio.timeout(_BODY_S):
        async for chunk in request.content.iter_chunked(16 * 1024):
            body += chunk
            if len(body) > MAX_BODY_BYTES:
                return None
    return bytes(body)


def _response(answer: HttpResponse) -> web.Response:
    headers = {"Server": "caesura", **answer.headers}
    if answer.body:
        headers["Content-Type"] = answer.content_type
    response = web.Response(status=answer.status, body=answer.body, headers=headers)
    if answer.headers.get("Connection") == "close":
        response.force_close()
    return response


def _endpoint(path: str) -> str:
    # A bounded label: what a client invents does not become a time series.
    second = path.split("/")[2].lower() if path.count("/") >= 2 else ""
    return second if second in _ENDPOINTS else "other"


_ENDPOINTS = frozenset({"scheduledevents", "instance", "versions", "identity", "attested", "loadbalancer"})


def _method(method: str) -> str:
    return method if method in {"GET", "POST"} else "other"
