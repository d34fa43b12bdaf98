"""The demo's processes: tied to this one at start, stopped in order, and cleaned up in every case.

Every process of a run carries ``CAESURA_DEMO_RUN=<id>`` in its environment, inherited by its children, so the
sweep also finds processes that outlive their parent on purpose (VMs, pause guards). A frozen process cannot die before
it is thawed, so the sweep thaws first.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from caesura.runtime.errors import CaesuraError
from caesura.runtime.processes import kill_marked, remove_cgroups

_STOP_S = 20.0
"""s: a draining host updater resumes its VMs, stops them and disconnects; a pause in the demo is far shorter."""
_KILLED_S = 5.0
"""s: for killed processes to end; a frozen one does not before the sweep thaws it."""


class ServiceDied(CaesuraError):
    """A service of the demo ended by itself; the text has the end of its log."""


class Processes:
    """The services of one run.

    Args:
        run_id: marks every process of this run.
        folder: the folder of the logs.
        cgroups: names of the cgroups that the services create for VMs.
    """

    def __init__(self, run_id: str, folder: Path, cgroups: Collection[str] = ()) -> None:
        self.mark = f"CAESURA_DEMO_RUN={run_id}"
        self.folder = folder
        self._cgroups = frozenset(cgroups)
        self.running: dict[str, asyncio.subprocess.Process] = {}

    async def start(self, name: str, module: str, environment: Mapping[str, str]) -> None:
        """Start ``python -m module`` with no Caesura variables in its environment except ``environment``."""
        inherited = {key: value for key, value in os.environ.items() if not key.startswith("CAESURA_")}
        with (self.folder / f"{name}.log").open("ab") as log:
            self.running[name] = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "caesura.bus.pdeathsig",
                str(os.getpid()),
                sys.executable,
                "-m",
                module,
                env={**inherited, **environment, **dict([self.mark.split("=", 1)])},
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # only the demo receives Ctrl-C, and stops them in order
            )

    def check(self) -> None:
        """Check that all services still run.

        Raises:
            ServiceDied: naming the first that does not.
        """
        for name, process in self.running.items():
            if process.returncode is not None:
                lines = (self.folder / f"{name}.log").read_text(errors="replace").strip().splitlines()
                tail = "\n  ".join(lines[-5:])
                raise ServiceDied(
                    f"{name} ended with exit code {process.returncode}; its last words:\n  {tail}"
                )

    async def stop(self, hurry: asyncio.Event | None = None) -> None:
        """Terminate all services, let them drain, then kill the remaining processes of this run, frozen or not.

        ``hurry``: once it is set, waiting ends and everything is killed.
        """
        for process in self.running.values():
            with suppress(ProcessLookupError):
                process.terminate()
        if self.running:
            waits = [asyncio.create_task(process.wait()) for process in self.running.values()]
            await _all_or(hurry, waits, _STOP_S)
            for process in self.running.values():
                if process.returncode is None:
                    with suppress(ProcessLookupError):
                        process.kill()
            await _all_or(hurry, waits, _KILLED_S)
            for each in waits:
                each.cancel()
        await self.sweep()

    async def sweep(self) -> None:
        """Thaw and kill every process that carries this run's mark, until there is none; then remove their cgroups."""
        await kill_marked(self.mark)
        await asyncio.to_thread(remove_cgroups, self._cgroups)


async def _all_or(hurry: asyncio.Event | None, waits: Sequence[asyncio.Task[int]], timeout_s: float) -> None:
    """Wait for all, for the time, or for ``hurry``."""
    whole: asyncio.Future[Any] = asyncio.ensure_future(asyncio.wait(waits))
    hurried = asyncio.ensure_future((hurry or asyncio.Event()).wait())
    try:
        await asyncio.wait({whole, hurried}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
    finally:
        whole.cancel()
        hurried.cancel()
