"""The host updater dies, hangs or is stopped while VMs are frozen: they run again inside the budget (I2)."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from typing import Any

import pytest

from caesura_testing.sandbox import Vm

_SLOW = ["sleep", "60"]


@pytest.fixture
async def one(stages: Callable[..., Any]) -> Any:
    """One host with two VMs whose update never comes to an end by itself."""
    stage = await stages(host_1=[Vm(name="web-1", set="web"), Vm(name="web-2", set="web")], up=False)
    stage.sandbox.update("slow", _SLOW, expected_s=2.0, timeout_s=30.0)
    await stage.up("host-1")
    return stage


@pytest.mark.parametrize("freezer", ["cgroup2", "cgroup1", "sigstop"])
async def test_killed_updater_is_outlived_by_its_guard(freezer: str, stages: Callable[..., Any]) -> None:
    stage = await stages(
        freezer=freezer, host_1=[Vm(name="web-1", set="web"), Vm(name="web-2", set="web")], up=False
    )
    stage.sandbox.update("slow", _SLOW, expected_s=2.0, timeout_s=30.0)
    await stage.up("host-1")
    rollout = await stage.roll("slow")
    await stage.frozen("web-1", "web-2")
    await stage.sandbox.kill("host-1")
    await stage.none_frozen(timeout_s=3.0)
    assert stage.sandbox.watch.longest_s() < 8.0
    await stage.sandbox.start("host-1")
    state = await stage.ended(rollout)
    assert state.status == "halted"
    assert "guard" in state.reason
    assert not stage.sandbox.watch.frozen()
    assert len(stage.sandbox.watch.pauses) == 2, "nothing was frozen again"
    pauses = [each for each in stage.fleet_view.pauses.values() if each.resumed_by == "guard"]
    assert {each.vm for each in pauses} == {"web-1", "web-2"}


async def test_updater_and_guard_killed_together_and_restarted(one: Any) -> None:
    rollout = await one.roll("slow")
    await one.frozen("web-1", "web-2")
    guard = one.sandbox.guard_pid("host-1")
    one.sandbox.signal("host-1", signal.SIGSTOP)  # neither may act on the other's death
    os.kill(guard, signal.SIGKILL)
    await one.sandbox.kill("host-1")
    assert one.sandbox.watch.frozen() == {"web-1", "web-2"}, "nobody is left to resume them"
    await one.sandbox.start("host-1")
    await one.none_frozen()
    state = await one.ended(rollout)
    assert state.status == "halted"
    assert "host-1 failed" in state.reason


async def test_updater_stopped_past_the_budget_freezes_nothing_when_it_wakes(one: Any) -> None:
    rollout = await one.roll("slow", budget_s=4.0)
    await one.frozen("web-1", "web-2")
    one.sandbox.signal("host-1", signal.SIGSTOP)
    await one.none_frozen(timeout_s=5.0)
    assert one.sandbox.watch.longest_s() <= 4.0, "the guard resumed them inside the budget"
    before = len(one.sandbox.watch.pauses)
    one.sandbox.signal("host-1", signal.SIGCONT)
    state = await one.ended(rollout)
    assert state.status == "halted"
    assert "guard" in state.reason
    assert len(one.sandbox.watch.pauses) == before == 2, "it froze something again"
    assert not one.sandbox.watch.frozen()
    assert [each.status for each in await one.reports(rollout)] == ["failed"]


async def test_guard_killed_during_a_pause_ends_the_pause(one: Any) -> None:
    rollout = await one.roll("slow")
    await one.frozen("web-1", "web-2")
    os.kill(one.sandbox.guard_pid("host-1"), signal.SIGKILL)
    await one.none_frozen(timeout_s=2.0)
    state = await one.ended(rollout)
    assert state.status == "halted"
    assert "guard" in state.reason
    await one.sandbox.until(lambda: one.fleet_view.hosts["host-1"].guard == "ready", 10, "a new guard")
