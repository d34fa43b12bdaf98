"""What every store of an outbox promises."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from caesura.contract.messages import AgentPresence, HookFinished
from caesura.delivery.message import OutboxMessage, clearing, prepare
from caesura.delivery.outbox_store import MemoryOutbox, OutboxStore
from caesura.delivery.sqlite_outbox import SCHEMA, OutboxTable, SqliteOutbox, beside
from caesura.runtime.database import Database
from caesura.runtime.errors import StoreError
from caesura_host_updater.journal import JournalThread

NOW = datetime(2026, 1, 1, tzinfo=UTC)


def fact(number: int, vm: str = "a") -> OutboxMessage:
    """Something that happened."""
    message = HookFinished(vm=vm, event_id="e", hook="prepare", outcome="succeeded", seconds=float(number))
    return prepare(message, source="/caesura/test", event_id=f"{vm}-{number}", at=NOW, vm=vm)


def state(number: int, vm: str = "a") -> OutboxMessage:
    """Something that is so, retained."""
    message = AgentPresence(vm=vm, online=True, boot_id=str(number))
    return prepare(message, source="/caesura/test", event_id=f"state-{vm}-{number}", at=NOW, vm=vm)


def names_in(folder: Path) -> list[str]:
    """Of its files."""
    return [each.name for each in folder.iterdir()]


@pytest.fixture(params=["memory", "second connection", "journal"])
async def store(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[OutboxStore]:
    """Every store in turn."""
    path = str(tmp_path / "store.sqlite")
    if request.param == "memory":
        yield MemoryOutbox()
    elif request.param == "journal":
        journal = JournalThread()
        await journal.open(path)
        yield SqliteOutbox(journal.outbox)
        await journal.close()
    else:
        first = Database(path, [SCHEMA])
        yield SqliteOutbox(beside(path))
        first.close()


async def test_what_was_added_is_loaded_in_order_byte_for_byte(store: OutboxStore) -> None:
    added = [fact(3), fact(1), state(1), fact(2, "b")]
    await store.add(added[:2])
    await store.add(added[2:])
    assert await store.load() == added


async def test_what_is_removed_is_not_loaded_and_the_rest_stays(store: OutboxStore) -> None:
    added = [fact(number) for number in range(5)]
    await store.add(added)
    await store.remove([added[1].event_id, added[3].event_id, "never added"])
    await store.remove([])
    assert await store.load() == [added[0], added[2], added[4]]


async def test_the_same_id_again_changes_nothing(store: OutboxStore) -> None:
    await store.add([fact(1), fact(2)])
    await store.add([fact(1)])
    assert await store.load() == [fact(1), fact(2)]


async def test_a_retained_message_replaces_those_of_its_topic_and_a_fact_none(store: OutboxStore) -> None:
    await store.add([state(1), state(1, "b"), fact(1), fact(2), state(2)])
    assert await store.load() == [state(1, "b"), fact(1), fact(2), state(2)]
    removal = clearing(AgentPresence, event_id="clear", vm="a")
    await store.add([removal])
    assert await store.load() == [state(1, "b"), fact(1), fact(2), removal]


@pytest.mark.parametrize(
    ("column", "value"),
    [("payload", b"{}"), ("payload", "text"), ("topic", "not/of/ours"), ("event_id", 7), ("type", None)],
)
async def test_what_nobody_could_read_is_left_out_by_name_and_stays(
    column: str, value: Any, tmp_path: Path
) -> None:
    path = str(tmp_path / "store.sqlite")
    first = Database(path, [SCHEMA.replace("type TEXT NOT NULL", "type TEXT")])
    table = OutboxTable(first)
    table.add_all([fact(1), fact(2), fact(3)])
    first.run(f"UPDATE outbox SET {column} = ? WHERE number = 2", value)  # noqa: S608 - of the parameters above
    if column == "event_id":  # SQLite makes a text of it
        first.run("UPDATE outbox SET payload = '' WHERE number = 2")
    with capture_logs() as logs:
        outbox = SqliteOutbox(beside(path))
        assert await outbox.load() == [fact(1), fact(3)]
        assert outbox.unreadable == 1
    assert [each["event"] for each in logs] == ["outbox.unreadable"]
    assert table.count() == 3, "a newer version may read it"
    first.close()


async def test_a_file_that_is_not_there_is_a_store_error_and_is_not_made(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="cannot open"):
        await SqliteOutbox(beside(str(tmp_path / "none.sqlite"))).load()
    assert not names_in(tmp_path)
