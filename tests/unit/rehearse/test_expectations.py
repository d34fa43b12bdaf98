"""What ``--expect`` means."""

from __future__ import annotations

import pytest

from caesura_rehearse.expectations import BadExpectation, Expectation, came_about, judge, parse_expectation
from caesura_rehearse.observations import EventRecord, Gap, ProgramRecord


def event(**given: object) -> EventRecord:
    usual: dict[str, object] = {
        "event_id": "E-1", "event": "Freeze", "set": "app", "vms": ("app-1",), "notice_s": 15.0, "duration_s": 9.0, "announced": 1.0,
        "outcome": "completed",
    }  # fmt: skip
    return EventRecord(**(usual | given))  # type: ignore[arg-type]


def program(**given: object) -> ProgramRecord:
    return ProgramRecord(**({"vm": "app-1", "what": "app"} | given))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("seen", Expectation("seen")),
        ("approved", Expectation("approved")),
        (" survived ", Expectation("survived")),
        ("drained-within 10s", Expectation("drained-within", 10.0)),
        ("drained-within=2.5", Expectation("drained-within", 2.5)),
    ],
)
def test_words(text: str, expected: Expectation) -> None:
    assert parse_expectation(text) == expected


@pytest.mark.parametrize(
    "text", ["", "aproved", "drained-within", "drained-within soon", "drained-within 10m"]
)
def test_other_words_are_refused_with_those_that_there_are(text: str) -> None:
    with pytest.raises(BadExpectation, match="drained-within 10s"):
        parse_expectation(text)


@pytest.mark.parametrize(
    ("record", "held", "detail"),
    [
        (event(approved=4.0, approved_by="app-1", first_seen=2.0), True, "by app-1, 3.0 s after"),
        (event(first_seen=2.0), False, "seen 1.0 s after its announcement and not approved"),
        (event(), False, "no client asked"),
        (event(approved=4.0, approved_by="rehearse", first_seen=2.0), False, "not approved"),
    ],
)
def test_approved(record: EventRecord, held: bool, detail: str) -> None:
    verdict = judge(Expectation("approved"), [record], [program()])
    assert verdict.held is held
    assert detail in verdict.detail


def test_drained_is_an_approval_or_an_end_in_time() -> None:
    expectation = Expectation("drained-within", 5.0)
    in_time = event(approved=5.9, approved_by="app-1")
    assert judge(expectation, [in_time], [program()]).held
    late = judge(expectation, [event(approved=8.0, approved_by="app-1")], [program()])
    assert not late.held
    assert "2.0 s too late" in late.detail
    assert judge(expectation, [event(event="Terminate")], [program(exited=3.0, exit_code=0)]).held
    assert not judge(expectation, [event()], [program(vm="app-2", exited=3.0)]).held, "another VM's"
    assert not judge(expectation, [event()], [program(exited=0.5)]).held, "before the announcement"


def test_survived() -> None:
    assert judge(Expectation("survived"), [event()], [program()]).held
    gone = judge(Expectation("survived"), [event()], [program(exited=12.0, exit_code=-9)])
    assert not gone.held
    assert "ended by signal 9" in gone.detail


def test_nothing_holds_without_an_event() -> None:
    assert not judge(Expectation("survived"), [], [program()]).held
    assert not judge(Expectation("survived"), [event(outcome="cancelled")], [program()]).held


def test_every_event_must_hold() -> None:
    good, bad = event(first_seen=2.0), event(event_id="E-2")
    assert judge(Expectation("seen"), [good, good], []).held
    assert not judge(Expectation("seen"), [good, bad], []).held


def test_what_was_ordered_came_about() -> None:
    gap = Gap(vm="app-1", began=5.0, seconds=9.01, cpu_s=0.0)
    assert came_about(event(gaps=[gap])).detail == "app-1 paused for 9.010 s"
    assert came_about(event(outcome="cancelled")).held
    assert not came_about(event(outcome="")).held
    assert came_about(event(outcome="failed", why="it ended before")).detail == "it ended before"
