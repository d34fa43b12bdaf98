"""What is missing on a host whose VMs are guests of the driver ``qemu``. Blocking."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from caesura_host_updater.drivers.diagnosis import Diagnosis, ok, warning, wrong
from caesura_host_updater.drivers.qemu.accel import device_fault
from caesura_host_updater.drivers.qemu.definition import QemuOptions, QemuVm

_VERSION_S = 20.0
_KVM = "/dev/kvm"


def diagnose(vms: tuple[QemuVm, ...], options: QemuOptions, ram_dir: str) -> Iterator[Diagnosis]:
    """See the module. ``ram_dir``: where guests' RAM files are."""
    own = [vm for vm in vms if vm.qemu is not None]
    yield from _binary(options.binary)
    if own:
        yield from _kvm(options)
        yield from _room(own, ram_dir)
    yield from _folder("qemu.run_dir", options.run_dir)
    for vm in own:
        yield from _disks(vm)


def _binary(binary: str) -> Iterator[Diagnosis]:
    path = shutil.which(binary)
    if path is None:
        yield wrong(
            "qemu.binary", f"{binary} is not there", "apt-get install qemu-system-x86, or [qemu] binary"
        )
        return
    try:
        done = subprocess.run(
            (path, "--version"), capture_output=True, text=True, timeout=_VERSION_S, check=True
        )
    except (OSError, subprocess.SubprocessError) as error:
        yield wrong("qemu.binary", f"{path} does not start: {error}", "install it again, or [qemu] binary")
        return
    yield ok("qemu.binary", f"{path}: {done.stdout.splitlines()[0] if done.stdout else 'no version'}")


def _kvm(options: QemuOptions) -> Iterator[Diagnosis]:
    fault = device_fault(_KVM)
    if not fault:
        yield ok("qemu.kvm", f"{_KVM} can be used")
    elif options.accel == "kvm":
        yield wrong(
            "qemu.kvm", fault, "the group kvm for the host updater's user; virtualization in the firmware"
        )
    else:
        yield warning(
            "qemu.kvm",
            f"{fault}: guests are emulated (TCG)",
            "the group kvm for the host updater's user; virtualization in the firmware",
        )


def _room(own: list[QemuVm], ram_dir: str) -> Iterator[Diagnosis]:
    needed = sum(vm.qemu.memory_mib for vm in own if vm.qemu is not None)
    try:
        usage = shutil.disk_usage(ram_dir)
    except OSError as error:
        yield wrong("qemu.ram_dir", f"{ram_dir}: {error.strerror}", "mkdir it, or [qemu] ram_dir")
        return
    if usage.total >> 20 < needed:
        yield wrong(
            "qemu.ram_dir",
            f"{ram_dir} has {usage.total >> 20} MiB, and its guests need {needed}",
            "mount it larger (size= of its tmpfs)",
        )
    else:
        yield ok("qemu.ram_dir", f"{ram_dir} has {usage.total >> 20} MiB for guests of {needed} MiB")


def _folder(name: str, path: str) -> Iterator[Diagnosis]:
    place = Path(path)
    while not place.exists() and place != place.parent:
        place = place.parent
    if os.access(place, os.W_OK):
        yield ok(name, f"{path} can be used")
    else:
        yield wrong(
            name,
            f"{path} cannot be written to by this user",
            "the unit's drop-in makes it: deploy/systemd/qemu",
        )


def _disks(vm: QemuVm) -> Iterator[Diagnosis]:
    for disk in vm.qemu.disk if vm.qemu is not None else ():
        if not os.access(disk.file, os.R_OK | os.W_OK):
            yield wrong(
                "qemu.disk",
                f"{vm.name}: {disk.file} is missing, or not this user's",
                "mend the path or its owner",
            )
