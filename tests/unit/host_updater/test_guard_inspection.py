"""The pause guard is asked ahead of the first pause which ways out are none for it."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest

from caesura_host_updater import guard_inspection
from caesura_host_updater.guard_client import GuardUnavailable
from caesura_host_updater.guard_inspection import GuardInspection
from caesura_vmcontrol.libvirt_rpc import LibvirtPlan

_PLAN = LibvirtPlan("web-1", "/s", "qemu:///system", "783136f9-2b12-4ee3-8a40-5eee38a7cccd", 7, 0, 0, ("/q",))
_VMS = ["web-1", "web-2"]


class World:
    """A driver with two domains, and a guard that says of it what a test wants."""

    def __init__(self) -> None:
        self.busy = False
        self.news: bool | Exception = True
        self.asked: list[list[str]] = []
        self.planned: list[str] = []
        self.opened: list[list[str]] = []
        self.has_asked = asyncio.Event()
        self.changes = 0
        given: Any = self
        self.inspection = GuardInspection(given, given, lambda: _VMS, lambda: self.busy, self._changed)

    def members(self) -> tuple[object, ...]:
        return ()

    def resume_plan(self, vm: str) -> LibvirtPlan:
        self.planned.append(vm)
        return replace(_PLAN, vm=vm)

    async def inspect(self, plans: list[LibvirtPlan]) -> bool:
        self.asked.append([plan.vm for plan in plans])
        self.has_asked.set()
        if isinstance(self.news, Exception):
            raise self.news
        return self.news

    def _changed(self) -> None:
        self.changes += 1

    async def ask(self) -> None:
        """Once, to its end."""
        self.has_asked.clear()
        self.inspection.ask()
        async with asyncio.timeout(60):
            await self.has_asked.wait()
        await asyncio.sleep(0)


async def test_what_is_new_is_published() -> None:
    world = World()
    running = asyncio.create_task(world.inspection.run())
    await world.ask()
    assert (world.asked, world.changes) == ([_VMS], 1)
    world.news = False
    await world.ask()
    assert world.changes == 1
    running.cancel()


async def test_a_guard_of_an_earlier_release_is_asked_again_later() -> None:
    world = World()
    running = asyncio.create_task(world.inspection.run())
    world.news = GuardUnavailable("cannot do 'inspect'")
    await world.ask()
    world.news = True
    await world.ask()
    assert world.changes == 1
    running.cancel()


async def test_in_an_operation_the_guard_has_more_urgent_work_and_the_host_updater_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Many plans take the event loop's time, and a dead daemon would be connected to again and again."""
    world = World()
    monkeypatch.setattr(
        guard_inspection, "open_ahead", lambda plans: world.opened.append([plan.vm for plan in plans])
    )
    world.busy = True
    running = asyncio.create_task(world.inspection.run())
    world.inspection.ask()
    for _ in range(5):
        await asyncio.sleep(0)
    assert (world.asked, world.planned, world.opened) == ([], [], [])
    world.busy = False
    await world.ask()
    assert (world.asked, world.planned, world.opened) == ([_VMS], _VMS, [_VMS])
    running.cancel()
