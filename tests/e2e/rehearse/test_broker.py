"""``--broker``: a consumer of a real broker sees a rehearsal; the rehearsal does not depend on it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from caesura.bus.messaging import MessageClient
from caesura.bus.mqtt import MqttBus
from caesura.bus.options import BrokerOptions
from caesura.bus.port import Delivery
from caesura.contract import messages as m
from caesura.contract.codec import decode
from caesura_testing.broker import mosquitto, mosquitto_installed
from caesura_testing.fleet import until
from caesura_testing.patience import patient
from caesura_testing.rehearsing import Rehearsed

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(not mosquitto_installed(), reason="Mosquitto is not installed"),
]


class Consumer:
    """Somebody who listens to everything."""

    def __init__(self, url: str) -> None:
        self.bus = MqttBus(BrokerOptions(url=url), filters=("caesura/v1/#",))
        self.seen: list[object] = []
        self.retained: set[str] = set()
        """Topics that the broker keeps."""

    async def take(self, delivery: Delivery) -> None:
        if not delivery.payload:
            self.retained.discard(delivery.topic)
            return
        message = decode(delivery.topic, delivery.payload).message
        self.seen.append(message)
        if delivery.topic.endswith(("document", "inventory", "presence")):
            self.retained.add(delivery.topic)


@asynccontextmanager
async def consumer(url: str) -> AsyncIterator[Consumer]:
    found = Consumer(url)
    running = asyncio.create_task(found.bus.run(found.take))
    assert await found.bus.wait_connected(patient(10))
    yield found
    await found.bus.close()
    await running


async def finished(run: Rehearsed) -> int:
    return await asyncio.to_thread(run.finish)


async def test_a_consumer_sees_a_rehearsal_and_nothing_is_left_at_the_broker(tmp_path: Path) -> None:
    async with mosquitto(tmp_path) as broker, consumer(broker.url) as listening:
        options = ("--broker", broker.url, "--freeze", "0.3s", "--notice", "60s", "--settle", "0s")
        run = Rehearsed(tmp_path / "run", options, "approve")
        assert await finished(run) == 0, run.said
        async with asyncio.timeout(patient(20)):
            while listening.retained:  # noqa: ASYNC110 - the broker's deliveries are all that is waited for
                await asyncio.sleep(0.02)
    assert [each.status for each in listening.seen if isinstance(each, m.EventChanged)] == [
        "scheduled",
        "started",
        "completed",
    ]
    (approved,) = [each for each in listening.seen if isinstance(each, m.VmApproved)][:1]
    assert approved.vm == "app-1"
    (frozen,) = [each for each in listening.seen if isinstance(each, m.VmFrozen)]
    (resumed,) = [each for each in listening.seen if isinstance(each, m.VmResumed)]
    assert (frozen.vm, resumed.vm) == ("app-1", "app-1")
    assert resumed.pause_s >= 0.3
    documents = [each for each in listening.seen if isinstance(each, m.SetDocument)]
    assert [[each.status for each in document.events] for document in documents][-1] == []


async def test_a_broker_that_dies_in_the_pause_holds_nothing_up(tmp_path: Path) -> None:
    async with mosquitto(tmp_path) as broker:
        options = ("--broker", broker.url, "--freeze", "2s", "--notice", "0.1s", "--settle", "0s", "--json")
        run = Rehearsed(tmp_path / "run", options, "ignore")
        await asyncio.to_thread(until, lambda: "paused: app-1" in run.said, 60, lambda: run.said)
    assert await finished(run) == 0, run.said
    (gap,) = run.report()["events"][0]["gaps"]
    assert gap["seconds"] >= 2.0
    assert "not published at the broker" in run.said


async def test_a_fleets_broker_is_refused(tmp_path: Path) -> None:
    async with mosquitto(tmp_path) as broker, consumer(broker.url) as listening:
        post = MessageClient(listening.bus, "/caesura/default/coordinator")
        await post.send(m.CoordinatorPresence(coordinator="c-1", epoch=1, online=False))
        run = Rehearsed(tmp_path / "run", ("--broker", broker.url, "--freeze", "1s"), ("true",))
        assert await finished(run) == 2
    assert "has a fleet with the coordinator c-1" in run.said
    assert not [each for each in listening.seen if isinstance(each, m.HostPresence)]


@pytest.mark.parametrize(
    ("url", "code", "says"),
    [
        ("mqtt://127.0.0.1:9", 4, "cannot reach the broker at mqtt://127.0.0.1:9: nothing listens"),
        ("http://127.0.0.1", 2, "http://127.0.0.1"),
    ],
)
def test_no_broker(tmp_path: Path, url: str, code: int, says: str) -> None:
    run = Rehearsed(tmp_path, ("--broker", url, "--freeze", "1s"), ("true",))
    assert run.finish() == code
    assert says in run.said
    assert len(run.said.strip().splitlines()) == 1
