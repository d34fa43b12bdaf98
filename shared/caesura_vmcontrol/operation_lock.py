"""One ``resume_guest`` of an operation at a time, as far as possible: for smoothness, never for safety.

A process that does not get its turn in time continues without it: the claims keep it safe. The turn of a process that
ends is released by the kernel (flock(2)); that of a process that was stopped while it held it is passed over.
"""

# light imports on purpose: no pathlib here.
# ruff: noqa: PTH123

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from caesura_vmcontrol.procfs import DEAD, STOPPED, thread_states

_STEP_S = 0.002
_PASSED_OVER = 3  # how many stopped processes


@contextmanager
def try_lock(folder: str, wait_s: float) -> Iterator[bool]:
    """Wait up to ``wait_s`` seconds for the turn; whether we have it."""
    until = time.monotonic() + wait_s
    handles: list[int] = []
    try:
        yield _take(folder, handles, until)
    finally:
        for handle in handles:
            os.close(handle)


def _take(folder: str, handles: list[int], until: float) -> bool:
    """The folder's own lock needs no space on the disk; behind it, one file for each that is passed over."""
    for level in range(_PASSED_OVER + 1):
        try:
            if level == 0:
                handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            else:
                handle = os.open(f"{folder}/turn-{level}", os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError:
            return False  # the operation is over, or the disk is full
        handles.append(handle)
        while True:
            with suppress(BlockingIOError):
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return True
            if _holder_is_stopped(handle):
                break
            if time.monotonic() >= until:
                return False
            time.sleep(_STEP_S)
    return False


def _holder_is_stopped(handle: int) -> bool:
    """Whether a signal stopped the process that holds the lock (proc(5), ``/proc/locks``)."""
    inode = str(os.fstat(handle).st_ino)
    with suppress(OSError, ValueError, IndexError), open("/proc/locks", encoding="ascii") as locks:
        for line in locks:
            words = line.split()  # 1: FLOCK ADVISORY WRITE 4711 00:2f:815 0 EOF; waiting ones have an arrow
            if words[1] == "FLOCK" and words[5].rpartition(":")[2] == inode:
                states = set(thread_states(int(words[4]))) - DEAD
                return states == {STOPPED}
    return False
