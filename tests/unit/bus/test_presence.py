"""A service's presence: when it is announced, what is said of a broker that refuses it, and that its goodbye is its last message."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from functools import partial

from structlog.testing import capture_logs

from caesura.bus.memory import MemoryBroker, MemoryBus
from caesura.bus.messaging import MessageClient
from caesura.bus.presence import Presence, last_will
from caesura.contract.codec import decode
from caesura.contract.messages import PublisherPresence
from caesura_testing.collector import Collector, eventually, running

TOPIC = "caesura/v1/metadata/p/presence"
SOURCE = "/caesura/default/metadata/p"


def message(online: bool) -> PublisherPresence:
    return PublisherPresence(instance="p", online=online)


def presence_of(bus: MemoryBus, beat_s: float = 30.0) -> Presence:
    return Presence(
        MessageClient(bus, SOURCE),
        partial(message, True),
        partial(message, False),
        beat_s=beat_s,
        instance="p",
    )


@asynccontextmanager
async def announcing(presence: Presence, **how: object) -> AsyncIterator[None]:
    task = asyncio.create_task(presence.run(**how))  # type: ignore[arg-type]
    try:
        yield
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


def retained(broker: MemoryBroker) -> object:
    payload = broker.retained.get(TOPIC)
    return decode(TOPIC, payload).message if payload else None


async def test_it_is_announced_again_when_it_changed_and_from_time_to_time() -> None:
    broker, ear = MemoryBroker(), Collector()
    bus = MemoryBus(broker)
    seldom, often = presence_of(bus, beat_s=3600.0), presence_of(bus, beat_s=0.01)
    async with running(MemoryBus(broker, filters=["#"]), ear.receive), running(bus):
        async with announcing(seldom):
            seldom.changed()
            await ear.until(lambda deliveries: len(deliveries) == 1)
            seldom.changed()
            await ear.until(lambda deliveries: len(deliveries) == 2)
        async with announcing(often):
            await ear.until(lambda deliveries: len(deliveries) >= 5)
    assert retained(broker) == message(True)


async def test_nothing_is_announced_while_there_is_nothing_to_announce() -> None:
    broker, asked = MemoryBroker(), 0

    def never() -> bool:
        nonlocal asked
        asked += 1
        return False

    bus = MemoryBus(broker)
    async with running(bus), announcing(presence_of(bus, beat_s=0.001), allowed=never):
        await eventually(lambda: asked > 3)
    assert broker.retained == {}


async def test_that_the_broker_refuses_it_is_logged_once_and_ends_nothing() -> None:
    broker = MemoryBroker(may_publish=lambda *_: False)
    bus = MemoryBus(broker)
    presence = presence_of(bus, beat_s=0.001)
    with capture_logs() as logs:
        async with running(bus):
            assert not await presence.announce()
            async with announcing(presence):
                await eventually(lambda: bus.stats.publish_failures > 5)
                broker.may_publish = lambda *_: True
                await eventually(lambda: retained(broker) == message(True))
    assert [each["topic"] for each in logs if each["event"] == "presence.refused"] == [TOPIC]


async def test_without_a_connection_it_says_so_in_time() -> None:
    presence = presence_of(MemoryBus(MemoryBroker()))
    assert not await presence.announce(timeout_s=0.01)
    await presence.goodbye(timeout_s=0.01)


async def test_after_the_goodbye_nothing_is_announced() -> None:
    broker = MemoryBroker()
    bus = MemoryBus(broker)
    presence = presence_of(bus, beat_s=0.001)
    async with running(bus), announcing(presence):
        await eventually(lambda: retained(broker) == message(True))
        await presence.goodbye(timeout_s=1.0)
        published = bus.stats.published
        presence.changed()
        assert await presence.announce()
    assert bus.stats.published == published
    assert retained(broker) == message(False)


async def test_the_will_is_the_goodbye_of_one_that_vanished() -> None:
    broker = MemoryBroker()
    will = last_will(message(False), SOURCE, instance="p")
    async with running(MemoryBus(broker, client_id="gone", will=will)):
        broker.kill("gone")
        await eventually(lambda: retained(broker) == message(False))
    assert decode(TOPIC, broker.retained[TOPIC]).header.source == SOURCE


async def test_a_refusal_is_an_answer_and_silence_is_not() -> None:
    refusing = MemoryBus(MemoryBroker(may_publish=lambda *_: False))
    presence = presence_of(refusing)
    assert not await presence.answered(timeout_s=0.01), "not connected"
    async with running(refusing):
        await refusing.wait_connected(5)
        assert not await presence.announce()
        assert await presence.answered()
