"""Messages as text: the log of the live page. Pure."""

from __future__ import annotations

from typing import Literal

import msgspec

from caesura.contract import messages as m
from caesura.contract.envelope import Message
from caesura.lifecycle.proof import BROKEN_WORDS, broken_codes, held_codes, in_words

Level = Literal["quiet", "good", "warning", "bad"]


class LogEntry(msgspec.Struct, frozen=True, omit_defaults=True):
    """One line of the log. ``at`` is unix seconds by the sender's clock; empty members do not apply."""

    at: float
    what: str
    level: Level = "quiet"
    set: str = ""
    domain: int | None = None
    vm: str = ""
    host: str = ""
    seconds: float | None = None
    detail: str = ""


_WAVE_LEVEL: dict[str, Level] = {"completed": "good", "failed": "bad", "cancelled": "warning"}
_SOME = 6


def log_entry(message: Message, at: float) -> LogEntry | None:
    """The log line of a fact; None for state and for details that are too fine.

    Args:
        at: when it was received, for messages that carry no time of their own.
    """
    match message:
        case m.VmFrozen():
            return _of_vm(message, "frozen", detail=f"by {message.method}, budget {message.budget_s:g} s")
        case m.VmResumed():
            return _resumed(message)
        case m.VmClockSynced():
            return _clock(message)
        case m.WaveChanged():
            return LogEntry(
                at=message.at.timestamp(),
                what=f"wave {message.wave + 1} {message.status}",
                level=_WAVE_LEVEL.get(message.status, "quiet"),
                detail=message.reason or _domains(message.domains),
            )
        case m.EventApproved():
            return LogEntry(
                at=message.at.timestamp(), what="approved", level="good", set=message.set, vm=message.vm
            )
        case m.EventChanged() if message.status in {"cancelled", "failed"}:
            return LogEntry(
                at=message.at.timestamp(),
                what=f"event {message.status}",
                level="bad" if message.status == "failed" else "warning",
                set=message.set,
                host=message.host,
                detail=message.reason,
            )
        case m.VmReady() if not message.ready:
            return LogEntry(at=at, what="not ready", level="bad", vm=message.vm, detail=message.reason)
        case m.HookFinished() if message.outcome in {"failed", "timeout"}:
            return LogEntry(
                at=at,
                what=f"{message.hook} hook {'failed' if message.outcome == 'failed' else 'took too long'}",
                level="bad",
                vm=message.vm,
                seconds=message.seconds,
            )
        case m.OperationReported() if message.status in {"refused", "failed", "cancelled"}:
            return LogEntry(
                at=message.at.timestamp(),
                what=f"operation {message.status}",
                level="warning" if message.status == "cancelled" else "bad",
                host=message.host,
                detail=message.reason,
            )
        case m.AbortOperation():
            return LogEntry(
                at=at, what="abort commanded", level="warning", host=message.host, detail=message.reason
            )
        case m.RequestAnswered() if not message.accepted:
            return LogEntry(at=at, what="request refused", level="warning", detail=message.reason)
        case _:
            return None


def _of_vm(
    message: m.VmFrozen | m.VmResumed | m.VmClockSynced,
    what: str,
    level: Level = "quiet",
    *,
    seconds: float | None = None,
    detail: str = "",
) -> LogEntry:
    return LogEntry(
        at=message.at.timestamp(),
        what=what,
        level=level,
        set=message.set,
        domain=message.update_domain,
        vm=message.vm,
        host=message.host,
        seconds=seconds,
        detail=detail,
    )


def _resumed(message: m.VmResumed) -> LogEntry:
    broken = broken_codes(message.memory)
    parts = []
    if not message.within_budget:
        parts.append(f"longer than its budget of {message.budget_s:g} s")
    if message.resumed_by == "guard":
        parts.append("by the pause guard")
    parts += [BROKEN_WORDS[code] for code in broken]
    if held := held_codes(message.memory):
        parts.append(in_words(held))
    level: Level = "bad" if broken or not message.within_budget else "good"
    if level == "good" and message.resumed_by == "guard":
        level = "warning"
    return _of_vm(message, "resumed", level, seconds=message.pause_s, detail=", ".join(parts))


def _clock(message: m.VmClockSynced) -> LogEntry:
    simulated = " (simulated)" if message.simulated else ""
    if not message.synced:
        return _of_vm(
            message, "clock not synced", "bad", seconds=message.error_after_s, detail=message.reason
        )
    before = "" if message.error_before_s is None else f", was off by {_signed(message.error_before_s)} s"
    broken = [BROKEN_WORDS[code] for code in broken_codes(message.memory)]
    shown = [in_words(held)] if (held := held_codes(message.memory)) else []
    return _of_vm(
        message,
        "clock synced",
        "bad" if broken else "good",
        seconds=message.error_after_s,
        detail=", ".join([f"by the {message.by}{before}{simulated}", *broken, *shown]),
    )


def _signed(seconds: float) -> str:
    """With the minus sign that the page writes."""
    return f"{seconds:+.3f}".replace("-", "\N{MINUS SIGN}")


def _domains(domains: dict[str, int]) -> str:
    # A VM in no set is a set of its own, named after it: its domain says nothing.
    some = [
        name[1:] if name.startswith("_") else f"{name} {domain}" for name, domain in sorted(domains.items())
    ]
    rest = len(some) - _SOME
    return ", ".join(some[:_SOME]) + (f" and {rest} more" if rest > 0 else "")
