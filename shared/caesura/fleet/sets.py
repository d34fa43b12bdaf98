"""One availability set: its VMs and hosts, and an index of everything among them that may block a pause. Pure.

Each collection holds only what blocks, so an empty one answers for the whole set at once, and a non-empty one gives
the names.
"""

from __future__ import annotations

import msgspec

from caesura.contract.messages import HostInventory, VmRecord
from caesura.lifecycle.command_compatibility import missing

Obeyed = tuple[int, str]
"""Epoch and coordinator that a host has acknowledged."""


class SetIndex(msgspec.Struct):
    """See the module."""

    vms: dict[str, str] = {}
    """Maps a VM to its host; only VMs that belong to a host."""
    domains: dict[int, set[str]] = {}
    """Maps an update domain to its VMs."""
    hosts: dict[str, Obeyed] = {}
    """The hosts that have a VM of the set, and the coordinator that they obey."""
    obeying: dict[Obeyed, set[str]] = {}
    """The inverse mapping."""
    offline: set[str] = msgspec.field(default_factory=set)
    """Hosts that are not on the bus."""
    outdated: set[str] = msgspec.field(default_factory=set)
    """Hosts that do not read this version's commands."""
    unguarded: set[str] = msgspec.field(default_factory=set)
    """Hosts without a pause guard."""
    busy: dict[str, str] = {}
    """Maps a host to the operation that it reports as under way."""
    held: set[str] = msgspec.field(default_factory=set)
    """VMs that are paused, or that may be paused because their state is unknown."""
    not_running: set[str] = msgspec.field(default_factory=set)
    unwell: set[str] = msgspec.field(default_factory=set)
    """Running VMs to whose state the host adds a detail, which is a problem."""
    agent_offline: set[str] = msgspec.field(default_factory=set)
    """VMs in which an agent is expected but not on the bus."""

    def not_obeying(self, obeyed: Obeyed) -> set[str]:
        """The hosts that have acknowledged another epoch or coordinator."""
        there = self.obeying.get(obeyed, set())
        return set() if len(there) == len(self.hosts) else self.hosts.keys() - there

    # -- updates: for ``state`` only ---------------------------------------------------------------------------

    def mark_host(self, inventory: HostInventory, *, online: bool) -> None:
        """Update the state of a host of the set."""
        host = inventory.host
        obeyed = (inventory.epoch, inventory.coordinator)
        if self.hosts.get(host) != obeyed:
            self._obey_no_more(host)
            self.hosts[host] = obeyed
            self.obeying.setdefault(obeyed, set()).add(host)
        _mark(self.offline, host, there=not online)
        _mark(self.outdated, host, there=bool(missing(inventory.commands)))
        _mark(self.unguarded, host, there=inventory.guard == "absent")
        if inventory.operation:
            self.busy[host] = inventory.operation
        else:
            self.busy.pop(host, None)

    def drop_host(self, host: str) -> None:
        """The host does not have a VM of the set any more."""
        self._obey_no_more(host)
        self.hosts.pop(host, None)
        self.offline.discard(host)
        self.outdated.discard(host)
        self.unguarded.discard(host)
        self.busy.pop(host, None)

    def mark_vm(self, record: VmRecord, *, agent_online: bool) -> None:
        """Update the state of a VM of the set."""
        _mark(self.held, record.vm, there=record.state in {"paused", "unknown"})
        _mark(self.not_running, record.vm, there=record.state != "running")
        _mark(self.unwell, record.vm, there=bool(record.state_detail))
        _mark(self.agent_offline, record.vm, there=record.agent and not agent_online)

    def put_vm(self, record: VmRecord, host: str) -> None:
        """A VM that belongs to this host is in the set now."""
        self.vms[record.vm] = host
        self.domains.setdefault(record.update_domain, set()).add(record.vm)

    def drop_vm(self, record: VmRecord) -> None:
        """It is no longer in the set, or in this domain of it."""
        del self.vms[record.vm]
        domain = self.domains[record.update_domain]
        domain.discard(record.vm)
        if not domain:
            del self.domains[record.update_domain]
        for each in (self.held, self.not_running, self.unwell, self.agent_offline):
            each.discard(record.vm)

    def _obey_no_more(self, host: str) -> None:
        obeyed = self.hosts.get(host)
        if obeyed is not None:
            there = self.obeying[obeyed]
            there.discard(host)
            if not there:
                del self.obeying[obeyed]


def _mark(names: set[str], name: str, *, there: bool) -> None:
    if there:
        names.add(name)
    else:
        names.discard(name)
