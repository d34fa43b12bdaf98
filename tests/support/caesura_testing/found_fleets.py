"""Words of end-to-end tests whose VMs are found on a platform (libvirt, Proxmox), with the platform as the witness."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

from caesura.contract import messages as m

BUDGET_S = 8.0


def vm_of(fleet: Any, host: str, vm: str) -> Any:
    """A VM as its host publishes it; None: the host has none of that name."""
    inventory = fleet.fleet_view.hosts.get(host)
    return next((each for each in inventory.vms if each.vm == vm), None) if inventory else None


async def begin_long_pause(fleet: Any, paused: Callable[[], Collection[str]], *vms: str) -> str:
    """A rollout whose first pause lasts for most of its budget; the VMs of host-1 are paused when this returns its id.

    Args:
        paused: what the platform says.
        vms: all of host-1; the first is in the set that is rolled first.
    """
    sandbox = fleet.sandbox
    sandbox.update("long", ["sleep", "5"], expected_s=2.0)
    await sandbox.until(
        lambda: any(each.update == "long" for each in fleet.fleet_view.hosts["host-1"].updates),
        20,
        "the update",
    )
    rollout = await fleet.roll("long", budget_s=BUDGET_S, on_unproven="proceed")
    await sandbox.until(lambda: set(paused()) == set(vms), 20, "host-1 is paused")
    await sandbox.until(lambda: vms[0] in fleet.fleet_view.frozen, 20, "the updater has seen it paused")
    return str(rollout)


def report_of(fleet: Any, host: str = "host-1") -> m.OperationReported:
    """The only report of a host."""
    (report,) = [
        each
        for each in fleet.fleet_view.reports.values()
        if each.host == host and isinstance(each, m.OperationReported)
    ]
    return report


def outcome_of(fleet: Any, vm: str, host: str = "host-1") -> Any:
    """What the only report of a host says of one VM."""
    return next(each for each in report_of(fleet, host).vms if each.vm == vm)
