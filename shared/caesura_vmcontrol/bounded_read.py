"""Reading many small files that may hang, each for a bounded time: ``/proc/PID/environ`` of processes that are stuck.

The kernel takes the process's ``mmap_lock`` for ``environ`` and ``cmdline`` (proc(5); ``access_remote_vm``), and a
process that waits for a dead disk or a network file system may hold it indefinitely.
"""

# light imports on purpose: no pathlib here.
# ruff: noqa: PTH123

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from queue import Empty, SimpleQueue

_PATIENCE_S = 0.5  # s: a read takes microseconds


_hanging: set[str] = set()
"""The paths whose read was given up and has not returned: each keeps exactly one thread and one descriptor."""
_lock = threading.Lock()


def read_each(paths: Iterable[str], patience_s: float = _PATIENCE_S) -> Iterator[tuple[str, bytes | None]]:
    """Yields each path with its bytes; None: no answer within ``patience_s`` seconds. Unreadable paths are left out.

    A path whose last read still hangs is not read again; it is None at once.
    """
    reader: _Reader | None = None
    for path in paths:
        with _lock:
            hangs = path in _hanging
        if hangs:
            yield path, None
            continue
        if reader is None:
            reader = _Reader()
        reader.wanted.put(path)
        try:
            data = reader.found.get(timeout=patience_s)
        except Empty:
            if reader.give_up(path):
                reader = None  # that thread stays in its read; another one reads the rest
                yield path, None
                continue
            data = reader.found.get()
        if data is not None:
            yield path, data
    if reader is not None:
        reader.wanted.put("")


class _Reader:
    """A thread that reads one file after the other, until one of them hangs."""

    def __init__(self) -> None:
        self.wanted: SimpleQueue[str] = SimpleQueue()
        self.found: SimpleQueue[bytes | None] = SimpleQueue()
        self._is_given_up = False
        threading.Thread(target=self._serve, name="bounded read", daemon=True).start()

    def _serve(self) -> None:
        while path := self.wanted.get():
            try:
                with open(path, "rb") as file:
                    data: bytes | None = file.read()
            except OSError:
                data = None
            with _lock:
                if self._is_given_up:
                    _hanging.discard(path)
                    return
                self.found.put(data)

    def give_up(self, path: str) -> bool:
        """Whether no caller waits for it from now on; false: its answer has arrived."""
        with _lock:
            if not self.found.empty():
                return False
            self._is_given_up = True
            _hanging.add(path)
            return True


def environs(pids: Iterable[int]) -> Iterator[tuple[int, frozenset[bytes]]]:
    """The processes among ``pids`` whose environment can be read, with its ``NAME=value`` entries."""
    for path, data in read_each(f"/proc/{pid}/environ" for pid in pids):
        if data is not None:
            yield int(path.split("/")[2]), frozenset(data.split(b"\0"))
