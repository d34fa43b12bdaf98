"""A plan is made in a thread: what the event loop does in the meantime, and what requests, leadership and a stop may do to it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from caesura.bus.memory import MemoryBroker, MemoryBus
from caesura.bus.messaging import MessageClient
from caesura.contract import messages as m
from caesura.contract.codec import Received
from caesura_coordinator import requests
from caesura_coordinator.proposal import Proposal
from caesura_coordinator.proposal import propose as real_propose
from caesura_coordinator.service import Coordinator, subscriptions
from caesura_coordinator.store import CoordinatorStore
from caesura_testing.collector import PATIENCE_S, eventually


class SlowPlans:
    """Plans that are not ready before the test allows it."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        """The requests whose plan was begun."""
        self.allowed = threading.Event()

    def propose(self, fleet: Any, request: Any, **options: Any) -> Proposal:
        self.asked.append(request.request)
        assert self.allowed.wait(PATIENCE_S), "nobody could allow it: the event loop was held up by the plan"
        return real_propose(fleet, request, **options)


class World:
    """A broker with one host, coordinators on it, and the answers that an operator receives."""

    def __init__(self, folder: Path, plans: SlowPlans, patch: pytest.MonkeyPatch) -> None:
        self.plans = plans
        self._patch = patch
        self.broker = MemoryBroker()
        self.answers: list[m.RequestAnswered] = []
        self._folder = folder
        self._bus = MemoryBus(self.broker, client_id="ops", filters=["#"])
        self.post = MessageClient(self._bus, "/caesura/ctl/ops")
        self.post.subscribe(m.RequestAnswered, self._on_answer)
        self._running: list[asyncio.Future[Any]] = [
            asyncio.ensure_future(self._bus.run(self.post.deliver)),
        ]

    async def connected(self) -> None:
        await self._bus.wait_connected(PATIENCE_S)

    async def _on_answer(self, answer: m.RequestAnswered, _: Received) -> None:
        self.answers.append(answer)

    async def coordinator(self, *, settled: asyncio.Event | None = None) -> Coordinator:
        """One that is on the bus, and leads soon; ``settled``: no sooner than this."""
        store = CoordinatorStore(str(self._folder / "c.sqlite"))
        bus = MemoryBus(self.broker, client_id="c", filters=subscriptions(), clean=False)
        made = Coordinator(bus, store, instance="c", settle_s=0.05)
        if settled is not None:
            self._patch.setattr(made.leadership, "settled", settled.wait)
        self._running += [asyncio.ensure_future(start()) for start in made.tasks().values()]
        await bus.wait_connected(PATIENCE_S)
        return made

    async def end(self) -> None:
        """Without a goodbye, as by kill -9."""
        running, self._running = self._running, []
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)

    async def end_coordinator(self) -> None:
        """The same of the coordinator only."""
        operator, *others = self._running
        self._running = others
        await self.end()
        self._running = [operator]

    async def report(self, inventory: m.HostInventory) -> None:
        await self.post.send(
            m.HostPresence(host=inventory.host, online=True, instance="i"), host=inventory.host
        )
        await self.post.send(inventory, host=inventory.host)

    async def ask(self, request: m.RolloutRequested | m.AbortRequested) -> None:
        await self.post.send(request, client="ops")

    async def until_planning(self, *requested: str) -> None:
        await eventually(lambda: self.plans.asked == [*requested])


@pytest.fixture
async def world(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, host: Callable[..., Any], build: Callable[..., Any]
) -> AsyncIterator[World]:
    plans = SlowPlans()
    monkeypatch.setattr(requests, "propose", plans.propose)
    made = World(tmp_path, plans, monkeypatch)
    await made.connected()
    await made.report(host("h1", build("w1")))
    yield made
    plans.allowed.set()
    await made.end()


def _start(name: str, **values: Any) -> m.RolloutRequested:
    return m.RolloutRequested(request=name, update="patch", policy=m.Policy(notice_s=600.0), **values)


async def test_the_event_loop_turns_while_a_plan_is_made(world: World) -> None:
    leader = await world.coordinator()
    await world.ask(_start("q"))
    await world.until_planning("q")
    # More than a tick of the rollouts, whose task runs in the same loop.
    for _ in range(3):
        await asyncio.sleep(0.1)
    assert not leader.repository.rollouts
    world.plans.allowed.set()
    await eventually(lambda: [each.accepted for each in world.answers] == [True])
    assert len(leader.repository.active) == 1


@pytest.mark.parametrize("said", ["ready", "another domain paused"])
async def test_no_time_passes_for_rollouts_while_what_arrives_is_not_read(
    world: World, host: Callable[..., Any], build: Callable[..., Any], said: str
) -> None:
    """A dry run of a large fleet must not make an agent silent that has answered, nor open a gate that a report closes."""
    leader = await world.coordinator()
    await eventually(lambda: leader.is_leader)
    mine = {"epoch": leader.authority.epoch, "coordinator": leader.authority.coordinator}
    await world.report(host("h1", build("w1", domain=0), **mine))
    await world.report(host("h2", build("w2", domain=1), **mine))
    for vm in ("w1", "w2"):
        await world.post.send(m.AgentPresence(vm=vm, online=True, boot_id="b"), vm=vm)
    commanded: list[str] = []

    async def on_start(command: m.StartOperation, _: Received) -> None:
        commanded.append(command.host)

    world.post.subscribe(m.StartOperation, on_start)
    world.plans.allowed.set()
    await world.ask(m.RolloutRequested(request="q", update="patch", policy=m.Policy(notice_s=1.0)))
    await eventually(lambda: any(each.waves[0].status == "scheduled" for each in leader.repository.active))
    world.plans.allowed.clear()
    (rollout,) = leader.repository.active
    ready = m.VmReady(vm="w1", event_id=rollout.waves[0].events[0].event_id, ready=True)
    if said != "ready":
        await world.post.send(ready, vm="w1")
        await eventually(lambda: bool(leader.repository.active[0].waves[0].readiness))
    await world.ask(_start("dry", plan_only=True))
    await world.until_planning("q", "dry")
    if said == "ready":
        await world.post.send(ready, vm="w1")
    else:
        await world.report(host("h2", build("w2", domain=1, state="paused"), **mine))
    begins = rollout.waves[0].not_before
    assert begins is not None
    judged = begins + timedelta(seconds=1)  # with the next tick after it, at the latest
    await eventually(lambda: datetime.now(UTC) > judged)
    assert leader.repository.active[0].status == "running"
    assert not commanded
    world.plans.allowed.set()
    if said == "ready":
        await eventually(lambda: commanded == ["h1"])
    else:
        await eventually(lambda: any(each.request == "dry" for each in world.answers))
        await eventually(lambda: leader.fleet.inventories["h2"].vms[0].state == "paused")
        assert not commanded


async def test_a_take_over_is_announced_before_the_plans_of_those_who_waited_are_made(world: World) -> None:
    """No host obeys the new epoch before, so the rollouts that were taken over would stand."""
    settled = asyncio.Event()
    seen: list[int] = []

    async def on_coordinator(presence: m.CoordinatorPresence, _: Received) -> None:
        seen.append(presence.epoch)

    world.post.subscribe(m.CoordinatorPresence, on_coordinator)
    leader = await world.coordinator(settled=settled)
    await world.ask(_start("first"))
    await eventually(lambda: len(leader.requests.pending) == 1)
    settled.set()
    await world.until_planning("first")
    await eventually(lambda: leader.authority.epoch in seen)
    assert not world.answers


async def test_requests_of_another_fleet_are_refused_by_name_and_an_abort_is_carried_out(
    world: World,
) -> None:
    """A pipeline with the address of the wrong broker must not update the wrong cell."""
    leader = await world.coordinator()
    await eventually(lambda: leader.is_leader)
    world.plans.allowed.set()
    other = MessageClient(world.post.bus, "/caesura/berlin/ctl/ops")
    await other.send(_start("q"), client="ops")
    await eventually(lambda: len(world.answers) == 1)
    assert world.answers[0].codes == ("request_of_another_fleet",)
    assert "fleet 'default'" in world.answers[0].reason
    assert "fleet 'berlin'" in world.answers[0].reason
    await world.ask(_start("mine"))
    await eventually(lambda: len(leader.repository.active) == 1)
    await other.send(m.AbortRequested(request="a", reason="stop"), client="ops")
    await eventually(lambda: [each.status for each in leader.repository.rollouts.values()] == ["aborted"])


async def test_an_abort_behind_a_start_whose_plan_is_being_made_ends_what_it_started(world: World) -> None:
    leader = await world.coordinator()
    await world.ask(_start("q"))
    await world.until_planning("q")
    await world.ask(m.AbortRequested(request="a", reason="changed my mind"))
    world.plans.allowed.set()
    await eventually(lambda: len(world.answers) == 2)
    started, aborted = world.answers
    assert (started.request, aborted.request) == ("q", "a"), "in the order of arrival"
    assert started.accepted
    assert aborted.accepted
    assert aborted.rollout == started.rollout
    await eventually(lambda: leader.repository.rollouts[started.rollout].status == "aborted")


async def test_a_request_that_is_repeated_while_its_plan_is_made_starts_one_rollout(world: World) -> None:
    leader = await world.coordinator()
    await world.ask(_start("q"))
    await world.until_planning("q")
    await world.ask(_start("q"))
    await world.ask(_start("q"))
    await world.ask(_start("behind"))
    world.plans.allowed.set()
    await eventually(lambda: bool(world.answers) and world.answers[-1].request == "behind")
    assert world.plans.asked == ["q", "behind"], "repetitions make no plan"
    assert len({each.rollout for each in world.answers if each.request == "q"}) == 1
    assert len(leader.repository.rollouts) == 1
    assert "is held by rollout" in world.answers[-1].reason


async def test_a_coordinator_that_loses_the_lead_while_it_plans_starts_nothing(world: World) -> None:
    leader = await world.coordinator()
    await world.ask(_start("q"))
    await world.until_planning("q")
    other = m.CoordinatorPresence(coordinator="other", epoch=leader.authority.epoch + 1, online=True)
    received: Any = SimpleNamespace(header=SimpleNamespace(source="/caesura/coordinator/other"))
    await leader.leadership.on_coordinator(other, received)
    assert not leader.is_leader
    world.plans.allowed.set()
    await eventually(lambda: not leader.requests.deciding)
    assert not leader.repository.rollouts
    assert leader.repository.response("ops", "q") is None, "the next leader answers it"
    assert [name for _, name in leader.requests.pending] == ["q"], "which may be this one"


@pytest.mark.parametrize("refused", [True, False])
async def test_a_coordinator_that_is_killed_while_it_plans_plans_again_afterwards(
    world: World, *, refused: bool
) -> None:
    """Nothing of it is stored, so the broker must have it still."""
    first = await world.coordinator()
    await eventually(lambda: first.is_leader)  # what arrives before is acknowledged at once
    await world.ask(_start("q", selection=m.Selection(hosts=("nowhere",) if refused else ())))
    await world.until_planning("q")
    await world.end_coordinator()
    world.plans.allowed.set()
    again = await world.coordinator()
    await eventually(lambda: [each.accepted for each in world.answers] == [not refused])
    assert world.plans.asked == ["q", "q"]
    assert len(again.repository.rollouts) == (not refused)


async def test_requests_behind_those_that_waited_for_a_leader_are_answered_after_them(
    world: World, host: Callable[..., Any], build: Callable[..., Any]
) -> None:
    settled = asyncio.Event()
    leader = await world.coordinator(settled=settled)
    await world.ask(_start("first"))
    await world.ask(_start("second", selection=m.Selection(hosts=("h1",))))
    await eventually(lambda: len(leader.requests.pending) == 2)
    settled.set()
    await world.until_planning("first")
    assert leader.is_leader
    # What hosts report is taken in meanwhile, and the request after it waits for its turn.
    await world.report(host("h2", build("w2")))
    await eventually(lambda: "h2" in leader.fleet.inventories)
    await world.ask(m.AbortRequested(request="a"))
    world.plans.allowed.set()
    await eventually(lambda: len(world.answers) == 3)
    assert [each.request for each in world.answers] == ["first", "second", "a"]
    (rollout,) = leader.repository.rollouts.values()
    assert [vm.vm for wave in rollout.waves for vm in wave.vms] == ["w1"], "h2 reported after its plan"
