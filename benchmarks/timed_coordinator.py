"""The coordinator, with the longest steps of its event loop written to the file that ``BENCH_STEPS`` names. For ``benchmarks/fleet.py``."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from caesura_coordinator.__main__ import main

_FROM_S = 0.02


def _name(handle: asyncio.Handle) -> str:
    task = getattr(handle._callback, "__self__", None)  # type: ignore[attr-defined]  # noqa: SLF001
    if isinstance(task, asyncio.Task):
        coroutine: Any = task.get_coro()
        return f"{task.get_name()} {getattr(coroutine, '__qualname__', '')}"
    return repr(handle)[:200]


def time_steps(path: Path) -> None:
    """Append each step that took more processor time than this to the file: a line of JSON."""
    run = asyncio.Handle._run  # noqa: SLF001 - the one place that every step of the loop passes

    def timed(handle: asyncio.Handle) -> None:
        began, began_cpu = time.perf_counter(), time.thread_time()
        run(handle)
        cpu_s = time.thread_time() - began_cpu
        if cpu_s > _FROM_S:
            step: dict[str, Any] = {
                "cpu_ms": round(cpu_s * 1000, 1),
                "wall_ms": round((time.perf_counter() - began) * 1000, 1),
                "what": _name(handle),
            }
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(step) + "\n")

    asyncio.Handle._run = timed  # type: ignore[method-assign]  # noqa: SLF001


if __name__ == "__main__":
    time_steps(Path(os.environ["BENCH_STEPS"]))
    sys.exit(main())
