"""Reads ``updates.d`` in a thread of its own: a folder that does not answer delays nothing else.

The folder may be on a network file system whose server is away, where every call waits in the kernel. So it is
read on start, on SIGHUP and when a cheap check shows a change, never because a VM changed, and never in the event
loop or in a pool that a resume needs. While a read hangs, commands are judged by the catalogue of the last
read.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from caesura.contract.messages import RefusedUpdate
from caesura.runtime.logs import get_logger
from caesura_host_updater.inventory.updates import Catalogue, read_updates

_LOOK_S = 1.0  # s: between two checks for changes; each is one listing and one stat a file
_SILENT_S = 3.0  # s: a local folder answers within milliseconds, a busy network file system within a second

_log = get_logger("caesura.updates")

Fingerprint = tuple[object, ...]
"""Equal if nothing changed that a new read would show."""


class CatalogueReader:
    """See the module.

    Args:
        folder: ``updates.d``.
        changed: called in the event loop when the catalogue, or whether the folder answers, changed.
        read: reads the folder; injected by tests only, like the times in seconds.
    """

    def __init__(
        self,
        folder: str,
        changed: Callable[[], None],
        *,
        read: Callable[[str], Catalogue] = read_updates,
        look_s: float = _LOOK_S,
        silent_s: float = _SILENT_S,
    ) -> None:
        self._folder = folder
        self._changed = changed
        self._read = read
        self._look_s = look_s
        self._silent_s = silent_s
        self._catalogue = Catalogue()
        self._wanted = threading.Event()
        self._closed = False
        self._busy_since: float | None = None
        """The start of the thread's current work; None while it waits. Seconds on CLOCK_MONOTONIC."""
        self._loop: asyncio.AbstractEventLoop | None = None
        self._first = asyncio.Event()
        self._was_silent = False

    @property
    def catalogue(self) -> Catalogue:
        """What the last read found; with a refusal that names the folder while it does not answer."""
        if not self.health_error():
            return self._catalogue
        silent = RefusedUpdate(
            file=self._folder, reason="the folder does not answer; what was last read from it stays valid"
        )
        return Catalogue(self._catalogue.updates, (*self._catalogue.refused, silent))

    def health_error(self) -> str:
        """Empty text while the folder answers, else the problem; for the health probe."""
        since = self._busy_since
        if since is None or time.monotonic() - since < self._silent_s:
            return ""
        return f"{self._folder} does not answer: is it on a network file system whose server is away?"

    async def start(self, patience_s: float = _SILENT_S) -> None:
        """Start the thread and wait for the first read, for ``patience_s`` seconds at most."""
        self._loop = asyncio.get_running_loop()
        # A daemon: one that hangs in the kernel keeps neither the service from ending nor a pool from its work.
        threading.Thread(target=self._work, name="updates.d", daemon=True).start()
        with suppress(TimeoutError):
            async with asyncio.timeout(patience_s):
                await self._first.wait()

    def reread(self) -> None:
        """Read everything again, soon."""
        self._wanted.set()

    async def run(self) -> None:
        """Notice that the folder no longer answers, or answers again. Never ends."""
        while True:
            await asyncio.sleep(self._look_s)
            silent = bool(self.health_error())
            if silent == self._was_silent:
                continue
            self._was_silent = silent
            if silent:
                _log.error("updates.folder_silent", folder=self._folder, why=self.health_error())
            else:
                _log.info("updates.folder_answers", folder=self._folder)
            self._changed()

    def close(self) -> None:
        """End the thread as soon as it is not blocked; it is not awaited."""
        self._closed = True
        self._wanted.set()

    # -- in the thread --------------------------------------------------------------------------------------

    def _work(self) -> None:
        # What this thread read last: the loop's copy may be one read behind.
        known = Catalogue()
        last: Fingerprint | None = None
        self._busy_since = time.monotonic()
        if not Path(self._folder).exists():
            _log.warning(
                "updates.no_folder",
                folder=self._folder,
                hint="make it, or correct CAESURA_HOST_UPDATER_UPDATES_DIR",
            )
        while not self._closed:
            forced = self._wanted.is_set()
            self._wanted.clear()
            self._busy_since = time.monotonic()
            files = fingerprint(self._folder)
            # The cause of a refusal may be outside the file, such as a program that is not installed yet.
            if forced or last != (files, places(known)) or known.refused:
                known = self._read(self._folder)
                # The files as they were before the read: one that changed in the middle of it is read again.
                last = files, places(known)
                self._tell(known)
            self._busy_since = None
            self._wanted.wait(self._look_s)

    def _tell(self, found: Catalogue) -> None:
        if self._loop is not None:
            with suppress(RuntimeError):  # the loop was closed: there is no reader left
                self._loop.call_soon_threadsafe(self._take, found)

    # -- in the event loop ----------------------------------------------------------------------------------

    def _take(self, found: Catalogue) -> None:
        is_first = not self._first.is_set()
        self._first.set()
        if found == self._catalogue and not is_first:
            return
        before = set(self._catalogue.refused)
        self._catalogue = found
        for each in found.refused:
            if each not in before:
                _log.warning("updates.refused", file=each.file, line=each.line, why=each.reason)
        self._changed()


def fingerprint(folder: str) -> Fingerprint:
    """The folder's update files as stat(2) has them."""
    files: list[object] = []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.endswith(".toml"):
                    with suppress(OSError):
                        status = Path(entry.path).stat()
                        files.append((entry.name, status.st_ino, status.st_size, status.st_mtime_ns))
    except OSError as error:
        files.append(error.errno)
    return tuple(sorted(files, key=str))


def places(known: Catalogue) -> Fingerprint:
    """Where the programs of the updates are."""
    return tuple(
        (program, shutil.which(program))
        for each in known.updates.values()
        for program in (each.argv[0], *each.installed[:1])
    )
