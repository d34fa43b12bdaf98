"""Full garbage collections come when we choose, and they do come."""

from __future__ import annotations

import asyncio
import gc
import weakref
from typing import Any

import pytest

from caesura.runtime.full_collections import rare_full_collections


class Ring:
    """Only a garbage collection frees it."""

    def __init__(self) -> None:
        self.me = self


async def test_objects_of_many_requests_start_no_full_collection() -> None:
    full = 0

    def count(phase: str, info: dict[str, Any]) -> None:
        nonlocal full
        full += phase == "start" and info["generation"] == 2

    async with rare_full_collections():
        gc.callbacks.append(count)
        try:
            kept = [[number] for number in range(500_000)]
        finally:
            gc.callbacks.remove(count)
    assert len(kept) == 500_000
    assert full == 0


@pytest.mark.looptime
async def test_a_cycle_that_grew_old_is_freed_after_the_interval() -> None:
    before = gc.get_threshold()
    async with rare_full_collections(interval_s=60.0):
        ring = Ring()
        gc.collect(1)
        gc.collect(1)  # it is of the oldest generation now
        gone = weakref.ref(ring)
        del ring
        gc.collect(1)
        assert gone() is not None
        await asyncio.sleep(61.0)
        assert gone() is None
    assert gc.get_threshold() == before
    assert gc.get_freeze_count() == 0
