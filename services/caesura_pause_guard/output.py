"""The guard's log: writing a line never blocks, whatever standard error is connected to.

It may be a pipe without a reader, a file on a disk that hangs, a terminal that somebody stopped. A thread writes, so
nothing needs to be known about it, and no flag of a descriptor that other processes share is changed.
"""

from __future__ import annotations

import json
import os
import threading
import time
from contextlib import suppress

_QUEUED = 500  # lines: each failure is logged once, so this is ample
_FLUSH_S = 0.2  # s: at the end of the process


class Output:
    """JSON lines to a file descriptor, from a thread of its own; what does not fit is dropped and counted.

    Args:
        descriptor: where the lines go.
        room: how many lines may wait.
    """

    def __init__(self, descriptor: int = 2, *, room: int = _QUEUED) -> None:
        self._descriptor = descriptor
        self._room = room
        self._lines: list[bytes] = []
        self._turn = threading.Condition()
        self._thread: threading.Thread | None = None
        self._dropped = 0
        self._writing = False

    def log(self, event: str, **facts: object) -> None:
        """One line. Never fails and never waits."""
        line = _line(event, facts)
        with self._turn:
            if len(self._lines) >= self._room or not self._started():
                self._dropped += 1
                return
            self._lines.append(line)
            self._turn.notify_all()

    def flush(self, timeout_s: float = _FLUSH_S) -> None:
        """Wait until everything is written, for ``timeout_s`` seconds at most."""
        with self._turn:
            self._turn.wait_for(lambda: not self._lines and not self._writing, timeout_s)

    def _started(self) -> bool:
        if self._thread is None:
            thread = threading.Thread(target=self._work, name="log", daemon=True)
            try:
                thread.start()
            except RuntimeError:  # the host cannot start a thread
                return False
            self._thread = thread
        return True

    def _work(self) -> None:
        while True:
            with self._turn:
                self._writing = False
                self._turn.notify_all()
                self._turn.wait_for(lambda: bool(self._lines))
                lines, self._lines = self._lines, []
                dropped, self._dropped = self._dropped, 0
                self._writing = True
            if dropped:
                lines.append(_line("guard.log_dropped", {"lines": dropped}))
            with suppress(OSError):  # there is no reader left
                for line in lines:
                    left = line
                    while left:
                        left = left[os.write(self._descriptor, left) :]


def _line(event: str, facts: dict[str, object]) -> bytes:
    stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    entry = {"timestamp": stamp, "service": "pause-guard", "event": event, **facts}
    return json.dumps(entry, default=str).encode() + b"\n"
