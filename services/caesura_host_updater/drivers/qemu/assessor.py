"""Whether another process could take each guest over, looked at while it runs: so that a plan refuses what would fail.

The machine that runs is compared with that of a trial process. What changed at run time (a snapshot, a hot-plugged
disk, a job) announces itself to nobody, so it is looked at again every some seconds; a trial is only repeated when
something is different. What a host does just before a pause is the same comparison with the real next process.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from caesura.runtime.logs import get_logger
from caesura.runtime.threads import in_thread
from caesura_host_updater.drivers.qemu.async_qmp import AsyncQmp, QmpFailed
from caesura_host_updater.drivers.qemu.commandline import cpu_of
from caesura_host_updater.drivers.qemu.compatibility import as_stated, differences
from caesura_host_updater.drivers.qemu.guest import Guest, host_obstacles
from caesura_host_updater.drivers.qemu.launching import Launcher, LaunchFailed
from caesura_host_updater.drivers.qemu.observer import read_snapshot
from caesura_host_updater.drivers.qemu.obstacles import Obstacles
from caesura_host_updater.drivers.qemu.process_records import VmProcessRecord
from caesura_host_updater.drivers.qemu.snapshot import VmSnapshot
from caesura_host_updater.drivers.qemu.successor import next_command
from caesura_host_updater.drivers.qemu.trial import Trials
from caesura_host_updater.drivers.qemu.vmm import NoVmm, file_errors, read_vmm

_EVERY_S = 10.0  # s: between two looks at a guest
_FAILED_S = 60.0  # s: until a trial is repeated that could not be made
_HOST_S = 3.0  # s: for the kernel to answer about a process and its files; a hung file system may not

_T = TypeVar("_T")

_log = get_logger("caesura.qemu")


@dataclass(frozen=True)
class _Trial:
    """What a trial found, and what it was made for: it holds as long as that does, and ``until`` (CLOCK_MONOTONIC)."""

    running: VmSnapshot
    argv: tuple[str, ...]
    binary: tuple[str, int, int]
    reasons: tuple[str, ...]
    until: float


class Assessor:
    """See the module."""

    def __init__(self, guests: Mapping[str, Guest], launcher: Launcher, trials: Trials) -> None:
        self._guests = guests
        self._launcher = launcher
        self._trials = trials
        self._done: dict[str, _Trial] = {}
        self._locks = {vm: asyncio.Lock() for vm in guests}

    def lock(self, vm: str) -> asyncio.Lock:
        """Held while a process is tried or prepared for the VM: one at a time."""
        return self._locks[vm]

    async def run(self) -> None:
        """Look at one guest after the other. Never ends."""
        while True:
            for guest in self._guests.values():
                try:
                    await self.assess(guest)
                except Exception:  # noqa: BLE001 - one guest must not keep the others from being looked at
                    _log.exception("vm.not_assessed", vm=guest.vm)
            await asyncio.sleep(_EVERY_S)

    async def assess(self, guest: Guest) -> None:
        """Look at one guest and note what speaks against another process."""
        async with self._locks[guest.vm]:
            run, qmp = guest.run, guest.qmp
            if run is None or qmp is None or qmp.closed or guest.prepared is not None or guest.stated.both:
                return
            if guest.state != "running":
                return
            try:
                found = await self._reasons(guest, run, qmp)
            except QmpFailed as error:
                found = (f"its QEMU cannot be asked for its machine: {error}",)
            if guest.run is run and Obstacles(found) != guest.compared:
                guest.compared = Obstacles(found)
                _log.info("vm.compared", vm=guest.vm, obstacles=list(found))
                guest.changed()

    async def _reasons(self, guest: Guest, run: VmProcessRecord, qmp: AsyncQmp) -> tuple[str, ...]:
        running = await read_snapshot(qmp)
        reasons = [*running.busy, *running.blockers, *await self.host_reasons(run, running)]
        if not reasons:
            reasons += await self._trial(guest, run, running)
        return tuple(reasons)

    async def host_reasons(self, run: VmProcessRecord, running: VmSnapshot) -> list[str]:
        """What the host says against another process: its users, paths, RAM file, disk files. Asked in a thread."""

        def look() -> list[str]:
            return [*host_obstacles(run), *file_errors(run.pid, running.files)]

        try:
            return await self.within_time(look)
        except OSError as error:
            return [f"its files cannot be looked at: {error}"]

    async def within_time(self, look: Callable[..., _T], *arguments: object) -> _T:
        """Ask the kernel about a process; it may make us wait. Raises OSError when it does for too long."""
        try:
            async with asyncio.timeout(_HOST_S):
                return await in_thread("look at a QEMU", lambda: look(*arguments))
        except TimeoutError:
            raise OSError(f"the kernel does not answer within {_HOST_S:g} s") from None

    async def _trial(self, guest: Guest, run: VmProcessRecord, running: VmSnapshot) -> tuple[str, ...]:
        try:
            binary = await self.within_time(lambda: _identity(self.binary_of(run)))
        except (LaunchFailed, NoVmm, OSError) as error:
            return (str(error),)
        before, now = self._done.get(guest.vm), time.monotonic()
        same = before is not None and (before.running, before.argv, before.binary) == (
            running,
            run.argv,
            binary,
        )
        if before is not None and same and now < before.until:
            return before.reasons
        until = math.inf
        try:
            command = next_command(run.argv, binary[0], guest.machine, running.generation_id)
            there = await self._trials.take(guest.vm, command)
        except (LaunchFailed, QmpFailed, OSError) as error:
            # What a full tmpfs or a busy host brought about goes by itself.
            until = now + _FAILED_S
            reasons: tuple[str, ...] = (f"a new process cannot be started beside it: {error}",)
        else:
            reasons = differences(running, as_stated(running, there, command), cpu_of(command))
        self._done[guest.vm] = _Trial(running, run.argv, binary, reasons, until)
        return reasons

    async def compare_with_trial(
        self, guest: Guest, running: VmSnapshot, command: tuple[str, ...]
    ) -> tuple[str, ...]:
        """What speaks against a process with this command line. Raises LaunchFailed, QmpFailed, OSError: there is none."""
        there = await self._trials.take(guest.vm, command)
        return differences(running, as_stated(running, there, command), cpu_of(command))

    def binary_of(self, run: VmProcessRecord) -> str:
        """The program that would follow if an update names none. Blocking. Raises LaunchFailed, NoVmm."""
        return self._launcher.default_binary() if run.ours else read_vmm(run.pid).binary


def _identity(binary: str) -> tuple[str, int, int]:
    there = Path(binary).stat()
    return binary, there.st_ino, there.st_mtime_ns
