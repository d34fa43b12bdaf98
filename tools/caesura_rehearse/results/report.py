"""What a rehearsal found: as text for people, as JSON, as JUnit XML. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from xml.etree import ElementTree as ET

import msgspec

from caesura.runtime.visible import visible
from caesura_rehearse.results.expectations import Expectation, HeldOrNot, came_about, halted, judge
from caesura_rehearse.results.observations import (
    Approval,
    DocumentDelivery,
    EventRecord,
    ProgramRecord,
    RefusedRequest,
    RolloutRecord,
    ScenarioRecord,
    describe_exit,
)

_REFUSALS_SHOWN = 5


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """All of it. Instants are seconds since the rehearsal began."""

    held: bool
    verdicts: tuple[HeldOrNot, ...]
    events: tuple[EventRecord, ...]
    rollouts: tuple[RolloutRecord, ...] = ()
    scenario: ScenarioRecord | None = None
    speed: float = 1.0
    """By which all waiting was shortened."""
    programs: tuple[ProgramRecord, ...]
    deliveries: tuple[DocumentDelivery, ...]
    approvals: tuple[Approval, ...]
    refusals: tuple[RefusedRequest, ...]
    polls: dict[str, int]
    seconds: float


def judge_all(
    events: Sequence[EventRecord],
    rollouts: Sequence[RolloutRecord],
    programs: Sequence[ProgramRecord],
    expectations: Sequence[Expectation],
    scenario: ScenarioRecord | None,
    vms: Sequence[str],
    *,
    recorded: int = 0,
) -> list[HeldOrNot]:
    """What was ordered, each expectation for each VM, and how programs ended.

    Args:
        vms: all that there are.
        recorded: how many events a recording has.
    """
    verdicts = [came_about(each) for each in events]
    if len(events) < recorded:
        early = next((each for each in programs if each.exited is not None), None)
        why = (
            f"{early.what} ended before: {describe_exit(early.exit_code)}"
            if early
            else "the rehearsal ended before"
        )
        verdicts.append(HeldOrNot(what="the recording", held=False, detail=why))
    verdicts += [verdict for each in rollouts if (verdict := halted(each)) is not None]
    if scenario is not None:
        verdicts += [
            HeldOrNot(what=f"{scenario.file}:{step.line}: {step.what}", held=False, detail=step.why)
            for step in scenario.steps
            if step.why
        ]
    for expectation in expectations:
        verdicts += judge(expectation, events, programs, vms)
    named = len(vms) > 1
    verdicts += [
        HeldOrNot(
            what=f"{each.vm}: {each.what} ended well" if named else f"{each.what} ended well",
            held=False,
            detail=describe_exit(each.exit_code),
            vm=each.vm if named else "",
        )
        for each in programs
        if each.exited is not None and each.exit_code
    ]
    return verdicts


def text_lines(report: Report) -> list[str]:
    """The report for people, a line each."""
    lines = []
    if report.scenario is not None:
        lines.append(f"scenario    {report.scenario.file}: {report.scenario.title}")
    named = len(report.programs) > 1 or len({vm for record in report.events for vm in record.vms}) > 1
    for record in report.events:
        lines += _event_lines(record, named=named)
    for program in report.programs:
        lines.append(_program_line(program))
        if program.exit_code and program.exited is not None and program.terminal_taken:
            lines.append(
                "    it has no terminal here: it runs in a session of its own, with /dev/null as standard input"
            )
        if program.left:
            lines.append(
                f"    it went into the background: {', '.join(program.left)} left its process group and was ended with it. Start it in the "
                "foreground, as a service manager does"
            )
    if report.speed != 1.0:
        lines.append(
            f"speed       {report.speed:g}: notices, checks and the time between steps were shortened"
        )
    polls = sum(report.polls.values())
    lines.append(
        f"metadata    {polls} requests for the document{_by_vm(report.polls)}, {len(report.deliveries)} different ones delivered, {len(report.approvals)} approvals"
    )
    lines += [
        f"    refused at {each.at:.1f} s: {each.method} {each.path}: {each.status} {each.why}"
        for each in report.refusals[:_REFUSALS_SHOWN]
    ]
    if len(report.refusals) > _REFUSALS_SHOWN:
        lines.append(f"    and {len(report.refusals) - _REFUSALS_SHOWN} more")
    lines += [
        f"{'held' if each.held else 'FAILED':<11} {each.what}" + (f": {each.detail}" if each.detail else "")
        for each in report.verdicts
    ]
    return [visible(line) for line in lines]


def _by_vm(polls: dict[str, int]) -> str:
    """How many each VM has made, where there are several."""
    return f" ({', '.join(f'{vm} {count}' for vm, count in polls.items())})" if len(polls) > 1 else ""


def _event_lines(record: EventRecord, *, named: bool) -> list[str]:
    since = record.announced
    steps = [f"announced at {since:.1f} s with {record.notice_s:g} s of notice"]
    steps.append(
        "never seen by a client"
        if record.first_seen is None
        else f"seen after {record.first_seen - since:.1f} s"
    )
    if record.approved is not None:
        steps.append(f"approved by {record.approved_by} after {record.approved - since:.1f} s")
    if record.started is not None:
        steps.append(f"started after {record.started - since:.1f} s")
    if record.ended is not None:
        steps.append(f"{record.outcome} after {record.ended - since:.1f} s")
    of = f"of {', '.join(record.vms)} " if named else ""
    lines = [f"{record.event:<11} {of}{', '.join(steps)}"]
    for gap in record.gaps:
        by = "" if gap.resumed_by == "rehearse" else f", resumed by {gap.resumed_by}"
        lines.append(
            f"    {gap.vm}: stopped for {gap.seconds:.3f} s says the kernel, {gap.cpu_s:.3f} s of CPU in between{by}"
        )
    return lines


def _program_line(program: ProgramRecord) -> str:
    if program.exited is not None:
        return f"program     {program.vm}: {program.what} ended by itself at {program.exited:.1f} s, {describe_exit(program.exit_code)}"
    started = f", started {program.starts} times" if program.starts > 1 else ""
    return f"program     {program.vm}: {program.what} ran to the end{started}"


def junit(report: Report) -> bytes:
    """One test case a verdict, as CI systems read it."""
    failures = [each for each in report.verdicts if not each.held]
    suite = ET.Element(
        "testsuite",
        name="caesura rehearse",
        tests=str(len(report.verdicts)),
        failures=str(len(failures)),
        errors="0",
        time=f"{report.seconds:.3f}",
    )
    for verdict in report.verdicts:
        case = ET.SubElement(
            suite,
            "testcase",
            classname=".".join(("caesura.rehearse", verdict.vm) if verdict.vm else ("caesura.rehearse",)),
            name=_xml(verdict.what.removeprefix(f"{verdict.vm}: ") if verdict.vm else verdict.what),
            time="0",
        )
        if not verdict.held:
            ET.SubElement(case, "failure", message=_xml(verdict.detail)).text = _xml(verdict.detail)
    ET.SubElement(suite, "system-out").text = _xml("\n".join(text_lines(report)))
    tree = ET.Element("testsuites")
    tree.append(suite)
    text: str = ET.tostring(tree, encoding="unicode")
    return f'<?xml version="1.0" encoding="utf-8"?>\n{text}\n'.encode()


def _xml(text: str) -> str:
    """Without what XML 1.0 has no way to write."""
    return "".join(each if each in "\t\n" or each >= " " else "?" for each in text)
