"""Reading many small files that may hang, each for a bounded time: ``/proc/PID/environ`` of processes that are stuck.

The kernel takes the process's ``mmap_lock`` for ``environ`` and ``cmdline`` (proc(5); ``access_remote_vm``), and a
process that waits for a dead disk or a network file system may hold it for good.
"""

# light imports on purpose: no pathlib here.
# ruff: noqa: PTH123

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from queue import Empty, SimpleQueue

_PATIENCE_S = 0.5  # s: a read takes microseconds


def read_each(paths: Iterable[str], patience_s: float = _PATIENCE_S) -> Iterator[tuple[str, bytes | None]]:
    """Each path with its bytes; None: it does not answer within ``patience_s`` seconds. What cannot be read is left out."""
    wanted: SimpleQueue[str] | None = None
    found: SimpleQueue[bytes | None] = SimpleQueue()
    for path in paths:
        if wanted is None:
            wanted, found = SimpleQueue(), SimpleQueue()
            threading.Thread(target=_serve, args=(wanted, found), name="bounded read", daemon=True).start()
        wanted.put(path)
        try:
            data = found.get(timeout=patience_s)
        except Empty:
            wanted = None  # that thread stays in its read; another one reads the rest
            yield path, None
            continue
        if data is not None:
            yield path, data
    if wanted is not None:
        wanted.put("")


def _serve(wanted: SimpleQueue[str], found: SimpleQueue[bytes | None]) -> None:
    while path := wanted.get():
        try:
            with open(path, "rb") as file:
                data = file.read()
        except OSError:
            found.put(None)
        else:
            found.put(data)


def environs(pids: Iterable[int]) -> Iterator[tuple[int, frozenset[bytes]]]:
    """The processes among ``pids`` whose environment can be read, with its ``NAME=value`` entries."""
    for path, data in read_each(f"/proc/{pid}/environ" for pid in pids):
        if data is not None:
            yield int(path.split("/")[2]), frozenset(data.split(b"\0"))
