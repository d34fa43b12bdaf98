"""Operations on QEMU processes from outside: kill, stop, continue, find by mark, start."""

# light imports on purpose: no pathlib here.
# ruff: noqa: PTH123, PTH208

from __future__ import annotations

import os
import select
import signal
import subprocess
import time
from contextlib import suppress
from typing import Any, NamedTuple

from caesura_vmcontrol.bounded_calls import CallTimeout, within
from caesura_vmcontrol.bounded_read import environs
from caesura_vmcontrol.procfs import (
    DEAD,
    STOPPED,
    Process,
    alive,
    read_process,
    send_signal,
    thread_states,
)

QEMU_MARK = "CAESURA_QEMU"
"""The variable in the environment of every QEMU that a host updater starts; its value says whose VM it is."""
_HOLD_S = 0.1  # s: a stop signal takes effect when the kernel next schedules the thread
_STEP_S = 0.001
LOG_S = 0.1  # s: to open or read a log; some microseconds are usual
_TO_LOG = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
_LOWEST = 1  # of the real-time priorities: enough to run before everything ordinary


class KillTimeout(OSError):
    """A process that was killed is not dead yet."""


def kill_and_wait(pid: int, start_ticks: int, until: float) -> None:
    """SIGKILL it, wait until it is dead, and reap it if it is our child; one that is gone already is not an error.

    Raises:
        KillTimeout: not dead by ``until`` (CLOCK_MONOTONIC).
    """
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        if not alive(pid, start_ticks):
            _reap(pid, start_ticks)
            return
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(handle, signal.SIGKILL)
        poll = select.poll()
        poll.register(handle, select.POLLIN)
        while not poll.poll(max(until - time.monotonic(), 0) * 1000):
            if time.monotonic() >= until:
                raise KillTimeout(f"process {pid} was killed and is not dead yet")
        _reap(pid, start_ticks)
    finally:
        os.close(handle)


def _reap(pid: int, start_ticks: int) -> None:
    """Reap it if it is a dead child of this process: a caller that starts a process per try must not leave a zombie per try."""
    process = read_process(pid)
    if process is not None and process.start_ticks == start_ticks and process.state in DEAD:
        with suppress(ChildProcessError):
            os.waitpid(pid, os.WNOHANG)


def is_held(pid: int) -> bool:
    """Whether one of its threads is stopped by a signal."""
    return STOPPED in set(thread_states(pid))


def sigstop(pid: int, start_ticks: int, patience_s: float = _HOLD_S) -> None:
    """SIGSTOP it and wait until every thread is stopped, for ``patience_s``; a process that is gone is not an error."""
    until = time.monotonic() + patience_s
    if send_signal(pid, start_ticks, signal.SIGSTOP):
        while set(thread_states(pid)) - DEAD - {STOPPED, "t"} and time.monotonic() < until:
            time.sleep(_STEP_S)


def sigcont(pid: int, start_ticks: int) -> None:
    """SIGCONT it if it is stopped."""
    if is_held(pid):
        send_signal(pid, start_ticks, signal.SIGCONT)


def find_by_env(mark: str) -> list[Process]:
    """The living processes with ``NAME=value`` in the environment they were started with, except our own."""
    pids = [int(name) for name in os.listdir("/proc") if name.isdigit() and int(name) != os.getpid()]
    having = [pid for pid, entries in environs(pids) if mark.encode() in entries]
    found = [process for pid in having if (process := read_process(pid)) is not None]
    return [process for process in found if process.state not in DEAD]


# vfork(2), and posix_spawn(3) by it, suspend the caller until the program was executed, with Python's lock held: a
# program on a file system that does not answer would keep the guard from every other VM.
subprocess._USE_VFORK = False  # type: ignore[misc]  # noqa: SLF001


class ProgramUser(NamedTuple):
    """As which a program runs that root starts."""

    uid: int
    gid: int
    groups: tuple[int, ...] = ()


def start(
    argv: tuple[str, ...], environ: tuple[tuple[str, str], ...], log: str, user: ProgramUser | None = None
) -> Process:
    """Start a program that outlives us: a session of its own, no input, output appended to ``log``.

    The guard's own privileges (nearly unkillable, first in the queue for a CPU) are not inherited. Where the log's disk does
    not answer, the program's output is lost: a guest may be paused until this program runs. ``user``: only root can choose; None: as we
    run.

    Raises:
        OSError: it cannot be started.
    """
    try:
        # A log that opens too late is closed there, and is not opened again before: a start may be retried for hours.
        output = within(LOG_S, lambda: os.open(log, _TO_LOG, 0o600), key=log, discard=os.close)
    except CallTimeout:
        output = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
    choice: dict[str, Any] = {}
    if user is not None and os.geteuid() == 0:
        choice = {"user": user.uid, "group": user.gid, "extra_groups": list(user.groups)}
        with suppress(OSError):
            os.fchown(output, user.uid, user.gid)
    try:
        child = subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=dict(environ),
            start_new_session=True,
            **choice,
        )
    finally:
        os.close(output)
    child.returncode = 0  # `reap` collects its exit, not this object
    pid = child.pid
    with suppress(OSError):
        if os.getpriority(os.PRIO_PROCESS, 0) < 0:
            os.setpriority(os.PRIO_PROCESS, pid, 0)
    with suppress(OSError), open("/proc/self/oom_score_adj", encoding="ascii") as mine:
        if int(mine.read()) < 0:
            with open(f"/proc/{pid}/oom_score_adj", "w", encoding="ascii") as its:
                its.write("0")
    process = read_process(pid)
    if process is None:
        raise OSError(f"{argv[0]} ended at once")
    return process


def boost_priority(pid: int) -> None:
    """Its main thread, and every thread that it starts, runs before everything ordinary (sched(7)), where permitted."""
    with suppress(OSError):  # not allowed to, or gone
        os.sched_setscheduler(pid, os.SCHED_RR, os.sched_param(_LOWEST))


def restore_priority(pid: int) -> None:
    """No thread of the process keeps the raised priority; threads that were started in the meantime had inherited it."""
    with suppress(OSError):
        for name in os.listdir(f"/proc/{pid}/task"):
            with suppress(OSError):
                thread = int(name)
                hurries = os.sched_getscheduler(thread) == os.SCHED_RR
                if hurries and os.sched_getparam(thread).sched_priority == _LOWEST:
                    os.sched_setscheduler(thread, os.SCHED_OTHER, os.sched_param(0))


def reap() -> None:
    """Reap our children that ended, so that they do not stay as zombies."""
    with suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
