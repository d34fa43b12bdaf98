"""Rehearsals for a program that owns this process: requests on standard input, answers on standard output, a line of JSON each.

``{"id": 1, "do": "open"}`` begins a rehearsal, ``close`` ends it; in between come the calls of ``ProgramCallDispatcher``. The end of standard input ends everything,
so nothing is left however the owner ends.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import sys
from contextlib import AsyncExitStack
from typing import Any

from caesura.runtime.errors import CaesuraError
from caesura.runtime.logs import configure_logging
from caesura.runtime.threads import in_thread
from caesura_rehearse.control.call_dispatcher import BadCall
from caesura_rehearse.control.program_call_dispatcher import SET, VM, ProgramCallDispatcher, best_freezer
from caesura_rehearse.run_folder import run_folder
from caesura_rehearse.simulation.fleet_simulation import rehearsal

_LINE_BYTES = 16 * 1024 * 1024  # an environment may be large


class OwnedRehearsals:
    """One rehearsal after the other."""

    def __init__(self) -> None:
        self._stack: AsyncExitStack | None = None
        self._calls: ProgramCallDispatcher | None = None

    async def answer(self, request: dict[str, Any]) -> Any:
        """The result of one request. Raises CaesuraError."""
        name = str(request.get("do"))
        if name == "open":
            return await self._open()
        if name == "close":
            return await self.close()
        if self._calls is None:
            raise BadCall("no rehearsal is open")
        return await self._calls.call(name, request.get("with") or {})

    async def _open(self) -> dict[str, str]:
        await self.close()
        stack = AsyncExitStack()
        try:
            folder = await in_thread("folder", run_folder)
            stack.callback(shutil.rmtree, folder, ignore_errors=True)
            simulation = await stack.enter_async_context(rehearsal(folder, lambda _: None))
            slot = await simulation.add_vm(VM, SET, 0)
            self._calls = ProgramCallDispatcher(simulation, folder, await best_freezer())
        except BaseException:
            await stack.aclose()
            raise
        self._stack = stack
        return {"url": slot.url}

    async def close(self) -> None:
        """End the one that is open."""
        stack, self._stack, self._calls = self._stack, None, None
        if stack is not None:
            await stack.aclose()


async def serve() -> None:
    """Answer until the end of standard input."""
    reader = asyncio.StreamReader(limit=_LINE_BYTES)
    loop = asyncio.get_running_loop()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        loop.add_signal_handler(number, reader.feed_eof)
    rehearsals = OwnedRehearsals()
    try:
        while line := await reader.readline():
            request = json.loads(line)
            try:
                answer: dict[str, Any] = {"ok": await rehearsals.answer(request)}
            except CaesuraError as error:
                answer = {"error": str(error), "kind": type(error).__name__}
            os.write(1, json.dumps({"id": request.get("id"), **answer}).encode() + b"\n")
    except BrokenPipeError:
        pass
    finally:
        await rehearsals.close()


def main() -> int:
    """Entry point."""
    configure_logging("rehearse", level="error")
    asyncio.run(serve())
    return 0


if __name__ == "__main__":
    sys.exit(main())
