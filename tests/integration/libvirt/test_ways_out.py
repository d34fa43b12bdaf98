"""A domain that is paused runs again whatever happens to libvirt's daemon, by the plan that the pause guard has."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from pathlib import Path

import pytest
import pytest_asyncio

from caesura.conformance.drivers import freeze_deadline
from caesura_host_updater.drivers.libvirt.definition import LibvirtOptions
from caesura_host_updater.drivers.libvirt.driver import LibvirtDriver
from caesura_testing.libvirt_daemons import URI, LibvirtDaemon
from caesura_testing.patience import patient
from caesura_vmcontrol.resume_plans import ResumePlan, plan_from_json, plan_to_json
from caesura_vmcontrol.vm_control import condition, resume_vm

pytestmark = pytest.mark.asyncio


def _until(wanted: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + patient(10)
    while not wanted():
        assert time.monotonic() < end, what
        time.sleep(0.01)


def _thawed(plan: ResumePlan) -> None:
    """As the guard does: again and again, until it is seen to run."""

    def runs() -> bool:
        with suppress(OSError):
            resume_vm(plan)
            return condition(plan) == "running"
        return False

    _until(runs, "it does not run")


def _driver(daemon: LibvirtDaemon, folder: Path) -> LibvirtDriver:
    return LibvirtDriver(LibvirtOptions(uri=URI), (str(daemon.socket),), folder)


@pytest_asyncio.fixture
async def driver(daemon: LibvirtDaemon, tmp_path: Path) -> AsyncIterator[LibvirtDriver]:
    daemon.define("web-1")
    daemon.define("db-1", own_qmp=True)
    driver = _driver(daemon, tmp_path)
    await driver.open()
    yield driver
    await driver.close(stop_vms=False)


async def test_the_plan_says_which_ways_there_are(driver: LibvirtDriver, daemon: LibvirtDaemon) -> None:
    plan = driver.resume_plan("db-1")
    assert plan.qmp[0] == str(daemon.own_qmp("db-1"))
    assert plan.qmp[1].endswith("/monitor.sock")
    assert driver.capabilities("db-1").pause_risk == ""
    assert "hangs" in driver.capabilities("web-1").pause_risk
    assert plan_from_json(json.loads(json.dumps(plan_to_json(plan)))) == plan


@pytest.mark.parametrize("vm", ["web-1", "db-1"])
async def test_a_daemon_that_was_killed_in_the_pause(
    driver: LibvirtDriver, daemon: LibvirtDaemon, vm: str
) -> None:
    plan = driver.resume_plan(vm)
    await driver.freeze(vm, freeze_deadline())
    daemon.kill()
    assert condition(plan) == "frozen"
    _thawed(plan)
    daemon.start()
    # It has what it wrote down until it has asked QEMU.
    _until(lambda: daemon.state(vm) == "running", "libvirt does not notice that it runs")
    assert await driver.resume(vm, patient(5)) == "running"


async def test_a_daemon_that_hangs_in_the_pause_does_not_keep_a_domain_with_its_own_socket(
    driver: LibvirtDriver, daemon: LibvirtDaemon
) -> None:
    plan = driver.resume_plan("db-1")
    await driver.freeze("db-1", freeze_deadline())
    with daemon.hung():
        assert condition(plan) == "frozen"
        _thawed(plan)
    _until(lambda: daemon.state("db-1") == "running", "libvirt does not notice it")


async def test_a_daemon_that_hangs_keeps_a_domain_without_one_until_it_answers_again(
    driver: LibvirtDriver, daemon: LibvirtDaemon
) -> None:
    """What `pause_risk` says in the plan."""
    plan = driver.resume_plan("web-1")
    await driver.freeze("web-1", freeze_deadline())
    with daemon.hung(), pytest.raises(OSError, match="does not answer in time"):
        resume_vm(plan)
    _thawed(plan)


async def test_a_daemon_that_was_restarted_in_the_pause(driver: LibvirtDriver, daemon: LibvirtDaemon) -> None:
    plan = driver.resume_plan("web-1")
    await driver.freeze("web-1", freeze_deadline())
    daemon.kill()
    daemon.start()
    _until(lambda: daemon.state("web-1") == "paused", "libvirt lost the domain")
    assert condition(plan) == "frozen"
    assert await driver.resume("web-1", patient(5)) == "running"


@pytest.mark.parametrize("vm", ["web-1", "db-1"])
async def test_a_daemon_that_has_lost_the_domain_in_the_pause(
    driver: LibvirtDriver, daemon: LibvirtDaemon, tmp_path: Path, vm: str
) -> None:
    """It was restarted and cannot read its own file of the domain, as after an upgrade: it calls it shut off."""
    plan = driver.resume_plan(vm)
    await driver.freeze(vm, freeze_deadline())
    daemon.kill()
    (daemon.runtime_dir / f"libvirt/qemu/run/{vm}.xml").write_text("<domstatus")
    daemon.start()
    try:
        _until(lambda: daemon.state(vm) == "shut off", "or this test shows nothing")
        assert condition(plan) == "frozen"
        assert (await driver.read_states())[vm] == "paused"
        again = LibvirtDriver(driver._options, (str(daemon.socket),), tmp_path / "again")
        await again.open()
        try:
            assert (await again.read_states())[vm] == "stopped", (
                "a host updater that is started now knows no better"
            )
            again.adopt([plan])
            assert (await again.read_states())[vm] == "paused"
            assert await again.resume(vm, patient(5)) == "running"
        finally:
            await again.close(stop_vms=False)
        assert condition(plan) == "running"
    finally:
        os.kill(plan.pid, signal.SIGKILL)
    _until(lambda: condition(plan) == "gone", "its process has ended")
