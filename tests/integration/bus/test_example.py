"""``examples/consumer.py``: what it misses, and when it does not go well: one line, and no traceback."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from caesura.bus.local_broker import free_port
from caesura.bus.mqtt import MqttBus
from caesura.bus.options import BrokerOptions
from caesura.runtime.settings import Secret
from caesura_testing.broker import make_certificates, mosquitto, mosquitto_installed
from caesura_testing.collector import running
from caesura_testing.patience import patient

_EXAMPLE = Path(__file__).parents[3] / "examples" / "consumer.py"


_TOPIC = b"t"
_EVENT = b'{"type": "caesura.vm.resumed.v1", "data": {"vm": "a", "pause_s": 1.0}}'

# A shell's background job, as a test run may be one, ignores SIGINT, and so do its children.
_RUN = """
import runpy, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
runpy.run_path(sys.argv.pop(1), run_name="__main__")
"""


@asynccontextmanager
async def consumer(*words: str) -> AsyncIterator[asyncio.subprocess.Process]:
    """The example as a process, which does not outlive the block."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        _RUN,
        str(_EXAMPLE),
        *words,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
            await process.communicate()


@asynccontextmanager
async def broker(connack: int) -> AsyncIterator[str]:
    """The port of just enough of MQTT 3.1.1: an answer to CONNECT and, if it was yes, to SUBSCRIBE, and one message."""

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await packet(reader)
        writer.write(bytes((0x20, 2, 0, connack)))
        if connack == 0:
            subscribe = await packet(reader)
            writer.write(bytes((0x90, 3)) + subscribe[:2] + b"\x01")
            writer.write(bytes((0x30, 2 + len(_TOPIC) + len(_EVENT), 0, len(_TOPIC))) + _TOPIC + _EVENT)
            await reader.read()  # until it goes
        writer.close()

    async def packet(reader: asyncio.StreamReader) -> bytes:
        head = await reader.readexactly(2)
        return await reader.readexactly(head[1])

    server = await asyncio.start_server(talk, "127.0.0.1", 0)
    async with server:
        yield str(server.sockets[0].getsockname()[1])


async def test_ctrl_c_is_quiet() -> None:
    async with broker(0) as port, asyncio.timeout(patient(30)), consumer("127.0.0.1", port) as running:
        # Once it listens. While it subscribes, Python before 3.12 may lose the first Ctrl-C (asyncio.wait_for).
        assert running.stdout is not None
        assert await running.stdout.readline() == b"a: paused 1.000 s\n"
        running.send_signal(signal.SIGINT)
        assert await running.communicate() == (b"", b"")
    assert running.returncode == 130


async def test_a_broker_that_refuses_or_is_not_there_is_one_line() -> None:
    async with (
        broker(5) as port,
        asyncio.timeout(patient(30)),
        consumer("127.0.0.1", port) as refused,
    ):
        _, said = await refused.communicate()
    assert refused.returncode == 1
    (line,) = said.decode().splitlines()
    assert "Not authorized" in line
    nobody = free_port()
    async with consumer("127.0.0.1", str(nobody)) as alone:
        _, said = await alone.communicate()
    assert alone.returncode == 1
    (line,) = said.decode().splitlines()
    assert line.startswith(f"127.0.0.1:{nobody}: ")
    assert "Connection refused" in line


@pytest.mark.parametrize("port", ["", "x"])
async def test_a_port_that_is_none_is_bad_usage(port: str) -> None:
    async with consumer("127.0.0.1", port) as done:
        _, said = await done.communicate()
    assert done.returncode == 2
    assert b"Traceback" not in said
    assert b"usage: " in said


def resumed(vm: str) -> bytes:
    return json.dumps({"type": "caesura.vm.resumed.v1", "data": {"vm": vm, "pause_s": 1.0}}).encode()


@pytest.mark.skipif(not mosquitto_installed(), reason="mosquitto is not installed")
async def test_with_tls_a_password_and_a_session_nothing_is_missed_while_it_is_away(tmp_path: Path) -> None:
    certificates = make_certificates(tmp_path / "tls")
    secret = tmp_path / "password"
    secret.write_text("hunter2\n")
    users = {"reader": "hunter2", "writer": "x"}
    async with mosquitto(tmp_path, users=users, tls=certificates) as real:
        url = f"mqtts://localhost:{real.port}"
        trusted = BrokerOptions(
            url=url, ca_file=str(certificates.ca_file), username="writer", password=Secret("x")
        )
        words = ["localhost", str(real.port), "--ca", str(certificates.ca_file)]
        words += ["--user", "reader", "--password-file", str(secret), "--session", "books"]
        bus = MqttBus(trusted)
        topic = "caesura/v1/host/h/set/s/ud/1/vm/{}/resumed"
        async with running(bus), asyncio.timeout(patient(30)):
            async with consumer(*words) as first:
                assert first.stdout is not None
                heard = asyncio.create_task(first.stdout.readline())
                while not heard.done():  # until it has subscribed
                    await bus.publish(topic.format("a"), resumed("a"))
                    await asyncio.wait({heard}, timeout=0.1)
                assert heard.result() == b"a: paused 1.000 s\n"
            await bus.publish(topic.format("b"), resumed("b"))  # nobody is there
            async with consumer(*words) as second:
                assert second.stdout is not None
                while (line := await second.stdout.readline()) == b"a: paused 1.000 s\n":
                    pass
                assert line == b"b: paused 1.000 s\n"
