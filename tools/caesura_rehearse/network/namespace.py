"""The outside of a network that is not this machine's: takes the listener that was bound inside, and leads connections in."""

from __future__ import annotations

import asyncio
import os
import socket
import struct
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path

from caesura.runtime.errors import ConfigError
from caesura.runtime.logs import get_logger
from caesura.runtime.threads import in_thread
from caesura_rehearse.network import in_namespace
from caesura_rehearse.network.outbound import Outbound, outbound_command, own_uid, start_outbound

URL = f"http://{in_namespace.ADDRESS}"
_COPY_BYTES = 64 * 1024
_END_S = 5.0  # s: for a process inside to end; milliseconds are usual
_CREDENTIALS = struct.Struct("3i")

_log = get_logger("caesura.rehearse")


class NoNamespace(ConfigError):
    """The program cannot have a network of its own here."""


def way_in(folder: Path, vm: str, resolv_conf: Path | None = None) -> tuple[str, ...]:
    """The words before a program's command line that execute it in a network of its own.

    Args:
        resolv_conf: what the program sees as ``/etc/resolv.conf``; None: the machine's.
    """
    door, resolver = str(_socket_path(folder, vm)), str(resolv_conf or "")
    return (sys.executable, "-I", "-S", in_namespace.__file__, "execute", door, resolver)


def _socket_path(folder: Path, vm: str) -> Path:
    return folder / f"{vm}.netns"


class NamespaceDoor:
    """Where a program that enters its network reports.

    Args:
        serve: called with each listener that was bound inside.
        changed: called when ``entered`` was set.
        lead_out: whether the network gets a way out, where something is installed for it.
    """

    def __init__(
        self,
        serve: Callable[[socket.socket], Awaitable[object]],
        changed: Callable[[], None],
        *,
        lead_out: bool = False,
    ) -> None:
        self._serve = serve
        self._changed = changed
        self._lead_out = lead_out
        self._outbound: Outbound | None = None
        self.no_way_out = "nothing leads out"
        """Why the network has no way out; empty: it has one."""
        self._tasks: set[asyncio.Task[None]] = set()
        self.problem = ""
        """Why the last program could not enter, or could not be executed after it had."""
        self.entered = asyncio.Event()
        """Set when a program is inside, or has failed to be."""

    async def take(self, door: socket.socket) -> None:
        """Accept programs until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            connection, _ = await loop.sock_accept(door)
            task = asyncio.create_task(self._admit(connection))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _admit(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        with connection:
            pid, uid, _ = _CREDENTIALS.unpack(
                connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
            )
            if uid != os.getuid():
                return
            message, handles = await _receive(connection)
            if message != b"+" or not handles:
                self.problem = message.decode(errors="replace") or "it ended before"
                self._enter()
                return
            self.problem = ""
            await self._serve(socket.socket(fileno=handles[0]))
            if outbound := await self._start_outbound(pid):
                await self._led_out(outbound, connection)
            else:
                await asyncio.get_running_loop().sock_sendall(connection, b"+")
            self._enter()
            # Closed by its execution; a text says that the program could not be executed.
            with suppress(OSError):
                self.problem = (await asyncio.get_running_loop().sock_recv(connection, 4096)).decode(
                    errors="replace"
                )

    async def _start_outbound(self, pid: int) -> Outbound | None:
        """The way out of the network of the program that enters; that of the one before it is closed."""
        await self.close_outbound()
        if not self._lead_out:
            return None
        argv = await in_thread("find", lambda: outbound_command(pid, own_uid()))
        if not argv:
            self.no_way_out = "neither slirp4netns nor pasta is installed"
            return None
        try:
            self._outbound = await start_outbound(argv)
        except OSError as error:
            self.no_way_out = f"{argv[0]}: {error.strerror or error}"
            return None
        return self._outbound

    async def _led_out(self, outbound: Outbound, connection: socket.socket) -> None:
        """Let the program wait until there is a way out, or none will come."""
        loop = asyncio.get_running_loop()
        await loop.sock_sendall(connection, b"~")
        seen = asyncio.create_task(loop.sock_recv(connection, 1))
        ended = asyncio.create_task(outbound.ended())
        try:
            await asyncio.wait({seen, ended}, return_when=asyncio.FIRST_COMPLETED)
            if not seen.done():
                await loop.sock_sendall(connection, b"+")
            found = await seen == b"="
            text = ended.result() if ended.done() else "there was no route in time"
            self.no_way_out = "" if found else text.strip().rpartition("\n")[2]
        finally:
            seen.cancel()
            ended.cancel()

    async def close(self) -> None:
        """Nothing of it is left."""
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.close_outbound()

    async def close_outbound(self) -> None:
        """End what leads out."""
        outbound, self._outbound = self._outbound, None
        if outbound is not None:
            await outbound.close()

    def _enter(self) -> None:
        self.entered.set()
        self._changed()


@asynccontextmanager
async def open_door(
    folder: Path,
    vm: str,
    serve: Callable[[socket.socket], Awaitable[object]],
    changed: Callable[[], None],
    *,
    lead_out: bool = False,
) -> AsyncIterator[NamespaceDoor]:
    """A door for the programs of a VM, while the block runs."""
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listening.setblocking(False)
    listening.bind(str(_socket_path(folder, vm)))
    listening.listen(4)
    door = NamespaceDoor(serve, changed, lead_out=lead_out)
    task = asyncio.create_task(door.take(listening), name=f"door of {vm}")
    try:
        yield door
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
        await door.close()
        listening.close()


@asynccontextmanager
async def published(ports: Sequence[int], pid: Callable[[], int]) -> AsyncIterator[None]:
    """Lead connections to these ports of 127.0.0.1 to the same ports inside, while the block runs.

    Args:
        pid: a process inside, of now.

    Raises:
        NoNamespace: a port is in use.
    """
    ways = Ways(pid)
    servers: list[asyncio.Server] = []
    try:
        for port in ports:
            try:
                servers.append(await asyncio.start_server(ways.handler(port), "127.0.0.1", port))
            except OSError as error:
                raise NoNamespace(f"cannot publish port {port}: {error.strerror or error}") from error
        yield
    finally:
        for server in servers:
            server.close()
        ways.close()


class Ways:
    """The helper inside, started when it is first needed and again after the program was; and the connections through it."""

    def __init__(self, pid: Callable[[], int]) -> None:
        self._pid = pid
        self._inside_of = 0
        self._helper: subprocess.Popen[bytes] | None = None
        self._orders: socket.socket | None = None
        self._lock = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()

    def handler(self, port: int) -> Callable[[asyncio.StreamReader, asyncio.StreamWriter], None]:
        """For ``asyncio.start_server``."""

        def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = asyncio.create_task(self._through(port, reader, writer))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

        return accept

    async def _through(self, port: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            inside = await self._connect(port)
            if inside is None:
                return
            inner_reader, inner_writer = await asyncio.open_connection(sock=inside)
            try:
                await asyncio.gather(_copy(reader, inner_writer), _copy(inner_reader, writer))
            finally:
                inner_writer.close()
        except OSError as error:
            _log.debug("publish.failed", port=port, why=str(error))
        finally:
            writer.close()

    async def _connect(self, port: int) -> socket.socket | None:
        async with self._lock:
            if not _has_own_network(self._pid()):
                return (
                    None  # started a moment ago: in ours this port is the published one, and leads back to us
                )
            orders = await self._reach()
            loop = asyncio.get_running_loop()
            await loop.sock_sendall(orders, port.to_bytes(2))
            message, handles = await _receive(orders)
            if message != b"+" or not handles:
                return None
            found = socket.socket(fileno=handles[0])
            found.setblocking(False)
            return found

    async def _reach(self) -> socket.socket:
        pid = self._pid()
        if (
            self._orders is None
            or pid != self._inside_of
            or (self._helper and self._helper.poll() is not None)
        ):
            self.end_helper()
            self._orders, self._helper = await _start_helper("connect", pid)
            self._inside_of = pid
        return self._orders

    def close(self) -> None:
        """Cut what is connected and end the helper."""
        for task in list(self._tasks):
            task.cancel()
        self.end_helper()

    def end_helper(self) -> None:
        """End the helper; the next connection starts another."""
        if self._orders is not None:
            self._orders.close()
        if self._helper is not None:
            self._helper.kill()
            self._helper.wait()
        self._orders = self._helper = None


def _has_own_network(pid: int) -> bool:
    """Whether the process lives, and is in another network than this one."""
    try:
        return Path(f"/proc/{pid}/ns/net").stat().st_ino != Path("/proc/self/ns/net").stat().st_ino
    except OSError:
        return False


async def _start_helper(what: str, pid: int) -> tuple[socket.socket, subprocess.Popen[bytes]]:
    """A process of ``in_namespace`` for the network of a process, and our end of its standard input."""
    ours, its = socket.socketpair()
    ours.setblocking(False)
    argv = [sys.executable, "-I", "-S", in_namespace.__file__, what, str(pid)]
    with its:
        handle = its.fileno()
        helper = await in_thread(what, lambda: subprocess.Popen(argv, stdin=handle, start_new_session=True))
    return ours, helper


@asynccontextmanager
async def metadata_inside(
    serve: Callable[[socket.socket], Awaitable[object]],
) -> AsyncIterator[Callable[[int], Awaitable[None]]]:
    """Gives what lets 169.254.169.254 answer in the network of a process (a container's first one), until the block ends or we do.

    Args:
        serve: called with each listener that was bound inside.
    """
    helpers: list[tuple[socket.socket, subprocess.Popen[bytes]]] = []

    async def enter(pid: int) -> None:
        """Raises NoNamespace."""
        try:
            helpers.append(await _start_helper("serve", pid))
        except OSError as error:
            raise NoNamespace(f"--netns: cannot start {sys.executable}: {error.strerror or error}") from error
        message, handles = await _receive(helpers[-1][0])
        if message != b"+" or not handles:
            hint = ". It needs root" if os.geteuid() else ""
            raise NoNamespace(
                f"--netns cannot reach into the container: {message.decode(errors='replace')}{hint}"
            )
        await serve(socket.socket(fileno=handles[0]))

    def end() -> None:
        for ours, helper in helpers:
            ours.close()  # it takes the address away
            try:
                helper.wait(_END_S)
            except subprocess.TimeoutExpired:
                helper.kill()
                helper.wait()

    try:
        yield enter
    finally:
        await in_thread("end", end)


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(_COPY_BYTES):
        writer.write(data)
        await writer.drain()
    with suppress(OSError):
        writer.write_eof()


async def _receive(connection: socket.socket) -> tuple[bytes, list[int]]:
    """One message with the descriptors that come with it."""
    loop = asyncio.get_running_loop()
    readable = asyncio.Event()
    loop.add_reader(connection, readable.set)
    try:
        await readable.wait()
    finally:
        loop.remove_reader(connection)
    message, handles, _, _ = socket.recv_fds(connection, 4096, 1)
    return message, handles
