"""Processes that outlive us: started in a session of their own, watched and reaped through a pidfd.

``asyncio`` kills its subprocesses when its loop closes, which is the one thing that must not happen to a VM
or to the pause guard. Shared by the process driver and the guardian.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from caesura.runtime.errors import CaesuraError


class SpawnError(CaesuraError):
    """A program could not be started."""


def spawn_detached(argv: Sequence[str], environ: Mapping[str, str], log_file: Path) -> int:
    """Start ``argv`` in a new session, stdin from /dev/null, output appended to ``log_file``. Returns the pid.

    No descriptor of ours is inherited (Python's are close-on-exec).

    Raises:
        SpawnError: the program cannot be started, or the log file cannot be opened.
    """
    append = os.O_WRONLY | os.O_CREAT | os.O_APPEND
    try:
        return os.posix_spawn(
            argv[0],
            list(argv),
            dict(environ),
            file_actions=[
                (os.POSIX_SPAWN_OPEN, 0, "/dev/null", os.O_RDONLY, 0),
                (os.POSIX_SPAWN_OPEN, 1, str(log_file), append, 0o600),
                (os.POSIX_SPAWN_DUP2, 1, 2),
            ],
            setsid=True,
            setsigmask=[],
        )
    except OSError as error:
        raise SpawnError(f"cannot start {argv[0]}: {error.strerror or error}") from error


def reap(pid: int) -> None:
    """Collect a child that ended; one that was adopted is not ours to collect, init does."""
    with suppress(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)


class ExitWatch:
    """Calls back once when a process has ended, whether it is our child or not. Children are reaped.

    Args:
        reap: false where somebody else wants the exit code.
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
