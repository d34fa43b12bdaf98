"""The UUID of a file system, as its superblock has it: the same in every boot, whatever numbers devices get.

``statfs`` has no such thing: XFS makes ``f_fsid`` of the device's number. Needs neither udev nor libblkid: the file system is asked, and where
its kernel is too old for that, root reads the superblock.
"""

# light imports on purpose: no pathlib here.
# ruff: noqa: PTH123

from __future__ import annotations

import fcntl
import os
import struct
import uuid
from collections.abc import Iterator
from contextlib import suppress
from typing import NamedTuple

_NONE = bytes(16)
_BY_STATFS = "fsid:"


class _Question(NamedTuple):
    """A request of ioctl(2) that any user may make on an open file: its number, argument, and where the UUID is in the answer."""

    number: int
    argument: bytes
    at: int


_QUESTIONS = (
    # EXT4_IOC_GETFSUUID, Linux 6.0: struct fsuuid {u32 fsu_len, fsu_flags; u8 fsu_uuid[]} of fs/ext4/ext4.h
    _Question(0x8008662C, struct.pack("=II16x", 16, 0), 8),
    # XFS_IOC_FSGEOMETRY_V1: struct xfs_fsop_geom_v1 of fs/xfs/libxfs/xfs_fs.h
    _Question(0x80705864, bytes(112), 64),
    # FS_IOC_GETFSUUID, Linux 6.9: struct fsuuid2 {u8 len; u8 uuid[16]} of include/uapi/linux/fs.h
    _Question(0x80111500, bytes(17), 1),
)


class _Superblock(NamedTuple):
    """Where a file system has its magic number and its UUID, in bytes from the device's beginning."""

    magic_at: int
    magic: bytes
    uuid_at: int


_SUPERBLOCKS = (
    _Superblock(1024 + 0x38, b"\x53\xef", 1024 + 0x68),  # ext4: Documentation/filesystems/ext4/super.rst
    _Superblock(0, b"XFSB", 32),  # XFS: struct xfs_dsb of fs/xfs/libxfs/xfs_format.h
)
_READ_BYTES = 2048


def file_system_id(handle: int) -> str:
    """The UUID of the file system with an open file, or what else names it; never empty.

    A file system without a UUID (tmpfs, in a way) has ``fsid:`` and what statfs says: it does not outlive its kernel anyway.
    """
    for each in (*_asked(handle), *_read(os.fstat(handle).st_dev)):
        if each != _NONE:
            return str(uuid.UUID(bytes=each))
    return f"{_BY_STATFS}{os.fstatvfs(handle).f_fsid:016x}"


def same_file_system(one: str, other: str) -> bool:
    """Whether two ids, taken in two boots or by two users, are of one file system. Pure.

    A kernel before 6.0 does not say the UUID of ext4, and only root reads it from the superblock; but what statfs says of ext4 is that
    UUID's halves, combined by exclusive or (``uuid_to_fsid`` of include/linux/statfs.h). What XFS says there is never equal.
    """
    if one == other:
        return True
    uuids = [each for each in (one, other) if not each.startswith(_BY_STATFS)]
    return len(uuids) == 1 and _by_statfs(uuids[0]) in (one, other)


def _by_statfs(text: str) -> str:
    """What statfs says of an ext4 with this UUID; empty: it is none."""
    try:
        data = uuid.UUID(text).bytes
    except ValueError:
        return ""
    number = int.from_bytes(data[:8], "little") ^ int.from_bytes(data[8:], "little")
    return f"{_BY_STATFS}{number:016x}"


def _asked(handle: int) -> Iterator[bytes]:
    for each in _QUESTIONS:
        answer = bytearray(each.argument)
        with suppress(OSError):
            fcntl.ioctl(handle, each.number, answer, True)
            yield bytes(answer[each.at : each.at + 16])


def _read(device: int) -> Iterator[bytes]:
    with suppress(OSError):
        with open(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}/uevent", encoding="ascii") as file:
            lines = dict(line.split("=", 1) for line in file.read().splitlines() if "=" in line)
        with open(f"/dev/{lines.get('DEVNAME', '')}", "rb") as file:
            found = superblock_uuid(file.read(_READ_BYTES))
        if found is not None:
            yield found


def superblock_uuid(data: bytes) -> bytes | None:
    """The UUID in the first bytes of a device with ext4 or XFS; None: it has neither. Pure."""
    for each in _SUPERBLOCKS:
        if data[each.magic_at : each.magic_at + len(each.magic)] == each.magic:
            return data[each.uuid_at : each.uuid_at + 16]
    return None
