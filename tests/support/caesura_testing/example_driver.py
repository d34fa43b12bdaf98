"""The worked example of ``docs/develop/driver.md``: a driver whose VM is one program in a session of its own.

It is a plug-in, and held to the conformance suite as the others are. It keeps nothing on disk: a VM is found again by a variable in its
environment, so an updater that dies between the start of a VM and a note of it starts no second one.
"""

from __future__ import annotations

import asyncio
import signal
import threading
import time
from collections.abc import Mapping
from functools import partial
from typing import Annotated, Literal

import msgspec
import structlog
from msgspec import Meta

from caesura.contract.messages import Method, VmState
from caesura.runtime.threads import in_thread, in_thread_to_its_end
from caesura_host_updater.drivers.plugin import DriverPlugin, DriverSetup
from caesura_host_updater.drivers.port import (
    Capabilities,
    DriverError,
    FreezeFailed,
    NotPossible,
    NotRunningYet,
)
from caesura_host_updater.inventory.vm_spec import VmSpec
from caesura_host_updater.spawn import ExitWatch, SpawnError, reap, start_detached
from caesura_vmcontrol.freezer_control import Condition
from caesura_vmcontrol.process_control import find_by_env
from caesura_vmcontrol.procfs import process_table, read_process, send_signal
from caesura_vmcontrol.resume_plans import SignalPlan
from caesura_vmcontrol.vm_control import condition, resume_vm

_log = structlog.get_logger("caesura.driver")

_LOOK_S = 0.002  # s: between two looks at a VM; signals notify nobody
_MISSING: Mapping[str, str] = {
    "swap": "the example driver has nothing that could take a program over",
    "replace": "the example driver cannot save a program to a file",
    "reboot": "the example driver does not restart VMs for an update",
}
_STATES: Mapping[Condition, VmState] = {
    "running": "running",
    "held": "paused",
    "frozen": "paused",
    "gone": "stopped",
}


# -- the host file --------------------------------------------------------------------------------------------


class Program(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The table ``[vm.example]``."""

    argv: Annotated[tuple[str, ...], Meta(min_length=1)]


class ExampleVm(VmSpec, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The common keys of a VM, and the driver's own: each has a default."""

    example: Program | None = None


class ExampleOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The table ``[example]``."""

    stop_s: Annotated[float, Meta(gt=0, le=600)] = 5.0
    """How long a VM may take to end when it is stopped, before it is killed."""


class ExamplePlugin(DriverPlugin[ExampleVm, ExampleOptions]):
    """What the entry point names."""

    name = "example"
    takes = "[vm.example]"
    vm_type = ExampleVm
    options_type = ExampleOptions
    mechanisms = frozenset(("signal",))

    def vm_error(self, vm: ExampleVm, options: ExampleOptions) -> str:  # noqa: ARG002 - the port's
        """A VM without a program is not one."""
        return "" if vm.example is not None else "has no [vm.example]: give it an argv"

    async def build(self, setup: DriverSetup[ExampleVm, ExampleOptions]) -> ExampleDriver:
        """Nothing is started before ``open``."""
        return ExampleDriver(setup)


# -- the driver -----------------------------------------------------------------------------------------------


class ExampleDriver:
    """Has ``Driver`` only: it cannot swap, replace, read memory or set a clock."""

    name = "example"

    def __init__(self, setup: DriverSetup[ExampleVm, ExampleOptions]) -> None:
        self._setup = setup
        self._programs = {vm.name: vm.example for vm in setup.vms if vm.example is not None}
        self._runs: dict[str, SignalPlan] = {}
        """The VMs that run, or are paused."""
        self._watches: dict[str, ExitWatch] = {}
        self._not_started: dict[str, str] = {}
        self._change = asyncio.Event()

    def detail(self) -> str:
        """Shown in the inventory."""
        return "stopped by signals"

    def capabilities(self, vm: str) -> Capabilities:  # noqa: ARG002 - the same for all
        """Says why it cannot do the rest: plans show it."""
        return Capabilities(
            methods=("live", "freeze"), missing=_MISSING, clock="simulated", no_digest="has no memory file"
        )

    def ping(self) -> str:
        """Names VMs that do not run, and why."""
        wrong = [
            f"{vm} ({self._not_started[vm]})" if vm in self._not_started else vm
            for vm in self._programs
            if vm not in self._runs
        ]
        return f"not running: {', '.join(wrong)}" if wrong else ""

    def health_error(self, vm: str) -> str:
        """Why it was not started."""
        return self._not_started.get(vm, "")

    def process_of(self, vm: str) -> str:
        """For people."""
        return f"process {self._runs[vm].leader}" if vm in self._runs else ""

    async def open(self) -> None:
        """Adopt what runs, start the others. One that cannot be started must not keep the others from being resumed."""
        for vm, program in self._programs.items():
            try:
                found = await in_thread(f"find {vm}", partial(self._find, vm))
                self._watch(found or await self._start(vm, program))
            except (SpawnError, ProcessLookupError) as error:
                self._not_started[vm] = str(error) or "it ended at once"
                _log.error("vm.not_started", vm=vm, why=self._not_started[vm])

    def _mark(self, vm: str) -> str:
        return f"EXAMPLE_DRIVER_VM={self._setup.state_dir / vm}"

    def _find(self, vm: str) -> SignalPlan | None:
        """The leader of its session; its children carry the mark, too. Blocking."""
        leaders = [each for each in find_by_env(self._mark(vm)) if each.pid == each.session]
        return SignalPlan(vm, leaders[0].pid, leaders[0].start_ticks) if leaders else None

    async def _start(self, vm: str, program: Program) -> SignalPlan:
        name, _, value = self._mark(vm).partition("=")
        environ = {**self._setup.environ, name: value, "CAESURA_VM": vm, "CAESURA_HOST": self._setup.host}
        pid = await start_detached(program.argv, environ, self._setup.state_dir / f"{vm}.log")
        process = read_process(pid)
        if process is None:
            raise ProcessLookupError
        return SignalPlan(vm, pid, process.start_ticks)

    def _watch(self, plan: SignalPlan) -> None:
        self._watches[plan.vm] = ExitWatch(plan.leader, lambda: self._ended(plan.vm))
        self._runs[plan.vm] = plan

    def _ended(self, vm: str) -> None:
        self._runs.pop(vm, None)
        self._change.set()

    async def changed(self) -> None:
        """Set by the kernel, through the watch."""
        await self._change.wait()
        self._change.clear()

    async def close(self, *, stop_vms: bool) -> None:
        """VMs outlive the updater, unless they are to be stopped."""
        for watch in self._watches.values():
            watch.close()
        if stop_vms:
            until = time.monotonic() + self._setup.options.stop_s
            stops = [in_thread(f"stop {vm}", partial(_stop, plan, until)) for vm, plan in self._runs.items()]
            await asyncio.gather(*stops)
            self._runs.clear()

    # -- states come from the kernel --------------------------------------------------------------------------

    async def read_states(self) -> Mapping[str, VmState]:
        """In a thread: a process table may be long."""
        return await in_thread("states", self.states)

    def states(self) -> Mapping[str, VmState]:
        """One look at the process table for all. Blocking."""
        table = process_table()
        stopped: dict[str, VmState] = dict.fromkeys(self._programs, "stopped")
        return stopped | {vm: _STATES[condition(plan, table)] for vm, plan in tuple(self._runs.items())}

    # -- pause and resume -------------------------------------------------------------------------------------

    async def prepare(self, vm: str, operation: str, method: Method, binary: str) -> None:  # noqa: ARG002 - the port's
        """A freeze needs nothing; what is not possible is refused here, before anything is paused."""
        if method in _MISSING:
            raise NotPossible(vm, _MISSING[method])

    async def release(self, vm: str) -> None:
        """Nothing was prepared."""

    def resume_plan(self, vm: str) -> SignalPlan:
        """How the pause guard resumes it alone."""
        if vm not in self._runs:
            raise DriverError(vm, "is not running")
        return self._runs[vm]

    async def freeze(self, vm: str, by: float) -> None:
        """Cancelled, it waits for its thread: nothing of it stops the VM later."""
        if vm not in self._runs:
            raise FreezeFailed(vm, "is not running")
        plan = self._runs[vm]
        await in_thread_to_its_end(f"freeze {vm}", lambda stop: _freeze(plan, by, stop))

    async def resume(self, vm: str, timeout_s: float) -> Literal["running", "gone", "left"]:
        """Right in every state."""
        plan = self._runs.get(vm)
        if plan is None:
            return "gone"
        return await in_thread(f"resume {vm}", lambda: _resume(plan, time.monotonic() + timeout_s))

    def why_left(self, vm: str) -> str:  # noqa: ARG002 - the port's
        """It is never left."""
        return ""


def _freeze(plan: SignalPlan, by: float, stop: threading.Event) -> None:
    while not stop.is_set():
        if time.monotonic() >= by:
            raise FreezeFailed(plan.vm, "it was too late to freeze it, or it is not paused yet")
        for member in plan.members(process_table()):
            send_signal(member.pid, member.start_ticks, signal.SIGSTOP)
        state = condition(plan)
        if state == "frozen":
            return
        if state == "gone":
            raise FreezeFailed(plan.vm, "ended while it was being frozen")
        stop.wait(_LOOK_S)
    raise FreezeFailed(plan.vm, "its freeze was called off")


def _resume(plan: SignalPlan, until: float) -> Literal["running", "gone"]:
    while (state := condition(plan)) not in ("running", "gone"):
        if time.monotonic() >= until:
            raise NotRunningYet(plan.vm, f"is {state}")
        resume_vm(plan)
        time.sleep(_LOOK_S)
    return "running" if state == "running" else "gone"


def _stop(plan: SignalPlan, until: float) -> None:
    """SIGTERM, and SIGKILL to what is left at ``until``. Blocking."""
    resume_vm(plan)
    send_signal(plan.leader, plan.start_ticks, signal.SIGTERM)
    while condition(plan) != "gone":
        if time.monotonic() >= until:
            for member in plan.members(process_table()):
                send_signal(member.pid, member.start_ticks, signal.SIGKILL)
        time.sleep(_LOOK_S)
    reap(plan.leader)
