"""Group commit: several transactions share one sync, in a thread, and no commit holds the event loop on the disk.

A commit of the event loop's connection is in the page cache when it returns: a crash of the process loses nothing, a power cut may take
the last ones, always a suffix (https://sqlite.org/wal.html). So whatever follows from a commit waits until ``reached`` covers it before
it leaves the process. One sync runs at a time; whoever comes meanwhile shares the next.

An fsync that failed is never tried again: ``run`` raises, and the service ends.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from typing import TypeVar

import structlog

from caesura.runtime.database import Database, Wal
from caesura.runtime.errors import StoreError, SyncFailed
from caesura.runtime.threads import Worker

FOLD_BYTES = 16 * 1024 * 1024
"""bytes: from here on the WAL is folded into the file. SQLite's own limit is 4 MB, which a large wave writes in a second."""

_SLOW_S = 5.0
"""s: after which the health probe names a sync that does not end."""

T = TypeVar("T")
_log = structlog.get_logger("caesura.runtime.group_commit")


class GroupCommit:
    """See the module. Opens in the calling thread, and syncs what was committed before.

    Args:
        database: the connection of the event loop; its commits wait for no disk from now on.
        sync: brings what was written to a file descriptor to the disk.
        fold_bytes: how large the WAL becomes before it is folded into the file.

    Raises:
        StoreError: the disk refused.
    """

    def __init__(
        self,
        database: Database,
        *,
        sync: Callable[[int], None] = os.fdatasync,
        fold_bytes: int = FOLD_BYTES,
    ) -> None:
        database.defer_syncs()
        self._database = database
        self._wal = Wal(database.path, sync)
        self._syncs, self._folds = Worker("store-sync"), Worker("store-fold")
        self._fold_bytes = self._fold_at = fold_bytes
        self._on_disk = database.commits
        self._round: asyncio.Task[None] | None = None
        self._failed: SyncFailed | None = None
        self._attention = asyncio.Event()
        self._size_bytes = 0
        self._waits_s: list[float] = []
        """When what the threads do now was begun, by the loop's clock."""
        self._open = asyncio.Event()
        self._open.set()
        self.syncs = 0
        """Syncs that were done; checkpoints are not counted."""
        self.listeners: list[Callable[[], None]] = []
        """Called whenever more is on disk."""

    @property
    def on_disk(self) -> int:
        """How many commits are on disk, the oldest first."""
        return self._on_disk

    @property
    def committed(self) -> int:
        """How many commits there are."""
        return self._database.commits

    @property
    def settled(self) -> bool:
        """Whether everything that is committed is on disk."""
        return self._on_disk >= self._database.commits

    async def reached(self) -> int:
        """Wait until everything that is committed now is on disk.

        Returns:
            ``on_disk``.

        Raises:
            SyncFailed: it may never be.
        """
        wanted = self._database.commits
        while self._on_disk < wanted:
            await asyncio.shield(self.start())
        return self._on_disk

    def start(self) -> asyncio.Task[None]:
        """Have a sync done now, or the one that runs come to its end; to be awaited or not.

        Raises:
            SyncFailed: one has failed.
        """
        if self._failed is not None:
            raise self._failed
        if self._round is None:
            self._round = asyncio.create_task(self._sync(), name="store-sync")
        return self._round

    async def writable(self) -> None:
        """Wait while the WAL begins from its start: a commit would hold the event loop until that is on disk."""
        while not self._open.is_set():
            await self._open.wait()

    async def run(self) -> None:
        """Keep the WAL short, until cancelled.

        Raises:
            SyncFailed: a sync failed, here or for anybody who waits for one.
        """
        try:
            while True:
                await self._attention.wait()
                self._attention.clear()
                if self._failed is not None:
                    raise self._failed
                # A sync that ended while the WAL was folded has asked for what is done by now.
                if self._size_bytes >= self._fold_at:
                    await self._fold()
        finally:
            self._syncs.post(self._wal.close)
            self._folds.post(self._wal.leave)
            self._syncs.end()
            self._folds.end()

    def close(self) -> None:
        """Close the store. Where its disk has not answered it is left as it is: the next start takes up what is there."""
        if self.settled and not self._waits_s and self._failed is None:
            self._database.close()
        else:
            self._database.abandon()

    def ping(self) -> str:
        """For the health probe: empty, or what is wrong with the store or its disk."""
        if self._failed is not None:
            return str(self._failed)
        now_s = asyncio.get_running_loop().time()
        waited_s = now_s - min(self._waits_s, default=now_s)
        if waited_s < _SLOW_S:
            # It may write, and would hold the loop while the WAL begins from its start.
            return self._database.ping() if self._open.is_set() else ""
        return (
            f"the disk of {self._database.path} has not finished a sync for {waited_s:.0f} s: nothing that was decided since is "
            "published. Look at the disk (dmesg)"
        )

    async def _sync(self) -> None:
        covered = self._database.commits
        try:
            self._size_bytes = await self._in(self._syncs, self._wal.sync)
        except SyncFailed as error:
            self._fail(error)  # whoever waits looks again, and raises it then
            return
        finally:
            self._round = None
        self.syncs += 1
        self._progress(covered)
        if self._size_bytes >= self._fold_at:
            self._attention.set()

    async def _in(self, worker: Worker, work: Callable[[], T]) -> T:
        began_s = asyncio.get_running_loop().time()
        self._waits_s.append(began_s)
        try:
            return await worker.do(work)
        finally:
            self._waits_s.remove(began_s)

    def _fail(self, error: SyncFailed) -> None:
        self._failed = error
        self._attention.set()

    def _progress(self, covered: int) -> None:
        if covered > self._on_disk:
            self._on_disk = covered
            for each in self.listeners:
                each()

    async def _fold(self) -> None:
        """Fold the WAL into the file: most of it beside the commits, the rest while ``writable`` holds them back."""
        folded = False
        try:
            await self._in(self._folds, self._wal.copy)
            self._open.clear()
            covered = self._database.commits
            folded = await self._in(self._folds, self._wal.restart)
        except SyncFailed as error:
            self._fail(error)
            raise
        except StoreError as error:
            _log.warning(
                "store.not_folded", store=self._database.path, bytes=self._size_bytes, why=str(error)
            )
        finally:
            self._open.set()
        if folded:
            self._size_bytes = 0  # as far as is known before the next sync
            self._progress(covered)
        # Where it could not be, it is tried again when it has grown as much once more.
        self._fold_at = self._fold_bytes if folded else self._size_bytes + self._fold_bytes
