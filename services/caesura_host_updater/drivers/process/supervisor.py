"""Process VMs from start to end: adopted or started, watched, stopped, and what one leaves behind is ended."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

import msgspec

from caesura.runtime.logs import get_logger
from caesura.runtime.threads import in_thread, in_thread_to_its_end
from caesura_host_updater.drivers.port import (
    DriverError,
    ShutdownFailed,
)
from caesura_host_updater.drivers.process import guest_init
from caesura_host_updater.drivers.process.definition import ProcessVm
from caesura_host_updater.drivers.process.freezers import (
    Freezer,
    ProcessGroupRecord,
    ProcessPlan,
    plan_of,
)
from caesura_host_updater.drivers.process.init_spec import ended_file, init_spec
from caesura_host_updater.drivers.shutdown_requests import ShutdownRequests
from caesura_host_updater.spawn import ExitWatch, SpawnError, reap, start_detached
from caesura_vmcontrol.procfs import alive, boot_id, process_table, send_signal
from caesura_vmcontrol.resume_plans import SignalPlan
from caesura_vmcontrol.vm_control import condition, resume_vm

_START_TIMEOUT_S = 15.0  # s: a VM's first process needs some 20 ms; this is for a machine that thrashes
_STOP_TIMEOUT_S = guest_init.TERM_GRACE_S + 2.0
_LOOK_S = 0.002  # s: between two looks at a VM that is to start or to end

_log = get_logger("caesura.driver")


class ProcessSupervisor:
    """See the module.

    Args:
        host: the host's name, passed to the VMs' processes.
        specs: the VMs of the host file.
        folder: where run files, logs and memory files live.
        freezer: how VMs started from now on are frozen; one that runs already keeps its own.
        environ: what the VMs' processes inherit.
    """

    def __init__(
        self,
        host: str,
        specs: tuple[ProcessVm, ...],
        folder: Path,
        freezer: Freezer,
        environ: Mapping[str, str],
    ) -> None:
        self._host = host
        self._specs = {spec.name: spec for spec in specs}
        self._folder = folder
        self._freezer = freezer
        self._environ = dict(environ)
        self.runs: dict[str, ProcessGroupRecord] = {}
        """The VMs that run."""
        self.not_started: dict[str, str] = {}
        """Why a VM was not started."""
        self.frozen: dict[str, ProcessPlan] = {}
        """Plans of VMs that were asked to freeze, with the processes of that moment."""
        self.shutting_down: set[str] = set()
        """VMs that were asked to shut down and were not started again yet."""
        self._requests = ShutdownRequests(folder)
        self._ends: dict[str, asyncio.Event] = {}
        """Set when the VM's first process has ended; a new one with each process."""
        self._starts: dict[str, asyncio.Lock] = {vm: asyncio.Lock() for vm in self._specs}
        self._late: dict[str, asyncio.Task[None]] = {}
        """VMs that were asked to shut down and did not in time: started when they end after all."""
        self._watches: dict[str, ExitWatch] = {}
        self._cleanup_tasks: set[asyncio.Task[None]] = set()
        self._change = asyncio.Event()

    async def open(self) -> None:
        """Adopt the VMs that run, start the others, all at once."""
        await in_thread("state folder", lambda: self._folder.mkdir(parents=True, exist_ok=True, mode=0o700))
        await asyncio.gather(*(self._try_to_start(spec) for spec in self._specs.values()))

    async def _try_to_start(self, spec: ProcessVm) -> None:
        try:
            await self._adopt_or_start(spec)
        except DriverError as error:
            self.not_started[spec.name] = error.why
            _log.error("vm.not_started", vm=spec.name, why=error.why)

    async def _adopt_or_start(self, spec: ProcessVm) -> None:
        run = await in_thread(f"find {spec.name}", lambda: self.read_run(spec.name))
        if run is not None and alive(run.pid, run.start_ticks) and run.boot_id == boot_id():
            self._watch(spec.name, run)
            _log.info("vm.adopted", vm=spec.name, pid=run.pid, freezer=run.kind)
            if await in_thread("shutdown request", lambda: self._requests.left_s(spec.name)):
                self.shutting_down.add(spec.name)
                self._start_when_ended(spec.name)
            return
        if run is not None:
            former = run
            await self._clean_up(spec.name, lambda: plan_of(spec.name, former))
        await self._start(spec)

    def read_run(self, vm: str) -> ProcessGroupRecord | None:
        """The run file that its first process wrote; None: there is none. Blocking. Raises DriverError."""
        try:
            return msgspec.json.decode(
                (self._folder / f"{vm}.run.json").read_bytes(), type=ProcessGroupRecord
            )
        except FileNotFoundError:
            return None
        except (OSError, msgspec.DecodeError) as error:
            raise DriverError(vm, f"its run file cannot be read: {error}") from error

    async def _start(self, spec: ProcessVm) -> None:
        vm = spec.name
        run_file = self._folder / f"{vm}.run.json"

        def start() -> list[str]:
            run_file.unlink(missing_ok=True)
            ended_file(self._folder, vm).unlink(missing_ok=True)
            control = self._freezer.create_cgroup(vm)
            spec_file = self._folder / f"{vm}.spec.json"
            spec_file.write_bytes(
                init_spec(spec, self._host, self._folder, self._freezer.kind, control, self._environ)
            )
            spec_file.chmod(0o600)
            return [sys.executable, "-I", "-S", guest_init.__file__, str(spec_file)]

        try:
            argv = await in_thread(f"start {vm}", start)
            pid = await start_detached(argv, self._environ, self._folder / f"{vm}.log")
        except (OSError, SpawnError) as error:
            self._freezer.remove(vm)
            raise DriverError(vm, f"cannot be started: {error}") from error
        ended = asyncio.Event()
        watch = ExitWatch(pid, ended.set)
        try:
            async with asyncio.timeout(_START_TIMEOUT_S):
                # The run file appears, or the process ends. It has no way to call us: we may be another
                # host updater by then.
                while not ended.is_set() and not await in_thread(f"look for {vm}", run_file.exists):  # noqa: ASYNC110
                    await asyncio.sleep(_LOOK_S)
        except TimeoutError:
            os.kill(pid, signal.SIGKILL)
            raise DriverError(vm, f"did not start within {_START_TIMEOUT_S:g} s") from None
        finally:
            watch.close()
        run = await in_thread(f"find {vm}", lambda: self.read_run(vm))
        if run is None:
            reap(pid)
            why = await in_thread(f"log of {vm}", lambda: self._log_tail(vm))
            raise DriverError(vm, f"cannot be started: {why}")
        await in_thread(f"{vm} runs", lambda: self._requests.forget(vm))
        self.shutting_down.discard(vm)
        self.not_started.pop(vm, None)
        self._watch(vm, run)
        _log.info("vm.started", vm=vm, pid=run.pid, freezer=run.kind)

    def _log_tail(self, vm: str) -> str:
        try:
            lines = (self._folder / f"{vm}.log").read_text(errors="replace").splitlines()
        except OSError:
            lines = []
        return lines[-1].removeprefix("guest_init: ") if lines else "it ended at once"

    def _watch(self, vm: str, run: ProcessGroupRecord) -> None:
        self.runs[vm] = run
        self._ends[vm] = asyncio.Event()
        try:
            self._watches[vm] = ExitWatch(run.pid, lambda: self._ended(vm))
        except ProcessLookupError:
            self._ended(vm)

    def _ended(self, vm: str) -> None:
        run = self.runs.pop(vm, None)
        self._watches.pop(vm, None)
        self._ends[vm].set()
        self._change.set()
        _log.warning("vm.ended", vm=vm)
        if run is not None:
            cleanup = asyncio.create_task(self._clean_up(vm, lambda: self.frozen.get(vm) or plan_of(vm, run)))
            self._cleanup_tasks.add(cleanup)
            cleanup.add_done_callback(self._cleanup_tasks.discard)

    async def changed(self) -> None:
        """Wait until a VM ended by itself."""
        await self._change.wait()
        self._change.clear()

    async def close(self, *, stop_vms: bool) -> None:
        """Stop watching; with ``stop_vms``, stop the VMs too and remove what they leave behind."""
        runs = dict(self.runs)
        for late in self._late.values():
            late.cancel()
        await asyncio.gather(*self._late.values(), return_exceptions=True)
        for watch in self._watches.values():
            watch.close()
        self._watches.clear()
        if stop_vms:
            await asyncio.gather(*(self._stop(vm, run) for vm, run in runs.items()))
            for vm in self._specs:
                self._freezer.remove(vm)
                await in_thread(f"forget {vm}", lambda vm=vm: self._requests.forget(vm))  # type: ignore[misc]
            self.runs.clear()
        if self._cleanup_tasks:
            await asyncio.wait(self._cleanup_tasks)

    # -- an update that needs a reboot ----------------------------------------------------------------------

    async def shut_down(self, vm: str, by: float) -> None:
        """SIGTERM to every process of the VM but the first, which ends with the last of them; nothing is killed.

        Raises:
            ShutdownFailed: it still runs at ``by`` on CLOCK_MONOTONIC, or the request could not be noted.
        """
        run = self.runs.get(vm)
        self.shutting_down.add(vm)
        if run is None:
            return
        try:
            await in_thread(f"shut down {vm}", lambda: self._terminate(vm, run))
        except OSError as error:
            self.shutting_down.discard(vm)
            raise ShutdownFailed(vm, f"it was not asked: the request cannot be noted: {error}") from error
        if not await self._ended_by(vm, by):
            raise ShutdownFailed(
                vm, "its processes did not all end after SIGTERM, and none was killed", asked=True
            )
        while self._cleanup_tasks:
            await asyncio.wait(set(self._cleanup_tasks))

    async def kill(self, vm: str, by: float) -> None:
        """SIGKILL to every process of a VM that was asked to shut down; its first process ends with the last of them.

        Raises:
            ShutdownFailed: it still runs at ``by`` on CLOCK_MONOTONIC.
        """
        run = self.runs.get(vm)
        if run is None or vm not in self.shutting_down:
            return
        # Its first process kills what is below it, wherever that moved to.
        send_signal(run.pid, run.start_ticks, signal.SIGALRM)
        if not await self._ended_by(vm, by):
            raise ShutdownFailed(vm, "its processes did not all end after SIGKILL", asked=True)
        while self._cleanup_tasks:
            await asyncio.wait(set(self._cleanup_tasks))

    def _terminate(self, vm: str, run: ProcessGroupRecord) -> None:
        self._requests.note(vm)
        for member in SignalPlan(vm, run.pid, run.start_ticks).members(process_table()):
            if member.pid != run.pid:
                send_signal(member.pid, member.start_ticks, signal.SIGTERM)

    async def _ended_by(self, vm: str, by: float) -> bool:
        """Wait until nothing of the VM is left; whether that came about."""
        try:
            async with asyncio.timeout(max(by - time.monotonic(), 0.0)):
                await self._ends[vm].wait()
        except TimeoutError:
            return False
        return True

    async def start(self, vm: str, down_by: float) -> bool:
        """Start it when it has ended; one that still runs at ``down_by`` is left, and started when it ends.

        Raises:
            DriverError: it cannot be started.
        """
        if vm in self.runs and (vm not in self.shutting_down or not await self._ended_by(vm, down_by)):
            if vm in self.shutting_down:
                self._start_when_ended(vm)
            return False
        async with self._starts[vm]:
            if vm in self.runs:
                return True
            while self._cleanup_tasks:  # what is left of it is killed: not what is started now
                await asyncio.wait(set(self._cleanup_tasks))
            try:
                await self._start(self._specs[vm])
            except DriverError as error:
                self.not_started[vm] = error.why
                raise
        self._change.set()
        return True

    def _start_when_ended(self, vm: str) -> None:
        if vm not in self._late or self._late[vm].done():
            self._late[vm] = asyncio.create_task(self._start_late(vm), name=f"start {vm} when it has ended")

    async def _start_late(self, vm: str) -> None:
        left_s = await in_thread("shutdown request", lambda: self._requests.left_s(vm))
        if await self._ended_by(vm, time.monotonic() + left_s):
            _log.warning("vm.ended_late", vm=vm, hint="it was asked to shut down, and is started again")
            with suppress(DriverError):
                await self.start(vm, 0.0)
        else:
            self.shutting_down.discard(vm)
            await in_thread("shutdown request", lambda: self._requests.forget(vm))

    async def _stop(self, vm: str, run: ProcessGroupRecord) -> None:
        plan = await in_thread(f"stop {vm}", lambda: self._let_run(vm, run))
        ended = asyncio.Event()
        try:
            watch = ExitWatch(run.pid, ended.set)
        except ProcessLookupError:
            ended.set()
        else:
            send_signal(run.pid, run.start_ticks, signal.SIGTERM)
            try:
                async with asyncio.timeout(_STOP_TIMEOUT_S):
                    await ended.wait()
            except TimeoutError:
                send_signal(run.pid, run.start_ticks, signal.SIGKILL)
            finally:
                watch.close()
        await self._clean_up(vm, lambda: plan)
        reap(run.pid)
        run_file = self._folder / f"{vm}.run.json"
        await in_thread(f"forget {vm}", lambda: run_file.unlink(missing_ok=True))

    def _let_run(self, vm: str, run: ProcessGroupRecord) -> ProcessPlan:
        plan = plan_of(vm, run)
        with suppress(OSError):
            resume_vm(plan)
        return plan

    async def _clean_up(self, vm: str, find: Callable[[], ProcessPlan]) -> None:
        """End what a VM left behind when its first process is dead."""
        with suppress(OSError):
            await in_thread_to_its_end(f"bury {vm}", lambda stop: self._kill_remaining(find(), stop))

    @staticmethod
    def _kill_remaining(plan: ProcessPlan, stop: threading.Event) -> None:
        until = time.monotonic() + _STOP_TIMEOUT_S
        while condition(plan) != "gone" and time.monotonic() < until:
            if isinstance(plan, SignalPlan):
                for member in plan.members(process_table()):
                    send_signal(member.pid, member.start_ticks, signal.SIGKILL)
            else:
                resume_vm(plan)  # a frozen v1 group does not even die
                for pid in (Path(plan.control).parent / "cgroup.procs").read_text().split():
                    with suppress(ProcessLookupError):
                        os.kill(int(pid), signal.SIGKILL)
            if stop.wait(_LOOK_S):
                return

    def failures(self, vm: str) -> str:
        """Which of the VM's own processes failed while the others run on; empty: none."""
        try:
            lines = ended_file(self._folder, vm).read_text(errors="replace").splitlines()
        except OSError:
            return ""
        return "; ".join(lines)[:1000]
