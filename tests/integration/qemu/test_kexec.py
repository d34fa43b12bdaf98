"""Method kexec by the driver: its guest is saved into the carve-out, another boot loads it, and the driver of that boot has it."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import msgspec
import pytest

from caesura_host_updater.drivers.port import NotRunningYet
from caesura_host_updater.drivers.qemu import driver as driver_module
from caesura_host_updater.drivers.qemu import kexec_obstacles, migration, supervisor
from caesura_host_updater.drivers.qemu.definition import Definition
from caesura_host_updater.drivers.qemu.process_records import Records
from caesura_host_updater.inventory.kernel_options import KernelOptions
from caesura_pause_guard import arrival
from caesura_vmcontrol import boot_counters, kvm_device, procfs, qemu_replace, ram_places
from caesura_vmcontrol.intent import Intent, IntentFile
from caesura_vmcontrol.kernel_change import ClockPair, KernelChange, Left

SMALL = Definition(memory_mib=16, machine="pc-q35-7.2")


async def test_off_by_default_and_the_reason_says_how_to_switch_it_on(rig: Any) -> None:
    driver = await rig.open({"a": SMALL})
    assert "kexec" not in driver.capabilities("a").methods
    assert driver.capabilities("a").missing["kexec"] == kexec_obstacles.OFF


@pytest.fixture
def carve_out(rig: Any, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in its place; the host allows the method."""
    folder: Path = rig.folder / "carve-out"
    folder.mkdir()
    kernel = KernelOptions(kexec=True, carve_out=str(folder), early=False)
    real = driver_module.QemuDriver
    monkeypatch.setattr(kexec_obstacles, "dax_error", lambda _: "")
    for module in (arrival, supervisor):
        monkeypatch.setattr(module, "carve_out_error", lambda _: "")
    monkeypatch.setattr(kvm_device, "make_ready", lambda _: None)
    monkeypatch.setitem(
        rig.build.__func__.__globals__, "QemuDriver", lambda *a, **k: real(*a, **k, kernel=kernel)
    )
    return folder


def contents(folder: Path) -> list[Path]:
    return list(folder.iterdir())


async def test_without_the_carve_out_no_vm_is_started_on_another_disk(
    rig: Any, carve_out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kernel without it was booted: its mount point is an empty folder of the root file system then."""
    monkeypatch.setattr(supervisor, "carve_out_error", ram_places.carve_out_error)
    driver = await rig.open({"a": SMALL}, ram_dir=f"{carve_out}/ram")
    assert rig.processes() == []
    assert contents(carve_out) == []
    said = driver.health_error("a")
    assert "nothing is mounted at the carve-out" in said
    assert "kexec = false in [kernel]" in said


def another_boot(rig: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on."""
    next_boot: Path = rig.folder / "boot"
    next_boot.write_text("bbbbbbbb-0000-4000-8000-000000000002")
    monkeypatch.setattr(procfs, "BOOT_ID", str(next_boot))


@pytest.mark.parametrize("same_pid", [False, True])
async def test_another_boot_has_the_guest(
    rig: Any, tools: Any, carve_out: Path, monkeypatch: pytest.MonkeyPatch, *, same_pid: bool
) -> None:
    """A boot is much like another: the guest's process may well have the pid that it had in the former one."""
    driver = await rig.open({"a": SMALL}, ram_dir=f"{carve_out}/ram")
    assert "kexec" in driver.capabilities("a").methods, driver.capabilities("a").missing
    state_dir = rig.folder / "state"
    await driver.prepare("a", "op-1", "kexec", "")
    plan = driver.resume_plan("a")
    await driver.checkpoint("a", tools.soon())
    assert rig.processes() == []
    boot_counters.reset(str(state_dir), str(carve_out), "op-1", procfs.boot_id())
    left = Left(ClockPair(0, time.time(), 0.0), time.monotonic(), "6.1")
    change = KernelChange("6.1", str(carve_out), left=left)
    IntentFile(str(state_dir)).store(
        Intent("op-1", procfs.boot_id(), 0.0, 1.0, (plan,), kernel_change=change)
    )
    await rig.crash()
    another_boot(rig, monkeypatch)
    assert arrival.arrive(str(state_dir), "initramfs", lambda *_, **__: None) == 0
    if same_pid:
        records = Records(state_dir / "vms")
        former = records.read("a")
        assert former is not None
        records.write("a", msgspec.structs.replace(former, pid=rig.processes()[0]))
    driver = await rig.open({"a": SMALL}, ram_dir=f"{carve_out}/ram")
    assert driver.states() == {"a": "running"}
    await rig.only(tools.pid_of(driver, "a"))
    assert list((carve_out / "ram").rglob("*.ram")), "its memory is there"
    assert driver.health_error("a") == ""


async def test_what_ends_on_a_disk_is_not_given_up_as_a_hand_over_is(
    rig: Any, tools: Any, carve_out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between two processes it takes milliseconds; a disk that is busy, and its host, may need the freeze's whole time."""
    monkeypatch.setattr(migration, "_HAND_OVER_S", 0.0)
    driver = await rig.open({"a": SMALL}, ram_dir=f"{carve_out}/ram")
    await driver.prepare("a", "op-1", "kexec", "")
    await driver.checkpoint("a", tools.soon())
    assert rig.processes() == []
    assert await driver.resume("a", 10.0) == "running"
    await driver.release("a")


async def test_a_guest_that_is_given_up_is_gone_for_its_driver(
    rig: Any, tools: Any, carve_out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody has a record of the operation: it waits in its files until that is decided."""
    driver = await rig.open({"a": SMALL}, ram_dir=f"{carve_out}/ram")
    await driver.prepare("a", "op-1", "kexec", "")
    await driver.checkpoint("a", tools.soon())
    await rig.crash()
    another_boot(rig, monkeypatch)
    driver = await rig.open({"a": SMALL}, ram_dir=f"{carve_out}/ram")
    assert driver.states() == {"a": "paused"}
    with pytest.raises(NotRunningYet, match="not examined"):
        await driver.resume("a", 0.2)
    qemu_replace.give_up(driver.resume_plan("a"), "nobody will examine it")
    assert await driver.resume("a", 10.0) == "gone"
    await driver.release("a")
    assert driver.states() == {"a": "stopped"}
    assert "nobody will examine it" in driver.health_error("a")
    assert rig.processes() == []
