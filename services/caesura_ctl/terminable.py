"""A command's event loop, which SIGTERM ends as Ctrl-C does: what runs is cancelled, so that it cleans up."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Coroutine
from typing import Any

from caesura_ctl.signals import exit_on_sigterm


class Terminable:
    """Runs one coroutine in an event loop of its own. Ctrl-C is handled by asyncio: it cancels the coroutine likewise."""

    def __init__(self) -> None:
        self.terminated = False
        """Whether SIGTERM arrived."""

    def run(self, work: Coroutine[Any, Any, None]) -> None:
        """Run it to its end.

        Raises:
            KeyboardInterrupt: on Ctrl-C.
            asyncio.CancelledError: on SIGTERM.
        """
        try:
            asyncio.run(self._until_sigterm(work))
        finally:
            exit_on_sigterm()  # the loop has restored the signal's default action

    async def _until_sigterm(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.current_task()

        def terminate() -> None:
            self.terminated = True
            if task is not None:
                task.cancel()

        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, terminate)
        await work
