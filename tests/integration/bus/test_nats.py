"""A three-node NATS JetStream cluster with the shipped configuration: what the port promises, and what a user may not do."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator

import pytest

from caesura.bus.port import Delivery, Will
from caesura.conformance.bus_harness import BrokerCapabilities, BusHarness
from caesura.contract.access import Principal, nats_users
from caesura.contract.messages import AgentPresence, SetDocument, VmDetails, VmOwner
from caesura.contract.topics import PREFIX, channel_of
from caesura_testing.cluster_harness import (
    PASSWORD,
    USER,
    ClusterConformance,
    bus_as,
    harness_over,
    password_of,
    started,
)
from caesura_testing.collector import PATIENCE_S, Collector, eventually, running
from caesura_testing.nats_cluster import NatsCluster, nats_server
from caesura_testing.proxy import TcpProxy

pytestmark = [pytest.mark.nats, pytest.mark.skipif(not nats_server(), reason="nats-server is not installed")]

_MISSING = {BrokerCapabilities.SAY_REFUSED: "MQTT 3.1.1 has no answer for a refused publish"}
_SUITE = (
    f'  {{ user: "{USER}", password: $password_{USER}, allowed_connection_types: ["MQTT"], permissions: {{ '
    'publish: { allow: ["open.>"] }, subscribe: { allow: ["open", "open.>", "denied.>", "$MQTT.sub.>"] } } }\n]'
)
_WEB_1, _WEB_2 = Principal("vm", "web-1", "web"), Principal("vm", "web-2", "db")
_COORDINATOR, _HOST = Principal("coordinator"), Principal("host", "host-1", vms=("web-1",))
_PUBLISHER = Principal("metadata", "host-1", vms=("web-1",))
_USERS = (_WEB_1, _WEB_2, _COORDINATOR, _HOST, _PUBLISHER)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NatsCluster]:
    folder = tmp_path_factory.mktemp("nats")
    users = nats_users(_USERS).rstrip().removesuffix("]") + _SUITE
    passwords = {each.username: password_of(each) for each in _USERS}
    with started(NatsCluster(folder, users, {**passwords, USER: PASSWORD})) as cluster:
        yield cluster


@pytest.fixture
async def harness(cluster: NatsCluster) -> AsyncIterator[BusHarness]:
    async with harness_over(cluster, missing=_MISSING) as harness:
        yield harness


class TestNats(ClusterConformance, missing=_MISSING):
    """The suite, without what NATS does not promise."""

    async def test_a_message_whose_handler_never_returned_comes_again(self, harness: BusHarness) -> None:
        """As the suite's, but for the message before: NATS may lose an acknowledgement that came right before the end of a connection."""
        begun, second = asyncio.Event(), Collector()

        async def receive(delivery: Delivery) -> None:
            if delivery.payload == b"2":
                begun.set()
                await asyncio.Event().wait()

        sender, worker = await harness.bus(), {"filters": ["open/work"], "clean": False}
        async with running(sender):
            async with running(await harness.bus("worker", **worker), receive) as task:  # type: ignore[arg-type]
                for payload in (b"1", b"2", b"3"):
                    await sender.publish("open/work", payload)
                await asyncio.wait_for(begun.wait(), PATIENCE_S)
                task.cancel()
                await asyncio.wait({task})
            async with running(await harness.bus("worker", **worker), second.receive):  # type: ignore[arg-type]
                await second.until(lambda found: {b"2", b"3"} <= {each.payload for each in found})


async def test_a_message_and_what_is_retained_are_on_every_node(cluster: NatsCluster) -> None:
    topic = channel_of(SetDocument).topic(set="web")
    async with running(bus_as(cluster, _COORDINATOR, url=cluster.nodes[0].url)) as _:
        sender = bus_as(cluster, _COORDINATOR, url=cluster.nodes[1].url)
        async with running(sender):
            await sender.publish(topic, b"kept", retain=True)
        for node in cluster.nodes:
            got = Collector()
            async with running(bus_as(cluster, _WEB_1, topic, url=node.url), got.receive):
                await got.until(
                    lambda found: any(each.retained and each.payload == b"kept" for each in found)
                )


async def test_a_session_goes_on_at_another_node_with_what_came_while_it_was_away(
    cluster: NatsCluster,
) -> None:
    topic = channel_of(SetDocument).topic(set="web")
    sender, got = bus_as(cluster, _COORDINATOR), Collector()
    here = {"client_id": "moving", "clean": False}
    async with running(sender):
        async with running(bus_as(cluster, _WEB_1, topic, url=cluster.nodes[0].url, **here), got.receive):  # type: ignore[arg-type]
            await sender.publish(topic, b"here")
            await got.until_payload(b"here")
        await sender.publish(topic, b"away")
        async with running(bus_as(cluster, _WEB_1, topic, url=cluster.nodes[1].url, **here), got.receive):  # type: ignore[arg-type]
            await got.until_payload(b"away")


@pytest.mark.parametrize(
    "topic_filter",
    [
        "#",
        f"{PREFIX}/#",
        "+/v1/vm/web-1/presence",
        "$MQTT/sub/#",
        "$MQTT/sub/+",
        "$MQTT/#",
        "$JS/#",
        "$SYS/#",
        channel_of(AgentPresence).topic(vm="web-1"),
        channel_of(VmOwner).topic(vm="web-1"),
        channel_of(SetDocument).topic(set="web"),
        channel_of(VmDetails).filter(vm="web-1"),
    ],
)
async def test_a_vm_may_not_subscribe_beyond_its_own(cluster: NatsCluster, topic_filter: str) -> None:
    bus = bus_as(cluster, _WEB_2, topic_filter)
    task = asyncio.create_task(bus.run(Collector().receive))
    await eventually(lambda: "refused to subscribe" in bus.stats.last_error)
    assert bus.stats.connects == 0
    await bus.close()
    await task


async def test_what_a_vm_publishes_beyond_its_own_reaches_nobody(cluster: NatsCluster) -> None:
    """MQTT 3.1.1 cannot say that it was refused: it looks accepted, by any way, and is dropped."""
    presence = channel_of(AgentPresence)
    victim, own = presence.topic(vm="web-1"), presence.topic(vm="web-2")
    got = Collector()
    async with (
        running(bus_as(cluster, _COORDINATOR, presence.filter()), got.receive),
        TcpProxy("127.0.0.1", cluster.nodes[0].port) as proxy,
    ):
        thief = bus_as(cluster, _WEB_2, will=Will(victim, b"will"))
        async with running(thief):
            await thief.publish(victim, b"forged", qos=0)
            await thief.publish(victim, b"forged")
            await thief.publish(victim, b"forged", retain=True)
        dying = bus_as(cluster, _WEB_2, url=proxy.url, will=Will(victim, b"will"))
        async with running(dying):
            proxy.cut()
            await eventually(lambda: dying.stats.connects == 2)
        allowed = bus_as(cluster, _WEB_2, url=proxy.url, will=Will(own, b"own will"))
        async with running(allowed):
            proxy.cut()
            await got.until_payload(b"own will")
    assert {each.topic for each in got.deliveries} == {own}
    late = Collector()
    async with running(bus_as(cluster, _COORDINATOR, presence.filter()), late.receive):
        await late.until_payload(b"own will")
    assert {each.topic for each in late.deliveries} == {own}


async def test_who_takes_a_client_id_gets_nothing_of_its_session(cluster: NatsCluster) -> None:
    """NATS does not bind client ids to users, which is why ids at a cluster are not guessable (``options_from``)."""
    topic = channel_of(SetDocument).topic(set="web")
    sender, stolen, got = bus_as(cluster, _COORDINATOR), Collector(), Collector()
    owner = {"client_id": "session of web-1", "clean": False}
    async with running(sender):
        async with running(bus_as(cluster, _WEB_1, topic, **owner)):  # type: ignore[arg-type]
            pass
        await sender.publish(topic, b"for web-1")
        thief = bus_as(cluster, _WEB_2, channel_of(SetDocument).topic(set="db"), **owner)  # type: ignore[arg-type]
        async with running(thief, stolen.receive):
            await sender.publish(channel_of(SetDocument).topic(set="db"), b"for web-2")
            await stolen.until_payload(b"for web-2")
        async with running(bus_as(cluster, _WEB_1, topic, **owner), got.receive):  # type: ignore[arg-type]
            await got.until_payload(
                b"for web-1",
            )
    assert {each.topic for each in stolen.deliveries} == {channel_of(SetDocument).topic(set="db")}


async def test_users_may_speak_mqtt_only(cluster: NatsCluster) -> None:
    """By NATS's own protocol a user who may receive deliveries at QoS 1 could receive those of all others."""
    port = cluster.client_ports[0]
    user, password = _WEB_1.username, f"password of {_WEB_1.username}"
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(f'CONNECT {{"user": "{user}", "pass": "{password}", "verbose": true}}\r\nPING\r\n'.encode())
    answer = await asyncio.wait_for(reader.read(), PATIENCE_S)
    writer.close()
    assert b"Authorization Violation" in answer
