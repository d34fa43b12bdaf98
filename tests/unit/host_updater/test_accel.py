"""The trial boot that decides between KVM and TCG, with scripts in QEMU's place."""

from __future__ import annotations

import asyncio
import os
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from caesura_host_updater.drivers.qemu import accel
from caesura_host_updater.drivers.qemu.accel import find_accelerator, newest_kernel, probe_command, try_boot
from caesura_testing.patience import patient

SILENCE_S, WHOLE_S = patient(0.3), patient(1)
BOOTS = "echo '[    0.1] Linux version 6.1'; echo '[    1.9] Kernel panic - not syncing: VFS: Unable to mount root fs'; exec sleep 60"


def program(tmp_path: Path, body: str, name: str = "qemu") -> str:
    path = tmp_path / name
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return str(path)


async def test_a_kernel_that_comes_to_its_panic_has_booted(tmp_path: Path) -> None:
    begun = time.monotonic()
    assert await try_boot([program(tmp_path, BOOTS)]) == ""
    assert time.monotonic() - begun < patient(5), "nobody waits for the process to end by itself"


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("echo Booting; exec sleep 60", f"silent for {SILENCE_S:g} s (last line: Booting)"),
        (
            "echo 'failed to set MSR 0x10a' >&2; exit 134",
            "exit code 134 (last line: failed to set MSR 0x10a)",
        ),
        ("exit 0", "exit code 0 (last line: none)"),
        ("while :; do echo loop; sleep 0.1; done", f"not through after {WHOLE_S:g} s (last line: loop)"),
    ],
    ids=["silent", "aborted", "ended", "endless"],
)
async def test_everything_else_has_not(tmp_path: Path, body: str, said: str) -> None:
    found = await try_boot([program(tmp_path, body)], silence_s=SILENCE_S, whole_s=WHOLE_S)
    assert said in found


async def test_a_binary_that_is_not_there(tmp_path: Path) -> None:
    assert "cannot be started: No such file" in await try_boot([str(tmp_path / "none")])


def test_the_trial_uses_the_cpu_and_the_kernel_it_was_given() -> None:
    argv = probe_command("qemu", "kvm", "EPYC", "/boot/vmlinuz")
    assert argv[argv.index("-accel") + 1] == "kvm"
    assert argv[argv.index("-cpu") + 1] == "EPYC"
    assert argv[argv.index("-kernel") + 1] == "/boot/vmlinuz"


def test_the_newest_readable_kernel_is_tried(tmp_path: Path) -> None:
    assert newest_kernel(tmp_path) == ""
    for age, name in ((100, "vmlinuz-6.1"), (10, "vmlinuz-6.12"), (1, "initrd.img-6.12")):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (1e9 - age, 1e9 - age))
    assert newest_kernel(tmp_path) == str(tmp_path / "vmlinuz-6.12")


async def test_without_the_device_it_is_tcg_at_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(accel, "_DEVICE", str(tmp_path / "kvm"))
    found = await find_accelerator(program(tmp_path, BOOTS))
    assert found.name == "tcg"
    assert found.reason == f"{tmp_path}/kvm cannot be opened: No such file or directory"


@pytest.mark.parametrize(("body", "name"), [(BOOTS, "kvm"), ("echo no >&2; exit 1", "tcg")])
async def test_the_answer_is_kept_until_something_changes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, body: str, name: str
) -> None:
    device = tmp_path / "kvm"
    device.touch()
    monkeypatch.setattr(accel, "_DEVICE", str(device))
    kernel = tmp_path / "vmlinuz"
    kernel.touch()
    tried = tmp_path / "tried"
    binary = program(tmp_path, f"echo >>{tried}; {body}")
    cache = tmp_path / "state" / "accelerator.json"

    async def find(cpu: str = "host") -> str:
        return (await find_accelerator(binary, cpu=cpu, kernel=str(kernel), cache=cache)).name

    assert await find() == name
    assert await find() == name
    assert len(tried.read_text()) == 1
    await find(cpu="EPYC")
    assert len(tried.read_text()) == 2, "another CPU model may work where this one does not"
    cache.write_text("{broken")
    await find()
    assert len(tried.read_text()) == 3, "a damaged file is tried again, not believed"
    program(tmp_path, f"echo >>{tried}; {body} #")
    await find()
    assert len(tried.read_text()) == 4, "another QEMU"


async def test_a_program_that_hangs_in_exec_does_not_hold_up_the_event_loop(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    disk, ended = threading.Event(), threading.Event()

    class Ended(subprocess.Popen):  # type: ignore[type-arg]
        def __init__(self, *arguments: Any, **options: Any) -> None:
            disk.wait()
            super().__init__(*arguments, **options)

        def __exit__(self, *error: object) -> None:
            super().__exit__(*error)  # type: ignore[arg-type]
            ended.set()

    monkeypatch.setattr(subprocess, "Popen", Ended)
    # As the time limit is an event of the loop, a loop that waits for the disk never comes to it.
    assert (
        await try_boot([program(tmp_path, BOOTS)], whole_s=0.1) == "not through after 0.1 s (last line: none)"
    )
    disk.set()  # a late start is ended by its own thread
    assert await asyncio.to_thread(ended.wait, patient(10))


async def test_a_disk_that_does_not_answer_means_tcg(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    disk, device = threading.Event(), tmp_path / "kvm"
    device.touch()
    monkeypatch.setattr(accel, "_DEVICE", str(device))
    monkeypatch.setattr(accel, "_WHOLE_S", 0.1)
    monkeypatch.setattr(accel, "_key", lambda *_: disk.wait())
    found = await find_accelerator("qemu", kernel="/boot/vmlinuz")
    disk.set()
    assert found.name == "tcg"
    assert "has not answered for 0.1 s" in found.reason
