"""A host says why it does not obey an epoch, where the coordinator and operators read it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from structlog.testing import capture_logs

from caesura.bus.memory import MemoryBus
from caesura.bus.port import Delivery
from caesura.contract.codec import decode, encode
from caesura.contract.messages import CoordinatorPresence, HostInventory
from caesura.contract.topics import channel_of
from caesura.lifecycle.command_compatibility import COMMANDS
from caesura_host_updater.epoch_authority import EpochAuthority
from caesura_host_updater.inventory.host_config import HostFile
from caesura_host_updater.journal import Journal, JournalThread
from caesura_host_updater.service import HostUpdater
from caesura_testing.collector import Collector, eventually, running


class Driver:
    """Of no VM; the guard as well."""

    name = "made-up"
    on_lost: Any = None
    state = "ready"

    def pause_risk(self, _vm: str) -> str:
        return ""

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


@pytest.fixture
async def one(tmp_path: Path, updater_with: Callable[..., HostUpdater]) -> AsyncIterator[Host]:
    journal = JournalThread()
    await journal.open(str(tmp_path / "journal.sqlite"))
    updater = updater_with(HostFile(host="host-1"), journal, driver=Driver(), metrics=SimpleNamespace())
    got = Collector()
    ear = MemoryBus(
        updater.bus._broker,  # type: ignore[attr-defined]
        client_id="ear",
        filters=["caesura/v1/host/+/inventory"],
    )
    async with running(updater.bus), running(ear, got.receive):
        keeping = asyncio.ensure_future(updater.tasks()["inventory"]())
        yield Host(updater, journal, got)
        keeping.cancel()
    await journal.close()


class Host:
    """A host updater without VMs that is announced coordinators, and what its inventory says."""

    def __init__(self, updater: HostUpdater, journal: JournalThread, got: Collector) -> None:
        self.updater = updater
        self.journal = journal
        self._got = got

    async def announce(self, epoch: int, commands: tuple[str, ...] = COMMANDS) -> None:
        message = CoordinatorPresence(coordinator=f"c{epoch}", epoch=epoch, online=True, commands=commands)
        payload = encode(message, source="/c", event_id="e", time=datetime.now(UTC))
        await self.updater.post.deliver(Delivery(channel_of(CoordinatorPresence).topic(), payload))

    async def says(self, holds: Callable[[HostInventory], bool]) -> None:
        await eventually(lambda: (last := self._last()) is not None and holds(last))

    def _last(self) -> HostInventory | None:
        if not self._got.deliveries:
            return None
        message = decode(self._got.deliveries[-1].topic, self._got.deliveries[-1].payload).message
        return message if isinstance(message, HostInventory) else None


async def test_a_leap_is_refused_in_the_inventory_until_something_believable_is_announced(one: Host) -> None:
    await one.announce(7)
    await one.says(lambda last: last.epoch == 7)
    await one.announce(5000)
    await one.says(
        lambda last: "epoch 5000 is more than 1000 above epoch 7" in last.refused_epoch and last.epoch == 7
    )
    assert one.updater.epochs.authority == EpochAuthority(7, "c7")
    await one.announce(8)
    await one.says(lambda last: last.epoch == 8 and not last.refused_epoch)
    assert await one.journal.do(Journal.authority) == EpochAuthority(8, "c8")


async def test_a_coordinator_whose_commands_would_not_arrive_is_refused_until_it_is_upgraded(
    one: Host,
) -> None:
    """A coordinator of before 0.1.0 announces no commands: it sends them on topics that this host does not read."""
    await one.announce(7, commands=())
    await one.says(
        lambda last: "does not send caesura.operation.start.v1" in last.refused_epoch and last.epoch == 0
    )
    assert one.updater.epochs.authority == EpochAuthority()
    await one.announce(8)
    await one.says(lambda last: (last.epoch, last.coordinator, last.refused_epoch) == (8, "c8", ""))
    await one.announce(9, commands=(*COMMANDS, "caesura.operation.of-a-later-version.v1"))
    await one.says(lambda last: last.epoch == 9 and not last.refused_epoch)


async def test_a_coordinator_that_was_obeyed_before_the_upgrade_sees_that_it_is_not_obeyed_any_more(
    one: Host,
) -> None:
    """Its fence compares epoch and coordinator: with both as they were it would command, and wait for an answer."""
    one.updater.epochs.authority = EpochAuthority(7, "c7")
    await one.announce(7, commands=())
    await one.says(
        lambda last: (
            (last.epoch, last.coordinator) == (7, "") and "upgrade the coordinator" in last.refused_epoch
        )
    )
    assert one.updater.epochs.authority == EpochAuthority(7, "c7"), "an older epoch stays refused"
    await one.announce(6)
    assert one.updater.epochs.authority == EpochAuthority(7, "c7")


async def test_what_is_refused_is_logged_once(one: Host) -> None:
    with capture_logs() as logs:
        for _ in range(5):
            await one.announce(7, commands=())
    assert [line["event"] for line in logs if line["log_level"] == "error"] == ["coordinator.outdated"]
