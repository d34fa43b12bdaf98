"""The fleet as its writers have reported it: their last messages, and indexes by VM, set and host. Pure.

Only ``fold.apply`` changes it, and in place, since the cost of a copy for each message would grow with the fleet;
so it has one owner, the event loop of one service, and no other code keeps a part of it across an await. Views read it through the methods
here and in ``sets``.
"""

from __future__ import annotations

from collections.abc import Iterator, KeysView, Mapping
from typing import NamedTuple

import msgspec

from caesura.contract.messages import CoordinatorPresence, HostInventory, VmRecord
from caesura.fleet.retained_messages import RetainedMessages
from caesura.fleet.sets import SetIndex
from caesura.lifecycle.ownership import Ownership

_NO_SET = SetIndex()


class Shift(NamedTuple):
    """The places of a VM before and now: two different ones, only one, or the same one twice."""

    sets: frozenset[str]
    hosts: frozenset[str]
    before: LocatedVm | None
    """Where it was; None if it did not belong to a host."""


class LocatedVm(msgspec.Struct, frozen=True):
    """A VM as described by the host that it belongs to."""

    host: str
    record: VmRecord


class HostEntry(msgspec.Struct):
    """The effective state of a host."""

    online: bool = False
    """Whether it is on the bus; one that never announced itself is not."""
    inventory: HostInventory | None = None
    """Its inventory as published, with VMs that may belong to another host."""
    own: HostInventory | None = None
    """The same with only the VMs that belong to it; None when it has to be rebuilt."""
    in_sets: dict[str, int] = {}
    """Maps a set to the number of VMs in it that belong to this host."""


class FleetState:
    """See the module. ``touched`` counts the index entries that were changed or read: the cost of a message."""

    def __init__(self) -> None:
        self.words = RetainedMessages()
        self.ownership = Ownership()
        self.coordinator: CoordinatorPresence | None = None
        """The one with the highest epoch; offline when its last will said so."""
        self.agents_online: dict[str, bool] = {}
        """Maps a VM to whether its agent is on the bus, even before any host has named the VM."""
        self.placements = 0
        """Rises whenever a VM is added, removed or changes its host, set, domain or whether an agent is expected in it: results
        derived from the places of many VMs stay valid as long as this stays the same."""
        self.touched = 0
        self._hosts: dict[str, HostEntry] = {}
        self._located: dict[str, LocatedVm] = {}
        self._sets: dict[str, SetIndex] = {}

    @property
    def leader_epoch(self) -> int | None:
        """The epoch of the coordinator that leads, or led last; None if none is known."""
        return self.coordinator.epoch if self.coordinator is not None else None

    # -- queries --------------------------------------------------------------------------------------------

    def vm(self, name: str) -> LocatedVm | None:
        """Where the VM is; None if the host that it belongs to has not reported it."""
        return self._located.get(name)

    def vm_names(self) -> KeysView[str]:
        """The VMs that belong to a host which has reported them."""
        return self._located.keys()

    def set_index(self, name: str) -> SetIndex:
        """What is known about the set; empty for a set without VMs."""
        return self._sets.get(name, _NO_SET)

    def sets(self) -> KeysView[str]:
        """The sets that have a VM."""
        return self._sets.keys()

    def is_online(self, host: str) -> bool:
        """Whether the host's updater says that it is on the bus; unknown counts as no."""
        entry = self._hosts.get(host)
        return entry is not None and entry.online

    def inventory(self, host: str) -> HostInventory | None:
        """The host's inventory with only the VMs that belong to it; None before it has reported one."""
        entry = self._hosts.get(host)
        if entry is None or entry.inventory is None:
            return None
        if entry.own is None:
            entry.own = self.ownership.judged(host)
        return entry.own

    def reported(self, host: str) -> HostInventory | None:
        """The host's inventory as published; None before it has reported one."""
        entry = self._hosts.get(host)
        return entry.inventory if entry is not None else None

    @property
    def inventories(self) -> Mapping[str, HostInventory]:
        """Maps a host to its effective inventory; built on demand."""
        return _Inventories(self)

    def sets_of_host(self, host: str) -> set[str]:
        """The sets of the VMs that belong to the host."""
        entry = self._hosts.get(host)
        return set(entry.in_sets) if entry is not None else set()

    def reporting_hosts(self) -> Iterator[str]:
        """The hosts whose inventory is known."""
        return (host for host, entry in self._hosts.items() if entry.inventory is not None)

    # -- updates: for ``fold`` only ----------------------------------------------------------------------------

    def put_host(self, host: str, *, online: bool) -> bool:
        """Take a host's presence; returns whether it changed. It may arrive before the inventory."""
        if self.is_online(host) == online:
            return False
        entry = self._hosts.setdefault(host, HostEntry())
        entry.online = online
        self._mark_host(entry)
        if entry.inventory is None and not online:
            del self._hosts[host]
        return True

    def put_inventory(self, host: str, inventory: HostInventory | None) -> dict[str, Shift]:
        """Take a host's inventory or its removal; returns the VMs whose state changed, with their places before and now."""
        entry = self._hosts.setdefault(host, HostEntry())
        affected = set(self.ownership.named(host))
        if inventory is None:
            affected |= self.ownership.drop_inventory(host).keys()
        else:
            affected |= self.ownership.put_inventory(inventory).keys()
            affected |= {record.vm for record in inventory.vms}
        entry.inventory = inventory
        entry.own = None
        changed = {vm: shift for vm in affected if (shift := self._locate(vm)) is not None}
        self._mark_host(entry)
        if inventory is None and not entry.online:
            del self._hosts[host]
        return changed

    def put_record(self, vm: str, host: str | None) -> Shift | None:
        """Take the owner of a VM; None if nothing changed."""
        return self._locate(vm) if self.ownership.put_record(vm, host) is not None else None

    def put_agent(self, vm: str, *, online: bool | None) -> bool:
        """Take whether the VM's agent is on the bus (None: unknown); returns whether that changed."""
        if self.agents_online.get(vm) is online:
            return False
        if online is None:
            del self.agents_online[vm]
        else:
            self.agents_online[vm] = online
        located = self._located.get(vm)
        if located is not None:
            self._mark_vm(located)
        return True

    # -- internal ----------------------------------------------------------------------------------------------

    def _locate(self, vm: str) -> Shift | None:
        """Evaluate the place of the VM again; None if nothing changed."""
        self.touched += 1
        before = self._located.get(vm)
        host = self.ownership.owner_of(vm)
        after = (
            LocatedVm(host, self.ownership.described(host, vm)) if self.ownership.names(host, vm) else None
        )
        if after is not None:
            self._hosts[host].own = None
        if before == after:
            return None
        if before is not None:
            self._hosts[before.host].own = None
        if before is None or after is None or _place(before) != _place(after):
            self.placements += 1
            if before is not None:
                self._leave(before)
            if after is not None:
                self._enter(after)
        if after is None:
            del self._located[vm]
        else:
            self._located[vm] = after
            self._mark_vm(after)
        there = [each for each in (before, after) if each is not None]
        return Shift(
            frozenset(each.record.set for each in there), frozenset(each.host for each in there), before
        )

    def _leave(self, located: LocatedVm) -> None:
        name, entry = located.record.set, self._hosts[located.host]
        index = self._sets[name]
        index.drop_vm(located.record)
        entry.in_sets[name] -= 1
        if not entry.in_sets[name]:
            del entry.in_sets[name]
            index.drop_host(located.host)
        if not index.vms:
            del self._sets[name]

    def _enter(self, located: LocatedVm) -> None:
        name, entry = located.record.set, self._hosts[located.host]
        index = self._sets.setdefault(name, SetIndex())
        index.put_vm(located.record, located.host)
        entry.in_sets[name] = entry.in_sets.get(name, 0) + 1
        self._mark_host_in(index, entry)

    def _mark_vm(self, located: LocatedVm) -> None:
        self.touched += 1
        index = self._sets[located.record.set]
        index.mark_vm(located.record, agent_online=self.agents_online.get(located.record.vm, False))

    def _mark_host(self, entry: HostEntry) -> None:
        for name in entry.in_sets:
            self._mark_host_in(self._sets[name], entry)

    def _mark_host_in(self, index: SetIndex, entry: HostEntry) -> None:
        self.touched += 1
        if entry.inventory is not None:
            index.mark_host(entry.inventory, online=entry.online)


class _Inventories(Mapping[str, HostInventory]):
    """A view, not a copy of the fleet."""

    def __init__(self, state: FleetState) -> None:
        self._state = state

    def __getitem__(self, host: str) -> HostInventory:
        inventory = self._state.inventory(host)
        if inventory is None:
            raise KeyError(host)
        return inventory

    def __contains__(self, host: object) -> bool:
        return isinstance(host, str) and self._state.reported(host) is not None

    def __iter__(self) -> Iterator[str]:
        return self._state.reporting_hosts()

    def __len__(self) -> int:
        return sum(1 for _ in self._state.reporting_hosts())


def _place(located: LocatedVm) -> tuple[str, str, int, int, bool]:
    record = located.record
    return located.host, record.set, record.update_domain, record.fault_domain, record.agent
