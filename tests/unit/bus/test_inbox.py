from __future__ import annotations

import asyncio

import msgspec

from caesura.bus.inbox import Inbox


class Item(msgspec.Struct, frozen=True):
    qos: int
    size_bytes: int = 1


def state(inbox: Inbox[Item]) -> str:
    if inbox.overfull:
        return "overfull"
    if inbox.full:
        return "full"
    return "low" if inbox.low else "between"


async def test_first_in_first_out_and_get_waits() -> None:
    inbox = Inbox[Item](10, 1000)
    waiting = asyncio.create_task(inbox.get())
    await asyncio.sleep(0)
    first, second = Item(1), Item(0)
    assert inbox.put(first)
    assert inbox.put(second)
    assert await waiting is first
    assert await inbox.get() is second
    assert len(inbox) == inbox.size_bytes == 0


async def test_qos_0_is_dropped_at_the_limit_and_qos_1_never() -> None:
    inbox = Inbox[Item](3, 1000)
    assert [inbox.put(Item(0)) for _ in range(5)] == [True, True, True, False, False]
    assert all(inbox.put(Item(1)) for _ in range(5))
    assert len(inbox) == 8


async def test_only_qos_1_makes_it_full_and_half_empty_makes_it_low() -> None:
    inbox = Inbox[Item](4, 1000)
    for _ in range(4):
        inbox.put(Item(0))
    assert state(inbox) == "low"
    for _ in range(4):
        inbox.put(Item(1))
    assert state(inbox) == "full"
    for _ in range(4 + 1):
        await inbox.get()
    assert state(inbox) == "between"
    await inbox.get()
    assert state(inbox) == "low"


async def test_bytes_are_counted_too() -> None:
    inbox = Inbox[Item](100, 1000)
    inbox.put(Item(1, 499))
    assert state(inbox) == "between"
    inbox.put(Item(1, 1))
    assert state(inbox) == "full"
    assert not inbox.put(Item(0, 1))
    inbox.put(Item(1, 500))
    assert state(inbox) == "overfull"
    await inbox.get()
    assert state(inbox) == "full"
    await inbox.get()
    await inbox.get()
    assert state(inbox) == "low"


async def test_a_closed_inbox_gives_nothing_more_and_wakes_who_waits() -> None:
    inbox = Inbox[Item](10, 1000)
    waiting = asyncio.create_task(inbox.get())
    await asyncio.sleep(0)
    inbox.put(Item(1))
    inbox.close()
    assert await waiting is None
    assert await inbox.get() is None
