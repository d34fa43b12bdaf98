"""The pause guard of a rehearsal: the real one, one for each set, since two sets may pause at once and a guard holds one operation."""

from __future__ import annotations

import asyncio
import os
import select
import signal
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from caesura.runtime.logs import get_logger
from caesura.runtime.threads import in_thread
from caesura_host_updater.guard_client import GuardClient, GuardUnavailable
from caesura_rehearse.targets.pause import TargetPlan

__all__ = ["GuardUnavailable", "Guards", "SetGuard"]

_START_S = 10.0  # s: it needs some 60 ms
_END_S = 5.0  # s: after SIGTERM; some milliseconds are usual

_log = get_logger("caesura.rehearse")


class SetGuard:
    """A guard and the connection to it.

    Args:
        folder: its state folder.
    """

    def __init__(self, folder: Path) -> None:
        self._client = GuardClient(folder, spawn=True)
        self.lost = asyncio.Event()
        """Set when the guard is gone: nothing may be paused any longer."""
        self._client.on_lost = self.lost.set

    async def start(self) -> None:
        """Start it. Raises GuardUnavailable."""
        await self._client.start(_START_S)

    async def arm(self, operation: str, deadline: float, plans: Sequence[TargetPlan]) -> None:
        """Have it resume the plans at ``deadline`` (CLOCK_MONOTONIC, seconds), or when this process dies. Raises GuardUnavailable."""
        await self._client.arm(operation, deadline, plans)

    async def disarm(self, operation: str) -> None:
        """The pause is over. One that does not answer is gone: it has nothing to do any more."""
        if self.lost.is_set():
            return
        try:
            acted = await self._client.disarm(operation)
        except GuardUnavailable as error:
            _log.warning("guard.not_disarmed", why=str(error))
            return
        if acted is not None and acted.fired is not None:
            _log.warning("guard.acted", why=acted.fired.why)

    async def close(self) -> None:
        """End it, after what it holds is resumed."""
        pid = 0 if self.lost.is_set() else self._client.pid  # it may be another process's by then
        await self._client.close()
        if pid:
            await in_thread("end guard", lambda: _end(pid))


class Guards:
    """The guards by set, each started when it is first needed."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._starting: dict[str, asyncio.Task[SetGuard]] = {}

    async def ready(self, set_name: str) -> SetGuard:
        """The set's guard; a new one if the last one was lost.

        Raises:
            GuardUnavailable: it cannot be started.
        """
        task = self._starting.get(set_name)
        if task is None or (
            task.done() and (task.cancelled() or task.exception() or task.result().lost.is_set())
        ):
            task = self._starting[set_name] = asyncio.create_task(
                self._start(set_name), name=f"guard of {set_name}"
            )
        return await asyncio.shield(task)

    async def _start(self, set_name: str) -> SetGuard:
        folder = self._folder / f"guard-{set_name}"
        folder.mkdir(mode=0o700, exist_ok=True)
        guard = SetGuard(folder)
        try:
            await guard.start()
        except BaseException:
            await guard.close()
            raise
        return guard

    async def close(self) -> None:
        """End them all."""
        for task in self._starting.values():
            with suppress(GuardUnavailable):
                await (await task).close()


def _end(pid: int) -> None:
    """SIGTERM, wait, and reap: it is our child. Blocking."""
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(handle, signal.SIGTERM)
        poll = select.poll()
        poll.register(handle, select.POLLIN)
        if not poll.poll(_END_S * 1000):
            _log.warning("guard.does_not_end", pid=pid)
            return
        with suppress(ChildProcessError):
            os.waitpid(pid, os.WNOHANG)
    finally:
        os.close(handle)
