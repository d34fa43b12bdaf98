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

from caesura_vmcontrol.file_system_ids import file_system_id, same_file_system
from caesura_vmcontrol.mounts import Mount, mount_of, read_mounts

_WITH_DAX = frozenset(("ext4", "xfs"))


@dataclass(frozen=True)
class RamIdentity:
    """What names a RAM file in every boot; a device's number may change with the order in which drivers find it.

    Args:
        fs_id: the file system's UUID, see ``file_system_ids``.
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
        return RamIdentity(file_system_id(handle), there.st_ino, there.st_size)
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
    if not same_file_system(there.fs_id, identity.fs_id):
        return f"the guest's RAM file {path} is on another file system than it was"
    if there.inode != identity.inode:
        return f"the guest's RAM file {path} was deleted and created again"
    if there.size != identity.size:
        return f"the guest's RAM file {path} has {there.size} bytes and had {identity.size}"
    return ""


def carve_out_error(path: str) -> str:
    """Why this is not the mount point of a file system that guests' RAM can be in over a change of the kernel; empty: it is."""
    return dax_error(path) if os.path.ismount(path) else f"nothing is mounted at the carve-out {path}"


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
        mount = mount_of(read_mounts(), os.path.realpath(path))
    except OSError as error:
        return f"its mount cannot be looked at: {error.strerror or error}"
    return mount_dax_error(mount, has_dax=_has_dax(there.st_dev))


def mount_dax_error(mount: Mount | None, *, has_dax: bool) -> str:
    """As ``dax_error``, of a file system. Pure.

    Args:
        mount: where the file is; None: nowhere.
        has_dax: whether the device of that file system has DAX.
    """
    if mount is None or mount.kind not in _WITH_DAX:
        kind, place = ("nothing", "its place") if mount is None else (mount.kind, mount.place)
        return f"{place} is {kind}, not ext4 or xfs with dax=always: guests' RAM there ends with the kernel"
    if not {"dax=always", "dax"} & set(mount.options):
        return f"{mount.place} is not mounted with dax=always: guests' RAM there ends with the kernel"
    if not has_dax:
        return f"the device of {mount.place} has no DAX: guests' RAM there ends with the kernel"
    return ""


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
