"""The host's inventory as a message. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

from caesura.contract.messages import HostInventory, VmRecord, VmState
from caesura_host_updater.command import Authority
from caesura_host_updater.drivers.port import Capabilities
from caesura_host_updater.hostfile import VmSpec
from caesura_host_updater.updates import Catalogue


def vm_records(
    specs: Sequence[VmSpec],
    capabilities: Callable[[str], Capabilities],
    states: Mapping[str, VmState],
    details: Mapping[str, str],
) -> dict[str, VmRecord]:
    """The VMs by name. ``details``: what is to be said of a state, where there is something."""
    return {spec.name: _record(spec, capabilities(spec.name), states, details) for spec in specs}


def _record(
    spec: VmSpec, can: Capabilities, states: Mapping[str, VmState], details: Mapping[str, str]
) -> VmRecord:
    return VmRecord(
        vm=spec.name,
        set=spec.set_name,
        update_domain=spec.domain,
        fault_domain=spec.fault_domain,
        state=states.get(spec.name, "unknown"),
        state_detail=details.get(spec.name, "")[:1000],
        methods=can.methods,
        methods_missing={method: why[:1000] for method, why in can.missing.items()},
        clock=can.clock if spec.agent or can.clock == "system" else "none",
        agent=spec.agent,
    )


def inventory(
    host: str,
    driver: str,
    driver_detail: str,
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
        driver_detail=driver_detail[:1000],
        epoch=authority.epoch,
        coordinator=authority.coordinator,
        vms=tuple(vms.values()),
        updates=tuple(update.record() for update in catalogue.updates.values()),
        refused_updates=catalogue.refused,
        operation=operation,
        guard=guard,
    )
