"""The VMs of a wave by name and by host: computed once for each plan, since a wave keeps its VMs. Pure."""

from __future__ import annotations

import msgspec

from caesura.contract.messages import PlannedVm

_KEPT = 128
"""How many waves are cached: the current ones of all rollouts, and some more."""


class Members(msgspec.Struct, frozen=True):
    """See the module."""

    by_vm: dict[str, PlannedVm]
    by_host: dict[str, tuple[PlannedVm, ...]]
    position: dict[str, int]
    """Maps a VM to its position in the wave: the order in which VMs are named."""
    host_position: dict[str, int]
    sets: tuple[str, ...]
    agents: int
    """VMs whose agent must answer an event."""
    verdicts: int
    """VMs that get a verdict on their clock."""


_known: dict[int, tuple[tuple[PlannedVm, ...], Members]] = {}
"""Keyed by the identity of the tuple, which is kept here, so that no other tuple can have that identity."""


def members_of(vms: tuple[PlannedVm, ...]) -> Members:
    """The members of a wave with these VMs."""
    known = _known.get(id(vms))
    if known is not None and known[0] is vms:
        return known[1]
    by_host: dict[str, list[PlannedVm]] = {}
    for vm in vms:
        by_host.setdefault(vm.host, []).append(vm)
    found = Members(
        by_vm={vm.vm: vm for vm in vms},
        by_host={host: tuple(of_host) for host, of_host in by_host.items()},
        position={vm.vm: number for number, vm in enumerate(vms)},
        host_position={host: number for number, host in enumerate(by_host)},
        sets=tuple(dict.fromkeys(vm.set for vm in vms)),
        agents=sum(vm.agent for vm in vms),
        verdicts=sum(has_verdict(vm) for vm in vms),
    )
    while len(_known) >= _KEPT:
        del _known[next(iter(_known))]
    _known[id(vms)] = vms, found
    return found


def has_verdict(vm: PlannedVm) -> bool:
    """Whether the VM's host gives a verdict on its clock after the pause."""
    # A guest that was restarted has its time from its boot, and was never paused.
    return vm.method not in ("live", "reboot") and vm.clock != "none"
