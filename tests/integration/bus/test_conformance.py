"""What the port promises, on every adapter and every broker that the suite is meant to run on."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections import Counter
from contextlib import suppress

import pytest
from structlog.testing import capture_logs

from caesura.bus.port import BusUnavailable, Delivery, PublishRefused, Will
from caesura_testing.collector import PATIENCE_S, Collector, eventually, running
from caesura_testing.harness import KINDS, BrokerCapabilities, Harness, why_not
from caesura_testing.patience import patient


def needs(ability: BrokerCapabilities) -> pytest.MarkDecorator:
    """Run where the broker keeps this promise; elsewhere report an expected failure, and its reason."""
    return pytest.mark.parametrize(
        "harness",
        [
            pytest.param(kind, marks=pytest.mark.xfail(run=False, reason=reason))
            if (reason := why_not(kind, ability))
            else kind
            for kind in KINDS
        ],
        indirect=True,
    )


async def test_a_message_reaches_its_subscriber_unchanged(harness: Harness) -> None:
    got = Collector()
    payload = bytes(range(256)) * 40
    async with running(await harness.bus(filters=["open/a"]), got.receive), running(await harness.bus()) as _:
        sender = await harness.bus()
        async with running(sender):
            await sender.publish("open/a", payload)
            await got.until(lambda deliveries: len(deliveries) == 1)
    assert got.deliveries == [Delivery("open/a", payload, retained=False)]
    assert sender.stats.published == 1


async def test_wildcards_cover_what_they_say(harness: Harness) -> None:
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


async def test_a_late_subscriber_gets_the_newest_retained_message(harness: Harness) -> None:
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


async def test_messages_of_one_sender_on_one_topic_arrive_in_order(harness: Harness) -> None:
    got = Collector()
    sender = await harness.bus()
    wanted = [b"%d" % number for number in range(1_000)]
    async with running(await harness.bus(filters=["open/order"]), got.receive), running(sender):
        for payload in wanted:
            await sender.publish("open/order", payload)
        await got.until_payload(wanted[-1])
    assert list(dict.fromkeys(got.payloads)) == wanted


async def test_messages_published_at_once_all_arrive_in_the_order_of_the_calls(harness: Harness) -> None:
    got = Collector()
    sender = await harness.bus()
    wanted = [b"%d" % number for number in range(300)]
    async with running(await harness.bus(filters=["open/burst"]), got.receive), running(sender):
        await asyncio.gather(*(sender.publish("open/burst", payload) for payload in wanted))
        await got.until(lambda deliveries: len({each.payload for each in deliveries}) == len(wanted))
    assert list(dict.fromkeys(got.payloads)) == wanted
    assert sender.stats.published == len(wanted)


async def test_one_message_is_handled_at_a_time(harness: Harness) -> None:
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


async def test_a_handler_that_raises_is_logged_and_the_message_counts_as_handled(harness: Harness) -> None:
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


async def test_after_the_broker_was_killed_everything_is_subscribed_and_greeted_again(
    harness: Harness,
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


@needs(BrokerCapabilities.KEEP_OVER_A_KILL)
async def test_retained_messages_outlive_a_killed_broker(harness: Harness) -> None:
    sender = await harness.bus("sender")
    async with running(sender):
        await sender.publish("open/kept", b"kept", retain=True)
        await harness.until_stored(b"kept")
        await harness.kill()
        await harness.revive()
    got = Collector()
    async with running(await harness.bus(filters=["open/kept"]), got.receive):
        await got.until_payload(b"kept")


async def test_the_last_will_is_sent_when_a_client_vanishes(harness: Harness) -> None:
    got, late = Collector(), Collector()
    will = Will("open/presence/h1", b"gone")
    async with running(await harness.bus(filters=["open/presence/+"]), got.receive):
        async with running(await harness.bus("mortal", will=will)):
            await harness.cut("mortal")
            await got.until_payload(b"gone")
        async with running(await harness.bus(filters=["open/presence/h1"]), late.receive):
            await late.until_payload(b"gone")
    assert late.deliveries[0].retained


async def test_no_last_will_after_a_goodbye_or_a_cancelled_run(harness: Harness) -> None:
    got = Collector()
    sender = await harness.bus()
    async with running(await harness.bus(filters=["open/#"]), got.receive), running(sender):
        async with running(await harness.bus("polite", will=Will("open/polite", b"gone"))):
            pass
        async with running(await harness.bus("cancelled", will=Will("open/cancelled", b"gone"))) as task:
            task.cancel()
            await asyncio.wait({task})
        await sender.publish("open/end", b"end")
        await got.until_payload(b"end")
    assert got.payloads == [b"end"]


@needs(BrokerCapabilities.QUEUE_WHILE_AWAY)
async def test_a_persistent_session_gets_what_was_sent_while_it_was_away(harness: Harness) -> None:
    got = Collector()
    sender = await harness.bus()
    wanted = [b"%d" % number for number in range(200)]
    async with running(sender):
        async with running(await harness.bus("sleeper", filters=["open/mail"], clean=False)):
            pass
        for payload in wanted:
            await sender.publish("open/mail", payload)
        async with running(await harness.bus("sleeper", filters=["open/mail"], clean=False), got.receive):
            await got.until_payload(wanted[-1])
    assert list(dict.fromkeys(got.payloads)) == wanted


async def test_a_clean_session_gets_nothing_of_what_it_missed(harness: Harness) -> None:
    got = Collector()
    sender = await harness.bus()
    async with running(sender):
        async with running(await harness.bus("forgetful", filters=["open/mail"])):
            pass
        await sender.publish("open/mail", b"missed")
        async with running(await harness.bus("forgetful", filters=["open/mail"]), got.receive):
            await sender.publish("open/mail", b"seen")
            await got.until_payload(b"seen")
    assert got.payloads == [b"seen"]


@needs(BrokerCapabilities.REDELIVER)
async def test_a_message_whose_handler_never_returned_comes_again(harness: Harness) -> None:
    begun = asyncio.Event()
    first, second = Collector(), Collector()

    async def receive(delivery: Delivery) -> None:
        await first.receive(delivery)
        if delivery.payload == b"2":
            begun.set()
            await asyncio.Event().wait()

    sender = await harness.bus()
    async with running(sender):
        async with running(await harness.bus("worker", filters=["open/work"], clean=False), receive) as task:
            for payload in (b"1", b"2", b"3"):
                await sender.publish("open/work", payload)
            await asyncio.wait_for(begun.wait(), PATIENCE_S)
            task.cancel()  # the process dies in the middle of the second message
            await asyncio.wait({task})
        async with running(await harness.bus("worker", filters=["open/work"], clean=False), second.receive):
            await second.until_payload(b"3")
    assert first.payloads == [b"1", b"2"]
    assert second.payloads == [b"2", b"3"]


class HeldCommits:
    """A store whose disk answers on demand."""

    def __init__(self) -> None:
        self.settled = False
        self.waited = 0
        self._go = asyncio.Event()

    async def reached(self) -> None:
        self.waited += 1
        await self._go.wait()
        self._go.clear()

    def answer(self) -> None:
        self._go.set()


@needs(BrokerCapabilities.REDELIVER)
async def test_messages_are_handled_and_not_acknowledged_until_what_they_led_to_is_on_disk(
    harness: Harness,
) -> None:
    first, second = Collector(), Collector()
    disk = HeldCommits()
    sender = await harness.bus()
    async with running(sender):
        worker = await harness.bus("worker", filters=["open/work"], clean=False)
        task = asyncio.create_task(worker.run(first.receive, commits=disk))
        assert await worker.wait_connected(PATIENCE_S)
        await sender.publish("open/work", b"1")
        await first.until_payload(b"1")
        await eventually(lambda: disk.waited == 1)
        for payload in (b"2", b"3"):
            await sender.publish("open/work", payload)
        await first.until_payload(b"3")  # the disk holds nobody up
        assert disk.waited == 1
        disk.answer()
        await eventually(lambda: disk.waited == 2)  # the first is acknowledged; one wait for all the others
        task.cancel()  # a power cut before the disk has the others
        await asyncio.wait({task})
        async with running(await harness.bus("worker", filters=["open/work"], clean=False), second.receive):
            await second.until_payload(b"3")
    assert first.payloads == [b"1", b"2", b"3"]
    assert second.payloads == [b"2", b"3"]


@needs(BrokerCapabilities.REDELIVER)
async def test_close_waits_for_the_disk_of_what_was_handled(harness: Harness) -> None:
    first, second = Collector(), Collector()
    disk = HeldCommits()
    sender = await harness.bus()
    async with running(sender):
        worker = await harness.bus("worker", filters=["open/work"], clean=False)
        task = asyncio.create_task(worker.run(first.receive, commits=disk))
        assert await worker.wait_connected(PATIENCE_S)
        await sender.publish("open/work", b"1")
        await eventually(lambda: disk.waited == 1)
        closing = asyncio.create_task(worker.close())
        await asyncio.sleep(0)
        disk.answer()
        async with asyncio.timeout(PATIENCE_S):
            await closing
            await task
        async with running(await harness.bus("worker", filters=["open/work"], clean=False), second.receive):
            await sender.publish("open/work", b"2")
            await second.until_payload(b"2")
    assert second.payloads == [b"2"]


@needs(BrokerCapabilities.QUEUE_WHILE_AWAY)
async def test_a_cut_connection_heals_and_loses_nothing_of_a_persistent_session(harness: Harness) -> None:
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


async def test_a_publish_in_flight_fails_as_soon_as_the_broker_dies(harness: Harness) -> None:
    sender = await harness.bus()
    async with running(sender):
        await harness.stall()
        publishing = [asyncio.create_task(sender.publish("open/a", b"x", timeout_s=60)) for _ in range(50)]
        done, _ = await asyncio.wait(publishing, timeout=0.1)
        assert not done
        began_s = time.monotonic()
        await harness.kill()
        results = await asyncio.gather(*publishing, return_exceptions=True)
        assert time.monotonic() - began_s < patient(2)
    assert {type(each) for each in results} == {BusUnavailable}
    assert sender.stats.publish_failures == 50


async def test_who_tries_again_at_once_does_not_keep_the_end_of_the_connection_from_being_noticed(
    harness: Harness,
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


async def test_a_publish_without_an_answer_ends_with_its_timeout(harness: Harness) -> None:
    sender = await harness.bus()
    async with running(sender):
        await harness.stall()
        with pytest.raises(BusUnavailable, match="open/a"):
            await sender.publish("open/a", b"x", timeout_s=0.2)
        await harness.kill()
        with pytest.raises(BusUnavailable, match="open/b"):
            await sender.publish("open/b", b"x", timeout_s=0.2)


async def test_a_publish_waits_for_a_connection_that_comes_in_time(harness: Harness) -> None:
    got = Collector()
    sender = await harness.bus()
    task = asyncio.create_task(sender.publish("open/early", b"early"))
    async with running(await harness.bus(filters=["open/early"]), got.receive), running(sender):
        await task
        await got.until_payload(b"early")


@needs(BrokerCapabilities.SAY_REFUSED)
async def test_a_refused_publish_raises_and_leaves_the_connection_alone(harness: Harness) -> None:
    sender = await harness.bus()
    async with running(sender):
        with pytest.raises(PublishRefused) as refusal:
            await sender.publish("denied/a", b"x")
        await sender.publish("open/a", b"x")
    assert refusal.value.topic == "denied/a"
    assert "denied/a" in str(refusal.value)
    assert sender.stats.connects == 1


@needs(BrokerCapabilities.SAY_REFUSED)
async def test_of_400_publishes_at_once_exactly_the_denied_half_is_refused(harness: Harness) -> None:
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


@needs(BrokerCapabilities.QOS_0)
async def test_a_slow_handler_costs_qos_0_messages_and_is_reported(harness: Harness) -> None:
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


async def test_a_slow_handler_holds_qos_1_back_and_loses_nothing(harness: Harness) -> None:
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
    # The memory bus has no socket to stop reading from: there it is the broker's window.
    assert max(backlogs) <= (100 if harness.kind == "memory" else limit + 1)
    assert slow.stats.dropped == 0
    assert slow.stats.connects == 1
    assert [each["event"] for each in logs if each["event"] == "bus.backlog"] == ["bus.backlog"]


async def test_a_held_back_handler_may_still_publish_on_its_own_connection(harness: Harness) -> None:
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


async def test_a_request_and_its_answer_take_a_few_milliseconds(harness: Harness) -> None:
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
    # Without TCP_NODELAY on both sides it is 44 to 88 ms.
    assert statistics.median(taken_s) < min(patient(0.02), 0.04)


async def test_a_closed_bus_publishes_nothing_and_closes_again_at_once(harness: Harness) -> None:
    bus = await harness.bus()
    async with running(bus):
        pass
    began_s = time.monotonic()
    with pytest.raises(BusUnavailable, match="closed"):
        await bus.publish("open/a", b"x", timeout_s=30)
    await bus.close()
    assert time.monotonic() - began_s < patient(1)
    assert not bus.stats.connected
    with pytest.raises(RuntimeError, match="once"):
        await bus.run(Collector().receive)


async def test_close_before_run_and_from_the_handler(harness: Harness) -> None:
    early = await harness.bus()
    await early.close()
    await asyncio.wait_for(early.run(Collector().receive), PATIENCE_S)

    bus = await harness.bus("self-closing", filters=["open/stop"])

    async def receive(_: Delivery) -> None:
        await bus.close()

    async with running(bus, receive) as task:
        with suppress(
            BusUnavailable
        ):  # the message may be here, and the connection over, before its acknowledgement
            await bus.publish("open/stop", b"x")
        await asyncio.wait_for(asyncio.shield(task), PATIENCE_S)


async def test_close_lets_the_message_at_hand_be_finished_and_acknowledged(harness: Harness) -> None:
    begun, go = asyncio.Event(), asyncio.Event()
    first, second = Collector(), Collector()

    async def receive(delivery: Delivery) -> None:
        begun.set()
        await go.wait()
        await bus.publish("open/done", b"done")  # the connection is still there
        await first.receive(delivery)

    bus = await harness.bus("tidy", filters=["open/work"], clean=False)
    sender = await harness.bus()
    async with running(sender):
        async with running(bus, receive):
            await sender.publish("open/work", b"1")
            await asyncio.wait_for(begun.wait(), PATIENCE_S)
            closing = asyncio.create_task(bus.close())
            await asyncio.sleep(0)
            assert not closing.done()
            go.set()
            await closing
        async with running(await harness.bus("tidy", filters=["open/work"], clean=False), second.receive):
            await sender.publish("open/work", b"2")
            await second.until_payload(b"2")
    assert first.payloads == [b"1"]
    assert second.payloads == [b"2"]


async def test_a_cancelled_run_leaves_no_tasks_behind(harness: Harness) -> None:
    bus = await harness.bus("tidy", filters=["open/#"])
    before = asyncio.all_tasks()
    async with running(bus, on_connected=asyncio.Event().wait) as task:  # type: ignore[arg-type]
        task.cancel()
        await asyncio.wait({task})
        assert task.cancelled()
        left = {each for each in asyncio.all_tasks() - before if each.get_name().startswith("bus-")}
        assert not left
    assert not bus.stats.connected


async def test_a_greeting_that_fails_does_not_end_the_connection(harness: Harness) -> None:
    got = Collector()
    failed = asyncio.Event()

    async def greet() -> None:
        failed.set()
        raise ValueError("a bug in the hook")

    bus = await harness.bus(filters=["open/a"])
    with capture_logs() as logs:
        async with running(bus, got.receive, greet):
            await asyncio.wait_for(failed.wait(), PATIENCE_S)
            await bus.publish("open/a", b"still here")
            await got.until_payload(b"still here")
    assert [each["event"] for each in logs if each["log_level"] == "error"] == ["bus.on_connected_failed"]


@needs(BrokerCapabilities.TAKE_OVER)
async def test_two_clients_with_one_id_do_not_fight_fast(harness: Harness) -> None:
    first = await harness.bus("twin")
    second = await harness.bus("twin")
    async with running(first), running(second):
        await eventually(lambda: bool(first.stats.last_error))
        await asyncio.sleep(0.5)
        assert first.stats.connects + second.stats.connects < 12
