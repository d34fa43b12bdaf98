"""The VMs of a host over its updater's lives: found again, adopted, started, looked for, stopped, cleaned up after."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

from caesura.contract.messages import Method
from caesura.runtime.logs import get_logger
from caesura.runtime.threads import in_thread
from caesura_host_updater.drivers.qemu import successor
from caesura_host_updater.drivers.qemu.assessor import Assessor
from caesura_host_updater.drivers.qemu.async_qmp import QmpFailed, listener_of
from caesura_host_updater.drivers.qemu.cleanup import remove_claims, remove_files
from caesura_host_updater.drivers.qemu.definition import Definition, QemuOptions
from caesura_host_updater.drivers.qemu.discovery import discovered
from caesura_host_updater.drivers.qemu.guest import Guest, NotAttached, Prepared, adopted, found_by_sockets
from caesura_host_updater.drivers.qemu.launching import Launcher, LaunchFailed, kill
from caesura_host_updater.drivers.qemu.migration import Migrator
from caesura_host_updater.drivers.qemu.process_records import Records, VmProcessRecord
from caesura_host_updater.drivers.qemu.vmm import marked, marked_as, place_error
from caesura_host_updater.drivers.shutdown_requests import ShutdownRequests
from caesura_host_updater.spawn import ExitWatch, reap
from caesura_vmcontrol import claims
from caesura_vmcontrol.intent import IntentFile, UnreadableIntent
from caesura_vmcontrol.markers import OPERATIONS
from caesura_vmcontrol.procfs import alive, boot_id
from caesura_vmcontrol.qemu_plans import ReplacePlan, SwapPlan
from caesura_vmcontrol.ram_places import carve_out_error
from caesura_vmcontrol.vm_control import condition

_PROBE_S = 0.05  # s: for a QEMU to notice that who connected has gone; then it takes the next one
_LOOK_S = 5.0  # s: between two looks for VMs that others start, or that did not answer
_SETTLE_S = 2.0  # s: to end the loser of an operation whose guest runs
_QUIT_S = 2.0  # s: from QMP `quit` to the end of the process

_log = get_logger("caesura.qemu")


class VmSupervisor:
    """See the module."""

    def __init__(
        self,
        guests: Mapping[str, Guest],
        options: QemuOptions,
        launcher: Launcher,
        records: Records,
        migrator: Migrator,
        assessor: Assessor,
        threads: ThreadPoolExecutor,
    ) -> None:
        self._guests = guests
        self._options = options
        self._launcher = launcher
        self._records = records
        self._migrator = migrator
        self._threads = threads
        self._assessor = assessor
        self._requests = ShutdownRequests(records.folder)
        self._tasks: list[asyncio.Task[None]] = []
        self._found: dict[str, VmProcessRecord] = {}
        """Processes without a run file that have a VM's sockets."""

    def last_run(self, vm: str) -> VmProcessRecord | None:
        """What the VM's run file says."""
        return self._records.read(vm)

    # -- the start of a life --------------------------------------------------------------------------------

    async def open(self) -> None:
        """Finish or find what a previous run left, attach what runs, start what does not."""
        try:
            self._launcher.prepare_folders()
        except OSError as error:
            for guest in self._guests.values():
                guest.last_error = f"no folder for its sockets: {error}"
            return
        await in_thread("sweep", self._sweep)
        await asyncio.gather(*(self._open(guest) for guest in self._guests.values()))
        self._tasks = [
            asyncio.create_task(self._look(), name="look for VMs"),
            asyncio.create_task(self._assessor.run(), name="assess VMs"),
        ]

    def _sweep(self) -> None:
        """End processes that a previous run started and nothing accounts for; remove RAM files without a guest."""
        records = self._records.runs()
        runs = {vm: run for vm, run in records.items() if _lives(run)}
        kept = {(run.pid, run.start_ticks) for run in runs.values()}
        held_files = {run.ram_file for run in runs.values()}
        unfinished: set[str] = set()
        for folder in self._records.folder.glob(f"*{OPERATIONS}"):
            vm = folder.name.removesuffix(OPERATIONS)
            for operation, plan in self._records.unfinished(vm):
                if plan is None:
                    # Or the guest ended with the host: its state must not be loaded into memory that is not its own.
                    _log.warning("operation.without_a_plan", vm=vm, operation=operation.name)
                    self._records.end(operation)
                    continue
                unfinished.add(f"{vm}/{operation.name}")
                kept.add((plan.old.pid, plan.old.start_ticks))
                held_files.add(str(self._launcher.ram_dir / f"{vm}.ram"))
        for pid, start_ticks in marked(self._launcher.mark):
            # Of an unfinished operation the way out decides who is ended; the guard may be at it right now.
            if (pid, start_ticks) in kept or marked_as(pid, self._launcher.mark) in unfinished:
                continue
            there = found_by_sockets(pid, self._launcher.mark)
            if there is None:
                _log.warning("process.left_over", pid=pid)
                kill(pid, start_ticks)
                continue
            vm, run = there
            time.sleep(_PROBE_S)
            _log.error("vm.run_file_lost", vm=vm, pid=pid)
            held_files.add(run.ram_file)
            if str(self._launcher.folder(vm) / "qmp") == run.qmp:
                self._found[vm] = run
        self._sweep_files(held_files)

    def _sweep_files(self, held_files: set[str]) -> None:
        """Remove state files and claims without an operation, and RAM files without a guest."""
        try:
            held_files |= self._armed_files()
        except UnreadableIntent as error:
            _log.error("operation.intent_unreadable", why=str(error), left="every file is kept")
            return
        for end, remove in (
            (f"{self._launcher.state_end}*", remove_files),
            (self._launcher.claims_end, remove_claims),
        ):
            for base in (self._launcher.run_dir, self._launcher.operations_dir):
                for left in base.glob(f"*/*{end}"):
                    vm, operation = left.parent.name, left.name.partition(".")[0]
                    if str(left) not in held_files and not self._records.operation(vm, operation).exists():
                        remove(left)
        for file in self._launcher.ram_dir.glob("*.ram"):
            if str(file) not in held_files:
                _log.warning("ram_file.left_over", file=str(file))
                file.unlink(missing_ok=True)

    def _armed_files(self) -> set[str]:
        """Files of guests that wait for another kernel, or for this one, whatever our own records say. Raises UnreadableIntent."""
        intent = IntentFile(str(self._records.folder.parent)).read()
        plans = intent.plans if intent is not None and intent.kernel_change is not None else ()
        return {
            file
            for plan in plans
            if isinstance(plan, ReplacePlan) and plan.ram is not None
            for file in (plan.claims, plan.state_file, plan.ram[0])
        }

    async def _open(self, guest: Guest) -> None:
        await self._find_unfinished(guest)
        if guest.prepared is not None or guest.run is not None:
            return  # found frozen, or on its way: `resume` decides; or found in its new process
        await self.find(guest)
        await self._start_ended(guest)

    async def _start_ended(self, guest: Guest) -> None:
        if guest.spec.qemu is None:
            return
        run = guest.run
        if run is not None and (guest.mute or guest.state == "stopped"):
            await self._end_of(run)
            run = guest.run
        if run is None:
            await self._start(guest, guest.spec.qemu)

    @staticmethod
    async def _end_of(run: VmProcessRecord) -> None:
        """Wait a moment for a process that was ending when this life found it: its VM is to be started, as one that had ended."""
        ended = asyncio.Event()
        with suppress(ProcessLookupError, TimeoutError):
            watch = ExitWatch(run.pid, ended.set, reap=False)
            try:
                async with asyncio.timeout(_QUIT_S):
                    await ended.wait()
            finally:
                watch.close()

    async def _find_unfinished(self, guest: Guest) -> None:
        loop = asyncio.get_running_loop()
        for folder, plan in self._records.unfinished(guest.vm):
            if plan is None:
                self._records.end(folder)
                continue
            begun = not claims.untouched(plan.claims)
            guest.prepared = Prepared(folder.name, _method(plan), plan, folder, begun=begun)
            try:
                state = await loop.run_in_executor(self._threads, condition, plan)
            except OSError:
                state = "held"
            _log.warning("operation.found_unfinished", vm=guest.vm, operation=folder.name, state=state)
            if state == "running":
                # Whatever was begun, the guest runs: that is decided now, in its favour.
                await self._migrator.recover(guest, time.monotonic() + _SETTLE_S)
                await self._migrator.settle(guest)
                await self._migrator.release(guest)
            elif state == "gone":
                await self.gone(guest)
                await self._migrator.release(guest)
            else:
                former = self._records.read(guest.vm)
                if former is not None and _lives(former) and (former.pid == plan.old.pid):
                    with suppress(NotAttached):
                        await guest.attach(former)
                return

    async def find(self, guest: Guest) -> None:
        """Attach the process that runs the VM, if there is one; else ``why`` says what is wrong."""
        run = await in_thread("run file", lambda: self._records.read(guest.vm))
        lost = self._found.get(guest.vm)
        if lost is not None and (run is None or not _lives(run)):
            run = lost
            with suppress(OSError):
                await self._write(guest.vm, run)
        try:
            if run is not None and _lives(run):
                await guest.attach(run)
                await self._migrator.restore_capabilities(guest)
                _log.info("vm.adopted", vm=guest.vm, pid=run.pid)
            elif guest.spec.qemu is None:
                await self._adopt(guest)
        except NotAttached as error:
            guest.last_error = str(error)

    async def _adopt(self, guest: Guest) -> None:
        where = guest.spec.adopt or discovered(self._options.discover, guest.vm)
        if where is None:
            raise NotAttached(f"there is no folder {self._options.discover}/{guest.vm} with a QMP socket")
        run, qmp = await adopted(where.qmp, where.guard_qmp, where.guest_agent)
        for other in self._guests.values():
            if other is not guest and other.run is not None and other.run.pid == run.pid:
                await qmp.close()
                raise NotAttached(f"{where.qmp} belongs to process {run.pid}, which is VM {other.vm}")
        try:
            await guest.attach(run, qmp)
        except NotAttached:
            await qmp.close()
            raise
        await self._write(guest.vm, run)
        _log.info("vm.adopted", vm=guest.vm, pid=run.pid)

    async def end(self, guest: Guest, run: VmProcessRecord) -> None:
        """Its process has ended by itself: release it, and remove what it leaves behind."""
        await guest.detach()
        reap(run.pid)
        await in_thread(f"remove what {guest.vm} left", lambda: self._remove(guest.vm, run))

    async def start(self, guest: Guest) -> bool:
        """Start a VM that was started here and has ended; whether it runs. ``last_error`` of the guest says why not."""
        if guest.spec.qemu is None:
            return False
        former = await in_thread("run file", lambda: self._records.read(guest.vm))
        if former is not None and not _lives(former):
            await self.end(guest, former)
        await self._start(guest, guest.spec.qemu)
        return guest.run is not None

    async def _start(self, guest: Guest, definition: Definition) -> None:
        vm = guest.vm
        try:
            await in_thread(f"place of {vm}", lambda: self._check_place(vm))
            remove_files(self._records.run_file(vm))
            run, qmp = await self._launcher.start(vm, definition)
        except (LaunchFailed, OSError) as error:
            guest.last_error = str(error)
            _log.error("vm.not_started", vm=vm, why=guest.last_error)
            return
        try:
            await self._write(vm, run)
            await guest.attach(run, qmp)
        except (NotAttached, OSError) as error:
            guest.last_error = str(error)
            _log.error("vm.not_started", vm=vm, why=guest.last_error)
            await guest.detach()
            kill(run.pid, run.start_ticks)
            with suppress(ProcessLookupError):
                ExitWatch(run.pid, lambda: None)
            return
        await in_thread("shutdown request", lambda: self._requests.forget(vm))
        _log.info("vm.started", vm=vm, pid=run.pid, version=qmp.version)

    async def _write(self, vm: str, run: VmProcessRecord) -> None:
        await in_thread("run file", lambda: self._records.write(vm, run))

    def _check_place(self, vm: str) -> None:
        """Whether a VM may be started where its things are to be.

        Raises:
            LaunchFailed: others could put files of theirs there, a process has the sockets (it may be this VM), or its RAM would be
                outside the carve-out that the host file promises.
            OSError: a folder cannot be made.
        """
        kernel = self._launcher.kernel
        if kernel.kexec and (wrong := carve_out_error(kernel.carve_out)):
            raise LaunchFailed(
                f"{wrong}: boot a kernel that leaves the carve-out alone (caesura host prepare-kexec --check) and restart the "
                "host updater, or write kexec = false in [kernel]"
            )
        for folder in (self._launcher.folder(vm), self._launcher.ram_dir):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            wrong = place_error(folder)
            if wrong:
                raise LaunchFailed(wrong)
        with suppress(OSError):
            listener = listener_of(str(self._launcher.folder(vm) / "qmp"))
            raise LaunchFailed(f"process {listener} has its sockets in {self._launcher.folder(vm)}")

    async def _look(self) -> None:
        while True:
            await asyncio.sleep(_LOOK_S)
            for guest in self._guests.values():
                if guest.unguarded and guest.run is not None:
                    await self._poll(guest)
                    continue
                if guest.prepared is None:
                    await self._migrator.restore_capabilities(guest)
                    await guest.look_across()
                if guest.state == "paused" and guest.prepared is None and not guest.stopped_by_us:
                    await guest.refresh()
                lost = guest.mute if guest.run is not None else guest.spec.qemu is None
                if lost and guest.prepared is None:
                    before = guest.last_error
                    await self.find(guest)
                    if guest.state != "unknown" and (guest.run is not None or guest.last_error != before):
                        guest.changed()

    @staticmethod
    async def _poll(guest: Guest) -> None:
        before = guest.state
        with suppress(NotAttached):  # somebody else has its only socket: what is known of it stands
            await guest.poll()
        if guest.state != before:
            guest.changed()

    # -- the end ----------------------------------------------------------------------------------------------

    async def gone(self, guest: Guest) -> None:
        """The guest is gone from our hands: nothing of it is left, or it is left to the one that paused it or took it away."""
        prepared = guest.prepared
        if prepared is not None and await self._migrator.holder(prepared) is not None:
            await self._migrator.settle(guest)
        if guest.run is not None and _lives(guest.run):
            await guest.leave_as_found()
            if guest.left:
                return
        run = guest.run or self._records.read(guest.vm)
        tried = claims.failures(guest.prepared.plan.claims) if guest.prepared is not None else []
        await guest.detach()
        await self._migrator.release(guest)
        guest.last_error = (tried[-1] if tried else guest.last_error) or "its process has ended"
        if run is not None and not _lives(run):
            self._remove(guest.vm, run)

    def _remove(self, vm: str, run: VmProcessRecord) -> None:
        if run.ours:
            remove_files(run.ram_file, *successor.sockets_of(run.argv))
        remove_files(self._launcher.usual_capabilities(vm))
        self._records.forget(vm)

    async def close(self, *, stop_vms: bool) -> None:
        """Stop looking, release what is not under way, and release all VMs, or stop ours."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.gather(*(self._close(guest, stop=stop_vms) for guest in self._guests.values()))
        if stop_vms:
            self._launcher.remove_folders(self._guests)

    async def _close(self, guest: Guest, *, stop: bool) -> None:
        prepared = guest.prepared
        if prepared is not None and (stop or claims.current(prepared.plan.claims)[1] is None):
            await self._migrator.release(guest)
        run = guest.run
        if stop and run is not None and run.ours:
            await self._stop(guest, run)
        elif stop and run is None:
            former = self._records.read(guest.vm)
            if former is not None and not _lives(former):
                self._remove(guest.vm, former)
        if guest.prepared is not None and guest.prepared.qmp is not None:
            await guest.prepared.qmp.close()
        await guest.detach()

    async def _stop(self, guest: Guest, run: VmProcessRecord) -> None:
        """Ask the guest to shut down, then QEMU to end, then the kernel."""
        guest.expect_end()
        ended = asyncio.Event()
        state, qmp = guest.state, guest.qmp
        try:
            watch = ExitWatch(run.pid, ended.set)
        except ProcessLookupError:
            ended.set()
        else:
            steps = [("system_powerdown", self._options.powerdown_s)] if state == "running" else []
            for command, patience_s in [*steps, ("quit", _QUIT_S)]:
                if qmp is None or ended.is_set():
                    break
                with suppress(QmpFailed, TimeoutError):
                    async with asyncio.timeout(patience_s):
                        await qmp.execute(command)
                        await ended.wait()
            if not ended.is_set():
                kill(run.pid, run.start_ticks)
                with suppress(TimeoutError):
                    async with asyncio.timeout(_QUIT_S):
                        await ended.wait()
            watch.close()
        await guest.detach()
        self._remove(guest.vm, run)


def _lives(run: VmProcessRecord) -> bool:
    return run.boot_id == boot_id() and alive(run.pid, run.start_ticks)


def _method(plan: SwapPlan | ReplacePlan) -> Method:
    if isinstance(plan, SwapPlan):
        return "swap"
    return "replace" if plan.across is None else "kexec"
