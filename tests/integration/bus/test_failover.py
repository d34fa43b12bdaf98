"""Several addresses with real brokers that are killed, stopped and restarted; and the commands that are given them."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from caesura.bus.local_broker import LocalBroker, free_port
from caesura.bus.mqtt import MqttBus
from caesura.bus.options import BrokerOptions
from caesura_testing.broker import mosquitto, mosquitto_installed
from caesura_testing.collector import PATIENCE_S, Collector, eventually, running
from caesura_testing.patience import patient

pytestmark = pytest.mark.skipif(not mosquitto_installed(), reason="mosquitto is not installed")


@pytest.fixture
async def brokers(tmp_path: Path) -> AsyncIterator[list[LocalBroker]]:
    """Three brokers; they are no cluster, so a message reaches only clients of the same one."""
    async with AsyncExitStack() as stack:
        started = []
        for name in "abc":
            (tmp_path / name).mkdir()
            started.append(await stack.enter_async_context(mosquitto(tmp_path / name)))
        yield started


async def test_a_client_follows_the_brokers_that_are_left(brokers: list[LocalBroker]) -> None:
    url = ",".join(each.url for each in brokers)
    got = Collector()
    bus = MqttBus(BrokerOptions(url=url, client_id="one", reconnect_min_s=0.05), filters=["a"])
    async with running(bus, got.receive):
        left = list(brokers)
        while left:
            here = next(each for each in left if each.port == bus.broker.port)
            await bus.publish("a", b"%d" % here.port, timeout_s=PATIENCE_S)
            await got.until_payload(b"%d" % here.port)
            before = bus.stats.connects
            left.remove(here)
            await here.kill()
            if left:
                await eventually(lambda before=before: bus.stats.connects > before)  # type: ignore[misc]
        await eventually(lambda: all(each.url in bus.stats.last_error for each in brokers))
        await brokers[1].start()
        assert await bus.wait_connected(PATIENCE_S)
        assert bus.broker.port == brokers[1].port


async def test_a_broker_that_is_stopped_holds_up_nobody_for_longer_than_the_connect_timeout(
    brokers: list[LocalBroker],
) -> None:
    """Its kernel accepts connections, and nothing answers."""
    url = ",".join(each.url for each in brokers)
    bus = MqttBus(BrokerOptions(url=url, client_id="one", connect_timeout_s=0.5, silence_s=0.5))
    here = next(each for each in brokers if each.port == bus.broker.port)
    assert here.pid is not None
    os.kill(here.pid, signal.SIGSTOP)
    try:
        async with running(bus):
            assert bus.broker.port != here.port
            hung = next(each for each in brokers if each.port == bus.broker.port)
            assert hung.pid is not None
            os.kill(hung.pid, signal.SIGSTOP)
            try:
                publishing = asyncio.create_task(bus.publish("a", b"x", timeout_s=PATIENCE_S))
                await eventually(lambda: bus.stats.connects == 2)
                assert bus.broker.port not in {here.port, hung.port}
                await asyncio.wait({publishing})
                await bus.publish("a", b"x", timeout_s=PATIENCE_S)
            finally:
                os.kill(hung.pid, signal.SIGCONT)
            assert publishing.exception() is not None
    finally:
        os.kill(here.pid, signal.SIGCONT)


async def _status(url: str) -> tuple[int | None, str]:
    process = await asyncio.create_subprocess_exec(
        *(Path(sys.executable).parent / "caesura", "status", "--broker", url),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    out, _ = await asyncio.wait_for(process.communicate(), patient(60))
    return process.returncode, out.decode()


async def test_the_command_finds_the_broker_that_answers_and_names_all_when_none_does(
    brokers: list[LocalBroker],
) -> None:
    dead = [f"mqtt://127.0.0.1:{free_port()}" for _ in range(2)]
    _, out = await _status(",".join([*dead, brokers[0].url]))
    assert "cannot reach" not in out
    code, out = await _status(",".join(dead))
    assert code not in {0, None}
    assert f"cannot reach any broker of {dead[0]}, {dead[1]}" in out.replace("\n", " ")
    assert out.count("nothing listens at") == 2
