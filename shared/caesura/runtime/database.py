"""SQLite as the durable store of a service: the one home of ``sqlite3``.

WAL with ``synchronous=FULL``: a transaction that returned is on disk (https://sqlite.org/wal.html, section
"Performance Considerations"). Every failure (full disk, locked or broken file) is a StoreError with the
path and the cause; the failed transaction left nothing behind.
"""

from __future__ import annotations

import errno
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec

from caesura.runtime.errors import NewerStore, StoreError

_BUSY_TIMEOUT_S = 5.0  # s: longer than any transaction of ours, short enough to notice a stuck second process

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
"""The primary result codes (https://sqlite.org/rescode.html) behind which the disk stands, not the file's content."""


def _is_temporary(error: Exception) -> bool:
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)
    code = getattr(error, "sqlite_errorcode", None)
    return code is not None and code & 0xFF in _TEMPORARY


class Database:
    """One SQLite file and its schema.

    Args:
        path: the file; its folder is created with mode 0700. ``:memory:`` is for unit tests.
        migrations: one SQL script per schema version, oldest first; those the file lacks are run at open. None: a second
            connection, for another thread, to a file that is there and has its schema. What that one commits is synced to
            the disk only with the next transaction of the first (``synchronous=NORMAL``): for what may be done again
            after a power cut.

    Raises:
        StoreError: the file cannot be opened or is not ours.
        NewerStore: it comes from a newer Caesura.
    """

    def __init__(self, path: str, migrations: Sequence[str] | None) -> None:
        self.path = path
        self._refused = ""
        try:
            if migrations is None:
                self._connection = self._connect(f"{Path(path).absolute().as_uri()}?mode=rw")
                self._connection.execute("PRAGMA synchronous=NORMAL")
                return
            if path != ":memory:":
                Path(path).parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._connection = self._connect(path)
            self._connection.execute("PRAGMA journal_mode=WAL")
            self._connection.execute("PRAGMA synchronous=FULL")
            self._migrate(migrations)
        except (*_ERRORS, OSError) as error:
            refused = StoreError(f"cannot open the store {path}: {error}")
            refused.temporary = _is_temporary(error)
            raise refused from error

    @staticmethod
    def _connect(place: str) -> sqlite3.Connection:
        uri = place.startswith("file:")
        return sqlite3.connect(place, timeout=_BUSY_TIMEOUT_S, isolation_level=None, uri=uri)

    def _migrate(self, migrations: Sequence[str]) -> None:
        (have,) = self._connection.execute("PRAGMA user_version").fetchone()
        if have > len(migrations):
            raise NewerStore(
                f"the store {self.path} has schema version {have}, this Caesura knows {len(migrations)}: run the newer version, or "
                "move the file away to begin without it (docs/operate/upgrade.md)"
            )
        for number, script in enumerate(migrations[have:], start=have + 1):
            self._connection.executescript(f"BEGIN;{script};PRAGMA user_version={number};COMMIT;")

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """All or nothing. The block's own exceptions roll back and pass through.

        Raises:
            StoreError: the disk or the file refused; nothing was written.
        """
        try:
            self._connection.execute("BEGIN IMMEDIATE")
        except _ERRORS as error:
            raise self._failed("cannot write to the store", error) from error
        try:
            yield
            self._connection.execute("COMMIT")
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
        """One statement; its rows.

        Raises:
            StoreError: the statement failed.
        """
        try:
            return self._connection.execute(sql, values).fetchall()
        except _ERRORS as error:
            raise self._failed("cannot use the store", error) from error

    @contextmanager
    def reading(self, what: str) -> Iterator[None]:
        """Make sense of what ``run`` gave, in the block; a bad disk or memory leaves anything.

        Raises:
            StoreError: it makes none; names ``what`` and the file.
        """
        try:
            yield
        except (msgspec.DecodeError, ValueError, TypeError, KeyError) as error:
            raise StoreError(
                f"{what} in the store {self.path} cannot be read: {error}. It was written by a newer Caesura, which is to be run "
                "then, or the file is damaged: put a copy of it back, or move it away to begin without it."
            ) from error

    def ping(self) -> str:
        """Empty text when the store answers, else what is wrong; for health probes.

        After a failure it must take a write again: a full disk still answers every question.
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
