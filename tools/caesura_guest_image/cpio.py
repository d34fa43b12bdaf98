"""Initramfs archives: cpio in the "newc" format (kernel, Documentation/driver-api/early-userspace/buffer-format.rst).

Reproducible: sorted names, owner root, time 0. Archives may be concatenated: the kernel unpacks one after another.
"""

from __future__ import annotations

import stat
from collections.abc import Mapping

import msgspec

_MAGIC = b"070701"
_TRAILER = "TRAILER!!!"


class ArchiveEntry(msgspec.Struct, frozen=True):
    """A file, folder or symbolic link. ``mode`` is st_mode with its type bits; a link's data is its target."""

    mode: int
    data: bytes = b""


FOLDER = ArchiveEntry(stat.S_IFDIR | 0o755)


def file_entry(data: bytes, *, executable: bool = False) -> ArchiveEntry:
    """A regular file."""
    return ArchiveEntry(stat.S_IFREG | (0o755 if executable else 0o644), data)


def link_entry(target: str) -> ArchiveEntry:
    """A symbolic link."""
    return ArchiveEntry(stat.S_IFLNK | 0o777, target.encode())


def pack(entries: Mapping[str, ArchiveEntry]) -> bytes:
    """The archive; names have no leading slash. Missing parent folders are added."""
    everything = dict(entries)
    for name in entries:
        parts = name.split("/")[:-1]
        for depth in range(1, len(parts) + 1):
            everything.setdefault("/".join(parts[:depth]), FOLDER)
    archive = bytearray()
    for number, name in enumerate(sorted(everything), start=1):
        _add(archive, number, name, everything[name])
    _add(archive, 0, _TRAILER, ArchiveEntry(0))
    # The kernel requires the next archive at a multiple of 4; cpio(1) pads to 512.
    archive += bytes(-len(archive) % 512)
    return bytes(archive)


def _add(archive: bytearray, number: int, name: str, entry: ArchiveEntry) -> None:
    encoded = name.encode() + b"\0"
    links = 2 if stat.S_ISDIR(entry.mode) else 1
    # inode, mode, uid, gid, links, mtime, size, device (2), special device (2), name size, checksum
    fields = (number, entry.mode, 0, 0, links, 0, len(entry.data), 0, 0, 0, 0, len(encoded), 0)
    archive += _MAGIC + b"".join(b"%08x" % field for field in fields) + encoded
    archive += bytes(-len(archive) % 4)
    archive += entry.data
    archive += bytes(-len(archive) % 4)
