"""The demo's processes: started tied to this one, stopped in order, and swept up whatever happens.

Every process of a run carries ``CAESURA_DEMO_RUN=<id>`` in its environment, inherited by its children, so the
sweep finds also what outlives its parent on purpose (VMs, pause guards). A frozen process cannot die before
it is thawed, so the sweep thaws first.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from caesura.runtime.errors import CaesuraError
from caesura.runtime.processes import kill_marked

_STOP_S = 20.0
"""s: a draining host updater resumes its VMs, stops them and says goodbye; a pause in the demo is far shorter."""
_SWEEP_S = 5.0


class ServiceDied(CaesuraError):
    """A service of the demo ended by itself; the text has the end of its log."""


class Processes:
    """The services of one run.

    Args:
        run_id: marks every process of this run.
        folder: where each one's log goes.
    """

    def __init__(self, run_id: str, folder: Path) -> None:
        self.mark = f"CAESURA_DEMO_RUN={run_id}"
        self.folder = folder
        self.running: dict[str, asyncio.subprocess.Process] = {}

    async def start(self, name: str, module: str, environment: Mapping[str, str]) -> None:
        """Start ``python -m module`` with nothing of Caesura's in its environment but ``environment``."""
        inherited = {key: value for key, value in os.environ.items() if not key.startswith("CAESURA_")}
        with (self.folder / f"{name}.log").open("ab") as log:
            self.running[name] = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "caesura.bus.tether",
                str(os.getpid()),
                sys.executable,
                "-m",
                module,
                env={**inherited, **environment, **dict([self.mark.split("=", 1)])},
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C goes to the demo alone, which stops them in order
            )

    def check(self) -> None:
        """All services still run.

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

    async def stop(self) -> None:
        """Terminate all services, let them drain, then kill what is left of this run, frozen or not."""
        for process in self.running.values():
            with suppress(ProcessLookupError):
                process.terminate()
        if self.running:
            waits = [asyncio.create_task(process.wait()) for process in self.running.values()]
            await asyncio.wait(waits, timeout=_STOP_S)
            for process in self.running.values():
                if process.returncode is None:
                    process.kill()
            await asyncio.wait(waits, timeout=_SWEEP_S)
        await self.sweep()

    async def sweep(self) -> None:
        """Thaw and kill every process that carries this run's mark, until there is none."""
        await kill_marked(self.mark, timeout_s=_SWEEP_S)
