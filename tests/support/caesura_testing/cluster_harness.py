"""The bus conformance suite over a cluster of brokers that lives longer than one test."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack
from typing import Literal, TypeVar

from caesura.bus.mqtt import MqttBus
from caesura.bus.options import BrokerOptions
from caesura.bus.port import Bus, Will
from caesura.conformance.bus_harness import BrokerCapabilities, BusHarness
from caesura.conformance.buses import BusConformance
from caesura.contract.access import Principal
from caesura.runtime.identity import new_id
from caesura.runtime.settings import Secret
from caesura_testing.broker_nodes import BrokerCluster
from caesura_testing.collector import Collector, running
from caesura_testing.proxy import TcpProxy

_RETAINED_S = 0.5
USER, PASSWORD = "suite", "correct horse"
Cluster = TypeVar("Cluster", bound=BrokerCluster)


@contextlib.contextmanager
def started(cluster: Cluster) -> Iterator[Cluster]:
    """For a fixture of a module: it takes seconds until a cluster has a leader."""
    try:
        asyncio.run(cluster.start())
        yield cluster
    finally:
        asyncio.run(cluster.close())


def password_of(user: Principal) -> str:
    """Of a user of a test's cluster."""
    return f"password of {user.username}"


def bus_as(
    cluster: BrokerCluster,
    user: Principal,
    *filters: str,
    client_id: str = "",
    url: str = "",
    will: Will | None = None,
    clean: bool = True,
) -> MqttBus:
    """A bus of this user, with ``password_of``. Default of ``url``: all nodes."""
    options = BrokerOptions(
        url=url or cluster.url,
        client_id=client_id,
        username=user.username,
        password=Secret(password_of(user)),
        protocol="3.1.1",
        clean=clean,
        reconnect_min_s=0.05,
        reconnect_max_s=0.5,
    )
    return MqttBus(options, filters=filters, will=will)


class ClusterConformance(BusConformance):
    """The suite, without what depends on the client alone: each of these tests needs a new cluster afterwards."""

    test_a_publish_in_flight_fails_as_soon_as_the_broker_dies = None  # type: ignore[assignment]
    test_who_tries_again_at_once_does_not_keep_the_end_of_the_connection_from_being_noticed = None  # type: ignore[assignment]
    test_a_publish_without_an_answer_ends_with_its_timeout = None  # type: ignore[assignment]


class ClusterHarness(BusHarness):
    """A cluster, and for each named client a proxy before one of its nodes.

    Args:
        missing: what its brokers do not promise.
    """

    def __init__(
        self,
        cluster: BrokerCluster,
        stack: AsyncExitStack,
        *,
        missing: Mapping[BrokerCapabilities, str],
        protocol: Literal["auto", "3.1.1"] = "3.1.1",
    ) -> None:
        self.missing = missing
        self._cluster = cluster
        self._stack = stack
        self._protocol: Literal["auto", "3.1.1"] = protocol
        self._proxies: dict[str, TcpProxy] = {}
        self._test = new_id()[:8]
        """Part of every client id: the cluster keeps the sessions of earlier tests."""

    async def bus(
        self,
        client_id: str = "",
        *,
        filters: Sequence[str] = (),
        will: Will | None = None,
        clean: bool = True,
        backlog_limit: int = 1_000,
        backlog_bytes: int = 1_000_000,
    ) -> Bus:
        url = self._cluster.url
        if client_id:
            if client_id not in self._proxies:
                node = self._cluster.nodes[len(self._proxies) % len(self._cluster.nodes)]
                proxy = TcpProxy("127.0.0.1", node.port)
                self._proxies[client_id] = await self._stack.enter_async_context(proxy)
            url = self._proxies[client_id].url
            client_id = f"{client_id}-{self._test}"
        options = BrokerOptions(
            url=url,
            client_id=client_id,
            username=USER,
            password=Secret(PASSWORD),
            protocol=self._protocol,
            clean=clean,
            backlog_limit=backlog_limit,
            backlog_bytes=backlog_bytes,
            reconnect_min_s=0.05,
            reconnect_max_s=0.5,
        )
        return MqttBus(options, filters=filters, will=will)

    async def until_stored(self, payload: bytes) -> None:
        """Nothing to wait for: what a cluster has acknowledged is on most of its nodes."""

    async def cut(self, client_id: str) -> None:
        self._proxies[client_id].cut()

    async def stall(self) -> None:
        for node in self._cluster.nodes:
            node.hang()

    async def kill(self) -> None:
        await self._cluster.kill()

    async def revive(self) -> None:
        await self._cluster.start()


@contextlib.asynccontextmanager
async def harness_over(
    cluster: BrokerCluster,
    *,
    missing: Mapping[BrokerCapabilities, str],
    protocol: Literal["auto", "3.1.1"] = "3.1.1",
) -> AsyncIterator[ClusterHarness]:
    """A harness for one test; the next one finds all nodes running, and nothing retained."""
    for node in cluster.nodes:
        node.wake()
    await cluster.start()
    async with AsyncExitStack() as stack:
        harness = ClusterHarness(cluster, stack, missing=missing, protocol=protocol)
        yield harness
        for node in cluster.nodes:
            node.wake()
        await cluster.start()
        left = Collector()
        end = b"end of " + new_id().encode()
        async with running(await harness.bus(filters=["open/#"]), left.receive) as _:
            sweeper = await harness.bus()
            async with running(sweeper):
                await sweeper.publish("open/end", end)
                await left.until_payload(end)
                # What is retained is sent beside what is published, and nothing marks its end.
                await asyncio.sleep(_RETAINED_S)
                for topic in {each.topic for each in left.deliveries if each.retained}:
                    await sweeper.publish(topic, b"", retain=True)
