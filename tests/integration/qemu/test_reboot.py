"""Guests that shut down by themselves for an update that needs a reboot, and are started again; nothing is killed."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

import pytest

from caesura_host_updater.drivers.port import ShutdownFailed
from caesura_host_updater.drivers.qemu.definition import Adopt, Definition
from caesura_host_updater.drivers.qemu.guest import NO_REBOOT
from caesura_testing.guests import Definition as GuestDefinition
from caesura_testing.guests import GuestUnavailable, Heartbeat, boot, image
from caesura_testing.patience import patient

FIRMWARE = Definition(memory_mib=16, machine="pc-q35-7.2")
"""A guest that nothing can ask to shut down."""


@pytest.fixture
def linux() -> Any:
    """Kernel and initrd."""
    try:
        return image()
    except GuestUnavailable as error:
        pytest.skip(str(error))


def requests(rig: Any) -> list[str]:
    """VMs that were asked and did not start again."""
    return [path.stem for path in (rig.folder / "state" / "vms").glob("*.shutdown")]


async def test_a_guest_shuts_down_is_started_again_and_is_up_when_its_agent_answers(
    rig: Any, tools: Any, linux: Any
) -> None:
    run = rig.folder / "run" / "a"
    chardev = f"socket,id=heartbeat,path={run}/heartbeat,server=on,wait=off"
    guest = Definition(
        memory_mib=128,
        machine="pc-q35-7.2",
        kernel=linux.kernel,
        initrd=linux.initrd,
        append="console=ttyS0 quiet rdinit=/init panic=-1 caesura.run=heartbeat",
        extra=(
            "-chardev",
            chardev,
            "-device",
            "virtserialport,chardev=heartbeat,name=org.caesura.heartbeat.0",
        ),
    )
    driver = await rig.open({"a": guest})
    assert driver.capabilities("a").methods[-1] == "reboot", driver.ping()
    heart = Heartbeat()
    try:
        await heart.connect(run / "heartbeat")
        before = await heart.next(60, after=0.0)
        pid = tools.pid_of(driver, "a")
        how = await driver.shut_down("a", time.monotonic() + patient(60))
        assert how in ("its guest agent", "ACPI")
        assert not tools.runs(pid)
        assert driver.states() == {"a": "stopped"}
        assert rig.ram_files("a") == [], "its memory is gone"
        assert driver.ping() == "", "it is down on purpose"
        assert requests(rig) == ["a"]
        began = time.monotonic()
        assert await driver.start("a", began)
        # Up means more than a process: the guest answered, before anybody connected to its heart.
        boot_id = await driver.guest_boot_id("a")
        await heart.connect(run / "heartbeat")
        after = await heart.next(60)
        assert after.boot_id == boot_id != before.boot_id
        assert tools.pid_of(driver, "a") != pid
        await tools.until(lambda: requests(rig) == [], "the note of its start")
        await driver.freeze("a", tools.soon())
        assert await driver.resume("a", 5) == "running"
    finally:
        await heart.close()


async def test_a_guest_that_ignores_it_is_left_and_started_when_it_ends_after_all(
    rig: Any, tools: Any
) -> None:
    driver = await rig.open({"a": FIRMWARE})
    pid = tools.pid_of(driver, "a")
    with pytest.raises(ShutdownFailed, match="was asked by ACPI and runs on; it was not killed"):
        await driver.shut_down("a", time.monotonic() + 0.5)
    assert not await driver.start("a", time.monotonic())
    assert tools.pid_of(driver, "a") == pid
    os.kill(pid, signal.SIGTERM)  # QEMU ends in an orderly way, as if its guest had
    await tools.until(
        lambda: driver.states()["a"] == "running" and tools.pid_of(driver, "a") != pid, "its start"
    )
    await tools.until(lambda: requests(rig) == [], "the note of its start")


async def test_the_next_life_starts_what_was_shut_down_and_what_is_shutting_down(
    rig: Any, tools: Any
) -> None:
    driver = await rig.open({"a": FIRMWARE, "b": FIRMWARE, "c": FIRMWARE})
    pids = {vm: tools.pid_of(driver, vm) for vm in "abc"}
    for vm in "ab":
        with pytest.raises(ShutdownFailed):
            await driver.shut_down(vm, time.monotonic() + 0.2)
    await rig.crash()
    os.kill(pids["a"], signal.SIGTERM)
    await tools.until(lambda: not tools.runs(pids["a"]), "the end of a")
    driver = await rig.open({"a": FIRMWARE, "b": FIRMWARE, "c": FIRMWARE})
    assert set(driver.states().values()) == {"running"}
    assert tools.pid_of(driver, "b") == pids["b"]
    assert requests(rig) == ["b"], "b may still end"
    os.kill(pids["b"], signal.SIGTERM)
    assert await driver.start("b", time.monotonic() + patient(10))
    assert tools.pid_of(driver, "b") != pids["b"]
    assert not await driver.start("c", time.monotonic() + 60), "c was never asked: nobody waits for it"
    assert tools.pid_of(driver, "c") == pids["c"]


async def test_a_guest_of_somebody_else_is_refused_by_name(rig: Any, tools: Any, linux: Any) -> None:
    del linux
    async with boot(GuestDefinition(), folder=rig.place("g")) as guest:
        there = Adopt(qmp=str(guest.qmp), guard_qmp=str(guest.guard), guest_agent=str(guest.guest_agent))
        driver = await rig.open({"a": there})
        assert driver.capabilities("a").missing["reboot"] == NO_REBOOT
        with pytest.raises(ShutdownFailed, match="not started by Caesura"):
            await driver.shut_down("a", tools.soon())
        assert driver.states() == {"a": "running"}
        await rig.crash()
