"""Ctrl-C and SIGTERM end ``caesura`` in the same way: quietly, with 130 or 143, and a request that is not answered yet is mentioned."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator

import pytest

from caesura.bus.local_broker import LocalBroker
from caesura.bus.messaging import MessageClient
from caesura.bus.mqtt import MqttBus
from caesura.bus.options import BrokerOptions
from caesura.contract import messages as m
from caesura.contract.topics import channel_of
from caesura_testing.collector import Collector, running
from caesura_testing.patience import patient

# A shell's background job, as a test run may be one, ignores SIGINT, and so do its children.
_COMMAND = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from caesura_ctl.__main__ import main
main()
"""
_SIGNALS = pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["SIGINT", "SIGTERM"]
)
_ROLL = ("roll", "patch", "--set", "web")
_ABORT = ("abort",)


@pytest.fixture
async def broker() -> AsyncIterator[LocalBroker]:
    async with LocalBroker() as broker:
        yield broker


async def _started(broker: LocalBroker, *words: str) -> asyncio.subprocess.Process:
    environ = {**os.environ, "CAESURA_CTL_BROKER_URL": broker.url, "CAESURA_CTL_CLIENT": "ops"}
    environ["CAESURA_CTL_BROKER_PROTOCOL"] = broker.protocol
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", _COMMAND, *words),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=environ,
    )


async def _stopped_before_the_answer(
    broker: LocalBroker, kind: type, number: signal.Signals, *words: str
) -> tuple[int | None, str, str]:
    """Exit code, standard output and standard error of a command that gets the signal once its request is on the bus."""
    got = Collector()
    bus = MqttBus(
        BrokerOptions(url=broker.url, protocol=broker.protocol), filters=[channel_of(kind).filter()]
    )
    async with running(bus, got.receive):
        process = await _started(broker, *words)
        await got.until(lambda deliveries: len(deliveries) > 0)
        process.send_signal(number)
        out, err = await asyncio.wait_for(process.communicate(), patient(30))
    return process.returncode, out.decode(), err.decode()


@_SIGNALS
@pytest.mark.parametrize(
    ("kind", "words"), [(m.RolloutRequested, _ROLL), (m.AbortRequested, _ABORT)], ids=["roll", "abort"]
)
async def test_a_request_without_an_answer_may_have_been_accepted(
    broker: LocalBroker, kind: type, words: tuple[str, ...], number: signal.Signals, code: int
) -> None:
    ended, out, err = await _stopped_before_the_answer(broker, kind, number, *words)
    assert (ended, out) == (code, "")
    assert err.count("\n") == 1, err
    assert "may have been accepted" in err
    assert "caesura status" in err


@_SIGNALS
async def test_as_json_it_is_the_usual_error_document(
    broker: LocalBroker, number: signal.Signals, code: int
) -> None:
    ended, out, err = await _stopped_before_the_answer(broker, m.RolloutRequested, number, *_ROLL, "--json")
    assert (ended, out) == (code, "")
    document = json.loads(err)
    assert (document["error"], document["exit_code"]) == ("RequestInterrupted", code)
    assert "caesura status" in document["reason"]


@_SIGNALS
async def test_a_plan_changes_nothing_so_nothing_is_said(
    broker: LocalBroker, number: signal.Signals, code: int
) -> None:
    ended = await _stopped_before_the_answer(broker, m.RolloutRequested, number, "plan", "patch")
    assert ended == (code, "", "")


@_SIGNALS
async def test_a_command_that_only_watches_ends_without_a_word(
    broker: LocalBroker, number: signal.Signals, code: int
) -> None:
    bus = MqttBus(BrokerOptions(url=broker.url, protocol=broker.protocol))
    async with running(bus):
        process = await _started(broker, "tail", "--json")
        assert process.stdout is not None
        line = asyncio.ensure_future(process.stdout.readline())
        client = MessageClient(bus, "/caesura/default/coordinator/c")
        while not line.done():  # it shows that the command is subscribed
            await client.send(m.CoordinatorPresence(coordinator="c", epoch=1, online=True))
            await asyncio.wait({line}, timeout=0.1)
        process.send_signal(number)
        _, err = await asyncio.wait_for(process.communicate(), patient(30))
    assert (process.returncode, err) == (code, b"")
