"""Keeps one TCP connection, sends a counter every 20 ms and reads what the other side echoes.

``caesura.tcp=HOST:PORT``, ``caesura.tcp_ms`` (20). Port ``org.caesura.tcp.0``: ``status``.
"""

from __future__ import annotations

import socket
import time

from .parameters import Parameters
from .ports import RequestPort

PORT = "org.caesura.tcp.0"


class Line:
    """The connection and its history."""

    def __init__(self, address: tuple[str, int]) -> None:
        self._address = address
        self._socket: socket.socket | None = None
        self._rest = b""
        self.sent = self.echoed = self.connects = self.wrong = 0
        self.last_error = ""
        self.longest_gap_s = 0.0
        self._received_at = 0.0

    def tick(self) -> None:
        """Send the next counter, read the echoes."""
        try:
            if self._socket is None:
                self._connect()
            connection = self._socket
            assert connection is not None  # noqa: S101 - _connect raises otherwise
            connection.sendall(b"%d\n" % (self.sent + 1))
            self.sent += 1
            self._take_in(connection)
        except OSError as error:
            self.last_error = str(error).replace('"', "'")
            if self._socket is not None:
                self._socket.close()
            self._socket = None

    def _connect(self) -> None:
        fresh = socket.create_connection(self._address, timeout=5)
        # With a timeout, every `recv` would wait that long, and a slow host would lose the connection.
        fresh.settimeout(None)
        fresh.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket, self._rest = fresh, b""
        self.connects += 1
        self.sent = self.echoed = 0
        self._received_at = time.monotonic()

    def _take_in(self, connection: socket.socket) -> None:
        try:
            data = connection.recv(65536, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return
        if not data:
            raise ConnectionResetError("the other side closed")
        now = time.monotonic()
        self.longest_gap_s = max(self.longest_gap_s, now - self._received_at)
        self._received_at = now
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            self.echoed += 1
            self.wrong += line != b"%d" % self.echoed

    def status(self) -> bytes:
        """One JSON line; counters are those of the current connection, the longest gap is that of all."""
        return (
            b'{"connected":%s,"connects":%d,"sent":%d,"echoed":%d,"wrong":%d,"longest_gap_s":%.4f,"last_error":"%s"}'
            % (
                b"true" if self._socket is not None else b"false",
                *(self.connects, self.sent, self.echoed, self.wrong),
                *(self.longest_gap_s, self.last_error.encode()),
            )
        )


def run(parameters: Parameters) -> None:
    """Send and answer requests indefinitely."""
    host, _, port = parameters["tcp"].rpartition(":")
    line = Line((host, int(port)))
    interval_s = float(parameters.get("tcp_ms", "20")) / 1000
    requests = RequestPort(PORT, {b"status": line.status})
    due = time.monotonic()
    while True:
        line.tick()
        due = max(due + interval_s, time.monotonic())
        requests.serve_until(due)
