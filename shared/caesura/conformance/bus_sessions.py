"""Sessions, last wills and acknowledgements: what outlives a connection, and what a closed bus leaves."""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress

import pytest
from structlog.testing import capture_logs

from caesura.bus.port import BusUnavailable, Delivery, Will
from caesura.conformance.bus_harness import BrokerCapabilities, BusHarness, requires
from caesura.conformance.collector import PATIENCE_S, Collector, eventually, publishing, running
from caesura.conformance.patience import patient


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


@pytest.mark.asyncio
class BusSessions:
    """What outlives a connection, and how one ends."""

    @requires(
        BrokerCapabilities.SERVE_AFTER_A_KILL,
        BrokerCapabilities.KEEP_OVER_A_KILL,
        BrokerCapabilities.RETAIN,
    )
    async def test_retained_messages_outlive_a_killed_broker(self, harness: BusHarness) -> None:
        sender = await harness.bus("sender")
        async with running(sender):
            await sender.publish("open/kept", b"kept", retain=True)
            await harness.until_stored(b"kept")
            await harness.kill()
            await harness.revive()
        got = Collector()
        async with running(await harness.bus(filters=["open/kept"]), got.receive):
            await got.until_payload(b"kept")

    async def test_a_filter_that_is_added_later_is_kept_over_connections(self, harness: BusHarness) -> None:
        got = Collector()
        sender = await harness.bus()
        receiver = await harness.bus("receiver", filters=["open/first"])
        async with running(sender), running(receiver, got.receive):
            await sender.publish("open/later", b"early")
            await sender.publish("open/first", b"1")
            await got.until_payload(b"1")
            assert [each.payload for each in got.deliveries] == [b"1"]
            receiver.subscribe_also(["open/later", "open/first"])
            async with publishing(
                sender, "open/later", b"2"
            ):  # nothing says when the broker knows the filter
                await got.until_payload(b"2")
            await harness.cut("receiver")
            await eventually(lambda: receiver.stats.connects == 2)
            await receiver.wait_connected(PATIENCE_S)
            await sender.publish("open/later", b"3")
            await got.until_payload(b"3")

    @requires(BrokerCapabilities.RETAIN)
    async def test_a_filter_that_is_added_later_brings_what_is_retained(self, harness: BusHarness) -> None:
        got = Collector()
        sender = await harness.bus()
        receiver = await harness.bus("receiver", filters=["open/first"])
        async with running(sender), running(receiver, got.receive):
            await sender.publish("open/later", b"retained", retain=True)
            await sender.publish("open/first", b"1")
            await got.until_payload(b"1")
            receiver.subscribe_also(["open/later"])
            await got.until_payload(b"retained")

    async def test_the_last_will_is_sent_when_a_client_vanishes(self, harness: BusHarness) -> None:
        got = Collector()
        will = Will("open/presence/h1", b"gone")
        async with (
            running(await harness.bus(filters=["open/presence/+"]), got.receive),
            running(await harness.bus("mortal", will=will)),
        ):
            await harness.cut("mortal")
            await got.until_payload(b"gone")

    @requires(BrokerCapabilities.RETAIN)
    async def test_the_last_will_is_retained(self, harness: BusHarness) -> None:
        got, late = Collector(), Collector()
        will = Will("open/presence/h1", b"gone")
        async with running(await harness.bus(filters=["open/presence/+"]), got.receive):
            async with running(await harness.bus("mortal", will=will)):
                await harness.cut("mortal")
                await got.until_payload(b"gone")
            async with running(await harness.bus(filters=["open/presence/h1"]), late.receive):
                await late.until_payload(b"gone")
        assert late.deliveries[0].retained

    async def test_no_last_will_after_a_goodbye_or_a_cancelled_run(self, harness: BusHarness) -> None:
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

    @requires(BrokerCapabilities.QUEUE_WHILE_AWAY)
    async def test_a_persistent_session_gets_what_was_sent_while_it_was_away(
        self, harness: BusHarness
    ) -> None:
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

    async def test_a_clean_session_gets_nothing_of_what_it_missed(self, harness: BusHarness) -> None:
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

    @requires(BrokerCapabilities.REDELIVER)
    async def test_a_message_whose_handler_never_returned_comes_again(self, harness: BusHarness) -> None:
        begun = asyncio.Event()
        first, second = Collector(), Collector()

        async def receive(delivery: Delivery) -> None:
            await first.receive(delivery)
            if delivery.payload == b"2":
                begun.set()
                await asyncio.Event().wait()

        sender = await harness.bus()
        async with running(sender):
            async with running(
                await harness.bus("worker", filters=["open/work"], clean=False), receive
            ) as task:
                for payload in (b"1", b"2", b"3"):
                    await sender.publish("open/work", payload)
                await asyncio.wait_for(begun.wait(), PATIENCE_S)
                task.cancel()  # the process dies in the middle of the second message
                await asyncio.wait({task})
            async with running(
                await harness.bus("worker", filters=["open/work"], clean=False), second.receive
            ):
                await second.until_payload(b"3")
        assert first.payloads == [b"1", b"2"]
        assert second.payloads == [b"2", b"3"]

    @requires(BrokerCapabilities.REDELIVER)
    async def test_messages_are_handled_and_not_acknowledged_until_what_they_led_to_is_on_disk(
        self,
        harness: BusHarness,
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
            await eventually(
                lambda: disk.waited == 2
            )  # the first is acknowledged; one wait for all the others
            task.cancel()  # a power cut before the disk has the others
            await asyncio.wait({task})
            async with running(
                await harness.bus("worker", filters=["open/work"], clean=False), second.receive
            ):
                await second.until_payload(b"3")
        assert first.payloads == [b"1", b"2", b"3"]
        assert second.payloads == [b"2", b"3"]

    @requires(BrokerCapabilities.REDELIVER)
    async def test_close_waits_for_the_disk_of_what_was_handled(self, harness: BusHarness) -> None:
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
            async with running(
                await harness.bus("worker", filters=["open/work"], clean=False), second.receive
            ):
                await sender.publish("open/work", b"2")
                await second.until_payload(b"2")
        assert second.payloads == [b"2"]

    async def test_a_closed_bus_publishes_nothing_and_closes_again_at_once(self, harness: BusHarness) -> None:
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

    async def test_close_before_run_and_from_the_handler(self, harness: BusHarness) -> None:
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

    async def test_close_lets_the_message_at_hand_be_finished_and_acknowledged(
        self, harness: BusHarness
    ) -> None:
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

    async def test_a_cancelled_run_leaves_no_tasks_behind(self, harness: BusHarness) -> None:
        bus = await harness.bus("tidy", filters=["open/#"])
        before = asyncio.all_tasks()
        async with running(bus, on_connected=asyncio.Event().wait) as task:  # type: ignore[arg-type]
            task.cancel()
            await asyncio.wait({task})
            assert task.cancelled()
            left = {each for each in asyncio.all_tasks() - before if each.get_name().startswith("bus-")}
            assert not left
        assert not bus.stats.connected

    async def test_a_greeting_that_fails_does_not_end_the_connection(self, harness: BusHarness) -> None:
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

    @requires(BrokerCapabilities.TAKE_OVER)
    async def test_two_clients_with_one_id_do_not_fight_fast(self, harness: BusHarness) -> None:
        first = await harness.bus("twin")
        second = await harness.bus("twin")
        async with running(first), running(second):
            await eventually(lambda: bool(first.stats.last_error))
            await asyncio.sleep(0.5)
            assert first.stats.connects + second.stats.connects < 12
