"""What a service's typed view of its bus promises."""

from __future__ import annotations

import pytest

from caesura.bus.memory import MemoryBroker, MemoryBus
from caesura.bus.messaging import MessageClient
from caesura.bus.port import BusUnavailable
from caesura.contract import messages as m
from caesura.contract.codec import decode
from caesura.contract.topics import channel_of
from caesura_metadata_publisher.service import MetadataPublisher
from caesura_metadata_publisher.settings import MetadataPublisherSettings
from caesura_testing.collector import running
from caesura_vm_agent.canary_keeper import CanaryKeeper
from caesura_vm_agent.publisher import AgentPublisher


def retained(broker: MemoryBroker, kind: type[m.AgentPresence | m.PublisherPresence], **names: str) -> object:
    topic = channel_of(kind).topic(**names)
    return decode(topic, broker.retained[topic]).message


async def test_after_the_last_message_on_a_topic_nothing_follows_there_and_elsewhere_all_does() -> None:
    broker = MemoryBroker()
    bus = MemoryBus(broker, client_id="a")
    post = MessageClient(bus, "/caesura/test")
    here = m.PublisherPresence(instance="here", online=True)
    there = m.PublisherPresence(instance="there", online=True)
    gone = m.PublisherPresence(instance="here", online=False)
    async with running(bus):
        await post.send(here, instance="here")
        await post.send_last(gone, instance="here")
        await post.send(here, instance="here")
        await post.send(there, instance="there")
    assert retained(broker, m.PublisherPresence, instance="here") == gone
    assert retained(broker, m.PublisherPresence, instance="there") == there


async def test_a_goodbye_that_did_not_arrive_is_still_the_last_message() -> None:
    broker = MemoryBroker()
    bus = MemoryBus(broker, client_id="a")
    post = MessageClient(bus, "/caesura/test")
    with pytest.raises(BusUnavailable):
        await post.send_last(
            m.PublisherPresence(instance="here", online=False), instance="here", timeout_s=0.01
        )
    async with running(bus):
        await post.send(m.PublisherPresence(instance="here", online=True), instance="here")
    assert broker.retained == {}


async def test_a_publisher_that_said_goodbye_does_not_announce_itself_again() -> None:
    broker = MemoryBroker()
    bus = MemoryBus(broker, client_id="p")
    settings = MetadataPublisherSettings(broker_url="mqtt://unused", listeners_file="unused")
    publisher = MetadataPublisher(settings, bus)
    async with running(bus):
        close = bus.close

        async def beat_first() -> None:
            await publisher.publish_state()
            await close()

        bus.close = beat_first  # type: ignore[method-assign]
        await publisher.drain()
    gone = m.PublisherPresence(instance="metadata", online=False)
    assert retained(broker, m.PublisherPresence, instance="metadata") == gone


async def test_an_agent_that_said_goodbye_does_not_announce_itself_again() -> None:
    broker = MemoryBroker()
    bus = MemoryBus(broker, client_id="w1")
    voice = AgentPublisher(
        MessageClient(bus, "/caesura/vm/w1"), vm="w1", boot_id="b", clock="system", canary=CanaryKeeper(0)
    )
    async with running(bus):
        await voice.presence.announce()
        await voice.presence.goodbye(timeout_s=1.0)
        await voice.presence.announce()
    heard = retained(broker, m.AgentPresence, vm="w1")
    assert isinstance(heard, m.AgentPresence)
    assert not heard.online
