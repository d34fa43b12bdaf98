"""The fleet as far as its writers have said: their words, and indexes by VM, set and host. Pure.

``fold.apply`` is the only one that changes it. It changes in place, since a copy for each message would cost in the size of the fleet;
so it has one owner, the event loop of one service, and nobody else keeps a part of it over an await. Views read it through the methods
here and in ``sets``.
"""

from __future__ import annotations

from collections.abc import Iterator, KeysView, Mapping
from typing import NamedTuple

import msgspec

from caesura.contract.messages import CoordinatorPresence, HostInventory, VmRecord
from caesura.fleet.sets import SetIndex
from caesura.fleet.words import Words
from caesura.lifecycle.ownership import Ownership

_NO_SET = SetIndex()


class Shift(NamedTuple):
    """Where a VM was before and is now: of each two, or one, or the same one twice."""

    sets: frozenset[str]
    hosts: frozenset[str]
    before: LocatedVm | None
    """Where it was; None if it belonged to no host."""


class LocatedVm(msgspec.Struct, frozen=True):
    """A VM and the host that it belongs to, as that one describes it."""

    host: str
    record: VmRecord


class HostEntry(msgspec.Struct):
    """What counts of a host."""

    online: bool = False
    """Whether it is on the bus; one that never said so is not."""
    inventory: HostInventory | None = None
    """Its own words, with VMs that may be another's."""
    own: HostInventory | None = None
    """The same with the VMs that belong to it; None when it has to be made again."""
    in_sets: dict[str, int] = {}
    """Set to how many of the VMs that belong to this host are in it."""


class FleetState:
    """See the module. ``touched`` counts the index entries that were changed or looked at: what a message costs."""

    def __init__(self) -> None:
        self.words = Words()
        self.ownership = Ownership()
        self.coordinator: CoordinatorPresence | None = None
        """The one of the highest epoch; offline when the broker said so for it."""
        self.agents_online: dict[str, bool] = {}
        """VM to whether its agent is on the bus, also before any host has named the VM."""
        self.placements = 0
        """Rises whenever a VM comes, goes or changes its host, set, domain or whether an agent is expected in it: what was
        found out about the places of many VMs stays true as long as this stays the same."""
        self.touched = 0
        self._hosts: dict[str, HostEntry] = {}
        self._located: dict[str, LocatedVm] = {}
        self._sets: dict[str, SetIndex] = {}

    @property
    def leader_epoch(self) -> int | None:
        """The epoch of the coordinator that leads, or led last; None if none is known."""
        return self.coordinator.epoch if self.coordinator is not None else None

    # -- reading --------------------------------------------------------------------------------------------

    def vm(self, name: str) -> LocatedVm | None:
        """Where the VM is; None if the host that it belongs to has not spoken of it."""
        return self._located.get(name)

    def vm_names(self) -> KeysView[str]:
        """The VMs that belong to a host which has spoken of them."""
        return self._located.keys()

    def set_index(self, name: str) -> SetIndex:
        """What is known of the set; one that has no VM is empty."""
        return self._sets.get(name, _NO_SET)

    def sets(self) -> KeysView[str]:
        """The sets that have a VM."""
        return self._sets.keys()

    def is_online(self, host: str) -> bool:
        """Whether the host's updater says it is on the bus; unknown counts as no."""
        entry = self._hosts.get(host)
        return entry is not None and entry.online

    def inventory(self, host: str) -> HostInventory | None:
        """The host's inventory with the VMs that belong to it, and no others; None before it has reported one."""
        entry = self._hosts.get(host)
        if entry is None or entry.inventory is None:
            return None
        if entry.own is None:
            entry.own = self.ownership.judged(host)
        return entry.own

    def reported(self, host: str) -> HostInventory | None:
        """The host's inventory in its own words; None before it has reported one."""
        entry = self._hosts.get(host)
        return entry.inventory if entry is not None else None

    @property
    def inventories(self) -> Mapping[str, HostInventory]:
        """Host to its inventory as it counts; made when it is asked for."""
        return _Inventories(self)

    def sets_of_host(self, host: str) -> set[str]:
        """The sets of the VMs that belong to the host."""
        entry = self._hosts.get(host)
        return set(entry.in_sets) if entry is not None else set()

    def reporting_hosts(self) -> Iterator[str]:
        """The hosts whose inventory is known."""
        return (host for host, entry in self._hosts.items() if entry.inventory is not None)

    # -- changing: for ``fold`` only ---------------------------------------------------------------------------

    def put_host(self, host: str, *, online: bool) -> bool:
        """A host's presence; whether it differs. It may come before its inventory."""
        if self.is_online(host) == online:
            return False
        entry = self._hosts.setdefault(host, HostEntry())
        entry.online = online
        self._mark_host(entry)
        if entry.inventory is None and not online:
            del self._hosts[host]
        return True

    def put_inventory(self, host: str, inventory: HostInventory | None) -> dict[str, Shift]:
        """A host's inventory, or that it was removed; the VMs that count differently now, with where they were and are."""
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
        """Whose a VM is; None if it counts as before."""
        return self._locate(vm) if self.ownership.put_record(vm, host) is not None else None

    def put_agent(self, vm: str, *, online: bool | None) -> bool:
        """Whether the VM's agent is on the bus (None: nobody says); whether that differs."""
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

    # -- inside ------------------------------------------------------------------------------------------------

    def _locate(self, vm: str) -> Shift | None:
        """Look again at where the VM is; None if nothing of it differs."""
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
    """A view: no copy of the fleet is made."""

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
