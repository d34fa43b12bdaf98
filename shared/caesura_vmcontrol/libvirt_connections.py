"""Connections to libvirt's daemons that are kept: open and authenticated before they are needed, each shared by several threads.

Each connection is authenticated by polkit, which looks at one client after the other and may ask a directory service: in a pause, with a
connection for each look at each domain, nobody's turn would come in time. The daemon carries out a connection's calls side by side.

A call that waits for a domain's job keeps one of the daemon's workers for up to half a minute, also when its client has left. While one is
not answered no other is sent for that domain: one QEMU that hangs would take all workers within seconds, and with them every other domain's
way out.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from types import TracebackType
from typing import Self

from caesura_vmcontrol.libvirt_rpc import (
    Libvirt,
    LibvirtGone,
    LibvirtPlan,
    LibvirtSilent,
    answer_of,
    awaited_job,
    call_message,
)

OPENING_S = 5.0
"""s: for an opening; polkit may take most of it."""
RPC_S = 0.5
"""s: what the daemon gets for one answer before QEMU is asked directly; it takes some milliseconds."""
_MOST_LEASES = 4
"""Of one connection: each has one call under way, and one more may be there that somebody has given up."""
_MOST_CALLS = 5
"""The daemon reads no more from one connection before it has answered one (max_client_requests)."""
_MOST_CONNECTIONS = 5
"""To one daemon: with four leases each as many calls as it has workers (max_workers)."""
_MOST_OPEN = 20
"""The same with those that get no further users: each of them has a call that keeps a worker."""
_JOB_WAIT_S = 30.0
"""s: the daemon lets a call wait so long for the domain's job (``VIR_JOB_WAIT_TIME``)."""
_NO_END_S = 1e6


class CallUnanswered(LibvirtSilent):
    """Nothing was sent: the daemon has not answered an earlier call for the domain. ``has_ended``: set when that has an answer, or can get none."""

    def __init__(self, path: str, has_ended: threading.Event) -> None:
        self.has_ended = has_ended
        super().__init__(f"libvirt at {path} has not answered an earlier call for this domain")


class _PendingCall:
    """A call under way.

    ``awaits``: the domain whose job it waits for. ``sent_at``: CLOCK_MONOTONIC, s; infinite: it is not sent yet.
    """

    def __init__(self, procedure: int, awaits: bytes) -> None:
        self.procedure = procedure
        self.awaits = awaits
        self.sent_at = math.inf
        self.has_timed_out = False
        self.is_abandoned = False
        self.has_ended = threading.Event()
        self.status, self.body = 0, b""
        self.error: OSError | None = None

    def is_late(self, now: float) -> bool:
        """Whether it has waited longer than an answer takes."""
        return self.has_timed_out or self.sent_at < now - RPC_S

    def awaits_job(self, now: float) -> bool:
        """Whether the daemon may still let it wait for its domain's job."""
        return bool(self.awaits) and self.is_late(now) and now - self.sent_at < _JOB_WAIT_S


class _SharedConnection(Libvirt):
    """An open connection that several threads use at once.

    While a call on it is not answered for longer than ``RPC_S`` it gets no further users: it may keep them waiting.
    """

    _is_open = False

    def __init__(self, path: str, uri: str, until: float, on_end: Callable[[], None]) -> None:
        super().__init__(path, uri, until)
        self._is_open = True
        self._on_end = on_end
        self._writing = threading.Lock()
        self._lock = threading.Lock()
        self._calls: dict[int, _PendingCall] = {}
        """By serial, also those that nobody waits for any more: the daemon is still busy with them."""
        self._error: OSError | None = None
        self.leases = 0
        """Of the pool, and under its lock."""
        try:
            self._writer = self._socket.dup()
        except BaseException:
            self._socket.close()
            raise

    @property
    def free_leases(self) -> int:
        """How many users it may have beside those that it has."""
        if not self.is_usable:
            return 0
        with self._lock:
            abandoned = sum(call.is_abandoned for call in self._calls.values())
        return max(_MOST_LEASES - self.leases - abandoned, 0)

    @property
    def is_usable(self) -> bool:
        """Whether no call has waited too long for its answer."""
        now = time.monotonic()
        with self._lock:
            return self._error is None and not any(call.is_late(now) for call in self._calls.values())

    @property
    def is_idle(self) -> bool:
        """Whether nobody uses it, and the daemon is busy with nothing of it."""
        with self._lock:
            return not self.leases and not self._calls

    @property
    def awaits_job(self) -> bool:
        """Whether a call on it may still wait for a domain's job: its answer, or the connection's end, tells when that is over."""
        now = time.monotonic()
        with self._lock:
            return any(call.awaits_job(now) for call in self._calls.values())

    def unanswered(self, domain: bytes) -> _PendingCall | None:
        """The call on it that waits for this domain's job, if there is one."""
        now = time.monotonic()
        with self._lock:
            calls = [call for call in self._calls.values() if call.awaits == domain and call.awaits_job(now)]
        return calls[0] if calls else None

    def ask(
        self, procedure: int, arguments: bytes, until: float, answer_s: float, on_sent: Callable[[], None]
    ) -> tuple[int, bytes]:
        """Status and body of the answer, which may take ``answer_s`` seconds.

        ``on_sent`` is called when the call was written whole: one that was not is never carried out.

        Raises:
            LibvirtSilent, LibvirtGone: no answer.
        """
        now = time.monotonic()
        by = min(until, now + answer_s)
        call = _PendingCall(procedure, awaited_job(procedure, arguments))
        with self._lock:
            if self._error is not None:
                raise self._error
            if len(self._calls) >= _MOST_CALLS:
                raise self._silent()
            self._serial += 1
            serial = self._serial
            self._calls[serial] = call
        try:
            self._send(call_message(procedure, serial, arguments), by)
        except BaseException:
            with self._lock:
                self._calls.pop(serial, None)
            raise
        call.sent_at = time.monotonic()
        on_sent()
        if not call.has_ended.wait(min(max(by - time.monotonic(), 0), _NO_END_S)):
            # Its answer may come yet. Who had little time left says nothing about the daemon.
            if until - now >= min(answer_s, RPC_S):
                call.has_timed_out = True
            call.is_abandoned = True
            raise self._silent()
        if call.error is not None:
            raise call.error
        return call.status, call.body

    def close(self) -> None:
        """Nobody uses it any more."""
        with suppress(OSError):
            self._socket.shutdown(2)  # ends the thread that reads
        self._socket.close()
        self._writer.close()

    def _silent(self) -> LibvirtSilent:
        return LibvirtSilent(f"libvirt at {self._path} does not answer in time")

    def _send(self, message: bytes, by: float) -> None:
        if not self._writing.acquire(timeout=min(self._left_until(by), _NO_END_S)):
            raise self._silent()
        try:
            if self._error is not None:
                raise self._error
            self._writer.settimeout(min(self._left_until(by), RPC_S))
            try:
                self._writer.sendall(message)
            except TimeoutError as error:
                # A part of it may be written: what followed would be taken for the rest.
                self._fail(LibvirtGone(f"libvirt at {self._path} does not read what it is sent"))
                raise self._silent() from error
            except OSError as error:
                raise self._fail(LibvirtGone(f"libvirt at {self._path} ended the connection")) from error
        finally:
            self._writing.release()

    def _left_until(self, by: float) -> float:
        """Raises LibvirtSilent: a pause that is late must not be asked for at all."""
        left = by - time.monotonic()
        if left <= 0:
            raise self._silent()
        return left

    def receive(self) -> None:
        """Hand out the answers, until the connection ends. Blocking."""
        try:
            while True:
                message = self._message()
                serial, procedure, status = answer_of(message)
                with self._lock:
                    call = self._calls.pop(serial, None)
                if call is None:
                    continue
                if procedure != call.procedure:
                    call.error = LibvirtGone(
                        f"what listens at {self._path} does not speak libvirt's protocol"
                    )
                call.status, call.body = status, message[-1]
                call.has_ended.set()
        except OSError:
            pass
        finally:
            self._fail(LibvirtGone(f"libvirt at {self._path} ended the connection"))
            self._on_end()

    def _fail(self, error: OSError) -> OSError:
        """It is of no use any more; the first reason counts."""
        with self._lock:
            self._error = self._error or error
            calls = list(self._calls.values())
            self._calls.clear()
        for call in calls:
            call.error = self._error
            call.has_ended.set()
        return self._error

    def _left(self) -> float:
        return _NO_END_S if self._is_open else super()._left()


class _Lease(Libvirt):
    """A shared connection as one of its users has it, with deadlines of its own."""

    def __init__(
        self, pool: _Pool, connection: _SharedConnection, path: str, until: float, answer_s: float
    ) -> None:
        self._pool, self._connection = pool, connection
        self._path, self._until, self._answer_s = path, until, answer_s
        self.sent = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.release(self._connection)

    def _exchange(self, procedure: int, arguments: bytes, answer_s: float) -> tuple[int, bytes]:
        self.sent = False
        self._pool.refuse_second(awaited_job(procedure, arguments))
        return self._connection.ask(procedure, arguments, self._until, answer_s, self._on_sent)

    def _on_sent(self) -> None:
        self.sent = True


class _Pool:
    """The connections to one daemon.

    A lease is for all calls of one user: with a turn for each call, many users of a slow daemon would all be half-way when their time is over.
    """

    def __init__(self, path: str, uri: str) -> None:
        self._path, self._uri = path, uri
        self._changed = threading.Condition()  # of a lock that its holder may take again
        self._connections: list[_SharedConnection] = []
        self._opening = 0
        self._waiting = 0
        self._failures = 0
        self._error: OSError = LibvirtGone(f"no libvirt at {path}")
        """The last failure."""

    def open_ahead(self, users: int) -> None:
        """Begin to open what so many users need. Does not wait."""
        wanted = min(math.ceil(users / _MOST_LEASES), _MOST_CONNECTIONS)
        with self._changed:
            while len(self._usable()) + self._opening < wanted and self._has_room() and self._begin_opening():
                pass

    def lease(self, until: float, answer_s: float, opening_s: float) -> Libvirt:
        """See ``daemon_at``."""
        opening_by = time.monotonic() + opening_s
        with self._changed:
            connection = self._free(self._waiting)
            self._waiting += 1
            try:
                connection = connection or self._wait_for_one(until, opening_by)
            except BaseException:
                self._changed.notify()  # it may have been woken in vain
                raise
            finally:
                self._waiting -= 1
            if connection is not None:
                connection.leases += 1
                return _Lease(self, connection, self._path, until, answer_s)
        return Libvirt(self._path, self._uri, until, answer_s)  # the host cannot start a thread

    def _wait_for_one(self, until: float, opening_by: float) -> _SharedConnection | None:
        """None: none can be opened but by the caller's own thread."""
        failures = self._failures
        while True:
            usable = len(self._usable())
            if not usable and not self._opening and self._failures > failures:
                raise self._error
            is_wanted = self._waiting > self._opening * _MOST_LEASES
            if is_wanted and usable + self._opening < _MOST_CONNECTIONS and self._has_room():
                has_begun = self._begin_opening()
                if not has_begun and not usable and not self._opening:
                    return None
            left = (until if usable else min(until, opening_by)) - time.monotonic()
            if left <= 0:
                raise LibvirtSilent(f"libvirt at {self._path} does not answer in time")
            # A connection is of use again, or no longer, also by the time that passes.
            self._changed.wait(min(left, RPC_S))
            connection = self._free(0)
            if connection is not None:
                return connection

    def release(self, connection: _SharedConnection) -> None:
        """A lease has ended."""
        with self._changed:
            connection.leases -= 1
            self._usable()
            self._changed.notify()

    def refuse_second(self, domain: bytes) -> None:
        """Raises CallUnanswered: a call waits for this domain's job; empty: the call that is to be sent waits for none."""
        if not domain:
            return
        with self._changed:
            for each in self._connections:
                if call := each.unanswered(domain):
                    raise CallUnanswered(self._path, call.has_ended)

    def _free(self, ahead: int) -> _SharedConnection | None:
        """The connection with the most room, if there is more than those need who wait."""
        room = {each: each.free_leases for each in self._connections}
        if sum(room.values()) <= ahead:
            return None
        return max(room, key=lambda each: room[each])

    def _usable(self) -> list[_SharedConnection]:
        """Closes those that are not, that nobody uses, and whose calls wait for no domain; and idle ones that are too many."""
        usable = [each for each in self._connections if each.is_usable]
        for each in [each for each in self._connections if each not in usable]:
            if not each.leases and not each.awaits_job:
                self._close(each)
        for each in [each for each in usable[_MOST_CONNECTIONS:] if each.is_idle]:
            usable.remove(each)
            self._close(each)
        return usable

    def _has_room(self) -> bool:
        """Whether one more may be open. Of those that are only kept for an answer the oldest is closed for it."""
        if len(self._connections) + self._opening < _MOST_OPEN:
            return True
        kept = [each for each in self._connections if not each.leases and not each.is_usable]
        if kept:
            self._close(kept[0])
        return bool(kept)

    def _close(self, connection: _SharedConnection) -> None:
        self._connections.remove(connection)
        connection.close()

    def _begin_opening(self) -> bool:
        try:
            threading.Thread(target=self._open, name=f"libvirt at {self._path}", daemon=True).start()
        except RuntimeError:  # the host cannot start a thread
            return False
        self._opening += 1
        return True

    def _open(self) -> None:
        """In a thread, which then hands out the answers: a second one may be refused by the host."""
        error: OSError | None = None
        connection: _SharedConnection | None = None
        try:
            until = time.monotonic() + OPENING_S
            connection = _SharedConnection(self._path, self._uri, until, self._look)
        except OSError as failure:
            error = failure
        except Exception as failure:  # noqa: BLE001 - whatever it is, nobody must wait for it
            error = LibvirtGone(f"libvirt at {self._path} cannot be asked: {failure!r}")
        with self._changed:
            self._opening -= 1
            if connection is not None:
                self._connections.append(connection)
            elif error is not None:
                self._failures += 1
                self._error = error
            self._look()
        if connection is not None:
            connection.receive()

    def _look(self) -> None:
        """Something has changed."""
        with self._changed:
            self._usable()
            self._changed.notify_all()


_lock = threading.Lock()
_pools: dict[tuple[str, str], _Pool] = {}
"""Of this process, by the daemon's socket and URI."""


def _pool(place: tuple[str, str]) -> _Pool:
    with _lock:
        if place not in _pools:
            _pools[place] = _Pool(*place)
        return _pools[place]


def open_ahead(plans: Iterable[object]) -> None:
    """Begin to open the connections for these plans: they are to be open when the VMs are paused. Does not wait."""
    places = [(plan.socket, plan.uri) for plan in plans if isinstance(plan, LibvirtPlan)]
    for place in set(places):
        _pool(place).open_ahead(places.count(place))


def daemon_at(
    path: str, uri: str, until: float, answer_s: float = math.inf, *, opening_s: float = OPENING_S
) -> Libvirt:
    """A connection, as ``Libvirt`` but open already if ``open_ahead`` was called in time; must be left by ``with``.

    Args:
        until: for waiting for a free one, and for everything that follows (CLOCK_MONOTONIC, s).
        opening_s: how long one that is being opened is waited for, in seconds.

    Raises:
        OSError: as ``Libvirt``.
    """
    return _pool((path, uri)).lease(until, answer_s, opening_s)
