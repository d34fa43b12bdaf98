"""One connection to each daemon of libvirt, open and authenticated before it is needed, over which several threads ask at once.

Each connection is authenticated by polkit, which looks at one client after the other and may ask a directory service: in a pause, with a
connection for each look at each domain, nobody's turn would come in time. The daemon carries out a connection's calls side by side.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from types import TracebackType
from typing import Self

from caesura_vmcontrol.libvirt_rpc import (
    Libvirt,
    LibvirtGone,
    LibvirtPlan,
    LibvirtSilent,
    answer_of,
    call_message,
)

OPENING_S = 5.0
"""s: for an opening; polkit may take most of it."""
RPC_S = 0.5
"""s: what the daemon gets for one answer before QEMU is asked directly; it takes some milliseconds."""
_AT_ONCE = 4
"""Calls under way over one connection; the daemon reads no more than five (max_client_requests)."""
_NO_END_S = 1e6


class _Line(Libvirt):
    """An open connection that several threads use at once.

    One on which a call takes longer than ``RPC_S`` gets no further users: it may keep the others waiting for their turn.
    """

    _is_open = False

    def __init__(self, path: str, uri: str, until: float) -> None:
        super().__init__(path, uri, until, RPC_S)
        self._is_open = True
        self._writer = self._socket.dup()
        self._writing = threading.Lock()
        self._changed = threading.Condition()
        self._answers: dict[int, Future[tuple[int, int, bytes]]] = {}
        """Serial of each call under way to procedure, status and body of its answer."""
        self._users = 0
        self._is_slow = False
        self._error: OSError | None = None
        threading.Thread(target=self._receive, name=f"libvirt at {path}", daemon=True).start()

    @property
    def is_usable(self) -> bool:
        """Whether every call was answered in time so far."""
        return self._error is None and not self._is_slow

    def use(self) -> None:
        """One more user. See ``leave``."""
        with self._changed:
            self._users += 1

    def leave(self) -> None:
        """One user less; the last one of a line that is not usable closes it."""
        with self._changed:
            self._users -= 1
            self._close_if_over()

    def ask(
        self, procedure: int, arguments: bytes, until: float, answer_s: float, on_sent: Callable[[], None]
    ) -> tuple[int, bytes]:
        """Status and body of the answer, which may take ``answer_s`` seconds from the moment in which the call may be sent.

        ``on_sent`` is called when the call was written whole: one that was not is never carried out.

        Raises:
            LibvirtSilent, LibvirtGone: no answer.
        """
        with self._changed:
            if not self._changed.wait_for(self._has_turn, max(until - time.monotonic(), 0)):
                raise LibvirtSilent(f"libvirt at {self._path} does not answer in time")
            # Who uses a line that takes no further users continues, if there is room.
            if self._error is not None and (
                isinstance(self._error, LibvirtGone) or len(self._answers) >= _AT_ONCE
            ):
                raise self._error
            self._serial += 1
            serial = self._serial
            waiting = self._answers[serial] = Future()
        by = min(until, time.monotonic() + answer_s)
        try:
            self._send(call_message(procedure, serial, arguments), by)
            on_sent()
            try:
                answered, status, body = waiting.result(_seconds_to(min(by, time.monotonic() + RPC_S)))
            except TimeoutError:
                self._is_slow = True
                answered, status, body = waiting.result(_seconds_to(by))
        except TimeoutError as error:
            raise self._fail(LibvirtSilent(f"libvirt at {self._path} does not answer in time")) from error
        finally:
            with self._changed:
                del self._answers[serial]
                self._changed.notify()
        if answered != procedure:
            raise self._fail(LibvirtGone(f"what listens at {self._path} does not speak libvirt's protocol"))
        return status, body

    def _has_turn(self) -> bool:
        return self._error is not None or len(self._answers) < _AT_ONCE

    def _send(self, message: bytes, by: float) -> None:
        try:
            with self._writing:  # nobody has it longer than RPC_S
                if isinstance(self._error, LibvirtGone):
                    raise self._error
                self._writer.settimeout(min(self._left_until(by), RPC_S))
                try:
                    self._writer.sendall(message)
                except TimeoutError:
                    # A part of it may be written: what followed would be taken for the rest.
                    self._fail(LibvirtGone(f"libvirt at {self._path} does not read what it is sent"))
                    raise
        except (TimeoutError, LibvirtGone, LibvirtSilent):
            raise
        except OSError as error:
            raise self._fail(LibvirtGone(f"libvirt at {self._path} ended the connection")) from error

    def _left_until(self, by: float) -> float:
        """Raises LibvirtSilent: a pause that is late must not be asked for at all."""
        left = by - time.monotonic()
        if left <= 0:
            raise LibvirtSilent(f"libvirt at {self._path} does not answer in time")
        return left

    def _receive(self) -> None:
        """In a thread, until the connection ends."""
        try:
            while True:
                message = self._message()
                serial, answered, status = answer_of(message)
                with self._changed:
                    waiting = self._answers.get(serial)
                if waiting is not None:
                    waiting.set_result((answered, status, message[-1]))
        except (OSError, InvalidStateError):
            gone = self._fail(LibvirtGone(f"libvirt at {self._path} ended the connection"))
            with self._changed:
                for waiting in self._answers.values():
                    if not waiting.done():
                        waiting.set_exception(gone)
                self._close_if_over()

    def _fail(self, error: OSError) -> OSError:
        """What there is to raise: that it is gone outweighs that it was silent."""
        with self._changed:
            if self._error is None or isinstance(error, LibvirtGone):
                self._error = error
            self._changed.notify_all()
        return error

    def _close_if_over(self) -> None:
        if not self.is_usable and self._users == 0:
            with suppress(OSError):
                self._socket.shutdown(2)  # ends the thread that reads
            self._socket.close()
            self._writer.close()

    def _left(self) -> float:
        return _NO_END_S if self._is_open else super()._left()


def _seconds_to(instant: float) -> float:
    return min(max(instant - time.monotonic(), 0.0), _NO_END_S)


class _Use(Libvirt):
    """A line as one of its users has it, with deadlines of its own."""

    def __init__(self, line: _Line, path: str, until: float, answer_s: float) -> None:
        self._line, self._path, self._until, self._answer_s = line, path, until, answer_s
        self.sent = False
        line.use()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._line.leave()

    def _exchange(self, procedure: int, arguments: bytes, answer_s: float) -> tuple[int, bytes]:
        self.sent = False
        return self._line.ask(procedure, arguments, self._until, answer_s, self._on_sent)

    def _on_sent(self) -> None:
        self.sent = True


class _Connections:
    """The lines of this process, one for each daemon, and those that are being opened."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._lines: dict[tuple[str, str], Future[_Line]] = {}

    def line(self, place: tuple[str, str]) -> Future[_Line]:
        """The line to a daemon, which may be being opened."""
        with self._lock:
            found = self._lines.get(place)
            if found is None or (found.done() and (found.exception() or not found.result().is_usable)):
                found = self._lines[place] = Future()
                threading.Thread(
                    target=_open, args=(found, place), name=f"open libvirt at {place[0]}", daemon=True
                ).start()
            return found


def _open(found: Future[_Line], place: tuple[str, str]) -> None:
    try:
        found.set_result(_Line(*place, time.monotonic() + OPENING_S))
    except BaseException as error:  # noqa: BLE001 - it is raised where it is awaited
        found.set_exception(error)


_connections = _Connections()


def open_ahead(plans: Iterable[object]) -> None:
    """Begin to open the lines of these plans' daemons: they are to be open when the VMs are paused. Does not wait."""
    for place in {(plan.socket, plan.uri) for plan in plans if isinstance(plan, LibvirtPlan)}:
        with suppress(RuntimeError):  # the host cannot start a thread
            _connections.line(place)


def daemon_at(
    path: str, uri: str, until: float, answer_s: float = math.inf, *, opening_s: float = OPENING_S
) -> Libvirt:
    """The line to a daemon, as ``Libvirt`` but open already if ``open_ahead`` was called in time.

    Args:
        opening_s: how long one that is being opened is waited for, in seconds.

    Raises:
        OSError: as ``Libvirt``.
    """
    found = _connections.line((path, uri))
    try:
        line = found.result(_seconds_to(min(until, time.monotonic() + opening_s)))
    except TimeoutError as error:
        raise LibvirtSilent(f"libvirt at {path} does not answer in time") from error
    return _Use(line, path, until, answer_s)
