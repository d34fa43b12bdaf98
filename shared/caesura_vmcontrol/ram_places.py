"""Where guests' RAM is, so that another kernel finds it: a file system with DAX in memory that every kernel leaves alone.

The one place that knows. Memory that the Live Update Orchestrator keeps (memfds, Linux 6.19 and later) would be another answer here:
how a guest's RAM is named, how it is found again, and what shows that it is the same. See docs/adr/0025-kexec-guard.md.
"""

# light imports on purpose: no pathlib here.
# ruff: noqa: PTH116, PTH123

from __future__ import annotations

import os
import stat
from dataclasses import dataclass

_MOUNTS = "/proc/self/mounts"
_WITH_DAX = frozenset(("ext4", "xfs"))


@dataclass(frozen=True)
class RamIdentity:
    """What names a RAM file in every boot; a device's number may change with the order in which drivers find it.

    Args:
        fs_id: the file system's id, hexadecimal: ext4 makes it of the UUID (``ext4_statfs``).
        inode: the file's.
        size: in bytes.
    """

    fs_id: str
    inode: int
    size: int


def identify(path: str) -> RamIdentity:
    """The file as it is now. Raises OSError."""
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        there = os.fstat(handle)
        return RamIdentity(f"{os.fstatvfs(handle).f_fsid:016x}", there.st_ino, there.st_size)
    finally:
        os.close(handle)


def find_error(path: str, identity: RamIdentity) -> str:
    """Why the file is not the one that was identified; empty: it is."""
    try:
        there = identify(path)
    except FileNotFoundError:
        return f"the guest's RAM file {path} is gone"
    except OSError as error:
        return f"the guest's RAM file {path} cannot be looked at: {error.strerror or error}"
    if there.fs_id != identity.fs_id:
        return f"the guest's RAM file {path} is on another file system than it was"
    if there.inode != identity.inode:
        return f"the guest's RAM file {path} was deleted and created again"
    if there.size != identity.size:
        return f"the guest's RAM file {path} has {there.size} bytes and had {identity.size}"
    return ""


def dax_error(path: str) -> str:
    """Why what is at ``path`` does not stay when the kernel goes; empty: it does.

    Without DAX the pages of a mapped file are page cache, ordinary memory of the kernel. The mount option alone shows nothing for a
    device that has no DAX, so the device is asked too.
    """
    try:
        there = os.stat(path)
    except OSError as error:
        return f"{path} cannot be looked at: {error.strerror or error}"
    if stat.S_ISCHR(there.st_mode):
        return "" if os.path.realpath(path).startswith("/dev/dax") else f"{path} is not a DAX device"
    try:
        kind, place, options = _mount_of(os.path.realpath(path))
    except OSError as error:
        return f"its mount cannot be looked at: {error.strerror or error}"
    if kind not in _WITH_DAX:
        return f"{place} is {kind}, not ext4 or xfs with dax=always: guests' RAM there ends with the kernel"
    if not {"dax=always", "dax"} & options:
        return f"{place} is not mounted with dax=always: guests' RAM there ends with the kernel"
    if not _has_dax(there.st_dev):
        return f"the device of {place} has no DAX: guests' RAM there ends with the kernel"
    return ""


def _mount_of(path: str) -> tuple[str, str, frozenset[str]]:
    """Type, mount point and options of the file system with this path; of two at one place the last one. Raises OSError."""
    found = ("nothing", "/", frozenset[str]())
    with open(_MOUNTS, encoding="utf-8", errors="surrogateescape") as file:
        for line in file:
            _, place, kind, options, *_ = line.split(" ")
            # proc(5): space, tab, newline and backslash are octal.
            place = place.encode("latin-1", "surrogateescape").decode("unicode_escape")
            inside = path == place or path.startswith(place.rstrip("/") + "/")
            if inside and len(place) >= len(found[1]):
                found = (kind, place, frozenset(options.split(",")))
    return found


def _has_dax(device: int) -> bool:
    base = f"/sys/dev/block/{os.major(device)}:{os.minor(device)}"
    for place in (f"{base}/queue/dax", f"{base}/../queue/dax"):  # a partition has its queue in its disk
        try:
            with open(place, encoding="ascii") as file:
                return file.read().strip() == "1"
        except FileNotFoundError:
            continue
        except OSError:
            return False
    return False
