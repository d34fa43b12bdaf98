"""The host's inventory as a message. Pure."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Literal

from caesura.contract.messages import HostInventory, HostKernel, InstalledUpdate, ProofCode, VmRecord, VmState
from caesura.lifecycle.command_compatibility import COMMANDS
from caesura.lifecycle.proof import ordered
from caesura_host_updater.drivers.port import Capabilities
from caesura_host_updater.epoch_authority import EpochAuthority
from caesura_host_updater.inventory.updates import Catalogue
from caesura_host_updater.inventory.vm_spec import VmSpec


def vm_records(
    specs: Sequence[VmSpec],
    capabilities: Callable[[str], Capabilities],
    states: Mapping[str, VmState],
    details: Mapping[str, str],
    canaries: Collection[str] = (),
) -> dict[str, VmRecord]:
    """The VMs by name.

    ``details``: the detail of a state, where there is one. ``canaries``: those whose agent holds a canary.
    """
    return {
        spec.name: _record(spec, capabilities(spec.name), states, details, canary=spec.name in canaries)
        for spec in specs
    }


def _proofs(spec: VmSpec, can: Capabilities, *, canary: bool) -> dict[str, tuple[str, ...]]:
    """What can be shown about its memory after a pause, by method."""
    by_guest: list[ProofCode] = []
    if spec.agent or can.clock == "system":
        by_guest.append("not_rebooted")
    if spec.agent and canary:
        by_guest.append("canary_equal")
    # A swap's pause of milliseconds has no time for all of memory.
    sampled: tuple[ProofCode, ...] = tuple(each for each in can.digests if each == "sampled_digest_equal")
    # Over a change of the host's kernel nobody here compares anything: only the guest itself can.
    by_method = {"swap": sampled, "freeze": can.digests, "replace": can.digests, "kexec": ()}
    return {method: ordered((*by_method[method], *by_guest)) for method in can.methods if method in by_method}


def clock_of(spec: VmSpec, can: Capabilities) -> Literal["simulated", "system", "none"]:
    """What the verdict after a pause is about. ``none``: a process without an agent, whose time is the host's own."""
    return can.clock if spec.agent or can.clock == "system" else "none"


def _record(
    spec: VmSpec,
    can: Capabilities,
    states: Mapping[str, VmState],
    details: Mapping[str, str],
    *,
    canary: bool,
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
        clock=clock_of(spec, can),
        agent=spec.agent,
        proofs=_proofs(spec, can, canary=canary),
        no_digest=can.no_digest[:1000],
        pause_risk=can.pause_risk[:1000],
    )


def inventory(
    host: str,
    driver: str,
    driver_detail: str,
    *,
    authority: EpochAuthority,
    vms: Mapping[str, VmRecord],
    catalogue: Catalogue,
    operation: str,
    guard: Literal["ready", "armed", "absent"],
    refused_epoch: str = "",
    installed: tuple[InstalledUpdate, ...] = (),
    kernel: HostKernel | None = None,
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
        refused_epoch=refused_epoch,
        installed=installed,
        commands=COMMANDS,
        kernel=kernel,
    )
