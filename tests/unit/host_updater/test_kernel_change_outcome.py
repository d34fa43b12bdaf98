"""What is said of an operation whose pause went over a change of the host's kernel."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import UTC, datetime

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from caesura_host_updater.operation.crash_outcome import recovered
from caesura_host_updater.operation.kernel_change_outcome import arrived, figure_of, rehearsal_figure
from caesura_host_updater.operation.pause_deadlines import PauseDeadlines
from caesura_host_updater.operation.state import Operation, UpdateRun, VmPause
from caesura_vmcontrol.intent import GuardAction, Intent, Intervention, UnreadableIntent
from caesura_vmcontrol.kernel_change import (
    Arrival,
    By,
    ClockPair,
    HostClock,
    KernelChange,
    Left,
    UnreadableChange,
    VmArrival,
    from_json,
    to_json,
)

OLD, NEW = "6.1.0-8-amd64", "6.1.0-9-amd64"
NOW = datetime(2026, 1, 1, tzinfo=UTC)
WALL = 1_800_000_000.0
"""CLOCK_REALTIME at 100 s of the former boot, which is when the first VM is asked to stop."""


def operation(*names: str) -> Operation:
    """As the journal has it when the guard leaves: at 101 s of the former boot."""
    return Operation(
        operation="op",
        method="kexec",
        budget_s=30.0,
        update="kernel",
        kernel_release=NEW,
        phase="leaving",
        deadlines=PauseDeadlines.of(100.0, 30.0),
        runs=(UpdateRun(started=True, outcome="succeeded", exit_code=0),),
        vms=tuple(
            VmPause(vm=name, set="web", update_domain=0, called_at=100.0, frozen_at=100.5) for name in names
        ),
    )


def change(
    *running: str, by: By = "initramfs", release: str = NEW, lost: str = "", doubts: tuple[str, ...] = ()
) -> KernelChange:
    """Every one of ``running`` goes on 15 s after it was asked to stop."""
    vms = {name: VmArrival("running", WALL + 15.0, 400, 7) for name in running}
    if lost:
        vms[lost] = VmArrival("lost", why="its RAM file is gone")
    arrival = Arrival(
        "boot-2", release, by, HostClock("tsc", 0.3, 0.001), WALL + 14.0, vms, list(doubts), {"kernel": 9.0}
    )
    return KernelChange(
        NEW, "/carve-out", left=Left(ClockPair(5, WALL + 1.0, 2e6, True), 101.0, OLD), arrival=arrival
    )


def end_of(op: Operation, found: KernelChange | None) -> Operation:
    """Seen by a host updater that comes up 60 s after the first stop, at 40 s of the new boot."""
    return arrived(op, found, wall_s=WALL + 60.0, now=40.0)


def test_all_vms_go_on_and_the_pause_is_measured_over_the_boot() -> None:
    op = end_of(operation("a", "b"), change("a", "b"))
    assert (op.end, op.failure, op.phase) == ("completed", "", "ended")
    for vm in op.vms:
        assert vm.end == "running"
        assert vm.pause_s == pytest.approx(15.0)
        assert vm.resumed_at == pytest.approx(-5.0), "5 s before this boot's clock began"
        assert NEW in vm.detail
        assert "initramfs" in vm.detail
    figure = figure_of(op, change("a", "b"), NOW)
    assert figure is not None
    assert (figure.to, figure.former, figure.rehearsal) == (NEW, OLD, False)
    assert figure.seconds == pytest.approx(15.0)


def test_a_clock_that_was_set_back_measures_nothing() -> None:
    """A figure of no seconds would fit every budget."""
    found = change("a")
    assert found.arrival is not None
    found.arrival.vms["a"].running_at = WALL - 3600.0
    assert figure_of(end_of(operation("a"), found), found, NOW) is None


@given(st.floats(1.0, 1e7), st.floats(1.0, 1e7), st.floats(0.0, 300.0))
def test_the_pause_is_the_same_on_every_clock(before: float, now: float, pause_s: float) -> None:
    op = operation("a")
    vm = msgspec.structs.replace(op.vms[0], called_at=before, frozen_at=before)
    found = change("a")
    assert found.arrival is not None
    found.arrival.vms["a"].running_at = WALL + pause_s
    found = replace(found, left=Left(ClockPair(5, WALL + 1.0, 2e6), before + 1.0, OLD))
    op = arrived(msgspec.structs.replace(op, vms=(vm,)), found, wall_s=WALL + 500.0, now=now)
    assert op.vms[0].pause_s == pytest.approx(pause_s, abs=1e-3)


def test_the_old_kernel_that_came_back_is_a_failure_with_every_vm_running() -> None:
    op = end_of(operation("a"), change("a", release=OLD, by="crash-kernel"))
    assert (op.end, op.codes) == ("failed", ("kernel_unexpected",))
    assert f"kernel {OLD} runs, not {NEW}" in op.failure
    assert "crash kernel" in op.failure
    assert figure_of(op, change("a", release=OLD, by="crash-kernel"), NOW) is None
    assert op.vms[0].end == "running"


def test_a_lost_vm_is_named_and_the_others_run() -> None:
    op = end_of(operation("a", "b"), change("a", lost="b"))
    assert (op.end, op.codes) == ("failed", ("memory_lost",))
    assert op.failure == "VM b: its RAM file is gone"
    assert [vm.end for vm in op.vms] == ["running", "gone"]
    assert figure_of(op, change("a", lost="b"), NOW) is None


def test_a_doubt_loads_nothing_and_names_every_vm() -> None:
    op = end_of(operation("a", "b"), change(doubts=("a kernel without the carve-out ran in between",)))
    assert (op.end, op.codes) == ("failed", ("memory_lost",))
    assert op.failure == "a kernel without the carve-out ran in between; memory lost of VM a, b"
    assert [vm.end for vm in op.vms] == ["gone", "gone"]


@pytest.mark.parametrize("found", [None, replace(change("a"), arrival=None)])
def test_a_host_that_comes_back_without_a_record_never_says_completed(found: KernelChange | None) -> None:
    op = end_of(operation("a"), found)
    assert (op.end, op.codes) == ("failed", ("memory_lost",))
    assert "memory lost of VM a" in op.failure


def test_a_host_that_was_reset_before_it_left_and_resumed_its_vms() -> None:
    op = end_of(operation("a"), replace(change("a"), left=None))
    assert (op.end, op.codes) == ("failed", ("host_rebooted",))
    assert op.vms[0].end == "running"
    assert op.vms[0].frozen_at is None, "nothing of the former boot's clock is known"


def test_an_intent_over_boots_survives_the_disk() -> None:
    intent = Intent("op", "boot-1", 1.0, 2.0, (), kernel_change=change("a", lost="b"))
    text = json.loads(json.dumps(intent.to_json()))
    assert text["format"] == 2
    assert Intent.from_json(text) == intent
    assert Intent("op", "boot-1", 1.0, 2.0, ()).to_json()["format"] == 1, "older guards read it"


@pytest.mark.parametrize(
    ("name", "value"),
    [("left", {}), ("arrival", {"by": "magic"}), ("watchdog_s", None), ("expected_release", ...)],
)
def test_a_change_that_is_not_ours_is_refused(name: str, value: object) -> None:
    data = to_json(change("a"))
    if value is ...:
        del data[name]
    elif name == "arrival":
        data[name] |= value
    else:
        data[name] = value
    with pytest.raises(UnreadableChange):
        from_json(data)
    with pytest.raises(UnreadableIntent):
        Intent.from_json({**Intent("op", "b", 1.0, 2.0, ()).to_json(), "format": 2, "kernel_change": data})


def test_a_rehearsal_is_a_measurement() -> None:
    def intent(found: KernelChange) -> Intent:
        return Intent("op", "boot-1", 1.0, 2.0, (), kernel_change=found)

    figure = rehearsal_figure(intent(replace(change("rehearsal"), rehearsal=True)), NOW)
    assert figure is not None
    assert (figure.to, figure.rehearsal) == (NEW, True)
    assert figure.seconds == pytest.approx(14.0), "from the instant at which the kernel was left"
    assert figure is not None
    assert figure.early
    by_unit = rehearsal_figure(intent(replace(change("rehearsal", by="unit"), rehearsal=True)), NOW)
    assert by_unit is not None
    assert not by_unit.early
    assert rehearsal_figure(intent(change("a")), NOW) is None, "no rehearsal"
    assert rehearsal_figure(intent(replace(change(), rehearsal=True)), NOW) is None, "nothing came up"
    assert rehearsal_figure(intent(replace(change("x", release=OLD), rehearsal=True)), NOW) is None


def test_an_updater_that_was_killed_while_the_guard_was_to_leave() -> None:
    """The guard did not, resumed the VMs in this very boot, and says so: nothing is called lost, nothing completed."""
    op = operation("a")
    fired = GuardAction(
        "the host updater died", 101.2, {"a": Intervention(True, None, 102.0, "running", "new:5:6")}
    )
    record = Intent("op", "boot-1", 99.0, 130.0, (), fired, KernelChange(NEW, "/carve-out"))
    end = recovered(op, record, {}, same_boot=True)
    (vm,) = end.vms
    assert (end.end, end.codes) == ("failed", ("updater_died",))
    assert (vm.end, vm.resumed_by) == ("running", "guard")
    assert vm.pause_s == pytest.approx(2.0)
