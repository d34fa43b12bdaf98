"""A VM that a new life found paused, and that runs long after the host is on the bus again."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from caesura.contract.messages import StartOperation
from caesura.delivery.message import OutboxMessage, prepare
from caesura.delivery.sqlite_outbox import OutboxTable
from caesura_host_updater.clocks.verdict import ClockCheck
from caesura_host_updater.command_admission import Underway
from caesura_host_updater.journal import JournalThread
from caesura_host_updater.operation import crash_recovery
from caesura_host_updater.operation.crash_recovery import CrashRecovery
from caesura_host_updater.operation.finalizer import OperationFinalizer
from caesura_host_updater.operation.state import Operation, VmPause
from caesura_host_updater.pause_markers import PauseMarkers
from caesura_vmcontrol.procfs import boot_id
from caesura_vmcontrol.resume_plans import CgroupPlan


class Slow:
    """A driver and a guard: the VM runs when it is told."""

    def __init__(self) -> None:
        self.go = asyncio.Event()

    async def open(self) -> None:
        """Nothing to adopt."""

    def health_error(self, _: str) -> str:
        return ""

    async def read_states(self) -> dict[str, str]:
        return {"a": "running" if self.go.is_set() else "paused"}

    async def resume(self, *_: object) -> str:
        await self.go.wait()
        return "running"

    async def release(self, _: str) -> None:
        """Nothing was prepared."""

    def resume_plan(self, vm: str) -> CgroupPlan:
        return CgroupPlan(vm, "cgroup2", f"/sys/fs/cgroup/caesura-made-up/{vm}/cgroup.freeze")

    async def start(self) -> None:
        """Nothing is held."""


async def test_its_resume_is_told_its_clock_is_looked_after_and_its_operation_ends_not_before(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    freeze_one: Callable[..., StartOperation],
    marked: Callable[..., PauseMarkers],
) -> None:
    """Until it runs nobody knows how long it is paused (I4, I7)."""
    monkeypatch.setattr(crash_recovery, "_PATIENCE_S", 0.0)
    vm = VmPause(vm="a", set="web", update_domain=0, called_at=1.0, frozen_at=1.5)
    command = freeze_one()
    state = Operation(operation="op", method="freeze", budget_s=10.0, vms=(vm,), phase="frozen")
    journal = JournalThread()
    await journal.open(str(tmp_path / "journal.sqlite"))
    await journal.do(lambda j: j.accept(command, state, boot_id(), []))
    world: Any = Slow()
    queued: list[OutboxMessage] = []
    waits: list[ClockCheck] = []
    nothing: Any = SimpleNamespace(
        queue=lambda *letters: queued.extend(letters), track=waits.extend, finished=lambda *_: None
    )
    place: dict[str, Any] = {"set": "web", "ud": 0, "vm": "a", "host": "host-1"}
    fact_factory: Any = SimpleNamespace(
        fact=lambda fact: prepare(fact, source="/s", event_id=fact.TYPE, at=fact.at, **place),
        report=lambda report: (
            prepare(report, source="/s", event_id=report.status, at=report.at, host="host-1"),
        ),
    )
    finalizer = OperationFinalizer(
        fact_factory, journal=journal, outbox=nothing, clocks=nothing, metrics=nothing
    )
    starting = CrashRecovery(
        "host-1",
        driver=world,
        guard=world,
        journal=journal,
        fact_factory=fact_factory,
        finalizer=finalizer,
        pauses=marked("a"),
        has_clock=lambda _: True,
        resumed={},
    )
    await starting.run(1)
    assert await journal.outbox(OutboxTable.load) == [], "it is paused still"
    assert await finalizer.known("op") == Underway()
    world.go.set()
    await asyncio.gather(*starting.late)
    assert [each.type.split(".")[2] for each in queued] == ["frozen", "resumed", "reported"]
    assert await journal.outbox(OutboxTable.load) == queued
    assert [each.vm for each in waits] == ["a"]
    await journal.close()
