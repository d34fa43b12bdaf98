"""What the live page says loudly: broken rules, as the bus shows them. Pure."""

from __future__ import annotations

from typing import Literal

import msgspec

from caesura.contract import messages as m

ALARMS_KEPT = 20

Rule = Literal["two-domains", "overrun", "memory", "guard", "clock"]


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
    """The newest alarms; one that repeats is one."""

    def __init__(self) -> None:
        self._alarms: list[Alarm] = []

    def current(self) -> tuple[Alarm, ...]:
        """Newest first."""
        return tuple(reversed(self._alarms))

    def two_domains(self, set_name: str, domains: list[int], now: float) -> None:
        """VMs of two domains of a set stand still at once."""
        text = f"VMs of domains {' and '.join(map(str, domains))} of set {set_name} stand still at once"
        self._raise(Alarm("two-domains", "bad", text, set_name, now))

    def end_two_domains(self, set_name: str, now: float) -> None:
        """At most one domain of the set still stands."""
        self._end("two-domains", set_name, now)

    def resumed(self, message: m.VmResumed, now: float) -> bool:
        """Look at a finished pause; whether there is something to say."""
        before = len(self._alarms)
        where = f"{message.vm} ({message.set}, domain {message.update_domain}) on {message.host}"
        if not message.within_budget:
            text = f"{where} stood still for {message.pause_s:.1f} s, its budget was {message.budget_s:g} s"
            self._raise(Alarm("overrun", "bad", text, message.vm, now, now))
        if message.memory is not None and not message.memory.ok:
            text = f"{where}: memory is not what it was before the pause"
            self._raise(Alarm("memory", "bad", text, message.vm, now, now))
        if message.resumed_by == "guard":
            text = f"{where} was resumed by the pause guard, not by its host updater"
            self._raise(Alarm("guard", "warning", text, message.vm, now, now))
        return len(self._alarms) != before

    def clock(self, message: m.VmClockSynced, now: float) -> bool:
        """Look at a verdict on a clock; whether there is something to say."""
        if message.synced:
            return self._end("clock", message.vm, now)
        text = f"the clock of {message.vm} ({message.set}, domain {message.update_domain}) could not be put right"
        self._raise(
            Alarm("clock", "bad", f"{text}: {message.reason}" if message.reason else text, message.vm, now)
        )
        return True

    def expire(self, before: float) -> bool:
        """Forget what was over earlier; whether there was something."""
        old = len(self._alarms)
        self._alarms = [each for each in self._alarms if each.until is None or each.until >= before]
        return len(self._alarms) != old

    def _raise(self, alarm: Alarm) -> None:
        lasting = [each for each in self._alarms if each.until is None]
        for each in lasting:
            if (each.rule, each.about) == (alarm.rule, alarm.about):
                each.text = alarm.text
                return
        self._alarms = [*self._alarms, alarm][-ALARMS_KEPT:]

    def _end(self, rule: Rule, about: str, now: float) -> bool:
        found = False
        for each in self._alarms:
            if each.rule == rule and each.about == about and each.until is None:
                each.until = now
                found = True
        return found
