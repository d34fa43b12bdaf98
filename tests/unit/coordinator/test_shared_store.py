"""The store that coordinators share, on a database that only says that it is one."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from caesura.runtime.shared_rows import Content, TableChanges
from caesura_coordinator.shared_store import SharedStore, hold_off_s, working_copy
from caesura_coordinator.store import MIGRATIONS
from caesura_testing.patience import patient


class Rows:
    """A database that gives the lead to whoever asks."""

    label = "postgresql://db/caesura"

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.rows: dict[str, tuple[tuple[str, ...], list[tuple[object, ...]]]] = {}

    def open(self) -> int:
        return 0

    def try_lead(self, name: str) -> Content | None:
        self.asked.append(name)
        return Content(version=len(MIGRATIONS), epoch=1, rows=self.rows)

    def write(self, epoch: int, changes: Sequence[TableChanges]) -> None:
        pass

    def rewrite(self, _: Content) -> None:
        raise AssertionError

    def beat(self) -> None:
        pass

    def close(self) -> None:
        pass


def shared_with(rows: Rows, **more: float) -> SharedStore:
    store, copy = working_copy()
    return SharedStore(store, copy, lambda: rows, name="c", lease_s=30.0, **more)


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
