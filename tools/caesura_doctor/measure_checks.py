"""Whether a guest can be booted on this host to measure pauses: QEMU, memory, the guest's image. Blocking."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import msgspec

from caesura_doctor.kernel_memory import available_bytes
from caesura_guest_image.build import BuiltImage, built_already, default_cache, read_manifest
from caesura_guest_image.packages import GuestError
from caesura_host_updater.drivers.diagnosis import Diagnosis, ok, wrong

RAM_DIR = "/dev/shm"  # noqa: S108 - tmpfs is what guest RAM shall live in
_PROGRAM_S = 20.0
_PROCESSES_BYTES = 384 << 20
"""What two QEMU processes and the measurement take beside the guest's RAM, which they share; some 150 MiB are usual."""
_DEFAULT_MACHINE = re.compile(r"^q35 .*\(alias of (\S+)\)", re.MULTILINE)
_VERSION = re.compile(r"version (\d+\.\d+(\.\d+)?)")


class MeasuredHost(msgspec.Struct, frozen=True, kw_only=True):
    """What a measurement uses. ``machine``: the versioned machine type that this QEMU calls q35."""

    binary: str
    version: str
    machine: str
    image: BuiltImage


def look_for_needs(
    binary: str, memory_mib: int, guest: Path | None, add: Callable[[Diagnosis], None]
) -> MeasuredHost | None:
    """What a measurement needs; None: something is missing, which was added as a finding with its remedy.

    Args:
        binary: QEMU, a name on PATH or a path.
        memory_mib: of the guest.
        guest: a folder of ``caesura guest build --output``; None: the cache.
    """
    qemu = _qemu(binary, add)
    room = _room(memory_mib, add)
    image = _image(guest, add)
    if qemu is None or image is None or not room:
        return None
    return MeasuredHost(binary=qemu[0], version=qemu[1], machine=qemu[2], image=image)


def _qemu(binary: str, add: Callable[[Diagnosis], None]) -> tuple[str, str, str] | None:
    path = shutil.which(binary)
    remedy = "apt-get install qemu-system-x86; --qemu names another binary"
    if path is None:
        add(wrong("measure.qemu", f"{binary} is not there", remedy))
        return None
    path = str(Path(path).absolute())
    try:
        version = _VERSION.search(_said(path, "--version"))
        machine = _DEFAULT_MACHINE.search(_said(path, "-machine", "help"))
    except (OSError, subprocess.SubprocessError) as error:
        add(wrong("measure.qemu", f"{path} does not start: {error}", remedy))
        return None
    if version is None or machine is None:
        add(wrong("measure.qemu", f"{path} is not a QEMU with the machine q35", remedy))
        return None
    add(ok("measure.qemu", f"{path}: QEMU {version[1]}"))
    return path, version[1], machine[1]


def _said(*words: str) -> str:
    done = subprocess.run(
        words, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_PROGRAM_S, check=True
    )
    return done.stdout


def _room(memory_mib: int, add: Callable[[Diagnosis], None]) -> bool:
    needed = memory_mib << 20
    try:
        free = shutil.disk_usage(RAM_DIR).free
        available = available_bytes()
    except OSError as error:
        add(
            wrong("measure.room", f"how much memory is free is not known: {error}", f"mount {RAM_DIR}, /proc")
        )
        return False
    if free < needed:
        add(
            wrong(
                "measure.room",
                f"{RAM_DIR} has {free >> 20} MiB free, and the guest's memory of {memory_mib} MiB must fit there",
                f"--memory with less, or a larger {RAM_DIR} (size= of its tmpfs)",
            )
        )
        return False
    if available < needed + _PROCESSES_BYTES:
        add(
            wrong(
                "measure.room",
                f"{available >> 20} MiB of memory are available, and {(needed + _PROCESSES_BYTES) >> 20} are needed",
                "--memory with less, or measure on a host that has more",
            )
        )
        return False
    add(ok("measure.room", f"{available >> 20} MiB of memory are available, {free >> 20} MiB in {RAM_DIR}"))
    return True


def _image(guest: Path | None, add: Callable[[Diagnosis], None]) -> BuiltImage | None:
    try:
        image = built_already(default_cache()) if guest is None else read_manifest(guest)
    except GuestError as error:
        add(
            wrong(
                "measure.guest",
                str(error),
                "caesura guest build --output FOLDER, here or on another machine of the same version, and --guest FOLDER",
            )
        )
        return None
    if image is None:
        add(
            wrong(
                "measure.guest",
                f"the guest is not built yet for this version and this user (in {default_cache()})",
                "caesura guest build (some 40 MB of Debian packages, no root); where this host has no network:"
                " caesura guest build --output FOLDER on another one, copy it here, and --guest FOLDER",
            )
        )
        return None
    add(ok("measure.guest", f"{image.initrd}, kernel {image.kernel_version}"))
    return image
