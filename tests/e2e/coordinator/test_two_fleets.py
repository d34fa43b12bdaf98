"""Two fleets on one broker, by mistake: the second coordinator and the host of the other fleet are refused by name, and nothing of theirs is paused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from caesura.contract import messages as m
from caesura.runtime.identity import new_id
from caesura_testing.sandbox import Vm


async def test_the_second_fleet_is_refused_by_name_and_nothing_of_it_is_paused(
    stages: Callable[..., Any],
) -> None:
    stage = await stages(up=False, host_1=[Vm(name="web-1", set="web", update_domain=0)])
    sandbox = stage.sandbox
    sandbox.host("host-2", Vm(name="db-1", set="db", update_domain=0), fleet="other")
    sandbox.coordinator("second", fleet="other")
    await stage.up("host-1", "host-2")

    await sandbox.start("second")
    assert await sandbox.until_exit("second", 30) == 2
    why = sandbox.events("second")[-1]["why"]
    assert "leads fleet 'default' on this broker" in why, why
    assert "give each fleet a broker" in why

    answer = await stage.session.ask(
        m.RolloutRequested(request=new_id(), update="patch", policy=stage.policy())
    )
    assert not answer.accepted
    assert answer.codes == ("host_of_another_fleet",)
    assert "host-2" in answer.reason
    assert "'other'" in answer.reason

    # The first fleet is not held up by the other, and touches nothing of it.
    rollout = await stage.roll(selection=m.Selection(hosts=("host-1",)))
    ended = await stage.ended(rollout, timeout_s=60)
    assert ended.status == "completed", ended.reason
    assert [each.vm for each in sandbox.watch.pauses] == ["web-1"]
    assert stage.fleet_view.coordinator.epoch == 1
