"""One ``serve()`` for every service: eternal tasks in a TaskGroup, an ordered shutdown, two signals.

The first SIGTERM or SIGINT drains (stop intake, finish or undo work, say offline, disconnect) under a
deadline; the default handlers are then restored, so a second signal kills. An eternal task that
returns is a failure.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Awaitable, Callable, Mapping

from caesura.runtime.errors import CaesuraError
from caesura.runtime.logs import get_logger

_log = get_logger("caesura.serve")


class TaskEnded(CaesuraError):
    """A task that should run indefinitely has finished unexpectedly."""


async def serve(
    tasks: Mapping[str, Callable[[], Awaitable[None]]],
    *,
    drain: Callable[[], Awaitable[None]],
    drain_timeout_s: float = 10.0,
    stop: asyncio.Event | None = None,
) -> None:
    """Run ``tasks`` until a signal, then ``drain`` and cancel them.

    Args:
        tasks: name to a function that starts the eternal task.
        drain: finishes or undoes work in flight; also called when a task failed, before the failure is raised.
        drain_timeout_s: seconds that ``drain`` may take; a host updater's must exceed the pause budget.
        stop: set by the signal, for a caller that would otherwise start again after a failure.

    Raises:
        BaseExceptionGroup: what the tasks raised; TaskEnded among it for one that returned.
    """
    stop = asyncio.Event() if stop is None else stop
    loop = asyncio.get_running_loop()
    signals = (signal.SIGTERM, signal.SIGINT)

    def on_signal(number: signal.Signals) -> None:
        _log.info("serve.draining", signal=number.name)
        for each in signals:
            loop.remove_signal_handler(each)
        stop.set()

    for number in signals:
        loop.add_signal_handler(number, on_signal, number)
    running: list[asyncio.Task[None]] = []
    try:
        async with asyncio.TaskGroup() as group:
            running.extend(
                group.create_task(_run_forever(name, start, stop), name=name) for name, start in tasks.items()
            )
            await stop.wait()
            await _drain(drain, drain_timeout_s)
            for task in running:
                task.cancel()
    except BaseExceptionGroup:
        if not stop.is_set():
            await _drain(drain, drain_timeout_s)
        raise
    finally:
        for number in signals:
            loop.remove_signal_handler(number)


async def _run_forever(name: str, start: Callable[[], Awaitable[None]], stop: asyncio.Event) -> None:
    await start()
    if not stop.is_set():
        raise TaskEnded(f"task {name!r} has finished unexpectedly")


async def _drain(drain: Callable[[], Awaitable[None]], timeout_s: float) -> None:
    try:
        async with asyncio.timeout(timeout_s):
            await drain()
    except TimeoutError:
        _log.error("serve.drain_timeout", seconds=timeout_s)
