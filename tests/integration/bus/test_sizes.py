"""One guest's password and a very large message: neither the broker nor any of its clients take it in."""

from __future__ import annotations

import asyncio
import contextlib
import struct
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Literal

import pytest

from caesura.bus.local_broker import LocalBroker, free_port
from caesura.bus.mqtt import MqttBus
from caesura.bus.options import BrokerOptions
from caesura.bus.port import PublishRefused
from caesura.contract.access import Principal, access_rules
from caesura.contract.codec import MAX_PACKET_BYTES, MAX_PAYLOAD_BYTES
from caesura.contract.topics import CHANNELS, PREFIX, match_topic
from caesura.runtime.settings import Secret
from caesura_testing.broker import mosquitto_installed, shipped_mosquitto
from caesura_testing.collector import PATIENCE_S, Collector, running

MIB = 1024 * 1024
_HUGE = 100 * MIB
_PRESENCE = f"{PREFIX}/vm/web-1/presence"
_FLEET = (
    Principal("coordinator"),
    Principal("exporter"),
    Principal("host", "host-1"),
    Principal("vm", "web-1", "web"),
    Principal("metadata", "fleet"),
    Principal("ctl", "ops"),
)
_PASSWORDS = {each.username: f"password of {each.username}" for each in _FLEET}
_VALUES = {"host": "host-1", "vm": "web-1", "set": "web", "instance": "fleet", "client": "ops"}
"""What stands in the topics of these users; other parameters are numbers or free."""

needs_mosquitto = pytest.mark.skipif(not mosquitto_installed(), reason="mosquitto is not installed")
SHIPPED = pytest.mark.parametrize("shipped", ["broker", "compose"])
Shipped = Literal["broker", "compose"]


@contextlib.asynccontextmanager
async def fleet_broker(shipped: Shipped, tmp_path: Path) -> AsyncIterator[LocalBroker]:
    """A broker as it is shipped, with the generated rules for a small fleet."""
    broker = shipped_mosquitto(shipped, tmp_path, users=_PASSWORDS, acl=access_rules(_FLEET))
    async with broker:
        yield broker


def client(url: str, user: str, protocol: Literal["auto", "5"] = "auto") -> BrokerOptions:
    return BrokerOptions(
        url=url,
        username=user,
        password=Secret(_PASSWORDS[user]),
        protocol=protocol,
        reconnect_min_s=0.05,
    )


def _string(text: str) -> bytes:
    return struct.pack("!H", len(text)) + text.encode()


def _remaining(length: int) -> bytes:
    """A remaining length (MQTT 3.1.1, section 2.2.3)."""
    found = bytearray()
    while True:
        length, digit = divmod(length, 128)
        found.append(digit | (0x80 if length else 0))
        if not length:
            return bytes(found)


async def send_huge(
    broker: LocalBroker, user: str, topic: str, *, size_bytes: int = _HUGE, password: str | None = None
) -> int:
    """Publish so much, retained at QoS 1, by MQTT 3.1.1; the bytes that the broker took before it closed the connection."""
    reader, writer = await asyncio.open_connection(broker.host, broker.port)
    login = b"" if password is None else _string(user) + _string(password)
    body = (
        _string("MQTT")
        + bytes([4, 2 | (0xC0 if login else 0)])
        + struct.pack("!H", 60)
        + _string(user)
        + login
    )
    writer.write(b"\x10" + _remaining(len(body)) + body)
    assert (await asyncio.wait_for(reader.readexactly(4), PATIENCE_S))[3] == 0, "connected"
    head = _string(topic) + struct.pack("!H", 1)
    writer.write(b"\x33" + _remaining(len(head) + size_bytes) + head)
    sent = 0
    piece = bytes(MIB)
    with contextlib.suppress(OSError):
        while sent < size_bytes:
            writer.write(piece)
            await writer.drain()
            sent += len(piece)
        # An answer, or the end: either way the broker is done with it.
        await asyncio.wait_for(reader.read(16), PATIENCE_S)
    writer.close()
    return sent


def peak_bytes(pid: int | None) -> int:
    """The most memory that a process ever had (VmHWM, proc(5))."""
    status = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    line = next(each for each in status.splitlines() if each.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


@needs_mosquitto
@SHIPPED
async def test_the_broker_takes_no_message_beyond_the_limit(shipped: Shipped, tmp_path: Path) -> None:
    got = Collector()
    async with fleet_broker(shipped, tmp_path) as broker:
        coordinator = MqttBus(client(broker.url, "coordinator"), filters=[f"{PREFIX}/vm/+/presence"])
        agent = MqttBus(client(broker.url, "vm_web-1", protocol="5"))
        async with running(coordinator, got.receive):
            sent = await send_huge(broker, "vm_web-1", _PRESENCE, password=_PASSWORDS["vm_web-1"])
            assert sent < _HUGE, "the broker hangs up"
            async with running(agent):
                # The largest message that the contract allows gets through.
                await agent.publish(_PRESENCE, bytes(MAX_PAYLOAD_BYTES), retain=True)
                await got.until(bool)
        assert [len(each.payload) for each in got.deliveries] == [MAX_PAYLOAD_BYTES]
        assert peak_bytes(broker.pid) < 60 * MIB


@pytest.mark.parametrize("protocol", ["5", "3.1.1"])
@needs_mosquitto
async def test_a_client_is_safe_though_its_broker_has_no_limit(
    tmp_path: Path, protocol: Literal["5", "3.1.1"]
) -> None:
    """It connects, and gets what comes after; 5 asks the broker to leave it out, with 3.1.1 the rest is thrown away."""
    async with unlimited(tmp_path) as broker:
        assert await send_huge(broker, "anybody", "a", size_bytes=32 * MIB) == 32 * MIB
        got = Collector()
        bus = MqttBus(BrokerOptions(url=broker.url, protocol=protocol), filters=["a", "b"])
        async with running(bus, got.receive):
            await bus.publish("b", b"x")
            await got.until_payload(b"x")
        assert bus.stats.connects == 1
        for each in got.deliveries[:-1]:
            assert MAX_PAYLOAD_BYTES < len(each.payload) < 2 * MAX_PACKET_BYTES
        assert len(got.deliveries) == (1 if protocol == "5" else 2)


@contextlib.asynccontextmanager
async def unlimited(tmp_path: Path) -> AsyncIterator[LocalBroker]:
    """A Mosquitto that somebody set up without our configuration."""
    port = free_port()
    config = f"listener {port} 127.0.0.1\nallow_anonymous true\n"
    async with LocalBroker(kind="mosquitto", port=port, data_dir=tmp_path, config=config) as broker:
        yield broker


async def test_the_embedded_broker_closes_a_client_that_announces_more() -> None:
    got = Collector()
    async with LocalBroker(kind="embedded") as broker:
        bus = MqttBus(BrokerOptions(url=broker.url, protocol="3.1.1"), filters=["a"])
        async with running(bus, got.receive):
            assert await send_huge(broker, "anybody", "a") < _HUGE
            await bus.publish("a", bytes(MAX_PAYLOAD_BYTES))
            await got.until(bool)
        assert [len(each.payload) for each in got.deliveries] == [MAX_PAYLOAD_BYTES]
        assert bus.stats.connects == 1


@needs_mosquitto
async def test_each_user_writes_its_topics_of_the_table_and_no_others(tmp_path: Path) -> None:
    """A retained message on a topic of one's own invention is kept by the broker for good, and there is no end of them."""
    async with fleet_broker("broker", tmp_path) as broker:
        for principal in _FLEET:
            bus = MqttBus(client(broker.url, principal.username, protocol="5"))
            async with running(bus):
                for channel in CHANNELS:
                    values: Mapping[str, str] = {name: _VALUES.get(name, "1") for name in channel.parameters}
                    if channel.writer == "exporter":
                        values = {**values, "instance": "exporter"}
                    topic = channel.topic(**values)
                    for each in (topic, f"{topic}/more", topic.rpartition("/")[0] + "/invented"):
                        place = match_topic(
                            each
                        )  # an event's status is a level of its topic: there any word is in the table
                        if (
                            place is not None
                            and place[0].writer == principal.party
                            and not place[0].deprecated
                        ):
                            await bus.publish(each, b"{}")
                            continue
                        with pytest.raises(PublishRefused):
                            await bus.publish(each, b"{}", retain=True)
