"""PostgreSQL as the home of rows that several processes share; with its options the only module that uses ``psycopg``.

One session each. The process whose session has the advisory lock leads; what keeps another from writing is the epoch in the row of
``caesura.store``, which every transaction updates first and so holds. Everything here blocks, and is called in a thread.

A leader gives a sign of life in the store's row, and its lease is there. If it has given none for so long, by a standby's own clock, that one has the server end the leader's session: one that is
stopped or cut off keeps the lock no longer than that, whatever the network says.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import msgspec
import psycopg
from psycopg import sql

from caesura.runtime.errors import NewerStore, StoreError
from caesura.runtime.postgresql_options import PostgresOptions, advice
from caesura.runtime.shared_rows import Content, Row, TableChanges, TableColumns, WrongStore

OLDEST = 14
"""The oldest major version of the server: it has ``idle_session_timeout``."""

_LOCK = 0x0CAE_5CA0
"""Of the leader: advisory locks belong to a database, and each fleet has one of its own."""
_LOCK_SCHEMA = _LOCK + 1
"""Held while the schema is created."""
_EXISTS = (
    "SELECT EXISTS (SELECT FROM pg_catalog.pg_tables WHERE schemaname = 'caesura' AND tablename = 'store')"
)
CLOCKS_S = 1.5
"""s: how much a leader's clock may differ from the database's."""
_HAS_BUS = "SELECT EXISTS (SELECT FROM pg_catalog.pg_attribute WHERE attrelid = 'caesura.store'::regclass AND attname = 'bus')"
_CHUNK_BYTES = 16 * 1024 * 1024
"""bytes of rows in one statement: the server refuses 1 GB."""
_CHUNK_ROWS = 2000
"""rows in one answer, after which a leader that takes over may give a sign of life."""
_BEATS = 8
"""Signs of life in one lease during a take-over, at most."""
_TYPES = {"TEXT": "text", "BLOB": "bytea", "INTEGER": "bigint"}


class _Reading(msgspec.Struct):
    """What the store's row has while it is read: only our signs of life change it."""

    epoch: int
    beat: int
    beat_at: float
    """seconds on the monotonic clock"""


class PostgresRows:
    """See the module, and ``caesura.runtime.shared_rows.SharedRows``.

    Args:
        options: how to reach the database.
        columns: maps each table to its columns.
        version: of the schema that these columns are of.
        tables: the names of the tables of an earlier version of the schema; None: they are not checked.
        clock: of this machine, seconds since 1970.
    """

    def __init__(
        self,
        options: PostgresOptions,
        columns: Mapping[str, TableColumns],
        version: int,
        tables: Callable[[int], Iterable[str]] | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.label = options.label
        self.answers = 0
        """See ``SharedRows``."""
        self.bus = ""
        """See ``SharedRows``."""
        self._options = options
        self._columns = columns
        self._version = version
        self._tables = tables
        self._clock = clock
        self._session: psycopg.Connection[Any] | None = None
        self._epoch = 0
        """Our own: the one in the store while nobody else leads."""
        self._seen: Any = None
        """The leader's epoch and its last signs of life."""
        self._seen_at = 0.0
        """When that was first seen, seconds on the monotonic clock."""

    def open(self) -> int:
        """See ``SharedRows.open``."""
        with self._translated("cannot use"):
            if self._session is None or self._session.closed:
                self._session = self._connect()
                self._check(self._session)
                self._create(self._session)
            return self._read_store()[1]

    def try_lead(self, name: str, may: Callable[[int], bool] = lambda _: True) -> Content | None:
        """See ``SharedRows.try_lead``."""
        self.open()
        with self._translated("cannot lead with"):
            self._check_clock()
            if not self._one("SELECT pg_try_advisory_lock(%s)", _LOCK)[0]:
                self._end_silent_leader()
                return None
            version, epoch, beat = self._one("SELECT version, epoch, beat FROM caesura.store")
            if version > self._version:
                self._read_store()  # it was migrated since: says so
            rows = {}
            reading = _Reading(epoch=epoch, beat=beat, beat_at=time.monotonic())
            for table in self._tables_of(version):
                rows[table] = self._table(table, reading)
            if not may(epoch):
                self._made.execute("SELECT pg_advisory_unlock(%s)", (_LOCK,))
                return None
            # Last: a take-over that fails takes no epoch. Every write of anybody changes the row, so none came between.
            self._step(
                "UPDATE caesura.store SET epoch = epoch + 1, beat = beat + 1, coordinator = %s, lease_s = %s, led_since = now() "
                "WHERE epoch = %s AND beat = %s",
                name,
                self._options.lease_s,
                epoch,
                reading.beat,
            )
            self._epoch = epoch + 1
            return Content(version=version, epoch=epoch, rows=rows)

    def _check_clock(self) -> None:
        """Raises StoreError: a wave would start before its NotBefore if the next leader's clock were ahead of this one's."""
        before = self._clock()
        (theirs,) = self._one("SELECT extract(epoch FROM clock_timestamp())::float8")
        after = self._clock()
        # Between the two readings lies the way there and back: a smaller difference is not one.
        ahead = max(before - theirs, 0.0) - max(theirs - after, 0.0)
        if abs(ahead) > CLOCKS_S:
            raise StoreError(
                f"the clock of this machine is {abs(ahead):.0f} s {'ahead of' if ahead > 0 else 'behind'} that of the database {self.label}, which "
                "shows what time other coordinators have: synchronise both (NTP), until then this coordinator does not lead"
            )

    def _step(self, statement: str, *values: Any) -> None:
        """An update of the store's row, which must find it. Raises StoreError: another coordinator wrote in the meantime."""
        if self._made.execute(statement.encode(), values).rowcount != 1:
            raise StoreError("another coordinator wrote to it while it was read")
        self.answers += 1

    def _tables_of(self, version: int) -> list[str]:
        """The tables with the rows, which are those of the version. Raises StoreError: a table is missing, or there is one too many."""
        found = self._stored_tables()
        if version == self._version or self._tables is not None:
            wanted = set(
                self._columns if version == self._version or self._tables is None else self._tables(version)
            )
            wrong = [f"lacks the table caesura.{each}" for each in sorted(wanted - set(found))]
            wrong += [f"has a table caesura.{each}" for each in sorted(set(found) - wanted)]
            if wrong:
                raise StoreError(
                    f"the database {', '.join(wrong)}, unlike schema version {version}: restore the schema caesura from a backup"
                )
        return found

    def _stored_tables(self) -> list[str]:
        # Not from information_schema: it hides tables on which this role has no rights, and the store would look empty.
        rows = self._made.execute(
            "SELECT tablename FROM pg_catalog.pg_tables WHERE schemaname = 'caesura' AND tablename <> 'store' ORDER BY tablename"
        ).fetchall()
        return [name for (name,) in rows]

    def _end_silent_leader(self) -> None:
        """End the session that has the lock, if it gave no sign of life for its own lease: the next try gets the lock.

        ``idle_session_timeout`` is not enough: it does not run in the middle of a message, where a process may be stopped.
        """
        now = time.monotonic()
        # A statement of its session is a sign of life, too: what it does in a transaction, as a migration, is not in the row before its end.
        # Of a session of another role the server does not say it.
        *seen, lease_s = self._one(
            "SELECT epoch, beat, (SELECT max(state_change) FROM pg_stat_activity JOIN pg_locks USING (pid) WHERE locktype = 'advisory' AND granted "
            "AND classid = 0 AND objid = %s AND objsubid = 1 AND pg_locks.database = datid), lease_s FROM caesura.store",
            _LOCK,
        )
        if seen != self._seen:
            self._seen, self._seen_at = seen, now
        elif now - self._seen_at > (lease_s or self._options.lease_s):
            self._made.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_locks WHERE locktype = 'advisory' AND granted AND classid = 0 AND objid = %s "
                "AND objsubid = 1 AND database = (SELECT oid FROM pg_database WHERE datname = current_database())",
                (_LOCK,),
            )

    def write(self, epoch: int, changes: Sequence[TableChanges]) -> None:
        """See ``SharedRows.write``."""
        with self._translated("cannot write to"):
            epoch = max(epoch, self._epoch)
            with self._fenced(epoch), self._made.pipeline():
                for each in changes:
                    self._remove(each.table, each.removed)
                    self._upsert(each.table, self._columns[each.table], each.rows)
            self._epoch = epoch

    def rewrite(self, content: Content) -> None:
        """See ``SharedRows.rewrite``."""
        with self._translated("cannot migrate"), self._fenced(self._epoch):
            # The rows of years are one statement of many seconds; who waits sees each answer.
            self._made.execute("SET LOCAL statement_timeout = 0")
            for table in self._stored_tables():
                self._made.execute(sql.SQL("DROP TABLE caesura.{}").format(sql.Identifier(table)))
            self._create_tables(self._made)
            for table, (_, rows) in content.rows.items():
                self._upsert(table, self._columns[table], rows)
            self._made.execute("UPDATE caesura.store SET version = %s", (content.version,))

    def beat(self) -> None:
        """See ``SharedRows.beat``."""
        with self._translated("cannot reach"), self._fenced(self._epoch):
            pass
        self.answers += 1

    def led_on(self, bus: str) -> None:
        """See ``SharedRows.led_on``."""
        with self._translated("cannot write to"), self._fenced(self._epoch):
            self._made.execute("UPDATE caesura.store SET bus = %s", (bus,))
        self.answers += 1

    def close(self) -> None:
        """See ``SharedRows.close``."""
        self._epoch = 0
        if self._session is not None:
            with suppress(psycopg.Error):
                self._session.close()
            self._session = None

    # -- the session --

    @property
    def _made(self) -> psycopg.Connection[Any]:
        if self._session is None:
            raise StoreError(f"there is no session with {self.label}")
        return self._session

    def _connect(self) -> psycopg.Connection[Any]:
        more = {"password": self._options.password.reveal()} if self._options.password else {}
        return psycopg.connect(**{**self._options.parameters(), **more}, autocommit=True)

    def _check(self, session: psycopg.Connection[Any]) -> None:
        """Raises WrongStore: a setting of the server would lose what it says it has."""
        version = session.info.server_version
        if version < OLDEST * 10_000:
            raise self._wrong(f"is of PostgreSQL {version // 10_000}; at least {OLDEST} is needed")
        encoding = session.info.parameter_status("server_encoding")
        if encoding != "UTF8":
            raise self._wrong(
                f"has the encoding {encoding}, not UTF8: names would be lost. Make another one: CREATE DATABASE ... OWNER ... ENCODING 'UTF8' TEMPLATE template0"
            )
        for name, bad in (
            ("fsync", {"off"}),
            ("full_page_writes", {"off"}),
            ("synchronous_commit", {"off", "local"}),
        ):
            (value,) = self._one_of(session, "SELECT current_setting(%s)", name)
            if value in bad:
                raise self._wrong(
                    f"has {name} = {value}: it may lose what it said it had stored. Set {name} = on (ALTER SYSTEM, or for "
                    "synchronous_commit ALTER DATABASE) and reload it"
                )
        if self._one_of(session, "SELECT pg_is_in_recovery()")[0]:
            raise StoreError(
                f"{self.label} is a replica, which takes no writes: promote it, or name its primary, too"
            )

    def _create(self, session: psycopg.Connection[Any]) -> None:
        """Create the schema in an empty database, and check whose store it is."""
        if self._one_of(session, _EXISTS)[0]:
            if not self._one_of(session, _HAS_BUS)[0]:
                session.execute(
                    "ALTER TABLE caesura.store ADD COLUMN IF NOT EXISTS lease_s float8 NOT NULL DEFAULT 0, "
                    "ADD COLUMN IF NOT EXISTS bus text NOT NULL DEFAULT ''"
                )
            return
        with session.transaction():
            session.execute("SELECT pg_advisory_xact_lock(%s)", (_LOCK_SCHEMA,))
            if not self._one_of(session, _EXISTS)[0]:
                session.execute("CREATE SCHEMA IF NOT EXISTS caesura")
                session.execute(
                    "CREATE TABLE caesura.store (only_row boolean PRIMARY KEY DEFAULT true CHECK (only_row), fleet text NOT NULL, "
                    "version integer NOT NULL, epoch bigint NOT NULL, beat bigint NOT NULL DEFAULT 0, coordinator text NOT NULL, led_since timestamptz, "
                    "lease_s float8 NOT NULL DEFAULT 0, bus text NOT NULL DEFAULT '')"
                )
                session.execute(
                    "INSERT INTO caesura.store (fleet, version, epoch, coordinator) VALUES (%s, %s, 0, '')",
                    (self._options.fleet, self._version),
                )
                self._create_tables(session)

    def _create_tables(self, session: psycopg.Connection[Any]) -> None:
        for table, columns in self._columns.items():
            described = [
                sql.SQL("{} {} NOT NULL").format(sql.Identifier(name), sql.SQL(_TYPES[kind]))
                for name, kind in columns.of
            ]
            session.execute(
                sql.SQL("CREATE TABLE caesura.{} (row_number bigint PRIMARY KEY, {})").format(
                    sql.Identifier(table), sql.SQL(", ").join(described)
                )
            )

    def _read_store(self) -> tuple[int, int]:
        """Version and epoch. Raises NewerStore, WrongStore."""
        fleet, version, epoch, self.bus = self._one("SELECT fleet, version, epoch, bus FROM caesura.store")
        if fleet != self._options.fleet:
            raise self._wrong(
                f"is the store of fleet {fleet!r}, and this coordinator is of fleet {self._options.fleet!r}: give each fleet a database of its own"
            )
        if version > self._version:
            raise NewerStore(
                f"{self.label} has schema version {version}, this Caesura knows {self._version}: run the newer version (docs/operate/upgrade.md)"
            )
        return version, epoch

    def _wrong(self, why: str) -> WrongStore:
        return WrongStore(f"{self.label} {why}")

    def _superseded(self) -> StoreError:
        return StoreError(f"another coordinator has claimed a higher epoch than {self._epoch} in it")

    # -- rows --

    @contextmanager
    def _fenced(self, epoch: int) -> Iterator[None]:
        """A transaction that is nothing if another process leads. It holds the row of the epoch until it ends."""
        with self._made.transaction():
            done = self._made.execute(
                "UPDATE caesura.store SET beat = beat + 1, epoch = %s WHERE epoch = %s", (epoch, self._epoch)
            )
            if done.rowcount != 1:
                raise self._superseded()
            yield

    def _table(self, table: str, reading: _Reading) -> tuple[tuple[str, ...], list[Row]]:
        """Columns and rows of a table, with signs of life between chunks of rows."""
        names = [
            name
            for (name,) in self._made.execute(
                "SELECT attname FROM pg_catalog.pg_attribute JOIN pg_catalog.pg_class ON pg_class.oid = attrelid "
                "JOIN pg_catalog.pg_namespace ON pg_namespace.oid = relnamespace WHERE nspname = 'caesura' AND relname = %s "
                "AND attnum > 0 AND NOT attisdropped AND attname <> 'row_number' ORDER BY attnum",
                (table,),
            )
        ]
        chosen = sql.SQL(", ").join(sql.Identifier(name) for name in ("row_number", *names))
        query = sql.SQL("SELECT {} FROM caesura.{} WHERE row_number > %s ORDER BY row_number LIMIT %s")
        rows: list[Row] = []
        with self._made.cursor(binary=True) as cursor:
            last, more = -(2**63), True
            while more:
                chunk = cursor.execute(
                    query.format(chosen, sql.Identifier(table)), (last, _CHUNK_ROWS)
                ).fetchall()
                rows += chunk
                self.answers += 1
                if more := len(chunk) == _CHUNK_ROWS:
                    last = chunk[-1][0]
                    self._beat_in(reading)
        return tuple(names), rows

    def _beat_in(self, reading: _Reading) -> None:
        if (now := time.monotonic()) - reading.beat_at >= self._options.lease_s / _BEATS:
            self._step(
                "UPDATE caesura.store SET beat = beat + 1 WHERE epoch = %s AND beat = %s",
                reading.epoch,
                reading.beat,
            )
            reading.beat, reading.beat_at = reading.beat + 1, now

    def _remove(self, table: str, numbers: Sequence[int]) -> None:
        if numbers:
            self._made.execute(
                sql.SQL("DELETE FROM caesura.{} WHERE row_number = ANY(%s)").format(sql.Identifier(table)),
                (list(numbers),),
            )

    def _upsert(self, table: str, columns: TableColumns, rows: Sequence[Row]) -> None:
        names = columns.names
        kinds = ("bigint", *(_TYPES[kind] for _, kind in columns.of))
        statement = sql.SQL(
            "INSERT INTO caesura.{table} (row_number, {names}) SELECT * FROM unnest({arrays}) "
            "ON CONFLICT (row_number) DO UPDATE SET {changes}"
        ).format(
            table=sql.Identifier(table),
            names=sql.SQL(", ").join(map(sql.Identifier, names)),
            arrays=sql.SQL(", ").join(sql.SQL("%b::{}[]").format(sql.SQL(kind)) for kind in kinds),
            changes=sql.SQL(", ").join(
                sql.SQL("{name} = EXCLUDED.{name}").format(name=sql.Identifier(name)) for name in names
            ),
        )
        for chunk in _chunks(rows):
            self.answers += 1
            self._made.execute(statement, [list(values) for values in zip(*chunk, strict=True)])

    def _one(self, query: str, *values: Any) -> Any:
        return self._one_of(self._made, query, *values)

    @staticmethod
    def _one_of(session: psycopg.Connection[Any], query: str, *values: Any) -> Any:
        found = session.execute(query.encode(), values).fetchone()
        if found is None:
            raise StoreError("the database has no row where it should have one")
        return found

    @contextmanager
    def _translated(self, what: str) -> Iterator[None]:
        """Errors of psycopg as StoreError; the session is not used again, so that no transaction is left open in it."""
        try:
            yield
        except (psycopg.Error, StoreError, WrongStore) as error:
            session, self._session = self._session, None
            if session is not None:
                with suppress(psycopg.Error):
                    session.close()
            if not isinstance(error, psycopg.Error):
                raise
            why = " ".join(str(error).split())
            failed = StoreError(". ".join(filter(None, (f"{what} {self.label}: {why}", advice(why)))))
            failed.temporary = True
            raise failed from error


def _chunks(rows: Sequence[Row]) -> Iterator[list[Row]]:
    chunk: list[Row] = []
    size = 0
    for row in rows:
        chunk.append(row)
        size += sum(len(value) for value in row if isinstance(value, bytes | str))
        if size >= _CHUNK_BYTES:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk
