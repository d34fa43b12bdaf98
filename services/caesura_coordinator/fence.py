"""The view of the fleet that decisions read, and why a wave may not continue now. Pure.

Blockers fail closed: an unreachable host, an epoch that is not acknowledged and an unknown VM state all
block (as do the reboot blockers of kured).

A gate is evaluated often, so it does not visit every host and VM: each set keeps an index of its blockers
(``caesura.fleet.sets``), and only those are evaluated and named.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from datetime import datetime
from typing import TypeVar

import msgspec

from caesura.contract.messages import HostInventory, PlannedVm, VmRecord
from caesura.contract.reasons import Reason, ReasonCode
from caesura.fleet.state import FleetState, LocatedVm
from caesura.lifecycle.commands import UPGRADE, missing
from caesura_coordinator.members import members_of

T = TypeVar("T")
_REMEMBERED = 64


class Contested(msgspec.Struct, frozen=True, kw_only=True):
    """A VM that several hosts name."""

    record: VmRecord
    """As ``host`` describes it."""
    host: str
    """The host it belongs to; if there is none, one that names it."""
    reason: str


class _Places:
    """Results about the places of planned VMs: valid until a VM is added, removed or moved."""

    def __init__(self) -> None:
        self._placements = -1
        self._found: dict[tuple[int, int], tuple[object, object, tuple[object, ...]]] = {}

    def displaced(self, state: FleetState, vms: tuple[PlannedVm, ...]) -> tuple[PlannedVm, ...]:
        """The planned VMs whose place or properties differ from the plan."""
        return self._remembered(
            state, vms, None, lambda: tuple(vm for vm in vms if not _as_planned(state.vm(vm.vm), vm))
        )

    def outside(self, state: FleetState, sets: Collection[str], hosts: Collection[str]) -> tuple[str, ...]:
        """The hosts among these that no longer have a VM of these sets."""

        def look() -> tuple[str, ...]:
            inside: set[str] = set()
            for name in sets:
                inside.update(state.set_index(name).hosts)
            return tuple(host for host in hosts if host not in inside)

        return self._remembered(state, sets, hosts, look)

    def _remembered(
        self, state: FleetState, one: object, two: object, look: Callable[[], tuple[T, ...]]
    ) -> tuple[T, ...]:
        if state.placements != self._placements or len(self._found) >= _REMEMBERED:
            self._placements = state.placements
            self._found.clear()
        key = id(one), id(two)
        known = self._found.get(key)
        if known is None or known[0] is not one or known[1] is not two:
            known = one, two, look()
            self._found[key] = known
        return known[2]  # type: ignore[return-value]


class FleetFence:
    """A read-only view of the fleet.

    Args:
        state: the fold of the bus; it may change between two decisions, never within one.
        commanded: maps a host to an operation that it was commanded and has not answered: its inventory may not show it yet.
        contested: for a plan: the VMs that are left as they are because their host is ambiguous.
        incomplete: maps a host to its newest inventory, of which parts are missing: the state of its VMs is not known. It may change, like the state.
        grace_until: after an outage of the broker, agents that are retained as online may still be reconnecting until then.
    """

    def __init__(
        self,
        state: FleetState,
        *,
        commanded: Callable[[], Mapping[str, str]] = dict,
        contested: Mapping[str, Contested] | None = None,
        grace_until: datetime | None = None,
        incomplete: Mapping[str, HostInventory] | None = None,
        places: _Places | None = None,
    ) -> None:
        self.state = state
        self.incomplete: Mapping[str, HostInventory] = incomplete if incomplete is not None else {}
        self.contested: Mapping[str, Contested] = contested or {}
        self.grace_until = grace_until
        self._commanded = commanded
        self._commanded_now: Mapping[str, str] | None = None
        self._places = places or _Places()

    def with_contested(self, contested: Mapping[str, Contested]) -> FleetFence:
        """This view with the VMs that several hosts name."""
        return self._view(contested=contested)

    def with_commanded(self, commanded: Callable[[], Mapping[str, str]]) -> FleetFence:
        """This view with the commands of other rollouts to its hosts; computed when a gate needs it."""
        return self._view(commanded=commanded)

    def with_reconnect_grace(self, until: datetime) -> FleetFence:
        """This view after an outage of the broker."""
        return self._view(grace_until=until)

    def _view(
        self,
        *,
        commanded: Callable[[], Mapping[str, str]] | None = None,
        contested: Mapping[str, Contested] | None = None,
        grace_until: datetime | None = None,
    ) -> FleetFence:
        return FleetFence(
            self.state,
            commanded=commanded or self._commanded,
            contested=contested if contested is not None else self.contested,
            grace_until=grace_until or self.grace_until,
            incomplete=self.incomplete,
            places=self._places,
        )

    @property
    def inventories(self) -> Mapping[str, HostInventory]:
        """Maps a host to its latest inventory, with only the VMs that belong to it."""
        return self.state.inventories

    def commanded(self) -> Mapping[str, str]:
        """Maps a host to an operation that another rollout has commanded there."""
        if self._commanded_now is None:
            self._commanded_now = self._commanded()
        return self._commanded_now

    def is_online(self, host: str) -> bool:
        """Whether the host's updater says that it is on the bus; unknown counts as no."""
        return self.state.is_online(host)

    def vm(self, name: str) -> LocatedVm | None:
        """The VM and the host that it belongs to."""
        return self.state.vm(name)

    def vm_names(self) -> Collection[str]:
        """The VMs that belong to a host, and those that several hosts name."""
        return self.state.vm_names() | self.contested.keys() if self.contested else self.state.vm_names()

    def vms(self) -> Iterator[tuple[str, VmRecord]]:
        """Every VM with its host's name: the whole fleet, for a plan."""
        for host, inventory in sorted(self.inventories.items()):
            for vm in inventory.vms:
                yield host, vm

    def hosts_of(self, sets: Iterable[str]) -> set[str]:
        """Hosts that hold a VM of one of these sets."""
        return {host for name in sets for host in self.state.set_index(name).hosts}

    def epochs(self) -> list[int]:
        """The epoch that each host obeys."""
        reported = (*self.state.words.of(HostInventory), *self.incomplete.values())
        return [inventory.epoch for inventory in reported]

    def displaced(self, vms: tuple[PlannedVm, ...]) -> tuple[PlannedVm, ...]:
        """The planned VMs whose place or properties differ from the plan."""
        return self._places.displaced(self.state, vms)

    def outside(self, sets: Collection[str], hosts: Collection[str]) -> tuple[str, ...]:
        """The hosts among these that no longer have a VM of these sets."""
        return self._places.outside(self.state, sets, hosts)


def fence_blockers(
    fleet: FleetFence,
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
    fleet: FleetFence, host: str, sets: Collection[str], *, epoch: int, coordinator: str, own: Collection[str]
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


def health_blockers(fleet: FleetFence, vms: tuple[PlannedVm, ...]) -> list[Reason]:
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


def all_healthy(fleet: FleetFence, vms: Iterable[PlannedVm]) -> bool:
    """Whether all of these VMs, of one host, are healthy now."""
    return all(_unhealthy(fleet, vm) is None for vm in vms)


def _unhealthy(fleet: FleetFence, vm: PlannedVm) -> Reason | None:
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
    fleet: FleetFence, vms: tuple[PlannedVm, ...], done: Collection[str] = ()
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
        if _place(located.record) != _place(vm):
            found.append(
                Reason(
                    "vm_moved",
                    f"{vm.vm} is in {_place(located.record)} now, the plan has it in {_place(vm)}: abort and plan again",
                )
            )
    return found


def _as_planned(located: LocatedVm | None, vm: PlannedVm) -> bool:
    """Whether the VM counts towards its set as planned; if not, it has to be checked individually."""
    if located is None or located.host != vm.host or _place(located.record) != _place(vm):
        return False
    return located.record.agent or not vm.agent


def _place(vm: VmRecord | PlannedVm) -> str:
    return f"set {vm.set} update domain {vm.update_domain} fault domain {vm.fault_domain}"
