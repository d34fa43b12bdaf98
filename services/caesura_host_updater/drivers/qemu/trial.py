"""A process like the one that would follow, started for a moment to see which machine it has; no guest ever runs in it.

It has the guest's machine, RAM, disks and devices, but no taps, no character devices and no ports, so it can be
started beside any running guest without anybody noticing. A user network is QEMU's own; nothing is ever sent on it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

from caesura_host_updater.drivers.qemu.async_qmp import AsyncQmp, QmpConnectionLost
from caesura_host_updater.drivers.qemu.cleanup import remove_files
from caesura_host_updater.drivers.qemu.launching import Launcher
from caesura_host_updater.drivers.qemu.observer import read_snapshot
from caesura_host_updater.drivers.qemu.process_records import TRIAL, Records
from caesura_host_updater.drivers.qemu.snapshot import VmSnapshot
from caesura_host_updater.drivers.qemu.successor import trial_command
from caesura_host_updater.drivers.qemu.vmm import last_words
from caesura_host_updater.spawn import reap, words_of_end
from caesura_vmcontrol.process_control import kill_and_wait
from caesura_vmcontrol.procfs import read_process

_END_S = 2.0  # s: for a killed process to be dead


class Trials:
    """See the module."""

    def __init__(self, launcher: Launcher, records: Records, threads: ThreadPoolExecutor) -> None:
        self._launcher = launcher
        self._records = records
        self._threads = threads

    async def take(self, vm: str, command: Sequence[str]) -> VmSnapshot:
        """The machine that a next process with this command line would have.

        Raises:
            LaunchFailed, QmpFailed, OSError: there would be none; the text says why, in QEMU's own words where it had some.
        """
        folder = self._launcher.make_folder(vm)
        log = self._records.trial_log(vm)
        remove_files(log, folder / "spice")
        argv = trial_command(command, str(folder))
        try:
            pid, qmp = await self._launcher.spawn(
                argv, self._launcher.mark_of(vm, TRIAL), log, str(folder / "trial")
            )
            try:
                return await read_snapshot(qmp)
            except QmpConnectionLost as error:
                how = (await words_of_end(pid, _END_S), last_words(log))
                raise QmpConnectionLost("; ".join((str(error), *filter(None, how)))) from error
            finally:
                await drop(pid, qmp, self._threads)
        finally:
            remove_files(folder / "trial", folder / "spice", log)
            with suppress(OSError):
                folder.rmdir()  # of a VM whose sockets are elsewhere


async def drop(pid: int, qmp: AsyncQmp, threads: ThreadPoolExecutor) -> None:
    """End a process that was started here and runs nothing."""
    process = read_process(pid)
    await qmp.close()
    if process is not None:
        until = time.monotonic() + _END_S
        await asyncio.get_running_loop().run_in_executor(
            threads, kill_and_wait, pid, process.start_ticks, until
        )
    reap(pid)
