"""Bounded listeners: how many connections one may have, and how long a connection may take to send its request.

asyncio's own accept loop has no limit, and at EMFILE it logs once for each connection in its backlog, again every second.
aiohttp has no deadline for the head of a request: a client that sends a byte now and then keeps its connection. So these
listeners accept connections themselves and sit between the transport and the HTTP protocol. They do not depend on
aiohttp, which is unaware of them.
"""

from __future__ import annotations

import asyncio
import errno
import resource
import socket
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import cast

from caesura.runtime.logs import get_logger

_log = get_logger("caesura.listen")

_ACCEPT_RETRY_S = 1.0  # s without an accept after one that failed for want of a resource
_LOG_EVERY_S = 60.0  # s between two log lines about the same trouble of one listener
_BACKLOG = 128  # connections that the kernel completes before we accept them
_AT_ONCE = 16  # accepts in one iteration of the event loop, so that other tasks run
_FILES_KEPT = 128  # descriptors for the bus, logs, files, and the health listener with its connections
_SHARE_WARNED = 8
_SCARCE = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})


@dataclass(frozen=True)
class Bounds:
    """The limits of one listener."""

    connections: int = 64
    """Connections at once. One more replaces the one that has waited the longest without a request; if all are being
    answered, the new one is closed."""
    head_s: float = 10.0
    """s from the first byte (or the connection's start) until a request's head has arrived."""
    idle_s: float = 75.0
    """s between an answer and the first byte of the next request; also the time for reading an answer. Longer than
    the usual scrape intervals, so that scrapers keep their connection."""


def fair_share(listeners: int, most: int) -> int:
    """Connections that each of ``listeners`` may have, so that together they leave descriptors for everything else.

    At most ``most``, at least two. Derived from this process's limit of open files (``LimitNOFILE=`` in its unit).
    """
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if files == resource.RLIM_INFINITY:
        return most
    share = (files - _FILES_KEPT) // max(listeners, 1) - 1  # the listener itself
    if share < min(most, _SHARE_WARNED):
        _log.warning(
            "listen.few_files",
            listeners=listeners,
            connections_each=max(2, share),
            open_files=files,
            advice="raise LimitNOFILE= of the service",
        )
    return max(2, min(most, share))


class Connection(asyncio.Protocol):
    """One client, between the transport and the HTTP protocol: passes everything through and enforces the deadlines."""

    def __init__(self, gate: Gate, inner: asyncio.Protocol) -> None:
        self._gate = gate
        self._inner = inner
        self._transport: asyncio.Transport | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._deadline: float | None = None
        """On the loop's clock; None: its handler is responsible for the time."""
        self._requests = 0
        self._idle = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._gate.waits(self)
        self._wait(self._gate.bounds.head_s)
        self._inner.connection_made(transport)

    def data_received(self, data: bytes) -> None:
        if self._idle and not self._requests:
            self._idle = False
            self._wait(self._gate.bounds.head_s)
        self._inner.data_received(data)

    def eof_received(self) -> bool | None:
        return self._inner.eof_received()

    def pause_writing(self) -> None:
        self._inner.pause_writing()

    def resume_writing(self) -> None:
        self._inner.resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        self._end_timer()
        self._gate.left(self, self._inner)
        self._inner.connection_lost(exc)

    def began(self) -> None:
        """The head of a request has arrived: from now on its handler is responsible for the time."""
        self._requests += 1
        self._idle = False
        self._deadline = None
        self._gate.busy(self)

    def answered(self) -> None:
        """The handler is done."""
        self._requests -= 1
        if self._transport is None or self._transport.is_closing():
            return
        # What arrived in between was its body, or the start of the next head, whose deadline starts at its next byte.
        self._idle = True
        self._wait(self._gate.bounds.idle_s)
        self._gate.waits(self)

    def cut(self) -> None:
        """Close it at once; buffered output is discarded."""
        self._end_timer()
        if self._transport is not None:
            self._transport.abort()

    def _wait(self, seconds: float) -> None:
        # A timer for each request would cost as much as its answer: one runs on, and looks at the deadline when it is due.
        loop = self._gate.loop
        self._deadline = loop.time() + seconds
        if self._timer is None or self._timer.when() > self._deadline:
            self._end_timer()
            self._timer = loop.call_at(self._deadline, self._due)

    def _due(self) -> None:
        self._timer = None
        if self._deadline is None:
            return
        if self._gate.loop.time() >= self._deadline:
            self.cut()
        else:
            self._timer = self._gate.loop.call_at(self._deadline, self._due)

    def _end_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


class Gate:
    """The connections of one listener.

    Args:
        factory: creates the HTTP protocol of a connection.
        name: of the listener, for the log.
    """

    def __init__(self, factory: Callable[[], asyncio.Protocol], name: str, bounds: Bounds) -> None:
        self.bounds = bounds
        self.loop = asyncio.get_running_loop()
        self.open = 0
        """Connections that were accepted and are not closed."""
        self._factory = factory
        self._name = name
        self._by_inner: dict[object, Connection] = {}
        self._waiting: dict[Connection, None] = {}
        """Connections without a request, the one that has waited longest first."""
        self._sockets: list[socket.socket] = []
        self._paused: dict[int, asyncio.TimerHandle] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._said_at: dict[str, float] = {}

    def listen(self, listener: socket.socket) -> None:
        """Accept on a bound socket until ``close``, which closes it."""
        listener.setblocking(False)
        listener.listen(_BACKLOG)
        self._sockets.append(listener)
        self._resume(listener)

    def close(self) -> None:
        """Stop accepting; the server closes the connections."""
        loop = asyncio.get_running_loop()
        for timer in self._paused.values():
            timer.cancel()
        for each in self._sockets:
            loop.remove_reader(each)
            each.close()
        self._sockets.clear()

    def connection(self, inner: object) -> Connection | None:
        """The connection of an HTTP protocol, None after its end."""
        return self._by_inner.get(inner)

    def waits(self, connection: Connection) -> None:
        """The connection has no request."""
        self._waiting[connection] = None

    def busy(self, connection: Connection) -> None:
        """The connection has a request that is being answered."""
        self._waiting.pop(connection, None)

    def left(self, connection: Connection, inner: object) -> None:
        """It is closed."""
        self.open -= 1
        self._waiting.pop(connection, None)
        self._by_inner.pop(inner, None)

    def _accept(self, listener: socket.socket) -> None:
        for _ in range(_AT_ONCE):
            try:
                accepted, _address = listener.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                self._fail(listener, error)
                return
            accepted.setblocking(False)
            if self.open >= self.bounds.connections and not self._evict():
                self._say(
                    "full",
                    "all connections of this listener are being answered",
                    most=self.bounds.connections,
                )
                accepted.close()
                continue
            self.open += 1
            task = asyncio.get_running_loop().create_task(self._admit(accepted))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    def _fail(self, listener: socket.socket, error: OSError) -> None:
        """The kernel reports the socket as readable for as long as accepting fails: retry after a while."""
        self._say("accept_failed", error.strerror or str(error), open=self.open)
        if error.errno in _SCARCE:
            self._evict()
        loop = asyncio.get_running_loop()
        loop.remove_reader(listener)
        self._paused[listener.fileno()] = loop.call_later(_ACCEPT_RETRY_S, self._resume, listener)

    def _resume(self, listener: socket.socket) -> None:
        self._paused.pop(listener.fileno(), None)
        asyncio.get_running_loop().add_reader(listener, self._accept, listener)

    def _evict(self) -> bool:
        """Cut the connection that has waited the longest; returns whether there was one."""
        oldest = next(iter(self._waiting), None)
        if oldest is None:
            return False
        del self._waiting[oldest]
        oldest.cut()
        return True

    async def _admit(self, accepted: socket.socket) -> None:
        inner = self._factory()
        connection = Connection(self, inner)
        self._by_inner[inner] = connection
        try:
            await asyncio.get_running_loop().connect_accepted_socket(lambda: connection, accepted)
        except OSError as error:
            self.left(connection, inner)
            with suppress(OSError):
                accepted.close()
            self._say("admit_failed", str(error))

    def _say(self, what: str, why: str, **more: int) -> None:
        now = asyncio.get_running_loop().time()
        if now - self._said_at.get(what, -_LOG_EVERY_S) >= _LOG_EVERY_S:
            self._said_at[what] = now
            _log.warning(f"listen.{what}", listener=self._name, why=why, **more)


async def bound_sockets(where: tuple[str, int] | str) -> list[socket.socket]:
    """Sockets bound to an address as ``parse_listen`` gives it: one, or one for each address of a host name.

    Raises:
        OSError: the address cannot be bound; no socket is left open.
    """
    if isinstance(where, str):
        found = [(socket.AF_UNIX, where)]
    else:
        host, port = where
        infos = await asyncio.get_running_loop().getaddrinfo(
            None if host == "*" else host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        found = list(dict.fromkeys((info[0], info[4]) for info in infos))  # type: ignore[misc]
    sockets: list[socket.socket] = []
    try:
        for family, address in found:
            sockets.append(each := socket.socket(family, socket.SOCK_STREAM))
            if family != socket.AF_UNIX:
                each.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                each.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            each.bind(address)
    except BaseException:
        for each in sockets:
            each.close()
        raise
    return sockets
