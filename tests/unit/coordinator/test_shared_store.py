"""The store that coordinators share, on a database that only says that it is one."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest

from caesura.bus.memory import MemoryBroker, MemoryBus
from caesura.runtime import shared_rows
from caesura.runtime.errors import StoreError
from caesura.runtime.shared_rows import Content, TableChanges
from caesura_coordinator import takeover
from caesura_coordinator.service import Coordinator, is_another, subscriptions
from caesura_coordinator.shared_store import SharedStore, working_copy
from caesura_coordinator.store import MIGRATIONS
from caesura_coordinator.takeover import hold_off_s
from caesura_testing.collector import eventually
from caesura_testing.patience import patient


class Rows:
    """A database that gives the lead to whoever asks."""

    label = "postgresql://db/caesura"

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.answers = 0
        self.beats = 0
        self.bus = ""
        self.epoch = 0
        self.meanwhile: Callable[[], None] = lambda: None
        """What happens while everything is read."""
        self.rows: dict[str, tuple[tuple[str, ...], list[tuple[object, ...]]]] = {}

    def open(self) -> int:
        return self.epoch

    def try_lead(self, name: str, may: Callable[[int], bool] = lambda _: True) -> Content | None:
        self.asked.append(name)
        self.meanwhile()
        if not may(self.epoch):
            return None
        self.epoch += 1
        return Content(version=len(MIGRATIONS), epoch=self.epoch, rows=self.rows)

    def write(self, epoch: int, _: Sequence[TableChanges]) -> None:
        self.epoch = epoch

    def rewrite(self, _: Content) -> None:
        raise AssertionError

    def beat(self) -> None:
        self.beats += 1
        self.answers += 1

    def led_on(self, bus: str) -> None:
        self.bus = bus

    def close(self) -> None:
        pass


def shared_with(rows: Rows, lease_s: float = 30.0, hold_off_s: float = 0.0) -> SharedStore:
    store, copy = working_copy()
    return SharedStore(store, copy, lambda: rows, name="c", lease_s=lease_s, hold_off_s=hold_off_s)


def test_who_loses_the_lead_again_and_again_asks_less_often() -> None:
    waits = [hold_off_s(losses) for losses in range(20)]
    assert waits[:2] == [0.0, 0.0]
    assert waits[2] > 0
    assert waits == sorted(waits)
    assert waits[-1] == waits[-2] <= 300


async def test_a_standby_that_holds_off_says_so_and_does_not_ask_for_the_lead() -> None:
    rows = Rows()
    shared = shared_with(rows, hold_off_s=3600.0)
    waiting = asyncio.create_task(shared.lead())
    await asyncio.sleep(0)
    assert "lost the lead" in shared.waits_for
    for _ in range(100):
        await asyncio.sleep(0)
    assert not rows.asked
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    at_once = shared_with(rows)
    async with asyncio.timeout(patient(10)):
        await at_once.lead()
    assert rows.asked == ["c"]


async def test_a_take_over_takes_its_time_in_the_thread_and_gives_signs_of_life(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows = Rows()
    rows.rows["owner"] = (("vm", "host", "epoch"), [(1, "w0", "h0", 4)])
    loops = threading.current_thread()
    real = shared_rows.insert

    def slow(*values: Any) -> None:
        assert threading.current_thread() is not loops
        while rows.beats < 20:  # five leases
            time.sleep(0.01)
        real(*values)

    monkeypatch.setattr(takeover, "insert", slow)
    shared = shared_with(rows, lease_s=0.4)
    async with asyncio.timeout(patient(30)):
        assert await shared.lead() == []
    assert shared.store.owners() == {"w0": ("h0", 4)}
    assert shared.store.epoch() == 1
    # What was filled in does not count as changed, and what changes from here on does.
    assert shared._copy.take() == []
    with shared.store.transaction():
        shared.store.save_owner("w1", "h1", 5)
    assert [each.table for each in shared._copy.take()] == ["owner"]


async def test_content_that_cannot_be_read_is_not_led_and_named() -> None:
    rows = Rows()
    rows.rows["rollout"] = (("id", "body"), [(1, "r", b"{")])
    with pytest.raises(StoreError, match="rollout r in the store"):
        await shared_with(rows).lead()


async def test_a_take_over_in_which_the_database_falls_silent_is_given_up() -> None:
    released = threading.Event()

    class Silent(Rows):
        def try_lead(self, name: str, may: Callable[[int], bool] = lambda _: True) -> Content | None:
            if not self.asked:
                self.asked.append(name)
                released.wait()
            return super().try_lead(name, may)

    rows = Silent()
    shared = shared_with(rows, lease_s=0.2)
    waiting = asyncio.create_task(shared.lead())
    async with asyncio.timeout(patient(30)):
        while "no answer of postgresql://db/caesura" not in shared.waits_for:  # noqa: ASYNC110 - a state, no event
            await asyncio.sleep(0.01)
        released.set()
        await waiting
    assert shared.leads


async def test_a_coordinator_on_another_broker_where_nothing_has_an_epoch_does_not_lead() -> None:
    """Else it would take the lead at the next restart of the leader, and halt rollouts of which it hears nothing."""
    rows, here, there = Rows(), MemoryBroker(), MemoryBroker()

    @asynccontextmanager
    async def coordinator(broker: MemoryBroker, label: str) -> AsyncIterator[Coordinator]:
        shared = shared_with(rows)
        bus = MemoryBus(broker, client_id=label, filters=subscriptions(), clean=False)
        made = Coordinator(bus, shared.store, instance="c", settle_s=0.01, shared=shared, bus_label=label)
        tasks = [asyncio.ensure_future(start()) for start in made.tasks().values()]
        try:
            yield made
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async with coordinator(here, "mqtt://a:1883") as made:
        await eventually(lambda: made.is_leader and rows.bus == "mqtt://a:1883")
    async with coordinator(there, "mqtt://b:1883") as made:
        shared = made.shared
        assert shared is not None
        await eventually(lambda: "on mqtt://b:1883: the store was led on mqtt://a:1883" in shared.waits_for)
        assert not made.is_leader
    # The same one by another address: what it retains says so.
    async with coordinator(here, "mqtt://b:1883") as made:
        await eventually(lambda: made.is_leader)
    assert is_another("mqtt://a:1,mqtt://b:1", "mqtt://c:1")
    assert not is_another("mqtt://a:1,mqtt://b:1", "mqtt://b:1,mqtt://c:1")
    assert not is_another("mqtt://a:1", "")


async def test_what_comes_into_the_way_while_everything_is_read_ends_the_take_over_without_an_epoch() -> None:
    """As the claim of a coordinator with another store: both would claim above each other."""
    database, in_the_way = Rows(), [""]

    def arrives() -> None:
        in_the_way[0] = "the end of coordinator stranger"

    database.meanwhile = arrives
    store, copy = working_copy()
    shared = SharedStore(store, copy, lambda: database, name="c", lease_s=patient(5.0), poll_s=0.01)
    leading = asyncio.create_task(shared.lead(lambda _: in_the_way[0]))
    await eventually(lambda: shared.waits_for == "the end of coordinator stranger")
    assert len(database.asked) == 1
    assert database.epoch == 0
    assert not leading.done()
    database.meanwhile = lambda: None
    in_the_way[0] = ""
    await leading
    assert shared.leads
    shared.close()
