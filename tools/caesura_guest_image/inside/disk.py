"""Writes checksummed blocks to /dev/vda, each followed by fdatasync, and reads all of them back when asked.

``caesura.disk_blocks`` (256) blocks of 4 KiB are written round and round, one every ``caesura.disk_ms`` (2). Port ``org.caesura.disk.0``: ``verify``
reads past the page cache (O_DIRECT), and every block must be exactly the one that was written last; ``status``.
"""

from __future__ import annotations

import mmap
import os
import time
import zlib

from .parameters import Parameters
from .ports import RequestPort

PORT = "org.caesura.disk.0"
DEVICE = "/dev/vda"
BLOCK = 4096


def make_block(number: int, sequence: int) -> bytes:
    """The content of a block: its number, the number of the write, a body derived from both, and a CRC-32."""
    head = b"caesura %8d %16d " % (number, sequence)
    body = (head * (BLOCK // len(head) + 1))[: BLOCK - 4]
    return body + zlib.crc32(body).to_bytes(4, "little")


class DiskWorkload:
    """The blocks and the last write to each."""

    def __init__(self, path: str, blocks: int) -> None:
        self.blocks = blocks
        self._file = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        self._direct = os.open(path, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
        self._buffer = mmap.mmap(-1, BLOCK)  # O_DIRECT requires an aligned buffer
        self.sequence = 0
        self._last = [0] * blocks
        self.longest_s = 0.0

    def write(self) -> None:
        """Write one more block, which is on disk when this returns."""
        self.sequence += 1
        number = self.sequence % self.blocks
        started = time.monotonic()
        os.pwrite(self._file, make_block(number, self.sequence), number * BLOCK)
        os.fdatasync(self._file)
        self._last[number] = self.sequence
        self.longest_s = max(self.longest_s, time.monotonic() - started)

    def first_bad(self) -> int | None:
        """Number of the first block whose content differs from its last write."""
        for number, sequence in enumerate(self._last):
            if not sequence:
                continue
            os.preadv(self._direct, [self._buffer], number * BLOCK)
            if self._buffer[:] != make_block(number, sequence):
                return number
        return None


def run(parameters: Parameters) -> None:
    """Write and answer requests indefinitely."""
    disk = DiskWorkload(DEVICE, int(parameters.get("disk_blocks", "256")))
    pause_s = float(parameters.get("disk_ms", "2")) / 1000

    def status() -> bytes:
        return b'{"written":%d,"longest_write_s":%.4f}' % (disk.sequence, disk.longest_s)

    def verify() -> bytes:
        bad = disk.first_bad()
        ok, place = (b"true", b"null") if bad is None else (b"false", b"%d" % bad)
        return b'{"ok":%s,"bad_block":%s,"written":%d,"longest_write_s":%.4f}' % (
            *(ok, place),
            *(disk.sequence, disk.longest_s),
        )

    requests = RequestPort(PORT, {b"verify": verify, b"status": status})
    while True:
        disk.write()
        requests.serve_until(time.monotonic() + pause_s)
