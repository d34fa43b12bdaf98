"""KVM in a kernel that has just started, before udev runs."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from caesura_vmcontrol.kvm_device import group_id, make_ready, module_for

INTEL = "processor : 0\nflags\t\t: fpu vmx sse\n"
AMD = "processor : 0\nflags\t\t: fpu svm sse\n"


class Kernel:
    """A folder with what the device's place has in a booting kernel, and a modprobe that makes the device."""

    def __init__(self, folder: Path, *, cpuinfo: str, there: bool = False) -> None:
        self.device = folder / "kvm"
        (folder / "cpuinfo").write_text(cpuinfo)
        (folder / "group").write_text("root:x:0:\nkvm:x:104:\n")
        self.folder = folder
        self.loaded: list[Sequence[str]] = []
        self.said: list[Any] = []
        self.error: Exception | None = None
        if there:
            self.make()

    def make(self) -> None:
        self.device.write_text("")
        self.device.chmod(0o600)

    def modprobe(self, argv: Sequence[str]) -> None:
        self.loaded.append(argv)
        if self.error is not None:
            raise self.error
        self.make()

    def ready(self) -> None:
        make_ready(
            lambda event, **facts: self.said.append((event, facts)),
            device=str(self.device),
            cpuinfo=str(self.folder / "cpuinfo"),
            groups=str(self.folder / "group"),
            run=self.modprobe,
        )


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """What was given to whom."""
    found: list[tuple[int, int]] = []
    monkeypatch.setattr("os.chown", lambda _, uid, gid: found.append((uid, gid)))
    return found


@pytest.mark.parametrize(
    ("cpuinfo", "module"), [(INTEL, "kvm_intel"), (AMD, "kvm_amd"), ("flags : fpu", ""), ("", "")]
)
def test_the_module_of_a_processor(cpuinfo: str, module: str) -> None:
    assert module_for(cpuinfo) == module


def test_the_group() -> None:
    assert group_id("root:x:0:\ngarbled\nkvm:x:104:a,b\n") == 104
    assert group_id("root:x:0:\nkvm:x:what:\n") is None
    assert group_id("") is None


def test_an_initramfs_has_no_kvm(tmp_path: Path, given: list[tuple[int, int]]) -> None:
    kernel = Kernel(tmp_path, cpuinfo=INTEL)
    kernel.ready()
    assert kernel.loaded == [("modprobe", "kvm_intel")]
    if kernel.device.stat().st_gid == 0:  # of root's tests
        assert given == [(0, 104)]
        assert kernel.device.stat().st_mode & 0o777 == 0o660
    assert not kernel.said


def test_a_kernel_that_has_it_loads_nothing(tmp_path: Path, given: list[tuple[int, int]]) -> None:
    kernel = Kernel(tmp_path, cpuinfo=AMD, there=True)
    kernel.ready()
    assert not kernel.loaded
    assert given in ([], [(0, 104)])


def test_a_machine_without_virtualization_goes_on(tmp_path: Path) -> None:
    kernel = Kernel(tmp_path, cpuinfo="")
    kernel.ready()
    assert not kernel.loaded
    assert [event for event, _ in kernel.said] == ["arrival.no_kvm"]


@pytest.mark.parametrize(
    "error",
    [
        subprocess.CalledProcessError(1, "modprobe"),
        subprocess.TimeoutExpired("modprobe", 20),
        FileNotFoundError("modprobe"),
    ],
)
def test_a_modprobe_that_fails_stops_no_arrival(tmp_path: Path, error: Exception) -> None:
    kernel = Kernel(tmp_path, cpuinfo=INTEL)
    kernel.error = error
    kernel.ready()
    assert [event for event, _ in kernel.said] == ["arrival.no_kvm"]
