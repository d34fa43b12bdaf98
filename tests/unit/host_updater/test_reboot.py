"""The machine's way through an update that needs a reboot, in single steps; and its outcome when the host updater died."""

from __future__ import annotations

from typing import Any

import pytest

from caesura_host_updater.operation.crash_outcome import recovered
from caesura_host_updater.operation.effects import (
    Arm,
    Finish,
    KillVm,
    RunUpdate,
    ShutDownVms,
    StartVms,
    StopUpdate,
)
from caesura_host_updater.operation.inputs import (
    AbortReceived,
    GuardLost,
    Start,
    TimePassed,
    UpdateEnded,
    VmNotShutDown,
    VmNotStarted,
    VmShutDown,
    VmStarted,
)
from caesura_host_updater.operation.machine import decide
from caesura_host_updater.operation.state import Operation, UnexpectedEvent, UpdateRun, VmPause

SUCCEEDED = UpdateEnded("", "succeeded", 0, 1.0, "")


def operation(*names: str, **changes: Any) -> Operation:
    """An accepted operation by method reboot."""
    facts: dict[str, Any] = {"update": "kernel", "update_timeout_s": 20.0, "shutdown_s": 30.0}
    vms = tuple(VmPause(vm=name, set="web", update_domain=1) for name in (names or ("a",)))
    return Operation(
        operation="op", method="reboot", budget_s=0.1, vms=vms, runs=(UpdateRun(),), **(facts | changes)
    )


def run(op: Operation, *events: tuple[float, Any]) -> tuple[Operation, list[Any]]:
    """Feed events at instants; all effects."""
    effects: list[Any] = []
    for now, event in events:
        op, more = decide(op, event, now)
        effects += more
    return op, effects


def kinds(effects: list[Any]) -> list[str]:
    """Without the journal's."""
    return [type(each).__name__ for each in effects if type(each).__name__ != "Persist"]


def test_the_course_of_a_reboot() -> None:
    op, effects = run(operation("a", "b"), (10.0, Start()), (11.0, VmShutDown("a", 11.0, "ACPI")))
    assert kinds(effects) == ["ShutDownVms"]
    assert effects[1] == ShutDownVms(("a", "b"), 40.0)
    op, effects = run(op, (12.0, VmShutDown("b", 12.0, "its guest agent")))
    assert RunUpdate(("",)) in effects
    op, effects = run(op, (13.0, SUCCEEDED))
    assert StartVms(("a", "b")) in effects
    assert op.phase == "starting"
    op, effects = run(op, (14.0, VmStarted("a", 14.0)), (15.0, VmStarted("b", 15.5)))
    assert effects[-1] == Finish()
    assert (op.end, op.failure) == ("completed", "")
    assert [vm.detail for vm in op.vms] == [
        "shut down by ACPI, up again 4.0 s after it was asked to shut down",
        "shut down by its guest agent, up again 5.5 s after it was asked to shut down",
    ]


def test_the_first_vm_that_does_not_shut_down_ends_it_before_the_update() -> None:
    op, effects = run(
        operation("a", "b", "c"),
        (0.0, Start()),
        (1.0, VmShutDown("a", 1.0, "ACPI")),
        (30.0, VmNotShutDown("b", "it runs on", asked=True)),
    )
    assert kinds(effects) == ["ShutDownVms", "StartVms"]
    # What the others say now is late; c was down just before it was started again.
    op, effects = run(
        op,
        (30.1, VmShutDown("c", 30.0, "ACPI")),
        (31.0, VmStarted("a", 31.0)),
        (31.0, VmStarted("b", 31.0, again=False)),
        (31.1, VmNotShutDown("b", "too late")),
        (32.0, VmStarted("c", 32.0)),
    )
    assert kinds(effects) == ["Finish"]
    assert (op.end, op.codes) == ("failed", ("shutdown_failed",))
    assert op.failure == "nothing was updated: VM b did not shut down: it runs on"
    assert op.runs[0].started is False
    assert op.vms[1].detail == "it was not restarted"


def test_one_that_does_not_shut_down_is_killed_only_if_the_update_says_so() -> None:
    op, effects = run(
        operation("a", "b", kill_after_timeout=True),
        (0.0, Start()),
        (1.0, VmShutDown("a", 1.0, "ACPI")),
        (30.0, VmNotShutDown("b", "it runs on", asked=True)),
    )
    # The intent is in the journal before the effect.
    assert [type(each).__name__ for each in effects[-2:]] == ["Persist", "KillVm"]
    assert effects[-1] == KillVm("b", 35.0)
    assert (op.phase, op.vms[1].killed, op.failure) == ("stopping", True, "")
    op, effects = run(op, (30.2, VmShutDown("b", 30.2, "SIGKILL")))
    assert RunUpdate(("",)) in effects
    op, _ = run(op, (31.0, SUCCEEDED), (32.0, VmStarted("a", 32.0)), (33.0, VmStarted("b", 33.0)))
    assert (op.end, op.codes) == ("completed", ())
    assert op.vms[1].detail == (
        "killed, since it had not shut down after 30 s, up again 33.0 s after it was asked to shut down"
    )


def test_what_could_not_be_asked_is_not_killed() -> None:
    op, effects = run(
        operation(kill_after_timeout=True), (0.0, Start()), (1.0, VmNotShutDown("a", "it was not asked"))
    )
    assert kinds(effects) == ["ShutDownVms", "StartVms"]
    assert op.codes == ("shutdown_failed",)


def test_one_that_survives_its_kill_ends_the_operation() -> None:
    op, effects = run(
        operation(kill_after_timeout=True),
        (0.0, Start()),
        (30.0, VmNotShutDown("a", "it runs on", asked=True)),
        (35.0, VmNotShutDown("a", "it did not end after SIGKILL", asked=True)),
    )
    assert kinds(effects) == ["ShutDownVms", "KillVm", "StartVms"]
    assert "it did not end after SIGKILL" in op.failure


def test_a_kill_of_which_nothing_is_heard_does_not_hold_it_up() -> None:
    op, _ = run(
        operation(kill_after_timeout=True),
        (0.0, Start()),
        (30.0, VmNotShutDown("a", "it runs on", asked=True)),
    )
    op, effects = run(op, (36.9, TimePassed()))
    assert effects == []
    op, effects = run(op, (37.1, TimePassed()))
    assert kinds(effects) == ["StartVms"]


def test_after_an_abort_nothing_is_killed() -> None:
    _, effects = run(
        operation(kill_after_timeout=True),
        (0.0, Start()),
        (1.0, AbortReceived("aborted", "the operator says so")),
        (30.0, VmNotShutDown("a", "it runs on", asked=True)),
    )
    assert "KillVm" not in kinds(effects)


def test_a_driver_that_says_nothing_does_not_hold_it_up() -> None:
    op, _ = run(operation("a", "b"), (0.0, Start()), (1.0, VmShutDown("b", 1.0)))
    op, effects = run(op, (31.9, TimePassed()))
    assert effects == []
    op, effects = run(op, (32.1, TimePassed()))
    assert kinds(effects) == ["StartVms"]
    assert op.failure == "nothing was updated: not shut down within 30 s: a"


@pytest.mark.parametrize("when", ["before", "stopping", "updating", "starting"])
def test_an_abort_starts_what_was_shut_down(when: str) -> None:
    abort = AbortReceived("aborted", "the operator says so")
    if when == "before":
        op, effects = run(operation(), (0.0, abort), (0.0, Start()))
        assert (op.end, kinds(effects)) == ("cancelled", ["Finish"])
        return
    op, effects = run(operation(), (0.0, Start()))
    if when != "stopping":
        op, effects = run(op, (1.0, VmShutDown("a", 1.0)))
    if when == "starting":
        op, effects = run(op, (2.0, SUCCEEDED))
    op, effects = run(op, (3.0, abort))
    if when == "updating":
        assert effects == [StopUpdate(kill=False)]
        op, effects = run(op, (4.1, TimePassed()))
        assert kinds(effects) == ["StopUpdate", "StartVms"]
    else:
        assert kinds(effects) == ([] if when == "starting" else ["StartVms"])
    op, effects = run(op, (5.0, VmStarted("a", 5.0)))
    assert op.end == ("completed" if when == "starting" else "failed")


def test_an_update_that_does_not_end_is_ended_and_the_vms_start() -> None:
    op, _ = run(operation(), (0.0, Start()), (1.0, VmShutDown("a", 1.0)))
    op, effects = run(op, (21.5, TimePassed()))
    assert effects == [StopUpdate(kill=False)]
    op, effects = run(op, (22.6, TimePassed()))
    assert kinds(effects) == ["StopUpdate", "StartVms"]
    op, _ = run(op, (23.0, VmStarted("a", 23.0)))
    assert (op.end, op.codes, op.runs[0].outcome) == ("failed", ("update_timeout",), "timeout")


def test_a_vm_that_cannot_be_started_is_named() -> None:
    op, effects = run(
        operation("a", "b"),
        (0.0, Start()),
        (1.0, VmShutDown("a", 1.0)),
        (1.0, VmShutDown("b", 1.0)),
        (2.0, SUCCEEDED),
        (90.0, VmNotStarted("a", "no room for its memory")),
        (90.0, VmStarted("b", 3.0)),
    )
    assert (op.end, op.codes) == ("failed", ("start_failed",))
    assert op.failure == "VM a was not started again: no room for its memory"
    assert effects[-1] == Finish()


def test_the_guard_has_no_part_in_it() -> None:
    op, effects = run(operation(), (0.0, Start()), (0.5, GuardLost()))
    assert op.failure == ""
    assert not any(isinstance(each, Arm) for each in effects)
    with pytest.raises(UnexpectedEvent):
        decide(operation(), VmShutDown("a", 1.0), 1.0)


def test_the_outcome_after_a_crash_says_what_became_of_vms_and_update() -> None:
    op, _ = run(operation("a", "b"), (0.0, Start()), (1.0, VmShutDown("a", 1.0)))
    ended = recovered(op, None, {}, same_boot=True)
    assert (ended.end, ended.codes, ended.runs[0].outcome) == ("failed", ("updater_died",), "not_run")
    assert ended.failure.endswith("every VM that was shut down was started again, and the update did not run")
    op, _ = run(op, (2.0, VmShutDown("b", 2.0)))
    assert recovered(op, None, {}, same_boot=True).failure.endswith("the update may be half complete")
    ended = recovered(op, None, {}, same_boot=True, not_started={"b": "no room"})
    assert ended.failure == "host updater died during the operation; VM b was not started again: no room"
    assert ended.vms[1].error == "no room"
