"""Processes that outlive us: started in a session of their own, watched and reaped through a pidfd.

``asyncio`` kills its subprocesses when its loop closes, which is the one thing that must not happen to a VM
or to the pause guard. Shared by the process driver and the guard client.
"""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from caesura.runtime.errors import CaesuraError
from caesura.runtime.threads import in_thread
from caesura_vmcontrol import process_control


class SpawnError(CaesuraError):
    """A program could not be started."""


_UNWANTED_S = 1.0  # s: to end a process whose start was cancelled; some milliseconds are usual

_finalizer: set[asyncio.Task[None]] = set()


def spawn_detached(argv: Sequence[str], environ: Mapping[str, str], log_file: Path) -> int:
    """Start ``argv`` in a new session, stdin from /dev/null, output appended to ``log_file``. Returns the pid.

    It inherits nothing from us: no descriptor, no priority. Blocking, for as long as the file systems of program and log
    file take: in the event loop use ``start_detached``.

    Raises:
        SpawnError: the program cannot be started, or the log file cannot be opened.
    """
    try:
        return process_control.start(tuple(argv), tuple(environ.items()), str(log_file)).pid
    except OSError as error:
        raise SpawnError(f"cannot start {argv[0]}: {error.strerror or error}") from error


async def start_detached(argv: Sequence[str], environ: Mapping[str, str], log_file: Path) -> int:
    """``spawn_detached`` in a thread. If cancelled, it ends what was started nevertheless, and waits for that end.

    Raises:
        SpawnError: as ``spawn_detached``.
    """
    unwanted = threading.Event()

    def spawn() -> int:
        pid = spawn_detached(argv, environ, log_file)
        if unwanted.is_set():
            _end(pid)
            return 0
        return pid

    starting = asyncio.ensure_future(in_thread(f"start {argv[0]}", spawn))
    try:
        return await asyncio.shield(starting)
    except asyncio.CancelledError:
        unwanted.set()
        ending = asyncio.create_task(_end_unwanted(starting))
        _finalizer.add(ending)
        ending.add_done_callback(_finalizer.discard)
        # The caller that cancelled removes files next that a living process would make again. Not indefinitely: the program
        # may be on a file system that does not answer, and is ended when it does.
        await asyncio.wait({ending}, timeout=_UNWANTED_S)
        raise


async def _end_unwanted(starting: asyncio.Future[int]) -> None:
    """The start was cancelled: its thread ends the process, unless it was ended just before."""
    with suppress(SpawnError):
        if pid := await starting:
            await in_thread(f"end {pid}", lambda: _end(pid))


def _end(pid: int) -> None:
    """Kill a child and wait for its end. Blocking."""
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    reap(pid, wait=True)


def reap(pid: int, *, wait: bool = False) -> None:
    """Reap a child that ended; one that was adopted is not ours to reap, init does."""
    with suppress(ChildProcessError):
        os.waitpid(pid, 0 if wait else os.WNOHANG)


async def words_of_end(pid: int, within_s: float) -> str:
    """How a child ended, such as ``it was ended by SIGSEGV``; the child stays to be reaped. Empty: it has not ended by then, or is not a child.

    Args:
        within_s: seconds to wait for an end.
    """
    ended = asyncio.Event()
    try:
        watch = ExitWatch(pid, ended.set, reap=False)
    except ProcessLookupError:
        return ""
    try:
        async with asyncio.timeout(within_s):
            await ended.wait()
        found = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)  # noqa: ASYNC222 - WNOHANG
    except (TimeoutError, ChildProcessError):
        return ""
    finally:
        watch.close()
    if found is None:
        return ""
    if found.si_code == os.CLD_EXITED:
        return f"it ended with code {found.si_status}"
    return f"it was ended by {signal.Signals(found.si_status).name}"


class ExitWatch:
    """Calls back once when a process has ended, whether it is our child or not. Children are reaped.

    Args:
        reap: false where another caller needs the exit code.
        pid: a process that exists; make sure by its start time that it is the right one *after* this.
        ended: called in the event loop.

    Raises:
        ProcessLookupError: it is gone already.
    """

    def __init__(self, pid: int, ended: Callable[[], None], *, reap: bool = True) -> None:
        self.pid = pid
        self._reap = reap
        self._ended = ended
        self._handle: int | None = os.pidfd_open(pid)
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._handle, self._on_exit)

    def _on_exit(self) -> None:
        self.close()
        if self._reap:
            reap(self.pid)
        self._ended()

    @property
    def watching(self) -> bool:
        """Whether the process has not ended yet."""
        return self._handle is not None

    def close(self) -> None:
        """Stop watching."""
        if self._handle is not None:
            self._loop.remove_reader(self._handle)
            os.close(self._handle)
            self._handle = None
