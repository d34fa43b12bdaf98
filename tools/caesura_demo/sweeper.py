"""Cleans up after a demo that was killed: ``python -m caesura_demo.sweeper MARK [CGROUP ...]``, started by the demo.

The demo writes the folders that it creates to this process's standard input, a line each, and ``done`` when nothing is left to
do. An end of the input without that means that the demo died, for any reason. Its services are tied to it and drain
(``caesura.bus.pdeathsig``); processes that do not end by themselves, because they hang or outlive their parent on purpose, are
killed here, and the folders are removed.
"""

from __future__ import annotations

import asyncio
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from caesura.runtime.processes import kill_marked, marked_processes, remove_cgroups

DONE = "done"
_DRAIN_S = 20.0
"""s: services that lost their parent resume and stop their VMs; the same time that the demo itself would wait."""

_DISMISSED_S = 5.0


class Sweeper:
    """The demo's side."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    def remember(self, folder: Path | str) -> None:
        """Remove this folder if the demo dies."""
        self._tell(str(folder))

    async def dismiss(self) -> None:
        """Report that nothing is left to clean up."""
        self._tell(DONE)
        try:
            async with asyncio.timeout(_DISMISSED_S):
                await self._process.wait()
        except TimeoutError:  # it hangs, and has no work left
            with suppress(ProcessLookupError):
                self._process.kill()
            await self._process.wait()

    def _tell(self, line: str) -> None:
        if self._process.stdin is not None:
            with suppress(OSError):  # it was killed: then nobody reads
                self._process.stdin.write(line.encode() + b"\n")


async def start_sweeper(mark: str, cgroups: Sequence[str]) -> Sweeper:
    """Start one for this process; it does not carry the mark itself."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "caesura_demo.sweeper",
        mark,
        *cgroups,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.DEVNULL,
        start_new_session=True,  # only the demo receives Ctrl-C
    )
    return Sweeper(process)


def main() -> int:
    """0: the demo had cleaned up, or everything is clean now."""
    mark, *cgroups = sys.argv[1:]
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    folders = []
    for line in sys.stdin:
        if line.strip() == DONE:
            return 0
        folders.append(Path(line.strip()))
    until = time.monotonic() + _DRAIN_S
    while time.monotonic() < until and any(marked_processes(mark)):
        time.sleep(0.1)  # the kernel notifies only the parent when a process is gone
    asyncio.run(kill_marked(mark))
    remove_cgroups(cgroups)
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
