"""What our payloads are is said in MQTT 5, as the MQTT binding of CloudEvents asks for: read by a client that is not ours."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import aiomqtt
import pytest

from caesura.bus.mqtt import MqttBus
from caesura.bus.options import BrokerOptions
from caesura.bus.port import Will
from caesura_testing.broker import mosquitto, mosquitto_installed
from caesura_testing.collector import PATIENCE_S, Collector, running
from caesura_testing.proxy import TcpProxy

pytestmark = pytest.mark.skipif(not mosquitto_installed(), reason="mosquitto is not installed")


async def arriving(client: aiomqtt.Client) -> tuple[str, Any]:
    """The next message's topic and content type."""
    async with asyncio.timeout(PATIENCE_S):
        message = await anext(aiter(client.messages))
    assert message.properties is not None
    return str(message.topic), getattr(message.properties, "ContentType", None)


async def test_every_payload_says_what_it_is(tmp_path: Path) -> None:
    async with (
        mosquitto(tmp_path) as broker,
        TcpProxy("127.0.0.1", broker.port) as proxy,
        aiomqtt.Client("127.0.0.1", broker.port, protocol=aiomqtt.ProtocolVersion.V5) as plain,
    ):
        await plain.subscribe("#", qos=1)
        bus = MqttBus(BrokerOptions(url=proxy.url), will=Will("a/will", b"{}"))
        async with running(bus, Collector().receive):
            await bus.publish("a/fact", b"{}")
            await bus.publish("a/reading", b"{}", qos=0)
            await bus.publish("a/document", b"{}", retain=True)
            for topic in ("a/fact", "a/reading", "a/document"):
                assert await arriving(plain) == (topic, "application/cloudevents+json")
            await bus.publish("a/document", b"", retain=True)
            assert await arriving(plain) == ("a/document", None), "what is removed has no type"
            proxy.cut()  # without a goodbye: the broker sends the will
            assert await arriving(plain) == ("a/will", "application/cloudevents+json")
