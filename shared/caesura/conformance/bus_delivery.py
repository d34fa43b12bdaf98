"""What arrives: unchanged, in order, handled one at a time, and retained messages."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections import Counter

import pytest
from structlog.testing import capture_logs

from caesura.bus.port import Delivery
from caesura.conformance.bus_harness import BrokerCapabilities, BusHarness, requires
from caesura.conformance.collector import Collector, running


@pytest.mark.asyncio
class BusDelivery:
    """What a subscriber receives."""

    async def test_a_message_reaches_its_subscriber_unchanged(self, harness: BusHarness) -> None:
        got = Collector()
        payload = bytes(range(256)) * 40
        async with (
            running(await harness.bus(filters=["open/a"]), got.receive),
            running(await harness.bus()) as _,
        ):
            sender = await harness.bus()
            async with running(sender):
                await sender.publish("open/a", payload)
                await got.until(lambda deliveries: len(deliveries) == 1)
        assert got.deliveries == [Delivery("open/a", payload, retained=False)]
        assert sender.stats.published == 1

    async def test_wildcards_cover_what_they_say(self, harness: BusHarness) -> None:
        one, rest = Collector(), Collector()
        sender = await harness.bus()
        topics = [
            "open/host/h1/state",
            "open/host/h2/state",
            "open/host",
            "open/host/h1/state/deep",
            "open/vm/h1/state",
        ]
        async with (
            running(await harness.bus(filters=["open/host/+/state"]), one.receive),
            running(await harness.bus(filters=["open/host/#", "open/end"]), rest.receive),
            running(await harness.bus(filters=["open/end"]), one.receive),
            running(sender),
        ):
            for topic in topics:
                await sender.publish(topic, topic.encode())
            await sender.publish("open/end", b"end")
            await rest.until_payload(b"end")
            await one.until_payload(b"open/host/h2/state")
        assert {each.topic for each in one.deliveries} - {"open/end"} == {topics[0], topics[1]}
        assert {each.topic for each in rest.deliveries} == {*topics[:4], "open/end"}

    @requires(BrokerCapabilities.RETAIN)
    async def test_a_late_subscriber_gets_the_newest_retained_message(self, harness: BusHarness) -> None:
        sender = await harness.bus()
        late, later = Collector(), Collector()
        async with running(sender):
            await sender.publish("open/state/a", b"old", retain=True)
            await sender.publish("open/state/a", b"new", retain=True)
            await sender.publish("open/event/a", b"not retained")
            async with running(await harness.bus(filters=["open/state/+", "open/event/+"]), late.receive):
                await late.until_payload(b"new")
                await sender.publish("open/state/a", b"live", retain=True)
                await late.until_payload(b"live")
            await sender.publish("open/state/a", b"", retain=True)
            await sender.publish("open/state/b", b"b", retain=True)
            async with running(await harness.bus(filters=["open/state/+"]), later.receive):
                await later.until_payload(b"b")
        # A set, not a list: amqtt sends retained messages twice on a wildcard.
        assert set(late.deliveries) == {
            Delivery("open/state/a", b"new", retained=True),
            Delivery("open/state/a", b"live", retained=False),
        }
        assert set(later.deliveries) == {Delivery("open/state/b", b"b", retained=True)}

    async def test_messages_of_one_sender_on_one_topic_arrive_in_order(self, harness: BusHarness) -> None:
        got = Collector()
        sender = await harness.bus()
        wanted = [b"%d" % number for number in range(1_000)]
        async with running(await harness.bus(filters=["open/order"]), got.receive), running(sender):
            for payload in wanted:
                await sender.publish("open/order", payload)
            await got.until_payload(wanted[-1])
        assert list(dict.fromkeys(got.payloads)) == wanted

    async def test_messages_published_at_once_all_arrive_in_the_order_of_the_calls(
        self, harness: BusHarness
    ) -> None:
        got = Collector()
        sender = await harness.bus()
        wanted = [b"%d" % number for number in range(300)]
        async with running(await harness.bus(filters=["open/burst"]), got.receive), running(sender):
            await asyncio.gather(*(sender.publish("open/burst", payload) for payload in wanted))
            await got.until(lambda deliveries: len({each.payload for each in deliveries}) == len(wanted))
        assert list(dict.fromkeys(got.payloads)) == wanted
        assert sender.stats.published == len(wanted)

    async def test_one_message_is_handled_at_a_time(self, harness: BusHarness) -> None:
        handling = 0
        overlaps: list[int] = []
        got = Collector()

        async def receive(delivery: Delivery) -> None:
            nonlocal handling
            handling += 1
            overlaps.append(handling)
            await asyncio.sleep(0.001)
            handling -= 1
            await got.receive(delivery)

        sender = await harness.bus()
        async with running(await harness.bus(filters=["open/#"]), receive), running(sender):
            await asyncio.gather(*(sender.publish(f"open/{number}", b"x") for number in range(30)))
            await got.until(lambda deliveries: len({each.topic for each in deliveries}) == 30)
        assert set(overlaps) == {1}

    async def test_a_handler_that_raises_is_logged_and_the_message_counts_as_handled(
        self, harness: BusHarness
    ) -> None:
        got = Collector()

        async def receive(delivery: Delivery) -> None:
            await got.receive(delivery)
            if delivery.payload == b"poison":
                raise ValueError("cannot digest")
            if delivery.payload == b"stray":
                raise asyncio.CancelledError  # of something that the handler cancelled itself

        persistent = await harness.bus("eater", filters=["open/food"], clean=False)
        sender = await harness.bus()
        with capture_logs() as logs:
            async with running(sender):
                async with running(persistent, receive):
                    for payload in (b"poison", b"stray", b"good"):
                        await sender.publish("open/food", payload)
                    await got.until_payload(b"good")
                again = await harness.bus("eater", filters=["open/food"], clean=False)
                async with running(again, got.receive):
                    await sender.publish("open/food", b"last")
                    await got.until_payload(b"last")
        assert Counter(got.payloads)[b"poison"] == 1
        assert Counter(got.payloads)[b"stray"] == 1
        failed = [each for each in logs if each["event"] == "bus.handler_failed"]
        assert [each["topic"] for each in failed] == ["open/food", "open/food"]

    async def test_a_request_and_its_answer_take_a_few_milliseconds(self, harness: BusHarness) -> None:
        answered = asyncio.Event()
        server = await harness.bus(filters=["open/request"])
        client = await harness.bus(filters=["open/answer"])

        async def answer(delivery: Delivery) -> None:
            await server.publish("open/answer", delivery.payload)

        async def take(_: Delivery) -> None:
            answered.set()

        taken_s: list[float] = []
        async with running(server, answer), running(client, take):
            for number in range(100):
                answered.clear()
                began_s = time.perf_counter()
                await client.publish("open/request", b"%d" % number)
                await answered.wait()
                taken_s.append(time.perf_counter() - began_s)
        # Without TCP_NODELAY on both sides each takes 44 to 88 ms (but the first ones), so a quarter that does not is enough on a busy machine.
        assert statistics.quantiles(taken_s, n=4)[0] < 0.04
