"""The places of VMs, for the live page: the number per domain, and the domain key of a set. A view of ``StateFold``. Pure."""

from __future__ import annotations

from collections import Counter

from caesura.fleet.state import LocatedVm
from caesura_metrics_exporter.live.timelines import DomainKey
from caesura_metrics_exporter.state_fold import StateFold

Place = tuple[DomainKey, int]


class Places:
    """See the module. Only the VMs of fault domains are counted here: the fold counts those of update domains."""

    def __init__(self, folded: StateFold) -> None:
        self._state = folded.state
        self._rollouts = folded.rollouts
        self._in_fault: Counter[tuple[str, int]] = Counter()

    def moved(self, before: LocatedVm | None, after: LocatedVm | None) -> None:
        """The state of a VM changed."""
        for located, by in ((after, 1), (before, -1)):
            if located is None:
                continue
            domain = (located.record.set, located.record.fault_domain)
            self._in_fault[domain] += by
            if not self._in_fault[domain]:
                del self._in_fault[domain]

    def count(self, set_name: str, key: DomainKey, domain: int) -> int:
        """The number of VMs of the domain."""
        if key == "fault_domain":
            return self._in_fault[set_name, domain]
        return len(self._state.set_index(set_name).domains.get(domain, ()))

    def of(self, vm: str, set_name: str, update_domain: int) -> Place:
        """The VM's domain by the key of the rollout that holds its set; by its update domain if its fault domain is not known."""
        holder = self._rollouts.holder(set_name)
        if holder is not None and holder.policy.domain_key == "fault_domain":
            located = self._state.vm(vm)
            if located is not None:
                return "fault_domain", located.record.fault_domain
        return "update_domain", update_domain
