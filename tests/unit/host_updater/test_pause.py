"""The pause machine in single steps: the deadlines, the margins, what is reported."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec
import pytest

from caesura.lifecycle.budget import MIN_BUDGET_S, usable_s
from caesura_host_updater.operation.arming import arm
from caesura_host_updater.operation.effects import (
    DigestVms,
    Finish,
    PublishFrozen,
    PublishResumed,
    ResumeVms,
    RunUpdate,
    StopUpdate,
)
from caesura_host_updater.operation.inputs import (
    AbortReceived,
    Armed,
    Digested,
    Disarmed,
    GuardIntervention,
    ResumeEnded,
    Sampled,
    Start,
    TimePassed,
    UpdateEnded,
    VmFroze,
    VmNotFrozen,
)
from caesura_host_updater.operation.machine import decide
from caesura_host_updater.operation.pause_deadlines import PauseDeadlines
from caesura_host_updater.operation.report import final_report, resumed_fact, shown_by_host, update_outcome
from caesura_host_updater.operation.state import Operation, UnexpectedEvent, UpdateRun, VmPause

START = datetime(2026, 1, 1, tzinfo=UTC)


def wall(instant: float) -> datetime:
    """Seconds after START."""
    return START + timedelta(seconds=instant)


def operation(*names: str, **changes: Any) -> Operation:
    """An accepted operation."""
    facts: dict[str, Any] = {"operation": "op", "method": "freeze", "budget_s": 10.0, "hold_s": 1.0}
    vms = tuple(VmPause(vm=name, set="web", update_domain=1) for name in (names or ("a",)))
    return Operation(vms=vms, **(facts | changes))


def run(op: Operation, *events: tuple[float, Any]) -> tuple[Operation, list[Any]]:
    """Feed events at instants; all effects."""
    effects: list[Any] = []
    for now, event in events:
        op, more = decide(op, event, now)
        effects += more
    return op, effects


@pytest.mark.parametrize("budget_s", [MIN_BUDGET_S, 1.0, 2.0, 9.0, 30.0])
def test_deadlines_leave_room_for_the_update_and_three_margins(budget_s: float) -> None:
    deadlines = PauseDeadlines.of(100.0, budget_s)
    instants = [
        deadlines.started_at,
        deadlines.update_until,
        deadlines.resume_at,
        deadlines.guard_at,
        deadlines.started_at + budget_s,
    ]
    assert instants == sorted(set(instants))
    assert 0.1 <= deadlines.margin_s <= 1.0
    assert deadlines.freeze_by < deadlines.update_until
    assert usable_s(budget_s) == pytest.approx(budget_s - 3 * deadlines.margin_s)
    assert deadlines.digest_until <= min(100.0 + budget_s * 2 / 3, deadlines.update_until)


@pytest.mark.parametrize(
    ("budget_s", "freeze_s", "to_disk_s"), [(1.0, 0.25, 0.25), (10.0, 2.5, 2.5), (30.0, 5.0, 7.5)]
)
def test_a_freeze_that_ends_on_a_disk_has_a_quarter_of_the_budget(
    budget_s: float, freeze_s: float, to_disk_s: float
) -> None:
    for method, expected in (("freeze", freeze_s), ("kexec", to_disk_s)):
        op = msgspec.structs.replace(operation("a"), method=method, budget_s=budget_s)
        op = arm(op, 100.0)[0]
        assert op.wake_at == pytest.approx(100.0 + expected)
        assert op.deadlines is not None
        assert op.deadlines.freeze_by < op.deadlines.leave_by < op.deadlines.resume_at


def test_hold_from_begin_to_end() -> None:
    op, effects = run(
        operation("a", "b"),
        (100.0, Start()),
        (100.01, Armed()),
        (100.02, VmFroze("a", 100.011, 100.015)),
        (100.03, VmFroze("b", 100.012, 100.025)),
    )
    assert op.phase == "updating"
    assert op.wake_at == pytest.approx(101.03)
    op, more = run(op, (101.03, TimePassed()))
    assert op.phase == "resuming"
    assert ResumeVms(("a", "b")) in more
    op, more = run(
        op,
        (101.04, ResumeEnded("a", 101.035, "running")),
        (101.05, ResumeEnded("b", 101.05, "running")),
    )
    assert op.phase == "resumed"
    op, more = run(op, (101.06, Disarmed()))
    assert (op.phase, op.end, op.failure) == ("ended", "completed", "")
    assert more == [Finish()]
    assert op.vms[0].pause_s == pytest.approx(101.035 - 100.011)
    fact = resumed_fact("host-1", op, "a", wall)
    assert (fact.within_budget, fact.resumed_by) == (True, "updater")
    assert fact.at == wall(101.035)
    assert PublishFrozen("a") in effects


def test_a_hold_longer_than_the_budget_ends_with_the_budgets_share() -> None:
    """Refused as a command; here the second line: whatever was accepted, the resume is asked for in time (I2)."""
    op, _ = run(
        operation(hold_s=25.0),
        (100.0, Start()),
        (100.01, Armed()),
        (100.02, VmFroze("a", 100.011, 100.015)),
    )
    assert op.deadlines is not None
    assert op.wake_at == op.deadlines.resume_at
    _, effects = run(op, (op.deadlines.resume_at, TimePassed()))
    assert ResumeVms(("a",)) in effects


def test_one_vm_that_cannot_be_frozen_lets_all_go_at_once() -> None:
    op, effects = run(
        operation("a", "b"),
        (100.0, Start()),
        (100.0, Armed()),
        (100.1, VmFroze("a", 100.0, 100.1)),
        (100.2, VmNotFrozen("b", 100.0, "will not")),
    )
    assert ResumeVms(("a", "b")) in effects
    assert op.failure == "VM b could not be frozen: will not"


def test_events_in_the_wrong_phase_name_both() -> None:
    with pytest.raises(UnexpectedEvent, match=r"Armed in phase 'accepted'.*'arming'"):
        decide(operation(), Armed(), 1.0)
    op, _ = run(operation(), (1.0, Start()))
    with pytest.raises(UnexpectedEvent, match=r"Start in phase 'arming'.*'accepted'"):
        decide(op, Start(), 1.0)
    with pytest.raises(UnexpectedEvent, match="VmFroze in phase 'arming'"):
        decide(op, VmFroze("a", 1.0, 1.0), 1.0)
    with pytest.raises(UnexpectedEvent, match="Disarmed in phase 'arming'"):
        decide(op, Disarmed(), 1.0)


def updating(**changes: Any) -> Operation:
    """An operation whose update runs since 100.0."""
    facts: dict[str, Any] = {
        "update": "patch",
        "update_timeout_s": 60.0,
        "runs": (UpdateRun(),),
        "hold_s": 0.0,
    }
    op, _ = run(
        operation(**(facts | changes)),
        (100.0, Start()),
        (100.0, Armed()),
        (100.0, VmFroze("a", 100.0, 100.0)),
    )
    assert op.phase == "updating"
    return op


def test_update_is_asked_to_end_then_killed_and_never_waited_for() -> None:
    op = updating()  # margins of 1 s: 107, 108, 109
    assert op.wake_at == pytest.approx(107.0)
    op, effects = run(op, (107.0, TimePassed()))
    assert effects == [StopUpdate(kill=False)]
    op, effects = run(op, (108.0, TimePassed()))
    assert effects[:2] == [StopUpdate(kill=True), ResumeVms(("a",))]
    assert op.runs[0].outcome == "timeout"
    assert "did not end within 7.0 s" in op.failure


def test_grace_of_a_late_abort_does_not_delay_the_resume() -> None:
    op, effects = run(updating(), (106.9, AbortReceived("aborted", "x")))
    assert effects == [StopUpdate(kill=False)]
    assert op.wake_at == pytest.approx(107.9)
    op, _ = run(updating(update_timeout_s=6.8), (107.8, AbortReceived("aborted", "x")))
    assert op.wake_at == pytest.approx(108.0)  # `resume_at`, not a whole margin later


def test_update_that_ends_in_the_grace_still_timed_out() -> None:
    op, _ = run(updating(), (107.0, TimePassed()), (107.5, UpdateEnded("", "failed", -15, 7.5, "")))
    assert op.phase == "resuming"
    assert op.runs[0].outcome == "timeout"


def test_waking_up_late_kills_and_resumes_in_one_step() -> None:
    op, effects = run(updating(), (150.0, TimePassed()))
    assert effects[:2] == [StopUpdate(kill=True), ResumeVms(("a",))]
    assert op.failure


def test_guards_record_tells_the_true_pause() -> None:
    op, _ = run(updating(), (150.0, TimePassed()))
    op, effects = run(op, (150.0, ResumeEnded("a", 150.0, "running")))
    assert PublishResumed("a") not in effects  # not yet: only the guard knows
    record = Disarmed("the deadline passed", (GuardIntervention("a", True, None, 109.02),))
    op, effects = run(op, (150.1, record))
    assert effects == [PublishResumed("a"), Finish()]
    assert op.vms[0].resumed_by == "guard"
    assert op.vms[0].pause_s == pytest.approx(9.02)
    assert op.failure.startswith("the pause guard resumed VM a: the deadline passed")


def test_late_freeze_counts_from_when_it_was_last_seen_running() -> None:
    op, _ = run(operation(), (100.0, Start()), (100.0, Armed()))
    op, _ = run(op, (200.0, TimePassed()))
    op, _ = run(op, (200.0, VmNotFrozen("a", 100.0, "called off")))
    op, _ = run(op, (200.1, ResumeEnded("a", 200.1, "running")))
    record = Disarmed("the deadline passed", (GuardIntervention("a", True, 199.99, 200.01),))
    op, effects = run(op, (200.2, record))
    assert op.vms[0].pause_s == pytest.approx(0.02)
    assert effects == [PublishFrozen("a"), PublishResumed("a"), Finish()]


def test_freeze_found_at_the_resume_is_counted() -> None:
    op, _ = run(
        operation(),
        (100.0, Start()),
        (100.0, Armed()),
        (100.1, AbortReceived("aborted", "x")),
    )
    op, _ = run(op, (100.1, VmNotFrozen("a", 100.0, "called off")))
    op, effects = run(op, (100.2, ResumeEnded("a", 100.2, "running", True)))
    assert effects[:2] == [PublishFrozen("a"), PublishResumed("a")]
    op, _ = run(op, (100.3, Disarmed()))
    assert op.end == "failed"  # something was frozen, so it is not merely cancelled


def test_changed_memory_fails_the_operation() -> None:
    op = operation()
    op = msgspec.structs.replace(op, vms=(VmPause(vm="a", set="web", update_domain=1, can_digest=True),))
    op, _effects = run(
        op,
        (100.0, Start()),
        (100.0, Armed()),
        (100.0, VmFroze("a", 100.0, 100.0)),
        (100.1, Digested("a", "one")),
        (101.1, TimePassed()),
        (101.2, Digested("a", "two")),
    )
    assert op.failure == "the memory of VM a changed while it was paused"
    proof = shown_by_host(op.vms[0])
    assert (proof.proof, proof.ok, proof.detail) == ("digest", False, "digest differs: one became two")


def _with_digests(budget_s: float, **vm: Any) -> Operation:
    op = operation(update="patch", runs=(UpdateRun(),), update_timeout_s=budget_s)
    one = VmPause(vm="a", set="web", update_domain=1, **vm)
    op = msgspec.structs.replace(op, budget_s=budget_s, vms=(one,))
    op, _ = run(op, (100.0, Start()), (100.0, Armed()), (100.0, VmFroze("a", 100.0, 100.0)))
    return op


@pytest.mark.parametrize(("took_s", "whole"), [(15.0, True), (20.5, False), (26.9, False)])
def test_a_long_update_leaves_time_for_a_sampled_digest(took_s: float, whole: bool) -> None:
    """Of a budget of 30 s no digest of all memory is begun after 20 s; today there was none at all then."""
    op = _with_digests(30.0, can_digest=True, can_sample=True)
    op, _ = run(op, (100.1, Sampled("a", "s")), (100.2, Digested("a", "d")))
    ended = 100.2 + took_s
    op, effects = run(op, (ended, UpdateEnded("", "succeeded", 0, took_s, "")))
    (digest,) = [each for each in effects if isinstance(each, DigestVms)]
    assert digest.whole == (frozenset({"a"}) if whole else frozenset())
    assert digest.until <= op.deadlines.resume_at  # type: ignore[union-attr]
    op, effects = run(op, (ended, Sampled("a", "s")), (ended, Digested("a", "d" if whole else "")))
    assert ResumeVms(("a",)) in effects
    proof = shown_by_host(op.vms[0])
    assert proof.held == (("digest_equal", "sampled_digest_equal") if whole else ("sampled_digest_equal",))
    assert ("no time was left" in proof.detail) is not whole


def test_a_sample_that_does_not_come_holds_up_neither_the_update_nor_the_resume() -> None:
    """RAM that was swapped out: a disk is waited for, at most a second, and never beyond the instant of the resume."""
    op = _with_digests(30.0, can_sample=True)
    assert op.wake_at == pytest.approx(101.0)
    op, effects = run(op, (101.0, TimePassed()))
    assert any(isinstance(each, RunUpdate) for each in effects)
    assert shown_by_host(op.vms[0]).held == ()
    op = _with_digests(30.0, can_sample=True)
    op, _ = run(op, (100.1, Sampled("a", "s")), (100.1, Digested("a", "")))
    op, _ = run(op, (127.5, UpdateEnded("", "succeeded", 0, 27.4, "")))
    assert op.wake_at == op.deadlines.resume_at  # type: ignore[union-attr]
    op, effects = run(op, (128.0, TimePassed()))
    assert ResumeVms(("a",)) in effects
    assert "too long" in shown_by_host(op.vms[0]).detail


def test_sampled_pages_that_differ_fail_the_operation() -> None:
    op = _with_digests(10.0, can_sample=True)
    op, _ = run(op, (100.1, Sampled("a", "one")), (100.1, Digested("a", "")))
    op, _ = run(op, (101.0, UpdateEnded("", "succeeded", 0, 0.9, "")))
    op, _ = run(op, (101.1, Sampled("a", "two")), (101.1, Digested("a", "")))
    assert op.failure == "the memory of VM a changed while it was paused"
    assert shown_by_host(op.vms[0]).broken == ("sampled_digest_equal",)


def test_report_of_an_overrun_is_never_completed() -> None:
    vm = VmPause(
        vm="a", set="web", update_domain=1, called_at=0.0, frozen_at=0.0, resumed_at=12.0, end="running"
    )
    op = msgspec.structs.replace(operation(), vms=(vm,), end="completed", phase="ended")
    report = final_report("host-1", COMMAND, op, 3, {"a": "running"}, START)
    assert report.status == "failed"
    assert "12.00 s is over the budget of 10 s" in report.reason
    assert report.overhead_s == pytest.approx(11.0)


def test_update_outcome_is_the_worst_of_its_runs() -> None:
    runs = (
        UpdateRun(key="a", started=True, outcome="succeeded", exit_code=0, seconds=2.0, output_tail="fine"),
        UpdateRun(key="b", started=True, outcome="failed", exit_code=4, seconds=1.0, output_tail="broke"),
    )
    told = update_outcome(operation("a", "b", update="patch", runs=runs))
    assert told is not None
    assert (told.outcome, told.exit_code, told.seconds) == ("failed", 4, 2.0)
    assert told.output_tail == "[a] fine\n[b] broke"
    assert update_outcome(operation()) is None


def command() -> Any:
    """The command behind the reports."""
    from caesura.contract.messages import OperationTarget, StartOperation  # noqa: PLC0415

    return StartOperation(
        operation="op",
        epoch=3,
        coordinator="c",
        host="host-1",
        rollout="r",
        wave=2,
        method="freeze",
        targets=(OperationTarget(vm="a", set="web", update_domain=1),),
        budget_s=10.0,
        not_after=START,
    )


COMMAND = command()
