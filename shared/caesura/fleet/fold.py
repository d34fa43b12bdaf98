"""Folds one message into the fleet's state: ``apply(state, message, now_s) -> (state, changes)``. Pure.

Every service that folds the bus folds it here, so these are decided once:

- *A fact may come before its inventory.* Retained messages arrive in any order. Presences, agents, records and documents are kept by
  name, and count as soon as the inventory that they refer to arrives.
- *A cleared topic* retracts its last message and nothing else: a host without an inventory has no VMs, but what it has on record
  stays its own; one without a presence is not on the bus.
- *An older epoch, a lower incarnation* changes nothing (``words``). The last will of a coordinator has no epoch: it was made before
  one was claimed, and says that the leading coordinator is gone.

The cost of a message depends on its own size: for an inventory its VMs, for a presence the sets of that one host, otherwise constant.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import msgspec

from caesura.contract import messages as m
from caesura.contract.envelope import Message
from caesura.fleet.retained_messages import Cleared
from caesura.fleet.state import FleetState, LocatedVm


class Changes(msgspec.Struct, frozen=True, kw_only=True):
    """What a message changed: the names to evaluate again, and no others."""

    word: bool = False
    """Whether the last message on its topic is a different one now."""
    vms: frozenset[str] = frozenset()
    """VMs whose state changed: another host, record or agent."""
    before: Mapping[str, LocatedVm] = {}
    """The previous state of those VMs that belonged to a host before: what a view that counts VMs subtracts."""
    hosts: frozenset[str] = frozenset()
    """Hosts that changed in something other than their VMs."""
    sets: frozenset[str] = frozenset()
    """Sets of these VMs and hosts, before and now."""
    owners: frozenset[str] = frozenset()
    """Hosts that have or had one of these VMs: their effective inventories changed."""


NOTHING = Changes()


def together(changes: Iterable[Changes]) -> Changes:
    """What several messages changed."""
    found = [each for each in changes if each is not NOTHING]
    if len(found) < 2:
        return found[0] if found else NOTHING
    return Changes(
        word=any(each.word for each in found),
        vms=frozenset().union(*(each.vms for each in found)),
        before={vm: known for each in reversed(found) for vm, known in each.before.items()},
        hosts=frozenset().union(*(each.hosts for each in found)),
        sets=frozenset().union(*(each.sets for each in found)),
        owners=frozenset().union(*(each.owners for each in found)),
    )


def apply(state: FleetState, message: Message | Cleared, now_s: float) -> tuple[FleetState, Changes]:
    """Fold one message.

    Args:
        state: changed in place and returned; see ``FleetState`` for its ownership.
        message: a message, or the clearing of a topic. Messages that are not retained change nothing here.
        now_s: when it arrived, seconds on the receiver's monotonic clock.
    """
    if isinstance(message, Cleared):
        before = state.words.clear(message.kind, message.parameters, now_s)
        return state, _cleared(state, before) if before is not None else NOTHING
    taken = state.words.put(message, now_s, state.leader_epoch)
    if isinstance(message, m.CoordinatorPresence):
        _lead(state, message, refused=taken == "refused")
        _take_back_status(state, message, now_s)
    if taken != "new":
        return state, NOTHING
    match message:
        case m.HostInventory():
            changes = _inventory(state, message.host, message)
        case m.HostPresence():
            changes = _presence(state, message.host, online=message.online)
        case m.AgentPresence():
            changes = _agent(state, message.vm, online=message.online)
        case m.VmOwner():
            changes = _owner(state, message.vm, message.host)
        case _:
            changes = NOTHING
    return state, msgspec.structs.replace(changes, word=True)


def _cleared(state: FleetState, before: Message) -> Changes:
    match before:
        case m.HostInventory():
            changes = _inventory(state, before.host, None)
        case m.HostPresence():
            changes = _presence(state, before.host, online=False)
        case m.AgentPresence():
            changes = _agent(state, before.vm, online=None)
        case m.VmOwner():
            changes = _owner(state, before.vm, None)
        case m.CoordinatorPresence():
            state.coordinator = None
            changes = NOTHING
        case _:
            changes = NOTHING
    return msgspec.structs.replace(changes, word=True)


def _inventory(state: FleetState, host: str, inventory: m.HostInventory | None) -> Changes:
    known = state.reported(host)
    sets = state.sets_of_host(host)
    vms = state.put_inventory(host, inventory)
    same_head = inventory is not None and _head(known) == _head(inventory)
    return Changes(
        vms=frozenset(vms),
        before={vm: shift.before for vm, shift in vms.items() if shift.before is not None},
        hosts=frozenset(() if same_head else {host}),
        sets=frozenset().union(
            *(shift.sets for shift in vms.values()), () if same_head else sets | state.sets_of_host(host)
        ),
        owners=frozenset().union(*(shift.hosts for shift in vms.values())),
    )


def _presence(state: FleetState, host: str, *, online: bool) -> Changes:
    if not state.put_host(host, online=online):
        return NOTHING
    return Changes(hosts=frozenset({host}), sets=frozenset(state.sets_of_host(host)))


def _agent(state: FleetState, vm: str, *, online: bool | None) -> Changes:
    if not state.put_agent(vm, online=online):
        return NOTHING
    located = state.vm(vm)
    return Changes(vms=frozenset({vm}), sets=frozenset({located.record.set} if located else ()))


def _owner(state: FleetState, vm: str, host: str | None) -> Changes:
    shift = state.put_record(vm, host)
    if shift is None:
        return NOTHING
    before = {vm: shift.before} if shift.before is not None else {}
    return Changes(vms=frozenset({vm}), before=before, sets=shift.sets, owners=shift.hosts)


def _lead(state: FleetState, presence: m.CoordinatorPresence, *, refused: bool) -> None:
    known = state.coordinator
    if not refused:
        state.coordinator = presence
    elif known is not None and not presence.online and presence.epoch == 0:
        # If it were the will of another coordinator, the leader would announce itself again at once.
        state.coordinator = msgspec.structs.replace(known, online=False)


def _take_back_status(state: FleetState, presence: m.CoordinatorPresence, now_s: float) -> None:
    """A will has the name of the coordinator's settings, as its status: one that is killed has no other will."""
    known = state.words.get(m.CoordinatorStatus, presence.coordinator)
    if known is not None and known.online and not presence.online and presence.epoch == 0:
        state.words.put(
            msgspec.structs.replace(known, online=False, leads=False, waits_for=""), now_s, state.leader_epoch
        )


def _head(inventory: m.HostInventory | None) -> m.HostInventory | None:
    return msgspec.structs.replace(inventory, vms=()) if inventory is not None else None
