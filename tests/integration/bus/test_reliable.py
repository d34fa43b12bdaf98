"""The reliable publisher over every bus: what a real broker refuses, and what one that dies takes with it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from functools import partial

from caesura.bus.port import Delivery
from caesura.conformance.bus_harness import BrokerCapabilities, BusHarness
from caesura.delivery.message import OutboxMessage
from caesura.delivery.publisher import ReliablePublisher
from caesura_testing.collector import PATIENCE_S, Collector, eventually, running


def message(topic: str, number: int) -> OutboxMessage:
    name = f"{topic} {number}"
    return OutboxMessage(event_id=name, type="t", topic=topic, payload=name.encode())


def _has(least: int, deliveries: list[Delivery]) -> bool:
    return len(deliveries) >= least


@asynccontextmanager
async def publishing(publisher: ReliablePublisher) -> AsyncIterator[None]:
    task = asyncio.create_task(publisher.run())
    try:
        yield
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


async def test_a_topic_that_the_broker_refuses_holds_up_no_other(harness: BusHarness) -> None:
    harness.require(BrokerCapabilities.SAY_REFUSED)
    got, sender = Collector(), await harness.bus()
    publisher = ReliablePublisher(sender, retry_s=0.05)
    async with (
        running(await harness.bus(filters=["open/#", "denied/#"]), got.receive),
        running(sender),
        publishing(publisher),
    ):
        for number in range(20):
            publisher.put(message("denied/a", number), message("open/a", number), message("open/b", number))
        await got.until(lambda deliveries: len(deliveries) >= 40)
        await eventually(lambda: len(publisher) == publisher.refused == 20)
        assert not await publisher.drained(PATIENCE_S)
        failures = sender.stats.publish_failures
        await eventually(lambda: sender.stats.publish_failures > failures + 1)
        assert len(publisher) == 20, "it is tried again, and nothing is dropped"
    for topic in ("open/a", "open/b"):
        came = [each.payload.decode() for each in got.deliveries if each.topic == topic]
        assert came == [f"{topic} {number}" for number in range(20)]
    assert not [each for each in got.deliveries if each.topic == "denied/a"]


async def test_a_connection_that_is_lost_again_and_again_loses_nothing_and_no_order(
    harness: BusHarness,
) -> None:
    got, sender = Collector(), await harness.bus("sender")
    publisher = ReliablePublisher(sender)
    topics = [f"open/t{number}" for number in range(7)]
    async with (
        running(await harness.bus(filters=["open/#"]), got.receive),
        running(sender),
        publishing(publisher),
    ):
        for lost in range(4):
            publisher.put(*(message(topics[number % 7], lost * 100 + number) for number in range(100)))
            if lost < 3:
                await got.until(partial(_has, lost * 30 + 1))
                await harness.cut("sender")
        assert await publisher.drained(PATIENCE_S)
        await got.until(lambda deliveries: len({each.payload for each in deliveries}) == 400)
    for topic in topics:
        came = list(dict.fromkeys(each.payload.decode() for each in got.deliveries if each.topic == topic))
        assert came == sorted(came, key=lambda each: int(each.split()[1]))
