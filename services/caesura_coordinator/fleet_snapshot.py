"""The fleet at one moment, as a plan reads it. It does not change, so a plan may be made in another thread. Pure."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from functools import cached_property

import msgspec

from caesura.contract.messages import HostInventory, VmRecord
from caesura.fleet.state import LocatedVm


class Contested(msgspec.Struct, frozen=True, kw_only=True):
    """A VM that several hosts name."""

    record: VmRecord
    """As ``host`` describes it."""
    host: str
    """The host it belongs to; if there is none, one that names it."""
    reason: str


class FleetSnapshot:
    """See the module. Taking one costs as much as the fleet has hosts; what is derived of it is computed when it is first read.

    Args:
        inventories: maps a host to its latest inventory, with only the VMs that belong to it.
        online: the hosts whose updaters are on the bus.
        contested: the VMs that are left as they are because their host is ambiguous.
        other_fleets: maps a host that says it is of another fleet to that fleet.
    """

    def __init__(
        self,
        inventories: Mapping[str, HostInventory],
        *,
        online: Collection[str],
        contested: Mapping[str, Contested] | None = None,
        other_fleets: Mapping[str, str] | None = None,
    ) -> None:
        self.inventories = inventories
        self.contested: Mapping[str, Contested] = contested or {}
        self.other_fleets: Mapping[str, str] = other_fleets or {}
        self._online = online

    def is_online(self, host: str) -> bool:
        """Whether the host's updater says that it is on the bus; unknown counts as no."""
        return host in self._online

    def vm(self, name: str) -> LocatedVm | None:
        """The VM and the host that it belongs to."""
        return self._located.get(name)

    def vm_names(self) -> Collection[str]:
        """The VMs that belong to a host, and those that several hosts name."""
        return self._located.keys() | self.contested.keys()

    def vms(self) -> Iterator[tuple[str, VmRecord]]:
        """Every VM with its host's name."""
        for host, inventory in sorted(self.inventories.items()):
            for vm in inventory.vms:
                yield host, vm

    def sets(self) -> Collection[str]:
        """The sets that have a VM."""
        return self._hosts_of_set.keys()

    def hosts_of(self, sets: Iterable[str]) -> set[str]:
        """Hosts that hold a VM of one of these sets."""
        return {host for name in sets for host in self._hosts_of_set.get(name, ())}

    @cached_property
    def _located(self) -> dict[str, LocatedVm]:
        return {vm.vm: LocatedVm(host, vm) for host, vm in self.vms()}

    @cached_property
    def _hosts_of_set(self) -> dict[str, set[str]]:
        found: dict[str, set[str]] = {}
        for host, vm in self.vms():
            found.setdefault(vm.set, set()).add(host)
        return found
