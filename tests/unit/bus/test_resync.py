"""State without retained messages: readers ask until they are heard, writers answer once, and without need nothing happens."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from caesura.bus.memory import MemoryBroker, MemoryBus
from caesura.bus.messaging import MessageClient
from caesura.bus.resync import Resync
from caesura.contract.codec import Received
from caesura.contract.messages import AgentResyncRequested, FleetResyncRequested
from caesura.contract.topics import channel_of
from caesura_testing.collector import eventually


class _Fleet:
    """A broker, the bus of a reader and writer, and a coordinator played by the test."""

    def __init__(self, *, enabled: bool = True) -> None:
        self.broker = MemoryBroker()
        self.published = 0
        self.requests = 0
        self.delays: list[float] = []
        self.client = MessageClient(MemoryBus(self.broker), "/test/vm")
        self.coordinator = MessageClient(
            MemoryBus(self.broker, filters=[channel_of(AgentResyncRequested).filter()]), "/test/coordinator"
        )
        self.coordinator.subscribe(AgentResyncRequested, self._on_request)
        self.resync = Resync(
            self.client,
            enabled=enabled,
            request=lambda: AgentResyncRequested(vm="web-1"),
            publish=self._publish,
            uniform=self._uniform,
            vm="web-1",
        )

    def _uniform(self, _: float, high: float) -> float:
        self.delays.append(high)
        return min(high, 0.01)

    async def _publish(self) -> None:
        self.published += 1

    async def _on_request(self, _: AgentResyncRequested, __: Received) -> None:
        self.requests += 1

    async def ask(self, spread_s: float = 1.0) -> None:
        await self.coordinator.send(FleetResyncRequested(coordinator="c", spread_s=spread_s))

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        async def connected() -> None:
            self.resync.connected()

        tasks = [
            asyncio.ensure_future(self.client.bus.run(self.client.deliver, connected)),
            asyncio.ensure_future(self.coordinator.bus.run(self.coordinator.deliver)),
            asyncio.ensure_future(self.resync.run()),
        ]
        assert await self.coordinator.bus.wait_connected(10)
        assert await self.client.bus.wait_connected(10)
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


async def test_a_reader_asks_until_the_writers_are_asked() -> None:
    fleet = _Fleet()
    async with fleet.running():
        await eventually(lambda: fleet.requests >= 3)
        assert not fleet.resync.answered.is_set()
        await fleet.ask()
        await eventually(fleet.resync.answered.is_set)
        asked = fleet.requests
        await eventually(lambda: fleet.published == 1)
        for _ in range(100):
            await asyncio.sleep(0)
        assert fleet.requests <= asked + 1


async def test_after_a_new_connection_it_is_asked_again() -> None:
    fleet = _Fleet()
    async with fleet.running():
        await fleet.ask()
        await eventually(fleet.resync.answered.is_set)
        asked = fleet.requests
        fleet.broker.down()
        fleet.broker.up()
        await eventually(lambda: fleet.requests > asked)


async def test_several_requests_at_once_are_answered_by_one_publication() -> None:
    fleet = _Fleet()
    async with fleet.running():
        await asyncio.gather(*(fleet.ask(spread_s=30.0) for _ in range(20)))
        await eventually(lambda: fleet.published >= 1)
        assert fleet.published < 20
        assert 30.0 in fleet.delays, "the writer waits a part of the spread"


async def test_where_retained_messages_are_trusted_nothing_is_sent_and_nothing_answered() -> None:
    fleet = _Fleet(enabled=False)
    async with fleet.running():
        await fleet.ask()
        for _ in range(200):
            await asyncio.sleep(0)
    assert (fleet.requests, fleet.published) == (0, 0)
    assert channel_of(FleetResyncRequested).filter() not in getattr(fleet.client.bus, "filters")  # noqa: B009
