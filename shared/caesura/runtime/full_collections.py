"""Full garbage collections at intervals of our choice: each walks everything that a process keeps and holds up its event loop.

CPython starts one whenever what survived younger collections has grown by a quarter: with 5,000 connections some times a minute,
for 0.1 to 0.4 s each. Cycles that outlive the younger collections are rare here, and a process can wait for their memory.
Source: the module ``gc``; "Garbage collector design", Python developer's guide.
"""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

INTERVAL_S = 600.0
"""s: between two full collections; 0.4 s in 600 are less than one answer in 1,000."""
_NEVER = (
    1_000_000  # collections of the middle generation, each of which takes 100,000 objects or more to come
)
_YOUNG = 10_000  # objects: 700 by default, which is less than a hundred requests of one second make


@asynccontextmanager
async def rare_full_collections(interval_s: float = INTERVAL_S) -> AsyncIterator[None]:
    """Full collections come every ``interval_s`` seconds only, and pass over what is there now.

    Enter when the process has loaded and started what it keeps for life.
    """
    before = gc.get_threshold()
    gc.collect()
    gc.freeze()
    gc.set_threshold(_YOUNG, 10, _NEVER)
    collecting = asyncio.create_task(_collect(interval_s), name="garbage")
    try:
        yield
    finally:
        collecting.cancel()
        gc.set_threshold(*before)
        gc.unfreeze()


async def _collect(interval_s: float) -> None:
    while True:
        await asyncio.sleep(interval_s)
        # In the loop's thread: from another one it would hold the interpreter's lock just the same.
        gc.collect()
