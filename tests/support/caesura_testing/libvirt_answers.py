"""A daemon of libvirt's that answers as a test says, and a QEMU's QMP socket, both in the test's own process."""

from __future__ import annotations

import json
import socket
import struct
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

UUID = "783136f9-2b12-4ee3-8a40-5eee38a7cccd"
PROGRAM = 0x20008086
Answer = Callable[[int, int, bytes], bytes | None]
"""Procedure, serial and arguments of a call to the bytes of the answer; None: the connection ends."""


def reply(procedure: int, serial: int, body: bytes = b"", *, status: int = 0) -> bytes:
    head = struct.pack(">IIiiII", PROGRAM, 1, procedure, 1, serial, status)
    return struct.pack(">I", 4 + len(head) + len(body)) + head + body


def refusal(code: int, text: str) -> bytes:
    data = text.encode()
    return struct.pack(">iiII", code, 10, 1, len(data)) + data + bytes(-len(data) % 4)


def good(procedure: int, serial: int, arguments: bytes) -> bytes | None:
    """A daemon with one domain that is paused by a user."""
    match procedure:
        case 66:
            return reply(procedure, serial, struct.pack(">Ii", 1, 0))
        case 24:
            body = (
                struct.pack(">I", 5)
                + b"web-1\0\0\0"
                + bytes.fromhex(UUID.replace("-", ""))
                + struct.pack(">i", 7)
            )
            return reply(procedure, serial, body)
        case 212:
            return reply(procedure, serial, struct.pack(">ii", 3, 1))
        case 298:
            return reply(procedure, serial, struct.pack(">iI", 0, 0))
        case _:
            return reply(procedure, serial)


def with_job(operation: int) -> Answer:
    """As ``good``, while something is done with the domain (virDomainJobOperation)."""

    def answer(procedure: int, serial: int, arguments: bytes) -> bytes | None:
        if procedure != 298:
            return good(procedure, serial, arguments)
        elapsed = struct.pack(">I", 12) + b"time_elapsed" + struct.pack(">iQ", 4, 1234)
        name = struct.pack(">I", 9) + b"operation\0\0\0" + struct.pack(">ii", 1, operation)
        return reply(procedure, serial, struct.pack(">iI", 2, 2) + elapsed + name)

    return answer


class _Peer:
    """What listens at a socket in a thread, until it is closed."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(self.path)
        self._listener.listen()
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self._accepted(connection)

    def _accepted(self, connection: socket.socket) -> None:
        """One client after the other."""
        with suppress(OSError), connection:
            self._talk(connection)

    def _talk(self, connection: socket.socket) -> None:
        raise NotImplementedError

    def close(self) -> None:
        self._listener.close()


class Daemon(_Peer):
    """Answers as a test says, all clients side by side, and all calls of a client, as libvirt's workers do."""

    def __init__(self, path: Path) -> None:
        self.answer: Answer = good
        self.called: list[int] = []
        super().__init__(path)

    def _accepted(self, connection: socket.socket) -> None:
        threading.Thread(target=super()._accepted, args=(connection,), daemon=True).start()

    def _talk(self, connection: socket.socket) -> None:
        sending = threading.Lock()
        while head := connection.recv(4, socket.MSG_WAITALL):
            data = connection.recv(struct.unpack(">I", head)[0] - 4, socket.MSG_WAITALL)
            threading.Thread(target=self._carry_out, args=(connection, sending, data), daemon=True).start()

    def _carry_out(self, connection: socket.socket, sending: threading.Lock, data: bytes) -> None:
        _, _, procedure, _, serial, _ = struct.unpack_from(">IIiiII", data)
        self.called.append(procedure)
        answer = self.answer(procedure, serial, data[24:])
        with suppress(OSError), sending:  # the client may have left
            if answer is None:
                connection.shutdown(socket.SHUT_RDWR)
            else:
                connection.sendall(answer)


class QmpSocket(_Peer):
    """A QEMU whose guest is in a state, as its QMP socket tells; ``cont`` resumes one that is paused."""

    def __init__(self, path: Path, status: str = "paused") -> None:
        self.status = status
        super().__init__(path)

    def _talk(self, connection: socket.socket) -> None:
        connection.sendall(b'{"QMP": {"version": {}, "capabilities": []}}\n')
        for line in connection.makefile():
            request = json.loads(line)
            answer = {}
            if request["execute"] == "query-status":
                answer = {"status": self.status}
            elif request["execute"] == "cont" and self.status == "paused":
                self.status = "running"
            said = {"return": answer} | ({"id": request["id"]} if "id" in request else {})
            connection.sendall(json.dumps(said).encode() + b"\n")
