"""The outbox in a service's own SQLite file, so that a state and its announcement are stored in one transaction."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Any, Protocol, TypeVar

import msgspec

from caesura.contract.codec import ContractError, decode
from caesura.delivery.message import OutboxMessage
from caesura.runtime.database import Database
from caesura.runtime.logs import get_logger
from caesura.runtime.threads import in_thread

SCHEMA = """
    CREATE TABLE outbox (
        number INTEGER PRIMARY KEY AUTOINCREMENT, event_id TEXT NOT NULL UNIQUE, type TEXT NOT NULL,
        topic TEXT NOT NULL, payload BLOB NOT NULL, retain INTEGER NOT NULL
    );
    CREATE INDEX outbox_topic ON outbox (topic);
"""
"""The table, for a migration of the service's own schema."""

T = TypeVar("T")
_log = get_logger("caesura.outbox")


class OutboxTable:
    """The synchronous side; raises StoreError from every method.

    Args:
        database: the file with a table as in ``SCHEMA``.
    """

    def __init__(self, database: Database) -> None:
        self._database = database
        self.unreadable = 0
        """Messages that the last ``load`` could not read."""

    def add(self, messages: Iterable[OutboxMessage]) -> None:
        """See ``OutboxStore.add``. Call inside a transaction."""
        for each in messages:
            if each.retain:
                self._database.run(
                    "DELETE FROM outbox WHERE topic = ? AND retain AND event_id <> ?",
                    each.topic,
                    each.event_id,
                )
            self._database.run(
                "INSERT OR IGNORE INTO outbox (event_id, type, topic, payload, retain) VALUES (?, ?, ?, ?, ?)",
                each.event_id,
                each.type,
                each.topic,
                each.payload,
                each.retain,
            )

    def add_all(self, messages: Iterable[OutboxMessage]) -> None:
        """``add`` in a transaction of its own."""
        with self._database.transaction():
            self.add(messages)

    def load(self) -> list[OutboxMessage]:
        """See ``OutboxStore.load``. Unreadable rows stay in the table: a newer version may have written them."""
        found = []
        self.unreadable = 0
        rows = self._database.run(
            "SELECT number, event_id, type, topic, payload, retain FROM outbox ORDER BY number"
        )
        for number, *row in rows:
            try:
                found.append(_read(row))
            except (ContractError, msgspec.ValidationError) as error:
                self.unreadable += 1
                _log.error(
                    "outbox.unreadable",
                    store=self._database.path,
                    number=number,
                    why=str(error),
                    advice="it is kept and not published. If a newer Caesura wrote it, run that one; else it is damaged, and "
                    "DELETE FROM outbox WHERE number = ... removes it",
                )
        return found

    def remove(self, event_ids: Iterable[str]) -> None:
        """See ``OutboxStore.remove``."""
        with self._database.transaction():
            for each in event_ids:
                self._database.run("DELETE FROM outbox WHERE event_id = ?", each)

    def count(self) -> int:
        """How many messages are kept."""
        ((count,),) = self._database.run("SELECT count(*) FROM outbox")
        return int(count)


def _read(row: Sequence[Any]) -> OutboxMessage:
    event_id, kind, topic, payload, retain = row
    message = msgspec.convert(
        {"event_id": event_id, "type": kind, "topic": topic, "payload": payload, "retain": bool(retain)},
        OutboxMessage,
        builtin_types=(bytes,),
    )
    if message.payload:
        decode(message.topic, message.payload)
    return message


class OffLoop(Protocol):
    """Runs work on the table outside the event loop."""

    def __call__(self, work: Callable[[OutboxTable], T], /) -> Awaitable[T]: ...


class SqliteOutbox:
    """The table as an ``OutboxStore``.

    Args:
        off_loop: runs a function with the table in another thread. StoreError propagates.
    """

    def __init__(self, off_loop: OffLoop) -> None:
        self._off_loop = off_loop
        self.unreadable = 0
        """Stored messages that cannot be read, as found by ``load``."""

    async def add(self, messages: Sequence[OutboxMessage]) -> None:
        """See ``OutboxStore.add``."""
        await self._off_loop(lambda table: table.add_all(messages))

    async def load(self) -> list[OutboxMessage]:
        """See ``OutboxStore.load``."""

        def loaded(table: OutboxTable) -> tuple[list[OutboxMessage], int]:
            return table.load(), table.unreadable

        found, self.unreadable = await self._off_loop(loaded)
        return found

    async def remove(self, event_ids: Iterable[str]) -> None:
        """See ``OutboxStore.remove``."""
        wanted = list(event_ids)
        await self._off_loop(lambda table: table.remove(wanted))


def beside(path: str) -> OffLoop:
    """Work on the outbox of a file that the event loop's thread has open, over a second connection in a thread.

    It is not synced to disk by itself: a power cut can only undo a removal, and then the message is sent again.
    """

    def off_loop(work: Callable[[OutboxTable], T]) -> Awaitable[T]:
        def attempt() -> T:
            database = Database(path, None)
            try:
                return work(OutboxTable(database))
            finally:
                database.close()

        return in_thread("outbox", attempt)

    return off_loop
