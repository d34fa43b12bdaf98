"""A short-lived QMP client: blocking, every call with a deadline, standard library only.

Source: QEMU's ``docs/interop/qmp-spec.txt``: a greeting, ``qmp_capabilities``, then JSON objects, one a line; events
come in between. A QMP socket serves one client at a time; the others wait in its backlog without a greeting.
Deadlines are instants in seconds on CLOCK_MONOTONIC.
"""

# light imports on purpose: no pathlib here.
# ruff: noqa: PTH119, PTH120

from __future__ import annotations

import json
import os
import socket
import struct
import time
from types import TracebackType
from typing import Any, Self

_LINE_BYTES = 4 * 1024 * 1024  # the longest answer that we request has some kilobytes
_RETRY_S = 0.005  # s: between two tries at a full backlog: nothing wakes us


class QmpError(OSError):
    """Communication with a QEMU failed."""


class QmpRefused(QmpError):
    """QEMU refused: ``error_class`` and ``desc`` are its own words."""

    def __init__(self, command: str, error_class: str, desc: str) -> None:
        super().__init__(f"QEMU refuses {command}: {desc} ({error_class})")
        self.command = command
        self.error_class = error_class
        self.desc = desc


class QmpNoAnswer(QmpError):
    """No answer: nobody listens, another client is served, QEMU hangs or went away, or the peer does not speak QMP."""


class QmpClosed(QmpNoAnswer):
    """QEMU closed the connection, most likely because it ended."""


class PeerMismatch(QmpNoAnswer):
    """The socket belongs to another process than the expected one."""


class Qmp:
    """A negotiated connection.

    Args:
        path: the socket; may be longer than a unix socket's address.
        pid: the process that must have made it, so that no other process gets the command.

    Raises:
        PeerMismatch: another process listens there.
        QmpNoAnswer: no greeting by ``until``.
    """

    def __init__(self, path: str, pid: int, until: float) -> None:
        self.events: list[str] = []
        """The names of the events since the connection was negotiated."""
        self._path = path
        self._rest = b""
        self._count = 0
        self._socket = self._connect(path, pid, until)
        try:
            self._negotiate(until)
        except BaseException:
            self._socket.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Make room for the next client."""
        self._socket.close()

    def execute(
        self,
        command: str,
        arguments: dict[str, Any] | None = None,
        *,
        until: float,
        handle: int | None = None,
    ) -> Any:
        """What QEMU returns. ``handle``: a descriptor that goes along (for ``getfd``).

        Raises:
            QmpRefused: it answered with an error.
            QmpNoAnswer: no answer by ``until``; the command may have been carried out nevertheless.
        """
        self._count += 1
        request: dict[str, Any] = {"execute": command, "id": self._count}
        if arguments is not None:
            request["arguments"] = arguments
        self._send(json.dumps(request).encode() + b"\n", handle, until)
        while True:
            answer = self._read(until)
            if answer.get("id", self._count) != self._count:
                continue  # a late answer to a request that was given up
            if "error" in answer:
                error = answer["error"]
                raise QmpRefused(command, str(error.get("class")), str(error.get("desc")))
            if "return" in answer:
                return answer["return"]

    def take_events(self, until: float) -> bool:
        """Read what has arrived, waiting for more until ``until``; whether QEMU closed the connection."""
        while True:
            try:
                self._read(until)
            except QmpClosed:
                return True
            except QmpNoAnswer:
                return False

    # -- the line ---------------------------------------------------------------------------------------------

    def _negotiate(self, until: float) -> None:
        if "QMP" not in self._read(until):
            raise QmpNoAnswer(f"{self._path} does not greet as QMP does")
        self.execute("qmp_capabilities", until=until)

    @staticmethod
    def _connect(path: str, pid: int, until: float) -> socket.socket:
        made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            folder = os.open(os.path.dirname(path), os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                address = f"/proc/self/fd/{folder}/{os.path.basename(path)}"
                made.setblocking(False)
                while True:
                    try:
                        made.connect(address)
                        break
                    except BlockingIOError:  # its backlog is full
                        if time.monotonic() >= until:
                            raise QmpNoAnswer(f"{path} has no room for another client") from None
                        time.sleep(_RETRY_S)
            finally:
                os.close(folder)
            listener = struct.unpack("3i", made.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0]
            if listener != pid:
                raise PeerMismatch(f"{path} belongs to process {listener}, not to {pid}")
        except QmpError:
            made.close()
            raise
        except OSError as error:
            made.close()
            raise QmpNoAnswer(f"cannot reach {path}: {error.strerror or error}") from error
        return made

    def _send(self, data: bytes, handle: int | None, until: float) -> None:
        try:
            self._socket.settimeout(max(until - time.monotonic(), 0.001))
            if handle is None:
                self._socket.sendall(data)
            else:
                socket.send_fds(self._socket, [data], [handle])  # short: sent whole or not at all
        except OSError as error:
            raise QmpClosed(f"{self._path} takes no command: {error.strerror or error}") from error

    def _read(self, until: float) -> dict[str, Any]:
        """The next message that is not an event; events are recorded."""
        while True:
            line = self._line(until)
            try:
                message = json.loads(line)
            except ValueError:
                raise QmpNoAnswer(f"{self._path} sends a line that is not JSON: {line[:60]!r}") from None
            if not isinstance(message, dict):
                raise QmpNoAnswer(f"{self._path} sends a line that is not QMP: {line[:60]!r}")
            if "event" not in message:
                return message
            self.events.append(str(message["event"]))

    def _line(self, until: float) -> bytes:
        while b"\n" not in self._rest:
            left_s = until - time.monotonic()
            try:
                # What has arrived is read even after the deadline.
                self._socket.settimeout(max(left_s, 0))
                data = self._socket.recv(65536)
            except (TimeoutError, BlockingIOError):
                raise QmpNoAnswer(f"{self._path} does not answer") from None
            except OSError as error:
                raise QmpClosed(f"{self._path} was closed: {error.strerror or error}") from error
            if not data:
                raise QmpClosed(f"{self._path} was closed by QEMU")
            self._rest += data
            if len(self._rest) > _LINE_BYTES:
                raise QmpNoAnswer(f"{self._path} sends a line without end")
        line, _, self._rest = self._rest.partition(b"\n")
        return line
