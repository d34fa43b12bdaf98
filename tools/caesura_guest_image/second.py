"""A second QEMU version beside the installed one: Debian 12's backports, unpacked in the cache, never installed.

To try what happens when the hypervisor under a guest is replaced by another version. QEMU finds its firmware and
modules relative to its own path, so nothing else is needed; it uses the libraries of the installed QEMU.
"""

from __future__ import annotations

import re
import subprocess
import time
from pathlib import Path

import msgspec

from caesura_guest_image.build import new_folder, one_at_a_time
from caesura_guest_image.packages import (
    SUITE,
    GuestError,
    Progress,
    download,
    need_tools,
    private_lists,
    unpack,
)

RELEASE = f"{SUITE}-backports"
_PACKAGES = (
    *("qemu-system-x86", "qemu-system-common", "qemu-system-data", "seabios"),
    "ipxe-qemu",  # no backport of it: network cards' boot ROMs, the same as the installed QEMU's
)
_BINARY = "usr/bin/qemu-system-x86_64"


class Qemu(msgspec.Struct, frozen=True, kw_only=True):
    """A QEMU that can be started."""

    binary: str
    version: str
    seconds: float
    cached: bool


def fetch_second(cache: Path, progress: Progress) -> Qemu:
    """The second QEMU, from the cache if available.

    Raises:
        GuestError: it is not available here, or it lacks libraries.
    """
    begun = time.monotonic()
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with one_at_a_time(cache / "lock", progress):
            target = cache / f"qemu-{RELEASE}"
            cached = (target / _BINARY).is_file()
            if not cached:
                _unpack_into(cache, target, progress)
    except OSError as error:
        raise GuestError(f"cannot unpack in {cache}: {error}") from error
    binary = str(target / _BINARY)
    return Qemu(
        binary=binary,
        version=qemu_version(binary),
        seconds=round(time.monotonic() - begun, 3),
        cached=cached,
    )


def _unpack_into(cache: Path, target: Path, progress: Progress) -> None:
    need_tools()
    suites = [(SUITE, "debian"), (RELEASE, "debian")]
    options = private_lists(cache / "apt", RELEASE, suites, progress)
    names = [name if name == "ipxe-qemu" else f"{name}/{RELEASE}" for name in _PACKAGES]
    files = download(names, options, cache / "debs", progress)
    progress("unpacking")
    with new_folder(cache) as folder:
        unpack(files, folder / "root")
        (folder / "root").rename(target)


def qemu_version(binary: str) -> str:
    """``10.0.2``. Raises GuestError with the loader's message if it cannot run here."""
    try:
        done = subprocess.run([binary, "--version"], capture_output=True, text=True, check=False, timeout=30)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise GuestError(f"{binary} does not run: {error}") from error
    found = re.search(r"version (\d+\.\d+\.\d+)", done.stdout)
    if done.returncode != 0 or not found:
        said = (done.stderr or done.stdout).strip().splitlines()
        raise GuestError(
            f"{binary} does not run: {said[0] if said else f'exit code {done.returncode}'}. "
            "It uses the libraries of the installed QEMU: apt-get install qemu-system-x86"
        )
    return found[1]
