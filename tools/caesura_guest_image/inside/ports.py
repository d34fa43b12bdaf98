"""Virtio-serial ports by name, and answering requests that arrive on one. There is no udev in the guest."""

from __future__ import annotations

import os
import select
import time
from collections.abc import Callable, Mapping

_CLASS = "/sys/class/virtio-ports"
_FIND_S = 10.0
_HANG_UP_S = 0.02
"""s: while nobody is connected on the host's side, poll() returns at once with POLLHUP: try again after this."""


def find_port(name: str) -> str:
    """The device of a port, with a short wait: ports appear some time after their driver.

    Raises:
        LookupError: the VM has no such port.
    """
    end = time.monotonic() + _FIND_S
    while True:
        for each in os.listdir(_CLASS) if os.path.isdir(_CLASS) else ():  # noqa: PTH112, PTH208 - start-up time
            try:
                with open(f"{_CLASS}/{each}/name", encoding="ascii") as file:  # noqa: PTH123
                    if file.read().strip() == name:
                        return f"/dev/{each}"
            except OSError:
                continue  # being added just now
        if time.monotonic() > end:
            raise LookupError(f"this VM has no virtio-serial port {name}")
        time.sleep(0.05)


def open_port(name: str) -> int:
    """A non-blocking descriptor: a write that nobody reads is dropped instead of holding up the guest."""
    return os.open(find_port(name), os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)


def send(port: int, line: bytes) -> bool:
    """Write a whole line; False if nobody is connected or the other side does not read."""
    try:
        return os.write(port, line) == len(line)
    except (BlockingIOError, BrokenPipeError):
        return False


Answer = Callable[[], bytes]
"""Makes one JSON line, without the newline."""


class RequestPort:
    """Answers requests, one word per line, on a port of its own."""

    def __init__(self, name: str, answers: Mapping[bytes, Answer]) -> None:
        self._port = open_port(name)
        self._answers = answers
        self._poll = select.poll()
        self._poll.register(self._port, select.POLLIN)
        self._rest = b""

    def serve_until(self, until: float) -> None:
        """Answer requests until that instant of CLOCK_MONOTONIC; polls at least once."""
        while True:
            left = until - time.monotonic()
            events = self._poll.poll(max(0, left) * 1000)
            if events and not events[0][1] & select.POLLIN:
                self._rest = b""  # a partial request belongs to a closed connection
                if left <= 0:
                    return
                time.sleep(min(left, _HANG_UP_S))
            elif events:
                self._read()
            if time.monotonic() >= until:
                return

    def _read(self) -> None:
        try:
            data = os.read(self._port, 4096)
        except BlockingIOError:
            return
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            answer = self._answers.get(line.strip())
            self._say((answer() if answer else b'{"error":"no such request"}') + b"\n")

    def _say(self, line: bytes) -> None:
        # The host sent a request, so it reads; but a connection may move to another process in the meantime.
        end = time.monotonic() + 2.0
        while not send(self._port, line) and time.monotonic() < end:
            time.sleep(0.005)
