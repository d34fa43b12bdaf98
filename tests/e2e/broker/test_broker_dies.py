"""The broker dies in the middle of a pause and comes back 20 s later: it never was the safety mechanism."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from caesura.bus.brokers import LocalBroker

_AWAY_S = 20.0


async def test_vms_resume_on_time_and_no_fact_is_lost(pair: Any, broker: LocalBroker) -> None:
    pair.sandbox.update("patch", ["sleep", "3"], expected_s=3.0)
    rollout = await pair.roll(verify_timeout_s=60.0)
    await pair.frozen("web-1")
    loop = asyncio.get_running_loop()
    await broker.kill()
    away_until = loop.time() + _AWAY_S
    await pair.none_frozen(timeout_s=8.0)
    assert 2.9 <= pair.sandbox.watch.longest_s() < 8.0, "resumed when the update was done, inside the budget"
    assert not [each for each in pair.sandbox.watch.pauses if each.vm == "web-2"]
    await asyncio.sleep(max(0.0, away_until - loop.time()))  # the outage itself: a time, not a condition
    assert {each.vm for each in pair.sandbox.watch.pauses} == {"web-1"}, (
        "nothing more was paused without a broker"
    )
    await broker.start()
    state = await pair.ended(rollout, timeout_s=90.0)
    await pair.sandbox.until(lambda: len(pair.picture.pauses) >= 1, 10, "the pause is reported after all")
    assert state.status in {"completed", "halted"}
    first = [each for each in pair.picture.pauses.values() if each.vm == "web-1"]
    assert len(first) == 1
    assert first[0].resumed_by == "updater"
    assert state.status == "completed", state.reason
    assert {each.vm for each in pair.picture.pauses.values()} == {"web-1", "web-2"}
    pair.assert_order()
    await pair.sandbox.until(
        lambda: all(not each.events for each in pair.picture.documents.values()), 5, "documents empty"
    )
    pair.assert_one_end_each()


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
