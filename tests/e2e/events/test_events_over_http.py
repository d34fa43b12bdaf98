"""What a workload sees over HTTP of the events of one set on two hosts."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from email.utils import parsedate_to_datetime
from typing import Any

import aiohttp
import msgspec

from caesura.bus.local_broker import free_port
from caesura.contract import messages as m
from caesura_ctl.session import new_request_id
from caesura_testing.patience import patient
from caesura_testing.sandbox import Vm


class Workload:
    """A client that polls, as they do."""

    def __init__(self, client: aiohttp.ClientSession, url: str, stage: Any) -> None:
        self._client = client
        self._url = url
        self._stage = stage
        self.seen: dict[int, list[dict[str, Any]]] = {}
        """Incarnation to the events that were seen at it."""

    async def events(self) -> list[dict[str, Any]]:
        async with self._client.get(self._url) as answer:
            assert answer.status == 200, await answer.text()
            found: dict[str, Any] = await answer.json()
        incarnation, events = found["DocumentIncarnation"], found["Events"]
        assert incarnation >= max(self.seen, default=0), "never back (I6)"
        assert self.seen.setdefault(incarnation, events) == events, "same incarnation, same events"
        return events  # type: ignore[no-any-return]

    async def until(
        self, what: str, holds: Callable[[list[dict[str, Any]]], bool], timeout_s: float = 20.0
    ) -> list[dict[str, Any]]:
        end = asyncio.get_running_loop().time() + patient(timeout_s)
        while not holds(events := await self.events()):
            assert asyncio.get_running_loop().time() < end, (
                f"not {what}: {events}\n{self._stage.sandbox.logs()}"
            )
            await asyncio.sleep(0.02)
        return events

    async def approve(self, *events: dict[str, Any]) -> None:
        body = {"StartRequests": [{"EventId": each["EventId"]} for each in events]}
        async with self._client.post(self._url, json=body) as answer:
            assert answer.status == 200, await answer.text()


async def workload_of(stage: Any, client: aiohttp.ClientSession, vm: str, *hosts: str) -> Workload:
    """A workload in this VM, with a publisher; everything is up then."""
    port = free_port()
    stage.sandbox.publisher({vm: f"127.0.0.1:{port}"})
    await stage.sandbox.start("metadata")
    await stage.up(*hosts)
    url = f"http://127.0.0.1:{port}/metadata/scheduledevents?api-version=2020-07-01"
    return Workload(client, url, stage)


async def test_a_wave_over_two_hosts_is_two_events_and_waits_for_both(stages: Callable[..., Any]) -> None:
    stage = await stages(
        host_1=[Vm(name="web-1", set="web"), Vm(name="web-3", set="web")],
        host_2=[Vm(name="web-2", set="web")],
        up=False,
    )
    folder = stage.sandbox.folder
    # The host that comes first is done at once; the other one's update lasts until the test has seen that.
    one_waits = f"mkdir {folder}/first 2>/dev/null || until [ -e {folder}/go ]; do sleep 0.1; done"
    stage.sandbox.update("patch", ["sh", "-c", one_waits])
    async with aiohttp.ClientSession(headers={"Metadata": "true"}) as client:
        workload = await workload_of(stage, client, "web-1", "host-1", "host-2")
        assert await workload.events() == []
        rollout = await stage.roll(notice_s=600.0, budget_s=30.0)
        announced = await workload.until("announced", bool)
        assert [each["Resources"] for each in announced] == [["web-1", "web-3"], ["web-2"]]
        assert {each["EventStatus"] for each in announced} == {"Scheduled"}
        assert len({each["EventId"] for each in announced}) == 2
        await workload.approve(announced[0])
        await stage.sandbox.until(
            lambda: (state := stage.rollout(rollout)) is not None and state.waves[0].approved_count == 1,
            20,
            "one of two approved",
        )
        state = stage.rollout(rollout)
        assert (state.waves[0].event_count, state.waves[0].approved, state.waves[0].status) == (
            2,
            (),
            "scheduled",
        )
        assert not stage.sandbox.watch.pauses, "the wave waits for both"
        await workload.approve(announced[1])
        left = await workload.until("one event less", lambda events: len(events) == 1, 40)
        assert [each["EventStatus"] for each in left] == ["Started"]
        state = stage.rollout(rollout)
        assert state.waves[0].status == "started", "the wave waits for the other host"
        (folder / "go").touch()
        await workload.until("gone", lambda events: not events, 40)
    state = await stage.ended(rollout)
    assert state.status == "completed", state.reason
    assert {each.vm for each in stage.sandbox.watch.pauses} == {"web-1", "web-2", "web-3"}
    both_started = [
        events
        for events in workload.seen.values()
        if len(events) == 2 and events[0]["EventStatus"] == "Started"
    ]
    assert all({each["EventStatus"] for each in events} == {"Started"} for events in both_started)
    stage.assert_one_end_each()


async def test_a_queued_freeze_is_seen_at_once_and_starts_after_the_first_though_the_coordinator_is_killed(
    stages: Callable[..., Any],
) -> None:
    stage = await stages(
        host_1=[Vm(name="web-1", set="web", update_domain=0)],
        host_2=[Vm(name="web-2", set="web", update_domain=1)],
        up=False,
    )
    async with aiohttp.ClientSession(headers={"Metadata": "true"}) as client:
        workload = await workload_of(stage, client, "web-1", "host-1", "host-2")
        first = await stage.roll(notice_s=600.0)
        (announced,) = await workload.until("the first", lambda events: len(events) == 1)
        freeze = m.FreezeRequested(
            request=new_request_id(),
            selection=m.Selection(sets=("web",)),
            hold_s=0.5,
            policy=stage.policy(notice_s=3.0),
        )
        refused = await stage.session.ask(freeze)
        assert (refused.accepted, refused.codes) == (False, ("set_held",))
        answer = await stage.session.ask(
            msgspec.structs.replace(freeze, request=new_request_id(), queue=True)
        )
        assert answer.accepted, answer.reason
        assert (answer.queued_behind, answer.codes) == (first, ("queued",))
        both = await workload.until("both", lambda events: len(events) == 2)
        assert both[0] == announced
        assert both[1]["EventStatus"] == "Scheduled"
        assert both[1]["Resources"] == ["web-1"]
        first_at, queued_at = (parsedate_to_datetime(each["NotBefore"]) for each in both)
        assert queued_at > first_at
        assert answer.not_before == queued_at
        await workload.approve(both[1])
        await stage.sandbox.kill("coordinator")
        await stage.sandbox.start("coordinator")
        await stage.sandbox.until(
            lambda: stage.fleet_view.coordinator.online and stage.fleet_view.coordinator.epoch == 2,
            20,
            "epoch 2",
        )
        assert (await workload.events())[0]["EventId"] == announced["EventId"]
        assert not stage.sandbox.watch.pauses, "approved, but it is not its turn"
        # Both waves of the first one are approved as they come; those of the queued one pass their notice.
        while stage.rollout(first).status == "running":
            await workload.approve(*await workload.events())
            await asyncio.sleep(0.05)
        assert (await stage.ended(first)).status == "completed"
    ended = await stage.ended(answer.rollout, timeout_s=90)
    assert ended.status == "completed", ended.reason
    assert [each.vm for each in stage.sandbox.watch.pauses] == ["web-1", "web-2", "web-1", "web-2"]
    of_rollout = [
        {each.vm for each in stage.fleet_view.pauses_of(rollout)} for rollout in (first, answer.rollout)
    ]
    assert of_rollout == [{"web-1", "web-2"}] * 2
    stage.assert_order()
    stage.assert_one_end_each()
    seen = [
        each for events in workload.seen.values() for each in events if each["EventId"] == both[1]["EventId"]
    ]
    shown = [parsedate_to_datetime(each["NotBefore"]) for each in seen if each["NotBefore"]]
    assert shown == sorted(shown), "never earlier"
