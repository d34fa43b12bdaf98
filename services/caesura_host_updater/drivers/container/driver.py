"""The ``container`` driver: the port's verbs over containers of Docker or Podman.

The engine pauses and resumes, the kernel's freezer is the witness. A container that runs is known by its first process, which is
watched; what the engine says of one that does not is asked again every second.
"""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Literal

from caesura.contract.messages import Method, VmState
from caesura.runtime.logs import get_logger
from caesura.runtime.threads import in_thread, in_thread_to_its_end
from caesura_host_updater.drivers.container.cgroup import NoFreezer
from caesura_host_updater.drivers.container.definition import (
    NO_LIVE_RESTORE,
    ContainerOptions,
    ContainerVm,
    EngineFacts,
    Inspected,
    engine_facts,
    inspected,
)
from caesura_host_updater.drivers.container.pausing import (
    ASK_S,
    NotFrozen,
    PausedBefore,
    PauseUnanswered,
    pause_container,
    plan_of_container,
)
from caesura_host_updater.drivers.port import (
    Capabilities,
    DriverError,
    FreezeFailed,
    NotPossible,
    NotRunningYet,
)
from caesura_host_updater.drivers.remote_pauses import LatePauses, ResumeTries
from caesura_host_updater.spawn import ExitWatch
from caesura_vmcontrol import container_engine
from caesura_vmcontrol.container_engine import EnginePlan, EngineRefused
from caesura_vmcontrol.freezer_control import Condition
from caesura_vmcontrol.procfs import alive, boot_id, read_process
from caesura_vmcontrol.resume_plans import plan_to_json
from caesura_vmcontrol.vm_control import condition, resume_vm

_START_S = 20.0  # s: to start a container
_STOP_S = 10  # s: between SIGTERM and SIGKILL when a container is stopped with the host updater
_NOTICE_S = 10.0  # s: for an engine to notice that a container's first process has ended
_LOOK_S = 1.0  # s: between two looks at containers that do not run, and at the engine
_STEP_S = 0.002  # s: between two looks at a container that is to run
_STATES: dict[Condition, VmState] = {
    "running": "running",
    "held": "paused",
    "frozen": "paused",
    "gone": "stopped",
}
_MISSING: Mapping[str, str] = {
    "swap": "there is no second process that could take a container over",
    "replace": "a container cannot be saved to a file and started again",
    "reboot": "the container driver does not restart containers for an update: recreate them by what made them",
}
PAUSED_BEFORE = "it was paused by somebody else before anything was done: resume it with `docker unpause`"

_log = get_logger("caesura.driver")


class ContainerDriver:
    """See the module.

    Args:
        specs: the VMs of the host file, and those that were discovered.
        options: the host file's table ``[container]``.
        state_dir: where run files live.
    """

    name = "container"

    def __init__(self, specs: tuple[ContainerVm, ...], options: ContainerOptions, state_dir: Path) -> None:
        self._specs = {spec.name: spec for spec in specs}
        self._options = options
        self._socket = str(Path(options.socket))
        self._folder = state_dir / "vms"
        self._runs: dict[str, EnginePlan] = {}
        """Containers that run, paused or not."""
        self._watches: dict[str, ExitWatch] = {}
        self._why: dict[str, str] = {}
        """Why a container does not run, or cannot be paused."""
        self._left: dict[str, str] = {}
        self._tries: ResumeTries[Literal["running", "gone"]] = ResumeTries()
        self._late = LatePauses(lambda noted: self._runs.get(noted.vm), "the engine", self._folder)
        self._engine_error = "it was not asked yet"
        self._engine = EngineFacts()
        self._change = asyncio.Event()
        self._looking: asyncio.Task[None] | None = None

    # -- life ---------------------------------------------------------------------------------------------

    async def open(self) -> None:
        """Find the containers that run, start those of the host file that do not."""
        await in_thread("state folder", lambda: self._folder.mkdir(parents=True, exist_ok=True, mode=0o700))
        await self._late.open(EnginePlan)
        await self._ask_engine()
        await asyncio.gather(*(self._open(spec) for spec in self._specs.values()))
        self._change.clear()  # what is found at the start has not changed
        self._looking = asyncio.create_task(self._look(), name="look at containers")

    async def _open(self, spec: ContainerVm) -> None:
        try:
            await self._find(spec)
            if spec.name not in self._runs and self._options.start and not spec.found:
                await self._start(spec)
        except DriverError as error:
            self._why[spec.name] = error.why
            _log.error("vm.not_started", vm=spec.name, why=error.why)

    async def _start(self, spec: ContainerVm) -> None:
        """Start it when the engine has noticed that it ended. Raises DriverError."""
        until = time.monotonic() + _NOTICE_S
        while (found := await self._inspect(spec)).running:
            if read_process(found.pid) is not None:
                return  # it runs, and cannot be paused: `_why` says so
            if time.monotonic() >= until:
                raise DriverError(spec.name, "its engine does not notice that it has ended")
            await asyncio.sleep(_STEP_S * 10)
        try:
            await in_thread(
                f"start {spec.name}", lambda: self._call("POST", spec.container_name, "/start", _START_S)
            )
        except OSError as error:
            raise DriverError(spec.name, f"cannot be started: {error}") from error
        await self._find(spec)
        _log.info("vm.started", vm=spec.name, container=spec.container_name)

    async def _find(self, spec: ContainerVm) -> None:
        """Attach it if it runs; else ``_why`` says what it does. Raises DriverError."""
        vm, found = spec.name, await self._inspect(spec)
        if not found.running or not found.pid:
            self._why[vm] = (
                f"container {spec.container_name} is {found.status or 'not running'}"
                f"{f' with exit code {found.exit_code}' if found.status == 'exited' else ''}"
            )
            return
        try:
            plan = await in_thread(f"look at {vm}", lambda: self._plan(vm, found))
        except (OSError, NoFreezer) as error:
            self._why[vm] = str(error)
            return
        if plan is not None:
            self._attach(plan)

    def _plan(self, vm: str, found: Inspected) -> EnginePlan | None:
        """How it is resumed; None: its first process has ended. Blocking. Raises OSError, NoFreezer."""
        plan = plan_of_container(vm, self._socket, found)
        if plan is None:
            return None
        part = self._folder / f"{vm}.container.part"
        part.write_text(json.dumps({**plan_to_json(plan), "boot_id": boot_id()}))
        part.replace(self._folder / f"{vm}.container.json")
        return plan

    def _attach(self, plan: EnginePlan) -> None:
        vm = plan.vm
        try:
            watch = ExitWatch(plan.pid, lambda: self._ended(vm))
        except ProcessLookupError:
            return
        if not alive(plan.pid, plan.start_ticks):
            watch.close()
            return
        self._runs[vm], self._watches[vm] = plan, watch
        self._why.pop(vm, None)
        self._change.set()
        _log.info("vm.adopted", vm=vm, pid=plan.pid, container=plan.container[:12], freezer=plan.freezer)

    def _ended(self, vm: str) -> None:
        self._runs.pop(vm, None)
        self._watches.pop(vm, None)
        self._left.pop(vm, None)
        self._why[vm] = "its first process has ended"
        self._change.set()
        _log.warning("vm.ended", vm=vm)

    async def changed(self) -> None:
        """Wait until a container ended, or was started again."""
        await self._change.wait()
        self._change.clear()

    async def close(self, *, stop_vms: bool) -> None:
        """Stop watching; with ``stop_vms``, have the engine stop the containers of the host file."""
        if self._looking is not None:
            self._looking.cancel()
            await asyncio.gather(self._looking, return_exceptions=True)
        await self._late.close()
        for watch in self._watches.values():
            watch.close()
        self._watches.clear()
        if stop_vms:
            named = [spec for spec in self._specs.values() if spec.name in self._runs and not spec.found]
            await asyncio.gather(*(self._stop(spec) for spec in named))

    async def _stop(self, spec: ContainerVm) -> None:
        plan = self._runs.pop(spec.name)

        def stop() -> None:
            with suppress(OSError):
                resume_vm(plan)
            with suppress(OSError):
                self._call("POST", plan.container, f"/stop?t={_STOP_S}", _STOP_S + ASK_S)
            (self._folder / f"{spec.name}.container.json").unlink(missing_ok=True)

        await in_thread(f"stop {spec.name}", stop)

    async def _look(self) -> None:
        """Ask the engine again about what does not run, and undo a pause that came late."""
        while True:
            await asyncio.sleep(_LOOK_S)
            before = self._engine_error
            await self._ask_engine()
            if self._engine_error != before:
                self._change.set()
            for spec in self._specs.values():
                if spec.name not in self._runs and not self._engine_error:
                    with suppress(DriverError):
                        await self._find(spec)
            await self._late.undo()

    # -- the engine ---------------------------------------------------------------------------------------

    def _call(self, method: str, container: str, what: str, timeout_s: float) -> object:
        return container_engine.call(self._socket, method, f"/containers/{container}{what}", timeout_s)

    async def _inspect(self, spec: ContainerVm) -> Inspected:
        try:
            return await in_thread(f"inspect {spec.name}", lambda: self._inspected(spec.container_name))
        except EngineRefused as error:
            if error.status == 404:
                raise DriverError(spec.name, f"there is no container {spec.container_name}") from error
            raise DriverError(spec.name, str(error)) from error
        except (OSError, ValueError) as error:
            raise DriverError(spec.name, str(error)) from error

    def _inspected(self, container: str) -> Inspected:
        return inspected(self._call("GET", container, "/json", ASK_S))

    async def _ask_engine(self) -> None:
        """Whether it is there, and which one it is."""

        def ask() -> EngineFacts:
            if self._engine.version:
                container_engine.request(self._socket, "GET", "/_ping", ASK_S)
                return self._engine
            version = container_engine.call(self._socket, "GET", "/version", ASK_S)
            return engine_facts(version, container_engine.call(self._socket, "GET", "/info", ASK_S))

        try:
            facts = await in_thread("ask the engine", ask)
        except OSError as error:
            # It may be another one, or otherwise configured, when it is back.
            self._engine_error, self._engine = str(error), EngineFacts()
            return
        self._engine_error = ""
        if facts != self._engine:
            self._engine = facts
            if not facts.survives:
                _log.warning("engine.without_live_restore", engine=facts.name, hint=NO_LIVE_RESTORE)

    def detail(self) -> str:
        """The engine and the freezers; what must be known before a pause."""
        freezers = sorted({plan.freezer for plan in self._runs.values()})
        text = (
            f"{self._engine.name} {self._engine.version}"
            if self._engine.version
            else "no answer of the engine"
        )
        text = f"{text}, {' and '.join(freezers)}" if freezers else text
        return text if self._engine.survives or not self._engine.version else f"{text}; {NO_LIVE_RESTORE}"

    def ping(self) -> str:
        """Names containers that do not run, and an engine that does not answer."""
        down = [f"{vm} ({self.health_error(vm)})" for vm in self._specs if vm not in self._runs]
        parts = [f"not running: {', '.join(down)}" if down else "", self._engine_error]
        return "; ".join(filter(None, parts))

    def health_error(self, vm: str) -> str:
        """Why a container does not run, or who has paused it."""
        return self._left.get(vm, "") or ("" if vm in self._runs else self._why.get(vm, "it is not running"))

    def capabilities(self, vm: str) -> Capabilities:  # noqa: ARG002 - the same for every container
        """Freeze, while the engine answers."""
        missing = dict(_MISSING)
        if self._engine_error:
            missing["freeze"] = self._engine_error
        methods: tuple[Method, ...] = ("live",) if self._engine_error else ("live", "freeze")
        return Capabilities(
            methods=methods,
            missing=missing,
            clock="simulated",
            no_digest="is a container, whose memory is not read from outside",
            pause_risk="" if self._engine.survives or not self._engine.version else NO_LIVE_RESTORE,
        )

    def process_of(self, vm: str) -> str:
        """``container 0123456789ab (pid 4711)``."""
        plan = self._runs.get(vm)
        return f"container {plan.container[:12]} (pid {plan.pid})" if plan is not None else ""

    # -- states -------------------------------------------------------------------------------------------

    async def read_states(self) -> Mapping[str, VmState]:
        """From the kernel, in a thread."""
        return await in_thread("states", self._states)

    def _states(self) -> Mapping[str, VmState]:
        found: dict[str, VmState] = dict.fromkeys(self._specs, "stopped")
        for vm, plan in dict(self._runs).items():
            try:
                found[vm] = _STATES[condition(plan)]
            except OSError:
                found[vm] = "unknown"
            if found[vm] == "running":
                self._left.pop(vm, None)
        return found

    # -- freezing -----------------------------------------------------------------------------------------

    async def prepare(self, vm: str, operation: str, method: Method, binary: str) -> None:  # noqa: ARG002 - the port's
        """Nothing to get ready for a freeze; anything else is not possible."""
        if method in _MISSING:
            raise NotPossible(vm, _MISSING[method])

    async def release(self, vm: str) -> None:
        """Nothing was prepared."""

    def resume_plan(self, vm: str) -> EnginePlan:
        """Through the engine, and by the cgroup when that is dead."""
        plan = self._runs.get(vm)
        if plan is None:
            raise DriverError(vm, self.health_error(vm))
        return plan

    async def freeze(self, vm: str, by: float) -> None:
        """Have the engine pause it, then look until the kernel says that it is frozen."""
        plan = self._runs.get(vm)
        if plan is None:
            raise FreezeFailed(vm, "is not running")
        self._left.pop(vm, None)
        await in_thread_to_its_end(f"freeze {vm}", lambda stop: self._freeze(plan, by, stop))

    def _freeze(self, plan: EnginePlan, by: float, stop: threading.Event) -> None:
        vm = plan.vm
        was_expected = self._late.forget(plan)
        try:
            pause_container(plan, by, stop, self._call)
        except PausedBefore as error:
            if was_expected:  # it was we, and the engine had not said so
                self._late.expect(plan)
                raise FreezeFailed(vm, "an earlier pause of it came late") from error
            self._left[vm] = PAUSED_BEFORE
            raise FreezeFailed(vm, PAUSED_BEFORE, untouched=True) from error
        except PauseUnanswered as error:
            self._late.expect(plan)
            raise FreezeFailed(vm, str(error)) from error
        except NotFrozen as error:
            raise FreezeFailed(vm, str(error)) from error

    def why_left(self, vm: str) -> str:
        """That somebody else paused it."""
        return self._left.get(vm, "")

    async def resume(self, vm: str, timeout_s: float) -> Literal["running", "gone", "left"]:
        """Through the engine, or by the cgroup when that is dead or hangs; then the kernel must say that it runs."""
        if vm in self._left:
            return "left"
        return await self._tries.resume(
            vm,
            timeout_s,
            lambda: self._resume(vm, timeout_s),
            "neither the engine nor the kernel has resumed it",
        )

    def _resume(self, vm: str, timeout_s: float) -> Literal["running", "gone"]:
        plan = self._runs.get(vm)
        if plan is None:
            return "gone"
        until = time.monotonic() + timeout_s
        try:
            state = condition(plan)
        except OSError:
            state = "held"  # nobody says: it is resumed, which is right in every state
        was_paused = state == "frozen"
        try:
            while state not in ("running", "gone"):
                if time.monotonic() >= until:
                    raise NotRunningYet(vm, f"the kernel says {state} after {timeout_s:.2f} s")
                resume_vm(plan)
                state = condition(plan)
                if state != "running":
                    time.sleep(_STEP_S)
        except OSError as error:
            raise NotRunningYet(vm, str(error)) from error
        if was_paused:
            self._late.forget_resumed(vm)
        return "running" if state == "running" and vm in self._runs else "gone"
