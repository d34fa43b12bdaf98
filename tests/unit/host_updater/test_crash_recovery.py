"""What a new life does with VMs that it finds paused."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from caesura.contract.messages import StartOperation
from caesura.delivery.sqlite_outbox import OutboxTable
from caesura_host_updater.drivers.port import DriverError, NotRunningYet
from caesura_host_updater.inventory.host_config import HostFile
from caesura_host_updater.inventory.vm_spec import VmSpec
from caesura_host_updater.journal import JournalThread
from caesura_host_updater.operation import crash_recovery
from caesura_host_updater.operation.crash_recovery import CrashRecovery
from caesura_host_updater.operation.state import Operation, VmPause
from caesura_host_updater.pause_markers import PauseMarkers
from caesura_host_updater.service import HostUpdater
from caesura_vmcontrol import markers
from caesura_vmcontrol.procfs import boot_id
from caesura_vmcontrol.resume_plans import CgroupPlan, ResumePlan


class Fleet:
    """A driver, a guard and a journal that write down what is asked of them."""

    def __init__(self, *resumes: object) -> None:
        self.resumes = list(resumes)
        self.control = "/sys/fs/cgroup/caesura-made-up/a/cgroup.freeze"
        self.state = "paused"
        self.asked: list[str] = []

    async def open(self) -> None:
        """Nothing to adopt."""

    def health_error(self, _: str) -> str:
        return ""

    async def read_states(self) -> dict[str, str]:
        return {"a": self.state, "b": "running"}

    def resume_plan(self, vm: str) -> CgroupPlan:
        return CgroupPlan(vm, "cgroup2", self.control)

    async def resume(self, vm: str, timeout_s: float) -> object:
        assert timeout_s > 0
        self.asked.append(f"resume {vm}")
        answer = self.resumes.pop(0)
        if isinstance(answer, Exception):
            await asyncio.sleep(0.01)
            raise answer
        return answer

    async def release(self, vm: str) -> None:
        self.asked.append(f"release {vm}")
        raise DriverError(vm, "this must not keep the host from starting")

    async def start(self) -> Any:
        return type("Held", (), {"operation": "op-1", "kernel_change": None})()

    def pause_risk(self, _vm: str) -> str:
        return ""

    async def disarm(self, operation: str) -> None:
        self.asked.append(f"disarm {operation}")

    async def do(self, _: object) -> list[object]:
        return []


def at_start(fleet: Fleet, pauses: PauseMarkers) -> CrashRecovery:
    given: Any = fleet
    return CrashRecovery(
        "host-1",
        driver=given,
        guard=given,
        journal=given,
        fact_factory=given,
        finalizer=given,
        pauses=pauses,
        has_clock=lambda _: True,
        resumed={},
    )


async def test_what_was_prepared_for_a_vm_that_is_resumed_is_released_after_the_guard_let_go(
    marked: Callable[..., PauseMarkers],
) -> None:
    fleet = Fleet(NotRunningYet("a", "not yet"), "running")
    await at_start(fleet, marked("a")).run(1)
    assert fleet.asked == ["resume a", "resume a", "disarm op-1", "release a"]


class Nothing:
    """A bus, metrics and a guard that have nothing to say."""

    on_lost: Any = None

    def __getattr__(self, name: str) -> Any:
        return lambda *_, **__: None


async def test_a_vm_that_was_taken_out_of_the_host_file_does_not_keep_the_host_from_starting(
    tmp_path: Path,
    freeze_one: Callable[..., StartOperation],
    updater_with: Callable[..., HostUpdater],
) -> None:
    """It was paused when the updater died; the operator removed it before the next start."""
    vm = VmPause(
        vm="removed", set="web", update_domain=3, called_at=1.0, frozen_at=1.5, resumed_at=2.0, end="running"
    )
    command = freeze_one("removed", domain=3)
    state = Operation(operation="op", method="freeze", budget_s=10.0, vms=(vm,), phase="resuming")
    file = HostFile(host="host-1", vm=(VmSpec(name="other", set="web", update_domain=0),))
    journal = JournalThread()
    await journal.open(str(tmp_path / "journal.sqlite"))
    await journal.do(lambda j: j.accept(command, state, boot_id(), []))
    world: Any = Fleet("running")
    updater = updater_with(file, journal, driver=world, metrics=Nothing())
    await updater.recover()
    told = await journal.outbox(OutboxTable.load)
    assert [each.topic.removeprefix("caesura/v1/host/host-1/") for each in told] == [
        f"set/{vm.set}/ud/3/vm/removed/frozen",
        f"set/{vm.set}/ud/3/vm/removed/resumed",
        "operation",
    ]
    await journal.close()


async def test_an_error_nobody_thought_of_does_not_end_the_tries(
    marked: Callable[..., PauseMarkers],
) -> None:
    fleet = Fleet(ValueError("a bug"), "running")
    await at_start(fleet, marked("a")).run(1)
    assert fleet.asked.count("resume a") == 2


async def test_vm_that_takes_longer_than_the_start_waits(
    monkeypatch: pytest.MonkeyPatch, marked: Callable[..., PauseMarkers]
) -> None:
    monkeypatch.setattr(crash_recovery, "_PATIENCE_S", 0.0)
    fleet = Fleet(*[NotRunningYet("a", "not yet")] * 3, "running")
    starting = at_start(fleet, marked("a"))
    await starting.run(1)
    assert "release a" not in fleet.asked
    await asyncio.gather(*starting.late)
    assert fleet.asked[-1] == "release a"


async def test_what_somebody_else_paused_is_named_and_left_alone(
    tmp_path: Path, marked: Callable[..., PauseMarkers]
) -> None:
    pauses = marked("b")  # runs: an updater that died between its marker and its freeze
    fleet = Fleet()
    with capture_logs() as said:
        await at_start(fleet, pauses).run(1)
    assert fleet.asked == ["disarm op-1"]
    (line,) = [each for each in said if each["event"] == "vm.paused_by_somebody_else"]
    assert line["vm"] == "a"
    assert line["hint"] == f"resume it with: echo 0 > {fleet.control}"
    await pauses.close()
    assert markers.read(str(tmp_path)) == {}, "whoever freezes b by hand from now on does so himself"


async def test_a_marker_of_another_vm_of_that_name_is_none(
    tmp_path: Path, marked: Callable[..., PauseMarkers]
) -> None:
    fleet = Fleet()
    fleet.control = "/sys/fs/cgroup/another/cgroup.freeze"
    pauses = marked("a")
    await at_start(fleet, pauses).run(1)
    assert fleet.asked == ["disarm op-1"]
    await pauses.close()
    assert markers.read(str(tmp_path)) == {}


async def test_a_marker_is_kept_until_its_vm_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, marked: Callable[..., PauseMarkers]
) -> None:
    monkeypatch.setattr(crash_recovery, "_PATIENCE_S", 0.0)
    pauses = marked("a")
    starting = at_start(Fleet(*[NotRunningYet("a", "not yet")] * 3, "running"), pauses)
    await starting.run(1)
    assert starting.resuming == {"a"}
    assert list(markers.read(str(tmp_path))) == ["a"]
    await asyncio.gather(*starting.late)
    assert starting.resuming == frozenset()
    await pauses.close()
    assert markers.read(str(tmp_path)) == {}


async def test_a_damaged_marker_counts(tmp_path: Path, marked: Callable[..., PauseMarkers]) -> None:
    pauses = marked("a")
    (tmp_path / "pauses" / "a.json").write_bytes(b"")
    fleet = Fleet("running")
    await at_start(fleet, pauses).run(1)
    assert "resume a" in fleet.asked


async def test_a_marked_vm_that_does_not_answer_is_resumed_too(marked: Callable[..., PauseMarkers]) -> None:
    fleet = Fleet(NotRunningYet("a", "does not answer"), "running")
    fleet.state = "unknown"
    await at_start(fleet, marked("a")).run(1)
    assert fleet.asked.count("resume a") == 2


class Discovered(Fleet):
    """A platform that has lost a VM which is paused with our marker, until it is told of it."""

    def __init__(self, *resumes: object) -> None:
        super().__init__(*resumes)
        self.adopted: list[str] = []

    def adopt(self, plans: Iterable[ResumePlan]) -> list[str]:
        self.adopted = [plan.vm for plan in plans]
        return self.adopted

    async def read_states(self) -> dict[str, str]:
        return dict.fromkeys(self.adopted, "unknown" if self.state == "paused" else self.state)


async def test_a_vm_that_its_platform_has_lost_is_resumed_all_the_same(
    tmp_path: Path, marked: Callable[..., PauseMarkers]
) -> None:
    """Its marker was removed, and its operation reported as ended."""
    fleet = Discovered(NotRunningYet("a", "libvirt does not know it any more"), "running")
    pauses = marked("a")
    await at_start(fleet, pauses).run(1)
    assert fleet.asked == ["resume a", "resume a", "disarm op-1", "release a"]
    await pauses.close()
    assert markers.read(str(tmp_path)) == {}


@pytest.mark.parametrize("state", ["running", "stopped"])
async def test_a_vm_that_its_platform_has_lost_and_that_is_paused_no_longer_is_released_too(
    marked: Callable[..., PauseMarkers], state: str
) -> None:
    """The guard had resumed it, or it has ended: it was taken for one of an operation until the host updater was restarted."""
    fleet = Discovered()
    fleet.state = state
    await at_start(fleet, marked("a")).run(1)
    assert fleet.asked == ["disarm op-1", "release a"]
