"""One request and its answer, as they go over the wire: clients' mistakes must be possible, so no HTTP library writes the request."""

from __future__ import annotations

import http.client
import json
import socket
from collections.abc import Mapping, Sequence
from typing import Any, Protocol
from urllib.parse import urlsplit

import msgspec

from caesura.runtime.errors import CaesuraError

_MOST_BYTES = 1 << 20  # of an answer


class BadServerUrl(CaesuraError):
    """The address of the server cannot be used."""

    exit_code = 2


class NoAnswer(Exception):
    """The server closed the connection, was silent, or said something that is not HTTP."""


class Ask(msgspec.Struct, frozen=True, kw_only=True):
    """A request. ``raw`` replaces all the rest."""

    method: str = "GET"
    target: str
    headers: tuple[tuple[str, str], ...] = ()
    body: bytes = b""
    raw: bytes = b""

    def encode(self, host: str) -> bytes:
        """The bytes on the wire; a Host header is added unless one is given, ``Host: -`` leaves it out."""
        if self.raw:
            return self.raw
        headers = list(self.headers)
        names = {name.lower() for name, _ in headers}
        if "host" not in names:
            headers.insert(0, ("Host", host))
        headers = [each for each in headers if each != ("Host", "-")]
        if self.body and "content-length" not in names:
            headers.append(("Content-Length", str(len(self.body))))
        elif self.method == "POST" and "content-length" not in names:
            headers.append(("Content-Length", "0"))
        lines = [f"{self.method} {self.target} HTTP/1.1", *(f"{name}: {value}" for name, value in headers)]
        return "\r\n".join([*lines, "", ""]).encode() + self.body


class Reply(msgspec.Struct, frozen=True, kw_only=True):
    """An answer; names of headers in lower case."""

    status: int
    headers: Mapping[str, str] = {}
    body: bytes = b""

    @property
    def text(self) -> str:
        """The body; what is not UTF-8 is replaced."""
        return self.body.decode(errors="replace")

    def json(self) -> Any:
        """The decoded body, None if it is not JSON."""
        try:
            return json.loads(self.body)
        except (ValueError, RecursionError):
            return None


class Transport(Protocol):
    """Where requests go."""

    def exchange(self, asks: Sequence[Ask]) -> list[Reply]:
        """The answers to these requests, sent one after the other on one connection.

        Raises:
            NoAnswer: to one of them there was none.
        """
        ...


class HttpTransport:
    """A real server.

    Args:
        url: ``http://host:port``, with or without ``/metadata``, or ``unix:/path``.
        timeout_s: seconds that one answer may take.

    Raises:
        BadServerUrl: it is none of these.
    """

    def __init__(self, url: str, timeout_s: float = 10.0) -> None:
        self._timeout_s = timeout_s
        self._path = url.removeprefix("unix:") if url.startswith("unix:/") else ""
        self._place = ("", 80)
        self._host = "169.254.169.254"
        if self._path:
            return
        try:
            parts = urlsplit(url)
            port = parts.port or 80
        except ValueError as error:
            raise BadServerUrl(f"{url!r} is not a URL: {error}") from error
        if parts.scheme != "http" or not parts.hostname or parts.path.rstrip("/") not in {"", "/metadata"}:
            raise BadServerUrl(
                f"{url!r}: give http://host:port of the server, or unix:/path; the API is plain HTTP"
            )
        self._place = (parts.hostname, port)
        self._host = parts.netloc.rpartition("@")[2]

    def exchange(self, asks: Sequence[Ask]) -> list[Reply]:
        """See ``Transport``."""
        try:
            with self._connected() as connection:
                return [self._one(connection, each) for each in asks]
        except TimeoutError as error:
            raise NoAnswer(f"no answer within {self._timeout_s:g} s") from error
        except (OSError, http.client.HTTPException) as error:
            raise NoAnswer(f"{type(error).__name__}: {error}") from error

    def _connected(self) -> socket.socket:
        if not self._path:
            return socket.create_connection(self._place, timeout=self._timeout_s)
        connection = socket.socket(socket.AF_UNIX)
        connection.settimeout(self._timeout_s)
        try:
            connection.connect(self._path)
        except BaseException:
            connection.close()
            raise
        return connection

    def _one(self, connection: socket.socket, ask: Ask) -> Reply:
        connection.sendall(ask.encode(self._host))
        with http.client.HTTPResponse(connection, method=ask.method) as answer:
            answer.begin()
            body = answer.read(_MOST_BYTES)
            headers = {name.lower(): value for name, value in answer.getheaders()}
            return Reply(status=answer.status, headers=headers, body=body)
