"""The demo's processes: started tied to this one, stopped in order, and swept up whatever happens.

Every process of a run carries ``CAESURA_DEMO_RUN=<id>`` in its environment, inherited by its children, so the
sweep finds also what outlives its parent on purpose (VMs, pause guards). A frozen process cannot die before
it is thawed, so the sweep thaws first.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from caesura.runtime.errors import CaesuraError

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
        self.run_id = run_id
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
                env={**inherited, **environment, "CAESURA_DEMO_RUN": self.run_id},
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
        end = asyncio.get_running_loop().time() + _SWEEP_S
        while pids := list(marked_processes(self.run_id)):
            for pid in pids:
                thaw(pid)
                with suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, signal.SIGKILL)
            if asyncio.get_running_loop().time() > end:
                raise CaesuraError(f"processes of the demo could not be killed: {pids}")
            await asyncio.sleep(0.05)  # the kernel tells nobody but the parent when a process is gone


def marked_processes(run_id: str) -> Iterator[int]:
    """Processes of a run other than this one, from their environment in /proc; zombies do not count."""
    mark = f"CAESURA_DEMO_RUN={run_id}".encode()
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        with suppress(OSError):
            if mark in (entry / "environ").read_bytes().split(b"\0"):
                yield int(entry.name)


def frozen_processes(run_id: str) -> list[int]:
    """Processes of a run that stand still now, as the kernel says: stopped, or in a frozen cgroup."""
    return [
        pid
        for pid in marked_processes(run_id)
        if _is_stopped(pid) or any(_is_frozen(path) for path in _freezers(pid))
    ]


def thaw(pid: int) -> None:
    """Let a process run again, however it was frozen."""
    for path in _freezers(pid):
        with suppress(OSError):
            path.write_text("THAWED" if path.name == "freezer.state" else "0")
    with suppress(ProcessLookupError, PermissionError):
        os.kill(pid, signal.SIGCONT)


def _is_stopped(pid: int) -> bool:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] == "T"


def _is_frozen(path: Path) -> bool:
    try:
        if path.name == "freezer.state":
            return path.read_text().strip() != "THAWED"
        return "frozen 1" in (path.parent / "cgroup.events").read_text()
    except OSError:
        return False


def _freezers(pid: int) -> Sequence[Path]:
    """The files that freeze this process, cgroup v1 and v2 (cgroups(7): /proc/PID/cgroup and mountinfo)."""
    found = []
    with suppress(OSError):
        mounts = dict(_mounts())
        for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if path == "/":
                continue  # the root is nobody's to freeze
            if controllers == "" and "cgroup2" in mounts:
                found.append(Path(mounts["cgroup2"] + path) / "cgroup.freeze")
            if "freezer" in controllers.split(",") and "freezer" in mounts:
                found.append(Path(mounts["freezer"] + path) / "freezer.state")
    return [each for each in found if each.exists()]


def _mounts() -> Iterator[tuple[str, str]]:
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        left, _, right = line.partition(" - ")
        kind, _, options = right.split(" ", 2)
        if kind == "cgroup2":
            yield "cgroup2", left.split()[4]
        elif kind == "cgroup" and "freezer" in options.split(","):
            yield "freezer", left.split()[4]
