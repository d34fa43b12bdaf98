"""What the coordinator knows of the hosts, and why a wave may not go on now. Pure.

Blockers fail closed: a host that cannot be asked, an epoch that is not acknowledged, an unknown VM state all
block (the habit is kured's, whose reboot blockers do the same).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from datetime import datetime

import msgspec

from caesura.contract.messages import HostInventory, PlannedVm, VmRecord
from caesura.contract.reasons import Reason, ReasonCode
from caesura.lifecycle.commands import UPGRADE, missing


class Contested(msgspec.Struct, frozen=True, kw_only=True):
    """A VM that several hosts name."""

    record: VmRecord
    """As ``host`` describes it."""
    host: str
    """The one it belongs to; if that is nobody, one that names it."""
    reason: str


class Fleet(msgspec.Struct, frozen=True, kw_only=True):
    """The latest inventory of every host by name, and which hosts and agents are on the bus."""

    inventories: Mapping[str, HostInventory] = {}
    """With the VMs that belong to the host, and no others."""
    contested: Mapping[str, Contested] = {}
    """For a plan: the VMs that stay as they are because it is not clear whose they are."""
    hosts_online: Mapping[str, bool] = {}
    agents_online: Mapping[str, bool] = {}
    commanded: Mapping[str, str] = {}
    """Host to an operation it was commanded and has not answered: its inventory may not show it yet."""
    returning_until: datetime | None = None
    """After an outage of the broker, agents that are said to be on the bus may be on their way back until then."""

    def with_inventory(self, inventory: HostInventory) -> Fleet:
        """This fleet with a host's newer inventory."""
        return msgspec.structs.replace(self, inventories={**self.inventories, inventory.host: inventory})

    def with_inventories(self, inventories: Iterable[HostInventory]) -> Fleet:
        """This fleet with these hosts' newer inventories."""
        newer = {each.host: each for each in inventories}
        return msgspec.structs.replace(self, inventories={**self.inventories, **newer}) if newer else self

    def with_contested(self, contested: Mapping[str, Contested]) -> Fleet:
        """This fleet with the VMs that several hosts name."""
        return msgspec.structs.replace(self, contested=contested)

    def with_host(self, host: str, *, online: bool) -> Fleet:
        """This fleet with a host's presence."""
        return msgspec.structs.replace(self, hosts_online={**self.hosts_online, host: online})

    def without_host(self, host: str) -> Fleet:
        """This fleet without a host and its VMs."""
        return msgspec.structs.replace(
            self,
            inventories={name: each for name, each in self.inventories.items() if name != host},
            hosts_online={name: online for name, online in self.hosts_online.items() if name != host},
        )

    def with_agent(self, vm: str, *, online: bool) -> Fleet:
        """This fleet with an agent's presence."""
        return msgspec.structs.replace(self, agents_online={**self.agents_online, vm: online})

    def with_commanded(self, operations: Mapping[str, str]) -> Fleet:
        """This fleet with what other rollouts have asked of its hosts."""
        return msgspec.structs.replace(self, commanded=operations)

    def with_return(self, until: datetime) -> Fleet:
        """This fleet after the broker was away."""
        return msgspec.structs.replace(self, returning_until=until)

    def is_online(self, host: str) -> bool:
        """Whether the host's updater says it is on the bus; unknown counts as no."""
        return self.hosts_online.get(host, False)

    def vms(self) -> Iterable[tuple[str, VmRecord]]:
        """Every VM with its host's name."""
        for host, inventory in sorted(self.inventories.items()):
            for vm in inventory.vms:
                yield host, vm

    def hosts_of(self, sets: Iterable[str]) -> set[str]:
        """Hosts that hold a VM of one of these sets."""
        wanted = set(sets)
        return {host for host, vm in self.vms() if vm.set in wanted}

    def epochs(self) -> list[int]:
        """The epoch that each host obeys."""
        return [inventory.epoch for inventory in self.inventories.values()]


def fence_blockers(
    fleet: Fleet,
    sets: Iterable[str],
    hosts: Iterable[str],
    *,
    epoch: int,
    coordinator: str,
    own: Collection[str] = (),
) -> list[Reason]:
    """Why no VM of ``sets`` may be paused now; empty when it may.

    Every host that holds a VM of these sets, and every one in ``hosts`` (those known when the plan was
    made), must be online, idle, guarded, have acknowledged this coordinator's epoch and have no VM paused:
    then no command of an older coordinator can still be obeyed anywhere in the set (I1, I10).

    Args:
        own: operations of the very wave that asks: they, and what they paused, are not in its way.
    """
    wanted = set(sets)
    found = []
    for name in sorted(fleet.hosts_of(wanted) | set(hosts)):
        inventory = fleet.inventories.get(name)
        if inventory is None:
            found.append(Reason("host_unknown", f"{name} has not reported an inventory"))
            continue
        busy = inventory.operation or fleet.commanded.get(name, "")
        if not fleet.is_online(name):
            found.append(Reason("host_offline", f"{name} is offline"))
        elif outdated := why_outdated(inventory):
            found.append(Reason("host_outdated", f"{name}: {outdated}"))
        elif (inventory.epoch, inventory.coordinator) != (epoch, coordinator):
            why = _why_not(inventory, epoch)
            code: ReasonCode = "epoch_refused" if why else "host_behind"
            found.append(Reason(code, f"{name} has not acknowledged epoch {epoch}{why}"))
        elif busy and busy not in own:
            found.append(Reason("host_busy", f"{name} is busy with operation {busy}"))
        elif inventory.guard == "absent":
            found.append(Reason("guard_absent", f"{name} has no pause guard"))
        found.extend(
            Reason("vm_not_running", f"{vm.vm} on {name} is {vm.state}")
            for vm in inventory.vms
            if vm.set in wanted and vm.state in {"paused", "unknown"} and inventory.operation not in own
        )
    return found


def why_outdated(inventory: HostInventory) -> str:
    """Why the host would not receive this coordinator's commands; empty if it does."""
    unread = missing(inventory.commands)
    if not unread:
        return ""
    return f"its host updater is of a version that does not read {', '.join(unread)}: upgrade it ({UPGRADE})"


def _why_not(inventory: HostInventory, epoch: int) -> str:
    """More of a host that obeys another, if it will not change by itself."""
    if inventory.refused_epoch:
        return f": {inventory.refused_epoch}"
    if inventory.epoch > epoch:
        return f": it obeys epoch {inventory.epoch} of {inventory.coordinator}; the coordinator's log says what to do"
    return ""


def health_blockers(fleet: Fleet, vms: Iterable[tuple[str, str, bool]]) -> list[Reason]:
    """Which of these VMs (name, host, agent expected) are not healthy now, and why."""
    found = []
    for name, host, agent in vms:
        inventory = fleet.inventories.get(host)
        record = next((each for each in inventory.vms if each.vm == name), None) if inventory else None
        if inventory is None or not fleet.is_online(host):
            found.append(Reason("host_offline", f"{name}: its host {host} is offline"))
        elif record is None:
            found.append(Reason("vm_gone", f"{name} is gone from {host}"))
        elif record.state != "running":
            found.append(Reason("vm_not_running", f"{name} on {host} is {record.state}"))
        elif record.state_detail:
            found.append(Reason("vm_unhealthy", f"{name} on {host}: {record.state_detail}"))
        elif agent and not fleet.agents_online.get(name, False):
            found.append(Reason("agent_offline", f"{name}: its agent is offline"))
    return found


def moved_blockers(fleet: Fleet, vms: Iterable[PlannedVm]) -> list[Reason]:
    """Which of these VMs are in another set or domain than when the plan was made: together they may not pause (I1)."""
    records = {(host, vm.vm): vm for host, vm in fleet.vms()}
    found = []
    for vm in vms:
        record = records.get((vm.host, vm.vm))
        if record is not None and _place(record) != _place(vm):
            found.append(
                Reason(
                    "vm_moved",
                    f"{vm.vm} is in {_place(record)} now, the plan has it in {_place(vm)}: abort and plan again",
                )
            )
    return found


def _place(vm: VmRecord | PlannedVm) -> str:
    return f"set {vm.set} update domain {vm.update_domain} fault domain {vm.fault_domain}"
