"""A fleet that reads nothing of what its broker retained, as on one whose nodes keep it each for itself: state is asked for on the bus."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import urllib.request
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from http import HTTPStatus
from pathlib import Path
from typing import Any

import pytest

from caesura.bus.local_broker import LocalBroker, free_port
from caesura_ctl.session import connect
from caesura_ctl.settings import CtlSettings
from caesura_testing.patience import patient
from caesura_testing.sandbox import Sandbox, Vm

_IGNORED = {"broker_retained": "ignored"}


@pytest.fixture
async def stage(broker: LocalBroker, new_stage: Any) -> AsyncIterator[Any]:
    async with AsyncExitStack() as stack:
        sandbox = await stack.enter_async_context(Sandbox(broker))
        settings = CtlSettings(broker_url=broker.url, client="e2e", broker_retained="ignored")
        session = await stack.enter_async_context(connect(settings))
        made = new_stage(sandbox, session)
        sandbox.coordinator(**_IGNORED)
        sandbox.update("patch", ["sleep", "3"], expected_s=3.0)
        for number in (1, 2):
            vm = Vm(name=f"web-{number}", set="web", update_domain=number - 1, agent_settings=_IGNORED)
            sandbox.host(f"host-{number}", vm, **_IGNORED)
        made.address = f"127.0.0.1:{free_port()}"
        sandbox.publisher({"web-1": made.address})
        sandbox.environments["metadata"][1]["CAESURA_METADATA_PUBLISHER_BROKER_RETAINED"] = "ignored"
        await made.up("host-1", "host-2")
        yield made


def _polled(address: str) -> bool:
    """Whether a workload's poll is answered."""
    request = urllib.request.Request(
        f"http://{address}/metadata/scheduledevents?api-version=2020-07-01", headers={"Metadata": "true"}
    )
    try:
        with urllib.request.urlopen(request, timeout=5) as answer:  # noqa: S310 - of loopback
            return bool(answer.status == HTTPStatus.OK)
    except OSError:
        return False


async def _command(url: str, *words: str) -> tuple[int | None, str]:
    process = await asyncio.create_subprocess_exec(
        Path(sys.executable).parent / "caesura",
        *words,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        env={
            **os.environ,
            "CAESURA_CTL_BROKER_URL": url,
            "CAESURA_CTL_CLIENT": "e2e",
            "CAESURA_CTL_BROKER_RETAINED": "ignored",
        },
    )
    out, _ = await asyncio.wait_for(process.communicate(), patient(60))
    return process.returncode, out.decode()


async def test_a_rollout_goes_on_with_a_restarted_coordinator_and_readers_that_come_late(
    stage: Any, broker: LocalBroker
) -> None:
    rollout = await stage.roll(verify_timeout_s=60.0)
    await stage.frozen("web-1")
    await stage.sandbox.kill("coordinator")
    await stage.none_frozen(timeout_s=15.0)
    await stage.sandbox.start("coordinator")
    state = await stage.ended(rollout, timeout_s=120.0)
    assert state.status == "completed", state.reason
    stage.assert_order()
    stage.assert_one_end_each()

    # Nobody publishes anything now but on request.
    code, out = await _command(broker.url, "status", "--json")
    assert code == 0, out
    shown = json.loads(out)
    assert {"host-1", "host-2"} <= set(json.dumps(shown).replace('"', " ").split())
    await stage.sandbox.start("metadata")
    async with asyncio.timeout(patient(30)):
        while not await asyncio.to_thread(_polled, stage.address):  # noqa: ASYNC110 - what a workload does
            await asyncio.sleep(0.2)


async def test_without_a_coordinator_a_command_says_why_it_shows_nothing(
    stage: Any, broker: LocalBroker
) -> None:
    await stage.sandbox.kill("coordinator")
    code, out = await _command(broker.url, "status")
    assert code not in {0, None}
    assert "BROKER_RETAINED=ignored" in out.replace("\n", " ")
