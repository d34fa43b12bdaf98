"""Pages of a guest's memory chosen at random for an operation: a digest that takes no time worth mentioning.

Of ``n`` pages chosen out of all, a loss of the fraction ``f`` of the guest's memory is found with probability
``1 - (1 - f) ** n``: with 128 pages, 99.9 % for a loss of 5.3 %, 72 % for 1 %.
"""

from __future__ import annotations

import os
from hashlib import blake2b
from pathlib import Path

PAGE_BYTES = 4096
SAMPLE_PAGES = 128  # some 0.2 ms to read: a swap's pause may grow by at most 1 ms


def sampled_offsets(seed: str, size: int, pages: int = SAMPLE_PAGES) -> tuple[int, ...]:
    """Offsets of pages, in bytes, ascending, each once; the same ones for the same seed (the operation and VM) and size."""
    count = size // PAGE_BYTES
    if count <= pages:
        return tuple(range(0, count * PAGE_BYTES, PAGE_BYTES))
    chosen: set[int] = set()
    number = 0
    while len(chosen) < pages:
        drawn = blake2b(f"{seed}/{number}".encode(), digest_size=8).digest()
        chosen.add(int.from_bytes(drawn, "little") % count)
        number += 1
    return tuple(page * PAGE_BYTES for page in sorted(chosen))


def sampled_digest_of(path: Path, seed: str) -> str:
    """BLAKE2b over the sampled pages of a memory file, with ``read`` calls: a hole costs no memory, a short file is an error.

    Raises OSError; ValueError: the file has become shorter while it was read, or holds no page.
    """
    digest = blake2b(digest_size=16)
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        offsets = sampled_offsets(seed, os.fstat(handle).st_size)
        if not offsets:
            raise ValueError("it holds no whole page")
        for offset in offsets:
            page = os.pread(handle, PAGE_BYTES, offset)
            if len(page) != PAGE_BYTES:
                raise ValueError(f"it ends before {offset + PAGE_BYTES} bytes")
            digest.update(page)
    finally:
        os.close(handle)
    return digest.hexdigest()
