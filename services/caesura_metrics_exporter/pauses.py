"""Pauses as the bus tells them: which are open and since when, how long the last ones were, which should not have met. Pure.

Times are seconds on the exporter's own monotonic clock, taken when a message was heard: no host's wall clock,
and no jump of the exporter's, can make a pause look longer or shorter.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import msgspec

from caesura.contract import messages as m

PauseLabels = tuple[str, str, str, str]
"""Set, update domain, host, method."""

UNKNOWN_METHOD = "unknown"
"""Of a pause whose beginning was not heard."""


class OpenPause(msgspec.Struct, frozen=True):
    """One VM that stands still: its host said that it froze it, or only that it is paused."""

    labels: PauseLabels
    domain: int
    """Its domain by the key that its rollout goes by: the update domain, or the fault domain."""
    heard_s: float
    by_fact: bool
    """Whether its freeze was heard."""


class LastPause(msgspec.Struct, frozen=True):
    """The longest pause of the newest operation with these labels."""

    operation: str
    seconds: float
    budget_s: float


class Pauses:
    """Open and last pauses."""

    def __init__(self) -> None:
        self._open: dict[str, dict[str, OpenPause]] = {}
        """Set to its VMs that stand still."""
        self._sets: dict[str, str] = {}
        """VM to the set under which its pause is open."""
        self.last: dict[PauseLabels, LastPause] = {}
        self.longest: dict[PauseLabels, float] = {}
        """Seconds, of all that were heard of: what a histogram cannot tell."""
        self.clashes: Counter[str] = Counter()
        """Set to how often a VM was frozen while one of another domain of the set stood still (I1)."""

    def froze(self, frozen: m.VmFrozen, domain: int, now_s: float) -> None:
        """A VM stands still."""
        self.forget_vm(frozen.vm)
        of_set = self._open.setdefault(frozen.set, {})
        self.clashes[frozen.set] += any(pause.by_fact and pause.domain != domain for pause in of_set.values())
        of_set[frozen.vm] = OpenPause(labels_of(frozen), domain, now_s, by_fact=True)
        self._sets[frozen.vm] = frozen.set

    def found(self, record: m.VmRecord, host: str, domain: int, now_s: float) -> None:
        """A host says that a VM is paused. If its freeze was not heard, the pause is open from now."""
        if record.vm in self._sets:
            return
        labels = (record.set, str(record.update_domain), host, UNKNOWN_METHOD)
        self._open.setdefault(record.set, {})[record.vm] = OpenPause(labels, domain, now_s, by_fact=False)
        self._sets[record.vm] = record.set

    def resumed(self, resumed: m.VmResumed) -> None:
        """A VM runs again."""
        self.forget_vm(resumed.vm)
        labels = labels_of(resumed)
        known = self.last.get(labels)
        longest = resumed.pause_s
        if known is not None and known.operation == resumed.operation:
            longest = max(longest, known.seconds)
        self.last[labels] = LastPause(resumed.operation, longest, resumed.budget_s)
        self.longest[labels] = max(longest, self.longest.get(labels, 0.0))

    def runs(self, vm: str, *, under_way: bool) -> bool:
        """A host's inventory says that a VM runs; whether it is believed.

        Inventories and facts go separate ways: with an operation ``under_way`` an inventory may be older than the freeze
        that was heard, whose end will be told.
        """
        pause = self._open.get(self._sets.get(vm, ""), {}).get(vm)
        if under_way and pause is not None and pause.by_fact:
            return False
        self.forget_vm(vm)
        return True

    def forget_set(self, set_name: str) -> None:
        """No VM is in the set any more."""
        self.last = {labels: pause for labels, pause in self.last.items() if labels[0] != set_name}
        self.longest = {labels: seconds for labels, seconds in self.longest.items() if labels[0] != set_name}
        self.clashes.pop(set_name, None)

    def forget_vm(self, vm: str) -> None:
        """The VM is in no pause, or gone."""
        of_set = self._open.get(self._sets.pop(vm, ""), {})
        of_set.pop(vm, None)

    def forget_host(self, host: str) -> None:
        """The host is gone for good."""
        gone = [vm for of_set in self._open.values() for vm, each in of_set.items() if each.labels[2] == host]
        for vm in gone:
            self.forget_vm(vm)
        self.last = {labels: pause for labels, pause in self.last.items() if labels[2] != host}
        self.longest = {labels: seconds for labels, seconds in self.longest.items() if labels[2] != host}

    def longest_open_s(self, now_s: float) -> Iterator[tuple[PauseLabels, float]]:
        """Labels to the seconds that the oldest open pause with them has lasted, as far as it was heard."""
        oldest: dict[PauseLabels, float] = {}
        for of_set in self._open.values():
            for pause in of_set.values():
                oldest[pause.labels] = min(pause.heard_s, oldest.get(pause.labels, pause.heard_s))
        for labels, heard_s in sorted(oldest.items()):
            yield labels, max(0.0, now_s - heard_s)

    def domains(self, set_name: str) -> int:
        """In how many domains of the set a VM stands still now.

        Facts of the past may come in after the inventories of now, when the exporter was away: what is known only
        from an inventory is not held against what is known by a fact.
        """
        pauses = self._open.get(set_name, {}).values()
        return max(len({pause.domain for pause in pauses if pause.by_fact == fact}) for fact in (True, False))


def labels_of(message: m.VmFrozen | m.VmResumed) -> PauseLabels:
    """The bounded labels of a pause."""
    return (message.set, str(message.update_domain), message.host, message.method)
