"""Several addresses: the next is tried when one is dead, refuses or says nothing, and all are named when none is left."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any

import pytest
from structlog.testing import capture_logs

from caesura.bus.diagnosis import SERVER_UNAVAILABLE, UNSUPPORTED_PROTOCOL
from caesura.bus.local_broker import free_port
from caesura.bus.mqtt import MqttBus
from caesura.bus.options import BrokerOptions
from caesura.bus.port import BusUnavailable
from caesura_testing.collector import eventually
from caesura_testing.scripted import (
    CONNECT,
    PINGREQ,
    PUBLISH,
    SUBSCRIBE,
    ScriptedBroker,
    ScriptedConnection,
    connack,
    message_id_of,
    packet,
    puback,
    under_way,
)

PINGRESP = 13


@pytest.fixture
async def brokers() -> AsyncIterator[tuple[ScriptedBroker, ScriptedBroker]]:
    async with ScriptedBroker() as first, ScriptedBroker() as second:
        yield first, second


def bus_of(*urls: str, **more: Any) -> MqttBus:
    """A bus that tries these in this order: its client id is chosen for it."""
    settings: dict[str, Any] = {"protocol": "5", "reconnect_min_s": 0.01, "reconnect_max_s": 0.02} | more
    filters = settings.pop("filters", ())
    for number in range(1000):
        options = BrokerOptions(url=",".join(urls), client_id=f"me-{number}", **settings)
        bus = MqttBus(options, filters=filters)
        if [each.url for each in bus._brokers] == list(urls):
            return bus
    raise AssertionError("no client id gives this order")


async def accepted(broker: ScriptedBroker) -> ScriptedConnection:
    there = await broker.accept()
    await there.read(CONNECT)
    await there.send(connack(protocol="5"))
    return there


async def test_a_dead_node_a_silent_one_and_one_that_refuses_are_passed_over(
    brokers: tuple[ScriptedBroker, ScriptedBroker],
) -> None:
    refusing, good = brokers
    dead = f"mqtt://127.0.0.1:{free_port()}"
    async with ScriptedBroker() as silent:
        # Waiting for reconnect_min_s in between would take longer than this test may.
        bus = bus_of(
            *(dead, silent.url, refusing.url, good.url),
            connect_timeout_s=0.5,
            reconnect_min_s=3600,
            reconnect_max_s=3600,
        )
        with capture_logs() as logs:
            async with under_way(bus):
                await (await silent.accept()).read(CONNECT)
                there = await refusing.accept()
                await there.read(CONNECT)
                await there.send(connack(SERVER_UNAVAILABLE, protocol="5"))
                await accepted(good)
                await eventually(lambda: bus.stats.connected)
                assert bus.broker.port == good.port
                assert bus.stats.last_error == ""
    failed = [(each["broker"], each["error"]) for each in logs if each["event"] == "bus.connect_failed"]
    assert [broker for broker, _ in failed] == [dead, silent.url, refusing.url]
    assert "nothing listens" in failed[0][1]
    assert "does not answer" in failed[1][1]
    assert "refused" in failed[2][1]


async def test_a_silent_node_is_not_asked_again_in_an_older_protocol(
    brokers: tuple[ScriptedBroker, ScriptedBroker],
) -> None:
    silent, good = brokers
    async with under_way(bus_of(silent.url, good.url, connect_timeout_s=0.2, protocol="auto")):
        await (await silent.accept()).read(CONNECT)
        assert (await (await good.accept()).read(CONNECT)).body[6] == 5


async def test_a_node_of_3_1_1_is_asked_in_it(brokers: tuple[ScriptedBroker, ScriptedBroker]) -> None:
    first, second = brokers
    bus = bus_of(first.url, second.url, protocol="auto")
    async with under_way(bus):
        there = await first.accept()
        assert (await there.read(CONNECT)).body[6] == 5
        await there.send(connack(1, protocol="3.1.1"))
        there = await first.accept()
        assert (await there.read(CONNECT)).body[6] == 4
        await there.send(connack(protocol="3.1.1"))
        await eventually(lambda: bus.stats.connected)
    assert UNSUPPORTED_PROTOCOL == 0x84


async def test_when_a_node_dies_the_next_one_is_asked(brokers: tuple[ScriptedBroker, ScriptedBroker]) -> None:
    first, second = brokers
    bus = bus_of(first.url, second.url)
    async with under_way(bus):
        (await accepted(first)).close()
        (await accepted(second)).close()
        await accepted(first)
        await eventually(lambda: bus.stats.connects == 3)


async def test_a_node_that_does_not_answer_subscribe_is_left(
    brokers: tuple[ScriptedBroker, ScriptedBroker],
) -> None:
    first, second = brokers
    async with under_way(bus_of(first.url, second.url, filters=["a"], connect_timeout_s=0.2)):
        await (await accepted(first)).read(SUBSCRIBE)
        await (await accepted(second)).read(SUBSCRIBE)


async def test_a_node_that_hangs_while_a_publish_waits_is_left(
    brokers: tuple[ScriptedBroker, ScriptedBroker],
) -> None:
    """Its kernel keeps the connection: without this it would take the keepalive's minute and a half."""
    first, second = brokers
    bus = bus_of(first.url, second.url, silence_s=0.5)
    async with under_way(bus):
        there = await accepted(first)
        publishing = asyncio.create_task(bus.publish("a", b"1", timeout_s=3600))
        answered = message_id_of(await there.read(PUBLISH))
        await there.send(puback(answered))
        await publishing
        publishing = asyncio.create_task(bus.publish("a", b"2", timeout_s=3600))
        await there.read(PUBLISH)
        await there.read(PINGREQ)
        await accepted(second)
        with pytest.raises(BusUnavailable):
            await publishing


async def test_a_node_that_answers_pings_is_kept(brokers: tuple[ScriptedBroker, ScriptedBroker]) -> None:
    """Its cluster may have no leader for a while: then publishes wait."""
    first, second = brokers
    bus = bus_of(first.url, second.url, silence_s=1.0)
    async with under_way(bus):
        there = await accepted(first)
        for _ in range(3):
            await there.read(PINGREQ)
            await there.send(packet(PINGRESP, b""))
        assert bus.stats.connects == 1


async def test_when_all_are_dead_each_is_named_and_there_is_a_pause(
    brokers: tuple[ScriptedBroker, ScriptedBroker],
) -> None:
    dead = [f"mqtt://127.0.0.1:{free_port()}" for _ in range(2)]
    bus = bus_of(*dead, reconnect_min_s=3600, reconnect_max_s=3600)
    with capture_logs() as logs:
        async with under_way(bus):
            await eventually(
                lambda: any(each["event"] == "bus.reconnecting" and each["in_s"] >= 3600 for each in logs)
            )
            assert [url for url in dead if url not in bus.stats.last_error] == []
    assert Counter(each["broker"] for each in logs if each["event"] == "bus.connect_failed") == dict.fromkeys(
        dead, 1
    )


def test_clients_are_spread_over_the_nodes_and_over_what_remains() -> None:
    urls = "mqtt://a,b,c"
    orders = Counter(
        tuple(each.address.host for each in MqttBus(BrokerOptions(url=urls, client_id=f"host-{n}"))._brokers)
        for n in range(600)
    )
    assert len(orders) == 6
    assert min(orders.values()) > 50
    again = MqttBus(BrokerOptions(url=urls, client_id="host-1"))
    assert again.broker == MqttBus(BrokerOptions(url=urls, client_id="host-1")).broker
