"""The coordinator on a bus in memory: who leads, what is published again, what a full disk or a bad message does."""

from __future__ import annotations

import asyncio
import re
import sqlite3
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from structlog.testing import capture_logs

from caesura.bus.memory import MemoryBroker, MemoryBus
from caesura.bus.messaging import MessageClient
from caesura.contract import messages as m
from caesura.contract.codec import Received, decode, encode, size_bytes
from caesura.contract.envelope import Message
from caesura.contract.parts import inventory_in_parts
from caesura.contract.reasons import Reason
from caesura.contract.topics import channel_of
from caesura.delivery.sqlite_outbox import OutboxTable
from caesura.runtime.errors import CaesuraError, StoreError
from caesura.runtime.lock import InUse, StateFolderUnusable, exclusive_lock
from caesura_coordinator import requests
from caesura_coordinator.forget_epoch import forget_epoch
from caesura_coordinator.leadership import LeadershipLost, NoEpochLeft, WrongFleet, presence
from caesura_coordinator.queued_waves import MOST_QUEUED
from caesura_coordinator.repository import RolloutRepository
from caesura_coordinator.responses import with_plan
from caesura_coordinator.retention import Removal
from caesura_coordinator.service import Coordinator, subscriptions
from caesura_coordinator.store import CoordinatorStore
from caesura_coordinator.wave_gates import fence_blockers, health_blockers
from caesura_testing.collector import PATIENCE_S, eventually
from caesura_testing.rollouts import wave_state

T0 = datetime(2026, 4, 20, 12, 0, 0, tzinfo=UTC)


class World:
    """A broker, what was ever published on it by type, and a client that may say anything."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.broker = MemoryBroker()
        self.bus = MemoryBus(self.broker, client_id="world", filters=["#"])
        self.post = MessageClient(self.bus, "/caesura/world")
        self.heard: list[Message] = []
        for kind in (
            m.SetDocument,
            m.RequestAnswered,
            m.CoordinatorPresence,
            m.RolloutState,
            m.StartOperation,
            m.EventChanged,
        ):
            self.post.subscribe(kind, self._hear)

    async def _hear(self, message: Message, _: Received) -> None:
        self.heard.append(message)

    def of(self, kind: type[Message]) -> list[Any]:
        return [each for each in self.heard if isinstance(each, kind)]

    def retained(self, kind: type[Message], **parameters: str) -> Any:
        topic = channel_of(kind).topic(**parameters)
        payload = self.broker.retained.get(topic)
        return decode(topic, payload).message if payload else None

    @asynccontextmanager
    async def coordinator(
        self, name: str = "c", settle_s: float = 0.05, announce_s: float = 20.0, fleet: str = "default"
    ) -> AsyncIterator[Coordinator]:
        """One that runs for the block, and is killed at its end: no drain."""
        store = CoordinatorStore(str(self.folder / f"{name}.sqlite"))
        bus = MemoryBus(self.broker, client_id=name, filters=subscriptions(), clean=False)
        made = Coordinator(bus, store, instance=name, settle_s=settle_s, announce_s=announce_s, fleet=fleet)
        tasks = [asyncio.ensure_future(start()) for start in made.tasks().values()]
        made.running = tasks  # type: ignore[attr-defined]
        try:
            yield made
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            store.database.close()

    async def host(self, inventory: m.HostInventory) -> None:
        """A host reports, with its presence and its agents'."""
        await self.post.send(
            m.HostPresence(host=inventory.host, online=True, instance="i"), host=inventory.host
        )
        await self.post.send(inventory, host=inventory.host)

    async def ask(self, request: Message) -> m.RequestAnswered:
        await self.post.send(request, client="ops")
        wanted = request.request  # type: ignore[attr-defined]
        await eventually(lambda: any(each.request == wanted for each in self.of(m.RequestAnswered)))
        return next(each for each in self.of(m.RequestAnswered) if each.request == wanted)  # type: ignore[no-any-return]


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    made = World(tmp_path)
    task = asyncio.create_task(made.bus.run(made.post.deliver))
    await made.bus.wait_connected(5)
    yield made
    await made.bus.close()
    await task


def _request(name: str, **values: Any) -> m.RolloutRequested:
    return m.RolloutRequested(request=name, update="patch", policy=m.Policy(notice_s=600.0), **values)


async def test_what_is_retained_is_published_again_at_the_start(
    world: World, host: Callable[..., Any], build: Callable[..., Any]
) -> None:
    await world.host(host("h1", build("w1")))
    async with world.coordinator():
        await eventually(lambda: bool(world.of(m.SetDocument)))
        assert (await world.ask(_request("q"))).accepted
        await eventually(lambda: bool(world.of(m.RolloutState)))
    for topic in [each for each in world.broker.retained if "/fleet/" in each]:
        del world.broker.retained[topic]  # a broker without a disk, after a power cut
    async with world.coordinator() as again:
        await eventually(lambda: world.retained(m.SetDocument, set="web") is not None)
        (rollout,) = again.repository.rollouts
        await eventually(lambda: world.retained(m.RolloutState, rollout=rollout) is not None)


async def test_a_rollout_whose_record_is_lost_does_not_run_for_ever_on_the_bus(
    world: World, host: Callable[..., Any], build: Callable[..., Any]
) -> None:
    await world.host(host("h1", build("w1")))
    async with world.coordinator("lost"):
        await eventually(lambda: bool(world.of(m.SetDocument)))
        lost = (await world.ask(_request("q"))).rollout
        await eventually(lambda: world.retained(m.RolloutState, rollout=lost) is not None)
    assert world.retained(m.RolloutState, rollout=lost).status == "running"
    async with world.coordinator("another") as another:
        await eventually(lambda: world.retained(m.RolloutState, rollout=lost).status == "aborted")
        # One that is heard of only later, too; and its own stays.
        late = msgspec.structs.replace(
            world.retained(m.RolloutState, rollout=lost), rollout="late", status="halted"
        )
        await eventually(lambda: another.is_leader)
        await world.host(host("h1", build("w1"), epoch=another.authority.epoch, coordinator="another"))
        await world.post.send(late, rollout="late")
        await eventually(lambda: world.retained(m.RolloutState, rollout="late").status == "aborted")
        own = (await world.ask(_request("r"))).rollout
        await eventually(lambda: world.retained(m.RolloutState, rollout=own) is not None)
        assert world.retained(m.RolloutState, rollout=own).status == "running"


async def test_agents_get_time_to_come_back_when_the_broker_was_away_and_not_before(world: World) -> None:
    async with world.coordinator() as made:
        await eventually(lambda: made.is_leader)

        def left_s() -> float:
            until = made.fleet.grace_until
            return (until - datetime.now(UTC)).total_seconds() if until else 0.0

        assert left_s() == 0
        world.broker.kill("c")
        await eventually(lambda: left_s() > 0)
        assert 20 < left_s() <= 30


async def test_a_host_whose_inventory_is_removed_is_forgotten_unless_it_is_on_the_bus(
    world: World, host: Callable[..., Any], build: Callable[..., Any]
) -> None:
    for name, vm in (("h1", "w1"), ("h2", "w2")):
        await world.host(host(name, build(vm)))
    async with world.coordinator() as made:

        def why_not() -> list[Reason]:
            known = made.authority
            return fence_blockers(made.fleet, ["web"], epoch=known.epoch, coordinator=known.coordinator)

        await world.post.send(m.HostPresence(host="h2", online=False, instance="i"), host="h2")
        await eventually(lambda: any(why.text == "h2 is offline" for why in why_not()))
        for name in ("h1", "h2"):
            await world.post.clear(m.HostInventory, host=name)
        await eventually(lambda: set(made.fleet.inventories) == {"h1"})
        assert not any("h2" in why.text for why in why_not())


async def test_the_leader_says_again_and_again_that_it_is_there(world: World) -> None:
    async with world.coordinator("a", announce_s=0.05) as a:
        await eventually(lambda: len(world.of(m.CoordinatorPresence)) > 3)
        assert a.is_leader
        assert a.authority.epoch == 1, "what it hears of itself is no reason to claim another"
        mine = presence(a.authority, online=True)
        assert all(each == mine for each in world.of(m.CoordinatorPresence))
        assert world.retained(m.CoordinatorPresence) == mine
        higher = m.CoordinatorPresence(coordinator="b", epoch=9, online=True)
        await world.post.send(higher)
        await eventually(lambda: not a.is_leader)
        # It has no authority any more, and says no more that it has: others' clocks go on.
        async with world.coordinator("c", announce_s=0.05) as c:
            await eventually(lambda: c.is_leader)
            await eventually(
                lambda: len([each for each in world.of(m.CoordinatorPresence) if each.epoch == 10]) > 3
            )
        assert not any(each == mine for each in world.of(m.CoordinatorPresence)[-4:])


async def test_an_epoch_that_nobody_can_have_claimed_sends_no_coordinator_away(
    world: World, host: Callable[..., Any], build: Callable[..., Any]
) -> None:
    """A host in strange hands: were it believed, each new coordinator would have to claim a higher one still."""
    strange = msgspec.structs.replace(host("h2", build("w2")), epoch=m.EPOCH_MOST, coordinator="x")
    await world.host(host("h1", build("w1")))
    await world.host(strange)
    async with world.coordinator() as made:
        await eventually(lambda: made.is_leader and len(made.fleet.inventories) == 2)
        assert made.authority.epoch == 2, "one above what h1 says"
        await world.post.send(strange, host="h2")
        await world.post.send(host("h3", build("w3")), host="h3")
        await eventually(lambda: "h3" in made.fleet.inventories)
        assert made.is_leader
        why = fence_blockers(made.fleet, ["web"], epoch=2, coordinator=made.authority.coordinator)
        assert any(
            each.text.startswith("h2 has not acknowledged epoch 2: it obeys epoch 9007") for each in why
        )


async def test_the_word_of_a_host_is_no_claim_but_the_next_claim_is_above_it(
    world: World, host: Callable[..., Any], build: Callable[..., Any]
) -> None:
    """One inventory with the next epoch ended the coordinator for good: its unit does not start it again."""
    await world.host(host("h1", build("w1")))
    async with world.coordinator() as made:
        await eventually(lambda: made.is_leader)
        assert made.authority.epoch == 2
        await world.host(host("h1", build("w1"), epoch=3, coordinator="x"))
        await eventually(lambda: made.fleet.inventories["h1"].epoch == 3)
        assert made.is_leader
        assert not any(task.done() for task in made.running)  # type: ignore[attr-defined]
        (why,) = fence_blockers(made.fleet, ["web"], epoch=2, coordinator=made.authority.coordinator)
        assert "h1 has not acknowledged epoch 2: it obeys epoch 3 of x" in why.text
        assert why.code == "epoch_refused"
        # With a store that was lost, the host would obey nobody that begins below it.
    (world.folder / "c.sqlite").unlink()
    async with world.coordinator() as made:
        await eventually(lambda: made.is_leader)
        assert made.authority.epoch == 4


async def test_a_host_that_raises_its_epoch_with_each_word_does_not_fill_the_log(
    world: World, host: Callable[..., Any], build: Callable[..., Any]
) -> None:
    async with world.coordinator() as made:
        await eventually(lambda: made.is_leader)
        with capture_logs() as logs:
            for epoch in range(5, 105):
                await world.host(host("h1", build("w1"), epoch=epoch, coordinator="x"))
            await eventually(lambda: made.fleet.inventories["h1"].epoch == 104)
    assert len([each for each in logs if each["event"] == "inventory.epoch_above_ours"]) < 10


async def test_a_claim_that_nobody_can_have_made_ends_no_coordinator_and_does_not_stay_retained(
    world: World, host: Callable[..., Any], build: Callable[..., Any]
) -> None:
    """Epoch 2**53-1 on the coordinator's own topic left none for anybody: the fleet was out of order until hosts were wiped."""
    await world.host(host("h1", build("w1")))
    thief = m.CoordinatorPresence(coordinator="thief", epoch=m.EPOCH_MOST, online=True)
    async with world.coordinator() as made:
        await eventually(lambda: made.is_leader)
        await world.post.send(thief)
        await eventually(lambda: thief in world.of(m.CoordinatorPresence))
        await eventually(lambda: world.retained(m.CoordinatorPresence).epoch == 2)
        assert made.is_leader
        await world.post.send(thief)
        await eventually(lambda: world.of(m.CoordinatorPresence).count(thief) == 2)
    await world.post.send(thief)
    async with world.coordinator() as again:
        await eventually(lambda: again.is_leader)
        assert again.authority.epoch == 3
        await eventually(lambda: world.retained(m.CoordinatorPresence).epoch == 3)
    # Known hosts say what is believable to a new store, too.
    async with world.coordinator("new") as new:
        await eventually(lambda: new.is_leader)
        assert new.authority.epoch < 10


async def test_a_store_without_an_epoch_left_says_so_and_there_is_a_way_back(
    world: World, host: Callable[..., Any], build: Callable[..., Any]
) -> None:
    store = CoordinatorStore(str(world.folder / "c.sqlite"))
    store.save_epoch(m.EPOCH_MOST)
    store.database.close()
    await world.host(host("h1", build("w1"), epoch=5))
    async with world.coordinator() as made:
        await eventually(lambda: any(task.done() for task in made.running))  # type: ignore[attr-defined]
        (ended,) = (task for task in made.running if task.done())  # type: ignore[attr-defined]
        assert isinstance(ended.exception(), NoEpochLeft)
        assert "An epoch that nobody claimed" in str(ended.exception())
        with pytest.raises(StateFolderUnusable, match=r"does not contain coordinator\.sqlite"):
            forget_epoch(world.folder)
    (world.folder / "c.sqlite").rename(world.folder / "coordinator.sqlite")
    with exclusive_lock(str(world.folder)), pytest.raises(InUse):
        forget_epoch(world.folder)
    assert forget_epoch(world.folder) == m.EPOCH_MOST
    async with world.coordinator("coordinator") as again:
        await eventually(lambda: again.is_leader)
        assert again.authority.epoch == 6


async def test_a_request_that_waited_at_the_broker_for_long_is_refused_but_an_abort_is_not(
    world: World, host: Callable[..., Any], build: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    await world.host(host("h1", build("w1")))
    long_ago = datetime.now(UTC) - timedelta(seconds=90)
    monkeypatch.setattr("caesura.bus.messaging.datetime", SimpleNamespace(now=lambda _: long_ago))
    async with world.coordinator() as made:
        await eventually(lambda: made.is_leader and bool(made.fleet.inventories))
        late = await world.ask(_request("late"))
        assert not late.accepted
        assert re.search(r"asked (9|1\d)\d s ago", late.reason), "90, and what a busy machine adds"
        assert not made.repository.rollouts
        abort = await world.ask(m.AbortRequested(request="stop", rollout="none", reason="r"))
        assert "asked" not in abort.reason
        monkeypatch.undo()
        assert (await world.ask(_request("now"))).accepted
        # Delivered again, by now too late: it has its answer.
        (before,) = made.repository.rollouts
        monkeypatch.setattr("caesura.bus.messaging.datetime", SimpleNamespace(now=lambda _: long_ago))
        world.heard.clear()
        assert (await world.ask(_request("now"))).accepted
        assert list(made.repository.rollouts) == [before]


class _StandsBy:
    """Has a coordinator take requests as a standby does, and decide them so many seconds later, as the leader."""

    def __init__(self, made: Coordinator, monkeypatch: pytest.MonkeyPatch) -> None:
        self._requests = made.requests
        self._patch = monkeypatch

    async def __call__(self, *asked: Any, later_s: float) -> None:
        with self._patch.context() as patch:
            patch.setattr(self._requests, "_leadership", SimpleNamespace(claimed=False, is_leader=False))
            for each in asked:
                header = SimpleNamespace(time=datetime.now(UTC), source="/caesura/default/ctl/ops")
                received: Any = SimpleNamespace(parameters={"client": "ops"}, header=header)
                await self._requests.on_request(each, received)
        with self._patch.context() as patch:
            patch.setattr(self._requests, "_now", lambda: datetime.now(UTC) + timedelta(seconds=later_s))
            await self._requests.hold()
            await self._requests.answer_pending()


async def test_what_a_standby_received_long_before_it_leads_is_answered_and_an_abort_is_carried_out(
    world: World, host: Callable[..., Any], build: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    await world.host(host("h1", build("w1")))
    async with world.coordinator() as made:
        await eventually(lambda: made.is_leader and bool(made.fleet.inventories))
        rollout = (await world.ask(_request("q"))).rollout
        stands_by = _StandsBy(made, monkeypatch)
        stop = m.AbortRequested(request="stop", rollout="", reason="r")
        many = [_request(f"q{number}") for number in range(1500)]
        await stands_by(stop, *many, m.ResumeRequested(request="on", rollout=rollout), later_s=600.0)
        assert made.repository.rollouts[rollout].status == "aborted"
        for name in ("q1499", "on"):
            answer = made.repository.response("ops", name)
            assert answer is not None
            assert answer.codes == ("request_late",), name
        # What another coordinator has answered in the meantime is not answered again.
        waiting = made.waiting()
        await stands_by(stop, later_s=600.0)
        assert made.waiting() <= waiting


async def test_an_abort_without_a_name_does_not_end_a_rollout_that_was_started_after_it(
    world: World, host: Callable[..., Any], build: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    await world.host(host("h1", build("w1")))
    async with world.coordinator() as made:
        await eventually(lambda: made.is_leader and bool(made.fleet.inventories))
        rollout = (await world.ask(_request("q"))).rollout
        stands_by = _StandsBy(made, monkeypatch)
        younger = made.repository.rollouts[rollout].created_at - timedelta(seconds=1)
        with monkeypatch.context() as patch:
            patch.setattr(made.requests, "_now", lambda: younger)
            await stands_by(m.AbortRequested(request="stop", rollout="", reason="r"), later_s=1.0)
        assert made.repository.rollouts[rollout].status == "running"
        answer = made.repository.response("ops", "stop")
        assert answer is not None
        assert answer.codes == ("request_late",)


async def test_of_two_that_claim_the_same_epoch_exactly_one_leads(world: World) -> None:
    async with world.coordinator("a") as a, world.coordinator("b") as b:
        await eventually(lambda: a.authority.epoch > 0 and b.authority.epoch > 0)
        await eventually(lambda: a.is_leader != b.is_leader)
        leader = a if a.is_leader else b
        await eventually(
            lambda: world.retained(m.CoordinatorPresence) == presence(leader.authority, online=True)
        )
        assert a.is_leader != b.is_leader


async def test_a_superseded_coordinator_publishes_nothing_when_it_goes(
    world: World, host: Callable[..., Any], build: Callable[..., Any]
) -> None:
    await world.host(host("h1", build("w1")))
    async with world.coordinator("a") as a:
        await eventually(lambda: world.retained(m.SetDocument, set="web") is not None)
        higher = m.CoordinatorPresence(coordinator="b", epoch=9, online=True)
        await world.post.send(higher)
        await eventually(lambda: not a.is_leader)
        newer = m.SetDocument(set="web", incarnation=7, events=())
        await world.post.send(newer, set="web")
        a.store.enqueue(m.SetDocument(set="web", incarnation=2, events=()), set="web")
        await a.drain()
        assert world.retained(m.SetDocument, set="web") == newer
        assert world.retained(m.CoordinatorPresence) == higher
        with pytest.raises(LeadershipLost):
            await a.running[3]  # type: ignore[attr-defined]


@pytest.mark.parametrize("incarnation", [1, 5, 9])
async def test_a_document_of_another_coordinator_does_not_stay(
    incarnation: int, world: World, host: Callable[..., Any], build: Callable[..., Any]
) -> None:
    await world.host(host("h1", build("w1")))
    async with world.coordinator("a") as a:
        await world.post.send(m.SetDocument(set="web", incarnation=5, events=()), set="web")
        await eventually(lambda: "web" in a.repository.documents and a.is_leader)
        await eventually(lambda: a.repository.documents["web"].incarnation >= 5)
        foreign = m.ScheduledEvent(
            event_id="E", event_type="Freeze", status="scheduled", resources=("w1",), not_before=T0
        )
        await world.post.send(m.SetDocument(set="web", incarnation=incarnation, events=(foreign,)), set="web")
        await eventually(
            lambda: (
                world.retained(m.SetDocument, set="web") == a.repository.documents["web"]
                and not a.repository.documents["web"].events
            )
        )
        assert a.repository.documents["web"].incarnation > 4
        if incarnation >= 5:
            assert a.repository.documents["web"].incarnation > incarnation, (
                "else those who took the other's keep it"
            )


async def test_events_of_another_are_not_ended_before_the_epoch_is_claimed(
    world: World, host: Callable[..., Any], build: Callable[..., Any]
) -> None:
    """One that is stopped while it still listens took nothing over, and must not end those events at its next start."""
    foreign = m.ScheduledEvent(
        event_id="E", event_type="Freeze", status="started", resources=("w1",), not_before=T0
    )
    await world.host(host("h1", build("w1")))
    await world.post.send(m.SetDocument(set="web", incarnation=5, events=(foreign,)), set="web")
    async with world.coordinator("a", settle_s=60.0) as a:
        await eventually(lambda: bool(a.fleet.inventories))
        await world.post.send(m.SetDocument(set="web", incarnation=6, events=(foreign,)), set="web")
        await world.post.send(host("h2", build("w2")), host="h2")
        await eventually(lambda: "h2" in a.fleet.inventories)
        assert a.waiting() == 0, "it has nothing to say"
    ended = m.SetDocument(set="web", incarnation=7, events=())  # by the one that leads
    await world.post.send(ended, set="web")
    async with world.coordinator("a") as a:
        await eventually(lambda: a.is_leader and not a.waiting())
        assert not [each for each in world.of(m.EventChanged) if each.event_id == "E"], "a second end"
        assert world.retained(m.SetDocument, set="web").incarnation >= 7


async def test_a_message_that_nobody_could_read_does_not_hold_up_the_others(world: World) -> None:
    async with world.coordinator() as one:
        await eventually(lambda: one.is_leader)
        one.store.enqueue(m.RequestAnswered(request="a", accepted=False, reason="x" * 5000), client="ops")
        one.store.enqueue(m.RequestAnswered(request="a", accepted=False), client="not a/level")
        huge = wave_state(wave=0, vms=tuple(f"vm-{i:060d}" for i in range(5000)))
        one.store.enqueue(huge, rollout="r", wave=0)
        answer = await world.ask(_request("q"))
        assert not answer.accepted
        await eventually(lambda: one.waiting() == 0)


async def test_a_plan_too_large_for_a_message_comes_in_parts(
    world: World, host: Callable[..., Any], build: Callable[..., Any]
) -> None:
    for number in range(80):
        vms = [build(f"vm-{number:02d}-{each:02d}", f"set-{each:02d}", number % 20) for each in range(20)]
        await world.host(host(f"host-{number:02d}", *vms))
    async with world.coordinator() as one:
        await eventually(lambda: len(one.fleet.inventories) == 80)
        planned = await world.ask(_request("p", plan_only=True))
        assert planned.accepted
        assert planned.plan is not None
        assert planned.plan_parts > 1
        assert len({vm.vm for wave in planned.plan.waves for vm in wave.vms}) == 80 * 20
        again = await world.ask(_request("p", plan_only=True))
        assert again == planned, "a repeated request gets the same answer"
        some = await world.ask(
            _request("s", plan_only=True, selection=m.Selection(hosts=("host-01", "host-02")))
        )
        assert some.plan is not None
        assert len(some.plan.waves) == 2
        started = await world.ask(_request("q"))
        assert started.accepted
        assert started.plan == planned.plan


async def test_a_host_whose_inventory_comes_in_parts_is_planned_and_counts_in_the_fence(
    world: World, host: Callable[..., Any], build: Callable[..., Any]
) -> None:
    small = host("h2", build("w-last", domain=1))
    vms = [build(f"w-{number:04d}".ljust(60, "w"), domain=0) for number in range(1000)]

    async def report(state: m.VmState) -> None:
        whole = host("h1", *(msgspec.structs.replace(each, state=state) for each in vms))
        head, parts = inventory_in_parts(whole)
        assert len(parts) > 1
        for part in parts:
            await world.post.send(part, host="h1", part=part.part)
        await world.post.send(head, host="h1")

    async with world.coordinator() as one:
        await eventually(lambda: one.is_leader)
        await world.post.send(m.HostPresence(host="h1", online=True, instance="i"), host="h1")
        await report("running")
        await world.host(small)
        await eventually(lambda: len(one.fleet.inventories) == 2)
        planned = await world.ask(_request("p", plan_only=True))
        assert planned.plan is not None
        assert [len(wave.vms) for wave in planned.plan.waves] == [1000, 1]

        def blocked() -> int:
            found = fence_blockers(one.fleet, ["web"], [], epoch=1, coordinator="c")
            return sum(each.code == "vm_not_running" for each in found)

        assert blocked() == 0
        await report("paused")
        await eventually(lambda: blocked() == 1000)
        await report("running")
        await eventually(lambda: blocked() == 0)


async def test_a_host_of_whose_inventory_parts_are_missing_blocks_its_sets_and_is_named(
    world: World, host: Callable[..., Any], build: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is known of it may be long ago: nothing is paused beside it, and its epoch counts for the next claim."""
    monkeypatch.setattr("caesura_coordinator.fleet_receiver._INCOMPLETE_S", 0.0)
    async with world.coordinator() as one:
        await eventually(lambda: one.is_leader)
        await world.host(host("h1", build("w1"), build("w2")))
        await eventually(lambda: len(one.fleet.inventories) == 1)

        def why(blockers: Any) -> set[str]:
            return {each.code for each in blockers}

        planned = (await world.ask(_request("p", plan_only=True))).plan
        assert planned is not None
        vms = planned.waves[0].vms
        assert why(fence_blockers(one.fleet, ["web"], epoch=1, coordinator="c")) == set()
        newest = host("h1", epoch=7, part_etags=("0" * 12,))
        with capture_logs() as logs:
            await world.post.send(newest, host="h1")
            await eventually(lambda: any(each["event"] == "inventory.incomplete" for each in logs))
        assert why(fence_blockers(one.fleet, ["web"], epoch=1, coordinator="c")) == {"inventory_incomplete"}
        assert why(fence_blockers(one.fleet, [], ["h1"], epoch=1, coordinator="c")) == {
            "inventory_incomplete"
        }
        assert why(health_blockers(one.fleet, vms)) == {"inventory_incomplete"}
        assert 7 in one.fleet.epochs()
        part = m.InventoryPart(host="h1", part=1, etag="0" * 12, vms=(build("w1"), build("w2")))
        await world.post.send(part, host="h1", part=1)
        await eventually(lambda: one.fleet.inventories["h1"].epoch == 7)
        assert "inventory_incomplete" not in why(fence_blockers(one.fleet, ["web"], epoch=7, coordinator="c"))


async def test_a_host_of_which_only_the_head_of_its_inventory_came_may_have_vms_of_any_set(
    world: World, host: Callable[..., Any], build: Callable[..., Any]
) -> None:
    """One of them may be paused: nothing is paused beside it before its parts are here, or it is removed."""
    async with world.coordinator() as one:
        await eventually(lambda: one.is_leader)
        await world.host(host("h1", build("w1"), build("w2")))
        await eventually(lambda: len(one.fleet.inventories) == 1)
        await world.post.send(host("h2", part_etags=("0" * 12,)), host="h2")
        await eventually(lambda: "h2" in one.fleet.incomplete)
        (blocker,) = fence_blockers(one.fleet, ["web"], epoch=1, coordinator="c")
        assert blocker.code == "inventory_incomplete"
        assert "h2" in str(blocker)
        await world.post.clear(m.HostInventory, host="h2")
        await eventually(lambda: not fence_blockers(one.fleet, ["web"], epoch=1, coordinator="c"))


async def test_a_rollout_that_another_coordinator_published_is_published_again(
    world: World, host: Callable[..., Any], build: Callable[..., Any]
) -> None:
    """One that was frozen, and wakes up, may publish what it knew before it stands down."""
    await world.host(host("h1", build("w1")))
    async with world.coordinator() as one:
        await eventually(lambda: one.is_leader)
        name = (await world.ask(_request("q"))).rollout
        await eventually(lambda: world.retained(m.WaveState, rollout=name, wave="0") is not None)
        own = (
            world.retained(m.RolloutState, rollout=name),
            world.retained(m.WaveState, rollout=name, wave="0"),
        )
        old = msgspec.structs.replace(own[1], status="failed", etag="0" * 12)
        await world.post.send(old, rollout=name, wave=0)
        await world.post.send(msgspec.structs.replace(own[0], wave_etags=(old.etag,)), rollout=name)
        await eventually(
            lambda: (
                world.retained(m.RolloutState, rollout=name).wave_etags
                == (world.retained(m.WaveState, rollout=name, wave="0").etag,)
                != (old.etag,)
            )
        )
        assert world.retained(m.WaveState, rollout=name, wave="0").status != "failed"


async def test_a_large_answer_is_not_sent_with_every_repetition(
    world: World, host: Callable[..., Any], build: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("caesura_coordinator.requests._LARGE_PLAN_VMS", 1)
    await world.host(host("h1", build("w1"), build("w2")))
    async with world.coordinator() as one:
        await eventually(lambda: one.is_leader)
        assert (await world.ask(_request("p", plan_only=True))).plan is not None
        for _ in range(20):
            await world.post.send(_request("p", plan_only=True), client="ops")
        await world.ask(m.AbortRequested(request="last"))  # behind them all
        assert sum(each.request == "p" for each in world.of(m.RequestAnswered)) <= 2


async def test_a_repeated_abort_gets_the_answer_that_was_stored_with_the_abort(
    world: World, host: Callable[..., Any], build: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    await world.host(host("h1", build("w1")))
    async with world.coordinator() as one:
        await eventually(lambda: one.is_leader)
        assert (await world.ask(_request("q"))).accepted
        monkeypatch.setattr(one.store, "save_answer", _full)
        await world.post.send(m.AbortRequested(request="a"), client="ops")
        await eventually(lambda: not one.waiting())
        (rollout,) = one.repository.rollouts.values()
        assert rollout.status == "running", "aborted without an answer that says so"
        monkeypatch.undo()
        assert (await world.ask(m.AbortRequested(request="a"))).accepted
        assert next(iter(one.repository.rollouts.values())).status == "aborted"


def _full(*_: object) -> None:
    raise StoreError("disk full")


async def test_a_rollout_that_could_not_be_stored_does_not_run(
    world: World, host: Callable[..., Any], build: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    await world.host(host("h1", build("w1")))
    async with world.coordinator() as one:
        await eventually(lambda: one.is_leader)
        monkeypatch.setattr(one.store, "save_answer", _full)
        await world.post.send(_request("q"), client="ops")
        await world.post.send(m.AgentPresence(vm="w1", online=True, boot_id="b"), vm="w1")
        await eventually(lambda: one.state.agents_online.get("w1", False))
        assert not one.repository.rollouts
        monkeypatch.undo()
        assert (await world.ask(_request("q"))).accepted


async def test_a_document_that_could_not_be_stored_is_tried_again(
    world: World, host: Callable[..., Any], build: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    async with world.coordinator() as one:
        await eventually(lambda: one.is_leader)
        monkeypatch.setattr(one.store, "save_document", _full)
        await world.host(host("h1", build("w1")))
        await eventually(lambda: "h1" in one.fleet.inventories)
        assert not one.repository.documents
        monkeypatch.undo()
        await world.host(host("h1", build("w1")))
        await eventually(lambda: world.retained(m.SetDocument, set="web") is not None)


@pytest.mark.parametrize("first", ["running", "halted"])
async def test_one_rollout_per_set(
    first: str, world: World, host: Callable[..., Any], build: Callable[..., Any]
) -> None:
    """A second one over a set that is held is refused with the holder's name, whatever of the set it wants (I1)."""
    async with world.coordinator() as one:
        await eventually(lambda: one.is_leader)
        mine = {"epoch": one.authority.epoch, "coordinator": one.authority.coordinator}
        await world.host(host("h1", build("w1", agent=False), **mine))
        await world.host(host("h2", build("w2", domain=1, agent=False), **mine))
        await world.host(host("h3", build("d1", "db", agent=False), **mine))
        await eventually(lambda: len(one.fleet.inventories) == 3)
        held = (await world.ask(_request("first", selection=m.Selection(sets=("web",))))).rollout
        await eventually(lambda: one.repository.rollouts[held].waves[0].status == "scheduled")
        if first == "halted":
            ahead = m.SetDocument(set="web", incarnation=1000, events=())
            await world.post.send(ahead, set="web")
            await eventually(lambda: one.repository.rollouts[held].status == "halted")
        again = _request("again", selection=m.Selection(hosts=("h2",)))
        hold = m.FreezeRequested(
            request="hold", selection=m.Selection(vms=("w2",)), hold_s=1.0, policy=m.Policy(notice_s=600.0)
        )
        both = _request("both", selection=m.Selection(sets=("db", "web")))
        for request in (again, hold, both):
            answer = await world.ask(request)
            assert not answer.accepted
            assert f"set web is held by rollout {held}" in answer.reason
        assert list(one.repository.rollouts) == [held]
        assert (await world.ask(_request("other", selection=m.Selection(sets=("db",))))).accepted
        assert (await world.ask(m.AbortRequested(request="end", rollout=held))).accepted
        assert (await world.ask(_request("then", selection=m.Selection(sets=("web",))))).accepted


async def test_a_request_for_a_held_set_is_queued_where_it_says_so(
    world: World, host: Callable[..., Any], build: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    async with world.coordinator() as one:
        await eventually(lambda: one.is_leader)
        mine = {"epoch": one.authority.epoch, "coordinator": one.authority.coordinator}
        await world.host(host("h1", build("w1", agent=False), **mine))
        await world.host(host("h3", build("d1", "db", agent=False), **mine))
        await eventually(lambda: len(one.fleet.inventories) == 2)
        web = m.Selection(sets=("web",))
        first = await world.ask(_request("first", selection=web, queue=True))
        assert (first.queued_behind, first.not_before, first.codes) == ("", None, ()), "nothing is in its way"
        hold = m.FreezeRequested(
            request="hold", selection=web, hold_s=1.0, policy=m.Policy(notice_s=600.0), queue=True
        )
        answer = await world.ask(hold)
        assert answer.accepted
        assert (answer.queued_behind, answer.codes) == (first.rollout, ("queued",))
        assert answer.reason == f"queued behind rollout {first.rollout}"

        def shown() -> list[m.ScheduledEvent]:
            return sorted(world.retained(m.SetDocument, set="web").events, key=lambda each: each.not_before)

        await eventually(lambda: len(shown()) == 2)
        queued = shown()[1]
        assert queued.rollout == answer.rollout
        assert queued.not_before == answer.not_before
        assert queued.not_before > shown()[0].not_before
        await world.post.send(hold, client="ops")
        await eventually(
            lambda: len([each for each in world.of(m.RequestAnswered) if each.request == "hold"]) == 2
        )
        assert len(one.repository.rollouts) == 2, "a repeated request is not queued twice"
        refused = await world.ask(_request("refused", selection=web))
        assert refused.codes == ("set_held",)
        assert "queue behind it" in refused.reason

        for number in range(MOST_QUEUED - 1):
            assert (await world.ask(_request(f"more-{number}", selection=web, queue=True))).accepted
        full = await world.ask(_request("full", selection=web, queue=True))
        assert (full.accepted, full.codes) == (False, ("queue_full",))
        assert first.rollout in full.reason

        assert (await world.ask(_request("db", selection=m.Selection(sets=("db",))))).accepted
        halted = one.repository.rollouts[first.rollout]
        ahead = m.SetDocument(set="db", incarnation=1000, events=())
        await world.post.send(ahead, set="db")
        await eventually(lambda: any(each.status == "halted" for each in one.repository.active))
        behind = await world.ask(_request("behind", selection=m.Selection(sets=("db",)), queue=True))
        assert "is halted: resume or abort it" in behind.reason
        assert halted.id not in behind.reason

        monkeypatch.setattr(requests, "MAX_PAYLOAD_BYTES", 1100)
        large = await world.ask(_request("large", selection=m.Selection(sets=("db",)), queue=True))
        assert (large.accepted, large.codes) == (False, ("too_large",))
        assert "all rollouts in the queue" in large.reason


async def test_the_outbox_forgets_a_message_only_when_the_broker_has_it(
    world: World, host: Callable[..., Any], build: Callable[..., Any]
) -> None:
    """Killed between sending and the acknowledgement: the next one sends it again, under the same id (I6)."""
    ids: list[str] = []

    async def receive(_: m.WaveChanged, received: Received) -> None:
        ids.append(received.header.id)

    world.post.subscribe(m.WaveChanged, receive)
    await world.host(host("h1", build("w1", agent=False)))
    async with world.coordinator() as one:
        await eventually(lambda: one.is_leader and one.waiting() == 0 and "web" in one.repository.documents)
        sent = asyncio.Event()
        publish = one.bus.publish

        async def never_acknowledged(topic: str, payload: bytes, **how: Any) -> None:
            await publish(topic, payload, **how)
            sent.set()
            await asyncio.Event().wait()

        one.bus.publish = never_acknowledged  # type: ignore[method-assign]
        fact = m.WaveChanged(
            rollout="r", wave=0, status="scheduled", domains={"web": 0}, hosts=("h1",), at=T0
        )
        one.store.enqueue(fact, rollout="r", wave=0)
        (waiting,) = _outbox_of(one)
        one.relay.notify()
        async with asyncio.timeout(PATIENCE_S):
            await sent.wait()
        assert _outbox_of(one) == [waiting], "forgotten before it was acknowledged"
    await eventually(lambda: ids == [waiting])
    async with world.coordinator() as two:
        await eventually(lambda: ids == [waiting, waiting])
        await eventually(lambda: two.waiting() == 0)


async def test_a_topic_that_the_broker_refuses_does_not_hold_up_the_others(
    world: World, host: Callable[..., Any], build: Callable[..., Any]
) -> None:
    """Access rules that miss a set, or the owner of one VM: whoever asks is answered, all else is published."""
    refused = {"caesura/v1/fleet/set/db/document", "caesura/v1/fleet/vm/d1/owner"}
    world.broker.may_publish = lambda client, topic: client != "c" or topic not in refused
    await world.host(host("h1", build("d1", "db", agent=False), build("w1", agent=False)))
    async with world.coordinator() as one:
        await eventually(lambda: one.publisher.refused == 1)
        assert "set/db/document" in one.publisher.ping()
        assert not (await world.ask(_request("q", selection=m.Selection(vms=("nobody",))))).accepted
        await eventually(lambda: world.retained(m.SetDocument, set="web") is not None)
        await eventually(lambda: world.retained(m.VmOwner, vm="w1") is not None)
        assert world.retained(m.SetDocument, set="db") is None
        assert world.retained(m.VmOwner, vm="d1") is None
        await eventually(lambda: len(_outbox_of(one)) == 1)


async def test_what_is_published_is_forgotten_without_a_wait_for_the_disk(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that does not answer holds up neither the loop nor what is behind in the outbox."""
    go, removals = threading.Event(), 0
    remove = OutboxTable.remove

    def hanging(table: OutboxTable, event_ids: Any) -> None:
        nonlocal removals
        removals += 1
        go.wait()
        remove(table, event_ids)

    async with world.coordinator() as one:
        await eventually(lambda: one.is_leader and one.waiting() == 0)
        monkeypatch.setattr(OutboxTable, "remove", hanging)
        try:
            for number in range(20):
                await world.ask(m.AbortRequested(request=f"a{number}"))
            assert one.publisher.unremoved == 20
            assert removals == 1
        finally:
            go.set()
        await eventually(lambda: one.waiting() == 0)
        assert _outbox_of(one) == []
        assert removals <= 3, "what came together is forgotten in one transaction"


async def test_what_a_version_of_before_left_in_the_outbox_is_published(world: World) -> None:
    path = world.folder / "c.sqlite"
    CoordinatorStore(str(path)).database.close()
    answer = m.RequestAnswered(request="old", accepted=False, reason="kept")
    with sqlite3.connect(path) as old:
        old.executescript(
            "DROP TABLE outbox; DROP TABLE outbox_1; DROP TABLE wave_vms; DROP TABLE wave_part; PRAGMA user_version=2; CREATE TABLE outbox ("
            "number INTEGER PRIMARY KEY AUTOINCREMENT, event_id TEXT NOT NULL, type TEXT NOT NULL, "
            "parameters TEXT NOT NULL, body BLOB NOT NULL);"
        )
        row = ("the-id", answer.TYPE, '{"client": "ops"}', msgspec.json.encode(answer))
        old.execute("INSERT INTO outbox (event_id, type, parameters, body) VALUES (?, ?, ?, ?)", row)
        old.execute(
            "INSERT INTO outbox (event_id, type, parameters, body) VALUES ('x', 'no-such', '{}', '{}')"
        )
    old.close()
    async with world.coordinator() as one:
        assert one.waiting() == 1
        await eventually(lambda: world.of(m.RequestAnswered) == [answer])
        await eventually(lambda: one.waiting() == 0)
        left = one.store.database.run("SELECT event_id FROM outbox_1")
        assert left == [("x",)], "what cannot be read is not lost"


async def test_a_rollout_is_removed_from_the_bus_after_what_a_previous_run_left_of_it(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = m.RolloutState(
        rollout="r",
        update="u",
        status="completed",
        policy=m.Policy(),
        sets=(),
        wave_count=1,
        waves_completed=1,
        created_at=T0,
    )
    wave = wave_state(rollout="r", wave=0)
    before = CoordinatorStore(str(world.folder / "c.sqlite"))
    before.enqueue(wave, rollout="r", wave=0)
    before.enqueue(state, rollout="r")
    before.database.close()
    monkeypatch.setattr(RolloutRepository, "republish", lambda _: [])
    async with world.coordinator() as one:
        assert one.waiting() == 2
        one.relay.remove_later(Removal("r", 1, whole=True))
        await eventually(lambda: one.is_leader and not one.waiting())
        assert world.retained(m.WaveState, rollout="r", wave="0") is None
        assert world.retained(m.RolloutState, rollout="r") is None


def _outbox_of(coordinator: Coordinator) -> list[str]:
    """Event ids of what waits in the outbox, oldest first."""
    return [
        str(row[0]) for row in coordinator.store.database.run("SELECT event_id FROM outbox ORDER BY number")
    ]


async def test_abort_without_a_name_says_which_there_are(
    world: World, host: Callable[..., Any], build: Callable[..., Any]
) -> None:
    await world.host(host("h1", build("w1")))
    await world.host(host("h2", build("d1", "db")))
    async with world.coordinator() as one:
        await eventually(lambda: one.is_leader)
        assert "no rollout is under way" in (await world.ask(m.AbortRequested(request="0"))).reason
        for name in ("web", "db"):
            request = m.FreezeRequested(
                request=name, selection=m.Selection(sets=(name,)), hold_s=1.0, policy=m.Policy(notice_s=600.0)
            )
            assert (await world.ask(request)).accepted
        answer = await world.ask(m.AbortRequested(request="2"))
        assert "name one" in answer.reason
        assert all(name in answer.reason for name in one.repository.rollouts)


async def test_only_a_vm_that_sees_an_event_approves_it(
    world: World, host: Callable[..., Any], build: Callable[..., Any]
) -> None:
    async with world.coordinator() as one:
        await eventually(lambda: one.is_leader)
        mine = {"epoch": one.authority.epoch, "coordinator": one.authority.coordinator}
        await world.host(host("h1", build("w1", agent=False), **mine))
        await world.host(host("h2", build("d1", "db", agent=False), **mine))
        assert (await world.ask(_request("q", selection=m.Selection(sets=("web",))))).accepted
        (rollout,) = one.repository.rollouts

        def event() -> Any:
            wave = one.repository.rollouts[rollout].current
            return wave.events[0] if wave and wave.events else None

        await eventually(lambda: event() is not None)
        for vm, set_name in (("d1", "web"), ("nobody", "web"), ("d1", "db")):
            await world.post.send(
                m.EventApproved(event_id=event().event_id, set=set_name, vm=vm, at=T0), instance="p"
            )
        await world.ask(m.AbortRequested(request="x", rollout="unknown"))  # all before it was handled
        assert not event().approved_by
        await world.post.send(
            m.EventApproved(event_id=event().event_id, set="web", vm="w1", at=T0), instance="p"
        )
        await eventually(lambda: event().approved_by == "w1")


def test_size_is_never_below_what_is_sent() -> None:
    answer = m.RequestAnswered(request="r", accepted=True, reason="ä" * 100)
    sent = encode(answer, source="/" + "s" * 255, event_id="e" * 128, time=T0)
    assert size_bytes(answer) >= len(sent)
    assert msgspec.json.decode(sent)["data"]["reason"] == "ä" * 100


async def test_a_host_of_more_vms_than_a_command_names_ends_no_coordinator(
    world: World, host: Callable[..., Any], build: Callable[..., Any]
) -> None:
    """A plan over them is refused in words."""
    names = [f"w{number:04d}" for number in range(m.MOST_TARGETS + 1)]
    crowd = msgspec.structs.replace(host("h1", build("w1")), vms=tuple(map(_small, names)))
    async with world.coordinator() as one:
        await eventually(lambda: one.is_leader)
        await world.host(crowd)
        for plan_only in (True, False):
            refused = await world.ask(_request(f"q-{plan_only}", plan_only=plan_only))
            assert not refused.accepted
            assert "h1 would pause 1025 VMs at once, and a command names at most 1024" in refused.reason
        assert not any(task.done() for task in one.running)  # type: ignore[attr-defined]


async def test_a_command_that_cannot_be_sent_holds_up_no_other(world: World) -> None:
    targets = tuple(
        m.OperationTarget(vm=f"w{number}" * 8, set="s" * 63, update_domain=0) for number in range(3000)
    )
    command = m.StartOperation(
        operation="op",
        epoch=1,
        coordinator="c",
        host="h1",
        rollout="r",
        wave=0,
        method="freeze",
        targets=targets,
        budget_s=10.0,
        not_after=T0,
    )
    async with world.coordinator() as one:
        await eventually(lambda: one.is_leader)
        assert await one.sender.try_send(command), "the next one is tried"


async def test_a_command_that_the_broker_refuses_holds_up_no_other(
    world: World, host: Callable[..., Any], build: Callable[..., Any]
) -> None:
    """Access rules that miss one host: the others of the wave are commanded, and that it is refused is logged."""
    refused = "caesura/v1/fleet/host/h1/operation/start"
    world.broker.may_publish = lambda client, topic: client != "c" or topic != refused
    with capture_logs() as logs:
        async with world.coordinator() as one:
            await eventually(lambda: one.is_leader)
            mine = {"epoch": one.authority.epoch, "coordinator": one.authority.coordinator}
            for name in ("h1", "h2", "h3"):
                await world.host(host(name, build(f"vm-{name}", f"set-{name}", agent=False), **mine))
            await eventually(lambda: len(one.fleet.inventories) == 3)
            request = m.RolloutRequested(request="q", update="patch", policy=m.Policy(notice_s=0.05))
            assert (await world.ask(request)).accepted
            await eventually(lambda: {each.host for each in world.of(m.StartOperation)} == {"h2", "h3"})
    assert [each["topic"] for each in logs if each["event"] == "coordinator.refused"] == [refused]


def _small(name: str) -> m.VmRecord:
    return m.VmRecord(vm=name, set="web", update_domain=0, state="running", methods=("freeze",))


def test_a_plan_is_whole_unless_not_even_its_parts_can_be_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    vms = tuple(
        m.PlannedVm(
            vm=f"w{number}", set="web", update_domain=0, host="h", method="skip", reason="because " * 100
        )
        for number in range(600)
    )
    answer = with_plan("q", m.Plan(update="patch", skipped=vms), "the reason " * 20, ("too_large",))
    assert answer.plan is not None
    assert answer.plan.skipped == vms
    assert answer.reason == "the reason " * 20
    monkeypatch.setattr(m, "MOST_PARTS", 2)
    with pytest.raises(CaesuraError, match=r"600 VMs is too large to be sent: select fewer sets or hosts"):
        with_plan("q", m.Plan(update="patch", waves=(), skipped=vms), "", ())
    refused = with_plan("q", m.Plan(update="patch", waves=(), skipped=vms), "the reason", ("too_large",))
    assert (refused.plan, refused.reason) == (None, "the reason"), "what is asked about is said all the same"


async def test_a_coordinator_that_was_stopped_stays_retained_as_offline(world: World) -> None:
    async with world.coordinator("a", announce_s=0.01) as a:
        await eventually(lambda: a.is_leader and bool(world.of(m.CoordinatorPresence)))
        # What it publishes comes back to it before the bus is closed, however soon that is.
        close, closing = a.bus.close, asyncio.Event()

        async def close_later() -> None:
            await closing.wait()
            await close()

        a.bus.close = close_later  # type: ignore[method-assign]
        draining = asyncio.ensure_future(a.drain())
        await eventually(lambda: any(not each.online for each in world.of(m.CoordinatorPresence)))
        # The answer shows that everything before it, its own goodbye among that, was delivered to it.
        await world.post.send(m.AbortRequested(request="r1"), client="ops")
        await eventually(lambda: any(each.request == "r1" for each in world.of(m.RequestAnswered)))
        goodbye = world.retained(m.CoordinatorPresence)
        closing.set()
        await draining
        assert goodbye == presence(a.authority, online=False)


async def test_a_coordinator_of_another_fleet_does_not_lead_on_this_broker(world: World) -> None:
    async with world.coordinator("east") as leads:
        await eventually(lambda: leads.is_leader)
        epoch = leads.authority.epoch
        async with world.coordinator("west", fleet="west") as refused:
            with pytest.raises(
                WrongFleet,
                match="leads fleet 'default' on this broker, and this one is of fleet 'west': give each",
            ):
                await refused.running[3]  # type: ignore[attr-defined]
            assert not refused.is_leader
        assert leads.is_leader
        assert leads.authority.epoch == epoch
    # The other has gone, and its presence says so.
    await world.post.send(
        m.CoordinatorPresence(coordinator=leads.authority.coordinator, epoch=epoch, online=False)
    )
    async with world.coordinator("west", fleet="west") as alone:
        await eventually(lambda: alone.is_leader)
        assert alone.authority.epoch > epoch


async def test_nothing_is_planned_on_a_host_that_is_set_to_another_fleet(
    world: World, host: Any, build: Any
) -> None:
    stranger = MessageClient(world.bus, "/caesura/west/host/h1")
    async with world.coordinator() as made:
        await eventually(lambda: made.is_leader)
        one = host("h1", build("w1"), epoch=made.authority.epoch, coordinator=made.authority.coordinator)
        await world.post.send(m.HostPresence(host="h1", online=True, instance="i"), host="h1")
        await stranger.send(one, host="h1")
        refused = await world.ask(_request("q1", plan_only=True))
        (why,) = refused.plan.refusals  # type: ignore[union-attr]
        assert (why.subject, why.code) == ("h1", "host_of_another_fleet")
        assert "it is of fleet 'west'" in why.reason
        await MessageClient(world.bus, "/caesura/default/host/h1").send(one, host="h1")
        planned = await world.ask(_request("q2", plan_only=True))
        assert not planned.plan.refusals  # type: ignore[union-attr]
