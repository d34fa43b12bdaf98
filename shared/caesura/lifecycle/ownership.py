"""Which host a VM belongs to: the fold of the coordinator's records and the hosts' inventories. Pure.

A VM belongs to the host that the coordinator has on record, and only that host's reports about it count. Inventories are
retained, and arrive in any order, so neither the first nor the last one decides. Where there is no record (yet, or with
a coordinator that writes none), a VM belongs to the only host that names it, and to none when there are several.

The cost of a message depends on its own size, not on the size of the fleet.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import msgspec

from caesura.contract.messages import HostInventory, VmRecord


class Ownership:
    """Records, inventories as received, and effective inventories with each host's own VMs only."""

    def __init__(self) -> None:
        self._records: dict[str, str] = {}
        """Maps a VM to its host; an empty host is a record, too: several hosts name the VM, and none has it."""
        self._recorded: dict[str, set[str]] = {}
        """Maps a host to the VMs that it has on record."""
        self._inventories: dict[str, HostInventory] = {}
        self._named: dict[str, dict[str, VmRecord]] = {}
        self._namers: dict[str, set[str]] = {}
        self._contested: set[str] = set()

    # -- input: each returns the VMs whose owner changed -------------------------------------------------------

    def put_inventory(self, inventory: HostInventory) -> dict[str, tuple[str, str]]:
        """Take a host's inventory. Returns each VM whose owner changed, with the owner before and now."""
        host = inventory.host
        before = self._named.get(host, {})
        after = {record.vm: record for record in inventory.vms}
        self._inventories[host] = inventory
        self._named[host] = after
        return self._rename(host, before.keys() - after.keys(), after.keys() - before.keys())

    def drop_inventory(self, host: str) -> dict[str, tuple[str, str]]:
        """Take the removal of a host's inventory. It keeps the VMs that it has on record, until the coordinator changes that."""
        self._inventories.pop(host, None)
        return self._rename(host, self._named.pop(host, {}).keys(), ())

    def put_record(self, vm: str, host: str | None) -> tuple[str, str] | None:
        """Take the coordinator's record of a VM: its host, no host (empty), or the removal of the record (None).

        Returns the owner before and now; None if it did not change.
        """
        before = self.owner_of(vm)
        old = self._records.pop(vm, "")
        if old:
            recorded = self._recorded[old]
            recorded.discard(vm)
            if not recorded:
                del self._recorded[old]
        if host is not None:
            self._records[vm] = host
            if host:
                self._recorded.setdefault(host, set()).add(vm)
        self._look(vm)
        after = self.owner_of(vm)
        return None if before == after else (before, after)

    # -- queries -------------------------------------------------------------------------------------------

    def owner_of(self, vm: str) -> str:
        """The host that the VM belongs to; empty if there is none, or the VM is not known."""
        recorded = self._records.get(vm)
        if recorded is not None:
            return recorded
        namers = self._namers.get(vm, ())
        return next(iter(namers)) if len(namers) == 1 else ""

    def may_speak(self, host: str, vm: str) -> bool:
        """Whether the host's reports about this VM count. For a VM that no inventory has named yet, every host's do."""
        if vm not in self._records and vm not in self._namers:
            return True
        return self.owner_of(vm) == host

    def judged(self, host: str) -> HostInventory:
        """The host's inventory with its own VMs only.

        Raises:
            KeyError: it has reported none.
        """
        inventory = self._inventories[host]
        own = tuple(record for record in inventory.vms if self.owner_of(record.vm) == host)
        if len(own) == len(inventory.vms):
            return inventory
        return msgspec.structs.replace(inventory, vms=own)

    def record(self, vm: str) -> str | None:
        """The coordinator's record, None if there is none."""
        return self._records.get(vm)

    def recorded(self, host: str) -> frozenset[str]:
        """The VMs that the host has on record."""
        return frozenset(self._recorded.get(host, ()))

    def namers(self, vm: str) -> set[str]:
        """The hosts whose inventory names the VM."""
        return set(self._namers.get(vm, ()))

    def named(self, host: str) -> frozenset[str]:
        """The VMs that the host's inventory names."""
        return frozenset(self._named.get(host, ()))

    def all_named(self) -> frozenset[str]:
        """The VMs that any inventory names."""
        return frozenset(self._namers)

    def described(self, host: str, vm: str) -> VmRecord:
        """The VM as the host describes it. Raises KeyError if it does not name it."""
        return self._named[host][vm]

    def names(self, host: str, vm: str) -> bool:
        """Whether the host's inventory names the VM."""
        return vm in self._named.get(host, {})

    def reported(self, host: str) -> bool:
        """Whether the host has reported an inventory."""
        return host in self._inventories

    def rivals(self, vm: str) -> tuple[str, ...]:
        """The hosts that name the VM without owning it."""
        return tuple(sorted(self.namers(vm) - {self.owner_of(vm)}))

    def contested_of(self, host: str) -> frozenset[str]:
        """The VMs that the host names and that other hosts name, too, without owning them."""
        return frozenset(self._named.get(host, ())) & self._contested

    @property
    def contested(self) -> frozenset[str]:
        """The VMs that have rival hosts."""
        return frozenset(self._contested)

    def foreign(self) -> Mapping[str, int]:
        """Maps a host to the number of VMs that it names without owning them; hosts without such VMs are left out."""
        found: dict[str, int] = {}
        for vm in self._contested:
            for host in self.rivals(vm):
                found[host] = found.get(host, 0) + 1
        return found

    # -- internal ------------------------------------------------------------------------------------------

    def _rename(self, host: str, gone: Iterable[str], new: Iterable[str]) -> dict[str, tuple[str, str]]:
        """Update the index; returns the VMs without a record whose owner changed."""
        changed: dict[str, tuple[str, str]] = {}
        gone, new = set(gone), set(new)
        for vm in gone | new:
            before = self.owner_of(vm)
            namers = self._namers.setdefault(vm, set())
            if vm in new:
                namers.add(host)
            else:
                namers.discard(host)
            after = self.owner_of(vm)
            if before != after:
                changed[vm] = before, after
            if not namers:
                del self._namers[vm]
            self._look(vm)
        return changed

    def _look(self, vm: str) -> None:
        if self.rivals(vm):
            self._contested.add(vm)
        else:
            self._contested.discard(vm)


def settle(
    ownership: Ownership, vms: Iterable[str], is_online: Callable[[str], bool]
) -> dict[str, str | None]:
    """The records that must change among these VMs, so that each VM belongs to its host until that host releases it.

    A host has released a VM when it is online and its inventory does not list it any more. A released VM, or one without a
    record, goes to the only host that names it; where several do, to none of them.

    Args:
        is_online: whether a host's updater is on the bus; unknown counts as no.
    """
    changes: dict[str, str | None] = {}
    for vm in vms:
        host = ownership.record(vm)
        if host:
            released = is_online(host) and ownership.reported(host) and not ownership.names(host, vm)
            if not released:
                continue
        namers = ownership.namers(vm)
        wanted = "" if len(namers) > 1 else next(iter(namers), None)
        if wanted != host:
            changes[vm] = wanted
    return changes


def conflict(owner: str, rivals: Iterable[str]) -> str:
    """The problem with a contested VM, and what to do about it."""
    named = ", ".join(rivals)
    if owner:
        return (
            f"it belongs to {owner}, and {named} names a VM of this name, too: rename one, or take it out of one host's "
            "host file"
        )
    return f"{named} all name a VM of this name, and none has it on record: rename one, or take it out of the others' host files"
