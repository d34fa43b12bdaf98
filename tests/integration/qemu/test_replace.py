"""Replace: the device state goes to a file, the old QEMU is gone, a new one starts from the file and the RAM that stayed."""

from __future__ import annotations

import os
import signal
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec
import pytest

from caesura_host_updater.drivers.port import DriverError, FreezeFailed, NotRunningYet
from caesura_host_updater.drivers.qemu.definition import Definition, Nic
from caesura_vmcontrol.claims import note
from caesura_vmcontrol.vm_control import condition, resume_vm

SMALL = Definition(memory_mib=16, machine="pc-q35-7.2", nic=(Nic(),))


async def test_replace(rig: Any, tools: Any) -> None:
    driver = await rig.open({"a": SMALL})
    pid = tools.pid_of(driver, "a")
    await driver.prepare("a", "op-1", "replace", "")
    await driver.checkpoint("a", tools.soon())
    assert not tools.runs(pid), "the old process is gone while the host is updated"
    assert rig.processes() == []
    assert driver.states() == {"a": "paused"}
    before = await driver.memory_digest("a", tools.soon())
    assert await driver.memory_digest("a", tools.soon()) == before
    assert driver.memory_size("a") == 16 << 20
    assert await driver.resume("a", 10) == "running"
    assert await driver.resume("a", 10) == "running"
    assert driver.states() == {"a": "running"}
    new = tools.pid_of(driver, "a")
    await rig.only(new)
    await driver.release("a")
    assert not (rig.folder / "state" / "vms" / "a.operations").exists()
    assert sorted(path.name for path in (rig.folder / "run" / "a").iterdir()) == [
        "ga",
        "guard",
        "guard.2",
        "next",
        "qmp",
        "serial",
    ]
    await driver.prepare("a", "op-2", "swap", "")
    await driver.hand_over("a", tools.soon())
    await driver.release("a")


@pytest.mark.parametrize("beside", [True, False])
async def test_replace_that_does_not_wait_for_the_death_of_the_old_one(
    rig: Any, tools: Any, beside: bool
) -> None:
    """Nothing is updated meanwhile. Where only one can hold what it needs, the new one is started after that death."""
    definition = SMALL if beside else msgspec.structs.replace(SMALL, extra=("-gdb", "tcp:127.0.0.1:47731"))
    driver = await rig.open({"a": definition})
    pid = tools.pid_of(driver, "a")
    await driver.prepare("a", "op-1", "replace", "")
    plan = driver.resume_plan("a")
    assert plan.beside is beside
    await driver.checkpoint("a", tools.soon(), gone=False)
    assert await driver.resume("a", 10) == "running"
    assert not tools.runs(pid), "the guest runs in one process only"
    new = tools.pid_of(driver, "a")
    assert new != pid
    await rig.only(new)
    await driver.release("a")
    assert driver.states() == {"a": "running"}


async def test_released_before_it_began(rig: Any, tools: Any) -> None:
    driver = await rig.open({"a": SMALL})
    pid = tools.pid_of(driver, "a")
    await driver.prepare("a", "op-1", "replace", "")
    with pytest.raises(FreezeFailed, match="too late"):
        await driver.checkpoint("a", time.monotonic() - 1)
    await driver.release("a")
    assert driver.states() == {"a": "running"}
    await rig.only(pid)


def fill(folder: Path) -> Path:
    """Leave no byte of a small file system."""
    path = folder / "filler"
    with path.open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(b"x" * 4096)
    return path


def edit(path: str, text: str | None = None) -> str:
    """Give a file another text, if one is given; what stood in it before."""
    before = Path(path).read_text()
    if text is not None:
        Path(path).write_text(text)
    return before


def cut(path: str, less: int) -> None:
    """Take bytes from the end of a file that is for us alone."""
    assert Path(path).stat().st_mode & 0o777 == 0o600
    os.truncate(path, Path(path).stat().st_size - less)


async def test_state_that_cannot_be_saved(rig: Any, tools: Any, small_disk: Path) -> None:
    """The file system with the sockets is full: the guest never stopped for long, and runs in the old process."""
    driver = await rig.open({"a": SMALL}, run_dir=str(small_disk))
    pid = tools.pid_of(driver, "a")
    await driver.prepare("a", "op-1", "replace", "")
    filler = fill(small_disk)
    with pytest.raises(FreezeFailed) as caught:
        await driver.checkpoint("a", tools.soon())
    assert "No space left on device" in caught.value.why or "failed" in caught.value.why
    assert await driver.resume("a", 5) == "running"
    await driver.release("a")
    assert tools.pid_of(driver, "a") == pid
    await rig.only(pid)
    filler.unlink()
    await driver.close(stop_vms=True)
    rig.driver = None


async def test_new_binary_that_fails_and_the_old_one_that_is_still_there(rig: Any, tools: Any) -> None:
    driver = await rig.open({"a": SMALL})
    binary = rig.wrapper("pass")
    await driver.prepare("a", "op-1", "replace", binary)
    await driver.checkpoint("a", tools.soon())
    edit(binary, "#!/bin/sh\necho the update broke me >&2\nexit 1\n")  # what an update may do
    assert await driver.resume("a", 20) == "running"
    guest = driver._guests["a"]
    assert guest.run.argv[0] == rig.qemu
    from caesura_vmcontrol.claims import failures  # noqa: PLC0415

    assert "the update broke me" in " ".join(failures(guest.prepared.plan.claims))
    await driver.release("a")
    await rig.only(tools.pid_of(driver, "a"))


async def test_new_binary_that_fails_until_it_is_repaired(rig: Any, tools: Any) -> None:
    """Asked again and again it says why, and nothing is lost."""
    binary = rig.wrapper("pass")
    driver = await rig.open({"a": SMALL}, binary=binary)
    await driver.prepare("a", "op-1", "replace", "")
    await driver.checkpoint("a", tools.soon())
    broken = rig.qemu + ".not-there"
    text = edit(binary)
    plan = driver.resume_plan("a")
    object.__setattr__(plan, "argv", ((binary, *plan.argv[0][1:]),))
    edit(binary, text.replace(rig.qemu, broken))
    with pytest.raises(NotRunningYet) as caught:
        await driver.resume("a", 0.5)
    assert "No such file" in caught.value.why or "qemu-wrapped" in caught.value.why
    assert driver.states() == {"a": "paused"}
    edit(binary, text)
    assert await driver.resume("a", 20) == "running"
    await driver.release("a")
    await rig.only(tools.pid_of(driver, "a"))


async def test_the_guard_restores_without_the_driver(rig: Any, tools: Any) -> None:
    """The updater dies while the old process is gone; the guard starts the new one; the next life takes it over."""
    driver = await rig.open({"a": SMALL})
    await driver.prepare("a", "op-1", "replace", "")
    plan = driver.resume_plan("a")
    await driver.checkpoint("a", tools.soon())
    await rig.crash()
    resume_vm(plan)
    assert condition(plan) == "running"
    driver = await rig.open({"a": SMALL})
    assert driver.states() == {"a": "running"}
    pid = tools.pid_of(driver, "a")
    assert pid != plan.old.pid
    await rig.only(pid)
    await driver.prepare("a", "op-2", "swap", "")
    await driver.hand_over("a", tools.soon())
    await driver.release("a")


@pytest.mark.parametrize("when", ["prepared", "stopped", "saved"])
async def test_updater_that_dies(rig: Any, tools: Any, when: str) -> None:
    driver = await rig.open({"a": SMALL})
    pid = tools.pid_of(driver, "a")
    await driver.prepare("a", "op-1", "replace", "")
    if when == "stopped":
        note(driver.resume_plan("a").claims, "begun")
        await driver._guests["a"].qmp.execute("stop")
    if when == "saved":
        await driver.checkpoint("a", tools.soon())
    driver = await rig.open({"a": SMALL})
    assert driver.states() == {"a": "running" if when == "prepared" else "paused"}
    assert await driver.resume("a", 10) == "running"
    await driver.release("a")
    assert (tools.pid_of(driver, "a") == pid) == (when != "saved")
    await rig.only(tools.pid_of(driver, "a"))
    assert driver.states() == {"a": "running"}
    await driver.prepare("a", "op-2", "freeze", "")


async def test_state_file_that_was_cut(rig: Any, tools: Any) -> None:
    """A state that is not the one that was saved is never loaded: the guest is gone, and is said to be."""
    driver = await rig.open({"a": SMALL})
    await driver.prepare("a", "op-1", "replace", "")
    await driver.checkpoint("a", tools.soon())
    cut(driver.resume_plan("a").state_file, 5000)
    assert await driver.resume("a", 10) == "gone"
    await driver.release("a")
    assert driver.states() == {"a": "stopped"}
    assert rig.processes() == []


async def test_new_process_that_is_not_the_same_is_refused_before_the_pause(rig: Any, tools: Any) -> None:
    driver = await rig.open({"a": SMALL})
    with pytest.raises(DriverError, match="has device virtio-rng-pci 2"):
        await driver.prepare("a", "op-1", "replace", rig.wrapper('words += ["-device", "virtio-rng-pci"]'))
    assert driver.states() == {"a": "running"}
    await rig.only(tools.pid_of(driver, "a"))


async def test_old_process_that_dies_before_its_state_is_saved(rig: Any, tools: Any) -> None:
    driver = await rig.open({"a": SMALL})
    await driver.prepare("a", "op-1", "replace", "")
    os.kill(tools.pid_of(driver, "a"), signal.SIGKILL)
    with pytest.raises(FreezeFailed):
        await driver.checkpoint("a", tools.soon())
    assert await driver.resume("a", 5) == "gone"
    await driver.release("a")
    assert driver.states() == {"a": "stopped"}


async def test_decided_otherwise_meanwhile(rig: Any, tools: Any) -> None:
    """The guard gives the guest back to the old process while its state is saved: it is not held any longer."""
    from caesura_vmcontrol.claims import claim  # noqa: PLC0415

    driver = await rig.open({"a": SMALL})
    pid = tools.pid_of(driver, "a")
    await driver.prepare("a", "op-1", "replace", "")
    claim(driver.resume_plan("a").claims, 1, "old")
    with pytest.raises(FreezeFailed, match="has been decided otherwise: old"):
        await driver.checkpoint("a", tools.soon())
    assert await driver.resume("a", 5) == "running"
    await driver.release("a")
    assert tools.pid_of(driver, "a") == pid
    await rig.only(pid)
