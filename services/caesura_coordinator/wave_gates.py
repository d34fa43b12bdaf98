"""What in the fleet keeps a wave from starting or continuing now: the gates, each with its blockers, the reasons why not. Pure.

``wave_transitions`` starts it: that judges time, approvals and agents' answers, and asks the gates last.

Blockers fail closed: an unreachable host, an epoch that is not acknowledged and an unknown VM state all
block (as do the reboot blockers of kured).

A gate is evaluated often, so it does not visit every host and VM: each set keeps an index of its blockers
(``caesura.fleet.sets``), and only those are evaluated and named.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator

from caesura.contract.messages import HostInventory, PlannedVm
from caesura.contract.reasons import Reason, ReasonCode
from caesura.lifecycle.command_compatibility import UPGRADE, missing
from caesura_coordinator.decision import Decision
from caesura_coordinator.fleet_lookup import FleetLookup, place
from caesura_coordinator.members import members_of
from caesura_coordinator.records import Wave


def announcement_blockers(decision: Decision, wave: Wave) -> list[Reason]:
    """Why the events of a wave may not be announced now, nor a wave that pauses nothing be started; empty when they may."""
    return health_blockers(decision.fleet, wave.vms) or start_blockers(decision, wave)


def start_blockers(decision: Decision, wave: Wave) -> list[Reason]:
    """Why a wave that was announced may not start now; empty when it may. Its VMs' health was asked for at the announcement."""
    done = {each.host for each in wave.completed_operations}
    return placement_blockers(decision.fleet, wave.vms, done) or continuation_blockers(decision, wave)


def continuation_blockers(decision: Decision, wave: Wave) -> list[Reason]:
    """Why a wave that a previous run of this coordinator started may not be continued; empty when it may."""
    return fence_blockers(
        decision.fleet,
        wave.domains,
        decision.rollout.fence_hosts,
        members_of(wave.vms).by_host,
        epoch=decision.authority.epoch,
        coordinator=decision.authority.coordinator,
        own={each.operation for each in wave.operations},
    )


def fence_blockers(
    fleet: FleetLookup,
    sets: Collection[str],
    *known: Collection[str],
    epoch: int,
    coordinator: str,
    own: Collection[str] = (),
) -> list[Reason]:
    """Why no VM of ``sets`` may be paused now; empty when it may.

    Every host that holds a VM of these sets, and every one in ``known`` (those known when the plan was
    made), must be online, idle, guarded, have acknowledged this coordinator's epoch and have no VM paused:
    then no command of an older coordinator can still be obeyed anywhere in the set (I1, I10).

    Args:
        own: operations of the calling wave itself: neither they nor the VMs that they paused block it.
    """
    state = fleet.state
    commanded = fleet.commanded()
    # If the host was not known before, the missing parts may contain VMs of any set.
    in_the_way = {host for host in fleet.incomplete if state.reported(host) is None}
    for hosts in known:
        in_the_way.update(fleet.outside(sets, hosts))
        in_the_way.update(host for host in fleet.incomplete if host in hosts)
    for name in sets:
        index = state.set_index(name)
        in_the_way.update(index.offline, index.outdated, index.unguarded, index.busy)
        in_the_way.update(index.not_obeying((epoch, coordinator)))
        in_the_way.update(index.vms[vm] for vm in index.held)
        in_the_way.update(host for host in commanded if host in index.hosts)
        in_the_way.update(host for host in fleet.incomplete if host in index.hosts)
    found: list[Reason] = []
    for host in sorted(in_the_way):
        found += _why_not(fleet, host, sets, epoch=epoch, coordinator=coordinator, own=own)
    return found


def _why_not(
    fleet: FleetLookup,
    host: str,
    sets: Collection[str],
    *,
    epoch: int,
    coordinator: str,
    own: Collection[str],
) -> Iterator[Reason]:
    """Why this host blocks."""
    inventory = fleet.state.inventory(host)
    if inventory is None:
        if host in fleet.incomplete:
            why = "parts of its first inventory are missing, so it may have VMs of any set"
            yield Reason(
                "inventory_incomplete", f"{host}: {why}; restart its host updater, or remove the host"
            )
        else:
            yield Reason("host_unknown", f"{host} has not reported an inventory")
        return
    if host in fleet.incomplete:
        yield Reason("inventory_incomplete", f"parts of the inventory of {host} are missing")
    busy = inventory.operation or fleet.commanded().get(host, "")
    if not fleet.is_online(host):
        yield Reason("host_offline", f"{host} is offline")
    elif outdated := why_outdated(inventory):
        yield Reason("host_outdated", f"{host}: {outdated}")
    elif (inventory.epoch, inventory.coordinator) != (epoch, coordinator):
        why = _why_another(inventory, epoch)
        code: ReasonCode = "epoch_refused" if why else "host_behind"
        yield Reason(code, f"{host} has not acknowledged epoch {epoch}{why}")
    elif busy and busy not in own:
        yield Reason("host_busy", f"{host} is busy with operation {busy}")
    elif inventory.guard == "absent":
        yield Reason("guard_absent", f"{host} has no pause guard")
    if inventory.operation not in own:
        for vm in inventory.vms:
            if vm.state in {"paused", "unknown"} and vm.set in sets:
                yield Reason("vm_not_running", f"{vm.vm} on {host} is {vm.state}")


def why_outdated(inventory: HostInventory) -> str:
    """Why the host would not receive this coordinator's commands; empty if it does."""
    unread = missing(inventory.commands)
    if not unread:
        return ""
    return f"its host updater is of a version that does not read {', '.join(unread)}: upgrade it ({UPGRADE})"


def _why_another(inventory: HostInventory, epoch: int) -> str:
    """Details about a host that obeys another coordinator, if that does not resolve by itself."""
    if inventory.refused_epoch:
        return f": {inventory.refused_epoch}"
    if inventory.epoch > epoch:
        return f": it obeys epoch {inventory.epoch} of {inventory.coordinator}; the coordinator's log says what to do"
    return ""


def health_blockers(fleet: FleetLookup, vms: tuple[PlannedVm, ...]) -> list[Reason]:
    """Which of these VMs are not healthy now, and why, in their order."""
    members = members_of(vms)
    suspects = {vm.vm for vm in fleet.displaced(vms)}
    for name in members.sets:
        index = fleet.state.set_index(name)
        for unhealthy in (index.not_running, index.unwell, index.agent_offline):
            suspects.update(vm for vm in unhealthy if vm in members.by_vm)
        for host in (*index.offline, *fleet.incomplete):
            suspects.update(vm.vm for vm in members.by_host.get(host, ()))
    found = []
    for name in sorted(suspects, key=members.position.__getitem__):
        why = _unhealthy(fleet, members.by_vm[name])
        if why is not None:
            found.append(why)
    return found


def all_healthy(fleet: FleetLookup, vms: Iterable[PlannedVm]) -> bool:
    """Whether all of these VMs, of one host, are healthy now."""
    return all(_unhealthy(fleet, vm) is None for vm in vms)


def _unhealthy(fleet: FleetLookup, vm: PlannedVm) -> Reason | None:
    name, host = vm.vm, vm.host
    located = fleet.vm(name)
    if fleet.state.inventory(host) is None or not fleet.is_online(host):
        return Reason("host_offline", f"{name}: its host {host} is offline")
    if host in fleet.incomplete:
        return Reason("inventory_incomplete", f"{name}: parts of the inventory of {host} are missing")
    if located is None or located.host != host:
        return Reason("vm_gone", f"{name} is gone from {host}")
    if located.record.state != "running":
        return Reason("vm_not_running", f"{name} on {host} is {located.record.state}")
    if located.record.state_detail:
        return Reason("vm_unhealthy", f"{name} on {host}: {located.record.state_detail}")
    if vm.agent and not fleet.state.agents_online.get(name, False):
        return Reason("agent_offline", f"{name}: its agent is offline")
    return None


def placement_blockers(
    fleet: FleetLookup, vms: tuple[PlannedVm, ...], done: Collection[str] = ()
) -> list[Reason]:
    """Which of these VMs are in another set or domain than when the plan was made: they may not pause together (I1).

    Args:
        done: hosts that will not be paused again.
    """
    found = []
    for vm in fleet.displaced(vms):
        located = fleet.vm(vm.vm)
        if located is None or located.host != vm.host or vm.host in done:
            continue
        if place(located.record) != place(vm):
            found.append(
                Reason(
                    "vm_moved",
                    f"{vm.vm} is in {place(located.record)} now, the plan has it in {place(vm)}: abort and plan again",
                )
            )
    return found
