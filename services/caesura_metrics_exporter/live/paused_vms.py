"""Which VMs are paused now, by set, domain and host. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import msgspec

from caesura_metrics_exporter.live.page_json import PausedVm
from caesura_metrics_exporter.live.timelines import DomainKey

_LATE_S = 1.0  # s by which a fact may be late, or a clock behind, without being marked


class Paused(msgspec.Struct, frozen=True):
    """A VM that is paused. Known from its fact, or only from its host's inventory: then ``since`` and ``budget`` are None."""

    vm: str
    set: str
    update_domain: int
    key: DomainKey
    domain: int
    """By ``key``."""
    host: str
    received: float
    """When it was received, by the exporter's clock."""
    operation: str = ""
    method: str = ""
    since: float | None = None
    budget: float | None = None


class PausedVms:
    """See the module."""

    def __init__(self) -> None:
        self._vms: dict[str, Paused] = {}
        self._domains: dict[str, dict[tuple[DomainKey, int], set[str]]] = {}
        self._hosts: dict[str, set[str]] = {}

    def __len__(self) -> int:
        return len(self._vms)

    def __iter__(self) -> Iterator[Paused]:
        return iter(self._vms.values())

    def get(self, vm: str) -> Paused | None:
        """The pause of a VM, None if it is not paused."""
        return self._vms.get(vm)

    def of(self, set_name: str) -> list[Paused]:
        """Those of a set."""
        domains = self._domains.get(set_name, {}).values()
        return [self._vms[vm] for vms in domains for vm in sorted(vms)]

    def on(self, host: str) -> list[Paused]:
        """Those of a host."""
        return [self._vms[vm] for vm in sorted(self._hosts.get(host, ()))]

    def add(self, paused: Paused) -> None:
        """The VM is paused."""
        self.remove(paused.vm)
        self._vms[paused.vm] = paused
        self._domains.setdefault(paused.set, {}).setdefault((paused.key, paused.domain), set()).add(paused.vm)
        self._hosts.setdefault(paused.host, set()).add(paused.vm)

    def remove(self, vm: str) -> None:
        """It runs."""
        paused = self._vms.pop(vm, None)
        if paused is None:
            return
        of_host = self._hosts[paused.host]
        of_host.discard(vm)
        if not of_host:
            del self._hosts[paused.host]
        of_set = self._domains[paused.set]
        of_set[paused.key, paused.domain].discard(vm)
        if not of_set[paused.key, paused.domain]:
            del of_set[paused.key, paused.domain]
        if not of_set:
            del self._domains[paused.set]

    def count_in(self, set_name: str, key: DomainKey, domain: int) -> int:
        """How many VMs of this domain are paused."""
        return len(self._domains.get(set_name, {}).get((key, domain), ()))

    def count_of(self, vms: Iterable[str]) -> int:
        """How many of these are paused."""
        return sum(vm in self._vms for vm in vms) if self._vms else 0

    def clash(self, set_name: str) -> list[int]:
        """Domains of the set in which VMs are paused at once, where there are two or more.

        After an outage of the exporter, old facts may arrive after current inventories: a pause known only from
        an inventory does not conflict with one known from a fact.
        """
        of_set = self._domains.get(set_name, {})
        if len(of_set) < 2:
            return []
        for key in ("update_domain", "fault_domain"):
            for by_fact in (True, False):
                found = sorted(
                    domain
                    for (by, domain), vms in of_set.items()
                    if by == key and any((self._vms[vm].since is not None) == by_fact for vm in vms)
                )
                if len(found) > 1:
                    return found
        return []

    def shift(self, by: float) -> None:
        """The wall clock jumped."""
        self._vms = {
            vm: msgspec.structs.replace(
                each, since=None if each.since is None else each.since + by, received=each.received + by
            )
            for vm, each in self._vms.items()
        }

    def view(self, most: int) -> tuple[PausedVm, ...]:
        """As it is sent, ordered by the end of the budget.

        A host's clock may be behind: ``since`` is never before the receipt.
        """
        by_end = sorted(self._vms.values(), key=lambda each: (each.since or 0.0) + (each.budget or 0.0))
        return tuple(
            PausedVm(
                vm=each.vm,
                set=each.set,
                domain=each.domain,
                host=each.host,
                method=each.method,
                since=None if each.since is None else max(each.since, each.received),
                budget=each.budget,
                or_earlier=each.since is not None and each.since < each.received - _LATE_S,
            )
            for each in by_end[:most]
        )
