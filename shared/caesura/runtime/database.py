"""SQLite as the durable store of a service; the only module that uses ``sqlite3``.

WAL with ``synchronous=FULL``: a transaction that returned is on disk (https://sqlite.org/wal.html, section
"Performance Considerations"). Every failure (full disk, locked or broken file) is a StoreError with the
path and the cause; the failed transaction left nothing behind.

A service that commits in its event loop calls ``defer_syncs``: its commits only reach the page cache, and ``Wal`` syncs them to
disk in a thread (``caesura.runtime.group_commit``).
"""

from __future__ import annotations

import ctypes
import errno
import os
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import msgspec

from caesura.runtime.errors import NewerStore, StoreError, SyncFailed

_BUSY_TIMEOUT_S = 5.0  # s: longer than any of our transactions, short enough to notice a stuck second process

_ERRORS = (
    sqlite3.Error,
    UnicodeDecodeError,
)  # the latter is what the module makes of a damaged error text or schema

_TEMPORARY = frozenset(
    (
        sqlite3.SQLITE_FULL,
        sqlite3.SQLITE_IOERR,
        sqlite3.SQLITE_CANTOPEN,
        sqlite3.SQLITE_READONLY,
        sqlite3.SQLITE_BUSY,
    )
)
"""The primary result codes (https://sqlite.org/rescode.html) that blame the disk, not the file's content."""

_NOT_SYNCED = frozenset((sqlite3.SQLITE_IOERR_FSYNC, sqlite3.SQLITE_IOERR_DIR_FSYNC))
"""The extended result codes of an fsync that failed."""

_READERS_S = 1.0
"""s: how long a restart of the WAL waits for its readers; commits wait that long, too."""

_CHUNK_BYTES = 1 << 20


def _is_temporary(error: Exception) -> bool:
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)
    code = getattr(error, "sqlite_errorcode", None)
    return code is not None and code & 0xFF in _TEMPORARY


class Database:
    """One SQLite file and its schema.

    Args:
        path: the file; its folder is created with mode 0700. ``:memory:`` is for unit tests.
        migrations: one SQL script per schema version, oldest first; those that the file lacks are run on opening. None: a second
            connection, for another thread, to an existing file with its schema. Its commits are synced to
            the disk only with the next transaction of the first (``synchronous=NORMAL``): for work that may be repeated
            after a power cut.
        any_thread: whether another thread than the one that opened it may use it, one at a time.

    Raises:
        StoreError: the file cannot be opened or is not a Caesura store.
        NewerStore: a newer Caesura wrote it.
    """

    def __init__(self, path: str, migrations: Sequence[str] | None, *, any_thread: bool = False) -> None:
        self.path = path
        self._any_thread = any_thread
        self.commits = 0
        """The number of committed transactions of this connection."""
        self._refused = ""
        try:
            if migrations is None:
                self._connection = self._connect(f"{Path(path).absolute().as_uri()}?mode=rw")
                self._connection.execute("PRAGMA synchronous=NORMAL")
                # Only the first connection checkpoints: after a checkpoint here, its next commit would sync the restarted WAL in the event loop.
                self._connection.execute("PRAGMA wal_autocheckpoint=0")
                return
            if path != ":memory:":
                Path(path).parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._connection = self._connect(path)
            self._connection.execute("PRAGMA journal_mode=WAL")
            self._connection.execute("PRAGMA synchronous=FULL")
            self.migrate(migrations)
        except (*_ERRORS, OSError) as error:
            refused = StoreError(f"cannot open the store {path}: {error}")
            refused.temporary = _is_temporary(error)
            raise refused from error

    def _connect(self, place: str) -> sqlite3.Connection:
        return sqlite3.connect(
            place,
            timeout=_BUSY_TIMEOUT_S,
            isolation_level=None,
            uri=place.startswith("file:"),
            check_same_thread=not self._any_thread,
        )

    def defer_syncs(self) -> None:
        """From now on commits do not wait for the disk: ``Wal`` syncs them, and folds the WAL into the file.

        When this returns, everything committed before, by any process, is on disk. A write for which the disk has no room
        is still refused at once.

        Raises:
            StoreError: the disk refused.
            SyncFailed: as ``Wal.sync``.
        """
        wal = Wal(self.path)
        try:
            wal.write_again()
            wal.sync_folder()
            try:
                wal.restart()
            except SyncFailed:
                raise
            except StoreError:
                pass  # without room, or with a reader in it, the WAL is only longer than necessary
            self._connection.execute("PRAGMA synchronous=NORMAL")
            self._connection.execute("PRAGMA wal_autocheckpoint=0")
        except (*_ERRORS, OSError) as error:
            raise self._failed("cannot sync the store", error) from error
        finally:
            wal.close()

    def migrate(self, migrations: Sequence[str]) -> None:
        """Run the scripts that the schema lacks.

        Raises:
            NewerStore: the schema has more than these.
        """
        (have,) = self._connection.execute("PRAGMA user_version").fetchone()
        if have > len(migrations):
            raise NewerStore(
                f"the store {self.path} has schema version {have}, this Caesura knows {len(migrations)}: run the newer version, or "
                "move the file away to start without it (docs/operate/upgrade.md)"
            )
        for number, script in enumerate(migrations[have:], start=have + 1):
            self._connection.executescript(f"BEGIN;{script};PRAGMA user_version={number};COMMIT;")

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """All or nothing. The block's own exceptions roll back and pass through.

        Raises:
            StoreError: the disk or the file failed; nothing was written.
        """
        try:
            self._connection.execute("BEGIN IMMEDIATE")
        except _ERRORS as error:
            raise self._failed("cannot write to the store", error) from error
        try:
            yield
            self._connection.execute("COMMIT")
            self.commits += 1
        except BaseException as error:
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")
            if isinstance(error, _ERRORS):
                raise self._failed("cannot write to the store", error) from error
            raise
        self._refused = ""

    def _failed(self, what: str, error: Exception) -> StoreError:
        self._refused = f"{what} {self.path}: {error}"
        return StoreError(self._refused)

    def run(self, sql: str, *values: Any) -> list[tuple[Any, ...]]:
        """Run one statement; returns its rows.

        Raises:
            StoreError: the statement failed.
        """
        try:
            return self._connection.execute(sql, values).fetchall()
        except _ERRORS as error:
            raise self._failed("cannot use the store", error) from error

    @contextmanager
    def reading(self, what: str) -> Iterator[None]:
        """Decode the rows of ``run`` in the block: with a bad disk or bad memory they may contain anything.

        Raises:
            StoreError: they cannot be decoded; names ``what`` and the file.
        """
        try:
            yield
        except (msgspec.DecodeError, ValueError, TypeError, KeyError) as error:
            raise StoreError(
                f"{what} in the store {self.path} cannot be read: {error}. Either a newer Caesura wrote it, and that version must be run, "
                "or the file is damaged: restore a backup of it, or move it away to start without it."
            ) from error

    def run_many(self, sql: str, rows: Iterable[Sequence[Any]]) -> None:
        """Run one statement with each of these rows of values.

        Raises:
            StoreError: the statement failed.
        """
        try:
            self._connection.executemany(sql, rows)
        except _ERRORS as error:
            raise self._failed("cannot use the store", error) from error

    def replace_by(self, other: Database) -> None:
        """Make the content that of another database with the same schema: page by page, without a statement or a trigger for each row.

        Raises:
            StoreError: it cannot be copied.
        """
        try:
            other._connection.backup(self._connection)
        except _ERRORS as error:
            raise self._failed("cannot copy into the store", error) from error

    def ping(self) -> str:
        """Empty text if the store works, else what is wrong; for health probes.

        After a failure it must accept a write again: a full disk can still be read.
        """
        try:
            if self._refused:
                with self.transaction():
                    ((version,),) = self.run("PRAGMA user_version")
                    self.run(f"PRAGMA user_version={version}")
            self.run("SELECT 1")
        except StoreError as error:
            return str(error)
        return ""

    def close(self) -> None:
        """Close the file; further calls fail."""
        self._connection.close()

    def abandon(self) -> None:
        """Leave the file as a kill would, also at interpreter exit: closing it would fold the WAL into it and wait for the disk."""
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(self._connection))


class Wal:
    """The write-ahead log of a database whose syncs are deferred: for use by threads, one that syncs and one that copies and restarts.

    When a WAL restarts, SQLite syncs its header in the commit that restarts it
    (https://sqlite.org/src/info/ff5be73dee). A checkpoint that copies everything makes the next commit do that, which must not happen
    unnoticed: ``copy`` keeps a reader in the WAL, and ``restart`` restarts it explicitly.

    Args:
        path: of the database.
        sync: syncs the writes of a file descriptor to disk.
    """

    def __init__(self, path: str, sync: Callable[[int], None] = os.fdatasync) -> None:
        self.path = path
        self._sync = sync
        self._file: int | None = None
        """Kept open: a writeback error is only reported to those who have the file open at the time (fsync(2))."""
        self._reader: sqlite3.Connection | None = None

    def sync(self) -> int:
        """Sync every commit that returned before this was called; returns the size of the WAL in bytes.

        The database file is not touched: closing it would drop SQLite's locks on it (fcntl(2)). SQLite has no locks on the WAL.

        Raises:
            SyncFailed: it is unknown what is on the disk.
        """
        log = Path(f"{self.path}-wal")
        try:
            if self._file is None:
                self._file = os.open(log, os.O_RDONLY | os.O_CLOEXEC)
            opened, named = os.fstat(self._file), log.stat()
            replaced = (opened.st_dev, opened.st_ino) != (named.st_dev, named.st_ino)
            self._sync(self._file)
        except OSError as error:
            raise SyncFailed(self.path, error) from error
        if replaced:
            raise SyncFailed(self.path, "its WAL was replaced by another file while it was in use")
        return opened.st_size

    def copy(self) -> None:
        """Copy the WAL into the file while other threads commit.

        Raises:
            StoreError: it was not copied; retrying is allowed.
            SyncFailed: as ``sync``.
        """
        try:
            self.leave()
            # Used by one thread after another, never by two.
            self._reader = sqlite3.connect(
                self._place(), isolation_level=None, uri=True, check_same_thread=False
            )
            self._reader.execute("BEGIN")
            self._reader.execute("SELECT count(*) FROM sqlite_master").fetchall()
            with self._second() as connection:
                connection.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()
        except _ERRORS as error:
            raise self._failed(error) from error

    def restart(self) -> bool:
        """Copy the rest and restart the WAL, on disk. Nobody should commit in the meantime, since a commit would wait.

        Returns:
            False if the WAL has a reader; its length is unchanged.

        Raises:
            As ``copy``.
        """
        try:
            with self._second() as connection:
                self.leave()
                connection.execute(f"PRAGMA busy_timeout={_READERS_S * 1000:.0f}")
                ((busy, *_),) = connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
                if busy:
                    return False
                ((version,),) = connection.execute("PRAGMA user_version").fetchall()
                connection.execute("BEGIN IMMEDIATE")
                connection.execute(f"PRAGMA user_version={version}")
                connection.execute("COMMIT")
                return True
        except _ERRORS as error:
            raise self._failed(error) from error

    def write_again(self) -> None:
        """Write the same bytes again, and sync them.

        After a failed fsync Linux marks the pages as clean, and so the next fsync, of this process or another, would succeed
        (https://www.usenix.org/conference/atc20/presentation/rebello).

        Raises:
            OSError: the disk refused.
        """
        with suppress(FileNotFoundError), Path(f"{self.path}-wal").open("r+b", buffering=0) as log:
            at = 0
            while chunk := os.pread(log.fileno(), _CHUNK_BYTES, at):
                at += os.pwrite(log.fileno(), chunk, at)
            self._sync(log.fileno())

    def sync_folder(self) -> None:
        """Sync the directory entry of a new WAL. Raises OSError."""
        folder = os.open(Path(self.path).absolute().parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def close(self) -> None:
        """Close the WAL; it is reopened on the next use."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def leave(self) -> None:
        """End the read transaction that ``copy`` left in the WAL."""
        if self._reader is not None:
            self._reader.close()
            self._reader = None

    def _place(self) -> str:
        return f"{Path(self.path).absolute().as_uri()}?mode=rw"

    @contextmanager
    def _second(self) -> Iterator[sqlite3.Connection]:
        with closing(
            sqlite3.connect(self._place(), timeout=_BUSY_TIMEOUT_S, isolation_level=None, uri=True)
        ) as made:
            made.execute("PRAGMA synchronous=FULL")
            made.execute("PRAGMA wal_autocheckpoint=0")
            yield made

    def _failed(self, error: Exception) -> StoreError:
        if getattr(error, "sqlite_errorcode", None) in _NOT_SYNCED:
            return SyncFailed(self.path, error)
        refused = StoreError(f"cannot fold the WAL into the store {self.path}: {error}")
        refused.temporary = _is_temporary(error)
        return refused
