"""The digest of a guest's memory, read from the file that holds it."""

from __future__ import annotations

import hashlib
import mmap
import time
from pathlib import Path

_CHUNK_BYTES = 1 << 20  # digest step, about a millisecond: how finely `stop_at` is kept


def digest_of(path: Path, stop_at: float) -> str | None:
    """BLAKE2b over a memory file; None: not done by ``stop_at`` on CLOCK_MONOTONIC. Raises OSError, ValueError."""
    digest = hashlib.blake2b(digest_size=16)
    with (
        path.open("rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as memory,
        memoryview(memory) as view,
    ):
        for start in range(0, len(view), _CHUNK_BYTES):
            if time.monotonic() >= stop_at:
                return None
            digest.update(view[start : start + _CHUNK_BYTES])
    return digest.hexdigest()
