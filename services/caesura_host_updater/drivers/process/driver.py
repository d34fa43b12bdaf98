"""The ``process`` driver: a VM is a supervised process group, really frozen by the kernel.

The embedded default: no hypervisor needed. A frozen process still sees time pass, so its guest clock is
simulated, and everything that shows it says so. VMs are started below ``guest_init``, outlive the host
updater, and are found again at its next start by the run file that their first process wrote.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

from caesura.contract.messages import Method, ProofCode, VmState
from caesura.runtime.logs import get_logger
from caesura.runtime.threads import in_thread, in_thread_to_its_end
from caesura_host_updater.drivers.digest import digest_of
from caesura_host_updater.drivers.port import (
    Capabilities,
    DriverError,
    FreezeFailed,
    NotPossible,
    NotRunningYet,
)
from caesura_host_updater.drivers.process.definition import ProcessVm
from caesura_host_updater.drivers.process.freezers import (
    Freezer,
    ProcessGroupRecord,
    ProcessPlan,
    outside,
    plan_of,
    request_freeze,
)
from caesura_host_updater.drivers.process.init_spec import memory_file
from caesura_host_updater.drivers.process.supervisor import ProcessSupervisor
from caesura_host_updater.drivers.remote_pauses import ResumeTries
from caesura_host_updater.drivers.sampling import sampled_digest_of
from caesura_vmcontrol.freezer_control import Condition
from caesura_vmcontrol.procfs import Process, process_table
from caesura_vmcontrol.resume_plans import CgroupPlan, SignalPlan
from caesura_vmcontrol.vm_control import condition, resume_vm

_LOOK_S = 0.002  # s: between two looks at a VM that is to be paused or run: v1 and signals notify nobody
_KERNEL_S = 0.25  # s: what a try of a resume may take longer than it was given
_TABLE_AGE_S = 0.001  # s: so freezing many VMs reads the process table once a round, not once a VM
_SETTLE_S = 0.004  # s: a stop by signals must last this long to count: somebody may send SIGCONT all the time

_log = get_logger("caesura.driver")


_MISSING: Mapping[str, str] = {
    "swap": "the process driver has no second VMM that could take over a process",
    "replace": "the process driver cannot save a process to a file and start it again",
}


_NO_MEMORY_FILE = "has no memory file (ram_bytes)"


class ProcessDriver:
    """See the module.

    Args:
        host: the host's name, passed to the VMs' processes.
        specs: the VMs of the host file.
        state_dir: where run files, logs and memory files live.
        freezer: how VMs started from now on are frozen; one that runs already keeps its own.
        environ: what the VMs' processes inherit.
        max_digest_bytes: memory files above this are not digested.
    """

    name = "process"

    def __init__(
        self,
        host: str,
        specs: tuple[ProcessVm, ...],
        state_dir: Path,
        freezer: Freezer,
        *,
        environ: Mapping[str, str],
        max_digest_bytes: int,
    ) -> None:
        self._specs = {spec.name: spec for spec in specs}
        self._folder = state_dir / "vms"
        self._freezer = freezer
        self._max_digest_bytes = max_digest_bytes
        self._supervisor = ProcessSupervisor(host, specs, self._folder, freezer, environ)
        self._failed_processes: Mapping[str, str] = {}
        """VMs of whose processes some have failed, and which; as last looked."""
        self._table: tuple[float, Mapping[int, Process]] = (0.0, {})
        self._table_turn = threading.Lock()
        self._tries: ResumeTries[Literal["running", "gone"]] = ResumeTries()
        """Tries that wait for the kernel."""
        self._readers = ThreadPoolExecutor(max_workers=2, thread_name_prefix="digest")

    def detail(self) -> str:
        """The freezer."""
        return f"frozen by {self._freezer.kind}"

    def capabilities(self, vm: str) -> Capabilities:
        """The same for every VM, but for its memory file."""
        digests: tuple[ProofCode, ...] = ("sampled_digest_equal",) if self._specs[vm].ram_bytes else ()
        if self.memory_size(vm):
            digests = ("digest_equal", *digests)
        return Capabilities(
            methods=("live", "freeze", "reboot"),
            missing=_MISSING,
            clock="simulated",
            digests=digests,
            no_digest="" if digests else _NO_MEMORY_FILE,
        )

    def ping(self) -> str:
        """Names VMs that do not run."""
        ended = [
            f"{vm} ({self._supervisor.not_started[vm]})" if vm in self._supervisor.not_started else vm
            for vm in self._specs
            if vm not in self._supervisor.runs
            and (vm not in self._supervisor.shutting_down or vm in self._supervisor.not_started)
        ]
        incomplete = [
            f"{vm} ({why})" for vm, why in self._failed_processes.items() if vm in self._supervisor.runs
        ]
        parts = {"not running": ended, "not whole": incomplete}
        return "; ".join(f"{what}: {', '.join(vms)}" for what, vms in parts.items() if vms)

    def health_error(self, vm: str) -> str:
        """Why a VM was not started, or which of its processes has failed."""
        return self._supervisor.not_started.get(vm, "") or (
            self._failed_processes.get(vm, "") if vm in self._supervisor.runs else ""
        )

    async def open(self) -> None:
        """Adopt the VMs that run, start the others, all at once."""
        await self._supervisor.open()

    async def changed(self) -> None:
        """Wait until a VM ended by itself."""
        await self._supervisor.changed()

    async def close(self, *, stop_vms: bool) -> None:
        """Stop watching; with ``stop_vms``, stop the VMs too and remove what they leave behind."""
        await self._supervisor.close(stop_vms=stop_vms)
        self._readers.shutdown(wait=False, cancel_futures=True)

    def _processes(self, run: ProcessGroupRecord) -> Mapping[int, Process] | None:
        """The process table, one for all VMs that ask within the same few milliseconds; None: not needed."""
        return self._process_table() if run.kind == "sigstop" else None

    def _process_table(self) -> Mapping[int, Process]:
        with self._table_turn:
            if time.monotonic() - self._table[0] > _TABLE_AGE_S:
                self._table = (time.monotonic(), process_table())
            return self._table[1]

    # -- freezing -----------------------------------------------------------------------------------------

    async def prepare(self, vm: str, operation: str, method: Method, binary: str) -> None:  # noqa: ARG002 - the port's
        """Nothing to get ready for a freeze; anything else is not possible."""
        if method in _MISSING:
            raise NotPossible(vm, _MISSING[method])

    async def release(self, vm: str) -> None:
        """Nothing was prepared."""

    def process_of(self, vm: str) -> str:
        """Its first process."""
        run = self._supervisor.runs.get(vm)
        return f"process group {run.pid}" if run is not None else ""

    async def read_states(self) -> Mapping[str, VmState]:
        """Read from the kernel, in a thread: a process table may be long, a cgroup busy."""
        return await in_thread("states", self.states)

    def states(self) -> Mapping[str, VmState]:
        """Read from the kernel, one process table for all. Blocking."""
        runs = dict(self._supervisor.runs)
        table = process_table() if any(run.kind == "sigstop" for run in runs.values()) else {}
        shown: dict[Condition, VmState] = {
            "running": "running",
            "held": "paused",
            "frozen": "paused",
            "gone": "stopped",
        }
        found: dict[str, VmState] = dict.fromkeys(self._specs, "stopped")
        self._failed_processes = {vm: why for vm in runs if (why := self._supervisor.failures(vm))}
        for vm, run in runs.items():
            plan: ProcessPlan = (
                SignalPlan(vm, run.pid, run.start_ticks) if run.kind == "sigstop" else plan_of(vm, run)
            )
            try:
                found[vm] = shown[condition(plan, table)]
            except OSError:
                found[vm] = "unknown"
        return found

    def resume_plan(self, vm: str) -> ProcessPlan:
        """The plan for the guard, with the processes of this moment."""
        run = self._supervisor.runs.get(vm)
        if run is None:
            raise DriverError(vm, "is not running")
        return plan_of(vm, run, self._processes(run))

    async def freeze(self, vm: str, by: float) -> None:
        """Ask, then look until the kernel says that everything of the VM is frozen."""
        run = self._supervisor.runs.get(vm)
        if run is None:
            raise FreezeFailed(vm, "is not running")
        try:
            await in_thread_to_its_end(f"freeze {vm}", lambda stop: self._freeze(vm, run, by, stop))
        except OSError as error:
            raise FreezeFailed(vm, f"{run.kind}: {error}") from error

    def _freeze(self, vm: str, run: ProcessGroupRecord, by: float, stop: threading.Event) -> None:
        plan = self._supervisor.frozen[vm] = plan_of(vm, run, self._processes(run))
        called_at = time.monotonic()
        frozen_since: float | None = None
        if stop.is_set() or called_at >= by:
            raise FreezeFailed(vm, "it was too late to freeze it")
        request_freeze(plan, self._processes(run))
        while not stop.is_set():
            state, now = condition(plan, self._processes(run)), time.monotonic()
            if state == "gone" or vm not in self._supervisor.runs:
                raise FreezeFailed(vm, "ended while it was being frozen")
            if state == "frozen":
                frozen_since = now if frozen_since is None else frozen_since
                if isinstance(plan, CgroupPlan):
                    self._check_whole(plan, run)
                    return
                if now - frozen_since >= _SETTLE_S:
                    return
            else:
                frozen_since = None
            if now >= by:
                raise FreezeFailed(vm, f"is not frozen after {now - called_at:.2f} s ({state})")
            if run.kind == "sigstop" and state != "frozen":
                # a process forked in the meantime, or somebody sent SIGCONT
                request_freeze(plan, self._processes(run))
            stop.wait(_LOOK_S)
        raise FreezeFailed(vm, "its freeze was called off")

    def _check_whole(self, plan: CgroupPlan, run: ProcessGroupRecord) -> None:
        strays = outside(plan, run, self._process_table())
        if strays:
            raise FreezeFailed(
                plan.vm,
                f"processes of it are in another cgroup than {Path(plan.control).parent} and run on: {strays}; "
                "start them without what moves them, or use freezer sigstop",
            )

    def why_left(self, vm: str) -> str:  # noqa: ARG002 - the port's
        """A frozen process is nobody else's."""
        return ""

    async def resume(self, vm: str, timeout_s: float) -> Literal["running", "gone", "left"]:
        """Ask, then look until everything of the VM runs."""
        return await self._tries.resume(
            vm, timeout_s + _KERNEL_S, lambda: self._resume(vm, timeout_s), "the kernel does not answer"
        )

    def _resume(self, vm: str, timeout_s: float) -> Literal["running", "gone"]:
        run = self._supervisor.runs.get(vm) or self._supervisor.read_run(vm)
        if run is None:
            return "gone"
        plan = self._supervisor.frozen.get(vm) or plan_of(vm, run, self._processes(run))
        until = time.monotonic() + timeout_s
        state: Condition = "held"
        try:
            while True:
                state = condition(plan)
                if state in ("gone", "running"):
                    self._supervisor.frozen.pop(vm, None)
                    return "running" if state == "running" and vm in self._supervisor.runs else "gone"
                if time.monotonic() >= until:
                    raise NotRunningYet(vm, f"{run.kind} says {state} after {timeout_s:.2f} s")
                resume_vm(plan)
                if condition(plan) != "running":
                    time.sleep(_LOOK_S)
        except OSError as error:
            raise NotRunningYet(vm, f"{run.kind}: {error}") from error

    # -- an update that needs a reboot --------------------------------------------------------------------

    async def shut_down(self, vm: str, by: float) -> str:
        """SIGTERM to all processes of the VM."""
        await self._supervisor.shut_down(vm, by)
        return "SIGTERM"

    async def kill(self, vm: str, by: float) -> None:
        """SIGKILL to all processes of the VM."""
        await self._supervisor.kill(vm, by)

    async def start(self, vm: str, down_by: float) -> bool:
        """Start its processes again."""
        return await self._supervisor.start(vm, down_by)

    # -- memory ------------------------------------------------------------------------------------------

    def memory_size(self, vm: str) -> int:
        """The size of the VM's memory file, 0 where there is none or it is above the limit."""
        size = self._specs[vm].ram_bytes
        return size if size <= self._max_digest_bytes else 0

    async def memory_digest(self, vm: str, stop_at: float) -> str | None:
        """BLAKE2b over the memory file that the VM's processes map."""
        if not self.memory_size(vm):
            raise NotPossible(vm, "has no memory file, or one above the limit for digests")
        loop = asyncio.get_running_loop()
        try:
            return await loop.run_in_executor(
                self._readers, digest_of, memory_file(self._folder, vm), stop_at
            )
        except (OSError, ValueError) as error:
            raise DriverError(vm, f"its memory file cannot be read: {error}") from error

    async def sampled_digest(self, vm: str, seed: str) -> str:
        """BLAKE2b over pages of the memory file that the VM's processes map."""
        if not self._specs[vm].ram_bytes:
            raise NotPossible(vm, _NO_MEMORY_FILE)
        loop = asyncio.get_running_loop()
        try:
            return await loop.run_in_executor(
                self._readers, sampled_digest_of, memory_file(self._folder, vm), seed
            )
        except (OSError, ValueError) as error:
            raise DriverError(vm, f"its memory file cannot be read: {error}") from error
