"""Pauses as the bus tells them: which are open and since when, how long the last ones were, which should not have met. Pure.

Times are seconds on the exporter's own monotonic clock, taken when a message was heard: no host's wall clock,
and no jump of the exporter's, can make a pause look longer or shorter.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping

import msgspec

from caesura.contract import messages as m

PauseLabels = tuple[str, str, str, str]
"""Set, update domain, host, method."""


class OpenPause(msgspec.Struct, frozen=True):
    """One VM that was told to stand still and not yet to run."""

    labels: PauseLabels
    domain: int
    """Its domain by the key that its rollout goes by: the update domain, or the fault domain."""
    heard_s: float


class LastPause(msgspec.Struct, frozen=True):
    """The longest pause of the newest operation with these labels."""

    operation: str
    seconds: float


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
        self.clashes[frozen.set] += any(pause.domain != domain for pause in of_set.values())
        of_set[frozen.vm] = OpenPause(labels_of(frozen), domain, now_s)
        self._sets[frozen.vm] = frozen.set

    def resumed(self, resumed: m.VmResumed) -> None:
        """A VM runs again."""
        self.forget_vm(resumed.vm)
        labels = labels_of(resumed)
        known = self.last.get(labels)
        longest = resumed.pause_s
        if known is not None and known.operation == resumed.operation:
            longest = max(longest, known.seconds)
        self.last[labels] = LastPause(resumed.operation, longest)
        self.longest[labels] = max(longest, self.longest.get(labels, 0.0))

    def found(self, states: Mapping[str, m.VmState]) -> None:
        """A host says what state its VMs are in: one that runs is in no pause, whatever was missed."""
        for vm, state in states.items():
            if state != "paused":
                self.forget_vm(vm)

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
        """In how many domains of the set a VM stands still now."""
        return len({pause.domain for pause in self._open.get(set_name, {}).values()})


def labels_of(message: m.VmFrozen | m.VmResumed) -> PauseLabels:
    """The bounded labels of a pause."""
    return (message.set, str(message.update_domain), message.host, message.method)
