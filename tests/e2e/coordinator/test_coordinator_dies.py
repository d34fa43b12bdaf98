"""The coordinator is killed in every state of a wave: it goes on where it was, or halts cleanly (I1, I6, I7, I12)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from caesura_testing.sandbox import Vm


@pytest.mark.parametrize("state", ["pending", "scheduled", "frozen", "verifying", "soaking"])
async def test_killed_in_each_state_of_a_wave(state: str, stages: Callable[..., Any]) -> None:
    stage = await stages(
        host_1=[Vm(name="web-1", set="web", update_domain=0)],
        host_2=[Vm(name="web-2", set="web", update_domain=1)],
    )
    stage.sandbox.update("patch", ["sleep", "1.5"], expected_s=1.5)
    stage.notice_s = 2.0
    rollout = await stage.roll(soak_s=4.0)
    async with stage.held_in(state, rollout):
        before = {event_id: list(facts) for event_id, facts in stage.fleet_view.events.items()}
        incarnation = (
            stage.fleet_view.documents["web"].incarnation if "web" in stage.fleet_view.documents else 0
        )
        await stage.sandbox.kill("coordinator")
    await stage.sandbox.start("coordinator")
    await stage.sandbox.until(
        lambda: stage.fleet_view.coordinator.online and stage.fleet_view.coordinator.epoch == 2, 15, "epoch 2"
    )
    ended = await stage.ended(rollout, timeout_s=60)
    assert ended.status == "completed", ended.reason
    stage.assert_order()
    assert [each.vm for each in stage.sandbox.watch.pauses] == ["web-1", "web-2"], (
        "each was paused exactly once"
    )
    assert set(before) <= set(stage.fleet_view.events), "an event's id never changes"
    await stage.sandbox.until(lambda: not stage.fleet_view.documents["web"].events, 5, "document empty")
    assert stage.fleet_view.documents["web"].incarnation > incarnation
    stage.assert_one_end_each()


async def test_a_second_coordinator_takes_over_and_the_first_stands_down(pair: Any) -> None:
    # The update lasts until the other one leads, however long that takes to start: the first would go on with host-2.
    go = pair.sandbox.folder / "go"
    pair.sandbox.update("patch", ["sh", "-c", f"until [ -e {go} ]; do sleep 0.1; done"], expected_s=3.0)
    pair.sandbox.coordinator("standby")
    rollout = await pair.roll()
    await pair.frozen("web-1")
    await pair.sandbox.start("standby")
    await pair.sandbox.until(
        lambda: (
            pair.fleet_view.coordinator.coordinator.startswith("standby")
            and pair.fleet_view.coordinator.online
        ),
        15,
        "the standby leads",
    )
    exit_code = await pair.sandbox.until_exit("coordinator", 10)
    assert exit_code == 3
    go.touch()
    await pair.ready("host-1", "host-2")
    await pair.none_frozen()
    assert [each.vm for each in pair.sandbox.watch.pauses] == ["web-1"], (
        "the old authority froze nothing more"
    )
    again = await pair.roll()
    assert again != rollout
    state = await pair.ended(again)
    assert state.status == "completed", state.reason
    pair.assert_order()


async def test_a_sleeping_coordinator_wakes_up_without_authority(pair: Any, stop_and_go: Any) -> None:
    stop, go = stop_and_go
    pair.notice_s = 6.0
    await pair.roll()
    await pair.sandbox.until(
        lambda: pair.fleet_view.documents["web"].events if "web" in pair.fleet_view.documents else False,
        5,
        "announced",
    )
    pair.sandbox.signal("coordinator", stop)
    pair.sandbox.coordinator("standby")
    await pair.sandbox.start("standby")
    await pair.sandbox.until(
        lambda: (
            pair.fleet_view.hosts["host-1"].coordinator.startswith("standby")
            and pair.fleet_view.hosts["host-2"].coordinator.startswith("standby")
        ),
        15,
        "both hosts follow the standby",
    )
    pair.sandbox.signal("coordinator", go)
    assert await pair.sandbox.until_exit("coordinator", 15) == 3
    assert not pair.sandbox.watch.pauses


async def test_one_store_has_one_user(pair: Any) -> None:
    module, environment = pair.sandbox.environments["coordinator"]
    pair.sandbox.environments["second"] = (module, environment)
    await pair.sandbox.start("second")
    assert await pair.sandbox.until_exit("second", 10) == 1
    assert "in use by another process" in pair.sandbox.events("second")[-1]["why"]
