"""The simulated guest clock against the kernel: a really stopped process, and a really starved one."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import time

import pytest

from caesura_testing.patience import patient

# Ticks for the time given, then says what it saw: the longest gap between two looks, and what was left out.
CLOCK = """
import asyncio, json, os, sys, time
from caesura_vm_agent.guest_clock import SimulatedClock

async def main():
    os.sched_setaffinity(0, {int(sys.argv[2])})
    clock, gap, last = SimulatedClock(), 0.0, time.monotonic()
    ticking = asyncio.create_task(clock.run())
    print("ticking", flush=True)
    end = time.monotonic() + float(sys.argv[1])
    while time.monotonic() < end:
        await asyncio.sleep(0.05)
        now = time.monotonic()
        gap, last = max(gap, now - last), now
    print(json.dumps({"gap_s": gap, "behind_s": (time.time_ns() - clock.now_ns()) / 1e9}), flush=True)
    ticking.cancel()

asyncio.run(main())
"""

# Takes one CPU away from everybody of normal priority, for the time given.
HOG = """
import os, sys, time
os.sched_setaffinity(0, {int(sys.argv[2])})
os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(50))
end = time.monotonic() + float(sys.argv[1])
while time.monotonic() < end:
    pass
"""


def may_use_real_time_priority() -> bool:
    before = os.sched_getscheduler(0)
    try:
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
    except OSError:
        return False
    os.sched_setscheduler(0, before, os.sched_param(0))
    return True


async def child(code: str, seconds: float) -> asyncio.subprocess.Process:
    cpu = max(os.sched_getaffinity(0))
    return await asyncio.create_subprocess_exec(
        sys.executable, "-c", code, str(seconds), str(cpu), stdout=asyncio.subprocess.PIPE
    )


async def saw(process: asyncio.subprocess.Process) -> dict[str, float]:
    out, _ = await asyncio.wait_for(process.communicate(), patient(20))
    told = json.loads(out)
    assert isinstance(told, dict)
    return told


async def ticking(process: asyncio.subprocess.Process) -> None:
    assert process.stdout is not None
    assert await asyncio.wait_for(process.stdout.readline(), patient(20)) == b"ticking\n"


async def test_a_stopped_process_falls_behind_by_the_stop() -> None:
    process = await child(CLOCK, 1.5)
    await ticking(process)
    process.send_signal(signal.SIGSTOP)
    began = time.monotonic()
    await asyncio.sleep(0.5)
    process.send_signal(signal.SIGCONT)
    stopped_s = time.monotonic() - began
    assert (await saw(process))["behind_s"] == pytest.approx(stopped_s, abs=min(patient(0.1), 0.4))


@pytest.mark.skipif(not may_use_real_time_priority(), reason="needs CAP_SYS_NICE to starve a process")
@pytest.mark.skipif(not os.path.exists("/proc/self/schedstat"), reason="this kernel keeps no schedstat")  # noqa: PTH110
async def test_a_starved_process_does_not_fall_behind() -> None:
    process = await child(CLOCK, 1.5)
    await ticking(process)
    hog = await child(HOG, 0.6)
    assert await hog.wait() == 0
    told = await saw(process)
    # The gap is there, longer than many a pause, and yet no time was lost.
    assert told["gap_s"] > 0.3
    assert told["behind_s"] == pytest.approx(0, abs=0.01)
