"""How ``MqttBus`` answers what a broker does at the wrong moment."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from structlog.testing import capture_logs

from caesura.bus.diagnosis import SESSION_TAKEN_OVER
from caesura.bus.mqtt import MqttBus
from caesura.bus.options import BrokerOptions
from caesura.bus.port import BusUnavailable
from caesura_testing.collector import eventually
from caesura_testing.patience import patient
from caesura_testing.scripted import (
    CONNECT,
    DISCONNECT,
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


def quick(broker: ScriptedBroker, **more: Any) -> BrokerOptions:
    settings: dict[str, Any] = {"client_id": "me", "reconnect_min_s": 0.01, "reconnect_max_s": 0.02} | more
    return BrokerOptions(url=broker.url, **settings)


async def version(there: ScriptedConnection) -> int:
    """The protocol level of the CONNECT that comes next: 5, or 4 for 3.1.1."""
    return (await there.read(CONNECT)).body[6]


async def test_auto_falls_back_when_version_5_is_hung_up_on_and_remembers(broker: ScriptedBroker) -> None:
    bus = MqttBus(quick(broker))
    async with under_way(bus):
        first = await broker.accept()
        assert await version(first) == 5
        first.close()
        for _ in range(2):
            there = await broker.accept()
            assert await version(there) == 4
            await there.send(connack(protocol="3.1.1"))
            await eventually(lambda: bus.stats.connected)
            there.close()
            await eventually(lambda: not bus.stats.connected)


async def test_a_broker_that_spoke_5_is_not_tried_with_3_1_1_when_it_goes_down(
    broker: ScriptedBroker,
) -> None:
    bus = MqttBus(quick(broker))
    async with under_way(bus):
        there = await broker.accept()
        assert await version(there) == 5
        await there.send(connack(protocol="5"))
        await eventually(lambda: bus.stats.connected)
        there.close()
        for _ in range(4):
            there = await broker.accept()
            assert await version(there) == 5
            there.close()


async def test_a_protocol_that_was_set_is_never_changed(broker: ScriptedBroker) -> None:
    async with under_way(MqttBus(quick(broker, protocol="5"))):
        for _ in range(3):
            there = await broker.accept()
            assert await version(there) == 5
            await there.send(connack(1, protocol="3.1.1"))


async def test_a_takeover_is_named_and_the_other_left_alone_for_a_while(broker: ScriptedBroker) -> None:
    bus = MqttBus(quick(broker, reconnect_max_s=600))
    with capture_logs() as logs:
        async with under_way(bus):
            there = await broker.accept()
            await there.read(CONNECT)
            await there.send(connack(protocol="5"), packet(DISCONNECT, bytes([SESSION_TAKEN_OVER])))
            await eventually(lambda: any(each["event"] == "bus.reconnecting" for each in logs))
    lost = next(each for each in logs if each["event"] == "bus.taken_over")
    assert "'me'" in lost["advice"]
    assert [each["in_s"] >= 300 for each in logs if each["event"] == "bus.reconnecting"] == [True]


async def test_refused_subscriptions_are_loud_and_not_retried_at_once(broker: ScriptedBroker) -> None:
    bus = MqttBus(quick(broker, reconnect_max_s=600), filters=["a/#", "b"])
    with capture_logs() as logs:
        async with under_way(bus):
            there = await broker.accept()
            await there.read(CONNECT)
            await there.send(connack(protocol="5"))
            asked = await there.read(SUBSCRIBE)
            await there.send(packet(9, message_id_of(asked) + b"\0" + bytes([0x87, 1])))
            await eventually(lambda: any(each["event"] == "bus.reconnecting" for each in logs))
            assert not bus.stats.connected
            assert bus.stats.connects == 0
            assert "a/#" in bus.stats.last_error
            await there.read(DISCONNECT)
    refused = next(each for each in logs if each["event"] == "bus.subscribe_refused")
    assert "read access" in refused["advice"]
    assert [each["in_s"] >= 300 for each in logs if each["event"] == "bus.reconnecting"] == [True]


async def test_it_is_connected_only_once_subscribed(broker: ScriptedBroker) -> None:
    bus = MqttBus(quick(broker), filters=["a"])
    async with under_way(bus):
        there = await broker.accept()
        await there.read(CONNECT)
        await there.send(connack(protocol="5"))
        asked = await there.read(SUBSCRIBE)
        assert not await bus.wait_connected(0.05)
        with pytest.raises(BusUnavailable):
            await bus.publish("b", b"", timeout_s=0.05)
        await there.send(packet(9, message_id_of(asked) + b"\0\1"))
        assert await bus.wait_connected(patient(5))


async def test_a_publish_that_waits_for_its_turn_fails_with_the_connection_too(
    broker: ScriptedBroker,
) -> None:
    bus = MqttBus(quick(broker, max_in_flight=1, reconnect_min_s=5, reconnect_max_s=5))
    async with under_way(bus):
        there = await broker.accept()
        await there.read(CONNECT)
        await there.send(connack(protocol="5"))
        publishing = [asyncio.create_task(bus.publish("a", b"", timeout_s=60)) for _ in range(5)]
        await there.read(PUBLISH)
        there.close()
        async with asyncio.timeout(patient(2)):
            results = await asyncio.gather(*publishing, return_exceptions=True)
    assert [type(each) for each in results] == [BusUnavailable] * 5


async def test_closing_while_a_publish_waits_for_a_connection_ends_it(broker: ScriptedBroker) -> None:
    bus = MqttBus(quick(broker))
    async with under_way(bus):
        publishing = asyncio.create_task(bus.publish("a", b"", timeout_s=60))
        await broker.accept()
        assert not publishing.done()
    async with asyncio.timeout(patient(2)):
        with pytest.raises(BusUnavailable, match="closed"):
            await publishing


async def test_counters(broker: ScriptedBroker) -> None:
    bus = MqttBus(quick(broker))
    async with under_way(bus):
        there = await broker.accept()
        await there.read(CONNECT)
        await there.send(connack(protocol="5"))
        publishing = asyncio.create_task(bus.publish("a", b""))
        await there.send(puback(message_id_of(await there.read(PUBLISH))))
        await publishing
        stats = bus.stats
        assert (stats.connected, stats.connects, stats.published, stats.last_error) == (True, 1, 1, "")
    assert bus.stats is stats
    assert not stats.connected


@pytest.mark.parametrize(("topic", "qos"), [("a/+", 1), ("", 1), ("a", 2)])
async def test_what_may_not_be_published_is_refused_here(
    broker: ScriptedBroker, topic: str, qos: int
) -> None:
    with pytest.raises(ValueError, match=r"publish to|QoS"):
        await MqttBus(quick(broker)).publish(topic, b"", qos=qos)


async def test_a_filter_that_no_broker_accepts_is_refused_here(broker: ScriptedBroker) -> None:
    with pytest.raises(ValueError, match="filter"):
        MqttBus(quick(broker), filters=["a/#/b"])
