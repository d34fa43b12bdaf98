"""The broker processes that the demo and the tests start: up when they say so, and gone with their owner."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
from pathlib import Path
from typing import Literal

import pytest

from caesura.bus.embedded import READY, EmbeddedBrokerMissing
from caesura.bus.local_broker import BrokerNotStarted, LocalBroker, find_mosquitto, free_port
from caesura.bus.mqtt import MqttBus
from caesura.bus.options import BrokerOptions
from caesura_testing.broker import mosquitto_installed
from caesura_testing.collector import PATIENCE_S, Collector, eventually, running
from caesura_testing.patience import patient

KINDS = [
    pytest.param(
        "mosquitto", marks=pytest.mark.skipif(not mosquitto_installed(), reason="mosquitto is not installed")
    ),
    "embedded",
]
Kind = Literal["mosquitto", "embedded"]


@pytest.mark.parametrize("kind", KINDS)
async def test_it_serves_restarts_on_the_same_port_and_ends(kind: Kind) -> None:
    async with LocalBroker(kind=kind) as broker:
        url = broker.url
        got = Collector()
        bus = MqttBus(BrokerOptions(url=url, reconnect_min_s=0.05), filters=["a"])
        async with running(bus, got.receive):
            first = broker.pid
            await broker.restart()
            assert broker.pid != first
            assert broker.url == url
            await eventually(lambda: bus.stats.connects == 2)
            await bus.publish("a", b"x")
            await got.until_payload(b"x")
        pid = broker.pid
        assert pid is not None
    assert broker.pid is None
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


@pytest.mark.parametrize("kind", KINDS)
async def test_it_ends_quickly_with_clients_connected(kind: Kind) -> None:
    async with LocalBroker(kind=kind) as broker:
        bus = MqttBus(BrokerOptions(url=broker.url, protocol=broker.protocol))
        async with running(bus):
            async with asyncio.timeout(patient(4)):
                await broker.stop()


async def test_a_cancelled_clean_up_is_finished_all_the_same() -> None:
    """A broker that hangs is waited for and killed, though whoever waits for that is cancelled."""
    broker = LocalBroker()
    await broker.__aenter__()
    pid = broker.pid
    assert pid is not None
    folder = broker._data_dir
    assert folder is not None
    os.kill(pid, signal.SIGSTOP)
    leaving = asyncio.create_task(broker.__aexit__(None, None, None))
    for _ in range(3):
        await asyncio.sleep(0)
        leaving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await leaving
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    assert not folder.exists()


@pytest.mark.parametrize("kind", KINDS)
async def test_it_dies_with_its_owner_even_if_that_is_killed(kind: Kind, tmp_path: Path) -> None:
    program = (
        "import asyncio\n"
        "from pathlib import Path\n"
        "from caesura.bus.local_broker import LocalBroker\n"
        "async def main():\n"
        f"    async with LocalBroker(kind={kind!r}, data_dir=Path({str(tmp_path)!r})) as broker:\n"
        "        print(broker.pid, flush=True)\n"
        "        await asyncio.Event().wait()\n"
        "asyncio.run(main())\n"
    )
    owner = await asyncio.create_subprocess_exec(
        sys.executable, "-c", program, stdout=asyncio.subprocess.PIPE
    )
    assert owner.stdout is not None
    pid = int(await asyncio.wait_for(owner.stdout.readline(), PATIENCE_S))
    os.kill(pid, 0)
    owner.kill()
    await owner.wait()
    # It is nobody's child now; whoever adopted it may be slow to bury it.
    await eventually(lambda: not _runs(pid))


def _runs(pid: int) -> bool:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="ascii")
    except FileNotFoundError:
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"


@pytest.mark.parametrize("kind", KINDS)
async def test_a_port_that_is_taken_is_an_error_that_says_so(kind: Kind) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(BrokerNotStarted, match=r"(?i)address already in use"):
            async with LocalBroker(kind=kind, port=taken.getsockname()[1]):
                pass


async def test_auto_takes_mosquitto_where_there_is_one() -> None:
    assert LocalBroker().kind == ("mosquitto" if find_mosquitto() else "embedded")


async def test_without_amqtt_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "amqtt.broker", None)
    with pytest.raises(EmbeddedBrokerMissing, match=r"pip install 'caesura\[embedded\]'"):
        LocalBroker(kind="embedded")


async def test_the_command_without_amqtt_fails_with_the_same_words() -> None:
    program = (
        "import sys\n"
        "sys.modules['amqtt.broker'] = None\n"
        "sys.argv = ['embedded', '--port', '1']\n"
        "from caesura.bus.embedded import main\n"
        "main()\n"
    )
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", program, stderr=asyncio.subprocess.PIPE
    )
    _, errors = await process.communicate()
    assert process.returncode == 1
    assert b"caesura[embedded]" in errors
    assert b"Traceback" not in errors


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_the_embedded_command_says_ready_and_ends_cleanly_on_signals(number: signal.Signals) -> None:
    port = free_port()
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "caesura.bus.embedded", "--port", str(port)),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    assert process.stdout is not None
    line = await asyncio.wait_for(process.stdout.readline(), PATIENCE_S)
    assert line.decode().strip() == f"{READY} mqtt://127.0.0.1:{port}"
    bus = MqttBus(BrokerOptions(url=f"mqtt://127.0.0.1:{port}", protocol="3.1.1"))
    async with running(bus):
        process.send_signal(number)
        rest, errors = await asyncio.wait_for(process.communicate(), PATIENCE_S)
    assert process.returncode == 0
    assert (rest, errors) == (b"", b"")


async def test_the_embedded_broker_takes_many_clients_at_once() -> None:
    """What the demo needs, ten times over."""
    got = Collector()
    async with LocalBroker(kind="embedded") as broker:
        buses = [
            MqttBus(BrokerOptions(url=broker.url, protocol=broker.protocol), filters=["all/#"])
            for _ in range(200)
        ]
        tasks = [asyncio.create_task(bus.run(got.receive)) for bus in buses]
        assert all(await asyncio.gather(*(bus.wait_connected(PATIENCE_S) for bus in buses)))
        await buses[0].publish("all/a", b"x")
        await got.until(lambda deliveries: len(deliveries) == len(buses))
        await asyncio.gather(*(bus.close() for bus in buses))
        await asyncio.gather(*tasks)
        assert {bus.stats.connects for bus in buses} == {1}


@pytest.mark.parametrize("clean", [True, False])
async def test_a_client_that_comes_back_at_once_to_the_embedded_broker_is_not_deaf(*, clean: bool) -> None:
    """Stock amqtt 0.12.1 forgets every fifth such client: connected, subscribed, and nothing arrives."""
    async with LocalBroker(kind="embedded") as broker:
        sender = MqttBus(BrokerOptions(url=broker.url, protocol=broker.protocol))

        async def come_and_go(name: str) -> None:
            options = BrokerOptions(url=broker.url, protocol=broker.protocol, client_id=name, clean=clean)
            for number in range(20):
                got = Collector()
                async with running(MqttBus(options, filters=[name]), got.receive):
                    await sender.publish(name, b"%d" % number)
                    await got.until_payload(b"%d" % number)

        async with running(sender):
            await asyncio.gather(*(come_and_go(f"client-{number}") for number in range(8)))
