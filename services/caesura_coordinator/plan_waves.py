"""Which hosts or domains are updated together: waves, under the limits of the request. Pure.

First fit, lowest domains first. A wave has VMs of only one domain of each set (I1), whatever the limits: they make
waves smaller, never larger.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import msgspec

from caesura.contract.messages import Limits, PlannedVm, PlannedWave, VmRecord
from caesura.contract.names import own_set

_DEFAULT_SHARE = 10
"""The default limit is one host in this many where nothing else limits a wave: VMs in no set have no domains that would."""


MOST_EVENTS = 128
"""The most hosts with VMs of one set in a wave: each has an event in the set's document, which is one message, and is sent again
when one of them is approved or ends. An event takes 360 bytes and the names of its VMs."""


class Member(msgspec.Struct, frozen=True, kw_only=True):
    """A VM that the plan acts on. ``domain`` is its domain under the rollout's domain key."""

    host: str
    vm: VmRecord
    planned: PlannedVm
    domain: int

    @property
    def alone(self) -> bool:
        """Whether it is in no set, and so a set of its own."""
        return self.vm.set == own_set(self.vm.vm)


Unit = tuple[tuple[str, ...], list[Member]]
"""An indivisible unit: a host, or for scope vm a set's domain on one host. Its name and its VMs."""


class _Wave:
    """A wave being filled. ``most``: limit of hosts, 0 for none; ``alone_only``: only hosts with VMs in no set count."""

    def __init__(self, most: int, *, alone_only: bool) -> None:
        self.domains: dict[str, int] = {}
        self.members: list[Member] = []
        self._hosts: set[str] = set()
        self._hosts_of_set: dict[str, set[str]] = {}
        self._most = most
        self._alone_only = alone_only

    def takes(self, group: list[Member]) -> bool:
        """Add the unit if it does not conflict with the wave's units or make the wave too large."""
        domains = {each.vm.set: each.domain for each in group}
        if any(self.domains.get(name, domain) != domain for name, domain in domains.items()):
            return False
        host = group[0].host  # a unit is on one host
        known = [self._hosts_of_set.get(name, ()) for name in domains]
        if any(len(of_set) >= MOST_EVENTS and host not in of_set for of_set in known):
            return False
        counted = not self._alone_only or any(each.alone for each in group)
        hosts = self._hosts | {each.host for each in group} if counted else self._hosts
        if counted and self._most and self.members and len(hosts) > self._most:
            return False
        self.domains.update(domains)
        self.members.extend(group)
        self._hosts = hosts
        for name in domains:
            self._hosts_of_set.setdefault(name, set()).add(host)
        return True


def most_hosts(members: Iterable[Member], limits: Limits) -> int:
    """The most hosts of one wave, as requested or by default; 0: only domains limit it."""
    if limits.max_hosts:
        return limits.max_hosts
    members = list(members)
    if not any(each.alone for each in members):
        return 0
    return max(1, len({each.host for each in members}) // _DEFAULT_SHARE)


def canary_hosts(members: Sequence[Member], limits: Limits) -> frozenset[str]:
    """The canary hosts: the named one, or the requested number from the lowest domains that may be paused together."""
    if limits.canary_host:
        return frozenset({limits.canary_host} & {each.host for each in members})
    chosen: set[str] = set()
    taken: dict[str, int] = {}
    for (host,), group in sorted(_units(members, by_host=True), key=_order):
        if len(chosen) >= limits.canary_count:
            break
        domains = {(each.vm.set, each.domain) for each in group}
        if chosen and any(taken.get(name, domain) != domain for name, domain in domains):
            continue
        chosen.add(host)
        taken.update(domains)
    return frozenset(chosen)


def waves(members: Sequence[Member], *, by_host: bool, limits: Limits) -> list[PlannedWave]:
    """The waves in order; those of the canary first.

    Args:
        by_host: a host is paused whole (scope host).
    """
    first = canary_hosts(members, limits)
    # A requested canary has the requested size; the default limit is for the other hosts.
    canary = _filled((each for each in members if each.host in first), limits.max_hosts, by_host=by_host)
    rest = _filled(
        (each for each in members if each.host not in first),
        most_hosts(members, limits),
        by_host=by_host,
        alone_only=not limits.max_hosts,
    )
    return [
        PlannedWave(
            wave=number,
            domains=wave.domains,
            hosts=tuple(dict.fromkeys(each.host for each in wave.members)),
            vms=tuple(each.planned for each in wave.members),
            canary=number < len(canary),
        )
        for number, wave in enumerate([*canary, *rest])
    ]


def _filled(members: Iterable[Member], most: int, *, by_host: bool, alone_only: bool = False) -> list[_Wave]:
    placed: list[_Wave] = []
    for _, group in sorted(_units(members, by_host=by_host), key=_order):
        if not any(wave.takes(group) for wave in placed):
            placed.append(_Wave(most, alone_only=alone_only))
            placed[-1].takes(group)
    return placed


def _units(members: Iterable[Member], *, by_host: bool) -> list[Unit]:
    units: dict[tuple[str, ...], list[Member]] = {}
    for member in members:
        # A set's domain split by host, so that a limit can divide it. Without a limit its hosts end up together,
        # since they are adjacent and conflict with the same waves.
        name = (member.host,) if by_host else (member.vm.set, f"{member.domain:02d}", member.host)
        units.setdefault(name, []).append(member)
    return list(units.items())


def _order(unit: Unit) -> tuple[list[int], tuple[str, ...]]:
    # A VM in no set is in domain 0 of itself, which does not determine its neighbours' place.
    return sorted({each.domain for each in unit[1] if not each.alone}), unit[0]
