"""The broker dies in the middle of a pause and comes back 20 s later: it never was the safety mechanism."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from caesura.bus.local_broker import LocalBroker
from caesura.bus.messaging import MessageClient
from caesura.bus.mqtt import MqttBus
from caesura.bus.options import BrokerOptions
from caesura.contract.codec import Received
from caesura.contract.envelope import Message
from caesura.contract.topics import CHANNELS
from caesura_ctl.fleet_view import FleetView
from caesura_testing.patience import patient

_AWAY_S = 20.0


@asynccontextmanager
async def persistent_reader(broker: LocalBroker) -> AsyncIterator[FleetView]:
    """A reader whose session the broker keeps: what it misses while away must come afterwards."""
    fleet_view = FleetView()

    async def fold(message: Message, _: Received) -> None:
        fleet_view.fold(message)

    channels = [channel for channel in CHANNELS if "exporter" in channel.readers]
    bus = MqttBus(
        BrokerOptions(url=broker.url, client_id="reader", clean=False),
        filters=[channel.filter() for channel in channels],
    )
    post = MessageClient(bus, "/reader")
    for channel in channels:
        post.subscribe(channel.message, fold)
    running = asyncio.create_task(bus.run(post.deliver))
    assert await bus.wait_connected(patient(5))
    yield fleet_view
    await bus.close()
    await running


async def test_vms_resume_on_time_and_no_fact_is_lost(pair: Any, broker: LocalBroker) -> None:
    pair.sandbox.update("patch", ["sleep", "3"], expected_s=3.0)
    async with persistent_reader(broker) as seen:
        rollout = await pair.roll(verify_timeout_s=60.0)
        await pair.frozen("web-1")
        loop = asyncio.get_running_loop()
        await broker.kill()
        away_until = loop.time() + _AWAY_S
        await pair.none_frozen(timeout_s=8.0)
        longest_s = pair.sandbox.watch.longest_s()
        assert 2.9 <= longest_s < 8.0, "resumed when the update was done, inside the budget"
        await asyncio.sleep(max(0.0, away_until - loop.time()))  # the outage itself: a time, not a condition
        paused = {each.vm for each in pair.sandbox.watch.pauses}
        assert paused == {"web-1"}, "nothing more was paused without a broker"
        await broker.start()
        state = await pair.ended(rollout, timeout_s=90.0)
        assert state.status == "completed", state.reason
        pair.assert_order()
        await pair.sandbox.until(
            lambda: (
                len(seen.pauses) == 2
                and "web" in seen.documents
                and not seen.documents["web"].events
                and all(facts[-1].status == "completed" for facts in seen.events.values())
            ),
            60,  # a client that lost its broker waits up to 10 s before it tries again, and connects on a busy machine
            "every fact arrives after all",
        )
    assert {each.vm: each.resumed_by for each in seen.pauses.values()} == {
        "web-1": "updater",
        "web-2": "updater",
    }
    assert len(seen.events) == 2
    for facts in seen.events.values():
        assert [each.status for each in facts] == ["scheduled", "started", "completed"]
        incarnations = [each.incarnation for each in facts]
        assert incarnations == sorted(set(incarnations))


async def test_a_broker_that_forgot_everything_is_told_again(
    pair: Any, broker: LocalBroker, tmp_path: Path
) -> None:
    await broker.kill()
    (tmp_path / "mosquitto.db").unlink()  # where it keeps retained messages and sessions
    await broker.start()
    await pair.ready("host-1", "host-2")
    state = await pair.ended(await pair.roll())
    assert state.status == "completed", state.reason
    pair.assert_order()
