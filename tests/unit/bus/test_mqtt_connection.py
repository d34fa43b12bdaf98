"""One test for each gap that ``MqttConnection`` closes through private attributes: a new aiomqtt or paho must fail here."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from caesura.bus.diagnosis import (
    BAD_USER_OR_PASSWORD,
    NOT_AUTHORIZED,
    SESSION_TAKEN_OVER,
    UNSUPPORTED_PROTOCOL,
    ClosedEarly,
    ConnectionLost,
    ConnectRefused,
    ConnectTimeout,
    SubscribeRefused,
)
from caesura.bus.mqtt_connection import IncomingMessage, MqttConnection, Protocol
from caesura.bus.options import BrokerOptions
from caesura.bus.port import BusUnavailable, PublishRefused, PublishTooLarge, Will
from caesura.contract.codec import MAX_PACKET_BYTES, MAX_PAYLOAD_BYTES
from caesura_testing.patience import patient
from caesura_testing.scripted import (
    CONNECT,
    DISCONNECT,
    PINGREQ,
    PUBACK,
    PUBLISH,
    SUBSCRIBE,
    ScriptedBroker,
    ScriptedConnection,
    connack,
    message_id_of,
    packet,
    puback,
    publish,
)

_MAXIMUM_PACKET_SIZE = bytes([0x27]) + MAX_PACKET_BYTES.to_bytes(4)  # MQTT 5.0, section 3.1.2.11.4

PROTOCOLS: tuple[Protocol, ...] = ("5", "3.1.1")
both_versions = pytest.mark.parametrize("protocol", PROTOCOLS)


def link_to(
    broker: ScriptedBroker,
    protocol: Protocol = "5",
    *,
    arrivals: list[IncomingMessage] | None = None,
    will: Will | None = None,
    **more: Any,
) -> MqttConnection:
    settings: dict[str, Any] = {"client_id": "me", "connect_timeout_s": 5} | more
    options = BrokerOptions(url=broker.url, **settings)
    kept = [] if arrivals is None else arrivals
    return MqttConnection(options, protocol, will=will, arrived=lambda _, arrival: kept.append(arrival))


@asynccontextmanager
async def connected(
    broker: ScriptedBroker, link: MqttConnection, *, properties: bytes = b""
) -> AsyncIterator[ScriptedConnection]:
    opening = asyncio.create_task(link.open())
    there = await broker.accept()
    await there.read(CONNECT)
    await there.send(connack(protocol=link.protocol, properties=properties))
    await opening
    try:
        yield there
    finally:
        await link.disconnect()


async def until(arrivals: list[IncomingMessage], count: int) -> None:
    async with asyncio.timeout(patient(10)):
        while len(arrivals) < count:  # noqa: ASYNC110 - a plain list has no event
            await asyncio.sleep(0.005)


def in_s(seconds: float) -> float:
    return asyncio.get_running_loop().time() + seconds


@both_versions
async def test_a_message_is_acknowledged_when_we_say_so_and_not_before(
    broker: ScriptedBroker, protocol: Protocol
) -> None:
    arrivals: list[IncomingMessage] = []
    link = link_to(broker, protocol, arrivals=arrivals)
    async with connected(broker, link) as there:
        await there.send(publish("a", b"x", 7, protocol=protocol), publish("a", b"y", 8, protocol=protocol))
        await until(arrivals, 2)
        assert await there.silent(0.1)
        link.acknowledge(arrivals[0])
        assert (await there.read(PUBACK)).body[:2] == b"\0\7"
        assert await there.silent(0.1)
    assert arrivals[0] == IncomingMessage("a", b"x", retained=False, qos=1, message_id=7)
    link.acknowledge(arrivals[1])  # the connection is gone: nothing to tell anybody, and no error


async def test_each_refused_publish_raises_and_only_those(broker: ScriptedBroker) -> None:
    link = link_to(broker)
    async with connected(broker, link) as there:
        sending = [
            asyncio.create_task(link.send(f"t{number}", b"", qos=1, retain=False, deadline=in_s(10)))
            for number in range(10)
        ]
        ids = [message_id_of(await there.read(PUBLISH)) for _ in sending]
        # The answers come in another order than the questions.
        for number in reversed(range(10)):
            await there.send(puback(ids[number], NOT_AUTHORIZED if number % 2 else 0))
        results = await asyncio.gather(*sending, return_exceptions=True)
    for number, result in enumerate(results):
        if number % 2:
            assert isinstance(result, PublishRefused)
            assert result.topic == f"t{number}"
            assert "Not authorized (0x87)" in result.reason
        else:
            assert result is None


async def test_no_matching_subscribers_is_no_refusal(broker: ScriptedBroker) -> None:
    link = link_to(broker)
    async with connected(broker, link) as there:
        sending = asyncio.create_task(link.send("t", b"", qos=1, retain=False, deadline=in_s(10)))
        await there.send(puback(message_id_of(await there.read(PUBLISH)), 0x10))
        await sending


@both_versions
async def test_a_pending_publish_ends_with_the_connection(broker: ScriptedBroker, protocol: Protocol) -> None:
    link = link_to(broker, protocol)
    async with connected(broker, link) as there:
        sending = asyncio.create_task(link.send("t", b"", qos=1, retain=False, deadline=in_s(60)))
        await there.read(PUBLISH)
        there.close()
        async with asyncio.timeout(patient(2)):
            with pytest.raises(BusUnavailable, match="connection ended"):
                await sending
        with pytest.raises(BusUnavailable):
            await link.send("t", b"", qos=1, retain=False, deadline=in_s(60))
        assert isinstance(await link.until_end(), ConnectionLost)


async def test_a_publish_nobody_answers_keeps_its_slot_until_the_answer_comes(broker: ScriptedBroker) -> None:
    link = link_to(broker, max_in_flight=1)
    async with connected(broker, link) as there:
        with pytest.raises(BusUnavailable, match="did not acknowledge"):
            await link.send("first", b"", qos=1, retain=False, deadline=in_s(0.1))
        first = await there.read(PUBLISH)
        with pytest.raises(BusUnavailable, match="no room"):
            await link.send("second", b"", qos=1, retain=False, deadline=in_s(0.1))
        assert await there.silent(0.1)
        await there.send(puback(message_id_of(first)))
        third = asyncio.create_task(link.send("third", b"", qos=1, retain=False, deadline=in_s(10)))
        sent = await there.read(PUBLISH)
        assert b"third" in sent.body
        await there.send(puback(message_id_of(sent)))
        await third


async def test_a_cancelled_publish_keeps_its_slot_too(broker: ScriptedBroker) -> None:
    link = link_to(broker, max_in_flight=1)
    async with connected(broker, link) as there:
        sending = asyncio.create_task(link.send("first", b"", qos=1, retain=False, deadline=in_s(60)))
        first = await there.read(PUBLISH)
        sending.cancel()
        await asyncio.wait({sending})
        with pytest.raises(BusUnavailable, match="no room"):
            await link.send("second", b"", qos=1, retain=False, deadline=in_s(0.1))
        await there.send(puback(message_id_of(first)))
        again = asyncio.create_task(link.send("third", b"", qos=1, retain=False, deadline=in_s(10)))
        await there.send(puback(message_id_of(await there.read(PUBLISH))))
        await again


async def test_the_brokers_receive_maximum_limits_what_is_in_flight(broker: ScriptedBroker) -> None:
    link = link_to(broker, max_in_flight=20)
    receive_maximum_2 = bytes([0x21, 0, 2])
    async with connected(broker, link, properties=receive_maximum_2) as there:
        sending = [
            asyncio.create_task(link.send("t", b"", qos=1, retain=False, deadline=in_s(10))) for _ in range(3)
        ]
        ids = [message_id_of(await there.read(PUBLISH)) for _ in range(2)]
        assert await there.silent(0.1)
        await there.send(puback(ids[0]))
        ids.append(message_id_of(await there.read(PUBLISH)))
        await there.send(puback(ids[1]), puback(ids[2]))
        await asyncio.gather(*sending)


async def test_qos_0_returns_once_written(broker: ScriptedBroker) -> None:
    link = link_to(broker, max_in_flight=1)
    async with connected(broker, link) as there:
        for number in range(3):
            await link.send("t", b"%d" % number, qos=0, retain=False, deadline=in_s(10))
            assert (await there.read(PUBLISH)).flags == 0


@both_versions
async def test_a_broker_that_hangs_up_on_connect_is_not_waited_for(
    broker: ScriptedBroker, protocol: Protocol
) -> None:
    opening = asyncio.create_task(link_to(broker, protocol, connect_timeout_s=60).open())
    there = await broker.accept()
    await there.read(CONNECT)
    there.close()
    async with asyncio.timeout(patient(2)):
        with pytest.raises(ClosedEarly):
            await opening


@pytest.mark.parametrize(
    "words", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b"220 mail ESMTP\r\n", b"\x20\x7f" + b"\xff" * 127]
)
@both_versions
async def test_what_is_no_broker_is_an_error_like_others(
    broker: ScriptedBroker, protocol: Protocol, words: bytes
) -> None:
    opening = asyncio.create_task(link_to(broker, protocol, connect_timeout_s=0.5).open())
    there = await broker.accept()
    await there.read(CONNECT)
    await there.send(words)
    with pytest.raises((ClosedEarly, ConnectRefused, ConnectTimeout)):
        await opening


@pytest.mark.parametrize(
    ("protocol", "code", "meaning"),
    [
        ("5", 0x87, NOT_AUTHORIZED),
        ("5", 0x86, BAD_USER_OR_PASSWORD),
        ("5", 0x84, UNSUPPORTED_PROTOCOL),
        ("3.1.1", 4, BAD_USER_OR_PASSWORD),
        ("3.1.1", 5, NOT_AUTHORIZED),
    ],
)
async def test_a_refused_connect_says_why(
    broker: ScriptedBroker, protocol: Protocol, code: int, meaning: int
) -> None:
    opening = asyncio.create_task(link_to(broker, protocol).open())
    there = await broker.accept()
    await there.read(CONNECT)
    await there.send(connack(code, protocol=protocol))
    with pytest.raises(ConnectRefused) as refusal:
        await opening
    assert refusal.value.code == meaning


async def test_a_3_1_1_brokers_no_to_version_5_is_understood(broker: ScriptedBroker) -> None:
    opening = asyncio.create_task(link_to(broker, "5").open())
    there = await broker.accept()
    await there.read(CONNECT)
    await there.send(connack(1, protocol="3.1.1"))
    with pytest.raises(ConnectRefused) as refusal:
        await opening
    assert refusal.value.code == UNSUPPORTED_PROTOCOL


async def test_a_silent_broker_is_given_up_and_nothing_is_left(broker: ScriptedBroker) -> None:
    before = asyncio.all_tasks()
    opening = asyncio.create_task(link_to(broker, connect_timeout_s=patient(0.3)).open())
    there = await broker.accept()
    await there.read(CONNECT)
    with pytest.raises(ConnectTimeout):
        await opening
    with pytest.raises(asyncio.IncompleteReadError):  # our socket is closed
        await there.read(PINGREQ)
    assert {each for each in asyncio.all_tasks() - before if each.get_name().startswith("bus-")} == set()


async def test_cancelling_open_closes_the_socket(broker: ScriptedBroker) -> None:
    opening = asyncio.create_task(link_to(broker, connect_timeout_s=60).open())
    there = await broker.accept()
    await there.read(CONNECT)
    opening.cancel()
    await asyncio.wait({opening})
    assert opening.cancelled()
    with pytest.raises(asyncio.IncompleteReadError):
        await there.read(PINGREQ)


@both_versions
async def test_a_goodbye_is_said(broker: ScriptedBroker, protocol: Protocol) -> None:
    link = link_to(broker, protocol)
    async with connected(broker, link) as there:
        pass
    await there.read(DISCONNECT)
    assert link.ended


async def test_tcp_sends_small_packets_at_once(broker: ScriptedBroker) -> None:
    link = link_to(broker)
    async with connected(broker, link):
        sock = link._client.socket()
        assert isinstance(sock, socket.socket)
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 2


async def test_while_paused_nothing_is_read_but_pings_go_out(broker: ScriptedBroker) -> None:
    arrivals: list[IncomingMessage] = []
    link = link_to(broker, arrivals=arrivals, keepalive_s=1)
    async with connected(broker, link) as there:
        link.pause()
        assert link.paused
        await there.send(publish("a", b"x", 1, protocol="5"))
        # Three keepalives without an answer that we read: stock paho gives up after two.
        for _ in range(3):
            await there.read(PINGREQ)
            await there.send(packet(13, b""))
        assert arrivals == []
        assert not link.ended
        link.resume()
        await until(arrivals, 1)


async def test_an_unread_ping_answer_ends_the_connection_when_not_paused(broker: ScriptedBroker) -> None:
    """The other side of the test above: without it, a dead broker would never be noticed."""
    link = link_to(broker, keepalive_s=1)
    async with connected(broker, link) as there:
        await there.read(PINGREQ)
        async with asyncio.timeout(patient(5)):
            await link.until_end()


@both_versions
async def test_refused_subscriptions_are_named(broker: ScriptedBroker, protocol: Protocol) -> None:
    link = link_to(broker, protocol)
    async with connected(broker, link) as there:
        subscribing = asyncio.create_task(link.subscribe_all(["a", "b/#", "c"]))
        asked = await there.read(SUBSCRIBE)
        codes = bytes([1, 0x87 if protocol == "5" else 0x80, 1])
        await there.send(packet(9, message_id_of(asked) + (b"\0" if protocol == "5" else b"") + codes))
        with pytest.raises(SubscribeRefused) as refusal:
            await subscribing
    assert refusal.value.filters == ["b/#"]


async def test_an_unanswered_subscribe_ends_with_the_connection(broker: ScriptedBroker) -> None:
    link = link_to(broker, connect_timeout_s=60)
    async with connected(broker, link) as there:
        subscribing = asyncio.create_task(link.subscribe_all(["a"]))
        await there.read(SUBSCRIBE)
        there.close()
        async with asyncio.timeout(patient(2)):
            with pytest.raises(ConnectionLost):
                await subscribing


async def test_an_unanswered_subscribe_times_out(broker: ScriptedBroker) -> None:
    link = link_to(broker, connect_timeout_s=0.2)
    async with connected(broker, link) as there:
        subscribing = asyncio.create_task(link.subscribe_all(["a"]))
        await there.read(SUBSCRIBE)
        with pytest.raises(TimeoutError, match="SUBSCRIBE"):
            await subscribing


@both_versions
async def test_a_subscribe_is_answered_behind_whatever_the_broker_kept(
    broker: ScriptedBroker, protocol: Protocol
) -> None:
    """Silence counts, not work: messages of a session may come for longer than an answer may take."""
    silence_s = 1.0
    arrivals: list[IncomingMessage] = []
    link = link_to(broker, protocol, arrivals=arrivals, connect_timeout_s=silence_s)
    async with connected(broker, link) as there:
        subscribing = asyncio.create_task(link.subscribe_all(["a"]))
        asked = await there.read(SUBSCRIBE)
        end = in_s(1.5 * silence_s)
        while in_s(0) < end:
            await there.send(publish("a", b"x", 7, protocol=protocol))
            await asyncio.sleep(silence_s / 50)
        assert arrivals
        await there.send(packet(9, message_id_of(asked) + (b"\0" if protocol == "5" else b"") + b"\1"))
        await subscribing


async def test_a_subscribe_waits_while_we_are_the_ones_who_do_not_read(broker: ScriptedBroker) -> None:
    link = link_to(broker, connect_timeout_s=0.2)
    async with connected(broker, link) as there:
        subscribing = asyncio.create_task(link.subscribe_all(["a"]))
        asked = await there.read(SUBSCRIBE)
        link.pause()
        await there.send(packet(9, message_id_of(asked) + b"\0\1"))
        assert await there.silent(0.5)
        assert not subscribing.done()
        link.resume()
        await subscribing


@both_versions
async def test_of_an_oversized_message_the_beginning_is_kept_and_acknowledged(
    broker: ScriptedBroker, protocol: Protocol
) -> None:
    arrivals: list[IncomingMessage] = []
    link = link_to(broker, protocol, arrivals=arrivals)
    head = b"\0\1a\0\7" + (b"\0" if protocol == "5" else b"")
    length = 8 * 1024 * 1024
    async with connected(broker, link) as there:
        await there.send(bytes([PUBLISH << 4 | 2, 0x80, 0x80, 0x80, 0x04]), head, bytes(length - len(head)))
        await there.send(publish("a", b"x", 8, protocol=protocol))
        await until(arrivals, 2)
        link.acknowledge(arrivals[0])
        assert (await there.read(PUBACK)).body[:2] == b"\0\7"
    assert MAX_PAYLOAD_BYTES < len(arrivals[0].payload) <= MAX_PACKET_BYTES + 64 * 1024
    assert arrivals[1].payload == b"x"


async def test_what_the_broker_says_is_too_large_is_refused_and_ends_no_connection(
    broker: ScriptedBroker,
) -> None:
    link = link_to(broker)
    async with connected(broker, link, properties=bytes([0x27]) + (100).to_bytes(4)) as there:
        with pytest.raises(PublishTooLarge, match="at most 100") as refusal:
            await link.send("a", bytes(100), qos=1, retain=False, deadline=in_s(10))
        assert refusal.value.topic == "a"
        sending = asyncio.create_task(link.send("a", bytes(50), qos=1, retain=False, deadline=in_s(10)))
        await there.send(puback(message_id_of(await there.read(PUBLISH))))
        await sending


async def test_a_takeover_is_told_apart_from_other_ends(broker: ScriptedBroker) -> None:
    link = link_to(broker)
    async with connected(broker, link) as there:
        await there.send(packet(DISCONNECT, bytes([SESSION_TAKEN_OVER])))
        lost = await link.until_end()
    assert lost.code == SESSION_TAKEN_OVER


async def test_a_malformed_packet_ends_the_connection(broker: ScriptedBroker) -> None:
    link = link_to(broker)
    async with connected(broker, link) as there:
        await there.send(packet(PUBLISH, b"\xff\xff", flags=2))
        async with asyncio.timeout(patient(2)):
            await link.until_end()


async def test_a_topic_that_is_no_utf_8_ends_the_connection(broker: ScriptedBroker) -> None:
    arrivals: list[IncomingMessage] = []
    link = link_to(broker, arrivals=arrivals)
    async with connected(broker, link) as there:
        await there.send(packet(PUBLISH, b"\0\2\xff\xfe\0\1\0x", flags=2))
        async with asyncio.timeout(patient(2)):
            lost = await link.until_end()
    assert arrivals == []
    assert "utf-8" in lost.reason


@pytest.mark.parametrize(
    ("protocol", "clean", "flags", "properties"),
    [
        ("3.1.1", True, 0b10, None),
        ("3.1.1", False, 0b00, None),
        ("5", True, 0b10, _MAXIMUM_PACKET_SIZE),
        ("5", False, 0b00, bytes([0x11]) + (86_400).to_bytes(4) + _MAXIMUM_PACKET_SIZE),
    ],
)
async def test_sessions_are_asked_for_in_each_versions_own_way(
    broker: ScriptedBroker, protocol: Protocol, *, clean: bool, flags: int, properties: bytes | None
) -> None:
    opening = asyncio.create_task(link_to(broker, protocol, clean=clean, keepalive_s=77).open())
    there = await broker.accept()
    body = (await there.read(CONNECT)).body
    opening.cancel()
    await asyncio.wait({opening})
    level = 5 if protocol == "5" else 4
    head = b"\0\4MQTT" + bytes([level, flags]) + (77).to_bytes(2)
    middle = b"" if properties is None else bytes([len(properties)]) + properties
    assert body == head + middle + b"\0\2me"


@both_versions
async def test_the_last_will_is_retained_and_at_qos_1(broker: ScriptedBroker, protocol: Protocol) -> None:
    opening = asyncio.create_task(link_to(broker, protocol, will=Will("w/t", b"gone")).open())
    there = await broker.accept()
    body = (await there.read(CONNECT)).body
    opening.cancel()
    await asyncio.wait({opening})
    will, retained, qos_1, clean = 0b100, 0b10_0000, 0b1000, 0b10
    assert body[7] == will | retained | qos_1 | clean
    assert body.endswith(b"\0\3w/t\0\4gone")
