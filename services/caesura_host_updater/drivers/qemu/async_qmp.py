"""The only home of ``qemu.qmp``: one connection to one QEMU, every wait bounded, errors in QEMU's own words.

Events carry QEMU's own timestamps, put on CLOCK_MONOTONIC. A QMP socket serves one client at a time: others
wait in its backlog without a greeting, so a connect that gets none in time is an error of its own.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import struct
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

from qemu.qmp import ConnectError, QMPClient, QMPError
from qemu.qmp.message import Message
from qemu.qmp.protocol import Runstate
from qemu.qmp.qmp_client import ExecuteError

from caesura.runtime.errors import CaesuraError

_COMMAND_S = 2.0  # s: QEMU answers within a millisecond unless it holds its big lock for somebody


class QmpFailed(CaesuraError):
    """QEMU could not be asked, or did not do it."""


class QmpUnreachable(QmpFailed):
    """Nobody answers on the socket, or nobody that speaks QMP."""


class QmpCommandRefused(QmpFailed):
    """QEMU answered with an error; the text is QEMU's own."""


class QmpTimeout(QmpFailed):
    """QEMU did not answer in time."""


class QmpConnectionLost(QmpFailed):
    """The connection ended: QEMU is gone, or closed it."""


class QmpEvent(NamedTuple):
    """Something that QEMU reported by itself. ``at``: when, on CLOCK_MONOTONIC in seconds."""

    name: str
    data: Mapping[str, Any]
    at: float


class _EventClient(QMPClient):
    """Hands events on the moment they are read, and formats no messages that nobody logs."""

    on_event: Callable[[Message], None] | None = None

    def _cb_inbound(self, msg: Message) -> Message:
        if "event" in msg and self.on_event is not None:
            self.on_event(msg)
        return msg

    def _cb_outbound(self, msg: Message) -> Message:
        return msg


class QmpEventWatch:
    """The events of one connection since a point in time."""

    def __init__(self) -> None:
        self.events: list[QmpEvent] = []
        self._more = asyncio.Event()
        self._closed = False

    def add(self, event: QmpEvent) -> None:
        """One more."""
        self.events.append(event)
        self._more.set()

    def close(self) -> None:
        """There will be no more."""
        self._closed = True
        self._more.set()

    async def first(self, wanted: Callable[[QmpEvent], bool]) -> QmpEvent:
        """The first event that is wanted; waits for it. Raises QmpConnectionLost when the connection ends before."""
        seen = 0
        while True:
            while seen < len(self.events):
                if wanted(self.events[seen]):
                    return self.events[seen]
                seen += 1
            if self._closed:
                raise QmpConnectionLost("QEMU closed its QMP connection")
            self._more.clear()
            await self._more.wait()


class AsyncQmp:
    """A connection; make one with ``connect``.

    ``listener`` is the pid that listens on the socket, as the kernel says. ``version``: such as ``7.2.22``.
    """

    def __init__(self, client: _EventClient, path: str, listener: int) -> None:
        self.path = path
        self.listener = listener
        self.on_event: Callable[[QmpEvent], None] = lambda _: None
        self.on_closed: Callable[[], None] = lambda: None
        self._client = client
        self._watches: list[QmpEventWatch] = []
        self._ending = asyncio.Event()
        self.closed = False
        client.on_event = self._on_message
        greeting = client.greeting
        version: Any = greeting.QMP.version["qemu"] if greeting is not None else {}
        self.version = ".".join(str(version.get(part, "?")) for part in ("major", "minor", "micro"))
        self._keeper = asyncio.create_task(self._keep(), name=f"qmp {path}")

    @classmethod
    async def connect(cls, path: str, timeout_s: float) -> AsyncQmp:
        """Connect, be greeted, negotiate.

        Raises:
            QmpUnreachable: nobody listens, nobody greets in time, or it is not QMP.
        """
        logging.getLogger("qemu.qmp").setLevel(logging.CRITICAL + 1)  # what fails is said by what we raise
        link = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        client = _EventClient()
        try:
            link.setblocking(False)
            link.connect(path)
            listener = struct.unpack("3i", link.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0]
            async with asyncio.timeout(timeout_s):
                await client.connect(link)
        except TimeoutError:
            link.close()
            raise QmpUnreachable(
                f"{path}: no QMP greeting within {timeout_s:g} s: somebody else is connected to it, or QEMU hangs"
            ) from None
        except BlockingIOError:
            link.close()
            raise QmpUnreachable(f"{path}: too many others wait for it") from None
        except OSError as error:
            link.close()
            raise QmpUnreachable(f"{path}: {error.strerror or error}") from error
        except ConnectError as error:
            link.close()
            raise QmpUnreachable(f"{path}: does not speak QMP: {error.exc!r}") from error
        except BaseException:
            link.close()
            raise
        return cls(client, path, int(listener))

    def _on_message(self, message: Message) -> None:
        stamp = message.get("timestamp")
        now = time.monotonic()
        at = now
        if isinstance(stamp, dict):
            since = time.time() - (stamp.get("seconds", 0) + stamp.get("microseconds", 0) / 1e6)
            # A wall clock that was set in the meantime must not make a pause of hours, or a negative one.
            at = now - since if 0 <= since < 1 else now
        data = message.get("data")
        event = QmpEvent(str(message["event"]), data if isinstance(data, dict) else {}, at)
        for watch in self._watches:
            watch.add(event)
        self.on_event(event)

    async def _keep(self) -> None:
        """Waits for the end, by whichever side, and collects what the library's tasks raised."""
        ended = asyncio.create_task(self._client.runstate_changed())
        asked = asyncio.create_task(self._ending.wait())
        try:
            while self._client.runstate is Runstate.RUNNING and not asked.done():
                await asyncio.wait((ended, asked), return_when=asyncio.FIRST_COMPLETED)
                if ended.done() and self._client.runstate is Runstate.RUNNING:
                    ended = asyncio.create_task(self._client.runstate_changed())
        finally:
            ended.cancel()
            asked.cancel()
            await asyncio.gather(ended, asked, return_exceptions=True)
            self.closed = True
            for watch in self._watches:
                watch.close()
            with suppress(EOFError, OSError, QMPError):
                await self._client.disconnect()
            self.on_closed()

    @contextmanager
    def watch(self) -> Iterator[QmpEventWatch]:
        """Collects the events from now on."""
        watch = QmpEventWatch()
        if self.closed:
            watch.close()
        self._watches.append(watch)
        try:
            yield watch
        finally:
            self._watches.remove(watch)

    async def execute(self, command: str, /, timeout_s: float = _COMMAND_S, **arguments: object) -> Any:
        """Have QEMU do something; its answer. An underscore in an argument's name stands for a dash.

        Raises:
            QmpCommandRefused: QEMU's own words.
            QmpTimeout, QmpConnectionLost: nobody knows whether it was done.
        """
        wire = {name.replace("_", "-"): value for name, value in arguments.items()}
        try:
            async with asyncio.timeout(timeout_s):
                return await self._client.execute(command, wire or None)
        except TimeoutError:
            raise QmpTimeout(f"QEMU does not answer {command!r} within {timeout_s:g} s") from None
        except ExecuteError as error:
            raise QmpCommandRefused(str(error)) from error
        except (QMPError, OSError, EOFError) as error:
            raise QmpConnectionLost(f"QEMU closed its QMP connection during {command!r}") from error

    async def pass_file(self, handle: int, name: str) -> None:
        """Give QEMU a copy of an open file, under a name. Raises as ``execute``."""
        try:
            self._client.send_fd_scm(handle)
        except (QMPError, OSError) as error:
            raise QmpConnectionLost("QEMU closed its QMP connection before a file was passed") from error
        await self.execute("getfd", fdname=name)

    async def status(self, timeout_s: float = _COMMAND_S) -> str:
        """The run state as QEMU names it: ``running``, ``paused``, ``postmigrate``, ... Raises as ``execute``."""
        return str((await self.execute("query-status", timeout_s))["status"])

    async def close(self) -> None:
        """End the connection; never fails."""
        self.on_event = lambda _: None
        self.on_closed = lambda: None
        self._ending.set()
        await asyncio.wait((self._keeper,))


def listener_of(path: str) -> int:
    """The pid that listens on a unix socket, as the kernel says. Raises OSError."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as link:
        link.setblocking(False)
        link.connect(path)
        return int(struct.unpack("3i", link.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0])
