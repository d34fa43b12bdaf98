"""The fleet as decisions look it up: the fold of the bus, and what the coordinator itself knows beside it. Pure."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from datetime import datetime
from typing import TypeVar

from caesura.contract.messages import HostInventory, PlannedVm, VmRecord
from caesura.fleet.state import FleetState, LocatedVm
from caesura_coordinator.fleet_snapshot import Contested, FleetSnapshot

T = TypeVar("T")
_REMEMBERED = 64


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


class FleetLookup:
    """A read-only view of the fleet.

    Args:
        state: the fold of the bus; it may change between two decisions, never within one.
        commanded: maps a host to an operation that it was commanded and has not answered: its inventory may not show it yet.
        incomplete: maps a host to its newest inventory, of which parts are missing: the state of its VMs is not known. It may change, like the state.
        other_fleets: maps a host that says it is of another fleet to that fleet. It may change, like the state.
        grace_until: after an outage of the broker, agents that are retained as online may still be reconnecting until then.
    """

    def __init__(
        self,
        state: FleetState,
        *,
        commanded: Callable[[], Mapping[str, str]] = dict,
        grace_until: datetime | None = None,
        incomplete: Mapping[str, HostInventory] | None = None,
        places: _Places | None = None,
        other_fleets: Mapping[str, str] | None = None,
    ) -> None:
        self.state = state
        self.incomplete: Mapping[str, HostInventory] = incomplete if incomplete is not None else {}
        self.other_fleets: Mapping[str, str] = other_fleets if other_fleets is not None else {}
        self.grace_until = grace_until
        self._commanded = commanded
        self._commanded_now: Mapping[str, str] | None = None
        self._places = places or _Places()

    def snapshot(self, contested: Mapping[str, Contested] | None = None) -> FleetSnapshot:
        """The fleet as it is now, for a plan, with the VMs that several hosts name."""
        return FleetSnapshot(
            dict(self.inventories),
            online={host for host in self.state.reporting_hosts() if self.is_online(host)},
            contested=contested,
            other_fleets=dict(self.other_fleets),
        )

    def with_commanded(self, commanded: Callable[[], Mapping[str, str]]) -> FleetLookup:
        """This view with the commands of other rollouts to its hosts; computed when a gate needs it."""
        return self._view(commanded=commanded)

    def with_reconnect_grace(self, until: datetime) -> FleetLookup:
        """This view after an outage of the broker."""
        return self._view(grace_until=until)

    def _view(
        self,
        *,
        commanded: Callable[[], Mapping[str, str]] | None = None,
        grace_until: datetime | None = None,
    ) -> FleetLookup:
        return FleetLookup(
            self.state,
            commanded=commanded or self._commanded,
            grace_until=grace_until or self.grace_until,
            incomplete=self.incomplete,
            places=self._places,
            other_fleets=self.other_fleets,
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
        """The VMs that belong to a host."""
        return self.state.vm_names()

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


def _as_planned(located: LocatedVm | None, vm: PlannedVm) -> bool:
    """Whether the VM counts towards its set as planned; if not, it has to be checked individually."""
    if located is None or located.host != vm.host or place(located.record) != place(vm):
        return False
    return located.record.agent or not vm.agent


def place(vm: VmRecord | PlannedVm) -> str:
    """The set and domains of a VM, as text that is compared and shown."""
    return f"set {vm.set} update domain {vm.update_domain} fault domain {vm.fault_domain}"
