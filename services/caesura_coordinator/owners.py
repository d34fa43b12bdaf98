"""Which host each VM belongs to: decided from the hosts' reports, stored before it takes effect, published until the bus shows it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from caesura.contract.messages import MOST_RIVALS, HostInventory, HostPresence, VmOwner
from caesura.fleet.fold import NOTHING, Changes, apply, together
from caesura.fleet.retained_messages import Cleared
from caesura.fleet.state import FleetState
from caesura.lifecycle.ownership import conflict, settle
from caesura.runtime.errors import StoreError
from caesura.runtime.logs import get_logger
from caesura.runtime.sampler import Sampler
from caesura_coordinator.fleet_snapshot import Contested
from caesura_coordinator.store import CoordinatorStore

_NAMED = 8
"""How many VMs a log line names; the others are only counted."""

_log = get_logger("caesura.coordinator")


class Owners:
    """Records of VMs and hosts.

    Args:
        store: where the records are kept.
        state: the fold in which they take effect.
    """

    def __init__(self, store: CoordinatorStore, state: FleetState) -> None:
        self._store = store
        self._state = state
        self._ownership = state.ownership
        self._epochs: dict[str, int] = {}
        """Maps a VM to the epoch of its record."""
        self._epoch = 0
        """Our epoch; 0 before it is claimed: then no decision is made."""
        self._observed: dict[str, VmOwner] = {}
        """Maps a VM to the record on the bus, as far as it was received or sent."""
        self._due: set[str] = set()
        """VMs whose record on the bus may differ from the one kept here, without those that are on their way there."""
        self._sampled = Sampler()
        self._foreign: dict[str, frozenset[str]] = {}
        """Maps a host to the VMs that the log last reported it to name without owning them."""

    # -- input: each returns the changes to the fleet ------------------------------------------------------

    def lead(self, epoch: int) -> Changes:
        """An epoch was claimed: from now on records are made. The records of the store take effect, and newer ones on the bus.

        Raises:
            StoreError: the records cannot be read.
        """
        known = self._store.owners()
        for vm, observed in self._observed.items():
            if observed.host and (vm not in known or known[vm][1] < observed.epoch):
                known[vm] = observed.host, observed.epoch
        self._epoch = epoch
        self._epochs = {vm: at for vm, (_, at) in known.items()}
        changes = [self._record(vm, host) for vm, (host, _) in known.items()]
        self._save({vm: host for vm, (host, _) in known.items()})
        changes.append(self._settle({*known, *self._observed, *self._ownership.all_named()}))
        return together(changes)

    def reported(self, inventory: HostInventory, now_s: float) -> Changes:
        """A host's inventory arrived."""
        host = inventory.host
        touched = self._ownership.named(host) | self._ownership.recorded(host)
        _, taken = apply(self._state, inventory, now_s)
        touched |= self._ownership.named(host)
        settled = self._settle(touched)
        self._say(host)
        return together([taken, settled])

    def seen(self, presence: HostPresence, now_s: float) -> Changes:
        """A host's presence arrived: an online host releases the VMs that it does not list."""
        _, taken = apply(self._state, presence, now_s)
        settled = self._settle(self._ownership.recorded(presence.host)) if presence.online else NOTHING
        return together([taken, settled])

    def forgotten(self, host: str, now_s: float) -> Changes:
        """An operator removed the host permanently: it has no VM any more."""
        self._foreign.pop(host, None)
        recorded = self._ownership.recorded(host)
        had = recorded | self._ownership.named(host)
        changes = [
            apply(self._state, Cleared(kind, {"host": host}), now_s)[1]
            for kind in (HostInventory, HostPresence)
        ]
        if self._epoch and self._save(dict.fromkeys(recorded)):
            changes += [self._record(vm, None) for vm in recorded]
        changes.append(self._settle(had))
        return together(changes)

    def observed(self, vm: str, owner: VmOwner | None) -> None:
        """A record is on the bus (None: it was removed): either our own, echoed, or another's, which must not stay."""
        if owner is None:
            self._observed.pop(vm, None)
        else:
            self._observed[vm] = owner
        self._due.add(vm)

    def reconnected(self) -> None:
        """The broker may have lost retained records; it sends again those that it has."""
        self._observed.clear()
        self._due |= self._epochs.keys() | self._ownership.contested

    # -- output --------------------------------------------------------------------------------------------

    def unpublished(self) -> list[tuple[str, VmOwner | None]]:
        """What must be published (None: removed) for the bus to show the records.

        Each is named once, until something about it changes: with 10,000 VMs, all that wait for the broker would else be looked at for each message.
        """
        due, self._due = self._due, set()
        wanted = ((vm, self._wanted(vm)) for vm in sorted(due))
        return [(vm, owner) for vm, owner in wanted if owner != self._observed.get(vm)]

    def not_published(self, vms: Iterable[str]) -> None:
        """These were named by ``unpublished`` and will not be published: they are named again."""
        self._due |= set(vms)

    def published(self, vm: str, owner: VmOwner | None) -> None:
        """The broker accepted it."""
        if owner is None:
            self._observed.pop(vm, None)
        else:
            self._observed[vm] = owner
        if owner != self._wanted(vm):
            self._due.add(vm)

    def contested(self) -> dict[str, Contested]:
        """The VMs that several hosts name, each with the problem and the description of one of them."""
        found = {}
        for vm in sorted(self._ownership.contested):
            owner, rivals = self._ownership.owner_of(vm), self._ownership.rivals(vm)
            host = owner if owner and self._ownership.names(owner, vm) else rivals[0]
            found[vm] = Contested(
                record=self._ownership.described(host, vm), host=host, reason=conflict(owner, rivals)
            )
        return found

    # -- internal ------------------------------------------------------------------------------------------

    def _wanted(self, vm: str) -> VmOwner | None:
        host = self._ownership.record(vm)
        if host is None:
            return None
        return VmOwner(
            vm=vm,
            host=host,
            epoch=self._epochs.get(vm, self._epoch),
            contested_by=self._ownership.rivals(vm)[:MOST_RIVALS],
        )

    def _record(self, vm: str, host: str | None) -> Changes:
        """Our own record takes effect from now on. Records on the bus are not folded: they are ours, or will be replaced by ours."""
        if host is None:
            _, changes = apply(self._state, Cleared(VmOwner, {"vm": vm}), 0.0)
        else:
            _, changes = apply(self._state, VmOwner(vm=vm, host=host, epoch=self._epoch), 0.0)
        return changes

    def _settle(self, vms: Iterable[str]) -> Changes:
        if not self._epoch:
            return NOTHING
        vms = set(vms)
        changes = settle(self._ownership, vms, self._state.is_online)
        self._due |= vms
        if not changes or not self._save(changes):
            return NOTHING
        found = []
        for vm, host in changes.items():
            before = self._ownership.record(vm)
            if before and host:
                _log.info("vm.moved", vm=vm, host=host, before=before)
            if host:
                self._epochs[vm] = self._epoch
            else:
                self._epochs.pop(vm, None)
            found.append(self._record(vm, host))
        return together(found)

    def _save(self, changes: Mapping[str, str | None]) -> bool:
        """Store the records; returns whether that succeeded. Otherwise they have no effect and are decided again with the next inventory."""
        try:
            with self._store.transaction():
                for vm, host in changes.items():
                    self._store.save_owner(vm, host or None, self._epochs.get(vm, self._epoch))
        except StoreError as error:
            _log.error("vm.owner_not_stored", vms=len(changes), why=str(error))
            return False
        return True

    def _say(self, host: str) -> None:
        """Log once the VMs that a host names without owning them."""
        foreign = frozenset(
            vm for vm in self._ownership.contested_of(host) if self._ownership.owner_of(vm) != host
        )
        if not self._epoch or foreign == self._foreign.get(host, frozenset()):
            return
        self._foreign[host] = foreign
        left_out = self._sampled.due(host) if foreign else None
        if left_out is None:
            return
        some = sorted(foreign)[:_NAMED]
        _log.error(
            "vm.contested",
            host=host,
            vms=len(foreign),
            belongs_to={vm: self._ownership.owner_of(vm) for vm in some},
            left_out=left_out,
            advice="only the host on record counts for these VMs; rename them there, or take them out of its host file: see "
            "'A VM has two hosts' in docs/operate/runbooks/vm-has-two-hosts.md",
        )
