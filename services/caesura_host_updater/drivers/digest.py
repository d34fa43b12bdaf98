"""The digest of a guest's memory, read from the file that holds it."""

from __future__ import annotations

import hashlib
import time
from pathlib import Path

_CHUNK_BYTES = 1 << 20  # digest step, about a millisecond: how finely `stop_at` is kept


def digest_of(path: Path, stop_at: float) -> str | None:
    """BLAKE2b over a memory file; None: not done by ``stop_at`` on CLOCK_MONOTONIC. Raises OSError, ValueError.

    Read, not mapped: a look at a hole of a mapped file allocates a page, which on a full tmpfs is a SIGBUS. A read of
    a hole allocates nothing (tmpfs(5) keeps no page for it), so the digest does not change how much memory is used.
    """
    digest = hashlib.blake2b(digest_size=16)
    chunk = memoryview(bytearray(_CHUNK_BYTES))
    with path.open("rb", buffering=0) as file:
        left = path.stat().st_size
        if not left:
            raise ValueError("it is empty")
        while left:
            if time.monotonic() >= stop_at:
                return None
            count = file.readinto(chunk[: min(left, _CHUNK_BYTES)])
            if not count:
                raise ValueError(f"it became shorter by {left} bytes while it was read")
            digest.update(chunk[:count])
            left -= count
    return digest.hexdigest()
