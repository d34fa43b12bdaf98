"""The VMs as the inventory shows them: their state now, what can be done with them, and who paused them."""

from __future__ import annotations

from collections.abc import Callable, Collection

from msgspec.structs import replace

from caesura.contract.messages import VmRecord
from caesura_host_updater.drivers.port import Capabilities, Driver, DriverError, states_within
from caesura_host_updater.host_vms import HostVms
from caesura_host_updater.inventory.builder import clock_of, vm_records
from caesura_host_updater.pause_markers import how_to_resume
from caesura_vmcontrol.resume_plans import ResumePlan

STATES_S = 2.0  # s: to read the states of all VMs, which takes milliseconds


class VmView:
    """See the module.

    Args:
        guard_risk: which way out of a VM the pause guard has found to be none; empty: none.
    """

    def __init__(self, vms: HostVms, driver: Driver, guard_risk: Callable[[str], str] = lambda _: "") -> None:
        self._vms = vms
        self._driver = driver
        self._guard_risk = guard_risk
        self._foreign: dict[str, str] = {}
        """VMs that somebody else paused, and how they are resumed; as last looked."""

    async def records(self, ours: Collection[str], canaries: Collection[str]) -> dict[str, VmRecord]:
        """The VMs by name, now.

        ``ours``: those that may be paused because we paused them. ``canaries``: those whose agent holds a canary.
        """
        states = await states_within(self._driver, STATES_S)
        self._foreign = {
            vm: f"paused, and not by Caesura; {how_to_resume(plan_of(self._driver, vm))}"
            for vm, state in states.items()
            if state == "paused" and vm not in ours
        }
        wrong = {vm: why for vm in states if (why := self._driver.health_error(vm))}
        details = {**self._foreign, **wrong}
        return vm_records(tuple(self._vms), self._capabilities, states, details, canaries)

    def _capabilities(self, vm: str) -> Capabilities:
        """Ways out are found with our rights; the guard's may be others."""
        can = self._driver.capabilities(vm)
        risks = (self._guard_risk(vm), can.pause_risk)
        return replace(can, pause_risk="; ".join(filter(None, risks)))

    def has_clock(self, vm: str) -> bool:
        """Whether there is a verdict on its clock after a pause."""
        spec = self._vms.get(vm)
        return spec is not None and clock_of(spec, self._driver.capabilities(vm)) != "none"

    def health_error(self) -> str:
        """For the health probe: the VMs that somebody else paused, and how they are resumed."""
        return "; ".join(f"VM {vm} is {why}" for vm, why in sorted(self._foreign.items()))


def plan_of(driver: Driver, vm: str) -> ResumePlan | None:
    """How the VM would be resumed; None where the driver cannot tell."""
    try:
        return driver.resume_plan(vm)
    except DriverError:
        return None
