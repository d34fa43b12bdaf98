"""How operations end whose host updater died, and what clocks and memory are judged to be."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest

from caesura.contract.messages import AgentClockSynced, CanaryReport
from caesura_host_updater.clocks.verdict import ClockCheck, judge, same_boot, shown_by_guest, unsynced
from caesura_host_updater.drivers.process.freezers import freezer_mounts, own_cgroups
from caesura_host_updater.operation.crash_outcome import recovered
from caesura_host_updater.operation.pause_deadlines import PauseDeadlines
from caesura_host_updater.operation.state import Operation, UpdateRun, VmPause
from caesura_vmcontrol.intent import GuardAction, Intent, Intervention

NOW = datetime(2026, 1, 1, tzinfo=UTC)


def operation(**vm: Any) -> Operation:
    """As the journal may have it: with or without what happened after `accepted`."""
    return Operation(
        operation="op",
        method="freeze",
        budget_s=10.0,
        update="patch",
        runs=(UpdateRun(started=True),),
        vms=(VmPause(vm="a", set="web", update_domain=0, **vm),),
    )


def record(intervention: Intervention | None, operation: str = "op") -> Intent:
    """The guard's, armed at 100."""
    fired = None if intervention is None else GuardAction("the host updater died", 101.0, {"a": intervention})
    return Intent(operation, "boot", 100.0, 109.0, (), fired)


def test_guard_resumed_and_the_freeze_call_was_written_down() -> None:
    op = recovered(
        operation(called_at=100.5, frozen_at=100.6),
        record(Intervention(True, None, 101.7, "running")),
        {},
        same_boot=True,
    )
    assert op.end == "failed"
    assert op.failure == (
        "host updater died while VMs were frozen; the pause guard resumed them after 1.2 s (the host updater died)"
    )
    assert op.vms[0].pause_s == pytest.approx(1.2)
    assert op.runs[0].outcome == "interrupted"


def test_guard_resumed_and_nothing_was_written_down() -> None:
    op = recovered(operation(), record(Intervention(True, None, 103.0, "running")), {}, same_boot=True)
    assert op.vms[0].pause_s == pytest.approx(3.0)  # from the arming: at most this long
    assert op.vms[0].frozen_at is not None


def test_updater_had_resumed_but_not_written_it_down() -> None:
    op = recovered(
        operation(called_at=100.5, frozen_at=100.6),
        record(Intervention(False, None, 101.0, "running")),
        {},
        same_boot=True,
    )
    assert op.vms[0].resumed_by == "updater"
    assert op.vms[0].pause_s == pytest.approx(0.5)
    assert "paused for 0.5 s at most" in op.failure


def test_vm_died_while_frozen() -> None:
    op = recovered(
        operation(called_at=100.5, frozen_at=100.6),
        record(Intervention(True, None, 101.0, "gone")),
        {},
        same_boot=True,
    )
    assert (op.vms[0].end, op.vms[0].resumed_by) == ("gone", "nobody")
    assert op.vms[0].error


def test_no_guard_but_found_frozen() -> None:
    op = recovered(operation(called_at=100.5, frozen_at=100.6), None, {"a": 104.0}, same_boot=True)
    assert op.vms[0].resumed_by == "updater"
    assert op.vms[0].pause_s == pytest.approx(3.5)


def test_nothing_was_frozen() -> None:
    for held in (
        None,
        record(None),
        record(Intervention(False, None, 101.0, "running")),
        record(None, "other"),
    ):
        op = recovered(operation(), held, {}, same_boot=True)
        assert op.failure == "host updater died before anything was frozen"
        assert op.vms[0].frozen_at is None


def test_after_a_reboot_instants_mean_nothing() -> None:
    op = recovered(
        operation(called_at=9000.0, frozen_at=9000.1),
        record(Intervention(True, None, 5.0, "running")),
        {},
        same_boot=False,
    )
    assert (op.failure, op.codes) == ("the host was restarted during the operation", ("host_rebooted",))
    assert op.vms[0].pause_s == 0.0


def test_late_freeze_is_not_counted_from_the_call() -> None:
    op = operation(called_at=100.5)
    op = recovered(op, record(Intervention(True, 150.0, 150.2, "running")), {}, same_boot=True)
    assert op.vms[0].pause_s == pytest.approx(0.2)
    assert PauseDeadlines.of(100.0, 10.0).guard_at < 150.0


WAIT = ClockCheck("a", "web", 0, "op", 0.05, "boot-1")


def told(**changes: Any) -> AgentClockSynced:
    """What a good agent says."""
    facts: dict[str, Any] = {
        "vm": "a",
        "boot_id": "boot-1",
        "trigger": "resume",
        "operation": "op",
        "synced": True,
        "error_before_s": -2.0,
        "error_after_s": 0.01,
        "uncertainty_s": 0.001,
    }
    return AgentClockSynced(**(facts | changes))


@pytest.mark.parametrize(
    ("changes", "synced", "why"),
    [
        ({}, True, ""),
        ({"error_after_s": -0.0489}, True, ""),
        ({"error_after_s": -0.0495}, False, "0.0505 s off"),
        ({"uncertainty_s": 0.2}, False, "0.2100 s off"),
        ({"uncertainty_s": None}, True, ""),
        ({"error_after_s": None}, False, "measured no error"),
        ({"synced": False, "reason": "no permission"}, False, "no permission"),
    ],
)
def test_clock_verdict(changes: dict[str, Any], synced: bool, why: str) -> None:
    verdict = judge("host-1", WAIT, told(**changes), NOW)
    assert verdict.synced is synced
    assert why in verdict.reason
    assert bool(verdict.reason) is not synced


def test_a_boot_id_shows_that_a_guest_did_not_reboot_and_no_more() -> None:
    assert same_boot("x", "x").held == ("not_rebooted",)
    assert same_boot("x", "y").broken == ("not_rebooted",)
    assert (same_boot("", "y").held, same_boot("", "y").ok) == ((), True)
    assert unsynced("host-1", WAIT, "silent", NOW).memory is None


@pytest.mark.parametrize(
    ("canary", "held", "broken", "words"),
    [
        (None, ("not_rebooted",), (), "not rebooted"),
        (CanaryReport(pages=0), ("not_rebooted",), (), "not rebooted"),
        (CanaryReport(pages=8, writes=50), ("canary_equal", "not_rebooted"), (), "canary equal: 8 pages"),
        (
            CanaryReport(pages=8, bad_pages=2, writes=50, detail="page 3 is stale"),
            ("not_rebooted",),
            ("canary_equal",),
            "canary differs: 2 of 8 pages of 4096 bytes: page 3 is stale",
        ),
        (
            CanaryReport(pages=8, writes=39),
            ("not_rebooted",),
            ("canary_equal",),
            "all memory is an older copy",
        ),
    ],
)
def test_what_the_guest_shows_of_its_memory(
    canary: CanaryReport | None, held: tuple[str, ...], broken: tuple[str, ...], words: str
) -> None:
    wait = ClockCheck("web-1", "web", 0, "op", 0.1, boot_id="b", canary_writes=40)
    found = shown_by_guest(wait, told(boot_id="b", canary=canary))
    assert (found.held, found.broken, found.ok) == (held, broken, not broken)
    assert words in found.detail


MOUNTS = """\
31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755
36 31 0:33 / /sys/fs/cgroup/devices rw,relatime - cgroup cgroup rw,devices
37 31 0:34 / /sys/fs/cgroup/freezer rw,relatime shared:9 - cgroup cgroup rw,freezer
41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw
"""


def test_freezers_are_found_where_they_are_mounted() -> None:
    found = freezer_mounts(MOUNTS)
    assert {kind: str(path) for kind, path in found.items()} == {
        "cgroup1": "/sys/fs/cgroup/freezer",
        "cgroup2": "/sys/fs/cgroup/unified",
    }
    assert freezer_mounts("nonsense\n") == {}
    own = own_cgroups("6:freezer:/jail\n5:devices:/\n0::/system.slice/x.service\n")
    assert own == {"cgroup1": "/jail", "cgroup2": "/system.slice/x.service"}
