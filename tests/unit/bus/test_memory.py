"""What only the in-memory bus has; the port's promises are in the conformance suite."""

from __future__ import annotations

import asyncio

import pytest

from caesura.bus.memory import MemoryBroker, MemoryBus
from caesura.bus.port import BusUnavailable, Delivery, PublishRefused, Will
from caesura_testing.collector import Collector, eventually, running
from caesura_testing.patience import patient


async def test_the_clients_that_are_connected_are_known() -> None:
    broker = MemoryBroker()
    async with running(MemoryBus(broker, client_id="a")), running(MemoryBus(broker, client_id="b")):
        assert broker.clients == {"a", "b"}
    assert broker.clients == set()


async def test_access_is_asked_for_by_client_and_topic() -> None:
    broker = MemoryBroker(may_publish=lambda client_id, topic: topic.startswith(f"{client_id}/"))
    a = MemoryBus(broker, client_id="a")
    async with running(a):
        await a.publish("a/x", b"")
        with pytest.raises(PublishRefused):
            await a.publish("b/x", b"")


async def test_a_will_obeys_the_access_rule_too() -> None:
    broker = MemoryBroker(may_publish=lambda _, topic: topic != "denied")
    bus = MemoryBus(broker, client_id="a", will=Will("denied", b"gone"))
    async with running(bus):
        broker.kill("a")
    assert broker.retained == {}


async def test_a_broker_that_goes_down_sends_no_wills_and_keeps_what_is_retained() -> None:
    broker = MemoryBroker()
    bus = MemoryBus(broker, client_id="a", will=Will("will", b"gone"))
    async with running(bus):
        await bus.publish("kept", b"x", retain=True)
        broker.down()
        await eventually(lambda: not bus.stats.connected)
        with pytest.raises(BusUnavailable, match="went down"):
            await bus.publish("a", b"", timeout_s=0.01)
        broker.up()
        assert await bus.wait_connected(patient(5))
    assert broker.retained == {"kept": b"x"}


async def test_unacknowledged_messages_come_again_in_order_before_newer_ones() -> None:
    broker = MemoryBroker(window=2)
    got = Collector()

    async def never(_: Delivery) -> None:
        await asyncio.Event().wait()

    sender = MemoryBus(broker)
    async with running(sender):
        async with running(MemoryBus(broker, client_id="a", filters=["t"], clean=False), never) as task:
            for number in range(5):
                await sender.publish("t", b"%d" % number)
            task.cancel()
            await asyncio.wait({task})
        await sender.publish("t", b"5")
        async with running(MemoryBus(broker, client_id="a", filters=["t"], clean=False), got.receive):
            await got.until_payload(b"5")
    assert got.payloads == [b"%d" % number for number in range(6)]


@pytest.mark.looptime
async def test_it_runs_on_fake_time() -> None:
    loop = asyncio.get_running_loop()
    broker = MemoryBroker()
    bus = MemoryBus(broker, reconnect_s=3_600)
    async with running(bus):
        broker.down()
        await eventually(lambda: not bus.stats.connected, timeout_s=10)
        broker.up()
        began_s = loop.time()
        assert await bus.wait_connected(10_000)
        assert 3_590 < loop.time() - began_s < 3_610


async def test_a_fact_that_was_retained_is_not_handed_on_and_counted() -> None:
    """Whatever the bus and whether or not it has rates: only what the topic table retains is state."""
    broker = MemoryBroker()
    fact, state = "caesura/v1/host/h1/operation", "caesura/v1/host/h1/inventory"
    writer = MemoryBus(broker, client_id="h1")
    async with running(writer):
        for topic in (fact, state, "of/others"):
            await writer.publish(topic, topic.encode(), retain=True)
        got = Collector()
        reader = MemoryBus(broker, client_id="c", filters=["#"])
        async with running(reader, got.receive):
            await got.until(lambda deliveries: len(deliveries) >= 2)
            assert reader.stats.refused == {"host": 1}
            await writer.publish(fact, b"now", retain=True)
            await got.until_payload(b"now")
        assert {each.payload for each in got.deliveries} == {state.encode(), b"of/others", b"now"}


class HangingCommits:
    """A store whose disk does not answer before ``answers`` is set."""

    def __init__(self) -> None:
        self.answers = asyncio.Event()

    @property
    def settled(self) -> bool:
        return self.answers.is_set()

    async def reached(self) -> None:
        await self.answers.wait()


async def test_messages_that_nobody_acknowledges_do_not_wait_for_the_disk() -> None:
    """QoS 0 has no window at the broker: they would fill the memory for as long as a disk hangs."""
    broker, got, disk = MemoryBroker(), Collector(), HangingCommits()
    sender, worker = MemoryBus(broker), MemoryBus(broker, filters=["a"])
    async with running(sender):
        task = asyncio.create_task(worker.run(got.receive, commits=disk))
        assert await worker.wait_connected(patient(5))
        for number in range(50):
            await sender.publish("a", b"%d" % number, qos=0)
        await got.until_payload(b"49")
        await eventually(lambda: worker.stats.backlog == 0)
        disk.answers.set()
        await worker.close()
        await task


async def test_a_broker_without_a_window_does_not_fill_the_memory_while_the_disk_hangs() -> None:
    broker, got, disk = MemoryBroker(window=1_000_000), Collector(), HangingCommits()
    sender, worker = MemoryBus(broker), MemoryBus(broker, filters=["a"], backlog_limit=5)
    async with running(sender):
        task = asyncio.create_task(worker.run(got.receive, commits=disk))
        assert await worker.wait_connected(patient(5))
        for number in range(50):
            await sender.publish("a", b"%d" % number)
        await eventually(lambda: worker.stats.received == 50)
        await eventually(lambda: len(got.payloads) >= 5)
        # The rest waits in the inbox, which holds the sender back where it can.
        assert len(got.payloads) == 5
        assert worker._inbox.full
        disk.answers.set()
        await got.until_payload(b"49")
        await eventually(lambda: worker.stats.backlog == 0)
        await worker.close()
        await task
