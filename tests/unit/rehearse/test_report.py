"""The report: text, and JUnit XML that a parser takes."""

from __future__ import annotations

from xml.etree import ElementTree as ET

from caesura_rehearse.results.expectations import Expectation, HeldOrNot
from caesura_rehearse.results.observations import (
    EventRecord,
    Gap,
    Observations,
    ProgramRecord,
    RefusedRequest,
)
from caesura_rehearse.results.report import Report, judge_all, junit, text_lines

_DOCUMENT = (
    b'{"DocumentIncarnation":%d,"Events":[{"EventId":"E-1","EventStatus":"%s","NotBefore":"","More":1}]}'
)


def record() -> EventRecord:
    return EventRecord(
        event_id="E-1", event="Freeze", set="app", vms=("app-1",), notice_s=15.0, duration_s=9.0, announced=1.0, started=16.0, ended=27.0,
        outcome="completed", gaps=[Gap(vm="app-1", began=16.0, seconds=9.004, cpu_s=0.0)],
    )  # fmt: skip


def report(**given: object) -> Report:
    usual: dict[str, object] = {
        "held": True, "verdicts": (HeldOrNot(what="seen", held=True),), "events": (record(),),
        "programs": (ProgramRecord(vm="app-1", what="app", starts=1),), "deliveries": (), "approvals": (), "refusals": (), "polls": {"app-1": 3},
        "seconds": 30.0,
    }  # fmt: skip
    return Report(**(usual | given))  # type: ignore[arg-type]


def test_the_text_has_the_gap_and_the_verdicts() -> None:
    lines = text_lines(report(verdicts=(HeldOrNot(what="approved", held=False, detail="nobody did"),)))
    assert "    app-1: stopped for 9.004 s says the kernel, 0.000 s of CPU in between" in lines
    assert lines[-1].split(maxsplit=1) == ["FAILED", "approved: nobody did"]


def test_many_refusals_are_counted() -> None:
    refusals = tuple(
        RefusedRequest(at=float(n), vm="app-1", method="GET", path="/x", status=400, why="no header")
        for n in range(9)
    )
    lines = text_lines(report(refusals=refusals))
    assert sum("refused at" in line for line in lines) == 5
    assert "    and 4 more" in lines


def test_what_a_program_left_behind_and_its_terminal_are_named() -> None:
    program = ProgramRecord(
        vm="app-1", what="app", exited=2.0, exit_code=1, left=("77 (daemon)",), terminal_taken=True
    )
    text = "\n".join(text_lines(report(programs=(program,))))
    assert "77 (daemon) left its process group" in text
    assert "it has no terminal here" in text


def test_junit() -> None:
    bad = HeldOrNot(what="app \x1b ended well", held=False, detail='exit "3" & <more>')
    root = ET.fromstring(junit(report(verdicts=(HeldOrNot(what="seen", held=True), bad))))  # noqa: S314 - our own
    suite = root[0]
    assert (suite.get("tests"), suite.get("failures")) == ("2", "1")
    failure = suite.find("testcase/failure")
    assert failure is not None
    assert failure.get("message") == 'exit "3" & <more>'


def test_a_program_that_ends_badly_is_a_verdict() -> None:
    program = ProgramRecord(vm="app-1", what="app", exited=0.2, exit_code=1)
    verdicts = judge_all([], [], [program], [Expectation("seen")], None, ["app-1"])
    assert [each.held for each in verdicts] == [False, False]
    assert (verdicts[1].what, verdicts[1].detail) == ("app ended well", "exit code 1")


def test_what_a_client_got_is_noted_once_a_document() -> None:
    seen = Observations()
    seen.events["e-1"] = record()
    for at, body in (
        (2.0, _DOCUMENT % (2, b"Scheduled")),
        (3.0, _DOCUMENT % (2, b"Scheduled")),
        (4.0, _DOCUMENT % (3, b"Started")),
    ):
        seen.delivered("app-1", body, at)
    assert [each.at for each in seen.deliveries] == [2.0, 4.0]
    assert (seen.events["e-1"].first_seen, seen.events["e-1"].seen_started) == (2.0, 4.0)
