"""The digest of a guest's memory on a tmpfs that is full."""

from __future__ import annotations

import subprocess
import sys
from contextlib import suppress
from hashlib import blake2b
from pathlib import Path

DIGEST = """
import sys, time
from pathlib import Path
from caesura_host_updater.drivers.digest import digest_of
print(digest_of(Path(sys.argv[1]), time.monotonic() + 60))
"""


def test_memory_with_holes_on_a_full_tmpfs(small_disk: Path) -> None:
    """Mapped, each hole that is looked at wants a page: SIGBUS, and the updater is dead in mid-pause."""
    size = 512 << 10
    memory = small_disk / "ram"
    with memory.open("wb") as file:
        file.write(b"used")
        file.truncate(size)
    with (small_disk / "filler").open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(b"x" * 4096)
    blocks = memory.stat().st_blocks
    # In a process of its own: a SIGBUS would end the test run.
    done = subprocess.run(
        [sys.executable, "-c", DIGEST, str(memory)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done
    whole = b"used".ljust(size, b"\0")
    assert done.stdout.strip() == blake2b(whole, digest_size=16).hexdigest()
    assert memory.stat().st_blocks == blocks, "it takes no memory either"
