"""What keeps a guest from being kept over a change of the host's kernel."""

from __future__ import annotations

import pytest

from caesura_host_updater.drivers.qemu import kexec_obstacles
from caesura_host_updater.drivers.qemu.process_records import VmProcessRecord
from caesura_host_updater.inventory.kernel_options import KernelOptions

CARVE_OUT = "/carve-out"


def reasons(monkeypatch: pytest.MonkeyPatch, *more: str, early: bool = True) -> tuple[str, ...]:
    """Of a guest with such a command line."""
    monkeypatch.setattr(kexec_obstacles, "dax_error", lambda _: "")
    ram = f"memory-backend-file,id=ram,mem-path={CARVE_OUT}/ram/a.ram,size=64M,share=on"
    machine = ("-machine", "q35,memory-backend=ram", "-m", "64", "-object", ram)
    run = VmProcessRecord(
        pid=1,
        start_ticks=1,
        boot_id="",
        argv=("/bin/true", *machine, *more),
        qmp="",
        guard="",
        agent="",
        ours=True,
    )
    return kexec_obstacles.kexec_obstacles(run, KernelOptions(kexec=True, carve_out=CARVE_OUT, early=early))


def test_a_guest_without_anything_special(monkeypatch: pytest.MonkeyPatch) -> None:
    assert reasons(monkeypatch) == ()


def test_a_device_of_the_host_is_there_in_an_initramfs(monkeypatch: pytest.MonkeyPatch) -> None:
    assert reasons(monkeypatch, "-chardev", "serial,id=s,path=/dev/null", "-serial", "chardev:s") == ()


def test_a_file_on_another_file_system_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    disk = ("-drive", "file=/proc/version,format=raw,if=none,id=d")
    (reason,) = reasons(monkeypatch, *disk)
    assert "early = false" in reason
    assert reasons(monkeypatch, *disk, early=False) == ()


def test_nor_is_a_bridge(monkeypatch: pytest.MonkeyPatch) -> None:
    (reason,) = reasons(monkeypatch, "-netdev", "tap,id=n,ifname=tap0")
    assert "no bridge" in reason
