"""Verdicts on guest clocks: with the bound of their own pause, and ended by the agent's own checks."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Literal

import pytest

from caesura.contract import messages as m
from caesura.contract.envelope import Message
from caesura.contract.parts import WholeRollout
from caesura_metrics_exporter.metrics.current_state import FleetMetricsView
from caesura_metrics_exporter.metrics.fleet_families import fleet_families
from caesura_testing.rollouts import whole_rollout

AT = datetime(2026, 4, 20, 22, 26, 58, tzinfo=UTC)
WEB = ("web", "1")


def samples(fleet: FleetMetricsView, name: str) -> dict[tuple[str, ...], float]:
    """Label values to value of one metric."""
    (family,) = [each for each in fleet_families(fleet, 0.0) if each.name == name]
    return dict(family.values)


def fold(*messages: Message, fleet: FleetMetricsView | None = None) -> FleetMetricsView:
    """A fleet of two VMs that heard these messages."""
    if fleet is None:
        fleet = FleetMetricsView()
        vms = tuple(
            m.VmRecord(vm=vm, set="web", update_domain=1, state="running") for vm in ("web-1", "web-2")
        )
        fleet.take(m.HostInventory(host="host-1", driver="process", epoch=1, vms=vms), 0.0, fresh=True)
    for message in messages:
        fleet.take(message, 0.0, fresh=True)
    return fleet


def rollout(name: str, bound_s: float, minute: int = 0, status: m.RolloutStatus = "running") -> WholeRollout:
    return whole_rollout(
        rollout=name,
        update="kernel",
        status=status,
        policy=m.Policy(clock_bound_s=bound_s),
        sets=("web",),
        waves=(),
        created_at=AT + timedelta(minutes=minute),
    )


def verdict(after_s: float | None, *, vm: str = "web-1", synced: bool = True) -> m.VmClockSynced:
    return m.VmClockSynced(
        vm=vm,
        host="host-1",
        set="web",
        update_domain=1,
        synced=synced,
        by="agent",
        error_before_s=-9.0,
        error_after_s=after_s,
        at=AT,
    )


def check(
    *,
    synced: bool,
    after_s: float = 0.001,
    exchanges: int = 8,
    trigger: Literal["start", "resume", "periodic"] = "periodic",
) -> m.AgentClockSynced:
    return m.AgentClockSynced(
        vm="web-1",
        boot_id="b",
        trigger=trigger,
        synced=synced,
        error_before_s=-9.0,
        error_after_s=after_s,
        exchanges=exchanges,
    )


def after(fleet: FleetMetricsView) -> tuple[float, float | None]:
    """The last error after a sync, and its bound."""
    error_s = samples(fleet, "caesura_clock_error_last_seconds")[*WEB, "after"]
    return error_s, samples(fleet, "caesura_clock_bound_last_seconds").get(WEB)


def test_an_error_is_held_against_the_bound_of_its_own_pause() -> None:
    fleet = fold(rollout("r1", 1.0), verdict(0.5))
    assert after(fleet) == (0.5, 1.0)
    fold(rollout("r1", 1.0, status="completed"), rollout("r2", 0.01, minute=5), fleet=fleet)
    assert after(fleet) == (0.5, 1.0), "a tighter rollout that paused nothing yet"
    fold(verdict(0.005), fleet=fleet)
    assert after(fleet) == (0.005, 0.01)


def test_the_bound_is_that_of_the_vm_that_is_off_most() -> None:
    fleet = fold(rollout("r1", 1.0), verdict(-0.5), rollout("r2", 0.01, minute=5), verdict(0.005, vm="web-2"))
    assert after(fleet) == (-0.5, 1.0)


def test_without_a_rollout_there_is_no_bound() -> None:
    assert after(fold(verdict(0.5))) == (0.5, None)


def test_the_agents_own_check_ends_what_a_pause_left_behind() -> None:
    fleet = fold(rollout("r1", 0.1), verdict(3.0, synced=False))
    assert samples(fleet, "caesura_vms_unsynced") == {WEB: 1}
    fold(check(synced=False, after_s=2.0), fleet=fleet)
    assert samples(fleet, "caesura_vms_unsynced") == {WEB: 1}
    assert after(fleet) == (2.0, 0.1)
    fold(check(synced=True), fleet=fleet)
    assert samples(fleet, "caesura_vms_unsynced") == {WEB: 0}
    assert after(fleet) == (0.001, 0.1)


def test_a_clock_that_was_off_but_synced_is_put_right_by_the_agent_too() -> None:
    fleet = fold(rollout("r1", 0.01), verdict(0.05))
    fold(check(synced=True, after_s=0.002), fleet=fleet)
    assert after(fleet) == (0.002, 0.01)


def test_a_good_verdict_stands_as_it_was_at_the_sync() -> None:
    fleet = fold(rollout("r1", 0.1), verdict(0.001))
    fold(check(synced=False, after_s=5.0), check(synced=True, after_s=0.02), fleet=fleet)
    assert samples(fleet, "caesura_vms_unsynced") == {WEB: 0}
    assert after(fleet) == (0.001, 0.1)


def test_after_a_restart_of_the_exporter_the_agents_check_says_what_is_wrong_still() -> None:
    fleet = fold(check(synced=False, after_s=2.0))
    assert samples(fleet, "caesura_vms_unsynced") == {WEB: 1}
    fold(check(synced=True), fleet=fleet)
    assert samples(fleet, "caesura_vms_unsynced") == {WEB: 0}


@pytest.mark.parametrize(
    "said",
    [check(synced=False, exchanges=0), check(synced=False, trigger="resume")],
    ids=["unheard", "resume"],
)
def test_a_check_that_measured_nothing_or_that_the_host_judges_says_nothing(said: m.AgentClockSynced) -> None:
    assert samples(fold(said), "caesura_vms_unsynced") == {WEB: 0}
