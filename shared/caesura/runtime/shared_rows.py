"""Rows of a working copy that a database has for several processes: the port, and how rows come out of the copy and into it.

Rows are known by table and number (SQLite's ``rowid``), so that several changes of one row are one write, in any order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import msgspec

from caesura.runtime.database import Database
from caesura.runtime.errors import ConfigError, SyncFailed

Row = tuple[Any, ...]
"""Its number, then its columns."""


class TableColumns(msgspec.Struct, frozen=True):
    """The columns of a table: name and SQLite's type of each, without its number."""

    of: tuple[tuple[str, str], ...]

    @property
    def names(self) -> tuple[str, ...]:
        """Their names."""
        return tuple(name for name, _ in self.of)


class TableChanges(msgspec.Struct, frozen=True):
    """What changed in one table: rows that are new or different, and the numbers of those that are gone."""

    table: str
    rows: list[Row]
    removed: list[int]


class Content(msgspec.Struct, frozen=True):
    """Everything that the database has."""

    version: int
    """Of the schema."""
    epoch: int
    """As it was before this process became the leader."""
    rows: Mapping[str, tuple[tuple[str, ...], list[Row]]]
    """Maps a table to the names of its columns and its rows, by number."""


class StoreLost(SyncFailed):
    """The session with the shared store ended, or did not answer in time: what was committed last may not be there, and another may lead."""

    def __init__(self, store: str, why: object) -> None:
        super().__init__(store, why)
        said = f"the session with the store {store} is lost: {why}. What was not stored was not published; this coordinator begins again"
        self.args = (f"{said} from what is stored, when it leads",)


class WrongStore(ConfigError):
    """The database is not one that this process may use; the text says why and what to do."""


class SharedRows(Protocol):
    """A database for the rows of several processes, of which one leads. Its methods block: they are called in a thread, one at a time."""

    label: str
    """The database, for people; without a password."""
    answers: int
    """How many answers it has given: who waits for a method that needs many, in another thread, sees that it continues."""

    bus: str
    """Where the last leader announced itself, as of the last ``open``; empty: not known."""

    def open(self) -> int:
        """Connect if there is no session, check server and schema, and create what is missing; returns the epoch.

        Raises:
            StoreError: it cannot be reached now.
            NewerStore, WrongStore: it must not be used.
        """

    def try_lead(self, name: str, may: Callable[[int], bool] = lambda _: True) -> Content | None:
        """Become the leader, unless another process is: read everything, then raise the epoch by one if nobody wrote in the meantime.

        It gives signs of life while it reads.

        Args:
            may: whether it may still lead when everything is read, given the epoch in the store. If not, others may.

        Raises:
            As ``open``.
        """

    def write(self, epoch: int, changes: Sequence[TableChanges]) -> None:
        """Write these rows, and the epoch, in one transaction, as long as no other process has become the leader.

        Raises:
            StoreError: it is unknown whether they are written.
        """

    def rewrite(self, content: Content) -> None:
        """Replace all tables by those of this content, as ``write``. For a schema of a newer version."""

    def beat(self) -> None:
        """Keep the session alive. Raises StoreError."""

    def led_on(self, bus: str) -> None:
        """Note on which bus this leader has announced itself. Raises StoreError."""

    def close(self) -> None:
        """End the session; ``open`` makes another."""


class WorkingCopy:
    """Knows which rows of a database in memory changed since they were last taken.

    Args:
        database: the copy; its schema is there.
        leave_out: tables that are not shared.
    """

    def __init__(self, database: Database, leave_out: Iterable[str] = ()) -> None:
        self._database = database
        self.columns = columns_of(database, leave_out)
        """Maps a table to its columns."""
        # Else a row that INSERT OR REPLACE removes fires no trigger.
        database.run("PRAGMA recursive_triggers=ON")
        database.run(
            "CREATE TEMP TABLE changed_row (name TEXT NOT NULL, number INTEGER NOT NULL, PRIMARY KEY (name, number)) WITHOUT ROWID"
        )
        for table in self.columns:
            for verb, row in (("INSERT", "NEW"), ("UPDATE", "NEW"), ("DELETE", "OLD")):
                # OR IGNORE would not do: the policy of the statement that fires the trigger overrides it.
                known = f"SELECT 1 FROM changed_row WHERE name = '{table}' AND number = {row}.rowid"  # noqa: S608 - the schema's own names
                note = f"INSERT INTO changed_row SELECT '{table}', {row}.rowid WHERE NOT EXISTS ({known})"
                database.run(
                    f"CREATE TEMP TRIGGER {table}_{verb} AFTER {verb} ON main.{table} BEGIN {note}; END"
                )

    def take(self) -> list[TableChanges]:
        """What changed since this was last called. Call outside a transaction."""
        found = []
        for (table,) in self._database.run("SELECT DISTINCT name FROM changed_row"):
            names = ", ".join(f"t.{name}" for name in self.columns[table].names)
            rows = self._database.run(
                f"SELECT c.number, t.rowid IS NULL, {names} FROM changed_row c LEFT JOIN {table} t ON t.rowid = c.number "  # noqa: S608 - the schema's own names
                "WHERE c.name = ?",
                table,
            )
            found.append(
                TableChanges(
                    table=table,
                    rows=[(number, *values) for number, gone, *values in rows if not gone],
                    removed=[number for number, gone, *_ in rows if gone],
                )
            )
        self._database.run("DELETE FROM changed_row")
        return found

    def fill(self, database: Database) -> None:
        """Replace everything by the content of this database, which has the same schema; none of it counts as changed."""
        self._database.replace_by(database)
        self._database.run("DELETE FROM changed_row")


def columns_of(database: Database, leave_out: Iterable[str] = ()) -> dict[str, TableColumns]:
    """Maps each table of a database to its columns. A column that is the number itself is left out."""
    left_out = {*leave_out, "sqlite_sequence"}
    tables = [name for (name,) in database.run("SELECT name FROM sqlite_master WHERE type = 'table'")]
    found = {}
    for table in sorted({*tables} - left_out):
        rows = database.run(f"PRAGMA main.table_info({table})")
        keys = [(name, kind) for _, name, kind, _, _, key in rows if key]
        number = keys[0][0] if len(keys) == 1 and keys[0][1] == "INTEGER" else None
        found[table] = TableColumns(of=tuple((name, kind) for _, name, kind, *_ in rows if name != number))
    return found


def insert(database: Database, content: Content) -> None:
    """Insert the rows of a content. Call inside a transaction."""
    for table, (names, rows) in content.rows.items():
        places = ", ".join("?" * (len(names) + 1))
        statement = f"INSERT INTO {table} (rowid, {', '.join(names)}) VALUES ({places})"  # noqa: S608 - the schema's own names
        database.run_many(statement, rows)


def migrated(content: Content, migrations: Sequence[str], leave_out: Iterable[str] = ()) -> Content:
    """The content with the schema that all of these migrations give.

    Args:
        migrations: as ``Database`` takes them; the content has the schema of the first ``content.version``.
    """
    database = Database(":memory:", migrations[: content.version])
    try:
        with database.transaction():
            insert(database, content)
        database.migrate(migrations)
        rows = {}
        for table, columns in columns_of(database, leave_out).items():
            names = columns.names
            found = database.run(f"SELECT rowid, {', '.join(names)} FROM {table} ORDER BY rowid")  # noqa: S608 - the schema's own names
            rows[table] = (names, found)
        return Content(version=len(migrations), epoch=content.epoch, rows=rows)
    finally:
        database.close()
