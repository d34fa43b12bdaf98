"""What ``--expect`` means."""

from __future__ import annotations

import pytest

from caesura_rehearse.results.expectations import (
    BadExpectation,
    Expectation,
    HeldOrNot,
    came_about,
    halted,
    judge,
    parse_expectation,
)
from caesura_rehearse.results.observations import EventRecord, Gap, ProgramRecord, RolloutRecord


def event(**given: object) -> EventRecord:
    usual: dict[str, object] = {
        "event_id": "E-1", "event": "Freeze", "set": "app", "vms": ("app-1",), "notice_s": 15.0, "duration_s": 9.0, "announced": 1.0,
        "outcome": "completed",
    }  # fmt: skip
    return EventRecord(**(usual | given))  # type: ignore[arg-type]


def program(**given: object) -> ProgramRecord:
    return ProgramRecord(**({"vm": "app-1", "what": "app"} | given))  # type: ignore[arg-type]


def holds(expectation: Expectation, events: list[EventRecord], programs: list[ProgramRecord]) -> HeldOrNot:
    """The verdict where there is one VM."""
    (verdict,) = judge(expectation, events, programs, ["app-1"])
    assert verdict.vm == ""
    return verdict


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("seen", Expectation("seen")),
        ("approved", Expectation("approved")),
        (" survived ", Expectation("survived")),
        ("drained-within 10s", Expectation("drained-within", 10.0)),
        ("drained-within=2.5", Expectation("drained-within", 2.5)),
        ("drained-within 2m", Expectation("drained-within", 120.0)),
        ("app-2: seen", Expectation("seen", vm="app-2")),
        ("app-2:drained-within 3s", Expectation("drained-within", 3.0, "app-2")),
    ],
)
def test_words(text: str, expected: Expectation) -> None:
    assert parse_expectation(text) == expected


@pytest.mark.parametrize(
    "text", ["", "aproved", "drained-within", "drained-within soon", "drained-within -5s"]
)
def test_other_words_are_refused_with_those_that_there_are(text: str) -> None:
    with pytest.raises(BadExpectation, match="drained-within 10s"):
        parse_expectation(text)


@pytest.mark.parametrize(
    ("record", "held", "detail"),
    [
        (
            event(approved=4.0, approved_by="app-1", first_seen=2.0, seen_by={"app-1": 2.0}),
            True,
            "by app-1, 3.0 s after",
        ),
        (
            event(first_seen=2.0, seen_by={"app-1": 2.0}),
            False,
            "seen 1.0 s after its announcement and not approved",
        ),
        (event(), False, "no client asked"),
        (event(approved=4.0, approved_by="app-1", approved_by_order=True), False, "not approved"),
        (event(approved=4.0, approved_by="neighbour", approved_by_order=True), False, "not approved"),
        (
            event(
                approved=4.0,
                approved_by="rehearse",
                approved_by_order=True,
                first_seen=2.0,
                seen_by={"app-1": 2.0},
            ),
            False,
            "not approved",
        ),
    ],
)
def test_approved(record: EventRecord, held: bool, detail: str) -> None:
    verdict = holds(Expectation("approved"), [record], [program()])
    assert verdict.held is held
    assert detail in verdict.detail


def test_drained_is_an_approval_or_an_end_in_time() -> None:
    expectation = Expectation("drained-within", 5.0)
    in_time = event(approved=5.9, approved_by="app-1")
    assert holds(expectation, [in_time], [program()]).held
    late = holds(expectation, [event(approved=8.0, approved_by="app-1")], [program()])
    assert not late.held
    assert "2.0 s too late" in late.detail
    assert holds(expectation, [event(event="Terminate")], [program(exited=3.0, exit_code=0)]).held
    assert not holds(expectation, [event()], [program(vm="app-2", exited=3.0)]).held, "another VM's"
    assert not holds(expectation, [event()], [program(exited=0.5)]).held, "before the announcement"


def test_survived() -> None:
    assert holds(Expectation("survived"), [event()], [program()]).held
    gone = holds(Expectation("survived"), [event()], [program(exited=12.0, exit_code=-9)])
    assert not gone.held
    assert "ended by signal 9" in gone.detail


def test_nothing_holds_without_an_event() -> None:
    assert not holds(Expectation("survived"), [], [program()]).held
    assert not holds(Expectation("approved"), [event(outcome="cancelled", approved=2.0)], [program()]).held


def test_an_event_that_was_taken_back_is_seen_and_survived() -> None:
    taken_back = event(outcome="cancelled", seen_by={"app-1": 2.0})
    assert holds(Expectation("seen"), [taken_back], [program()]).held
    assert holds(Expectation("survived"), [taken_back], [program()]).held
    assert not holds(Expectation("seen"), [event(outcome="cancelled")], [program()]).held


def test_every_event_must_hold() -> None:
    good, bad = event(first_seen=2.0, seen_by={"app-1": 2.0}), event(event_id="E-2")
    assert holds(Expectation("seen"), [good, good], []).held
    assert not holds(Expectation("seen"), [good, bad], []).held


def test_what_was_ordered_came_about() -> None:
    gap = Gap(vm="app-1", began=5.0, seconds=9.01, cpu_s=0.0)
    assert came_about(event(gaps=[gap])).detail == "app-1 paused for 9.010 s"
    assert came_about(event(outcome="cancelled")).held
    assert not came_about(event(outcome="")).held
    assert came_about(event(outcome="failed", why="it ended before")).detail == "it ended before"


TWO = ["app-1", "app-2"]


def test_each_vm_has_its_verdict() -> None:
    events = [
        event(vms=("app-1",), seen_by={"app-1": 2.0, "app-2": 2.0}),
        event(event_id="E-2", vms=("app-2",), seen_by={"app-1": 4.0}),
    ]
    verdicts = judge(Expectation("seen"), events, [], TWO)
    assert [(each.what, each.held) for each in verdicts] == [("app-1: seen", True), ("app-2: seen", False)]
    assert [each.vm for each in verdicts] == TWO
    (one,) = judge(Expectation("seen", vm="app-1"), events, [], TWO)
    assert (one.what, one.held) == ("app-1: seen", True)


def test_an_approval_is_for_all_vms_of_the_event() -> None:
    shared = event(vms=("app-1", "app-2"), approved=4.0, approved_by="app-1")
    assert [each.held for each in judge(Expectation("approved"), [shared], [], TWO)] == [True, True]


def test_a_vm_that_no_event_concerned_is_not_judged() -> None:
    only = event(vms=("app-2",), seen_by={"app-2": 2.0})
    assert [each.vm for each in judge(Expectation("seen"), [only], [], TWO)] == ["app-2"]
    (named,) = judge(Expectation("seen", vm="app-1"), [only], [], TWO)
    assert (named.held, named.detail) == (False, "no event was carried out")
    (unknown,) = judge(Expectation("seen", vm="app-9"), [only], [], TWO)
    assert (unknown.held, unknown.detail) == (False, "there is no VM app-9")


def test_update_domains_that_were_left_out() -> None:
    waves = (("app-1",), ("app-2",), ("app-3",))
    rollout = RolloutRecord(
        rollout_id="R",
        event="Freeze",
        waves=waves,
        began=0.0,
        waves_begun=1,
        outcome="failed",
        why="it ended",
    )
    verdict = halted(rollout)
    assert verdict is not None
    assert (verdict.what, verdict.held) == ("Freeze of app-2 and those after", False)
    assert verdict.detail == "not begun: it ended"
    rollout.waves_begun = 3
    assert halted(rollout) is None
