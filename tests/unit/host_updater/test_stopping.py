"""While a command is being taken in: after a stop nothing is paused any more, and no update is asked whether it is installed."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from caesura.contract.messages import StartOperation
from caesura_host_updater import installed_probe, service
from caesura_host_updater.drivers.port import Capabilities, ClockSet, NotPossible
from caesura_host_updater.inventory.host_config import HostFile
from caesura_host_updater.inventory.updates import Catalogue, UpdateFile
from caesura_host_updater.inventory.vm_spec import VmSpec
from caesura_host_updater.journal import Journal, JournalThread
from caesura_host_updater.service import HostUpdater
from caesura_host_updater.update_process import UpdateProcess
from caesura_testing.collector import eventually
from caesura_vmcontrol.resume_plans import CgroupPlan


class Guest:
    """The driver of one VM that takes its time to tell its boot id."""

    name = "slow"
    on_lost: Any = None
    state = "ready"

    def pause_risk(self, _vm: str) -> str:
        return ""

    def __init__(self) -> None:
        self.asked = asyncio.Event()
        self.go = asyncio.Event()
        self.frozen = False

    def health_error(self, _: str) -> str:
        return ""

    async def read_states(self) -> dict[str, str]:
        return {"a": "running"}

    def capabilities(self, _: str) -> Capabilities:
        return Capabilities(methods=("freeze",), missing={}, clock="none")

    async def sync_clock(self, vm: str) -> ClockSet:
        raise NotPossible(vm, "no clock")

    async def guest_boot_id(self, _: str) -> str:
        self.asked.set()
        await self.go.wait()
        return "k"

    async def run(self) -> None:
        """The guard: not started."""

    def resume_plan(self, vm: str) -> CgroupPlan:
        return CgroupPlan(vm, "cgroup2", f"/sys/fs/cgroup/x/{vm}/cgroup.freeze")

    async def arm(self, *_: object) -> None:
        """Armed."""

    async def disarm(self, _: str) -> None:
        return None

    async def freeze(self, *_: object) -> None:
        self.frozen = True

    async def resume(self, *_: object) -> str:
        return "running"


@pytest.mark.parametrize("where", ["while the guests are asked", "while it is written down"])
async def test_a_command_that_is_being_taken_in_when_the_host_stops_pauses_nothing(
    where: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    freeze_one: Callable[..., StartOperation],
    updater_with: Callable[..., HostUpdater],
    hand: Callable[..., Any],
) -> None:
    guest = Guest()
    journal = JournalThread()
    await journal.open(str(tmp_path / "journal.sqlite"))
    file = HostFile(host="host-1", vm=(VmSpec(name="a", set="web", update_domain=0),))
    metrics = SimpleNamespace(finished=lambda *_: None)
    updater = updater_with(file, journal, driver=guest, metrics=metrics)
    operations = asyncio.ensure_future(updater.tasks()["operations"]())
    delivering = asyncio.create_task(hand(updater, freeze_one()))
    await guest.asked.wait()
    if where == "while it is written down":
        accept, loop = Journal.accept, asyncio.get_running_loop()
        draining: list[Any] = []

        def stop(*given: Any) -> None:
            draining.append(asyncio.run_coroutine_threadsafe(updater.drain(), loop))
            accept(*given)

        monkeypatch.setattr(Journal, "accept", stop)
        guest.go.set()
        await delivering
        await asyncio.wrap_future(draining[0])
    else:
        stopping = asyncio.create_task(updater.drain())
        await asyncio.sleep(0)
        guest.go.set()
        await delivering
        await stopping
    found = await journal.do(lambda j: j.find("op"))
    operations.cancel()
    assert not guest.frozen
    assert found is not None
    assert found.report is not None, "it has its end"
    assert found.report.status in {"refused", "cancelled"}
    assert "stopping" in found.report.reason
    await journal.close()


async def test_no_update_is_asked_while_a_command_is_written_down(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    freeze_one: Callable[..., StartOperation],
    updater_with: Callable[..., HostUpdater],
    hand: Callable[..., Any],
) -> None:
    """Its command would run on into the pause: nothing interrupts it any more once the operation has begun."""
    patch = UpdateFile(
        name="patch",
        version="1",
        impact="pause",
        scope="host",
        argv=("true",),
        installed=("true",),
        expected_s=1,
        timeout_s=2,
    )
    probes: list[installed_probe.InstalledProbe] = []
    started: list[str] = []
    start = UpdateProcess.start

    class Known(installed_probe.InstalledProbe):
        def __init__(self, host: str, _: Any, **more: Any) -> None:
            more["catalogue"] = lambda: Catalogue({"patch": patch})
            super().__init__(host, os.environ, **more)
            probes.append(self)

    async def started_one(process: UpdateProcess) -> None:
        started.append("patch")
        await start(process)

    monkeypatch.setattr(service, "InstalledProbe", Known)
    monkeypatch.setattr(UpdateProcess, "start", started_one)
    writing, written = asyncio.Event(), threading.Event()
    accept, loop = Journal.accept, asyncio.get_running_loop()

    def slow_disk(*given: Any) -> None:
        loop.call_soon_threadsafe(writing.set)
        written.wait()
        accept(*given)

    monkeypatch.setattr(Journal, "accept", slow_disk)
    guest = Guest()
    guest.go.set()
    journal = JournalThread()
    await journal.open(str(tmp_path / "journal.sqlite"))
    file = HostFile(host="host-1", vm=(VmSpec(name="a", set="web", update_domain=0),))
    metrics = SimpleNamespace(finished=lambda *_: None)
    updater = updater_with(file, journal, driver=guest, metrics=metrics)
    tasks = [asyncio.ensure_future(updater.tasks()[name]()) for name in ("installed updates", "operations")]
    (asking,) = probes
    await eventually(lambda: asking.answers == {"patch": True})
    delivering = asyncio.create_task(hand(updater, freeze_one()))
    try:
        await writing.wait()
        asking.ask()  # as when a file in updates.d changed
        for _ in range(20):  # the loop turns as often as it likes: nothing is started
            await asyncio.sleep(0)
        assert started == ["patch"], "the one before the command"
        assert not updater.operations.operation, "it is still being written down"
    finally:
        stopping = asyncio.create_task(updater.drain())
        await asyncio.sleep(0)
        written.set()
        await asyncio.gather(delivering, stopping)
        for each in tasks:
            each.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await journal.close()
