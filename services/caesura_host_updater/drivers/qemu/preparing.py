"""Before the pause: is it possible, and for a swap the process that shall take over, started and compared."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from caesura.contract.messages import Method
from caesura_host_updater.detached import ExitWatch, reap
from caesura_host_updater.drivers.port import DriverError
from caesura_host_updater.drivers.qemu import commandline
from caesura_host_updater.drivers.qemu.checkpointing import get_ready
from caesura_host_updater.drivers.qemu.checks import mismatch
from caesura_host_updater.drivers.qemu.guest import Guest, Prepared, picture
from caesura_host_updater.drivers.qemu.handover import late_activation, set_capabilities
from caesura_host_updater.drivers.qemu.launching import Launcher, LaunchFailed
from caesura_host_updater.drivers.qemu.qmp import Qmp, QmpFailed
from caesura_host_updater.drivers.qemu.records import Records, Run
from caesura_host_updater.drivers.qemu.releasing import forget, make_next_folders, remove_files
from caesura_host_updater.drivers.qemu.vmm import NoVmm, VmmProcess, last_words, ram_error, read_vmm
from caesura_host_updater.guard.plans import ReplacePlan, SwapPlan, Vmm
from caesura_host_updater.guard.processes import end
from caesura_host_updater.guard.procfs import read_process

_END_S = 2.0  # s: for a killed process to be dead


class Preparer:
    """See the module."""

    def __init__(self, launcher: Launcher, records: Records, threads: ThreadPoolExecutor) -> None:
        self._launcher = launcher
        self._records = records
        self._threads = threads

    async def prepare(self, guest: Guest, operation: str, method: Method, binary: str) -> None:
        """Get ready; the guest runs on. Raises DriverError, and nothing is left then."""
        run, qmp = guest.run, guest.qmp
        if run is None or qmp is None or qmp.closed:
            raise DriverError(guest.vm, guest.complaint() or "is not running")
        if guest.prepared is not None:
            raise DriverError(guest.vm, f"operation {guest.prepared.operation} has not been released yet")
        if method in guest.missing:
            raise DriverError(guest.vm, guest.missing[method])
        try:
            await self._check(guest, run, qmp, method)
            if method not in ("swap", "replace"):
                return
            program = binary or self._binary(run)
            await self._launcher.check_binary(program)
            folder = self._records.claims(guest.vm, operation)
            folder.mkdir(parents=True, mode=0o700)
            try:
                make_next_folders(run)
                begin = self._swap if method == "swap" else self._replace
                guest.prepared = await begin(guest, run, qmp, folder, program)
            except BaseException:
                runtime = self._launcher.folder(guest.vm)
                forget(guest.vm, run, folder, runtime, self._records, new=False)
                raise
        except (LaunchFailed, QmpFailed, OSError, NoVmm) as error:
            raise DriverError(guest.vm, str(error)) from error

    async def _check(self, guest: Guest, run: Run, qmp: Qmp, method: Method) -> None:
        if (status := await qmp.status()) != "running":
            raise DriverError(guest.vm, f"is {status} before anything was done")
        memory = commandline.memory_of(run.argv)
        if method in ("swap", "replace") and isinstance(memory, commandline.Memory):
            wrong = ram_error(run.pid, memory.file, memory.size)
            if wrong:
                raise DriverError(guest.vm, wrong)

    def _binary(self, run: Run) -> str:
        return self._launcher.default_binary() if run.ours else read_vmm(run.pid).binary

    async def _start(
        self, guest: Guest, qmp: Qmp, operation: str, argv: Sequence[str], at: str
    ) -> tuple[int, Qmp]:
        """Start the process that shall follow and compare it with the one that runs the guest."""
        log = self._records.next_log(guest.vm)
        log.unlink(missing_ok=True)
        pid, new = await self._launcher.spawn(argv, self._launcher.mark_of(guest.vm, operation), log, at)
        try:
            cpu = next((value for option, value in commandline.options(argv) if option == "-cpu"), "")
            wrong = mismatch(await picture(qmp), await picture(new), (cpu or "").split(",")[0])
        except QmpFailed as error:
            await self._drop(pid, new)
            raise LaunchFailed(f"{error}. {last_words(log)}".strip()) from error
        except BaseException:
            await self._drop(pid, new)
            raise
        if wrong:
            await self._drop(pid, new)
            raise LaunchFailed(f"{argv[0]} (QEMU {new.version}) cannot take it over: {wrong}")
        return pid, new

    async def _swap(self, guest: Guest, run: Run, qmp: Qmp, folder: Path, program: str) -> Prepared:
        argv = commandline.next_command(run.argv, program, guest.machine)
        pid, new = await self._start(guest, qmp, folder.name, argv, commandline.next_path(run.qmp))
        try:
            plan = SwapPlan(guest.vm, _vmm(run), _vmm_of(pid, commandline.next_path(run.guard)), str(folder))
            await set_capabilities(qmp, x_ignore_shared=True, events=True, return_path=True)
            late = await late_activation(new)
            await set_capabilities(
                new, x_ignore_shared=True, events=True, return_path=True, late_block_activate=late
            )
            await new.execute("migrate-incoming", uri=f"unix:{self._channel(guest)}")
            self._records.begin(folder, plan)
            watch = ExitWatch(pid, lambda: None)  # reaps it
        except BaseException:
            await self._drop(pid, new)
            raise
        detail = f"QEMU {new.version} (pid {pid}), was QEMU {qmp.version} (pid {run.pid})"
        return Prepared(folder.name, "swap", plan, folder, new, watch, detail)

    async def _replace(self, guest: Guest, run: Run, qmp: Qmp, folder: Path, program: str) -> Prepared:
        argv = commandline.next_command(run.argv, program, guest.machine)
        present = read_vmm(run.pid)
        beside = "swap" not in guest.missing
        if beside:  # a new one can be tried beside the old one, while the guest runs
            await self._drop(
                *await self._start(guest, qmp, folder.name, argv, commandline.next_path(run.qmp))
            )
        mark = self._launcher.mark_of(guest.vm, folder.name)
        log = self._records.next_log(guest.vm)
        log.unlink(missing_ok=True)
        runtime = self._launcher.folder(guest.vm)
        runtime.mkdir(parents=True, exist_ok=True, mode=0o700)
        plan = ReplacePlan(
            vm=guest.vm,
            old=_vmm(run),
            claims=str(folder),
            state_file=str(runtime / f"{folder.name}.state"),
            qmp=commandline.next_path(run.guard),
            argv=_lines(argv, present),
            environ=tuple(self._launcher.environ_of(mark).items()),
            mark=mark,
            log=str(log),
            ram=_ram(run),
            beside=beside,
        )
        await get_ready(qmp)
        self._records.begin(folder, plan)
        return Prepared(folder.name, "replace", plan, folder, None, None, f"QEMU {qmp.version}")

    def _channel(self, guest: Guest) -> str:
        """Where the new process waits for the state of the old one."""
        folder = self._launcher.folder(guest.vm)
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        remove_files(folder / "mig")
        return str(folder / "mig")

    async def _drop(self, pid: int, qmp: Qmp) -> None:
        """End a process that was started here and runs nothing."""
        process = read_process(pid)
        await qmp.close()
        if process is not None:
            until = time.monotonic() + _END_S
            loop = asyncio.get_running_loop()
            await loop.run_in_executor(self._threads, end, pid, process.start_ticks, until)
        reap(pid)


def _ram(run: Run) -> tuple[str, int, int] | None:
    """The RAM file, which ``_check`` has just seen mapped. Raises OSError."""
    memory = commandline.memory_of(run.argv)
    if isinstance(memory, str):
        return None
    there = Path(memory.file).stat()
    return memory.file, there.st_dev, there.st_ino


def _vmm(run: Run) -> Vmm:
    return Vmm(run.pid, run.start_ticks, run.guard)


def _vmm_of(pid: int, guard: str) -> Vmm:
    process = read_process(pid)
    if process is None:
        raise NoVmm(f"the new process {pid} has ended")
    return Vmm(pid, process.start_ticks, guard)


def _lines(argv: tuple[str, ...], present: VmmProcess) -> tuple[tuple[str, ...], ...]:
    """What is tried in turn: the new program, then the one that runs now if its path still holds it."""
    if present.replaced or present.binary == str(Path(argv[0]).resolve()):
        return (argv,)
    return (argv, (present.binary, *argv[1:]))
