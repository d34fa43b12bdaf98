"""A three-node RabbitMQ cluster with the shipped configuration: why its retained messages are ignored, and what a user may not do."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest

from caesura.bus.mqtt import MqttBus
from caesura.bus.port import BusUnavailable, Will
from caesura.contract.access import Principal, rabbitmq_definitions
from caesura.contract.messages import AgentPresence, SetDocument, VmOwner
from caesura.contract.topics import PREFIX, channel_of
from caesura_testing.cluster_harness import bus_as, password_of, started
from caesura_testing.collector import Collector, eventually, running
from caesura_testing.proxy import TcpProxy
from caesura_testing.rabbitmq_cluster import RabbitmqCluster, rabbitmq_server

pytestmark = pytest.mark.skipif(not rabbitmq_server(), reason="rabbitmq-server is not installed")

_WEB_1, _WEB_2 = Principal("vm", "web-1", "web"), Principal("vm", "web-2", "db")
_COORDINATOR = Principal("coordinator")
_USERS = (_WEB_1, _WEB_2, _COORDINATOR)
_IDS = {_WEB_1: "caesura-vm-web-1", _WEB_2: "caesura-vm-web-2", _COORDINATOR: "coordinator"}
_DOCUMENT = channel_of(SetDocument).topic(set="web")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RabbitmqCluster]:
    passwords = {each.username: password_of(each) for each in _USERS}
    folder = tmp_path_factory.mktemp("rabbitmq")
    with started(RabbitmqCluster(folder, rabbitmq_definitions(_USERS), passwords)) as cluster:
        yield cluster


def bus_of(
    cluster: RabbitmqCluster, user: Principal, *filters: str, client_id: str = "", **more: Any
) -> MqttBus:
    """With the client id that the user's service has: a user may use its own only."""
    return bus_as(cluster, user, *filters, client_id=client_id or _IDS[user], **more)


async def test_what_is_retained_is_of_one_node_and_not_for_wildcards(cluster: RabbitmqCluster) -> None:
    """The reason for BROKER_RETAINED=ignored: a reader gets nothing, or at one node something that may be old."""
    first, second, _ = cluster.nodes
    sender = bus_of(cluster, _COORDINATOR, url=first.url)
    async with running(sender):
        await sender.publish(_DOCUMENT, b"kept", retain=True)
        for url, expected in ((first.url, [b"kept", b"end"]), (second.url, [b"end"])):
            got = Collector()
            async with running(bus_of(cluster, _WEB_1, _DOCUMENT, url=url), got.receive):
                await sender.publish(_DOCUMENT, b"end")
                await got.until_payload(b"end")
            assert got.payloads == expected
    # A coordinator reads documents by a wildcard.
    got = Collector()
    reader = bus_of(cluster, _COORDINATOR, channel_of(SetDocument).filter(), url=first.url)
    async with running(reader, got.receive):
        await reader.publish(_DOCUMENT, b"live")
        await got.until_payload(b"live")
    assert got.payloads == [b"live"]


async def test_a_session_continues_at_another_node(cluster: RabbitmqCluster) -> None:
    sender, got = bus_of(cluster, _COORDINATOR), Collector()
    async with running(sender):
        at_first = bus_of(cluster, _WEB_1, _DOCUMENT, url=cluster.nodes[0].url, clean=False)
        async with running(at_first, got.receive):
            await sender.publish(_DOCUMENT, b"here")
            await got.until_payload(b"here")
        await sender.publish(_DOCUMENT, b"away")
        at_second = bus_of(cluster, _WEB_1, _DOCUMENT, url=cluster.nodes[1].url, clean=False)
        async with running(at_second, got.receive):
            await got.until_payload(b"away")


@pytest.mark.parametrize(
    "topic_filter",
    [
        "#",
        f"{PREFIX}/#",
        "+/v1/vm/web-1/presence",
        channel_of(AgentPresence).topic(vm="web-1"),
        channel_of(VmOwner).topic(vm="web-1"),
        _DOCUMENT,
    ],
)
async def test_a_vm_may_not_subscribe_beyond_its_own(cluster: RabbitmqCluster, topic_filter: str) -> None:
    bus = bus_of(cluster, _WEB_2, topic_filter)
    task = asyncio.create_task(bus.run(Collector().receive))
    await eventually(lambda: "connection was lost" in bus.stats.last_error)
    assert bus.stats.connects == 0
    await bus.close()
    await task


async def test_what_a_vm_publishes_beyond_its_own_reaches_nobody(cluster: RabbitmqCluster) -> None:
    presence = channel_of(AgentPresence)
    victim, own = presence.topic(vm="web-1"), presence.topic(vm="web-2")
    got = Collector()
    async with (
        running(bus_of(cluster, _COORDINATOR, presence.filter()), got.receive),
        TcpProxy("127.0.0.1", cluster.nodes[0].port) as proxy,
    ):
        thief = bus_of(cluster, _WEB_2)
        async with running(thief):
            for retain in (False, True):
                with pytest.raises(BusUnavailable):
                    await thief.publish(victim, b"forged", retain=retain)
        dying = bus_of(cluster, _WEB_2, url=proxy.url, will=Will(victim, b"will"))
        async with running(dying):
            proxy.cut()
            await eventually(lambda: dying.stats.connects == 2)
        allowed = bus_of(cluster, _WEB_2, url=proxy.url, will=Will(own, b"own will"))
        async with running(allowed):
            proxy.cut()
            await got.until_payload(b"own will")
    assert {each.topic for each in got.deliveries} == {own}


async def test_nobody_gets_the_session_of_another_user(cluster: RabbitmqCluster) -> None:
    """A session is a queue named after the client id, and a user may use those of its own service."""
    sender = bus_of(cluster, _COORDINATOR)
    async with running(sender):
        async with running(bus_of(cluster, _WEB_1, _DOCUMENT, clean=False)):
            pass
        await sender.publish(_DOCUMENT, b"for web-1")
        stolen, got = Collector(), Collector()
        thief = bus_of(cluster, _WEB_2, client_id=_IDS[_WEB_1], clean=False)
        task = asyncio.create_task(thief.run(stolen.receive))
        await eventually(lambda: bool(thief.stats.last_error))
        await thief.close()
        await task
        async with running(bus_of(cluster, _WEB_1, _DOCUMENT, clean=False), got.receive):
            await got.until_payload(b"for web-1")
    assert stolen.deliveries == []
