"""A domain that in its pause ends, is started again, or goes to another host: it is reported as what it is, and nothing fights it."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import pytest_asyncio

from caesura.conformance.drivers import freeze_deadline
from caesura_host_updater.drivers.libvirt.definition import LibvirtOptions
from caesura_host_updater.drivers.libvirt.driver import LibvirtDriver
from caesura_host_updater.drivers.port import FreezeFailed
from caesura_testing.libvirt_daemons import URI, LibvirtDaemon, libvirt_daemon
from caesura_testing.patience import patient
from caesura_vmcontrol.vm_control import condition, resume_vm

pytestmark = pytest.mark.asyncio


async def until(wanted: Callable[[], bool], what: str, timeout_s: float = 20.0) -> None:
    try:
        async with asyncio.timeout(patient(timeout_s)):
            while not wanted():  # noqa: ASYNC110 - a daemon that does not call us
                await asyncio.sleep(0.02)
    except TimeoutError:
        raise AssertionError(what) from None


def driver_of(daemon: LibvirtDaemon, folder: Path) -> LibvirtDriver:
    return LibvirtDriver(LibvirtOptions(uri=URI), (str(daemon.socket),), folder)


@pytest_asyncio.fixture
async def driver(daemon: LibvirtDaemon, tmp_path: Path) -> AsyncIterator[LibvirtDriver]:
    daemon.define("web-1", label="set='web' update-domain='0'")
    driver = driver_of(daemon, tmp_path / "here")
    await driver.open()
    yield driver
    await driver.close(stop_vms=False)


async def test_what_an_operator_pauses_and_resumes_is_told_at_once(
    driver: LibvirtDriver, daemon: LibvirtDaemon
) -> None:
    """By libvirt's event, though no domain came, went, or got another label: else the inventory shows it when it is repeated."""
    for command in ("suspend", "resume"):
        told = asyncio.create_task(driver.changed())
        await asyncio.to_thread(daemon.virsh, command, "web-1")
        async with asyncio.timeout(patient(20)):
            await told


@pytest.fixture(scope="session")
def shared_other() -> Iterator[LibvirtDaemon]:
    with libvirt_daemon() as daemon:
        yield daemon


@pytest.fixture
def other(shared_other: LibvirtDaemon) -> Iterator[LibvirtDaemon]:
    """Another host's."""
    yield shared_other
    shared_other.remove_all()


# -- started again ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("daemon_too", [False, True])
async def test_a_domain_that_was_started_again_in_its_pause_has_ended(
    driver: LibvirtDriver, daemon: LibvirtDaemon, daemon_too: bool
) -> None:
    """Its memory is lost: it must not count as resumed. A daemon that was restarted gives the same id again."""

    def start_again() -> None:
        daemon.virsh("destroy", "web-1")
        if daemon_too:
            daemon.kill()
            daemon.start()
        daemon.virsh("start", "web-1")

    start_again()  # a daemon that was started without any begins to count
    await until(lambda: str(daemon.pid("web-1")) in driver.process_of("web-1"), "the new process is noticed")
    plan = driver.resume_plan("web-1")
    await driver.freeze("web-1", freeze_deadline())
    start_again()
    assert condition(plan) == "gone"
    await until(lambda: str(daemon.pid("web-1")) in driver.process_of("web-1"), "the new process is noticed")
    if daemon_too:
        assert driver.resume_plan("web-1").number == plan.number, "or this test shows nothing"
    assert (await driver.read_states())["web-1"] == "stopped"
    assert await driver.resume("web-1", patient(5)) == "gone"
    assert "started again in its pause" in driver.health_error("web-1")
    resume_vm(plan)
    await driver.release("web-1")
    assert (await driver.read_states())["web-1"] == "running"
    assert driver.health_error("web-1") == ""
    await driver.freeze("web-1", freeze_deadline())
    assert await driver.resume("web-1", patient(5)) == "running"


async def test_a_domain_that_ended_in_its_pause(driver: LibvirtDriver, daemon: LibvirtDaemon) -> None:
    await driver.freeze("web-1", freeze_deadline())
    daemon.virsh("destroy", "web-1")
    assert (await driver.read_states())["web-1"] == "stopped"
    assert await driver.resume("web-1", patient(5)) == "gone"
    assert driver.why_left("web-1") == ""


# -- another host -----------------------------------------------------------------------------------------------


def moved(daemon: LibvirtDaemon, other: LibvirtDaemon, *words: str) -> None:
    """Migrate it, and wait for the end."""
    moving = daemon.migrate("web-1", other, *words)
    output, _ = moving.communicate(timeout=patient(60))
    assert moving.returncode == 0, output


@pytest.mark.parametrize("words", [(), ("--undefinesource",)])
async def test_a_domain_that_was_migrated_away_in_its_pause_is_left_and_named(
    driver: LibvirtDriver, daemon: LibvirtDaemon, other: LibvirtDaemon, tmp_path: Path, words: tuple[str, ...]
) -> None:
    plan = driver.resume_plan("web-1")
    await driver.freeze("web-1", freeze_deadline())
    await asyncio.to_thread(moved, daemon, other, *words)
    assert condition(plan) == "gone"
    assert (await driver.read_states())["web-1"] == "unknown"
    assert [vm.name for vm in driver.members()] == ["web-1"], "of an operation"
    assert await driver.resume("web-1", patient(5)) == "left"
    assert "migrated to another host" in driver.why_left("web-1")
    assert " resume web-1`" in driver.why_left("web-1")
    await driver.release("web-1")
    # Its definition alone makes it no VM of this host: the other one has it.
    await until(lambda: not driver.members(), "it is no VM of this host any more")
    there = driver_of(other, tmp_path / "there")
    await there.open()
    try:
        (vm,) = there.members()
        assert (vm.name, vm.set, vm.update_domain) == ("web-1", "web", 0), "its label moves with it"
        assert (await there.read_states())["web-1"] == "paused"
        with pytest.raises(FreezeFailed, match="paused by somebody else"):
            await there.freeze("web-1", freeze_deadline())
        assert await there.resume("web-1", patient(5)) == "left"
        assert other.state("web-1") == "paused", "not ours to resume there"
        other.virsh("resume", "web-1")
        await there.freeze("web-1", freeze_deadline())
        assert await there.resume("web-1", patient(5)) == "running"
    finally:
        await there.close(stop_vms=False)


@contextmanager
def stalled(daemon: LibvirtDaemon, other: LibvirtDaemon) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A migration that does not come to its end: the process that is to take the guest over is stopped as soon as it is there."""
    moving = daemon.migrate("web-1", other)
    pid = 0
    try:
        while not pid:
            with suppress(OSError, ValueError):
                pid = other.pid("web-1")
            assert moving.poll() is None, moving.communicate()[0]
            time.sleep(0.001)
        os.kill(pid, signal.SIGSTOP)
        assert "Outgoing migration" in daemon.virsh("domjobinfo", "web-1")
        yield moving, pid
    finally:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT) if pid else None
        moving.communicate(timeout=patient(60))


async def test_a_domain_that_is_being_migrated_when_its_pause_ends_is_left_and_named(
    driver: LibvirtDriver, daemon: LibvirtDaemon, other: LibvirtDaemon
) -> None:
    plan = driver.resume_plan("web-1")
    await driver.freeze("web-1", freeze_deadline())
    with stalled(daemon, other) as (moving, _):
        assert (await driver.read_states())["web-1"] in ("paused", "unknown")
        assert await driver.resume("web-1", patient(5)) == "left"
        assert "is migrating it to another host" in driver.why_left("web-1")
        assert condition(plan) == "gone"
        resume_vm(plan)
        assert moving.poll() is None
        assert daemon.state("web-1") == "paused", "nothing of ours gets into its way"
    assert moving.returncode == 0
    assert other.state("web-1") == "paused"


async def test_a_domain_that_is_being_migrated_is_not_paused(
    driver: LibvirtDriver, daemon: LibvirtDaemon, other: LibvirtDaemon
) -> None:
    """It would arrive paused."""
    with stalled(daemon, other) as (moving, _):
        with pytest.raises(FreezeFailed, match="is migrating it to another host") as raised:
            await driver.freeze("web-1", freeze_deadline())
        assert raised.value.untouched
        assert moving.poll() is None
    assert moving.returncode == 0
    assert other.state("web-1") == "running"


async def test_a_migration_that_fails_after_the_pause_leaves_no_domain_paused(
    driver: LibvirtDriver, daemon: LibvirtDaemon, other: LibvirtDaemon
) -> None:
    await driver.freeze("web-1", freeze_deadline())
    with stalled(daemon, other) as (moving, pid):
        assert await driver.resume("web-1", patient(5)) == "left"
        await driver.release("web-1")
        os.kill(pid, signal.SIGKILL)
    assert moving.returncode != 0
    await until(lambda: daemon.state("web-1") == "running", "it is resumed where it still is")
