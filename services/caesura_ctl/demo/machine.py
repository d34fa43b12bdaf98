"""What the demo takes from this machine and gives back: folders, RAM, ports, and its signals."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import socket
import tempfile
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from caesura.runtime.errors import CaesuraError

FIRST_PORT = 18100


class Interrupted(CaesuraError):
    """Ctrl-C, or another signal to stop."""

    exit_code = 130


@contextmanager
def run_folder(wanted: Path | None) -> Iterator[Path]:
    """A short path (unix sockets allow some 100 characters), private, gone afterwards unless it was asked for."""
    if wanted is not None:
        wanted.mkdir(parents=True, exist_ok=False, mode=0o700)
        yield wanted.resolve()
        return
    base = "/tmp" if os.access("/tmp", os.W_OK) else None  # noqa: S108 - mkdtemp makes it private
    folder = Path(tempfile.mkdtemp(prefix="caesura-demo-", dir=base))
    kept = False
    try:
        yield folder
    except CaesuraError as error:
        kept = not isinstance(error, Interrupted)
        if kept:
            raise type(error)(f"{error}\nlogs are kept in {folder}") from error
        raise
    finally:
        if not kept:
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def ram_folder(*, needed: bool) -> Iterator[str]:
    """A folder on a tmpfs for the guests' RAM, gone afterwards."""
    if not needed:
        yield ""
        return
    try:
        folder = tempfile.mkdtemp(prefix="caesura-demo-", dir="/dev/shm")
    except OSError as error:
        raise CaesuraError(f"guest RAM needs a folder in /dev/shm: {error}") from error
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def free_ports(count: int, start: int = FIRST_PORT) -> Iterator[int]:
    """Free TCP ports on loopback, from ``start`` on."""
    port = start
    while count:
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                port += 1
                continue
        yield port
        port += 1
        count -= 1


async def until_signal(body: Callable[[], Awaitable[int]]) -> int:
    """Run ``body``; the first signal cancels it, and its clean-up is not disturbed by further ones.

    Raises:
        Interrupted: when a signal ended it.
    """
    loop = asyncio.get_running_loop()
    task = asyncio.ensure_future(body())
    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    seen = False

    def on_signal() -> None:
        nonlocal seen
        if not seen:
            seen = True
            task.cancel()

    for number in signals:
        loop.add_signal_handler(number, on_signal)
    try:
        return await task
    except asyncio.CancelledError:
        raise Interrupted("interrupted; everything was resumed and stopped") from None
    finally:
        for number in signals:
            loop.remove_signal_handler(number)
