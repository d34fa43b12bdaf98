"""The alarms of the live page: broken rules, as seen on the bus. Pure."""

from __future__ import annotations

from collections import Counter
from typing import Literal, get_args

import msgspec

from caesura.contract import messages as m
from caesura.lifecycle.proof import BROKEN_WORDS, broken_codes

ALARMS_KEPT = 200
ALARMS_SENT = 20

Rule = Literal["two-domains", "memory", "stopped", "overrun", "clock", "guard", "attention", "owner"]
_ORDER: dict[Rule, int] = {rule: number for number, rule in enumerate(get_args(Rule))}
"""The worst first."""


class Alarm(msgspec.Struct, omit_defaults=True):
    """One broken rule. ``until`` is None while it lasts; times are unix seconds."""

    rule: Rule
    level: Literal["bad", "warning"]
    text: str
    about: str
    """The set or VM."""
    at: float
    until: float | None = None


class Alarms:
    """The active alarms, then the newest; a repeated one counts once."""

    def __init__(self) -> None:
        self._alarms: list[Alarm] = []
        """As ``_sort`` left them, then those added since."""
        self._sorted = True
        self._open: dict[tuple[Rule, str], Alarm] = {}
        """The active ones, by rule and subject: an inventory looks each of its VMs up."""

    def __len__(self) -> int:
        self._sort()
        return len(self._alarms)

    def current(self) -> tuple[Alarm, ...]:
        """The first ``ALARMS_SENT``: active ones before those that have ended, the worst first."""
        self._sort()
        return tuple(self._alarms[:ALARMS_SENT])

    def counts(self) -> dict[str, int]:
        """The number of alarms of each rule."""
        self._sort()
        return dict(Counter(each.rule for each in self._alarms))

    def two_domains(self, set_name: str, domains: list[int], now: float) -> None:
        """VMs of two domains of a set are paused at once."""
        text = f"VMs of domains {' and '.join(map(str, domains))} of set {set_name} are paused at once"
        self._raise(Alarm("two-domains", "bad", text, set_name, now))

    def end_two_domains(self, set_name: str, now: float, *, mistaken: bool = False) -> None:
        """VMs of at most one domain of the set are paused; or, ``mistaken``, that was always so."""
        if mistaken:
            taken_back = self._open.pop(("two-domains", set_name), None)
            self._alarms = [each for each in self._alarms if each is not taken_back]
        self._end("two-domains", set_name, now)

    def stopped(self, vm: str, set_name: str, host: str, state: m.VmState, now: float) -> None:
        """A VM does not run after its pause."""
        how = "in an unknown state" if state == "unknown" else state
        text = f"{_of_set(vm, set_name)} on {host} is {how} after its pause"
        self._raise(Alarm("stopped", "bad", text, vm, now))

    def runs(self, vm: str, now: float) -> bool:
        """The VM runs; returns whether that ends an alarm."""
        return self._end("stopped", vm, now)

    def attention(self, record: m.VmRecord, host: str, now: float) -> bool:
        """Check a host's remark about a VM, such as that its application has ended; returns whether there is a new alarm."""
        if not record.state_detail:
            return self._end("attention", record.vm, now)
        text = f"{_of_set(record.vm, record.set)} on {host} is {record.state}: {record.state_detail}"
        return self._raise(Alarm("attention", "warning", text, record.vm, now))

    def gone(self, vm: str, now: float) -> bool:
        """The VM no longer exists; returns whether that ends an alarm."""
        ended = [self._end(rule, vm, now) for rule in ("stopped", "clock", "attention")]
        return any(ended)

    def resumed(self, message: m.VmResumed, now: float) -> bool:
        """Check a finished pause; returns whether there is a new alarm."""
        wrong = not message.within_budget or message.resumed_by == "guard"
        where = _where(message)
        if not message.within_budget:
            text = f"{where} was paused for {message.pause_s:.1f} s, its budget was {message.budget_s:g} s"
            self._raise(Alarm("overrun", "bad", text, message.vm, now, now))
        changed = self._memory(message.memory, where, message.vm, now)
        if message.resumed_by == "guard":
            text = f"{where} was resumed by the pause guard, not by its host updater"
            self._raise(Alarm("guard", "warning", text, message.vm, now, now))
        return wrong or changed

    def _memory(self, memory: m.MemoryProof | None, where: str, vm: str, now: float) -> bool:
        broken = [BROKEN_WORDS[code] for code in broken_codes(memory)]
        if broken:
            text = f"{where}: memory is not what it was before the pause ({', '.join(broken)})"
            self._raise(Alarm("memory", "bad", text, vm, now, now))
        return bool(broken)

    def contested(self, message: m.VmOwner, now: float) -> bool:
        """Check the owner of a VM; returns whether there is a new alarm."""
        if not message.contested_by:
            return self.agreed(message.vm, now)
        rivals = ", ".join(message.contested_by)
        whose = (
            f"{message.vm} belongs to {message.host}" if message.host else f"{message.vm} belongs to no host"
        )
        text = f"{whose}, and {rivals} names a VM of this name, too: what it reports of it does not count"
        self._raise(Alarm("owner", "warning", text, message.vm, now))
        return True

    def agreed(self, vm: str, now: float) -> bool:
        """No host names the VM without owning it any more; returns whether that ends an alarm."""
        return self._end("owner", vm, now)

    def clock(self, message: m.VmClockSynced, now: float) -> bool:
        """Check a verdict on a clock, and what the guest showed about its memory; returns whether there is a new alarm."""
        where = _where(message)
        changed = self._memory(message.memory, where, message.vm, now)
        if message.synced:
            return self._end("clock", message.vm, now) or changed
        text = f"the clock of {_where(message)} could not be corrected"
        self._raise(
            Alarm("clock", "bad", f"{text}: {message.reason}" if message.reason else text, message.vm, now)
        )
        return True

    def expire(self, before: float) -> bool:
        """Drop alarms that ended earlier; returns whether there were any."""
        old = len(self._alarms)
        self._alarms = [each for each in self._alarms if each.until is None or each.until >= before]
        return len(self._alarms) != old

    def shift(self, by: float) -> None:
        """The wall clock jumped."""
        for each in self._alarms:
            each.at += by
            each.until = None if each.until is None else each.until + by

    def _raise(self, alarm: Alarm) -> bool:
        """Add it; returns whether it is new."""
        key = (alarm.rule, alarm.about)
        known = self._open.get(key)
        if known is not None:
            changed = known.text != alarm.text
            known.text = alarm.text
            return changed
        self._alarms.append(alarm)
        self._sorted = False
        if alarm.until is None:
            self._open[key] = alarm
        if len(self._alarms) > 2 * ALARMS_KEPT:
            self._sort()
        return True

    def _end(self, rule: Rule, about: str, now: float) -> bool:
        known = self._open.pop((rule, about), None)
        if known is None:
            return False
        known.until = now
        self._sorted = False
        return True

    def _sort(self) -> None:
        """Sort them in display order and drop the excess. Done on a query, not with each message of a storm."""
        if self._sorted:
            return
        self._alarms.sort(key=lambda each: (each.until is not None, _ORDER[each.rule], -each.at))
        for dropped in self._alarms[ALARMS_KEPT:]:
            if dropped.until is None:
                del self._open[dropped.rule, dropped.about]
        del self._alarms[ALARMS_KEPT:]
        self._sorted = True


def _where(message: m.VmResumed | m.VmClockSynced) -> str:
    """The VM and its place; for one in no set the domain is omitted."""
    if message.set.startswith("_"):
        return f"{message.vm} on {message.host}"
    return f"{message.vm} ({message.set}, domain {message.update_domain}) on {message.host}"


def _of_set(vm: str, set_name: str) -> str:
    return vm if set_name.startswith("_") else f"{vm} ({set_name})"
