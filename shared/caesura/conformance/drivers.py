"""The driver conformance suite: what every driver must do (``caesura_host_updater.drivers.port``)."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import time
from collections.abc import AsyncIterator
from contextlib import suppress

import pytest
import pytest_asyncio

from caesura.conformance.driver_harness import DriverHarness, DriverRuns
from caesura.conformance.patience import patient
from caesura.contract.messages import Method
from caesura_host_updater.drivers.plugin import check_plans, load_plugin
from caesura_host_updater.drivers.port import (
    ClockCapable,
    DigestCapable,
    Driver,
    DriverError,
    FreezeFailed,
    RebootCapable,
    ReplaceCapable,
    ShutdownFailed,
    SwapCapable,
)
from caesura_vmcontrol.container_engine import EnginePlan
from caesura_vmcontrol.procfs import alive, read_process
from caesura_vmcontrol.resume_plans import CgroupPlan, mechanism_of
from caesura_vmcontrol.vm_control import condition, resume_vm

__all__ = ["DriverConformance", "DriverHarness", "DriverRuns", "freeze_deadline"]

_TAKEOVERS: tuple[tuple[Method, type], ...] = (("swap", SwapCapable), ("replace", ReplaceCapable))


def freeze_deadline() -> float:
    """A generous instant by which to freeze; CLOCK_MONOTONIC, in seconds."""
    return time.monotonic() + 10


@pytest.mark.asyncio
class DriverConformance:
    """Subclass it in a test module as ``TestMyDriver``, with a fixture ``harness`` that gives a ``DriverHarness``.

    The driver's entry point must be installed.
    """

    @pytest_asyncio.fixture
    async def runs(self, harness: DriverHarness) -> AsyncIterator[DriverRuns]:
        """Host updaters, one after the other."""
        runs = DriverRuns(harness)
        yield runs
        await runs.end()

    @pytest_asyncio.fixture
    async def driver(self, runs: DriverRuns) -> Driver:
        """One driver with its VMs running."""
        return await runs.start()

    async def test_freeze_and_resume_all_at_once(self, driver: Driver, harness: DriverHarness) -> None:
        states = await driver.read_states()
        assert set(states) == set(harness.vms)
        assert set(states.values()) == {"running"}
        began = time.monotonic()
        await asyncio.gather(*(driver.freeze(vm, freeze_deadline()) for vm in states))
        assert time.monotonic() - began < patient(5)
        assert set((await driver.read_states()).values()) == {"paused"}
        assert {condition(driver.resume_plan(vm)) for vm in states} == {"frozen"}
        for vm in states:
            assert await driver.resume(vm, 5) == "running"
            assert await driver.resume(vm, 5) == "running"  # right in every state
        assert set((await driver.read_states()).values()) == {"running"}

    async def test_the_guard_plan_resumes_without_the_driver(
        self, driver: Driver, harness: DriverHarness
    ) -> None:
        vm = harness.vms[1]
        plan = driver.resume_plan(vm)
        await driver.freeze(vm, freeze_deadline())
        resume_vm(plan)
        async with asyncio.timeout(patient(5)):
            while condition(plan) != "running" or (await driver.read_states())[vm] != "running":  # noqa: ASYNC110 - nobody calls us
                await asyncio.sleep(0.002)

    async def test_a_freeze_that_comes_too_late_does_not_keep_trying(
        self, driver: Driver, harness: DriverHarness
    ) -> None:
        """The updater was stopped before the call: at most one try, and it says so or finds it frozen."""
        vm = harness.vms[0]
        with suppress(FreezeFailed):
            await driver.freeze(vm, time.monotonic() - 1)
        assert await driver.resume(vm, 5) == "running"
        assert (await driver.read_states())[vm] == "running"

    async def test_cancelled_freeze_leaves_nothing_behind(
        self, driver: Driver, harness: DriverHarness
    ) -> None:
        vm = harness.vms[0]
        task = asyncio.create_task(driver.freeze(vm, freeze_deadline()))
        await asyncio.sleep(0)
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
        assert await driver.resume(vm, 5) == "running"
        assert (await driver.read_states())[vm] == "running"

    async def test_vm_that_ends(self, driver: Driver, harness: DriverHarness) -> None:
        vm = harness.vms[1]
        pids = harness.processes(driver, vm)
        if not _dies_only_when_thawed(driver, vm):
            await driver.freeze(vm, freeze_deadline())
        os.kill(pids[0], signal.SIGKILL)
        async with asyncio.timeout(patient(10)):
            await driver.changed()
        assert (await driver.read_states())[vm] == "stopped"
        assert await driver.resume(vm, 5) == "gone"
        async with asyncio.timeout(patient(10)):
            while any(_runs(pid) for pid in pids):  # noqa: ASYNC110 - the kernel does not call us
                await asyncio.sleep(0.01)
        with pytest.raises(FreezeFailed):
            await driver.freeze(vm, freeze_deadline())
        with pytest.raises(DriverError):
            driver.resume_plan(vm)
        assert driver.ping().startswith(f"not running: {vm}")
        assert driver.process_of(vm) == ""

    async def test_the_next_driver_adopts_what_runs_and_what_is_frozen(
        self, runs: DriverRuns, harness: DriverHarness
    ) -> None:
        first = await runs.start()
        paused = harness.vms[0]
        before = {vm: harness.processes(first, vm)[0] for vm in harness.vms}
        await first.freeze(paused, freeze_deadline())
        second = await runs.start()
        assert {vm: harness.processes(second, vm)[0] for vm in harness.vms} == before
        assert await second.read_states() == {
            vm: "paused" if vm == paused else "running" for vm in harness.vms
        }
        assert await second.resume(paused, 5) == "running"

    async def test_what_is_not_possible_is_refused_before_the_pause(
        self, driver: Driver, harness: DriverHarness
    ) -> None:
        vm = harness.vms[0]
        can = driver.capabilities(vm)
        assert {"live", "freeze"} <= set(can.methods)
        assert isinstance(driver, RebootCapable) or can.missing["reboot"]
        assert not set(can.methods) & can.missing.keys()
        for method, _ in _TAKEOVERS:
            if method in can.missing:
                with pytest.raises(DriverError, match=re.escape(can.missing[method])):
                    await driver.prepare(vm, "op-1", method, "")
        await driver.prepare(vm, "op-2", "freeze", "")
        await driver.release(vm)
        await driver.release(vm)  # right in every state
        if isinstance(driver, SwapCapable):
            with pytest.raises(DriverError):
                await driver.hand_over(vm, freeze_deadline())
        if isinstance(driver, ReplaceCapable):
            with pytest.raises(DriverError):
                await driver.checkpoint(vm, freeze_deadline())
        assert (await driver.read_states())[vm] == "running"

    async def test_a_driver_has_the_protocols_of_what_it_says_it_can_do(self, driver: Driver) -> None:
        for vm in await driver.read_states():
            can = driver.capabilities(vm)
            for method, protocol in _TAKEOVERS:
                assert isinstance(driver, protocol) or can.missing[method], method
            assert isinstance(driver, DigestCapable) or (not can.digests and can.no_digest)
            assert isinstance(driver, ClockCapable) or can.clock != "system"

    async def test_the_guard_plan_is_one_that_the_plug_in_promised(self, driver: Driver) -> None:
        promised = load_plugin(driver.name).mechanisms
        vms = await driver.read_states()
        check_plans(driver, vms)
        assert {mechanism_of(driver.resume_plan(vm)) for vm in vms} <= promised

    async def test_a_vm_that_is_asked_to_shut_down_ends_by_itself_or_runs_on(
        self, driver: Driver, harness: DriverHarness
    ) -> None:
        """Nothing is killed for an update that needs a reboot."""
        vm, other = harness.vms[:2]
        if not isinstance(driver, RebootCapable):
            assert "reboot" not in driver.capabilities(vm).methods
            return
        before = {each: harness.processes(driver, each) for each in (vm, other)}
        try:
            how = await driver.shut_down(vm, time.monotonic() + 3)
        except ShutdownFailed:
            # A guest that ignores it; it is left alone.
            assert (await driver.read_states())[vm] == "running"
            assert not await driver.start(vm, time.monotonic())
            assert harness.processes(driver, vm)[0] == before[vm][0]
        else:
            assert how
            assert (await driver.read_states())[vm] == "stopped"
            assert not any(_runs(pid) for pid in before[vm])
            assert await driver.start(vm, time.monotonic())
            assert harness.processes(driver, vm)[0] not in before[vm]
            assert (await driver.read_states())[vm] == "running"
            await driver.freeze(vm, freeze_deadline())
            assert await driver.resume(vm, 5) == "running"
        assert not await driver.start(other, time.monotonic())
        assert harness.processes(driver, other)[0] == before[other][0]
        assert driver.ping() == ""

    async def test_a_vm_that_was_killed_while_frozen_is_started_by_the_next_driver(
        self, runs: DriverRuns, harness: DriverHarness
    ) -> None:
        """Its cgroup, if it has one, was left frozen."""
        vm = harness.vms[0]
        first = await runs.start()
        plan = first.resume_plan(vm)
        pids = harness.processes(first, vm)
        dies_only_when_thawed = _dies_only_when_thawed(first, vm)
        await first.freeze(vm, freeze_deadline())
        for pid in reversed(pids):
            os.kill(pid, signal.SIGKILL)
        await first.close(stop_vms=False)
        if dies_only_when_thawed:
            resume_vm(plan)
        async with asyncio.timeout(patient(10)):
            while condition(plan) != "gone":  # noqa: ASYNC110 - the kernel does not call us
                await asyncio.sleep(0.01)
        second = await runs.start()
        if not harness.starts_vms:
            assert (await second.read_states())[vm] == "stopped"
            return
        assert (await second.read_states())[vm] == "running"
        assert harness.processes(second, vm)[0] not in pids


def _dies_only_when_thawed(driver: Driver, vm: str) -> bool:
    """A frozen group of cgroup v1 does not even die."""
    plan = driver.resume_plan(vm)
    if isinstance(plan, EnginePlan):
        return plan.freezer == "cgroup1"
    return isinstance(plan, CgroupPlan) and plan.kind == "cgroup1"


def _runs(pid: int) -> bool:
    """Whether there is such a process, and it is not a zombie."""
    process = read_process(pid)
    return process is not None and alive(pid, process.start_ticks)
