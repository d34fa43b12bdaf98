"""``--expect``: what must hold for an exit code of 0. Pure."""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import suppress
from typing import Literal

import msgspec

from caesura.runtime.errors import ConfigError
from caesura_rehearse.durations import seconds_in
from caesura_rehearse.results.observations import EventRecord, ProgramRecord, RolloutRecord, describe_exit
from caesura_rehearse.vm_prefix import split_vm

Kind = Literal["seen", "approved", "drained-within", "survived"]

_DRAINED = re.compile(r"drained-within[ =]+(?P<time>\S+)")
WORDS = (
    'seen, approved, "drained-within 10s", survived; with a VM before it ("app-2: seen") for that one only'
)


class BadExpectation(ConfigError):
    """Not an expectation."""


class Expectation(msgspec.Struct, frozen=True):
    """One thing that must hold for every event that was carried out."""

    kind: Kind
    seconds: float = 0.0
    """For ``drained-within``."""
    vm: str = ""
    """The VM for which it must hold; empty: for each."""

    @property
    def words(self) -> str:
        """Without the VM."""
        return f"{self.kind} {self.seconds:g}s" if self.kind == "drained-within" else self.kind

    def __str__(self) -> str:
        return f"{self.vm}: {self.words}" if self.vm else self.words


class HeldOrNot(msgspec.Struct, frozen=True, kw_only=True):
    """Whether something held, and what shows it."""

    what: str
    held: bool
    detail: str = ""
    vm: str = ""
    """The VM that it is said of, where there are several."""


def parse_expectation(text: str) -> Expectation:
    """The expectation in ``text``.

    Raises:
        BadExpectation: it is not one.
    """
    vm, words = split_vm(text)
    found = _DRAINED.fullmatch(words)
    if found:
        with suppress(ValueError):
            return Expectation("drained-within", seconds_in(found["time"]), vm)
    match words:
        case "seen" | "approved" | "survived" as kind:
            return Expectation(kind, vm=vm)
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
            return HeldOrNot(what=what, held=False, detail="it had not ended yet")


def halted(record: RolloutRecord) -> HeldOrNot | None:
    """That update domains were left out; None: each had its turn, and what became of it is said of its events."""
    left = record.waves[record.waves_begun :]
    if not left or record.outcome == "cancelled":
        return None
    return HeldOrNot(
        what=f"{record.event} of {', '.join(left[0])}" + (" and those after" if len(left) > 1 else ""),
        held=False,
        detail=f"not begun: {record.why or 'the rehearsal ended before'}",
    )


def _course(record: EventRecord) -> str:
    gaps = [f"{gap.vm} paused for {gap.seconds:.3f} s" for gap in record.gaps]
    return "; ".join(gaps) or (
        "started and over; nothing had to pause" if record.event == "Freeze" else "done"
    )


def judge(
    expectation: Expectation,
    events: Sequence[EventRecord],
    programs: Sequence[ProgramRecord],
    vms: Sequence[str],
) -> list[HeldOrNot]:
    """Whether it holds, for each VM that an event concerns; without an event nothing holds.

    Args:
        vms: all that there are. Where there is one only, it is not named.
    """
    if expectation.vm and expectation.vm not in vms:
        return [HeldOrNot(what=str(expectation), held=False, detail=f"there is no VM {expectation.vm}")]
    concerned = {
        vm: found
        for vm in ([expectation.vm] if expectation.vm else vms)
        if (found := [each for each in events if vm in each.vms and _counts(expectation, each)])
    }
    if not concerned:
        return [HeldOrNot(what=str(expectation), held=False, detail="no event was carried out")]
    named = len(vms) > 1
    verdicts = []
    for vm, found in concerned.items():
        held, detail = _all_hold(expectation, vm, found, programs)
        what = f"{vm}: {expectation.words}" if named else expectation.words
        verdicts.append(HeldOrNot(what=what, held=held, detail=detail, vm=vm if named else ""))
    return verdicts


def _counts(expectation: Expectation, record: EventRecord) -> bool:
    """An event that was taken back may be seen, and must be survived; there was nothing to approve or to drain for."""
    return record.outcome != "cancelled" or expectation.kind in ("seen", "survived")


def _all_hold(
    expectation: Expectation, vm: str, events: Sequence[EventRecord], programs: Sequence[ProgramRecord]
) -> tuple[bool, str]:
    details = []
    for record in events:
        held, detail = _holds(expectation, vm, record, programs)
        if not held:
            return False, detail
        details.append(detail)
    return True, "; ".join(dict.fromkeys(details))


def _holds(
    expectation: Expectation, vm: str, record: EventRecord, programs: Sequence[ProgramRecord]
) -> tuple[bool, str]:
    match expectation.kind:
        case "seen":
            seen = record.seen_by.get(vm)
            if seen is None:
                return False, f"no client asked for the document while the {record.event} was in it"
            return True, f"{seen - record.announced:.1f} s after the announcement"
        case "approved":
            if record.approved is None or record.approved_by_order:
                return False, _not_approved(vm, record)
            return (
                True,
                f"by {record.approved_by}, {record.approved - record.announced:.1f} s after the announcement",
            )
        case "drained-within":
            return _drained(expectation.seconds, vm, record, programs)
        case "survived":
            return _survived(vm, programs)


def _not_approved(vm: str, record: EventRecord) -> str:
    seen = record.seen_by.get(vm)
    if seen is None:
        return f"the {record.event} was not approved: no client asked for the document while it was in it"
    return (
        f"the {record.event} was seen {seen - record.announced:.1f} s after its announcement and not approved"
    )


def _drained(
    within_s: float, vm: str, record: EventRecord, programs: Sequence[ProgramRecord]
) -> tuple[bool, str]:
    """Drained: a client approved, which says that it is ready, or its program ended by itself."""
    instants = [each.exited for each in programs if each.vm == vm and each.exited is not None]
    if record.approved is not None and not record.approved_by_order:
        instants.append(record.approved)
    took = min(
        (instant - record.announced for instant in instants if instant >= record.announced), default=None
    )
    if took is None:
        return False, _not_approved(vm, record)
    if took > within_s:
        return False, f"drained {took:.1f} s after the announcement, {took - within_s:.1f} s too late"
    return True, f"drained {took:.1f} s after the announcement"


def _survived(vm: str, programs: Sequence[ProgramRecord]) -> tuple[bool, str]:
    for program in programs:
        if program.vm == vm and program.exited is not None:
            return (
                False,
                f"{program.what} of {program.vm} ended by itself at {program.exited:.1f} s: {describe_exit(program.exit_code)}",
            )
    return True, "it ran to the end"
