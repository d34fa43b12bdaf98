"""Clean-up that nothing interrupts: neither the cancellation of the task that waits for it, nor Ctrl-C."""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

T = TypeVar("T")


async def shielded(work: Coroutine[Any, Any, T]) -> T:
    """Run ``work`` to its end, however often the caller is cancelled in the meantime; the cancellation is raised afterwards.

    Raises:
        asyncio.CancelledError: the caller was cancelled; ``work`` has ended. An exception of its own is the cause then.
    """
    task = asyncio.ensure_future(work)
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            # Not asyncio.shield: after a cancellation no caller would wait for the task any more.
            await asyncio.wait([task])
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        raise cancelled from (None if task.cancelled() else task.exception())
    return task.result()


@contextmanager
def undisturbed() -> Iterator[None]:
    """Defer SIGINT, SIGTERM and SIGHUP until the end of a short synchronous block, such as removing a folder.

    Only the main thread gets Python's signal handlers; in any other one this does nothing. The handlers are replaced,
    not the signal mask: a mask belongs to one thread, and the kernel would deliver the signal to another one.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    put_off: list[int] = []
    wakeup = signal.set_wakeup_fd(-1)  # otherwise an event loop would get it twice
    before = {
        number: signal.signal(number, lambda caught, _: put_off.append(caught))
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        if signal.getsignal(number) not in (signal.SIG_IGN, None)
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(wakeup)
        for caught in dict.fromkeys(put_off):
            signal.raise_signal(caught)
