"""Group commit: several transactions share one sync, in a thread, and no commit makes the event loop wait for the disk.

A commit of the event loop's connection is in the page cache when it returns: a crash of the process loses nothing, a power cut may lose
the last commits, always a suffix (https://sqlite.org/wal.html). So every effect of a commit waits until ``reached`` covers it before
it leaves the process. One sync runs at a time; callers that arrive during it share the next one.

A failed fsync is never retried: ``run`` raises, and the service ends.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from typing import TypeVar

from caesura.runtime.database import Database, Wal
from caesura.runtime.errors import StoreError, SyncFailed
from caesura.runtime.logs import get_logger
from caesura.runtime.threads import Worker

FOLD_BYTES = 16 * 1024 * 1024
"""bytes: from this size on the WAL is folded into the file. SQLite's own limit is 4 MB, which a large wave writes in a second."""

_SLOW_S = 5.0
"""s: after which the health probe names a sync that does not end."""

T = TypeVar("T")
_log = get_logger("caesura.runtime.group_commit")


class GroupCommit:
    """See the module. Opens in the calling thread, and syncs earlier commits.

    Args:
        database: the connection of the event loop; its commits do not wait for the disk from now on.
        sync: syncs the writes of a file descriptor to disk.
        fold_bytes: the size of the WAL at which it is folded into the file.

    Raises:
        StoreError: the disk failed.
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
        """Start time of the threads' current work, by the loop's clock."""
        self._open = asyncio.Event()
        self._open.set()
        self.syncs = 0
        """The number of syncs; checkpoints are not counted."""
        self.listeners: list[Callable[[], None]] = []
        """Called whenever more commits are on disk."""

    @property
    def on_disk(self) -> int:
        """The number of commits on disk, counted from the oldest."""
        return self._on_disk

    @property
    def committed(self) -> int:
        """The number of commits."""
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
        """Start a sync, or join the running one; awaiting it is optional.

        Raises:
            SyncFailed: one has failed.
        """
        if self._failed is not None:
            raise self._failed
        if self._round is None:
            self._round = asyncio.create_task(self._sync(), name="store-sync")
        return self._round

    async def writable(self) -> None:
        """Wait while the WAL restarts: a commit would block the event loop until that is on disk."""
        while not self._open.is_set():
            await self._open.wait()

    async def run(self) -> None:
        """Keep the WAL short, until cancelled.

        Raises:
            SyncFailed: a sync failed, here or for any caller that waits for one.
        """
        try:
            while True:
                await self._attention.wait()
                self._attention.clear()
                if self._failed is not None:
                    raise self._failed
                # A sync that ended during the fold has requested another fold, which is done by now.
                if self._size_bytes >= self._fold_at:
                    await self._fold()
        finally:
            self._syncs.post(self._wal.close)
            self._folds.post(self._wal.leave)
            self._syncs.end()
            self._folds.end()

    def close(self) -> None:
        """Close the store. If its disk does not answer, it is left as it is: the next start continues from its content."""
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
            # It may write, and would block the loop while the WAL restarts.
            return self._database.ping() if self._open.is_set() else ""
        return (
            f"the disk of {self._database.path} has not finished a sync for {waited_s:.0f} s: no later decision is "
            "published. Check the disk (dmesg)"
        )

    async def _sync(self) -> None:
        covered = self._database.commits
        try:
            self._size_bytes = await self._in(self._syncs, self._wal.sync)
        except SyncFailed as error:
            self._fail(error)  # waiting callers check again, and raise it then
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
        """Fold the WAL into the file: most of it in parallel with commits, the rest while ``writable`` holds them back."""
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
        # If that failed, it is retried when the WAL has grown by as much again.
        self._fold_at = self._fold_bytes if folded else self._size_bytes + self._fold_bytes
