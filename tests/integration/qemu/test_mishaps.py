"""What happens to hosts of their own: files that vanish or cannot be written, reboots in the middle, shared folders."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from caesura_host_updater.drivers.port import SwapFailed
from caesura_host_updater.drivers.qemu import migration
from caesura_host_updater.drivers.qemu.definition import Adopt, Definition, QemuOptions, QemuVm
from caesura_host_updater.drivers.qemu.driver import QemuDriver
from caesura_host_updater.drivers.qemu.vmm import read_vmm
from caesura_testing.patience import patient
from caesura_vmcontrol import claims
from caesura_vmcontrol.intent import Intent, IntentFile
from caesura_vmcontrol.qemu_plans import ReplacePlan, Vmm
from caesura_vmcontrol.vm_control import condition, resume_vm

SMALL = Definition(memory_mib=16, machine="pc-q35-7.2")


async def test_the_pause_of_a_swap_that_failed_is_told(
    rig: Any, tools: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The guest was paused until the new process died: its clock is late by that."""
    monkeypatch.setattr(migration, "_HAND_OVER_S", patient(10))
    driver = await rig.open({"a": SMALL})
    await driver.prepare("a", "op-1", "swap", "")
    new = tools.next_pid(driver, "a")
    os.kill(new, signal.SIGSTOP)
    began = time.monotonic()
    swapping = asyncio.create_task(driver.hand_over("a", began + patient(10)))
    await tools.until(lambda: driver.states()["a"] == "paused", "the guest to stop")
    paused = time.monotonic()
    os.kill(new, signal.SIGKILL)
    with pytest.raises(SwapFailed) as caught:
        await swapping
    error = caught.value
    assert error.frozen_at is not None
    assert error.resumed_at is not None
    assert began <= error.frozen_at <= paused <= error.resumed_at <= time.monotonic()
    await driver.release("a")


async def test_a_swap_that_failed_before_the_guest_stopped_tells_no_pause(rig: Any, tools: Any) -> None:
    driver = await rig.open({"a": SMALL})
    await driver.prepare("a", "op-1", "swap", "")
    (rig.folder / "run" / "a" / "mig").unlink()  # where the new process waits for the state
    with pytest.raises(SwapFailed) as caught:
        await driver.hand_over("a", tools.soon())
    assert (caught.value.frozen_at, caught.value.resumed_at) == (None, None)
    await driver.release("a")


async def test_a_run_file_that_could_not_be_written_costs_no_guest(rig: Any, tools: Any) -> None:
    """The disk was full during the swap: the next life must not take the process for a left-over."""
    driver = await rig.open({"a": SMALL})
    before = rig.run_file("a")
    await driver.prepare("a", "op-1", "swap", "")

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    driver._supervisor._records.write = full
    await driver.hand_over("a", tools.soon())
    await driver.release("a")
    pid = tools.pid_of(driver, "a")
    assert rig.run_file("a") == before
    driver = await rig.open({"a": SMALL})
    assert tools.runs(pid)
    assert tools.pid_of(driver, "a") == pid
    await rig.only(pid)


@pytest.mark.parametrize("text", [None, "", '{"pid": 4711}'])
async def test_a_run_file_that_is_lost_costs_no_guest(rig: Any, tools: Any, text: str | None) -> None:
    driver = await rig.open({"a": SMALL})
    await driver.prepare("a", "op-1", "swap", "")
    await driver.hand_over("a", tools.soon())
    await driver.release("a")
    pid = tools.pid_of(driver, "a")
    (ram,) = rig.ram_files("a")
    inode = ram.stat().st_ino
    path = rig.folder / "state" / "vms" / "a.qemu.json"
    await rig.crash()
    path.unlink() if text is None else path.write_text(text)
    driver = await rig.open({"a": SMALL})
    assert tools.runs(pid)
    assert tools.pid_of(driver, "a") == pid
    assert ram.stat().st_ino == inode
    assert driver.states() == {"a": "running"}
    await driver.prepare("a", "op-2", "swap", "")
    await driver.hand_over("a", tools.soon())
    await driver.release("a")


async def test_a_run_file_that_is_lost_costs_no_guest_that_was_adopted(rig: Any, tools: Any) -> None:
    """After a swap its process is ours, and its sockets have whatever names its owner gave them."""
    place = rig.place("theirs")
    ram = place / "ram"
    ram.write_bytes(bytes(16 << 20))
    argv = [
        rig.qemu,
        "-nodefaults",
        "-display",
        "none",
        "-machine",
        "pc-q35-7.2,memory-backend=ram",
        "-m",
        "16",
    ]
    argv += ["-accel", "tcg", "-cpu", "qemu64"]
    argv += ["-object", f"memory-backend-file,id=ram,mem-path={ram},size=16M,share=on"]
    for name in ("control", "spare"):
        argv += ["-qmp", f"unix:{place}/{name},server=on,wait=off"]
    theirs = rig.start(argv, place / "log")
    await tools.until((place / "spare").exists, "its sockets")
    adopt = Adopt(qmp=f"{place}/control", guard_qmp=f"{place}/spare")
    driver = await rig.open({"a": adopt})
    await driver._assessor.assess(driver._guests["a"])
    assert driver._assessor._done["a"].reasons == ()
    assert not (rig.folder / "run" / "a").exists(), "a trial leaves no folder"
    await driver.prepare("a", "op-1", "swap", "")
    await driver.hand_over("a", tools.soon())
    await driver.release("a")
    theirs.wait()
    pid = tools.pid_of(driver, "a")
    await rig.crash()
    (rig.folder / "state" / "vms" / "a.qemu.json").unlink()
    driver = await rig.open({"a": adopt})
    try:
        assert tools.runs(pid)
        assert driver.states() == {"a": "running"}
        assert not driver._guests["a"].run.ours
    finally:
        for left in rig.processes():
            os.kill(left, signal.SIGKILL)
        await tools.until(lambda: not rig.processes(), "its end")


async def test_ram_file_that_is_deleted_while_the_guest_is_in_its_file(rig: Any, tools: Any) -> None:
    """A QEMU would make a new one, full of zeros, and let the guest run on it, with its disks."""
    driver = await rig.open({"a": SMALL})
    await driver.prepare("a", "op-1", "replace", "")
    plan = driver.resume_plan("a")
    await driver.checkpoint("a", tools.soon())
    (ram,) = rig.ram_files("a")
    ram.unlink()
    assert await driver.resume("a", 5) == "gone"
    assert "RAM file" in " ".join(claims.failures(plan.claims)) or "RAM" in driver.ping()
    assert rig.processes() == []


@pytest.mark.parametrize("run_file", ["there", "gone"])
async def test_host_that_was_started_anew_during_a_replace(rig: Any, tools: Any, run_file: str) -> None:
    """Device state of before the reboot, memory of nobody: it is never loaded, and the VM is started afresh."""
    driver = await rig.open({"a": SMALL})
    await driver.prepare("a", "op-1", "replace", "")
    await driver.checkpoint("a", tools.soon())
    path = rig.folder / "state" / "vms" / "a.qemu.json"
    (ram,) = rig.ram_files("a")
    await rig.crash()
    run = json.loads(path.read_text())
    path.write_text(json.dumps(run | {"boot_id": "another"}))
    if run_file == "gone":
        path.unlink()
    record = rig.folder / "state" / "vms" / "a.operations" / "op-1" / "plan.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"boot_id": "another"}))
    ram.unlink()
    shutil.rmtree(rig.folder / "run")
    driver = await rig.open({"a": SMALL})
    assert driver.states() == {"a": "running"}
    guest = driver._guests["a"]
    assert guest.prepared is None
    assert "-incoming" not in read_vmm(guest.run.pid).argv
    assert not [*(rig.folder / "run").rglob("*.state*"), *(rig.folder / "run").rglob("*.claims")]
    assert not (rig.folder / "state" / "vms" / "a.operations").exists()


async def test_another_host_updater_with_the_same_folder_for_sockets(rig: Any, tools: Any) -> None:
    """The one may start while a guest of the other is nowhere but in its state file."""
    driver = await rig.open({"a": SMALL})
    await driver.prepare("a", "op-1", "replace", "")
    await driver.checkpoint("a", tools.soon())
    other = QemuDriver(
        "host-2",
        (QemuVm(name="b", qemu=SMALL),),
        QemuOptions(run_dir=str(rig.folder / "run"), powerdown_s=0),
        rig.folder / "state-2",
        accel="tcg,thread=multi",
        environ=os.environ,
        max_digest_bytes=0,
    )
    await other.open()
    assert await driver.resume("a", 10) == "running"
    await driver.release("a")
    await other.close(stop_vms=True)
    assert driver.states() == {"a": "running"}


def test_intent_of_another_boot_is_not_carried_out(tmp_path: Path) -> None:
    """The guard would load what was a guest's devices into memory that is nobody's."""
    state = tmp_path / "a.state"
    state.write_bytes(b"state")
    folder = tmp_path / "claims"
    folder.mkdir()
    claims.claim(str(folder), 1, f"file:5:{hashlib.sha256(b'state').hexdigest()}")
    program = tmp_path / "qemu"
    program.write_text(f"#!/bin/sh\ntouch {tmp_path}/started\n")
    program.chmod(0o700)
    plan = ReplacePlan(
        vm="a",
        old=Vmm(2**22 + 1, 5, "/run/x/guard"),
        claims=str(folder),
        state_file=str(state),
        qmp=str(tmp_path / "guard"),
        argv=((str(program), "-incoming", "defer", "-S"),),
        environ=(("MARK", "1"),),
        mark="MARK=1",
        log=str(tmp_path / "log"),
    )
    home = tmp_path / "state"
    home.mkdir()
    IntentFile(str(home)).store(Intent("op-1", "another-boot", 1.0, 2.0, (plan,)))
    done = subprocess.run(
        [sys.executable, "-m", "caesura_pause_guard", "--state-dir", home, "--exit-when-alone", "0.1"],
        capture_output=True,
        text=True,
        timeout=patient(20),
        check=True,
    )
    assert "intent_of_another_boot" in done.stderr
    assert not (tmp_path / "started").exists()
    assert not list(home.glob("guard-intent*"))


async def test_release_that_failed_is_tried_again_before_the_next_operation(
    rig: Any, tools: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A killed process that waits for its disk does not die at once."""
    driver = await rig.open({"a": SMALL})
    await driver.prepare("a", "op-1", "swap", "")
    await driver.hand_over("a", tools.soon())
    with monkeypatch.context() as patched:
        patched.setattr("caesura_host_updater.drivers.qemu.migration.end_losers", lambda _: None)
        await driver.release("a")
    await driver.prepare("a", "op-2", "swap", "")
    await driver.hand_over("a", tools.soon())
    await driver.release("a")
    await rig.only(tools.pid_of(driver, "a"))
    assert not (rig.folder / "state" / "vms" / "a.operations").exists()


async def test_vm_that_another_host_updater_runs_is_not_started_again(rig: Any, tools: Any) -> None:
    """The operator gave the service another state folder: the VM runs, and its sockets are in use."""
    driver = await rig.open({"a": SMALL})
    pid = tools.pid_of(driver, "a")
    other = QemuDriver(
        "host-1",
        (QemuVm(name="a", qemu=SMALL),),
        QemuOptions(run_dir=str(rig.folder / "run"), powerdown_s=0),
        rig.folder / "state-2",
        accel="tcg,thread=multi",
        environ=os.environ,
        max_digest_bytes=0,
    )
    await other.open()
    assert other.states() == {"a": "stopped"}
    assert f"process {pid} has its sockets" in other.ping()
    await other.close(stop_vms=True)
    await rig.only(pid)
    assert driver.states() == {"a": "running"}
    await driver.prepare("a", "op-1", "swap", "")
    await driver.hand_over("a", tools.soon())
    await driver.release("a")


async def test_sockets_that_are_gone_at_the_next_start(rig: Any, tools: Any) -> None:
    """Somebody emptied the folder: the guest runs on, and is not started a second time."""
    driver = await rig.open({"a": SMALL})
    pid = tools.pid_of(driver, "a")
    await rig.crash()
    shutil.rmtree(rig.folder / "run")
    driver = await rig.open({"a": SMALL})
    assert driver.states() == {"a": "unknown"}
    assert driver.capabilities("a").methods == ("live",)
    assert "qmp" in driver.ping()
    await rig.only(pid)


@pytest.mark.skipif(os.geteuid() != 0, reason="giving a folder to somebody else needs root")
@pytest.mark.parametrize("which", ["run", "ram"])
@pytest.mark.parametrize("harm", ["owner", "mode", "link"])
async def test_folder_that_somebody_else_made(rig: Any, which: str, harm: str) -> None:
    """A tmpfs is everybody's: who owns the folder may put his own file in the place of a guest's RAM."""
    (rig.folder / "ram").mkdir()
    driver = rig.build({"a": SMALL}, ram_dir=str(rig.folder / "ram"))
    launcher = driver._supervisor._launcher
    folder = launcher.ram_dir if which == "ram" else launcher.folder("a")
    folder.parent.mkdir(exist_ok=True)
    if harm == "link":
        (rig.folder / "elsewhere").mkdir(mode=0o700)
        folder.symlink_to(rig.folder / "elsewhere")
    else:
        folder.mkdir(mode=0o700)
        if harm == "owner":
            os.chown(folder, 65534, 65534)
        else:
            folder.chmod(0o777)
    await driver.open()
    assert driver.states() == {"a": "stopped"}
    assert str(folder) in driver.ping()
    await driver.close(stop_vms=False)
    assert rig.processes() == []
    shutil.rmtree(rig.folder / "run", ignore_errors=True)


@pytest.mark.parametrize("who", ["updater", "guard"])
@pytest.mark.parametrize("method", ["swap", "replace"])
async def test_a_state_folder_on_a_disk_that_does_not_answer_keeps_no_guest_paused(
    rig: Any, tools: Any, hung_disk: Any, method: Any, who: str
) -> None:
    """From the first step of the pause on: who has the guest is decided elsewhere, and a log is not waited for."""
    (rig.folder / "state").symlink_to(hung_disk.folder)
    driver = await rig.open({"a": SMALL})
    await driver.prepare("a", "op-1", method, "")
    plan = driver.resume_plan("a")
    with hung_disk.hangs():
        step = driver.hand_over if method == "swap" else driver.checkpoint
        step_done = asyncio.create_task(step("a", tools.soon()))
        if method == "replace":
            await step_done
        if who == "guard":
            await asyncio.to_thread(resume_vm, plan)
        elif method == "replace":
            step_done = asyncio.create_task(driver.resume("a", 10))
        await tools.until(lambda: condition(plan) == "running", "the guest to run")
    with suppress(SwapFailed):  # the guard may have been quicker
        await step_done
    assert await driver.resume("a", 10) == "running"
    await driver.release("a")
    await rig.only(tools.pid_of(driver, "a"))
