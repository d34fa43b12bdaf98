"""The host's inventory as a message. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from caesura.contract.messages import HostInventory, VmRecord, VmState
from caesura_host_updater.command import Authority
from caesura_host_updater.drivers.port import Capabilities
from caesura_host_updater.hostfile import VmSpec
from caesura_host_updater.updates import Catalogue


def vm_records(
    specs: Sequence[VmSpec], capabilities: Capabilities, states: Mapping[str, VmState]
) -> dict[str, VmRecord]:
    """The VMs by name."""
    return {
        spec.name: VmRecord(
            vm=spec.name,
            set=spec.set_name,
            update_domain=spec.domain,
            fault_domain=spec.fault_domain,
            state=states.get(spec.name, "unknown"),
            methods=capabilities.methods,
            methods_missing=dict(capabilities.missing),
            clock=capabilities.clock if spec.agent else "none",
            agent=spec.agent,
        )
        for spec in specs
    }


def inventory(
    host: str,
    driver: str,
    *,
    authority: Authority,
    vms: Mapping[str, VmRecord],
    catalogue: Catalogue,
    operation: str,
    guard: Literal["ready", "armed", "absent"],
) -> HostInventory:
    """The whole host, now."""
    return HostInventory(
        host=host,
        driver=driver,
        epoch=authority.epoch,
        coordinator=authority.coordinator,
        vms=tuple(vms.values()),
        updates=tuple(update.record() for update in catalogue.updates.values()),
        refused_updates=catalogue.refused,
        operation=operation,
        guard=guard,
    )
