"""What the driver conformance suite needs: drivers on one state folder, and the processes of their VMs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path

from caesura_host_updater.drivers.port import Driver
from caesura_vmcontrol.container_engine import EnginePlan
from caesura_vmcontrol.procfs import process_table
from caesura_vmcontrol.resume_plans import CgroupPlan, ResumePlan, SignalPlan


class DriverHarness(ABC):
    """A state folder with VMs on it, for one host updater after the other."""

    vms: tuple[str, ...]
    """The names of its VMs, two or more; all of them can be paused."""
    exclusive: bool = False
    """Whether VMs can be reached by one driver at a time (a QMP socket serves one client); the previous one is then closed first."""

    starts_vms: bool = True
    """Whether the driver starts VMs that do not run when it is opened; False: that is their owner's."""

    @abstractmethod
    def build(self) -> Driver:
        """A driver of these VMs, not open; every one is on the same state folder, as that of a restarted host updater is."""

    def processes(self, driver: Driver, vm: str) -> list[int]:
        """Pids of a VM that runs, first the one whose end is the VM's end: by its plan, the first that was started."""
        return _processes_of(driver.resume_plan(vm))


class DriverRuns:
    """Drivers on one state folder, as one host updater after the other would have."""

    def __init__(self, harness: DriverHarness) -> None:
        self._harness = harness
        self._made: list[Driver] = []

    async def start(self) -> Driver:
        """The next one, open."""
        driver = self._harness.build()
        if self._harness.exclusive:
            await self._close_all()
        self._made.append(driver)
        await driver.open()
        return driver

    async def _close_all(self) -> None:
        while self._made:
            await self._made.pop().close(stop_vms=False)

    async def end(self) -> None:
        """Stop every VM."""
        last = await self.start()
        for vm in await last.read_states():
            await last.resume(vm, 5)
        await last.close(stop_vms=True)
        self._made.remove(last)
        await self._close_all()


def _processes_of(plan: ResumePlan) -> list[int]:
    match plan:
        case SignalPlan():
            return [
                plan.leader,
                *(each.pid for each in plan.members(process_table()) if each.pid != plan.leader),
            ]
        case CgroupPlan():
            pids = [int(pid) for pid in (Path(plan.control).parent / "cgroup.procs").read_text().split()]
            table = process_table()
            return sorted((pid for pid in pids if pid in table), key=lambda pid: table[pid].start_ticks)
        case EnginePlan():
            return [plan.pid]
        case _:
            raise NotImplementedError(
                "override DriverHarness.processes: it says which process runs the guest"
            )
