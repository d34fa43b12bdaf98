"""The VMs of a fleet, counted by state, by agent presence and by clock, updated with each message. Pure.

The entry of each VM is kept, so that the cost of a message depends on its changes, and that of a scrape on the number of sets and
domains.
"""

from __future__ import annotations

from typing import NamedTuple, get_args

from caesura.contract import messages as m
from caesura_metrics_exporter.metrics.agents import PRESENCES, Presence
from caesura_metrics_exporter.metrics.guest_clocks import Verdict
from caesura_metrics_exporter.metrics.series import Largest

VM_STATES: tuple[str, ...] = (*get_args(m.VmState), "impaired")
"""``impaired``: it runs, but its host reports a problem with it, such as that its application has ended."""

Domain = tuple[str, str]
"""Set, update domain."""


class Counted(NamedTuple):
    """The properties under which a VM is counted."""

    record: m.VmRecord
    state: str
    """One of ``VM_STATES``."""
    presence: Presence
    verdict: Verdict | None
    refused: bool
    """Whether its agent refuses to step its clock."""


class Census:
    """See the module. The dictionaries are for reading."""

    def __init__(self) -> None:
        self.sets: dict[str, int] = {}
        """Maps a set to its VMs; sets without VMs are left out, here and below."""
        self.states: dict[tuple[str, str, str], int] = {}
        """Set, update domain and state."""
        self.agents: dict[tuple[str, str], int] = {}
        """Set and presence, of VMs in which an agent is expected."""
        self.unsynced: dict[Domain, int] = {}
        self.refused: dict[Domain, int] = {}
        self._members: dict[Domain, int] = {}
        self._expected: dict[str, int] = {}
        self._errors: dict[tuple[str, str, str], Largest] = {}
        """Maps set, update domain, and before or after the sync to the clock errors by VM."""
        self._counted: dict[str, Counted] = {}
        self._unlooked: set[tuple[str, str, str]] = set()
        """Keys of ``_errors`` whose changes are not yet in the two below."""
        self._worst: dict[tuple[str, str, str], float] = {}
        self._bounds: dict[Domain, float] = {}

    def count(self, vm: str, now: Counted | None) -> None:
        """Count the VM like this from now on; None: not at all."""
        before = self._counted.get(vm)
        if before == now:
            return
        if before is not None and now is not None and _alike(before.record, now.record):
            self._change(before, now, vm)
        else:
            if before is not None:
                self._add(before, -1, vm)
            if now is not None:
                self._add(now, 1, vm)
        if now is None:
            del self._counted[vm]
        else:
            self._counted[vm] = now

    def worst_errors(self) -> dict[tuple[str, str, str], float]:
        """Maps set, update domain and when to the error of the VM with the largest one, signed, seconds."""
        self._look()
        return self._worst

    def bounds(self) -> dict[Domain, float]:
        """Maps a domain to the bound for the VM whose clock was off most after its sync, seconds."""
        self._look()
        return self._bounds

    def _look(self) -> None:
        for labels in self._unlooked:
            set_name, domain, when = labels
            errors = self._errors.get(labels)
            top = errors.top() if errors is not None else None
            if when == "after":
                self._bounds.pop((set_name, domain), None)
            if top is None:
                self._worst.pop(labels, None)
                continue
            self._worst[labels] = top[1]
            if when == "after":
                verdict = self._counted[top[0]].verdict
                if verdict is not None and verdict.bound_s is not None:
                    self._bounds[set_name, domain] = verdict.bound_s
        self._unlooked.clear()

    def _add(self, counted: Counted, by: int, vm: str) -> None:
        record = counted.record
        domain = (record.set, str(record.update_domain))
        _bump(self.sets, record.set, by)
        _bump(self._members, domain, by)
        if by > 0 and self._members[domain] == 1:
            self.states.update(dict.fromkeys(((*domain, each) for each in VM_STATES), 0))
            self.unsynced[domain] = self.refused[domain] = 0
        self.states[*domain, counted.state] += by
        self.unsynced[domain] += by * _is_unsynced(counted.verdict)
        self.refused[domain] += by * counted.refused
        if domain not in self._members:
            for each in VM_STATES:
                del self.states[*domain, each]
            del self.unsynced[domain], self.refused[domain]
        if record.agent:
            _bump(self._expected, record.set, by)
            if by > 0 and self._expected[record.set] == 1:
                self.agents.update(dict.fromkeys(((record.set, each) for each in PRESENCES), 0))
            self.agents[record.set, counted.presence] += by
            if record.set not in self._expected:
                for each in PRESENCES:
                    del self.agents[record.set, each]
        self._errors_of(domain, vm, counted.verdict if by > 0 else None)

    def _change(self, before: Counted, now: Counted, vm: str) -> None:
        record = now.record
        domain = (record.set, str(record.update_domain))
        if before.state != now.state:
            self.states[*domain, before.state] -= 1
            self.states[*domain, now.state] += 1
        if record.agent and before.presence != now.presence:
            self.agents[record.set, before.presence] -= 1
            self.agents[record.set, now.presence] += 1
        self.refused[domain] += now.refused - before.refused
        if before.verdict != now.verdict:
            self.unsynced[domain] += _is_unsynced(now.verdict) - _is_unsynced(before.verdict)
            self._errors_of(domain, vm, now.verdict)

    def _errors_of(self, domain: Domain, vm: str, verdict: Verdict | None) -> None:
        before_s = verdict.before_s if verdict is not None else None
        after_s = verdict.after_s if verdict is not None else None
        for when, error_s in (("before", before_s), ("after", after_s)):
            labels = (*domain, when)
            self._unlooked.add(labels)
            errors = self._errors.get(labels)
            if error_s is not None:
                if errors is None:
                    errors = self._errors[labels] = Largest()
                errors.put(vm, error_s)
            elif errors is not None:
                errors.drop(vm)
                if not len(errors):
                    del self._errors[labels]


def shown_state(record: m.VmRecord, state: m.VmState) -> str:
    """The state under which a VM is counted."""
    return "impaired" if state == "running" and record.state_detail else state


def _alike(one: m.VmRecord, other: m.VmRecord) -> bool:
    return (one.set, one.update_domain, one.agent) == (other.set, other.update_domain, other.agent)


def _is_unsynced(verdict: Verdict | None) -> bool:
    return verdict is not None and not verdict.synced


def _bump(counts: dict[str, int] | dict[Domain, int], key: str | Domain, by: int) -> None:
    count = counts.get(key, 0) + by  # type: ignore[arg-type]
    if count:
        counts[key] = count  # type: ignore[index]
    else:
        del counts[key]  # type: ignore[arg-type]
