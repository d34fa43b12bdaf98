"""The driver over QEMU processes in Proxmox's layout: other clients, locks, VMs that come, go, or are not ours to resume."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import time
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from caesura.conformance.drivers import freeze_deadline
from caesura_host_updater.drivers.port import DriverError, FreezeFailed, NotRunningYet
from caesura_host_updater.drivers.proxmox.definition import ProxmoxOptions
from caesura_host_updater.drivers.proxmox.driver import ProxmoxDriver
from caesura_host_updater.drivers.proxmox.monitor import stop_guest
from caesura_testing.patience import patient
from caesura_testing.proxmox_node import ProxmoxNode, StatusDaemon
from caesura_vmcontrol.resume_plans import plan_from_json, plan_to_json
from caesura_vmcontrol.vm_control import condition, resume_vm

pytestmark = pytest.mark.asyncio

MOST_WAIT_S = 0.2
"""s: how long Proxmox's own tools may be kept waiting."""


def options_of(node: ProxmoxNode, **options: Any) -> ProxmoxOptions:
    return ProxmoxOptions(config_dir=str(node.config_dir), run_dir=str(node.run_dir), **options)


async def until(wanted: Callable[[], bool], what: str, timeout_s: float = 5.0) -> None:
    async with asyncio.timeout(patient(timeout_s)):
        while not wanted():  # noqa: ASYNC110 - files and processes do not call us
            await asyncio.sleep(0.01)
    assert wanted(), what


@pytest_asyncio.fixture
async def driver(node: ProxmoxNode) -> AsyncIterator[ProxmoxDriver]:
    """Of a node with one VM."""
    node.create(100, "web", tags=("caesura-set-web", "caesura-ud-0"))
    driver = ProxmoxDriver(options_of(node))
    await driver.open()
    yield driver
    await driver.close(stop_vms=False)


# -- other clients ----------------------------------------------------------------------------------------------


async def test_proxmoxs_own_tools_are_never_kept_waiting(driver: ProxmoxDriver, node: ProxmoxNode) -> None:
    """Through pauses with everything that looks at a paused VM: the operation's watch, the inventory, and the guard."""
    plan = driver.resume_plan("vm-100")
    with StatusDaemon([node.run_dir / "100.qmp"]) as status:
        for _ in range(10):
            await driver.freeze("vm-100", freeze_deadline())
            end = time.monotonic() + 0.4
            while time.monotonic() < end:
                assert (await driver.read_states())["vm-100"] == "paused"
                assert await asyncio.to_thread(condition, plan) == "frozen"
                await asyncio.sleep(0.05)
            assert await driver.resume("vm-100", 5) == "running"
    assert not status.errors
    assert len(status.waits) >= 10
    assert max(status.waits) < patient(MOST_WAIT_S), sorted(status.waits)[-5:]
    await until(lambda: len(node.events.pauses) == 10, "each pause was an event")


async def test_nothing_holds_the_socket(driver: ProxmoxDriver, node: ProxmoxNode) -> None:
    """A client that connects now is greeted, in every state of a VM."""
    await driver.freeze("vm-100", freeze_deadline())
    assert node.status(100) == "paused"
    assert await driver.resume("vm-100", 5) == "running"
    assert node.status(100) == "running"


async def test_a_client_that_is_served_is_waited_for(driver: ProxmoxDriver, node: ProxmoxNode) -> None:
    with held(node, 100):
        freezing = asyncio.create_task(driver.freeze("vm-100", freeze_deadline()))
        await asyncio.sleep(0.3)
        assert not freezing.done()
    await freezing
    assert node.status(100) == "paused"
    with held(node, 100), pytest.raises(NotRunningYet, match="serves another client"):
        await driver.resume("vm-100", 0.2)
    assert await driver.resume("vm-100", 5) == "running"


async def test_a_client_that_stays_has_the_freeze_refused_and_nothing_paused(
    driver: ProxmoxDriver, node: ProxmoxNode
) -> None:
    with held(node, 100):
        with pytest.raises(FreezeFailed, match="QEMU hangs, or serves another client"):
            await driver.freeze("vm-100", time.monotonic() + 0.3)
        assert (await driver.read_states())["vm-100"] == "unknown"
        assert await driver.resume("vm-100", 0.2) == "left", "the operation does not wait for that client"
        assert "nothing was done to it" in driver.why_left("vm-100")
    assert (await driver.read_states())["vm-100"] == "running"
    assert await driver.resume("vm-100", 5) == "running"
    assert not node.events.pauses


class held:  # noqa: N801 - reads as a statement
    """Another client that is served and does not leave."""

    def __init__(self, node: ProxmoxNode, vmid: int) -> None:
        self._path = node.run_dir / f"{vmid}.qmp"
        self._link = socket.socket(socket.AF_UNIX)

    def __enter__(self) -> None:
        self._link.settimeout(patient(5))
        self._link.connect(str(self._path))
        with self._link.makefile("rb") as lines:
            assert b"QMP" in lines.readline()

    def __exit__(self, *_: object) -> None:
        self._link.close()


async def test_a_qemu_that_hangs_is_not_paused_later(driver: ProxmoxDriver, node: ProxmoxNode) -> None:
    pid = node.pid(100)
    os.kill(pid, signal.SIGSTOP)
    try:
        with pytest.raises(FreezeFailed):
            await driver.freeze("vm-100", time.monotonic() + 0.3)
    finally:
        os.kill(pid, signal.SIGCONT)
    assert await driver.resume("vm-100", 5) == "running"
    assert node.status(100) == "running"
    assert node.status(100) == "running"


# -- the guard's way --------------------------------------------------------------------------------------------


async def test_the_guards_plan_goes_over_its_socket_and_resumes(
    driver: ProxmoxDriver, node: ProxmoxNode
) -> None:
    plan = driver.resume_plan("vm-100")
    assert plan_from_json(json.loads(json.dumps(plan_to_json(plan)))) == plan
    await driver.freeze("vm-100", freeze_deadline())
    resume_vm(plan)
    assert condition(plan) == "running"
    assert node.status(100) == "running"


async def test_the_guard_leaves_a_guest_that_was_migrated_away(
    driver: ProxmoxDriver, node: ProxmoxNode
) -> None:
    plan = driver.resume_plan("vm-100")
    await driver.freeze("vm-100", freeze_deadline())
    node.qmp(100, "migrate", uri="exec:cat > /dev/null")
    await until(lambda: node.status(100) == "postmigrate", "it is migrated")
    resume_vm(plan)
    assert condition(plan) == "gone"
    assert node.status(100) == "postmigrate"


# -- locks ------------------------------------------------------------------------------------------------------


async def test_a_locked_vm_is_not_paused(driver: ProxmoxDriver, node: ProxmoxNode) -> None:
    assert driver.capabilities("vm-100").methods == ("live", "freeze")
    node.set_lock(100, "backup")
    await until(lambda: "freeze" in driver.capabilities("vm-100").missing, "the lock is noticed", 2)
    can = driver.capabilities("vm-100")
    assert can.methods == ("live",)
    assert "lock: backup" in can.missing["freeze"]
    assert "lock: backup" in driver.health_error("vm-100")
    assert driver.ping() == ""
    node.set_lock(100, "")
    await until(lambda: "freeze" in driver.capabilities("vm-100").methods, "its end is noticed", 2)


async def test_a_lock_that_nobody_noticed_yet_is_read_before_the_pause(
    driver: ProxmoxDriver, node: ProxmoxNode
) -> None:
    node.set_lock(100, "migrate")
    with pytest.raises(FreezeFailed, match="lock: migrate"):
        await driver.freeze("vm-100", freeze_deadline())
    assert await driver.resume("vm-100", 5) == "running"
    assert not node.events.pauses


async def test_a_lock_that_comes_in_the_moment_of_the_pause_undoes_it(
    driver: ProxmoxDriver, node: ProxmoxNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped_and_locked(*arguments: Any) -> None:
        stop_guest(*arguments)
        node.set_lock(100, "snapshot")

    monkeypatch.setattr("caesura_host_updater.drivers.proxmox.driver.stop_guest", stopped_and_locked)
    with pytest.raises(FreezeFailed, match=r"lock: snapshot.*undone"):
        await driver.freeze("vm-100", freeze_deadline())
    assert node.status(100) == "running"


async def test_a_lock_that_comes_in_the_pause_is_named_and_the_vm_is_resumed_for_it_is_ours(
    driver: ProxmoxDriver, node: ProxmoxNode
) -> None:
    """As a backup does: it found the VM paused, and will leave it so."""
    assert driver.process_of("vm-100") == f"VM 100 (web), pid {node.pid(100)}"
    await driver.freeze("vm-100", freeze_deadline())
    node.set_lock(100, "backup")
    await until(lambda: "backup" in driver.process_of("vm-100"), "the lock is noticed", 2)
    assert "lock: backup" in driver.health_error("vm-100")
    assert await driver.resume("vm-100", 5) == "running"
    assert node.status(100) == "running"


async def test_a_vm_that_was_paused_under_a_lock_by_somebody_else_is_left(
    driver: ProxmoxDriver, node: ProxmoxNode
) -> None:
    """As a backup in the mode suspend does."""
    node.set_lock(100, "backup")
    node.qmp(100, "stop")
    with pytest.raises(FreezeFailed, match="lock: backup"):
        await driver.freeze("vm-100", freeze_deadline())
    assert await driver.resume("vm-100", 5) == "left"
    assert "not by Caesura" in driver.why_left("vm-100")
    assert node.status(100) == "paused"


async def test_a_vm_that_was_paused_before_is_left(driver: ProxmoxDriver, node: ProxmoxNode) -> None:
    node.qmp(100, "stop")
    with pytest.raises(FreezeFailed, match="paused by somebody else"):
        await driver.freeze("vm-100", freeze_deadline())
    assert await driver.resume("vm-100", 5) == "left"
    assert "qm resume 100" in driver.why_left("vm-100")
    assert node.status(100) == "paused"
    node.qmp(100, "cont")
    await driver.release("vm-100")
    await driver.freeze("vm-100", freeze_deadline())
    assert await driver.resume("vm-100", 5) == "running"


# -- VMs that come and go ---------------------------------------------------------------------------------------


async def test_a_vm_that_is_migrated_away_in_the_pause_is_left_and_named(
    driver: ProxmoxDriver, node: ProxmoxNode
) -> None:
    await driver.freeze("vm-100", freeze_deadline())
    node.set_lock(100, "migrate")
    node.qmp(100, "migrate", uri="exec:cat > /dev/null")
    await until(lambda: node.status(100) == "postmigrate", "it is migrated")
    assert (await driver.read_states())["vm-100"] == "paused"
    assert await driver.resume("vm-100", 5) == "left"
    assert "migrated away" in driver.why_left("vm-100")
    assert "lock: migrate" in driver.why_left("vm-100")
    assert node.status(100) == "postmigrate"


async def test_a_vm_whose_configuration_went_to_another_node_in_the_pause(
    driver: ProxmoxDriver, node: ProxmoxNode
) -> None:
    await driver.freeze("vm-100", freeze_deadline())
    node.move_away(100)
    node.kill(100)
    await until(lambda: "not on this node" in driver.health_error("vm-100"), "its leaving is noticed", 2)
    assert [vm.name for vm in driver.members()] == ["vm-100"]
    assert (await driver.read_states())["vm-100"] == "unknown"
    assert await driver.resume("vm-100", 5) == "left"
    assert "migrated away, or destroyed" in driver.why_left("vm-100")
    await driver.release("vm-100")
    await until(lambda: not driver.members(), "it is no VM of this node any more", 2)


async def test_a_vm_that_was_started_again_in_its_pause_has_ended(
    driver: ProxmoxDriver, node: ProxmoxNode
) -> None:
    """Its memory is lost: it must not count as resumed."""
    await driver.freeze("vm-100", freeze_deadline())
    node.kill(100)
    node.start(100)
    await until(lambda: str(node.pid(100)) in driver.process_of("vm-100"), "the new process is noticed", 2)
    assert (await driver.read_states())["vm-100"] == "stopped"
    assert await driver.resume("vm-100", 5) == "gone"
    await driver.release("vm-100")
    assert (await driver.read_states())["vm-100"] == "running"


async def test_vms_are_found_named_changed_and_lost(driver: ProxmoxDriver, node: ProxmoxNode) -> None:
    def vm(name: str) -> Any:
        return next((each for each in driver.members() if each.name == name), None)

    node.config(101, "web", tags=("caesura-st-typo",))
    await until(lambda: vm("vm-101") is not None, "the new one is a member", 2)
    assert vm("vm-101").set_name == "_vm-101"
    assert (await driver.read_states())["vm-101"] == "stopped"
    assert "caesura-st-typo is not known" in driver.capabilities("vm-101").missing["freeze"]
    assert "vm-100 is web" in driver.detail()
    assert "vm-101 is web" in driver.detail()
    assert driver.ping() == "", "one that never ran is not missed"
    node.config(101, "web", tags=("caesura-set-web", "caesura-ud-1"))
    await until(lambda: vm("vm-101").update_domain == 1, "its tags are noticed", 2)
    node.config(101, "web", tags=("caesura-set-web", "caesura-ud-2"))
    await until(
        lambda: vm("vm-101").update_domain == 2, "also a change in the same second and of the same size", 2
    )
    node.start(101)
    await until(lambda: driver.process_of("vm-101") != "", "its start is noticed", 2)
    await driver.freeze("vm-101", freeze_deadline())
    assert await driver.resume("vm-101", 5) == "running"
    await driver.release("vm-101")
    node.kill(101)
    await until(lambda: driver.ping().startswith("not running: vm-101"), "its end is noticed", 2)
    (node.config_dir / "101.conf").unlink()
    await until(lambda: vm("vm-101") is None, "it is gone", 2)
    assert driver.ping() == ""


async def test_only_tagged_ones(node: ProxmoxNode) -> None:
    for vmid, tags in ((100, ("web",)), (101, ("caesura",)), (102, ())):
        node.config(vmid, tags=tags)
    driver = ProxmoxDriver(options_of(node, vms="tagged", prefix="east-"))
    await driver.open()
    assert [vm.name for vm in driver.members()] == ["east-101"]
    await driver.close(stop_vms=False)


async def test_a_process_that_took_the_pid_is_not_the_vm(driver: ProxmoxDriver, node: ProxmoxNode) -> None:
    node.config(101)
    (node.run_dir / "101.pid").write_text(f"{os.getpid()}\n")
    await until(lambda: len(driver.members()) == 2, "the new one is a member", 2)
    assert (await driver.read_states())["vm-101"] == "stopped"
    with pytest.raises(DriverError):
        driver.resume_plan("vm-101")


async def test_files_that_cannot_be_read_have_every_freeze_refused_and_a_pause_ended(
    driver: ProxmoxDriver, node: ProxmoxNode
) -> None:
    """As when Proxmox's file system is away: what runs is known, whether it is locked is not."""
    await driver.freeze("vm-100", freeze_deadline())
    away = node.config_dir.with_name("away")
    node.config_dir.rename(away)
    try:
        await until(lambda: "cannot be read" in driver.ping(), "it is noticed", 2)
        assert "cannot be read" in driver.capabilities("vm-100").missing["freeze"]
        assert await driver.resume("vm-100", 5) == "running"
        with pytest.raises(FreezeFailed, match="no configuration"):
            await driver.freeze("vm-100", freeze_deadline())
    finally:
        away.rename(node.config_dir)
    await until(lambda: driver.ping() == "", "it is back", 2)
    assert driver.capabilities("vm-100").methods == ("live", "freeze")


async def test_one_file_that_cannot_be_read_is_named_and_its_vm_stays_one(
    driver: ProxmoxDriver, node: ProxmoxNode
) -> None:
    file = node.config_dir / "100.conf"
    file.rename(file.with_suffix(".away"))
    file.mkdir()  # which root cannot read as a file, either
    try:
        await until(lambda: "cannot be read" in driver.ping(), "it is noticed", 2)
        (vm,) = driver.members()
        assert (vm.name, vm.set, vm.update_domain) == ("vm-100", "web", 0)
        assert "may be locked" in driver.capabilities("vm-100").missing["freeze"]
        assert (await driver.read_states())["vm-100"] == "running"
        with pytest.raises(FreezeFailed, match="may be locked"):
            await driver.freeze("vm-100", freeze_deadline())
        assert await driver.resume("vm-100", 5) == "running"
    finally:
        file.rmdir()
        file.with_suffix(".away").rename(file)
    await until(lambda: "freeze" in driver.capabilities("vm-100").methods, "it is read again", 2)


async def test_configurations_that_hang_refuse_the_freeze_in_time(
    driver: ProxmoxDriver, node: ProxmoxNode
) -> None:
    """A named pipe nobody writes to: the kernel lets a reader wait."""
    file = node.config_dir / "100.conf"
    file.unlink()
    os.mkfifo(file)
    try:
        with pytest.raises(FreezeFailed, match="may be locked"):
            await driver.freeze("vm-100", freeze_deadline())
        assert await driver.resume("vm-100", 5) == "running"
    finally:
        _let_go(file)
        file.unlink()
        node.config(100, "web", tags=("caesura-set-web", "caesura-ud-0"))
    assert not node.events.pauses


def _let_go(pipe: Path) -> None:
    with suppress(OSError):
        os.close(os.open(pipe, os.O_WRONLY | os.O_NONBLOCK))


# -- clock ------------------------------------------------------------------------------------------------------


async def test_without_an_agent_in_the_guest_there_is_no_clock(
    driver: ProxmoxDriver, node: ProxmoxNode
) -> None:
    assert driver.capabilities("vm-100").clock == "none"
    with pytest.raises(DriverError, match="qm set 100 --agent 1"):
        await driver.sync_clock("vm-100")
    node.config(100, agent="1")
    await until(lambda: driver.members()[0].guest_agent, "the setting is noticed", 2)
    await driver.read_states()
    assert driver.capabilities("vm-100").clock == "none", "the guest has not opened its port"
