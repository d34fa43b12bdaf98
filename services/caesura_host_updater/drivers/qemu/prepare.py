"""Before the pause: is it possible, and for a swap the process that shall take over, started and compared."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

from caesura.contract.messages import Method
from caesura.lifecycle.proof import SUCCEEDING
from caesura.runtime.threads import in_thread_to_its_end
from caesura_host_updater.drivers.port import DriverError
from caesura_host_updater.drivers.qemu.assessor import Assessor
from caesura_host_updater.drivers.qemu.async_qmp import AsyncQmp, QmpFailed
from caesura_host_updater.drivers.qemu.checkpointing import CAPABILITIES
from caesura_host_updater.drivers.qemu.cleanup import forget, make_next_folders, remove_files
from caesura_host_updater.drivers.qemu.commandline import GuestRam, cpu_of, memory_of
from caesura_host_updater.drivers.qemu.compatibility import as_stated, differences, moved_bytes
from caesura_host_updater.drivers.qemu.guest import Guest, Prepared
from caesura_host_updater.drivers.qemu.handover import (
    SWAP_CAPABILITIES,
    check_capabilities,
    read_capabilities,
    set_capabilities,
)
from caesura_host_updater.drivers.qemu.kexec_obstacles import kexec_obstacles
from caesura_host_updater.drivers.qemu.launching import Launcher, LaunchFailed
from caesura_host_updater.drivers.qemu.observer import read_snapshot
from caesura_host_updater.drivers.qemu.process_records import Records, VmProcessRecord
from caesura_host_updater.drivers.qemu.snapshot import VmSnapshot, migration_under_way
from caesura_host_updater.drivers.qemu.successor import next_command, next_path, sockets_of
from caesura_host_updater.drivers.qemu.trial import drop
from caesura_host_updater.drivers.qemu.vmm import NoVmm, VmmProcess, last_words, ram_error, read_vmm
from caesura_host_updater.inventory.kernel_options import KernelOptions
from caesura_host_updater.spawn import ExitWatch
from caesura_vmcontrol.durable_files import sync_folder
from caesura_vmcontrol.procfs import read_process
from caesura_vmcontrol.qemu_plans import AcrossBoots, ReplacePlan, SwapPlan, Vmm
from caesura_vmcontrol.ram_places import identify


class Preparer:
    """See the module."""

    def __init__(
        self, launcher: Launcher, records: Records, assessor: Assessor, threads: ThreadPoolExecutor
    ) -> None:
        self._launcher = launcher
        self._records = records
        self._assessor = assessor
        self._threads = threads

    async def prepare(self, guest: Guest, operation: str, method: Method, binary: str) -> None:
        """Get ready; the guest runs on. Raises DriverError, and nothing is left then."""
        async with self._assessor.lock(guest.vm):
            await self._prepare(guest, operation, method, binary)

    async def _prepare(self, guest: Guest, operation: str, method: Method, binary: str) -> None:
        run, qmp = guest.run, guest.qmp
        if guest.unguarded:
            raise DriverError(guest.vm, guest.unguarded)
        if run is None or qmp is None or qmp.closed:
            raise DriverError(guest.vm, guest.health_error() or "is not running")
        if guest.prepared is not None:
            raise DriverError(guest.vm, f"operation {guest.prepared.operation} has not been released yet")
        if method == "swap" and guest.stated.beside and not guest.stated.both:
            raise DriverError(guest.vm, "; ".join(guest.stated.beside))
        if method in SUCCEEDING and guest.stated.both:
            raise DriverError(guest.vm, guest.missing[method])
        try:
            if (status := await qmp.status()) != "running":
                raise DriverError(guest.vm, f"is {status} before anything was done")
            if wrong := migration_under_way(await qmp.execute("query-migrate")):
                raise DriverError(guest.vm, wrong)
            if method not in SUCCEEDING:
                return
            if method == "kexec" and (
                wrong_here := await self._assessor.within_time(kexec_obstacles, run, self._launcher.kernel)
            ):
                raise DriverError(guest.vm, "; ".join(wrong_here))
            running = await self._look(guest, run, qmp)
            program = binary or await self._assessor.within_time(self._assessor.binary_of, run)
            await self._launcher.check_binary(program)
            folder = self._records.operation(guest.vm, operation)
            await self._assessor.within_time(lambda: folder.mkdir(parents=True, mode=0o700))
            try:
                claims = self._launcher.claims(guest.vm, operation, across=method == "kexec")
                await self._assessor.within_time(self._launcher.make_folder, guest.vm)
                await self._assessor.within_time(
                    lambda: _make_durable_folder(claims) if method == "kexec" else claims.mkdir(mode=0o700)
                )
                await self._assessor.within_time(make_next_folders, run)
                begin = {"swap": self._swap, "replace": self._replace, "kexec": self._kexec}[method]
                guest.prepared = await begin(guest, run, qmp, folder, program, running)
            except BaseException:
                own = self._launcher.own_files(guest.vm, operation, across=method == "kexec")
                await in_thread_to_its_end(
                    f"forget {operation}",
                    lambda _: forget(guest.vm, run, folder, own, self._records, new=False),
                )
                raise
        except (LaunchFailed, QmpFailed, OSError, NoVmm) as error:
            raise DriverError(guest.vm, str(error)) from error

    async def _look(self, guest: Guest, run: VmProcessRecord, qmp: AsyncQmp) -> VmSnapshot:
        """The machine that runs, if another process may take it over. Raises DriverError with every reason why not."""
        running = await read_snapshot(qmp)
        wrong = [*running.busy, *running.blockers, *await self._assessor.host_reasons(run, running)]
        if wrong:
            raise DriverError(guest.vm, "; ".join(wrong))
        return running

    async def _start(
        self, guest: Guest, run: VmProcessRecord, running: VmSnapshot, operation: str, argv: Sequence[str]
    ) -> tuple[int, AsyncQmp]:
        """Start the process that shall follow and compare it with the one that runs the guest."""
        log = self._records.next_log(guest.vm)
        log.unlink(missing_ok=True)
        mark = self._launcher.mark_of(guest.vm, operation)
        pid, new = await self._launcher.spawn(argv, mark, log, next_path(run.qmp))
        try:
            there = as_stated(running, await read_snapshot(new), argv)
            wrong = list(differences(running, there, cpu_of(argv)))
            if isinstance(memory := memory_of(argv), GuestRam):
                # The proof that RAM will not be copied: the new process has the same file mapped, shared.
                mapped = await self._assessor.within_time(ram_error, pid, memory.file, memory.size)
                wrong += [f"it has other memory than the guest: {mapped}"] if mapped else []
        except QmpFailed as error:
            await drop(pid, new, self._threads)
            raise LaunchFailed(f"{error}. {last_words(log)}".strip()) from error
        except BaseException:
            await drop(pid, new, self._threads)
            raise
        if wrong:
            await drop(pid, new, self._threads)
            raise LaunchFailed(_cannot(argv[0], new.version, wrong))
        return pid, new

    async def _swap(
        self,
        guest: Guest,
        run: VmProcessRecord,
        qmp: AsyncQmp,
        folder: Path,
        program: str,
        running: VmSnapshot,
    ) -> Prepared:
        argv = next_command(run.argv, program, guest.machine, running.generation_id)
        claims = self._launcher.claims(guest.vm, folder.name)
        pid, new = await self._start(guest, run, running, folder.name, argv)
        try:
            plan = SwapPlan(guest.vm, _vmm(run), _vmm_of(pid, next_path(run.guard)), str(claims))
            # Not of the old process yet: until the last moment its migrations are its operator's.
            await check_capabilities(qmp, SWAP_CAPABILITIES)
            late = "late-block-activate" in await read_capabilities(new)
            await set_capabilities(new, {**SWAP_CAPABILITIES, "late-block-activate": late})
            await new.execute("migrate-incoming", uri=f"unix:{self._channel(guest)}")
            await self._assessor.within_time(self._records.begin, folder, plan)
            watch = ExitWatch(pid, lambda: None)  # reaps it
        except BaseException:
            await drop(pid, new, self._threads)
            raise
        return Prepared(
            folder.name,
            "swap",
            plan,
            folder,
            seen=running,
            moved_bytes=_moved(run, running),
            qmp=new,
            watch=watch,
            detail=f"QEMU {new.version} (pid {pid}), was QEMU {qmp.version} (pid {run.pid})",
        )

    async def _kexec(
        self,
        guest: Guest,
        run: VmProcessRecord,
        qmp: AsyncQmp,
        folder: Path,
        program: str,
        running: VmSnapshot,
    ) -> Prepared:
        """As a replace whose second half is another boot's."""
        return await self._replace(guest, run, qmp, folder, program, running, method="kexec")

    async def _replace(
        self,
        guest: Guest,
        run: VmProcessRecord,
        qmp: AsyncQmp,
        folder: Path,
        program: str,
        running: VmSnapshot,
        *,
        method: Literal["replace", "kexec"] = "replace",
    ) -> Prepared:
        argv = next_command(run.argv, program, guest.machine, running.generation_id)
        present = await self._assessor.within_time(read_vmm, run.pid)
        ram = await self._assessor.within_time(_ram, run)
        across: AcrossBoots | None = None
        if method == "kexec":
            across = await self._assessor.within_time(_across, run, argv, self._launcher.kernel)
        beside = not guest.stated.beside
        if beside:  # the very process can be tried beside the old one, while the guest runs
            await drop(*await self._start(guest, run, running, folder.name, argv), self._threads)
        elif wrong := await self._assessor.compare_with_trial(guest, running, argv):
            raise LaunchFailed(_cannot(program, "", wrong))
        mark = self._launcher.mark_of(guest.vm, folder.name)
        log = self._records.next_log(guest.vm)
        log.unlink(missing_ok=True)
        plan = ReplacePlan(
            vm=guest.vm,
            old=_vmm(run),
            claims=str(self._launcher.claims(guest.vm, folder.name, across=across is not None)),
            state_file=str(self._launcher.state_file(guest.vm, folder.name, across=across is not None)),
            qmp=next_path(run.guard),
            argv=_lines(argv, present),
            environ=tuple(self._launcher.environ_of(mark).items()),
            mark=mark,
            log=str(log),
            ram=ram,
            beside=beside,
            across=across,
        )
        await check_capabilities(qmp, CAPABILITIES)
        await self._assessor.within_time(self._records.begin, folder, plan)
        return Prepared(
            folder.name,
            method,
            plan,
            folder,
            seen=running,
            moved_bytes=_moved(run, running),
            detail=f"QEMU {qmp.version}",
        )

    def _channel(self, guest: Guest) -> str:
        """Where the new process waits for the state of the old one."""
        folder = self._launcher.make_folder(guest.vm)
        remove_files(folder / "mig")
        return str(folder / "mig")


def _cannot(program: str, version: str, wrong: Sequence[str]) -> str:
    which = f"{program} (QEMU {version})" if version else program
    return f"{which} cannot take it over: {'; '.join(wrong)}"


def _moved(run: VmProcessRecord, running: VmSnapshot) -> int:
    memory = memory_of(run.argv)
    return moved_bytes(running.blocks, memory.backend) if isinstance(memory, GuestRam) else 0


def _ram(run: VmProcessRecord) -> tuple[str, int, int] | None:
    """The RAM file, which was just seen to be mapped. Raises OSError."""
    memory = memory_of(run.argv)
    if isinstance(memory, str):
        return None
    there = Path(memory.file).stat()
    return memory.file, there.st_dev, there.st_ino


def _make_durable_folder(folder: Path) -> None:
    """On a disk, so that another boot finds it. Raises OSError."""
    folder.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    folder.mkdir(mode=0o700)
    for each in (folder, folder.parent, folder.parent.parent, folder.parent.parent.parent):
        sync_folder(str(each))


def _across(run: VmProcessRecord, argv: tuple[str, ...], kernel: KernelOptions) -> AcrossBoots:
    """What another boot must know of the process and its RAM file. Raises OSError, NoVmm."""
    memory = memory_of(run.argv)
    if isinstance(memory, str):
        raise NoVmm(memory)
    status = Path(f"/proc/{run.pid}/status").read_text(encoding="ascii", errors="replace")
    lines = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
    identity = identify(memory.file)
    return AcrossBoots(
        boot_id=run.boot_id,
        fs_id=identity.fs_id,
        inode=identity.inode,
        size=identity.size,
        carve_out=kernel.carve_out,
        uid=int(lines["Uid"].split()[1]),
        gid=int(lines["Gid"].split()[1]),
        groups=tuple(int(each) for each in lines["Groups"].split()),
        folders=tuple(sorted({str(Path(path).parent) for path in sockets_of(argv)})),
    )


def _vmm(run: VmProcessRecord) -> Vmm:
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
