"""The guard's socket: JSON lines over a unix socket in the state folder, one select loop.

Requests: ``arm`` (operation, boot_id, deadline, plans, and kernel_change where the host's kernel is to be replaced),
``leave`` (operation, by: an instant on CLOCK_MONOTONIC), ``disarm`` (operation), ``status``, ``inspect`` (plans: which of
their sockets this guard may not use, before it is armed for them). Every answer has ``ok``; a refusal has ``error``. The connection that armed is the operation's owner: when it ends, or the
process behind it (SO_PEERCRED, pidfd) does, the guard fires.
"""

# light imports on purpose: no pathlib here.
# ruff: noqa: PTH108

from __future__ import annotations

import errno
import fcntl
import json
import math
import os
import selectors
import signal
import socket
import struct
import time
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

from caesura_pause_guard.departure import Departure, check_plans
from caesura_vmcontrol import kernel_change
from caesura_vmcontrol.guard_socket import MAX_LINE_BYTES, socket_address
from caesura_vmcontrol.intent import Intent
from caesura_vmcontrol.libvirt_connections import open_ahead
from caesura_vmcontrol.libvirt_control import unusable_sockets
from caesura_vmcontrol.libvirt_rpc import LibvirtPlan
from caesura_vmcontrol.notify import Notifier
from caesura_vmcontrol.plan_errors import BadPlan
from caesura_vmcontrol.process_control import reap
from caesura_vmcontrol.procfs import boot_id
from caesura_vmcontrol.resume_plans import ResumePlan, plan_from_json
from caesura_vmcontrol.watchdog import GuardRefusal, Log, Watchdog

ACCEPT_RETRY_S = 1.0  # s without an accept after one that failed
ACCEPT_LOG_S = 60.0  # s between two log lines about that
_NO_CHANGE_YET = {"rehearsal": False, "watchdog_s": 0, "left": None, "arrival": None}
"""What a request need not say of a change of the kernel."""


class AlreadyRunning(Exception):
    """Another guard holds this state folder."""


class _Client:
    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.incoming = b""
        pid, self.uid, _ = struct.unpack(
            "3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        )
        self.pid = int(pid)


class GuardServer:
    """Serves one ``Watchdog`` until SIGTERM.

    Args:
        folder: the state folder; holds the socket and a lock against a second guard.
        exit_when_alone_s: end after this many seconds without a client or work; None: never.
        notifier: is notified that it serves and that its loop is alive.
        leaving: leaves the kernel; injected by tests only.

    Raises:
        AlreadyRunning: a second guard on the same folder.
    """

    def __init__(
        self,
        folder: str,
        watch: Watchdog,
        log: Log,
        *,
        exit_when_alone_s: float | None,
        notifier: Notifier | None = None,
        departure: Departure | None = None,
    ) -> None:
        self._folder = folder
        self._watch = watch
        self._log = log
        self._exit_when_alone_s = exit_when_alone_s
        self._notifier = notifier or Notifier()
        self._departure = departure or Departure(folder, watch, log)
        self._clients: dict[int, _Client] = {}
        self._owner: _Client | None = None
        self._owner_pidfd: int | None = None
        self._stopping = False
        self._said_stopping = False
        self._alone_since = math.inf
        """On CLOCK_MONOTONIC; infinity: it has a client or work."""
        self._accept_at: float | None = None
        """When to accept again after a failure; None: the listener is polled."""
        self._accept_said_at = -math.inf
        self._boot_id = boot_id()
        self._selector = selectors.DefaultSelector()
        self._handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self._lock = os.open(f"{folder}/guard.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise AlreadyRunning(f"another pause guard runs on {folder}") from None
        self._wake_read, self._wake_write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._listener = self._listen()

    def _listen(self) -> socket.socket:
        address = socket_address(self._handle)
        with suppress(FileNotFoundError):
            os.unlink(address)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        before = os.umask(0o177)
        try:
            listener.bind(address)
        finally:
            os.umask(before)
        listener.listen(8)
        self._selector.register(listener, selectors.EVENT_READ, self._accept)
        self._selector.register(self._wake_read, selectors.EVENT_READ, self._woken)
        return listener

    def run(self) -> None:
        """Serve until SIGTERM, or until alone for long enough. An operation in hand is always resumed first."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)
        signal.set_wakeup_fd(self._wake_write, warn_on_full_buffer=False)
        self._notifier.ready()
        try:
            while True:
                self._notifier.beat()
                wait_s = self._watch.step()
                if self._may_end():
                    return
                for limit_s in (self._notifier.interval_s, self._accept_again(), self._ends_in()):
                    if limit_s is not None:
                        wait_s = limit_s if wait_s is None else min(wait_s, limit_s)
                for key, _ in self._selector.select(wait_s):
                    key.data()
                reap()  # QEMU processes that we started
        finally:
            signal.set_wakeup_fd(-1)
            self._close()

    def _may_end(self) -> bool:
        """Whether it may end: every VM of its operation runs, and it was asked to stop or has no client."""
        if self._stopping:
            if not self._said_stopping:
                self._said_stopping = True
                self._notifier.stopping()
                self._watch.look_again()  # after our end no process looks after the VMs
            self._watch.fire("the pause guard was asked to stop")
            return self._watch.state != "firing"
        if self._clients or not self._watch.at_rest:
            self._alone_since = math.inf
            return False
        self._alone_since = min(self._alone_since, time.monotonic())
        return self._ends_in() == 0.0

    def _ends_in(self) -> float | None:
        """s: until it has been alone for long enough; None: somebody is there, it has work, or it is to stay."""
        if self._exit_when_alone_s is None or self._alone_since == math.inf:
            return None
        return max(0.0, self._alone_since + self._exit_when_alone_s - time.monotonic())

    def _on_signal(self, *_: object) -> None:
        self._stopping = True

    def _woken(self) -> None:
        with suppress(BlockingIOError):
            os.read(self._wake_read, 1024)

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except (BlockingIOError, InterruptedError, ConnectionAbortedError):
            return
        except OSError as error:
            self._accept_later(error)
            return
        connection.setblocking(False)
        client = _Client(connection)
        if client.uid not in (os.getuid(), 0):
            connection.close()
            return
        self._clients[connection.fileno()] = client
        self._selector.register(connection, selectors.EVENT_READ, lambda: self._receive(client))

    def _accept_later(self, error: OSError) -> None:
        """Without a free descriptor the listener stays readable: polled again at once, it would take the whole CPU."""
        now = time.monotonic()
        self._selector.unregister(self._listener)
        self._accept_at = now + ACCEPT_RETRY_S
        if now - self._accept_said_at >= ACCEPT_LOG_S:
            self._accept_said_at = now
            self._log("guard.accept_failed", why=str(error), clients=len(self._clients))

    def _accept_again(self) -> float | None:
        """Seconds until the listener is polled again; None when it is polled."""
        if self._accept_at is None:
            return None
        left_s = self._accept_at - time.monotonic()
        if left_s > 0:
            return left_s
        self._accept_at = None
        self._selector.register(self._listener, selectors.EVENT_READ, self._accept)
        return None

    def _receive(self, client: _Client) -> None:
        try:
            data = client.connection.recv(65536)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        client.incoming += data
        if not data or len(client.incoming) > MAX_LINE_BYTES:
            self._drop(client)
            return
        *lines, client.incoming = client.incoming.split(b"\n")
        for line in lines:
            answer = self._answer(client, line)
            try:
                client.connection.setblocking(True)
                client.connection.settimeout(0.5)  # s: a client that does not read must not delay us
                client.connection.sendall(json.dumps(answer).encode() + b"\n")
                client.connection.setblocking(False)
            except OSError:
                self._drop(client)
                return

    def _drop(self, client: _Client) -> None:
        self._clients.pop(client.connection.fileno(), None)
        self._selector.unregister(client.connection)
        client.connection.close()
        if client is self._owner:
            self._owner = None
            self._watch.owner_gone(dead=False)

    def _answer(self, client: _Client, line: bytes) -> dict[str, Any]:
        try:
            request = json.loads(line)
            match request.get("do"):
                case "arm":
                    self._arm(client, request)
                    return {"ok": True, "unusable": self._unusable_of_intent(), **self._status()}
                case "inspect":
                    plans = [plan_from_json(plan) for plan in request["plans"]]
                    open_ahead(plans)
                    return {"ok": True, "unusable": _unusable(plans)}
                case "leave":
                    self._leave(client, request)
                    return {"ok": False, "error": "the loaded kernel was not started"}
                case "drop":
                    self._drop_vms(client, request)
                    return {"ok": True, **self._status()}
                case "disarm":
                    record = self._watch.disarm(str(request["operation"]))
                    if self._watch.intent is None:
                        self._forget_owner()
                    return {"ok": True, "record": record, **self._status()}
                case "status":
                    return {"ok": True, **self._status()}
                case other:
                    return {"ok": False, "error": f"cannot do {other!r}"}
        except GuardRefusal as refusal:
            return {"ok": False, "error": str(refusal)}
        except OSError as error:  # of the client: it died in the meantime, or we have no descriptor left
            return {"ok": False, "error": f"cannot do it: {error}"}
        except (BadPlan, ValueError, KeyError, TypeError, AttributeError) as error:
            return {"ok": False, "error": f"bad request: {type(error).__name__}: {error}"}

    def _leave(self, client: _Client, request: dict[str, Any]) -> None:
        if client is not self._owner:
            raise GuardRefusal("only who armed the operation may have it leave the kernel")
        self._departure.leave(str(request["operation"]), float(request["by"]))

    def _drop_vms(self, client: _Client, request: dict[str, Any]) -> None:
        if client is not self._owner:
            raise GuardRefusal("only who armed the operation may say which VMs are not of it")
        self._watch.drop(str(request["operation"]), [str(vm) for vm in request["vms"]])

    def _status(self) -> dict[str, Any]:
        intent = self._watch.intent
        return {
            "state": self._watch.state,
            "pid": os.getpid(),
            "intent": None if intent is None else intent.to_json(),
        }

    def _unusable_of_intent(self) -> dict[str, list[str]]:
        return {} if self._watch.intent is None else _unusable(self._watch.intent.plans)

    def _arm(self, client: _Client, request: dict[str, Any]) -> None:
        if request["boot_id"] != self._boot_id:
            raise GuardRefusal("the deadline is of another boot's clock")
        change = request.get("kernel_change")
        intent = Intent(
            operation=str(request["operation"]),
            boot_id=self._boot_id,
            armed_at=time.monotonic(),
            deadline=float(request["deadline"]),
            plans=tuple(plan_from_json(plan) for plan in request["plans"]),
            kernel_change=None if change is None else kernel_change.from_json({**_NO_CHANGE_YET, **change}),
        )
        check_plans(intent)
        pidfd = os.pidfd_open(client.pid)
        try:
            self._watch.arm(intent)
        except BaseException:
            os.close(pidfd)
            raise
        open_ahead(intent.plans)
        self._forget_owner()
        self._owner = client
        self._owner_pidfd = pidfd
        if intent.kernel_change is not None:
            self._departure.measure()
        self._selector.register(pidfd, selectors.EVENT_READ, lambda: self._owner_died(pidfd))

    def _owner_died(self, pidfd: int) -> None:
        if pidfd != self._owner_pidfd:
            return  # an event of an owner that was replaced in the same round
        self._forget_owner()
        self._watch.owner_gone(dead=True)

    def _forget_owner(self) -> None:
        self._owner = None
        if self._owner_pidfd is not None:
            self._selector.unregister(self._owner_pidfd)
            os.close(self._owner_pidfd)
            self._owner_pidfd = None

    def _close(self) -> None:
        self._forget_owner()
        for client in list(self._clients.values()):
            self._selector.unregister(client.connection)
            client.connection.close()
        self._listener.close()
        self._selector.close()
        try:
            os.unlink(socket_address(self._handle))
        except OSError as error:
            if error.errno != errno.ENOENT:
                self._log("guard.unlink_failed", why=str(error))
        for handle in (self._wake_read, self._wake_write, self._lock, self._handle):
            os.close(handle)


def _unusable(plans: Iterable[ResumePlan]) -> dict[str, list[str]]:
    """Ways out of plans that are none from here, by VM: they were found with the updater's rights."""
    found = {plan.vm: unusable_sockets(plan) for plan in plans if isinstance(plan, LibvirtPlan)}
    return {vm: sockets for vm, sockets in found.items() if sockets}
