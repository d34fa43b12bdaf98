"""What the kernel reports about processes: read from ``/proc``, never assumed. Standard library only.

Source: proc(5), ``/proc/[pid]/stat``. A process is named by pid *and* start time (field 22, clock ticks
since boot), since a pid alone may have been reused by another process.
"""

# light imports on purpose: no pathlib here.
# ruff: noqa: PTH123, PTH208

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass

STOPPED = "T"  # stopped by a signal; "t" is a tracer's business, not ours
DEAD = frozenset("ZXx")
_EXITING = 0x4  # PF_EXITING of include/linux/sched.h


@dataclass(frozen=True, slots=True)
class Process:
    """One line of the process table. ``start_ticks``: clock ticks between boot and its start.

    ``exiting``: its first thread executes no more of its program, though the kernel may still be releasing its resources.
    """

    pid: int
    ppid: int
    session: int
    state: str
    start_ticks: int
    exiting: bool = False


def read_process(pid: int) -> Process | None:
    """The process with this pid, or None if there is none, or it cannot be inspected."""
    try:
        return _read(pid)
    except OSError:
        return None


def _read(pid: int) -> Process | None:
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            raw = file.read().decode(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The command name may contain anything, parentheses too: the last one ends it.
    fields = raw[raw.rindex(")") + 2 :].split()
    exiting = bool(int(fields[6]) & _EXITING)
    return Process(pid, int(fields[1]), int(fields[3]), fields[0], int(fields[19]), exiting)


def process_table() -> dict[int, Process]:
    """All processes by pid. Some may have ended by the time the result is used."""
    found = (read_process(int(name)) for name in os.listdir("/proc") if name.isdigit())
    return {process.pid: process for process in found if process is not None}


def alive(pid: int, start_ticks: int) -> bool:
    """Whether exactly this process still runs; a zombie does not. One that cannot be inspected counts as alive."""
    try:
        process = _read(pid)
    except OSError:  # no free descriptor: a caller that takes it for dead gives up its guest
        return True
    return process is not None and process.start_ticks == start_ticks and process.state not in DEAD


def ending(pid: int, start_ticks: int) -> bool:
    """Whether this process has ended, or is about to: its peers see their connections close a moment before it is dead.

    Not for callers that need the resources it held: they may still be in use.
    """
    try:
        process = _read(pid)
    except OSError:
        return False
    return process is None or process.start_ticks != start_ticks or process.exiting or process.state in DEAD


def thread_states(pid: int) -> Iterator[str]:
    """The state letter of every thread: the first thread may be dead while others run."""
    try:
        threads = os.listdir(f"/proc/{pid}/task")
    except OSError:
        return
    for thread in threads:
        try:
            with open(f"/proc/{pid}/task/{thread}/stat", "rb") as file:
                raw = file.read()
        except OSError:
            continue
        yield chr(raw[raw.rindex(b")") + 2])


def send_signal(pid: int, start_ticks: int, number: signal.Signals) -> bool:
    """Signal exactly this process; false if it is gone. A pidfd closes the race with a recycled pid."""
    try:
        handle = os.pidfd_open(pid)
    except OSError:
        return False
    try:
        if not alive(pid, start_ticks):
            return False
        signal.pidfd_send_signal(handle, number)
    except ProcessLookupError:
        return False
    finally:
        os.close(handle)
    return True


BOOT_ID = "/proc/sys/kernel/random/boot_id"
"""Where the kernel says the id of this boot; tests play another boot."""


def boot_id() -> str:
    """The kernel's id of this boot: CLOCK_MONOTONIC values of another boot mean nothing."""
    with open(BOOT_ID, encoding="ascii") as file:
        return file.read().strip()
