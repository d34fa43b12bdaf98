"""libvirt's RPC over its unix socket, as far as a pause needs it: state, suspend and resume of one domain.

Each answer has one deadline, however it drips, and a connection another one: a daemon that hangs is given up after the first, one that
is slow is not. Sources: libvirt's
``src/rpc/virnetprotocol.x`` (the header), ``src/remote/remote_protocol.x`` (procedures), ``include/libvirt/virterror.h``; XDR is RFC 4506.
The numbers are part of libvirt's wire protocol, which its releases keep.
"""

from __future__ import annotations

import math
import re
import socket
import struct
import time
import uuid
from dataclasses import dataclass
from types import TracebackType
from typing import Final, Self

from caesura_vmcontrol.plan_errors import BadPlan

_PROGRAM, _VERSION = 0x20008086, 1
_CALL, _REPLY = 0, 1
_MOST_BYTES = 1 << 20
"""An answer to what is asked here has some hundred bytes; a message of the protocol may have 32 MiB."""

_CONNECT_OPEN, _CONNECT_CLOSE, _AUTH_LIST, _AUTH_POLKIT = 1, 2, 66, 70
_LOOKUP_BY_UUID, _RESUME, _SUSPEND, _GET_STATE, _GET_JOB_STATS = 24, 28, 34, 212, 298
_AUTH_IS_NONE, _AUTH_IS_POLKIT = 0, 2
NO_DOMAIN: Final = 42
"""VIR_ERR_NO_DOMAIN"""
OPERATION_INVALID: Final = 55
"""VIR_ERR_OPERATION_INVALID: such as a resume of a domain that runs"""

RUNNING, BLOCKED, PAUSED, SHUTDOWN, SHUTOFF, CRASHED, SUSPENDED = 1, 2, 3, 4, 5, 6, 7
"""virDomainState; SUSPENDED is the guest's own sleep."""
PAUSED_BY_USER: Final = 1
"""VIR_DOMAIN_PAUSED_USER: by a client that asked for a suspend, ourselves included."""

NO_JOB, SAVE_JOB, MIGRATION_JOB, SNAPSHOT_JOB, DUMP_JOB, BACKUP_JOB = 0, 2, 5, 6, 8, 9
"""virDomainJobOperation: what is done with a domain that takes long; ``NO_JOB`` is ours."""
UNKNOWN_JOB: Final = -1
"""Something is, and the daemon does not say what."""
_OPERATION = struct.pack(">I", 9) + b"operation" + bytes(3)
"""A parameter's name, as XDR has it."""
_INT_TYPE = 1
"""VIR_TYPED_PARAM_INT"""

_URI = re.compile(r"[a-z]+:///[a-z]+")
_UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


class LibvirtGone(OSError):
    """No libvirt daemon listens on the socket, or it ended the connection."""


class LibvirtSilent(OSError):
    """The daemon did not answer in time; the request may take effect later."""


class LibvirtRefused(OSError):
    """The daemon answered with an error: ``code`` is a ``virErrorNumber``."""

    def __init__(self, code: int, why: str) -> None:
        self.code = code
        self.why = why
        super().__init__(f"libvirt says: {why}")


@dataclass(frozen=True)
class Domain:
    """A domain as the daemon names it. ``number``: its id while it runs, another one after each start; -1: it does not run."""

    name: str
    uuid: bytes
    number: int


@dataclass(frozen=True)
class LibvirtPlan:
    """A domain of libvirt, in the life that began with its last start.

    Args:
        socket: the daemon's.
        uri: what is opened there.
        uuid: of the domain.
        number: its id: another one after its next start.
        pid: its QEMU process, with ``start_ticks``; 0: not known.
        qmp: QMP sockets of that process that are tried where the daemon does not help: one of the domain's own, the daemon's monitor.
    """

    vm: str
    socket: str
    uri: str
    uuid: str
    number: int
    pid: int
    start_ticks: int
    qmp: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.uri, str) or not _URI.fullmatch(self.uri):
            raise BadPlan(f"{self.uri!r} is not the URI of libvirt on this host, such as qemu:///system")
        if not isinstance(self.uuid, str) or not _UUID.fullmatch(self.uuid):
            raise BadPlan(f"{self.uuid!r} is not the UUID of a domain")
        for path in (self.socket, *self.qmp):
            if not isinstance(path, str) or not path.startswith("/"):
                raise BadPlan(f"{path!r} is not the path of a socket")
        if any(type(number) is not int or number < 0 for number in (self.number, self.pid, self.start_ticks)):
            raise BadPlan(f"{self.number!r} cannot be a domain that runs")


class Libvirt:
    """An open connection.

    Args:
        path: the daemon's socket.
        uri: what is opened there, such as ``qemu:///system``.
        until: for everything that follows (CLOCK_MONOTONIC, s).
        answer_s: for each answer, in seconds; those of polkit and of the opening, which asks it, too, may take all the time.

    Raises:
        LibvirtGone, LibvirtSilent, LibvirtRefused: it cannot be opened.
        OSError: the socket cannot be used.
    """

    def __init__(self, path: str, uri: str, until: float, answer_s: float = math.inf) -> None:
        self._path = path
        self._until = until
        self._answer_s = answer_s
        self._answer_by = min(until, time.monotonic() + answer_s)
        self._serial = 0
        self.sent = False
        """Whether the last call was written whole: one that was not is never carried out."""
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._connect()
            self._authenticate()
            self._call(_CONNECT_OPEN, _optional(uri) + struct.pack(">I", 0), math.inf)
        except BaseException:
            self._socket.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._socket.close()

    def extend(self, until: float) -> None:
        """What follows has until then."""
        self._until = until

    def domain(self, domain_uuid: str) -> Domain:
        """Raises LibvirtRefused with NO_DOMAIN: there is none."""
        body = self._call(_LOOKUP_BY_UUID, uuid.UUID(domain_uuid).bytes)
        (length,) = self._unpack(">I", body)
        padded = length + -length % 4
        (number,) = self._unpack(">i", body, 4 + padded + 16)
        return Domain(
            body[4 : 4 + length].decode(errors="replace"), body[4 + padded : 4 + padded + 16], number
        )

    def state(self, domain: Domain) -> tuple[int, int]:
        """virDomainState and its reason."""
        state, reason = self._unpack(">ii", self._call(_GET_STATE, _wire(domain) + struct.pack(">I", 0)))
        return state, reason

    def job(self, domain: Domain) -> int:
        """virDomainJobOperation of what is under way with it."""
        body = self._call(_GET_JOB_STATS, _wire(domain) + struct.pack(">I", 0))
        if len(body) < 4 or not struct.unpack_from(">i", body)[0]:
            return NO_JOB
        # A list of parameters, each with its name, type and value, in no given order.
        at = body.find(_OPERATION)
        if at < 0 or len(body) < at + len(_OPERATION) + 8:
            return UNKNOWN_JOB
        kind, operation = struct.unpack_from(">ii", body, at + len(_OPERATION))
        return operation if kind == _INT_TYPE and operation else UNKNOWN_JOB

    def suspend(self, domain: Domain) -> None:
        """Pause it. Raises LibvirtRefused: it is not running, or another job of it is under way."""
        self._call(_SUSPEND, _wire(domain))

    def resume(self, domain: Domain) -> None:
        """Have it run. Raises LibvirtRefused: it is not paused, or another job of it is under way."""
        self._call(_RESUME, _wire(domain))

    # -- the line ---------------------------------------------------------------------------------------------

    def _connect(self) -> None:
        try:
            self._socket.settimeout(self._left())
            self._socket.connect(self._path)
        except (TimeoutError, BlockingIOError) as error:  # the latter: its queue of connections is full
            raise LibvirtSilent(f"libvirt at {self._path} does not accept a connection") from error
        except (FileNotFoundError, ConnectionError) as error:
            raise LibvirtGone(f"no libvirt at {self._path}: {error.strerror or error}") from error

    def _authenticate(self) -> None:
        body = self._call(_AUTH_LIST, b"")
        (count,) = self._unpack(">I", body)
        offered = self._unpack(f">{min(count, 16)}i", body, 4)
        if not offered or _AUTH_IS_NONE in offered:
            return
        if _AUTH_IS_POLKIT not in offered:
            raise LibvirtRefused(0, f"{self._path} wants authentication by SASL, which is not supported here")
        self._call(_AUTH_POLKIT, b"", math.inf)

    def _unpack(self, what: str, body: bytes, offset: int = 0) -> tuple[int, ...]:
        try:
            return struct.unpack_from(what, body, offset)
        except struct.error as error:
            raise LibvirtGone(f"what listens at {self._path} does not speak libvirt's protocol") from error

    def _left(self) -> float:
        left = self._answer_by - time.monotonic()
        if left <= 0:
            raise LibvirtSilent(f"libvirt at {self._path} does not answer in time")
        return left

    def _call(self, procedure: int, arguments: bytes, answer_s: float = 0.0) -> bytes:
        """``answer_s``: if more than for other answers."""
        status, body = self._exchange(procedure, arguments, max(answer_s, self._answer_s))
        if status != 0:
            raise _refusal(body)
        return body

    def _exchange(self, procedure: int, arguments: bytes, answer_s: float) -> tuple[int, bytes]:
        """Status and body of the answer."""
        self._serial += 1
        self._answer_by = min(self._until, time.monotonic() + answer_s)
        self.sent = False
        try:
            self._socket.settimeout(self._left())
            self._socket.sendall(call_message(procedure, self._serial, arguments))
            self.sent = True
            while True:
                message = self._message()
                serial, answered, status = answer_of(message)
                if (serial, answered) == (self._serial, procedure):
                    return status, message[-1]
        except TimeoutError as error:
            raise LibvirtSilent(f"libvirt at {self._path} does not answer in time") from error
        except ConnectionError as error:
            raise LibvirtGone(f"libvirt at {self._path} ended the connection") from error

    def _message(self) -> Message:
        (length,) = struct.unpack(">I", self._read(4))
        if not 28 <= length <= _MOST_BYTES:
            raise LibvirtGone(f"what listens at {self._path} does not speak libvirt's protocol")
        data = self._read(length - 4)
        program, version, procedure, kind, serial, status = struct.unpack_from(">IIiiII", data)
        return program, version, procedure, kind, serial, status, data[24:]

    def _read(self, count: int) -> bytes:
        received = bytearray()
        while len(received) < count:
            self._socket.settimeout(self._left())
            part = self._socket.recv(count - len(received))
            if not part:
                raise LibvirtGone(f"libvirt at {self._path} ended the connection")
            received += part
        return bytes(received)


Message = tuple[int, int, int, int, int, int, bytes]
"""The header's numbers, and what follows it."""


def call_message(procedure: int, serial: int, arguments: bytes) -> bytes:
    """A call as it is sent."""
    head = struct.pack(">IIiiII", _PROGRAM, _VERSION, procedure, _CALL, serial, 0)
    return struct.pack(">I", 4 + len(head) + len(arguments)) + head + arguments


def answer_of(message: Message) -> tuple[int, int, int]:
    """Serial and procedure of the call that it answers, and its status; serial 0: an event or a keep-alive, which nobody asked for."""
    program, _, answered, kind, serial, status, _ = message
    return (serial if (program, kind) == (_PROGRAM, _REPLY) else 0, answered, status)


def awaited_job(procedure: int, arguments: bytes) -> bytes:
    """The domain, as it is sent, in its life, whose job a call waits for in the daemon; empty: for none, or it is a suspend.

    Questions about its job wait for it, too (``qemuDomainGetJobStatsInternal``); those about its state do not.
    """
    if procedure == _RESUME:
        return arguments
    return arguments[:-4] if procedure == _GET_JOB_STATS else b""  # without the flags


def _text(value: str) -> bytes:
    data = value.encode()
    return struct.pack(">I", len(data)) + data + bytes(-len(data) % 4)


def _optional(value: str) -> bytes:
    return struct.pack(">I", 1) + _text(value)


def _wire(domain: Domain) -> bytes:
    return _text(domain.name) + domain.uuid + struct.pack(">i", domain.number)


def _refusal(body: bytes) -> LibvirtRefused:
    """From a ``virNetMessageError``: code, domain, an optional text, and more that is not read."""
    try:
        code, _, has_text = struct.unpack_from(">iiI", body)
        length = struct.unpack_from(">I", body, 12)[0] if has_text else 0
        text = body[16 : 16 + length].decode(errors="replace")
    except struct.error:
        return LibvirtRefused(0, "an error that cannot be read")
    return LibvirtRefused(code, text or f"error {code}")
