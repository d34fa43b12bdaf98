"""The guest agent's client and setting the clock, against a real qemu-ga in a real guest."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from functools import partial

import pytest
import pytest_asyncio

from caesura_host_updater.drivers import clock_setting
from caesura_host_updater.drivers.clock_setting import set_clock
from caesura_host_updater.drivers.guest_agent import AgentRefused, AgentSilent, guest_agent
from caesura_testing.guests import Definition, RunningGuest, boot, connect, qemu_installed
from caesura_testing.patience import patient

pytestmark = [
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.skipif(not qemu_installed(), reason="qemu-system-x86_64 is not installed"),
]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def guest() -> AsyncIterator[RunningGuest]:
    async with boot(Definition()) as found:
        yield found


def by(timeout_s: float) -> float:
    return asyncio.get_running_loop().time() + timeout_s


async def test_a_client_that_left_half_a_request_behind_disturbs_nobody(guest: RunningGuest) -> None:
    reader, writer = await connect(guest.guest_agent, 10)
    writer.write(b'{"execute": "guest-get-time"}\n{"execute": "guest-')
    await writer.drain()
    await reader.readline()  # the agent is there; half a request stays in its buffer
    writer.close()
    async with guest_agent("vm", str(guest.guest_agent), by(10)) as agent:
        await agent.ping()
        first = await agent.time_ns()
        assert await agent.time_ns() > first


async def test_a_program_is_run_in_the_guest(guest: RunningGuest) -> None:
    async with guest_agent("vm", str(guest.guest_agent), by(10)) as agent:
        assert await agent.run("/bin/sh", "-c", "exit 7") == 7
        with pytest.raises(AgentRefused, match=r"VM vm: .*No such file or directory"):
            await agent.run("/no/such/program")


@pytest.mark.parametrize("stepped", [True, False], ids=["stepped-in-the-guest", "set-only"])
async def test_a_clock_that_fell_behind_is_put_right(
    guest: RunningGuest, monkeypatch: pytest.MonkeyPatch, *, stepped: bool
) -> None:
    if not stepped:
        monkeypatch.setattr(clock_setting, "STEP_PROGRAM", "/no/such/program")
    await set_clock("vm", partial(guest_agent, "vm", str(guest.guest_agent)))
    for pause_s in (0.01, 1.0):
        await guest.execute("stop")
        stopped = asyncio.get_running_loop().time()
        await asyncio.sleep(pause_s)
        await guest.execute("cont")
        lasted_s = asyncio.get_running_loop().time() - stopped  # as busy as the machine is
        begun = asyncio.get_running_loop().time()
        found = await set_clock("vm", partial(guest_agent, "vm", str(guest.guest_agent)))
        took_s = asyncio.get_running_loop().time() - begun
        assert -lasted_s - patient(0.2) < found.before_s
        assert found.before_s < -pause_s * 0.9, "a stopped guest's clock stands still"
        # What the benchmark holds to a millisecond; here the machine may be busy with anything.
        assert abs(found.after_s) <= 0.005 + found.uncertainty_s
        assert found.uncertainty_s < patient(0.05)
        assert took_s < patient(5)
    assert guest.heartbeat.faults() == []


async def test_a_guest_that_stands_still_does_not_answer(guest: RunningGuest) -> None:
    await guest.execute("stop")
    try:
        begun = asyncio.get_running_loop().time()
        with pytest.raises(
            AgentSilent, match="VM vm: the guest agent does not answer: is qemu-guest-agent running"
        ):
            await set_clock("vm", partial(guest_agent, "vm", str(guest.guest_agent)), timeout_s=0.6)
        assert asyncio.get_running_loop().time() - begun < patient(2)
    finally:
        await guest.execute("cont")
    assert abs((await set_clock("vm", partial(guest_agent, "vm", str(guest.guest_agent)))).after_s) < 0.05
