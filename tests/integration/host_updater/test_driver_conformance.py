"""What every driver must do; run over the process driver with each of its freezers."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from caesura_host_updater.drivers.freezers import choose_freezer
from caesura_host_updater.drivers.port import Driver, DriverError, FreezeFailed, NotPossible
from caesura_host_updater.drivers.process import ProcessDriver
from caesura_host_updater.guard.plans import CgroupPlan, condition, thaw
from caesura_host_updater.guard.procfs import alive, read_process
from caesura_host_updater.hostfile import GuestProcess, VmSpec

# Leaves its process group and session, forks, and starts threads: all of it must stand still.
ESCAPING = """
import os, sys, threading, time
threading.Thread(target=time.sleep, args=(600,), daemon=True).start()
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        while True: time.sleep(0.005)
    os._exit(0)
while True: time.sleep(0.005)
"""


def specs() -> tuple[VmSpec, ...]:
    """Three VMs, one of them awkward, one with memory."""
    busy = GuestProcess(argv=(sys.executable, "-S", "-c", "while True: pass"))
    awkward = GuestProcess(argv=(sys.executable, "-S", "-c", ESCAPING))
    return (
        VmSpec(name="plain", process=(GuestProcess(argv=("sleep", "600")),), ram_bytes=3 * 2**20 + 5),
        VmSpec(name="awkward", process=(awkward, GuestProcess(argv=("sleep", "601")))),
        VmSpec(name="busy", process=(busy,)),
    )


@pytest.fixture
async def make(freezer: Any, tmp_path: Path) -> AsyncIterator[Callable[[], ProcessDriver]]:
    """Drivers on one state folder, as one host updater after the other would have."""
    made: list[ProcessDriver] = []

    def build() -> ProcessDriver:
        chosen, passed = choose_freezer(freezer, f"caesura-driver-test-{os.getpid()}")
        assert passed == {}
        driver = ProcessDriver(
            "host-1", specs(), tmp_path, chosen, environ=os.environ, max_digest_bytes=8 * 2**20
        )
        made.append(driver)
        return driver

    yield build
    last = build()
    await last.open()
    for vm in last.states():
        await last.resume(vm, 5)
    await last.close(stop_vms=True)
    for driver in made[:-1]:
        await driver.close(stop_vms=False)


@pytest.fixture
async def driver(make: Callable[[], Driver]) -> Driver:
    """One driver with its VMs running."""
    made = make()
    await made.open()
    return made


def soon() -> float:
    """A generous instant by which to freeze."""
    return time.monotonic() + 10


async def test_freeze_and_resume_all_at_once(driver: Driver) -> None:
    assert set(driver.states().values()) == {"running"}
    began = time.monotonic()
    await asyncio.gather(*(driver.freeze(vm, soon()) for vm in driver.states()))
    assert time.monotonic() - began < 5
    assert set(driver.states().values()) == {"paused"}
    assert {condition(driver.resume_plan(vm)) for vm in driver.states()} == {"frozen"}
    for vm in driver.states():
        assert await driver.resume(vm, 5) == "running"
        assert await driver.resume(vm, 5) == "running"  # right in every state
    assert set(driver.states().values()) == {"running"}


async def test_nothing_of_a_frozen_vm_uses_time(driver: ProcessDriver) -> None:
    leader = driver.resume_plan("busy")
    pids = tree(driver, "busy")
    assert len(pids) >= 2, leader
    await driver.freeze("busy", soon())
    before = {pid: ticks_of(pid) for pid in pids}
    await asyncio.sleep(0.2)  # the thing measured: time passes and nothing is used
    assert {pid: ticks_of(pid) for pid in pids} == before
    await driver.resume("busy", 5)
    async with asyncio.timeout(10):
        while {pid: ticks_of(pid) for pid in pids} == before:  # noqa: ASYNC110 - the kernel does not call us
            await asyncio.sleep(0.01)


async def test_processes_that_escaped_stand_still_too(driver: ProcessDriver) -> None:
    async with asyncio.timeout(10):
        while len(tree(driver, "awkward")) < 4:  # noqa: ASYNC110 - the kernel does not call us
            await asyncio.sleep(0.01)
    pids = tree(driver, "awkward")
    await driver.freeze("awkward", soon())
    switches = {pid: switches_of(pid) for pid in pids}
    await asyncio.sleep(0.1)  # the thing measured: nobody is scheduled meanwhile
    assert {pid: switches_of(pid) for pid in pids} == switches
    assert await driver.resume("awkward", 5) == "running"


async def test_the_guard_plan_resumes_without_the_driver(driver: Driver) -> None:
    plan = driver.resume_plan("awkward")
    await driver.freeze("awkward", soon())
    thaw(plan)
    async with asyncio.timeout(5):
        while condition(plan) != "running":  # noqa: ASYNC110 - the kernel does not call us
            await asyncio.sleep(0.002)
    assert driver.states()["awkward"] == "running"


async def test_a_freeze_that_comes_too_late_does_not_keep_trying(driver: Driver) -> None:
    """The updater was stopped before the call: at most one try, and it says so or finds it frozen."""
    with suppress(FreezeFailed):
        await driver.freeze("plain", time.monotonic() - 1)
    assert await driver.resume("plain", 5) == "running"
    assert driver.states()["plain"] == "running"


async def test_cancelled_freeze_leaves_nothing_behind(driver: Driver) -> None:
    task = asyncio.create_task(driver.freeze("plain", soon()))
    await asyncio.sleep(0)
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task
    assert await driver.resume("plain", 5) == "running"
    assert driver.states()["plain"] == "running"


async def test_vm_that_ends(driver: ProcessDriver, freezer: str) -> None:
    pids = tree(driver, "awkward")
    if freezer != "cgroup1":  # a frozen v1 group does not die before it is thawed
        await driver.freeze("awkward", soon())
    os.kill(pids[0], signal.SIGKILL)
    async with asyncio.timeout(10):
        await driver.changed()
    assert driver.states()["awkward"] == "stopped"
    assert await driver.resume("awkward", 5) == "gone"
    async with asyncio.timeout(10):
        while any(runs(pid) for pid in pids):  # noqa: ASYNC110 - the kernel does not call us
            await asyncio.sleep(0.01)
    with pytest.raises(FreezeFailed):
        await driver.freeze("awkward", soon())
    with pytest.raises(DriverError):
        driver.resume_plan("awkward")
    assert driver.ping() == "not running: awkward"


async def test_next_life_adopts_what_runs_and_what_is_frozen(make: Callable[[], ProcessDriver]) -> None:
    first = make()
    await first.open()
    before = {vm: tree(first, vm)[0] for vm in first.states()}
    await first.freeze("plain", soon())
    second = make()
    await second.open()
    assert {vm: tree(second, vm)[0] for vm in second.states()} == before
    assert second.states() == {"plain": "paused", "awkward": "running", "busy": "running"}
    assert await second.resume("plain", 5) == "running"


async def test_memory_digest(driver: ProcessDriver, tmp_path: Path) -> None:
    await driver.freeze("plain", soon())
    assert driver.memory_size("plain") == 3 * 2**20 + 5
    first = await driver.memory_digest("plain", soon())
    assert first is not None
    assert await driver.memory_digest("plain", soon()) == first
    with (tmp_path / "vms" / "plain.ram").open("r+b") as file:
        file.seek(2**21)
        file.write(b"x")
    assert await driver.memory_digest("plain", soon()) != first
    assert await driver.memory_digest("plain", time.monotonic() - 1) is None
    await driver.resume("plain", 5)
    with pytest.raises(NotPossible):
        await driver.memory_digest("busy", soon())
    with pytest.raises(NotPossible):
        await driver.sync_clock("plain")


async def test_vm_whose_program_is_missing(freezer: str, tmp_path: Path) -> None:
    chosen, _ = choose_freezer(freezer, f"caesura-driver-test-{os.getpid()}")  # type: ignore[arg-type]
    spec = VmSpec(name="bad", process=(GuestProcess(argv=("no-such-program",)),))
    driver = ProcessDriver("host-1", (spec,), tmp_path, chosen, environ=os.environ, max_digest_bytes=0)
    await driver.open()
    assert driver.states() == {"bad": "stopped"}
    assert (
        driver.ping()
        == "not running: bad (cannot be started: cannot start no-such-program: No such file or directory)"
    )
    await driver.close(stop_vms=True)


async def test_vm_starts_in_a_place_that_was_left_frozen(make: Callable[[], ProcessDriver]) -> None:
    first = make()
    await first.open()
    plan = first.resume_plan("plain")
    pids = tree(first, "plain")
    await first.freeze("plain", soon())
    for pid in reversed(pids):
        os.kill(pid, signal.SIGKILL)
    await first.close(stop_vms=False)
    if isinstance(plan, CgroupPlan) and plan.kind == "cgroup1":
        thaw(plan)  # a frozen v1 group does not even die
    async with asyncio.timeout(10):
        while condition(plan) != "gone":  # noqa: ASYNC110 - the kernel does not call us
            await asyncio.sleep(0.01)
    second = make()
    await second.open()
    assert second.states()["plain"] == "running"
    assert tree(second, "plain")[0] not in pids


def tree(driver: ProcessDriver, vm: str) -> list[int]:
    """Pids of a VM, its first process first."""
    from caesura_host_updater.guard.plans import SignalPlan  # noqa: PLC0415
    from caesura_host_updater.guard.procfs import process_table  # noqa: PLC0415

    run = driver._runs[vm]
    members = SignalPlan(vm, run.pid, run.start_ticks).members(process_table())
    return sorted((each.pid for each in members), key=lambda pid: pid != run.pid)


def ticks_of(pid: int) -> str:
    """Processor time used, from /proc."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return f"{fields[11]} {fields[12]}"


def switches_of(pid: int) -> list[str]:
    """How often it was scheduled, from /proc."""
    return [line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if "ctxt_switches" in line]


def runs(pid: int) -> bool:
    """Whether there is such a process that is no zombie."""
    process = read_process(pid)
    return process is not None and alive(pid, process.start_ticks)
