"""Two coordinators, one PostgreSQL, two hosts with real processes; the path to database and broker can be cut for each coordinator alone."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, suppress
from typing import Any, Self

import aiohttp
import pytest

from caesura.bus.local_broker import LocalBroker, free_port
from caesura.bus.messaging import MessageClient
from caesura.bus.mqtt import MqttBus
from caesura.bus.options import BrokerOptions
from caesura.contract import messages as m
from caesura.contract.codec import Received
from caesura.contract.topics import channel_of
from caesura_ctl.fleet_view import FleetView
from caesura_ctl.session import connect
from caesura_ctl.settings import CtlSettings
from caesura_testing.postgresql import PostgresServer, programs
from caesura_testing.proxy import TcpProxy
from caesura_testing.sandbox import Sandbox, Vm

LEASE_S = 4.0
_ENDS = {"completed", "cancelled", "failed"}


class History:
    """What one subscriber and one polling workload see from beginning to end; checked in the end.

    A message may come twice, under one id (at least once). Nothing may be missing, have another end, or be seen to go back by a workload.
    """

    def __init__(self, broker: LocalBroker, metadata: str) -> None:
        kinds = (m.EventChanged, m.SetDocument)
        filters = [channel_of(kind).filter() for kind in kinds]
        self._bus = MqttBus(BrokerOptions(url=broker.url, client_id="history", clean=False), filters=filters)
        self._post = MessageClient(self._bus, "/caesura/test/history")
        self._post.subscribe(m.EventChanged, self._event)
        self._post.subscribe(m.SetDocument, self._document)
        self._url = f"http://{metadata}/metadata/scheduledevents?api-version=2020-07-01"
        self.events: dict[str, dict[str, m.EventChanged]] = defaultdict(dict)
        """Event to its facts, by the id of the message."""
        self.documents: list[m.SetDocument] = []
        self.polls: list[tuple[int, dict[str, str]]] = []
        """Incarnation, and the status of each event, of every answer that differs from the one before."""
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Self:
        self._tasks = [
            asyncio.create_task(self._bus.run(self._post.deliver)),
            asyncio.create_task(self._poll()),
        ]
        assert await self._bus.wait_connected(30)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._bus.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _event(self, fact: m.EventChanged, received: Received) -> None:
        known = self.events[fact.event_id].setdefault(received.header.id, fact)
        assert known == fact, "one id, one fact"

    async def _document(self, document: m.SetDocument, _: Received) -> None:
        self.documents.append(document)

    async def _poll(self) -> None:
        async with aiohttp.ClientSession(headers={"Metadata": "true"}) as session:
            while True:
                with suppress(aiohttp.ClientError):
                    async with session.get(self._url) as answer:
                        if answer.status == 200:
                            body = await answer.json()
                            shown = {each["EventId"]: each["EventStatus"] for each in body["Events"]}
                            seen = body["DocumentIncarnation"], shown
                            if not self.polls or self.polls[-1] != seen:
                                self.polls.append(seen)
                await asyncio.sleep(0.02)

    def check(self) -> None:
        """Every event was announced once, in order, with one end; a workload saw no incarnation twice and none go back."""
        assert self.events
        for event_id, by_id in self.events.items():
            statuses = [fact.status for fact in by_id.values()]
            assert statuses[0] == "scheduled", f"{event_id}: {statuses}"
            assert len(statuses) == len(set(statuses)), (
                f"{event_id} has a fact twice under two ids: {statuses}"
            )
            assert sum(status in _ENDS for status in statuses) == 1, f"{event_id}: {statuses}"
            incarnations = [fact.incarnation for fact in by_id.values()]
            assert incarnations == sorted(set(incarnations)), f"{event_id}: {incarnations}"
        incarnations = [incarnation for incarnation, _ in self.polls]
        assert incarnations == sorted(set(incarnations)), f"a workload saw {self.polls}"
        order = {"Scheduled": 0, "Started": 1}
        for event_id in {event_id for _, shown in self.polls for event_id in shown}:
            seen = [order[shown[event_id]] if event_id in shown else 2 for _, shown in self.polls]
            since = seen[next(number for number, each in enumerate(seen) if each < 2) :]
            assert since == sorted(since), f"event {event_id} went back: {self.polls}"
        newest = max(self.documents, key=lambda each: (each.incarnation, each.revision))
        assert not newest.events
        assert self.polls[-1][1] == {}


class Pair:
    """Two coordinators ``one`` and ``two`` with the tools to hurt each alone, on a stage."""

    def __init__(
        self, stage: Any, server: PostgresServer, history: History, proxies: dict[str, TcpProxy]
    ) -> None:
        self.stage = stage
        self.sandbox: Sandbox = stage.sandbox
        self.server = server
        self.history = history
        self.databases = {name: proxies[f"{name}.database"] for name in ("one", "two")}
        self.brokers = {name: proxies[f"{name}.broker"] for name in ("one", "two")}

    def status(self, name: str) -> m.CoordinatorStatus | None:
        view: FleetView = self.stage.fleet_view
        return view.coordinators.get(name)

    def leads(self, name: str) -> bool:
        """Whether all hosts obey it."""
        view = self.stage.fleet_view
        boss = view.coordinator
        return (
            boss is not None
            and boss.online
            and boss.coordinator.startswith(f"{name}-")
            and all(view.hosts[host].coordinator == boss.coordinator for host in ("host-1", "host-2"))
        )

    async def until_leads(self, name: str, timeout_s: float = 30.0) -> None:
        await self.sandbox.until(lambda: self.leads(name), timeout_s, f"{name} leads and both hosts obey it")

    async def until_stands_by(self, name: str, timeout_s: float = 30.0) -> None:
        def there() -> bool:
            status = self.status(name)
            return (
                status is not None
                and status.online
                and not status.leads
                and status.waits_for.startswith("another")
            )

        await self.sandbox.until(there, timeout_s, f"{name} stands by")

    async def up(self) -> None:
        """``one`` leads, ``two`` stands by, everything is ready."""
        await self.sandbox.start("one", "host-1", "host-2", "metadata")
        await self.stage.ready("host-1", "host-2")
        await self.sandbox.start("two")
        await self.until_stands_by("two")

    async def done(self, rollout: str) -> None:
        """The rollout completes without an operator, each VM was paused once, never two domains at once, and no event was lost or repeated."""
        ended = await self.stage.ended(rollout, timeout_s=90)
        assert ended.status == "completed", ended.reason
        await self.stage.none_frozen()
        self.stage.assert_order()
        assert [each.vm for each in self.sandbox.watch.pauses] == ["web-1", "web-2"], (
            "each was paused exactly once"
        )
        await self.sandbox.until(
            lambda: bool(self.history.polls) and not self.history.polls[-1][1],
            15,
            "the workload sees no event",
        )
        self.history.check()


@pytest.fixture
async def duo(broker: LocalBroker, new_stage: type[Any]) -> AsyncIterator[Callable[..., Any]]:
    """``await duo()`` gives a ``Pair``; nothing is started yet."""
    if programs() is None:
        pytest.skip("postgresql is not installed (on Debian: apt-get install postgresql)")
    async with AsyncExitStack() as stack:

        async def make(**settings: str) -> Pair:
            server = await stack.enter_async_context(PostgresServer())
            sandbox = await stack.enter_async_context(Sandbox(broker))
            session = await stack.enter_async_context(
                connect(CtlSettings(broker_url=broker.url, client="e2e"))
            )
            listen = f"127.0.0.1:{free_port()}"
            proxies: dict[str, TcpProxy] = {}
            for name in ("one", "two"):
                database = proxies[f"{name}.database"] = await stack.enter_async_context(
                    TcpProxy("127.0.0.1", server.port)
                )
                link = proxies[f"{name}.broker"] = await stack.enter_async_context(
                    TcpProxy(broker.host, broker.port)
                )
                values = {
                    "store": server.url.replace(str(server.port), str(database.port)),
                    "lease_s": str(LEASE_S),
                    "broker_url": link.url,
                    **settings,
                }
                sandbox.coordinator(name, **values)
            sandbox.update("patch", ["sleep", "1.5"], expected_s=1.5)
            sandbox.host("host-1", Vm(name="web-1", set="web", update_domain=0))
            sandbox.host("host-2", Vm(name="web-2", set="web", update_domain=1))
            sandbox.publisher({"web-1": listen})
            history = await stack.enter_async_context(History(broker, listen))
            stage = new_stage(sandbox, session)
            stage.notice_s = 2.0
            return Pair(stage, server, history, proxies)

        yield make
