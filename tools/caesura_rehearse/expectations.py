"""``--expect``: what must hold for an exit code of 0. Pure."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal

import msgspec

from caesura.runtime.errors import ConfigError
from caesura_rehearse.observations import EventRecord, ProgramRecord, describe_exit

Kind = Literal["seen", "approved", "drained-within", "survived"]

_DRAINED = re.compile(r"drained-within[ =]+(?P<seconds>\d+(?:\.\d+)?)s?\Z")
WORDS = 'seen, approved, "drained-within 10s", survived'


class BadExpectation(ConfigError):
    """Not an expectation."""


class Expectation(msgspec.Struct, frozen=True):
    """One thing that must hold for every event that was carried out."""

    kind: Kind
    seconds: float = 0.0
    """For ``drained-within``."""

    def __str__(self) -> str:
        return f"{self.kind} {self.seconds:g}s" if self.kind == "drained-within" else self.kind


class HeldOrNot(msgspec.Struct, frozen=True, kw_only=True):
    """Whether something held, and what shows it."""

    what: str
    held: bool
    detail: str = ""


def parse_expectation(text: str) -> Expectation:
    """The expectation in ``text``.

    Raises:
        BadExpectation: it is not one.
    """
    found = _DRAINED.fullmatch(text.strip())
    if found:
        return Expectation("drained-within", float(found["seconds"]))
    match text.strip():
        case "seen" | "approved" | "survived" as kind:
            return Expectation(kind)
    raise BadExpectation(f"{text!r} is not an expectation: {WORDS}")


def came_about(record: EventRecord) -> HeldOrNot:
    """Whether what was ordered happened."""
    what = f"{record.event} of {', '.join(record.vms)}"
    match record.outcome:
        case "completed":
            return HeldOrNot(what=what, held=True, detail=_course(record))
        case "cancelled":
            return HeldOrNot(what=what, held=True, detail="cancelled by order")
        case "failed":
            return HeldOrNot(what=what, held=False, detail=record.why)
        case _:
            return HeldOrNot(what=what, held=False, detail="it did not come to its end")


def _course(record: EventRecord) -> str:
    gaps = [f"{gap.vm} paused for {gap.seconds:.3f} s" for gap in record.gaps]
    return "; ".join(gaps) or (
        "started and over; nothing had to pause" if record.event == "Freeze" else "done"
    )


def judge(
    expectation: Expectation, events: Sequence[EventRecord], programs: Sequence[ProgramRecord]
) -> HeldOrNot:
    """Whether it holds for all that was carried out; without an event nothing holds."""
    concerned = [each for each in events if each.outcome != "cancelled"]
    if not concerned:
        return HeldOrNot(what=str(expectation), held=False, detail="no event was carried out")
    details = []
    for record in concerned:
        held, detail = _holds(expectation, record, programs)
        if not held:
            return HeldOrNot(what=str(expectation), held=False, detail=detail)
        details.append(detail)
    return HeldOrNot(what=str(expectation), held=True, detail="; ".join(dict.fromkeys(details)))


def _holds(
    expectation: Expectation, record: EventRecord, programs: Sequence[ProgramRecord]
) -> tuple[bool, str]:
    match expectation.kind:
        case "seen":
            if record.first_seen is None:
                return False, f"no client asked for the document while the {record.event} was in it"
            return True, f"{record.first_seen - record.announced:.1f} s after the announcement"
        case "approved":
            if record.approved is None or record.approved_by == "rehearse":
                return False, _not_approved(record)
            return (
                True,
                f"by {record.approved_by}, {record.approved - record.announced:.1f} s after the announcement",
            )
        case "drained-within":
            return _drained(expectation.seconds, record, programs)
        case "survived":
            return _survived(record, programs)


def _not_approved(record: EventRecord) -> str:
    if record.first_seen is None:
        return f"the {record.event} was not approved: no client asked for the document while it was in it"
    return f"the {record.event} was seen {record.first_seen - record.announced:.1f} s after its announcement and not approved"


def _drained(within_s: float, record: EventRecord, programs: Sequence[ProgramRecord]) -> tuple[bool, str]:
    """Drained: its client approved, which says that it is ready, or it ended by itself."""
    instants = [each.exited for each in programs if each.vm in record.vms and each.exited is not None]
    if record.approved is not None and record.approved_by != "rehearse":
        instants.append(record.approved)
    took = min(
        (instant - record.announced for instant in instants if instant >= record.announced), default=None
    )
    if took is None:
        return False, _not_approved(record)
    if took > within_s:
        return False, f"drained {took:.1f} s after the announcement, {took - within_s:.1f} s too late"
    return True, f"drained {took:.1f} s after the announcement"


def _survived(record: EventRecord, programs: Sequence[ProgramRecord]) -> tuple[bool, str]:
    for program in programs:
        if program.vm in record.vms and program.exited is not None:
            return (
                False,
                f"{program.what} of {program.vm} ended by itself at {program.exited:.1f} s: {describe_exit(program.exit_code)}",
            )
    return True, "it ran to the end"
