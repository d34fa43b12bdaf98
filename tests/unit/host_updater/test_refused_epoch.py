"""A host says why it does not obey an epoch, where the coordinator and operators read it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from caesura.bus.memory import MemoryBus
from caesura.bus.port import Delivery
from caesura.contract.codec import decode, encode
from caesura.contract.messages import CoordinatorPresence, HostInventory
from caesura.contract.topics import channel_of
from caesura.testing.collector import Collector, eventually, running
from caesura_host_updater.command import Authority
from caesura_host_updater.hostfile import HostFile
from caesura_host_updater.journal import Journal, JournalThread
from caesura_host_updater.service import HostUpdater


class Driver:
    """Of no VM; the guard as well."""

    name = "made-up"
    on_lost: Any = None
    state = "ready"

    async def run(self) -> None:
        """The guard: not started."""

    def resume_plan(self, _: str) -> None:
        return None

    def detail(self) -> str:
        return ""

    def capabilities(self, vm: str) -> None:
        raise AssertionError(f"there is no VM {vm}")

    async def read_states(self) -> dict[str, str]:
        return {}


async def test_a_leap_is_refused_in_the_inventory_until_something_believable_is_announced(
    tmp_path: Path, updater_with: Callable[..., HostUpdater]
) -> None:
    journal = JournalThread()
    await journal.open(str(tmp_path / "journal.sqlite"))
    updater = updater_with(HostFile(host="host-1"), journal, driver=Driver(), metrics=SimpleNamespace())
    got = Collector()
    ear = MemoryBus(
        updater.bus._broker,  # type: ignore[attr-defined]
        client_id="ear",
        filters=["caesura/v1/host/+/inventory"],
    )

    async def announce(epoch: int) -> None:
        message = CoordinatorPresence(coordinator=f"c{epoch}", epoch=epoch, online=True)
        payload = encode(message, source="/c", event_id="e", time=datetime.now(UTC))
        await updater.post.deliver(Delivery(channel_of(CoordinatorPresence).topic(), payload))

    def last() -> HostInventory | None:
        message = (
            decode(got.deliveries[-1].topic, got.deliveries[-1].payload).message if got.deliveries else None
        )
        return message if isinstance(message, HostInventory) else None

    async with running(updater.bus), running(ear, got.receive):
        keeping = asyncio.ensure_future(updater.tasks()["inventory"]())
        await announce(7)
        await eventually(lambda: last() is not None and last().epoch == 7)  # type: ignore[union-attr]
        await announce(5000)
        await eventually(lambda: "epoch 5000 is more than 1000 above epoch 7" in last().refused_epoch)  # type: ignore[union-attr]
        assert last().epoch == 7  # type: ignore[union-attr]
        assert updater.authority == Authority(7, "c7")
        await announce(8)
        await eventually(lambda: last().epoch == 8 and not last().refused_epoch)  # type: ignore[union-attr]
        keeping.cancel()
    assert await journal.do(Journal.authority) == Authority(8, "c8")
    await journal.close()
