"""Pauses as the bus reports them: which are open and since when, the length of the last ones, and forbidden overlaps. Pure.

By set, update domain and method, since there are as many hosts times domains as VMs. A host is named only if it needs
attention: while a VM of it is paused, and for a while after a pause on it was longer than its budget or was ended by
the pause guard.

Times are seconds on the exporter's own monotonic clock, taken when a message was received: no host's wall clock,
and no jump of the exporter's, can make a pause look longer or shorter.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import msgspec

from caesura.contract import messages as m
from caesura_metrics_exporter.metrics.series import Largest

PauseLabels = tuple[str, str, str]
"""Set, update domain, method."""
HostPauseLabels = tuple[str, str, str, str]
"""Set, update domain, host, method."""

UNKNOWN_METHOD = "unknown"
"""The method of a pause whose start was not received."""

HOSTS_NAMED_S = 1800.0
"""s for which a host is named after it overran a budget or needed its guard: twice the alerts' look-back window."""


class OpenPause(msgspec.Struct, frozen=True):
    """One paused VM: its host reported the freeze, or only that it is paused."""

    labels: HostPauseLabels
    domain: int
    """Its domain by its rollout's domain key: the update domain, or the fault domain."""
    received_s: float
    by_fact: bool
    """Whether its freeze was received."""


class LongestPause(msgspec.Struct, frozen=True):
    """The longest pause of a host's newest operation with these labels."""

    operation: str
    seconds: float
    budget_s: float


class HostPause(msgspec.Struct, frozen=True):
    """The open pauses on one host with the same labels."""

    open_s: float
    budget_s: float | None
    """None if its host has not reported one."""


class _Kind:
    """The pauses with the same set, update domain and method."""

    def __init__(self) -> None:
        self.open: dict[str, dict[str, OpenPause]] = {}
        """Maps a host to its paused VMs. Both are in the order of receipt: the first is the oldest."""
        self.budgets: dict[str, float] = {}
        """Maps a host to the budget that it last reported, in the order of these reports."""
        self.last: dict[str, LongestPause] = {}
        self.longest_of_last = Largest()
        self.longest: float | None = None

    def forget_host(self, host: str) -> None:
        """The host was removed permanently."""
        self.budgets.pop(host, None)
        self.last.pop(host, None)
        self.longest_of_last.drop(host)

    def oldest_s(self) -> float:
        """When the oldest open pause was received; there must be one."""
        return min([next(iter(vms.values())).received_s for vms in self.open.values()])


class Pauses:
    """Open and last pauses."""

    def __init__(self) -> None:
        self._open: dict[str, OpenPause] = {}
        self._kinds: dict[str, dict[PauseLabels, _Kind]] = {}
        """By set."""
        self._paused: dict[str, Counter[tuple[bool, int]]] = {}
        """Maps a set to the number of paused VMs, by whether the freeze was received, and domain."""
        self._of_host: dict[str, set[str]] = {}
        """Maps a host to its paused VMs."""
        self._labels_of_host: dict[str, set[PauseLabels]] = {}
        self.clashes: Counter[str] = Counter()
        """Maps a set to how often a VM was frozen while one of another domain of the set was paused (I1)."""
        self._overran: dict[HostPauseLabels, float] = {}
        self._guarded: dict[HostPauseLabels, float] = {}
        """Both in the order of their times."""

    # -- input ----------------------------------------------------------------------------------------------

    def froze(self, frozen: m.VmFrozen, domain: int, now_s: float) -> None:
        """A VM is paused."""
        self.forget_vm(frozen.vm)
        met = self._paused.get(frozen.set, ())
        self.clashes[frozen.set] += any(fact and other != domain for fact, other in met)
        self._open_at(frozen.vm, OpenPause(host_labels_of(frozen), domain, now_s, by_fact=True))
        self._budget(frozen)

    def found(self, record: m.VmRecord, host: str, domain: int, now_s: float) -> None:
        """A host reports a VM as paused. If its freeze was not received, the pause counts as open from now on."""
        if record.vm in self._open:
            return
        labels = (record.set, str(record.update_domain), host, UNKNOWN_METHOD)
        self._open_at(record.vm, OpenPause(labels, domain, now_s, by_fact=False))

    def resumed(self, resumed: m.VmResumed, now_s: float) -> None:
        """A VM runs again."""
        self.forget_vm(resumed.vm)
        self._budget(resumed)
        kind = self._kind(labels_of(resumed))
        known = kind.last.get(resumed.host)
        longest = resumed.pause_s
        if known is not None and known.operation == resumed.operation:
            longest = max(longest, known.seconds)
        kind.last[resumed.host] = LongestPause(resumed.operation, longest, resumed.budget_s)
        kind.longest_of_last.put(resumed.host, longest)
        kind.longest = max(resumed.pause_s, kind.longest or 0.0)
        if not resumed.within_budget:
            _note(self._overran, host_labels_of(resumed), now_s)
        if resumed.resumed_by == "guard":
            _note(self._guarded, host_labels_of(resumed), now_s)

    def runs(self, vm: str, *, under_way: bool) -> bool:
        """A host's inventory reports that a VM runs; returns whether that is accepted.

        Inventories and facts are not ordered among each other: with an operation ``under_way`` an inventory may be older than the received
        freeze, whose end will be reported.
        """
        pause = self._open.get(vm)
        if under_way and pause is not None and pause.by_fact:
            return False
        self.forget_vm(vm)
        return True

    def forget_set(self, set_name: str) -> None:
        """No VM is in the set any more."""
        for labels, kind in self._kinds.pop(set_name, {}).items():
            for host in kind.budgets:
                self._labels_of_host.get(host, set()).discard(labels)
            for vm in [vm for vms in kind.open.values() for vm in vms]:
                self._close(vm)
        self.clashes.pop(set_name, None)

    def forget_vm(self, vm: str) -> None:
        """The VM is not paused, or was removed."""
        self._close(vm)

    def forget_host(self, host: str) -> None:
        """The host was removed permanently. The past pauses of the domain are kept, like their histogram."""
        for vm in list(self._of_host.get(host, ())):
            self._close(vm)
        for labels in self._labels_of_host.pop(host, ()):
            kind = self._kinds.get(labels[0], {}).get(labels)
            if kind is not None:
                kind.forget_host(host)
        for named in (self._overran, self._guarded):
            for each in [labels for labels in named if labels[2] == host]:
                del named[each]

    # -- output ---------------------------------------------------------------------------------------------

    def open_s(self, now_s: float) -> dict[PauseLabels, float]:
        """Maps labels to the seconds since the receipt of their oldest open pause."""
        return {labels: max(0.0, now_s - kind.oldest_s()) for labels, kind in self._all() if kind.open}

    def budgets(self) -> dict[PauseLabels, float]:
        """Maps labels to the budget reported last, seconds."""
        return {labels: next(reversed(kind.budgets.values())) for labels, kind in self._all() if kind.budgets}

    def on_hosts(self, now_s: float) -> dict[HostPauseLabels, HostPause]:
        """The open pauses, also by host."""
        return {
            (*labels[:2], host, labels[2]): HostPause(
                max(0.0, now_s - next(iter(vms.values())).received_s), kind.budgets.get(host)
            )
            for labels, kind in self._all()
            for host, vms in kind.open.items()
        }

    def last(self) -> dict[PauseLabels, LongestPause]:
        """Maps labels to the longest pause of the hosts' last operations."""
        found = ((labels, kind, kind.longest_of_last.top()) for labels, kind in self._all())
        return {labels: kind.last[top[0]] for labels, kind, top in found if top is not None}

    def longest(self) -> dict[PauseLabels, float]:
        """Maps labels to the longest pause since the exporter's start, seconds, which a histogram does not contain."""
        return {labels: kind.longest for labels, kind in self._all() if kind.longest is not None}

    def overran_s(self, now_s: float) -> dict[HostPauseLabels, float]:
        """Hosts with a pause that was longer than its budget, for ``HOSTS_NAMED_S``: seconds since the last one."""
        return _ages(self._overran, now_s)

    def guarded_s(self, now_s: float) -> dict[HostPauseLabels, float]:
        """Hosts whose guard ended a pause, for ``HOSTS_NAMED_S``: seconds since the last one."""
        return _ages(self._guarded, now_s)

    def domains(self, set_name: str) -> int:
        """The number of domains of the set in which a VM is paused now.

        After an outage of the exporter, old facts may arrive after current inventories: a pause known only
        from an inventory does not conflict with one known from a fact.
        """
        paused = self._paused.get(set_name, ())
        by_fact = sum(fact for fact, _ in paused)
        return max(by_fact, len(paused) - by_fact)

    # -- internal -------------------------------------------------------------------------------------------

    def _all(self) -> Iterator[tuple[PauseLabels, _Kind]]:
        for of_set in self._kinds.values():
            yield from of_set.items()

    def _kind(self, labels: PauseLabels) -> _Kind:
        of_set = self._kinds.setdefault(labels[0], {})
        kind = of_set.get(labels)
        if kind is None:
            kind = of_set[labels] = _Kind()
        return kind

    def _budget(self, message: m.VmFrozen | m.VmResumed) -> None:
        labels = labels_of(message)
        budgets = self._kind(labels).budgets
        budgets.pop(message.host, None)
        budgets[message.host] = message.budget_s
        self._labels_of_host.setdefault(message.host, set()).add(labels)

    def _open_at(self, vm: str, pause: OpenPause) -> None:
        set_name, domain, host, method = pause.labels
        self._open[vm] = pause
        self._kind((set_name, domain, method)).open.setdefault(host, {})[vm] = pause
        self._paused.setdefault(set_name, Counter())[pause.by_fact, pause.domain] += 1
        self._of_host.setdefault(host, set()).add(vm)

    def _close(self, vm: str) -> None:
        pause = self._open.pop(vm, None)
        if pause is None:
            return
        set_name, domain, host, method = pause.labels
        kind = self._kinds.get(set_name, {}).get((set_name, domain, method))
        if kind is not None:
            _drop(kind.open, host, vm)
        paused = self._paused[set_name]
        paused[pause.by_fact, pause.domain] -= 1
        if not paused[pause.by_fact, pause.domain]:
            del paused[pause.by_fact, pause.domain]
        if not paused:
            del self._paused[set_name]
        self._of_host[host].discard(vm)
        if not self._of_host[host]:
            del self._of_host[host]


def labels_of(message: m.VmFrozen | m.VmResumed) -> PauseLabels:
    """The bounded labels of a pause."""
    return (message.set, str(message.update_domain), message.method)


def host_labels_of(message: m.VmFrozen | m.VmResumed) -> HostPauseLabels:
    """The same with the host: as many as there are VMs."""
    return (message.set, str(message.update_domain), message.host, message.method)


def _drop(groups: dict[str, dict[str, OpenPause]], group: str, name: str) -> None:
    within = groups.get(group, {})
    within.pop(name, None)
    if not within:
        groups.pop(group, None)


def _note(times: dict[HostPauseLabels, float], labels: HostPauseLabels, now_s: float) -> None:
    times.pop(labels, None)
    times[labels] = now_s


def _ages(times: dict[HostPauseLabels, float], now_s: float) -> dict[HostPauseLabels, float]:
    while times and now_s - next(iter(times.values())) > HOSTS_NAMED_S:
        del times[next(iter(times))]
    return {labels: max(0.0, now_s - at_s) for labels, at_s in times.items()}
