"""A plan is made in a thread: what the event loop does in the meantime, and what requests, leadership and a stop may do to it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
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
