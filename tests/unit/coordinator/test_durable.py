"""Nothing that was decided leaves the coordinator before it is on disk, and no disk holds its event loop."""

from __future__ import annotations

import asyncio
import random
import shutil
import sqlite3
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, closing
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import pytest
from structlog.testing import capture_logs

from caesura.bus.memory import MemoryBroker, MemoryBus
from caesura.bus.messaging import MessageClient
from caesura.bus.port import Delivery
from caesura.contract import messages as m
from caesura.contract.codec import Received, decode
from caesura.contract.envelope import Message
from caesura.contract.topics import channel_of
from caesura.delivery.sqlite_outbox import SqliteOutbox
from caesura.runtime.errors import SyncFailed
from caesura.runtime.group_commit import GroupCommit
from caesura.runtime.serve import serve
from caesura_coordinator.service import Coordinator, subscriptions
from caesura_coordinator.store import CoordinatorStore
from caesura_testing.collector import PATIENCE_S, eventually
from caesura_testing.disks import Disk
from caesura_testing.rollouts import wave_state


class World:
    """A broker with hosts that obey whoever leads and do what they are commanded, and all that the coordinator published."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "c.sqlite"
        self.broker = MemoryBroker()
        self.bus = MemoryBus(self.broker, client_id="world", filters=["caesura/v1/fleet/#"])
        self.post = MessageClient(self.bus, "/caesura/world")
        self.published: list[Message] = []
        self.before_published: Callable[[Message], None] = lambda _: None
        self.reports: tuple[m.OperationStatus, ...] = ("accepted",)
        self.inventories: list[m.HostInventory] = []
        self.disk = Disk()

    async def deliver(self, delivery: Delivery) -> None:
        if delivery.payload:
            message = decode(delivery.topic, delivery.payload).message
            if isinstance(message, m.CoordinatorPresence) and message.online:
                for each in self.inventories:
                    await self.obey(each, message)
            if isinstance(message, m.StartOperation):
                await self.report(message, *self.reports)
            if isinstance(message, m.AbortOperation):
                await self.report(message, "cancelled")

    async def obey(self, inventory: m.HostInventory, leader: m.CoordinatorPresence) -> None:
        said = msgspec.structs.replace(inventory, epoch=leader.epoch, coordinator=leader.coordinator)
        await self.post.send(m.HostPresence(host=said.host, online=True, instance="i"), host=said.host)
        await self.post.send(said, host=said.host)

    async def report(
        self, command: m.StartOperation | m.AbortOperation, *statuses: m.OperationStatus
    ) -> None:
        for status in statuses:
            report = m.OperationReported(
                operation=command.operation,
                host=command.host,
                epoch=command.epoch,
                status=status,
                at=datetime.now(UTC),
            )
            await self.post.send(report, host=command.host)

    def of(self, kind: type[Message]) -> list[Any]:
        return [each for each in self.published if isinstance(each, kind)]

    async def approve(self, rollout: str) -> None:
        """Approve what is scheduled of it."""

        def events() -> list[m.EventChanged]:
            return [each for each in self.of(m.EventChanged) if each.rollout == rollout]

        await eventually(lambda: bool(events()))
        for each in events():
            approval = m.EventApproved(event_id=each.event_id, set=each.set, vm=each.resources[0], at=each.at)
            await self.post.send(approval, instance="i")

    def answers(self) -> dict[str, m.RequestAnswered]:
        return {each.request: each for each in self.of(m.RequestAnswered)}

    @asynccontextmanager
    async def coordinator(self, fold_bytes: int = 1 << 24) -> AsyncIterator[Coordinator]:
        """One that runs for the block, and is killed at its end: no drain."""
        store = CoordinatorStore(str(self.path))
        commits = GroupCommit(store.database, sync=self.disk, fold_bytes=fold_bytes)
        bus = MemoryBus(self.broker, client_id="c", filters=subscriptions(), clean=False)
        publish = bus.publish

        async def noted(topic: str, payload: bytes, **how: Any) -> None:
            if payload:
                message = decode(topic, payload).message
                self.before_published(message)
                self.published.append(message)
            await publish(topic, payload, **how)

        bus.publish = noted  # type: ignore[method-assign]
        made = Coordinator(bus, store, instance="c", settle_s=0.02, commits=commits)
        tasks = [asyncio.ensure_future(start()) for start in made.tasks().values()]
        made.running = tasks  # type: ignore[attr-defined]
        try:
            yield made
        finally:
            self.disk.release()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            store.database.close()


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    made = World(tmp_path)
    task = asyncio.create_task(made.bus.run(made.deliver))
    await made.bus.wait_connected(5)
    yield made
    await made.bus.close()
    await task


def _request(name: str, **values: Any) -> m.RolloutRequested:
    return m.RolloutRequested(request=name, update="patch", policy=m.Policy(notice_s=600.0), **values)


async def _obeyed(world: World, made: Coordinator) -> None:
    """Wait until every host obeys this coordinator and nothing waits for anybody."""
    await eventually(
        lambda: (
            made.is_leader
            and len(made.fleet.inventories) == len(world.inventories)
            and all(each.epoch == made.authority.epoch for each in made.fleet.inventories.values())
            and not made.waiting()
            and made.commits.settled
            and not made.bus.stats.backlog
        )
    )


async def _decided(made: Coordinator, since: int) -> None:
    await eventually(lambda: made.commits.committed > since)


async def test_a_slow_disk_holds_back_what_is_published_and_not_the_loop(
    world: World, host: Callable[..., Any], build: Callable[..., Any]
) -> None:
    world.inventories = [host("h1", build("w1", agent=False))]
    async with world.coordinator() as made:
        await _obeyed(world, made)
        world.disk.hold()
        calls, said, had = world.disk.calls, len(world.published), made.commits.committed
        for number in range(20):
            await world.post.send(m.AbortRequested(request=f"a{number}", rollout="none"), client="ops")
        await eventually(lambda: made.commits.committed >= had + 20)
        assert len(world.published) == said, "an answer left before it was on disk"
        assert made.store.database.ping() == ""
        # Others are read and counted meanwhile.
        await world.post.send(m.AgentPresence(vm="w1", online=True, boot_id="b"), vm="w1")
        await eventually(lambda: made.state.agents_online.get("w1", False))
        assert len(world.published) == said
        assert world.disk.calls == calls + 1
        world.disk.release()
        await eventually(lambda: len(world.of(m.RequestAnswered)) == 20)
        assert world.disk.calls <= calls + 3, "what came together shares a sync"


async def test_a_message_is_acknowledged_when_what_follows_from_it_is_on_disk(
    world: World, host: Callable[..., Any], build: Callable[..., Any]
) -> None:
    """The broker forgets what is acknowledged: a power cut would take the request and its answer."""
    world.inventories = [host("h1", build("w1", agent=False))]
    async with world.coordinator() as made:
        await _obeyed(world, made)
        session = world.broker._sessions["c"]
        world.disk.hold()
        had = made.commits.committed
        await world.post.send(m.AbortRequested(request="a", rollout="none"), client="ops")
        await _decided(made, had)
        await eventually(lambda: world.disk.calls > 0 and not made.commits.settled)
        assert [each.topic for each in session.in_flight.values()] == ["caesura/v1/ctl/ops/abort"]
        world.disk.release()
        await eventually(lambda: not session.in_flight)


async def test_an_epoch_is_on_disk_before_anybody_sees_it(
    world: World, host: Callable[..., Any], build: Callable[..., Any]
) -> None:
    world.inventories = [host("h1", build("w1", agent=False))]
    world.disk.hold()
    async with world.coordinator() as made:
        await eventually(lambda: world.disk.calls == 1)
        assert made.store.epoch() == 1
        assert (made.authority.epoch, made.is_leader) == (0, False)
        # What arrives now waits for the claim; another's claim raises it.
        await world.post.send(_request("early"), client="ops")
        other = m.CoordinatorPresence(coordinator="b", epoch=5, online=False)
        await world.post.send(other)
        await eventually(lambda: len(made.requests.pending) == 1 and made.leadership.announced == [5])
        assert not world.published
        world.disk.release()
        await eventually(lambda: made.is_leader)
        assert made.authority.epoch == 6
        await eventually(lambda: [each.request for each in world.of(m.RequestAnswered)] == ["early"])
        assert {each.epoch for each in world.of(m.CoordinatorPresence)} == {6}


async def test_a_second_claim_is_on_disk_before_anybody_sees_it(world: World) -> None:
    async with world.coordinator() as made:
        await _obeyed(world, made)
        world.disk.hold()
        calls = world.disk.calls
        twin = m.CoordinatorPresence(coordinator="a", epoch=made.authority.epoch, online=True)
        await world.post.send(twin)
        await eventually(lambda: world.disk.calls == calls + 1)
        assert made.store.epoch() == 2
        assert made.authority.epoch == 1
        assert {each.epoch for each in world.of(m.CoordinatorPresence)} == {1}
        world.disk.release()
        await eventually(lambda: made.authority.epoch == 2)
        await eventually(lambda: world.of(m.CoordinatorPresence)[-1].epoch == 2)


async def test_an_equal_epoch_that_another_claims_meanwhile_is_not_used(world: World) -> None:
    """Hosts may obey the other under it by now."""
    world.disk.hold()
    async with world.coordinator() as made:
        await eventually(lambda: world.disk.calls == 1)
        assert made.store.epoch() == 1
        await world.post.send(m.CoordinatorPresence(coordinator="b", epoch=1, online=True))
        await eventually(lambda: made.leadership.announced == [1])
        world.disk.release()
        await eventually(lambda: made.is_leader)
        assert made.authority.epoch == 2
        await eventually(lambda: [each.epoch for each in world.of(m.CoordinatorPresence)] == [2])


async def test_no_claim_of_ours_makes_that_of_another_believable(world: World) -> None:
    """With each claim as many epochs could be used up as can be believed at once."""
    store = CoordinatorStore(str(world.path))
    store.save_epoch(499)
    store.database.close()
    world.disk.hold()
    async with world.coordinator() as made:
        await eventually(lambda: world.disk.calls == 1)
        for epoch in (1000, 1900):
            await world.post.send(m.CoordinatorPresence(coordinator="b", epoch=epoch, online=False))
        await eventually(lambda: made.leadership.announced == [1000, 1900])
        world.disk.release()
        await eventually(lambda: made.is_leader)
        assert made.authority.epoch == 1001


async def test_a_disk_that_hangs_behind_a_second_claim_does_not_keep_it_from_standing_down(
    world: World,
) -> None:
    async with world.coordinator() as made:
        await _obeyed(world, made)
        world.disk.hold()
        calls = world.disk.calls
        await world.post.send(m.CoordinatorPresence(coordinator="a", epoch=1, online=True))
        await eventually(lambda: world.disk.calls == calls + 1)
        await world.post.send(m.CoordinatorPresence(coordinator="b", epoch=5, online=True))
        await eventually(lambda: not made.is_leader)
        world.disk.release()
        await eventually(lambda: any(each.done() for each in made.running))  # type: ignore[attr-defined]
    assert {each.epoch for each in world.of(m.CoordinatorPresence)} == {1}


async def test_a_command_is_sent_when_the_start_of_its_wave_is_on_disk(
    world: World, host: Callable[..., Any], build: Callable[..., Any]
) -> None:
    world.inventories = [host("h1", build("w1", agent=False))]
    async with world.coordinator() as made:
        await _obeyed(world, made)
        await world.post.send(_request("q"), client="ops")
        await eventually(lambda: bool(world.of(m.EventChanged)))
        (rollout,) = made.repository.rollouts
        await eventually(lambda: made.commits.settled)
        world.disk.hold()
        await world.approve(rollout)
        await eventually(lambda: made.repository.rollouts[rollout].waves[0].status == "started")
        await eventually(lambda: made.sender.held)
        assert not world.of(m.StartOperation)
        world.disk.release()
        await eventually(lambda: bool(world.of(m.StartOperation)))


async def test_a_record_of_an_owner_is_on_disk_before_it_is_published(
    world: World, host: Callable[..., Any], build: Callable[..., Any]
) -> None:
    async with world.coordinator() as made:
        await _obeyed(world, made)
        world.disk.hold()
        leader = m.CoordinatorPresence(
            coordinator=made.authority.coordinator, epoch=made.authority.epoch, online=True
        )
        await world.obey(host("h1", build("w1", agent=False)), leader)
        await eventually(lambda: bool(made.store.owners()) and "web" in made.repository.documents)
        await eventually(lambda: not made._owner_records._changed.is_set())
        assert not world.of(m.VmOwner)
        assert not world.of(m.SetDocument)
        world.disk.release()
        await eventually(lambda: [each.host for each in world.of(m.VmOwner)] == ["h1"])


async def test_what_was_loaded_at_the_start_is_on_disk_before_it_is_published(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The outbox is read while decisions are made: what it shows may not be synced."""
    read = asyncio.Event()
    async with world.coordinator() as made:
        load = SqliteOutbox.load

        async def held(outbox: Any) -> Any:
            world.disk.hold()
            made.repository.store_response(
                "ops", m.RequestAnswered(request="late", accepted=False, reason="r")
            )
            found = await load(outbox)
            read.set()
            return found

        monkeypatch.setattr(SqliteOutbox, "load", held)
        async with asyncio.timeout(PATIENCE_S):
            await read.wait()
        calls = world.disk.calls
        await eventually(lambda: world.disk.calls > 0 and not made.commits.settled)
        assert not world.of(m.RequestAnswered)
        world.disk.release()
        await eventually(lambda: len(world.of(m.RequestAnswered)) == 1)
        assert calls


async def test_loading_the_outbox_ends_when_what_was_read_is_on_disk(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By turns of the loop: what is published too early may come later than any look at what was published."""
    async with world.coordinator() as made:
        await eventually(lambda: made.is_leader and made.commits.settled)
        world.disk.hold()
        made.repository.store_response("ops", m.RequestAnswered(request="late", accepted=False, reason="r"))
        read, load = asyncio.Event(), SqliteOutbox.load

        async def announced(outbox: Any) -> Any:
            found = await load(outbox)
            read.set()
            return found

        monkeypatch.setattr(SqliteOutbox, "load", announced)
        loading = asyncio.create_task(made.outbox.load())
        async with asyncio.timeout(PATIENCE_S):
            await read.wait()
        for _ in range(20):
            await asyncio.sleep(0)
        assert not loading.done()
        world.disk.release()
        assert any(b"late" in each.payload for each in await loading)


def test_of_a_retained_topic_only_the_newest_is_given_to_the_publisher(tmp_path: Path) -> None:
    """It may have loaded the newest already: an older one behind it would replace it, and have its row removed."""
    store = CoordinatorStore(str(tmp_path / "c.sqlite"))
    for incarnation in (1, 2):
        store.enqueue(m.SetDocument(set="web", incarnation=incarnation, events=()), set="web")
    store.enqueue(m.SetDocument(set="db", incarnation=1, events=()), set="db")
    kept = store.outbox.load()
    assert len(kept) == 2
    assert store.unread == 3
    assert store.stored(0) == []
    assert store.stored(store.database.commits) == kept
    assert store.unread == 0
    store.database.close()


async def test_waves_of_a_rollout_that_nobody_knows_are_removed_though_the_coordinator_is_killed(
    world: World,
) -> None:
    foreign = m.RolloutState(
        rollout="foreign",
        update="u",
        status="running",
        policy=m.Policy(),
        sets=(),
        wave_count=1,
        waves_completed=0,
        created_at=datetime(2026, 1, 1, tzinfo=UTC),
    )
    wave = wave_state(rollout="foreign", wave=0)
    topics = [channel_of(m.WaveState).topic(rollout="foreign", wave=0)]
    async with world.coordinator() as made:
        await _obeyed(world, made)
        world.disk.hold()
        had = made.commits.committed
        await world.post.send(wave, rollout="foreign", wave=0)
        await world.post.send(foreign, rollout="foreign")
        await _decided(made, had)
        # The end reaches the broker, and what is to be removed does not: killed in between.
        publish = made.bus.publish

        async def cut(topic: str, payload: bytes, **how: Any) -> None:
            if not payload:
                await asyncio.Event().wait()
            await publish(topic, payload, **how)

        made.bus.publish = cut  # type: ignore[method-assign]
        world.disk.release()
        await eventually(lambda: bool(world.of(m.RolloutState)))
        await eventually(lambda: made.publisher.unremoved == 0)
        assert world.broker.retained.get(topics[0])
    async with world.coordinator() as made:
        await eventually(lambda: not world.broker.retained.get(topics[0]))
        await eventually(lambda: not made.waiting())


async def test_a_disk_that_fails_ends_the_service_and_nothing_of_it_was_published(world: World) -> None:
    store = CoordinatorStore(str(world.path))
    bus = MemoryBus(world.broker, client_id="c", filters=subscriptions(), clean=False)
    commits = GroupCommit(store.database, sync=world.disk)
    made = Coordinator(bus, store, instance="c", settle_s=0.02, commits=commits)
    serving = asyncio.create_task(serve(made.tasks(), drain=made.drain))
    await eventually(lambda: made.is_leader and not made.waiting() and made.commits.settled)
    heard: list[str] = []

    async def hear(message: m.RequestAnswered, _: Received) -> None:
        heard.append(message.request)

    world.post.subscribe(m.RequestAnswered, hear)
    world.disk.broken = True
    await world.post.send(m.AbortRequested(request="a", rollout="none"), client="ops")
    with pytest.raises(BaseExceptionGroup) as caught:
        async with asyncio.timeout(PATIENCE_S):
            await serving
    found = list(_leaves(caught.value))
    assert found
    assert all(isinstance(each, SyncFailed) for each in found)
    assert "c.sqlite: [Errno 5] Input/output error" in str(found[0])
    assert found[0].exit_code == 1  # type: ignore[attr-defined]
    assert not heard
    store.database.close()


async def test_a_coordinator_that_is_stopped_does_not_wait_for_its_disk_for_long(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("caesura_coordinator.service._FLUSH_S", 0.1)
    async with world.coordinator() as made:
        await _obeyed(world, made)
        world.disk.hold()
        made.repository.store_response("ops", m.RequestAnswered(request="a", accepted=False, reason="r"))
        with capture_logs() as logs:
            async with asyncio.timeout(PATIENCE_S):
                await made.drain()
        assert [each["messages"] for each in logs if each["event"] == "outbox.not_on_disk"] == [1]
        assert not world.of(m.RequestAnswered)
        assert not world.of(m.CoordinatorPresence)[-1].online, "it says goodbye all the same"


def _leaves(group: BaseExceptionGroup[Any]) -> list[BaseException]:
    return [
        leaf
        for each in group.exceptions
        for leaf in (_leaves(each) if isinstance(each, BaseExceptionGroup) else [each])
    ]


def _commanded_or_over(world: World, made: Coordinator, rollout: str) -> bool:
    commanded = any(each.rollout == rollout for each in world.of(m.StartOperation))
    return commanded or made.repository.rollouts[rollout].status != "running"


class Images:
    """What a power cut would leave, looked at before each message goes out: it must have everything that the message tells of."""

    def __init__(self, path: Path, disk: Disk) -> None:
        self._path = path
        self._disk = disk
        self.at_start_bytes = 0
        self.looked = 0

    def began(self) -> None:
        """What is in the WAL now was synced when it was opened."""
        self.at_start_bytes = Path(f"{self._path}-wal").stat().st_size

    def __call__(self, message: Message) -> None:
        wanted = self._wanted(message)
        if wanted is None:
            return
        sql, values, enough = wanted
        image = self._path.with_name("image.sqlite")
        for suffix in ("", "-wal", "-shm"):
            Path(f"{image}{suffix}").unlink(missing_ok=True)
        shutil.copy(self._path, image)
        with Path(f"{self._path}-wal").open("rb") as log:
            synced = log.read(max(self._disk.synced_bytes, self.at_start_bytes))
        Path(f"{image}-wal").write_bytes(synced)
        with closing(sqlite3.connect(image)) as found:
            rows = found.execute(sql, values).fetchall()
        assert any(enough(*row) for row in rows), (
            f"{message} was published, and a power cut takes what it tells of: {rows}"
        )
        self.looked += 1

    @staticmethod
    def _wanted(message: Message) -> tuple[str, tuple[Any, ...], Callable[..., bool]] | None:
        match message:
            case m.CoordinatorPresence():
                return "SELECT value FROM epoch", (), lambda epoch: epoch >= message.epoch
            case m.SetDocument():
                return (
                    "SELECT body FROM document WHERE set_name = ?",
                    (message.set,),
                    lambda body: (
                        msgspec.json.decode(body, type=m.SetDocument).incarnation >= message.incarnation
                    ),
                )
            case m.VmOwner():
                return "SELECT host FROM owner WHERE vm = ?", (message.vm,), lambda host: host == message.host
            case m.RequestAnswered():
                return (
                    "SELECT body FROM answer WHERE request = ?",
                    (message.request,),
                    lambda body: (
                        msgspec.json.decode(body, type=m.RequestAnswered).accepted == message.accepted
                    ),
                )
            case m.RolloutState():
                return (
                    "SELECT body FROM rollout WHERE id = ?",
                    (message.rollout,),
                    lambda body: message.status == "running" or b'"running"' not in body[:4000],
                )
            case m.StartOperation():
                return (
                    "SELECT body FROM wave_part WHERE rollout = ? AND kind = 'operation'",
                    (message.rollout,),
                    lambda body: message.operation.encode() in body,
                )
            case _:
                return None


@pytest.mark.parametrize("seed", range(4))
async def test_a_power_cut_takes_nothing_that_was_published(
    seed: int, world: World, host: Callable[..., Any], build: Callable[..., Any]
) -> None:
    """Random rollouts, aborts and inventories over a disk of varying speed, looked at before every message that goes out."""
    chance = random.Random(seed)

    class Uneven(Disk):
        def __call__(self, file: int) -> None:
            time.sleep(chance.choice((0.0, 0.0, 0.002, 0.02)))  # the disk's own time
            super().__call__(file)

    world.disk = Uneven()
    images = Images(world.path, world.disk)
    world.inventories = [
        host(f"h{n}", build(f"w{n}", f"set{n % 2}", domain=n // 2, agent=False)) for n in range(4)
    ]
    world.reports = chance.choice((("accepted",), ("accepted", "failed"), ()))
    async with world.coordinator() as made:
        images.began()
        world.before_published = images
        await _obeyed(world, made)
        for number in range(10):
            sets = chance.choice((("set0",), ("set1",), ("set0", "set1")))
            request = f"q{number}"
            await world.post.send(_request(request, selection=m.Selection(sets=sets)), client="ops")
            await eventually(partial(lambda name: name in world.answers(), request))
            rollout = world.answers()[request].rollout
            if rollout and chance.random() < 0.7:
                await world.approve(rollout)
                await eventually(partial(_commanded_or_over, world, made, rollout))
            for active in made.repository.active:
                if chance.random() < 0.6:
                    abort = m.AbortRequested(request=f"a{number}{active.id}", rollout=active.id)
                    await world.post.send(abort, client="ops")
        await eventually(lambda: made.commits.settled and not made.bus.stats.backlog)
        assert not any(task.done() for task in made.running)  # type: ignore[attr-defined]
    assert images.looked > 20
    assert world.of(m.StartOperation)
