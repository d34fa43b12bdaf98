"""The short way for polls: a GET of events that was answered before in the same words gets its bytes at once.

A request takes it if its target was answered with 200 before and its few headers are as usual; every other one goes the whole way
through ``request``, which alone knows the rules. So nothing is served here that would be refused there.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from email.utils import formatdate

import msgspec
from aiohttp import HttpVersion11, web

from caesura_metadata_publisher.api_versions import EventsVersion
from caesura_metadata_publisher.encoded import EncodedDocument

_MOST_KNOWN = 64
"""Targets and hosts that are remembered: clients have one or two, and must not fill the memory by inventing more."""

_USUAL = frozenset({"true", "True"})


class PollAnswer(web.Response):
    """An answer whose bytes are known: written as they are."""

    def __init__(self, status: int, head: bytes, body: bytes) -> None:
        # Not the base's: its headers and cookies cost more than the answer. Of those only status and body can be read here.
        self._poll_status = status
        self._wire = head + body
        self._body = body  # what ``body`` gives

    @property
    def status(self) -> int:
        """The status code."""
        return self._poll_status

    @property
    def keep_alive(self) -> bool:
        """Only requests that keep the connection come here."""
        return True

    async def prepare(self, request: web.BaseRequest) -> None:
        """Write it; wait only where the client does not read."""
        transport = request.transport
        if transport is None:
            raise ConnectionResetError("Connection lost")
        transport.write(self._wire)
        if transport.get_write_buffer_size():
            await request.writer.drain()

    async def write_eof(self, data: bytes = b"") -> None:
        """Nothing is left to write."""


class Poll(msgspec.Struct, frozen=True):
    """A request that may take the short way."""

    version: EventsVersion
    if_none_match: str


class KnownPolls:
    """Targets and host names that the whole way has accepted."""

    def __init__(self) -> None:
        self._targets: dict[str, EventsVersion] = {}
        self._hosts: set[str] = set()
        self._second = -1
        self._date = b""
        self._heads: dict[int, tuple[EncodedDocument, bytes, bytes]] = {}

    def accepted(self, request: web.BaseRequest, version: EventsVersion) -> None:
        """The whole way answered this GET of events with 200 or 304."""
        host = request.headers.get("Host")
        if host is not None and len(self._targets) < _MOST_KNOWN and len(self._hosts) < _MOST_KNOWN:
            self._targets[request.raw_path] = version
            self._hosts.add(host)

    def match(self, request: web.BaseRequest) -> Poll | None:
        """The poll that this request is, None if it has to go the whole way."""
        version = self._targets.get(request.raw_path)
        if version is None or request.method != "GET":
            return None
        headers: Mapping[str, str] = request.headers
        if (
            headers.get("Host") not in self._hosts
            or headers.get("Metadata") not in _USUAL
            or "X-Forwarded-For" in headers
            or request.version != HttpVersion11
            or not request.keep_alive
        ):
            return None
        return Poll(version, headers.get("If-None-Match", ""))

    def answer(self, encoded: EncodedDocument, *, modified: bool) -> PollAnswer:
        """The answer with the document, or 304."""
        known = self._heads.get(id(encoded))
        if known is None or known[0] is not encoded:
            if len(self._heads) >= _MOST_KNOWN:
                self._heads.clear()
            known = encoded, _head(200, encoded), _head(304, encoded)
            self._heads[id(encoded)] = known
        _, head_200, head_304 = known
        now = int(time.time())
        if now != self._second:
            self._second, self._date = now, f"Date: {formatdate(now, usegmt=True)}\r\n\r\n".encode()
        if modified:
            return PollAnswer(200, head_200 + self._date, encoded.body)
        return PollAnswer(304, head_304 + self._date, b"")


def _head(status: int, encoded: EncodedDocument) -> bytes:
    lines = ["HTTP/1.1 200 OK" if status == 200 else "HTTP/1.1 304 Not Modified", "Server: caesura"]
    lines.append(f"ETag: {encoded.etag}")
    if status == 200:
        lines += ["Content-Type: application/json; charset=utf-8", f"Content-Length: {len(encoded.body)}"]
    return "\r\n".join([*lines, ""]).encode()
