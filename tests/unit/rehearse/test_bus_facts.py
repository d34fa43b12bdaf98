"""What is published at a broker about events and pauses: each fact once, in order."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from caesura.contract.messages import EventChanged, ScheduledEvent, SetDocument, VmFrozen, VmResumed
from caesura_rehearse.results.observations import EventRecord, Gap
from caesura_rehearse.simulation.bus_facts import Fact, FactLog, Place

BEGAN = datetime(2026, 11, 29, 1, 0, 0, tzinfo=UTC)
PLACES = {
    "app-1": Place(set="app", update_domain=0, pausable=True),
    "app-2": Place(set="app", update_domain=1, pausable=True),
}


def record(**members: object) -> EventRecord:
    given = {
        "event_id": "E1",
        "event": "Freeze",
        "set": "app",
        "vms": ("app-1",),
        "notice_s": 5.0,
        "duration_s": 1.0,
        "announced": 1.0,
    }
    return EventRecord(**(given | members))  # type: ignore[arg-type]


def log(incarnation: int = 2) -> FactLog:
    facts = FactLog("rehearsal", lambda instant: BEGAN + timedelta(seconds=instant))
    event = ScheduledEvent(
        event_id="e1", event_type="Freeze", status="scheduled", resources=("app-1",), not_before=BEGAN
    )
    facts.document(SetDocument(set="app", incarnation=incarnation, events=(event,)))
    return facts


def words(facts: list[Fact]) -> list[str]:
    names = {VmFrozen: "frozen", VmResumed: "resumed"}
    return [
        each.status if isinstance(each, EventChanged) else f"{each.vm} {names[type(each)]}" for each in facts
    ]


def test_each_step_is_told_once() -> None:
    facts, event = log(), record()
    told = [words(facts.pending([event], PLACES))]
    event.approved, event.approved_by, event.started = 2.0, "app-1", 2.5
    told.append(words(facts.pending([event], PLACES)))
    event.paused = 3.0
    told += [words(facts.pending([event], PLACES)), words(facts.pending([event], PLACES))]
    event.gaps.append(Gap(vm="app-1", began=3.0, seconds=1.0, cpu_s=0.0))
    told.append(words(facts.pending([event], PLACES)))
    event.outcome, event.ended = "completed", 6.0
    told += [words(facts.pending([event], PLACES)), words(facts.pending([event], PLACES))]
    assert told == [["scheduled"], ["started"], ["app-1 frozen"], [], ["app-1 resumed"], ["completed"], []]


def test_what_happened_between_two_looks_is_told_in_order() -> None:
    event = record(
        started=2.0,
        paused=3.0,
        gaps=[
            Gap(vm="app-1", began=3.0, seconds=1.0, cpu_s=0.0),
            Gap(vm="app-1", began=8.0, seconds=0.5, cpu_s=0.0, resumed_by="guard"),
        ],
        ended=9.0,
        outcome="failed",
        why="it ended before",
    )
    found = log(7).pending([event], PLACES)
    assert words(found) == [
        "scheduled",
        "started",
        "app-1 frozen",
        "app-1 resumed",
        "app-1 frozen",
        "app-1 resumed",
        "failed",
    ]
    last_pause, end = found[-2:]
    assert isinstance(last_pause, VmResumed)
    assert (last_pause.pause_s, last_pause.resumed_by, last_pause.at) == (
        0.5,
        "guard",
        BEGAN + timedelta(seconds=8.5),
    )
    assert isinstance(end, EventChanged)
    assert (end.incarnation, end.reason) == (7, "it ended before")


def test_without_notice_it_was_never_scheduled() -> None:
    assert words(log().pending([record(notice_s=0.0, started=1.0)], PLACES)) == ["started"]


def test_an_event_that_no_document_has_shown_yet_waits() -> None:
    facts = FactLog("rehearsal", lambda _: BEGAN)
    assert facts.pending([record()], PLACES) == []


def test_a_vm_without_a_program_is_not_told_to_be_frozen() -> None:
    nothing = {"app-1": Place(set="app", update_domain=0, pausable=False)}
    assert words(log().pending([record(started=2.0, paused=3.0)], nothing)) == ["scheduled", "started"]
