"""The resources that the demo takes from this machine and releases: folders, RAM, ports; and its signals."""

from __future__ import annotations

import asyncio
import errno
import os
import shutil
import signal
import socket
import tempfile
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from caesura.runtime.cleanup import shielded
from caesura.runtime.errors import CaesuraError

FIRST_PORT = 18100


class Interrupted(CaesuraError):
    """Ctrl-C, or another signal to stop."""

    exit_code = 130


class FolderRefused(CaesuraError):
    """The folder of ``--dir`` cannot be used."""

    exit_code = 2


_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})


@contextmanager
def run_folder(wanted: Path | None) -> Iterator[Path]:
    """A short path (unix sockets allow some 100 characters), private, removed afterwards unless it was requested.

    Raises:
        FolderRefused: the requested folder exists already, or cannot be created.
        CaesuraError: for an ``OSError`` in the block, with what to do about it.
    """
    try:
        folder = _new_folder(wanted)
    except OSError as error:
        raise _unusable(error, Path(_base() or tempfile.gettempdir())) from error
    kept = wanted is not None
    try:
        yield folder
    except CaesuraError as error:
        if wanted is None and not isinstance(error, Interrupted) and _used(folder):
            kept = True
            # The same error object, with more text: not every error class can be built from a text.
            error.args = (f"{error}\nlogs are kept in {folder}",)
        raise
    except OSError as error:
        raise _unusable(error, folder) from error
    finally:
        if not kept or not _used(folder):
            shutil.rmtree(folder, ignore_errors=True)


def _used(folder: Path) -> bool:
    """Whether there are logs to read: on a full disk the files may be empty."""
    with suppress(OSError):
        return any(each.is_file() and each.stat().st_size for each in folder.iterdir())
    return False


def _new_folder(wanted: Path | None) -> Path:
    if wanted is None:
        return Path(tempfile.mkdtemp(prefix="caesura-demo-", dir=_base()))
    try:
        wanted.mkdir(parents=True, exist_ok=False, mode=0o700)
    except FileExistsError as error:
        raise FolderRefused(f"--dir: {wanted} exists already: name a new folder") from error
    except OSError as error:
        raise FolderRefused(f"--dir: {wanted} cannot be created: {error.strerror or error}") from error
    return wanted.resolve()


def _unusable(error: OSError, folder: Path) -> CaesuraError:
    what = error.strerror or str(error)
    if error.errno in _FULL:
        place = error.filename or folder
        return CaesuraError(f"{place}: {what}: make room there, or name a folder elsewhere with --dir")
    where = f" ({error.filename})" if error.filename else ""
    return CaesuraError(
        f"the demo cannot continue: {what}{where}: check whether this user may write to {folder} and start processes, "
        "or name a folder elsewhere with --dir"
    )


def _base() -> str | None:
    return "/tmp" if os.access("/tmp", os.W_OK) else None  # noqa: S108 - mkdtemp makes it private


@contextmanager
def ram_folder(*, needed: bool) -> Iterator[str]:
    """A folder on a tmpfs for the guests' RAM, removed afterwards."""
    if not needed:
        yield ""
        return
    try:
        folder = tempfile.mkdtemp(prefix="caesura-demo-", dir="/dev/shm")
    except OSError as error:
        raise CaesuraError(f"guest RAM needs a folder in /dev/shm: {error}") from error
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def free_ports(count: int, start: int = FIRST_PORT) -> Iterator[int]:
    """Free TCP ports on loopback, from ``start`` on."""
    port = start
    while count:
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                port += 1
                continue
        yield port
        port += 1
        count -= 1


class CleanUp:
    """The signal handling of a run: no signal interrupts its clean-up.

    The first signal cancels the run, which then cleans up. One that arrives during the clean-up, after a signal or
    at the normal end, is acknowledged; the next one sets ``hurry``: the remaining processes are killed at once, and still nothing is
    left behind.

    Args:
        say: notifies the person who pressed Ctrl-C; must not fail.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self.hurry = asyncio.Event()
        self._say = say
        self._body: asyncio.Future[int] | None = None
        self._cancelled = False
        self._acknowledged = False
        self._under_way = 0

    async def run(self, body: Callable[[], Awaitable[int]]) -> int:
        """Run ``body`` until it ends, or until the first signal.

        Raises:
            Interrupted: when a signal ended it.
        """
        loop = asyncio.get_running_loop()
        self._body = asyncio.ensure_future(body())
        signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        for number in signals:
            loop.add_signal_handler(number, self._on_signal)
        try:
            return await self._body
        except asyncio.CancelledError:
            raise Interrupted("interrupted; everything was stopped, and nothing stays paused") from None
        finally:
            for number in signals:
                loop.remove_signal_handler(number)

    async def step(self, work: Coroutine[Any, Any, None]) -> None:
        """One step of the clean-up, run to its end."""
        self._under_way += 1
        try:
            await shielded(work)
        finally:
            self._under_way -= 1

    def _on_signal(self) -> None:
        if self._acknowledged:
            if not self.hurry.is_set():
                self._say("killing everything at once")
            self.hurry.set()
        elif self._cancelled or self._under_way:
            self._acknowledged = True
            self._say("already cleaning up; press again to kill everything at once")
        elif self._body is not None:
            self._cancelled = True
            self._body.cancel()
