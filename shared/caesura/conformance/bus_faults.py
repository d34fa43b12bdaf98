"""A broker that dies, stalls or refuses, and a handler that is slower than what arrives."""

from __future__ import annotations

import asyncio
import time

import pytest
from structlog.testing import capture_logs

from caesura.bus.port import BusUnavailable, Delivery, PublishRefused
from caesura.conformance.bus_harness import BrokerCapabilities, BusHarness, requires
from caesura.conformance.collector import PATIENCE_S, Collector, eventually, running
from caesura.conformance.patience import patient


@pytest.mark.asyncio
class BusFaults:
    """What a bus does when its broker, its connection or its handler fails."""

    @requires(BrokerCapabilities.SERVE_AFTER_A_KILL)
    async def test_after_the_broker_was_killed_everything_is_subscribed_and_greeted_again(
        self,
        harness: BusHarness,
    ) -> None:
        got = Collector()
        greetings = asyncio.Queue[int]()
        listener = await harness.bus("listener", filters=["open/a", "open/b/#"])
        sender = await harness.bus("sender")

        async def greet() -> None:
            await listener.publish("open/hello", b"hello", retain=True)
            greetings.put_nowait(listener.stats.connects)

        async with running(listener, got.receive, greet), running(sender):
            assert await asyncio.wait_for(greetings.get(), PATIENCE_S) == 1
            await harness.kill()
            await eventually(lambda: not listener.stats.connected and not sender.stats.connected)
            await harness.revive()
            assert await asyncio.wait_for(greetings.get(), PATIENCE_S) == 2
            assert await sender.wait_connected(PATIENCE_S)
            await sender.publish("open/a", b"a")
            await sender.publish("open/b/c", b"b")
            await got.until_payload(b"b")
            assert b"a" in got.payloads
            assert listener.stats.connected
            assert listener.stats.last_error == ""

    @requires(BrokerCapabilities.QUEUE_WHILE_AWAY)
    async def test_a_cut_connection_heals_and_loses_nothing_of_a_persistent_session(
        self, harness: BusHarness
    ) -> None:
        got = Collector()
        sender = await harness.bus()
        listener = await harness.bus("listener", filters=["open/count"], clean=False)
        wanted = {b"%d" % number for number in range(100)}
        async with running(listener, got.receive), running(sender):
            for number, payload in enumerate(sorted(wanted)):
                if number in {30, 60}:
                    await harness.cut("listener")
                await sender.publish("open/count", payload)
            await got.until(lambda deliveries: {each.payload for each in deliveries} == wanted)
        assert listener.stats.connects >= 2

    async def test_a_publish_in_flight_fails_as_soon_as_the_broker_dies(self, harness: BusHarness) -> None:
        sender = await harness.bus()
        async with running(sender):
            await harness.stall()
            publishing = [
                asyncio.create_task(sender.publish("open/a", b"x", timeout_s=60)) for _ in range(50)
            ]
            done, _ = await asyncio.wait(publishing, timeout=0.1)
            assert not done
            began_s = time.monotonic()
            await harness.kill()
            results = await asyncio.gather(*publishing, return_exceptions=True)
            assert time.monotonic() - began_s < patient(2)
        assert {type(each) for each in results} == {BusUnavailable}
        assert sender.stats.publish_failures == 50

    async def test_who_tries_again_at_once_does_not_keep_the_end_of_the_connection_from_being_noticed(
        self,
        harness: BusHarness,
    ) -> None:
        """A failed publish and ``wait_connected`` must not both return at once: no other task would ever run again."""
        sender = await harness.bus()
        failures = 0

        async def insist() -> None:
            nonlocal failures
            while True:
                try:
                    await sender.publish("open/a", b"x", qos=0)
                    await asyncio.sleep(0)
                except BusUnavailable:
                    failures += 1
                    if failures > 1000:
                        return
                    await sender.wait_connected(60)

        async with running(sender):
            assert await sender.wait_connected(PATIENCE_S)
            insisting = asyncio.create_task(insist())
            await harness.kill()
            await eventually(lambda: not sender.stats.connected)
            assert not insisting.done(), f"{failures} failures in a row"
            insisting.cancel()
        assert failures < 10

    async def test_a_publish_without_an_answer_ends_with_its_timeout(self, harness: BusHarness) -> None:
        sender = await harness.bus()
        async with running(sender):
            await harness.stall()
            with pytest.raises(BusUnavailable, match="open/a"):
                await sender.publish("open/a", b"x", timeout_s=0.2)
            await harness.kill()
            with pytest.raises(BusUnavailable, match="open/b"):
                await sender.publish("open/b", b"x", timeout_s=0.2)

    async def test_a_publish_waits_for_a_connection_that_comes_in_time(self, harness: BusHarness) -> None:
        got = Collector()
        sender = await harness.bus()
        task = asyncio.create_task(sender.publish("open/early", b"early"))
        async with running(await harness.bus(filters=["open/early"]), got.receive), running(sender):
            await task
            await got.until_payload(b"early")

    @requires(BrokerCapabilities.SAY_REFUSED)
    async def test_a_refused_publish_raises_and_leaves_the_connection_alone(
        self, harness: BusHarness
    ) -> None:
        sender = await harness.bus()
        async with running(sender):
            with pytest.raises(PublishRefused) as refusal:
                await sender.publish("denied/a", b"x")
            await sender.publish("open/a", b"x")
        assert refusal.value.topic == "denied/a"
        assert "denied/a" in str(refusal.value)
        assert sender.stats.connects == 1

    @requires(BrokerCapabilities.SAY_REFUSED)
    async def test_of_400_publishes_at_once_exactly_the_denied_half_is_refused(
        self, harness: BusHarness
    ) -> None:
        sender = await harness.bus()
        topics = [f"{'open' if number % 2 else 'denied'}/{number}" for number in range(400)]
        async with running(sender):
            results = await asyncio.gather(
                *(sender.publish(topic, b"x") for topic in topics), return_exceptions=True
            )
        for topic, result in zip(topics, results, strict=True):
            if topic.startswith("denied"):
                assert isinstance(result, PublishRefused)
                assert result.topic == topic
            else:
                assert result is None
        assert (sender.stats.published, sender.stats.publish_failures) == (200, 200)

    @requires(BrokerCapabilities.QOS_0)
    async def test_a_slow_handler_costs_qos_0_messages_and_is_reported(self, harness: BusHarness) -> None:
        limit = 20
        go = asyncio.Event()
        got = Collector()

        async def receive(delivery: Delivery) -> None:
            await go.wait()
            await got.receive(delivery)

        slow = await harness.bus("slow", filters=["open/#"], backlog_limit=limit)
        sender = await harness.bus()
        with capture_logs() as logs:
            async with running(slow, receive), running(sender):
                for number in range(300):
                    await sender.publish(f"open/{number}", b"x", qos=0)
                await eventually(lambda: slow.stats.received == 300)
                assert slow.stats.backlog <= limit
                assert slow.stats.dropped >= 300 - limit - 1
                go.set()
                await sender.publish("open/end", b"end")
                await got.until_payload(b"end")
        warnings = [each for each in logs if each["event"] == "bus.backlog"]
        assert len(warnings) == 1  # loud, but not once a message
        assert warnings[0]["limit"] == limit

    async def test_a_slow_handler_holds_qos_1_back_and_loses_nothing(self, harness: BusHarness) -> None:
        limit = 20
        go, begun = asyncio.Event(), asyncio.Event()
        got = Collector()
        backlogs: list[int] = []

        async def receive(delivery: Delivery) -> None:
            begun.set()
            await go.wait()
            backlogs.append(slow.stats.backlog)
            await got.receive(delivery)

        slow = await harness.bus("slow", filters=["open/work"], backlog_limit=limit, clean=False)
        sender = await harness.bus()
        wanted = {b"%d" % number for number in range(400)}
        with capture_logs() as logs:
            async with running(slow, receive), running(sender):
                await asyncio.gather(*(sender.publish("open/work", payload) for payload in sorted(wanted)))
                await asyncio.wait_for(begun.wait(), PATIENCE_S)
                await eventually(lambda: slow.stats.received >= limit)
                go.set()
                await got.until(lambda deliveries: {each.payload for each in deliveries} == wanted)
        assert max(backlogs) <= max(harness.window, limit + 1)
        assert slow.stats.dropped == 0
        assert slow.stats.connects == 1
        assert [each["event"] for each in logs if each["event"] == "bus.backlog"] == ["bus.backlog"]

    async def test_a_held_back_handler_may_still_publish_on_its_own_connection(
        self, harness: BusHarness
    ) -> None:
        go, begun = asyncio.Event(), asyncio.Event()
        got = Collector()

        async def receive(delivery: Delivery) -> None:
            begun.set()
            await go.wait()
            # The answer to this comes behind the flood, on a connection that is not being read.
            await slow.publish("open/answer", delivery.payload, timeout_s=60)
            await got.receive(delivery)

        slow = await harness.bus("slow", filters=["open/work"], backlog_limit=10, clean=False)
        sender = await harness.bus()
        wanted = {b"%d" % number for number in range(300)}
        async with running(slow, receive), running(sender):
            await asyncio.gather(*(sender.publish("open/work", payload) for payload in sorted(wanted)))
            await asyncio.wait_for(begun.wait(), PATIENCE_S)
            await eventually(lambda: slow.stats.received >= 10)
            go.set()
            await got.until(lambda deliveries: {each.payload for each in deliveries} == wanted)
        assert slow.stats.connects == 1
