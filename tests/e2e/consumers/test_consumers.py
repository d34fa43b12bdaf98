"""The three ways to listen and ask: a consumer of one's own, the HTTP API, mosquitto_sub."""

from __future__ import annotations

import asyncio
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from caesura.bus.local_broker import free_port
from caesura_testing.patience import patient
from caesura_testing.sandbox import Vm

_ROOT = Path(__file__).parents[3]


async def _lines(process: asyncio.subprocess.Process, wanted: int, timeout_s: float) -> list[str]:
    assert process.stdout is not None
    found: list[str] = []
    async with asyncio.timeout(patient(timeout_s)):
        while len(found) < wanted:
            found.append((await process.stdout.readline()).decode().strip())
    return found


async def test_the_example_consumer_and_mosquitto_sub_see_every_pause(pair: Any) -> None:
    if shutil.which("mosquitto_sub") is None:
        pytest.skip("mosquitto_sub is not installed (on Debian: apt-get install mosquitto-clients)")
    port = str(pair.sandbox.broker.port)
    example = await asyncio.create_subprocess_exec(
        sys.executable,
        str(_ROOT / "examples" / "consumer.py"),
        "127.0.0.1",
        port,
        stdout=asyncio.subprocess.PIPE,
    )
    plain = await asyncio.create_subprocess_exec(
        "mosquitto_sub",
        "-p",
        port,
        "-q",
        "1",
        "-t",
        "caesura/v1/host/+/set/+/ud/+/vm/+/resumed",
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        state = await pair.ended(await pair.roll())
        assert state.status == "completed", state.reason
        said = await _lines(example, 4, 10)
        seen = [json.loads(line)["data"]["vm"] for line in await _lines(plain, 2, 10)]
    finally:
        for process in (example, plain):
            process.kill()
            await process.wait()
    assert [line.split(":")[0] for line in said if "paused" in line] == ["web-1", "web-2"]
    assert sum("clock synced: True" in line for line in said) == 2
    assert seen == ["web-1", "web-2"]


async def test_a_workload_is_warned_over_http_and_its_approval_starts_the_wave(
    stages: Callable[..., Any],
) -> None:
    stage = await stages(host_1=[Vm(name="web-1", set="web"), Vm(name="web-2", set="web")], up=False)
    port = free_port()
    stage.sandbox.publisher(
        {"web-1": f"127.0.0.1:{port}", "web-2": f"unix:{stage.sandbox.folder}/web-2.sock"}
    )
    await stage.sandbox.start("metadata")
    await stage.up("host-1")
    url = f"http://127.0.0.1:{port}/metadata/scheduledevents?api-version=2020-07-01"
    loop = asyncio.get_running_loop()
    incarnations: list[int] = []

    async with aiohttp.ClientSession(headers={"Metadata": "true"}) as client:

        async def document() -> dict[str, Any]:
            async with client.get(url) as answer:
                assert answer.status == 200, await answer.text()
                found: dict[str, Any] = await answer.json()
            incarnations.append(found["DocumentIncarnation"])
            return found

        async def event(status: str | None, timeout_s: float) -> dict[str, Any]:
            end = loop.time() + patient(timeout_s)
            while True:
                events = (await document())["Events"]
                if (status is None and not events) or (events and events[0]["EventStatus"] == status):
                    return events[0] if events else {}
                assert loop.time() < end, f"no event {status}: {events}\n{stage.sandbox.logs()}"
                await asyncio.sleep(0.02)  # a client that polls, as they do

        assert (await document())["Events"] == []
        rollout = await stage.roll(notice_s=120.0)
        announced = await event("Scheduled", 5)
        assert announced["EventType"] == "Freeze"
        assert announced["Resources"] == ["web-1", "web-2"]
        assert announced["NotBefore"].endswith("GMT")
        assert not stage.sandbox.watch.pauses
        async with client.post(url, json={"StartRequests": [{"EventId": announced["EventId"]}]}) as answer:
            assert answer.status == 200
        started = await event("Started", 10)
        assert started["EventId"] == announced["EventId"]
        assert started["NotBefore"] == ""
        await event(None, 20)
    state = await stage.ended(rollout)
    assert state.status == "completed", state.reason
    assert {each.vm for each in stage.sandbox.watch.pauses} == {"web-1", "web-2"}
    assert incarnations == sorted(incarnations)
    assert len(set(incarnations)) >= 4
