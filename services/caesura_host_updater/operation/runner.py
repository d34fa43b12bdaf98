"""Performs one operation: feeds the pure ``machine`` and carries out its effects."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from typing import Any, Protocol

from caesura.contract.messages import StartOperation, VmFrozen, VmResumed
from caesura.contract.reasons import ReasonCode
from caesura.lifecycle.proof import SUCCEEDING
from caesura.runtime.errors import StoreError
from caesura.runtime.logs import get_logger
from caesura_host_updater.drivers.port import (
    Driver,
    DriverError,
    MembershipCapable,
    guard_plan,
    states_within,
)
from caesura_host_updater.guard_client import GuardUnavailable
from caesura_host_updater.inventory.updates import UpdateFile
from caesura_host_updater.journal import JournalThread
from caesura_host_updater.operation.effects import (
    Arm,
    CheckKernel,
    DigestVms,
    Disarm,
    Effect,
    Finish,
    FreezeVms,
    KillVm,
    LeaveKernel,
    Persist,
    PrepareVms,
    PublishFrozen,
    PublishResumed,
    ResumeVms,
    RunUpdate,
    ShutDownVms,
    StartVms,
    StopUpdate,
    SwapVms,
)
from caesura_host_updater.operation.inputs import (
    AbortReceived,
    Armed,
    ArmRefused,
    Disarmed,
    Event,
    GuardIntervention,
    GuardLost,
    KernelNotReady,
    KernelReady,
    NotLeft,
    Outcome,
    Start,
    TimePassed,
    UpdateEnded,
)
from caesura_host_updater.operation.machine import decide
from caesura_host_updater.operation.report import frozen_fact, resumed_fact
from caesura_host_updater.operation.state import Operation
from caesura_host_updater.operation.vm_actions import VmActions
from caesura_host_updater.pause_markers import NotMarked
from caesura_host_updater.update_process import UpdateNotStarted, UpdateProcess, update_environ
from caesura_vmcontrol.intent import Intent
from caesura_vmcontrol.kernel_change import KernelChange
from caesura_vmcontrol.libvirt_connections import open_ahead
from caesura_vmcontrol.resume_plans import ResumePlan

_PUBLISH_S = 0.5  # s: for the broker to have the facts of a pause before the host leaves it
_STATES_S = 0.5  # s: to read the states of all VMs, which takes milliseconds; others are paused then
_FLUSH_S = 2.0  # s: for the journal to write what was posted, before the guard releases the operation

_log = get_logger("caesura.pause")


def to_wall_clock(instant: float) -> datetime:
    """An instant on CLOCK_MONOTONIC as wall-clock time."""
    return datetime.now(UTC) + timedelta(seconds=instant - time.monotonic())


class Guard(Protocol):
    """What an operation needs of the pause guard; ``GuardClient`` is the real one."""

    on_lost: Callable[[], None]

    async def arm(
        self,
        operation: str,
        deadline: float,
        plans: Sequence[ResumePlan],
        change: KernelChange | None = None,
    ) -> None:
        """Hold the operation from now on, with ``change`` over a change of the host's kernel. Raises GuardUnavailable."""

    async def leave(self, operation: str, by: float) -> None:
        """Start the loaded kernel, not after ``by`` (CLOCK_MONOTONIC); returns only as an error. Raises GuardUnavailable."""

    async def drop(self, operation: str, vms: Sequence[str]) -> None:
        """The operation has not paused these VMs: they are not its guard's. Raises GuardUnavailable."""

    async def disarm(self, operation: str) -> Intent | None:
        """Release the operation; returns what the guard did if it fired. Raises GuardUnavailable."""


class Marking(Protocol):
    """What an operation needs of the pause markers; ``PauseMarkers`` is the real one."""

    async def write(self, operation: str, plans: Sequence[ResumePlan]) -> None:
        """Mark its VMs, durably. Raises NotMarked."""

    def remove(self, vms: Iterable[str]) -> None:
        """These VMs run again, or are gone."""


class Kernels(Protocol):
    """What an operation needs to know of the host's kernel; ``KernelInspector`` is the real one."""

    async def error(self, release: str, budget_s: float) -> str:
        """Why the host cannot start the loaded kernel under its VMs, or that it is another one; empty: it can."""

    def change_to(self, release: str) -> KernelChange:
        """What the guard has to know of the change."""


class OperationRunner:
    """One operation, run once.

    Args:
        pauses: marks the VMs before the first of them is frozen.
        announce: accepts each fact for the bus, with the state that makes it true; must not wait.
        on_change: called when the state of a VM may have changed.
        kernels: what method kexec asks; None: no kernel is started under VMs here.
        published: waits until the broker has every fact, for so many seconds at most.
    """

    def __init__(
        self,
        command: StartOperation,
        state: Operation,
        update: UpdateFile | None,
        *,
        host: str,
        driver: Driver,
        guard: Guard,
        pauses: Marking,
        journal: JournalThread,
        environ: Mapping[str, str],
        announce: Callable[[VmFrozen | VmResumed, Operation], None],
        on_change: Callable[[], None],
        kernels: Kernels | None = None,
        published: Callable[[float], Awaitable[object]] | None = None,
    ) -> None:
        self._kernels = kernels
        self._published = published
        self.command = command
        self.state = state
        self._update = update
        self._host = host
        self._driver = driver
        self._guard = guard
        self._pauses = pauses
        self._journal = journal
        self._environ = environ
        self._announce = announce
        self._on_change = on_change
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        self._actions = VmActions(driver, lambda: self.state, self._events.put_nowait, on_change, self._drop)
        self._freezing: dict[str, asyncio.Task[None]] = {}
        self._shutting_down: dict[str, asyncio.Task[None]] = {}
        self._watching: asyncio.Task[None] | None = None
        self._processes: dict[str, UpdateProcess] = {}
        self._may_be_armed = False
        self._tasks: set[asyncio.Task[None]] = set()

    def abort(self, code: ReasonCode, why: str) -> None:
        """Undo it, or never start it."""
        self._events.put_nowait(AbortReceived(code, why))

    async def run(self) -> Operation:
        """From the journalled intent to the end; every VM runs or is gone when this returns."""
        self._guard.on_lost = lambda: self._events.put_nowait(GuardLost())
        try:
            await self._drive()
        finally:
            self._guard.on_lost = lambda: None
            self._stop_watching()
            for task in self._tasks:
                task.cancel()
            if self._tasks:
                await asyncio.gather(*self._tasks, return_exceptions=True)
            for process in self._processes.values():
                process.close()
            if self.state.method in SUCCEEDING or isinstance(self._driver, MembershipCapable):
                await self._release()
        # Not in the `finally`: with an error in between, VMs may still be paused.
        self._pauses.remove(vm.vm for vm in self.state.vms)
        return self.state

    async def _release(self) -> None:
        """What was prepared and not used must be removed; an error there does not fail the operation."""
        for vm in self.state.vms:
            try:
                await self._driver.release(vm.vm)
            except DriverError as error:
                _log.error("vm.not_released", vm=vm.vm, why=error.why)

    async def _drive(self) -> None:
        self._feed(Start())
        while self.state.end is None:
            self._feed(await self._next())

    async def _next(self) -> Event:
        """The next event, or ``TimePassed`` when the machine wants one."""
        wake_at = self.state.wake_at
        if not self._events.empty():
            return self._events.get_nowait()
        if wake_at is None:
            return await self._events.get()
        try:
            async with asyncio.timeout(max(0.0, wake_at - time.monotonic())):
                return await self._events.get()
        except TimeoutError:
            return TimePassed()

    def _feed(self, event: Event) -> None:
        before = self.state.phase
        self.state, effects = decide(self.state, event, time.monotonic())
        if self.state.phase != before:
            _log.debug(
                "operation.phase", operation=self.state.operation, before=before, phase=self.state.phase
            )
        for effect in effects:
            self._perform(effect)

    def _perform(self, effect: Effect) -> None:  # noqa: PLR0912 - one flat table of effects
        match effect:
            case Persist():
                state = self.state
                self._journal.post(lambda journal: journal.note(state))
            case Arm(deadline):
                self._start(self._arm(deadline))
            case PrepareVms(vms):
                binary = self._update.vmm_binary if self._update is not None else ""
                for name in vms:
                    self._start(self._actions.prepare(name, binary))
            case SwapVms(by):
                swaps = self._start(self._actions.swap(by))
                self._freezing = {vm.vm: swaps for vm in self.state.vms}
            case ShutDownVms(vms, by):
                for name in vms:
                    self._shutting_down[name] = self._start(self._actions.shut_down(name, by))
            case KillVm(name, by):
                self._shutting_down[name] = self._start(self._actions.kill(name, by))
            case StartVms(vms):
                for name in vms:
                    self._start(self._actions.start(name, self._shutting_down.get(name)))
            case FreezeVms(by):
                for vm in self.state.vms:
                    self._freezing[vm.vm] = self._start(self._actions.freeze(vm.vm, by))
                self._watching = self._start(self._actions.watch())
            case DigestVms(vms, until, whole):
                for name in vms:
                    self._start(self._actions.digest(name, until, whole=name in whole))
            case CheckKernel(release):
                self._start(self._check_kernel(release))
            case LeaveKernel(by):
                self._start(self._leave(by))
            case RunUpdate(keys):
                for key in keys:
                    self._start(self._apply(key))
            case StopUpdate(kill):
                for process in self._processes.values():
                    process.end(signal.SIGKILL if kill else signal.SIGTERM)
            case ResumeVms(vms):
                self._stop_watching()
                for name in vms:
                    self._start(self._actions.resume(name, self._freezing.get(name)))
            case Disarm(untouched):
                self._start(self._disarm(untouched))
            case PublishFrozen(vm=name):
                self._announce(frozen_fact(self._host, self.state, name, to_wall_clock), self.state)
                self._on_change()
            case PublishResumed(vm=name):
                self._announce(resumed_fact(self._host, self.state, name, to_wall_clock), self.state)
                self._on_change()
            case Finish():
                pass  # run() returns, and the queue has the report persisted and published

    def _start(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            # A bug in an adapter must not leave a VM paused: abort the operation in an orderly way.
            _log.error("operation.broken", operation=self.state.operation, exc_info=task.exception())
            self._events.put_nowait(AbortReceived("internal_error", f"internal error: {task.exception()!r}"))

    async def _arm(self, deadline: float) -> None:
        try:
            plans = [guard_plan(self._driver, vm.vm) for vm in self.state.vms]
            open_ahead(plans)  # before the first pause: polkit may be slow
            await self._pauses.write(self.state.operation, plans)
            self._may_be_armed = True  # also where its answer is lost
            await self._guard.arm(self.state.operation, deadline, plans, self._change())
        except NotMarked as error:
            self._events.put_nowait(ArmRefused(str(error), "its VMs could not be marked"))
        except (GuardUnavailable, DriverError) as error:
            self._events.put_nowait(ArmRefused(str(error)))
        except Exception as error:
            self._events.put_nowait(ArmRefused(repr(error)))
            raise
        else:
            self._events.put_nowait(Armed())

    def _change(self) -> KernelChange | None:
        if self.state.method != "kexec" or self._kernels is None:
            return None
        return self._kernels.change_to(self.state.kernel_release)

    async def _check_kernel(self, release: str) -> None:
        if self._kernels is None:
            why = "this host starts no kernel under its VMs"
        else:
            try:
                why = await self._left_out() or await self._kernels.error(release, self.state.budget_s)
            except Exception as error:
                self._events.put_nowait(KernelNotReady(repr(error)))
                raise
        self._events.put_nowait(KernelNotReady(why) if why else KernelReady())

    async def _left_out(self) -> str:
        """Which VMs are not of this operation and would end with this kernel: started since it was commanded. Empty: none."""
        named = {vm.vm for vm in self.state.vms}
        states = await states_within(self._driver, _STATES_S)
        if not named <= states.keys():
            return "the states of this host's VMs cannot be read"
        left = [f"{vm} is {state}" for vm, state in states.items() if vm not in named and state != "stopped"]
        return (
            f"VM {', VM '.join(left)}, not part of the operation, and would end with this kernel"
            if left
            else ""
        )

    async def _leave(self, by: float) -> None:
        """Facts to the broker, for a moment; the journal to the disk, without which nothing is known after the jump; then go."""
        if self._published is not None:
            await self._published(_PUBLISH_S)
        if why := await self._left_out():
            self._events.put_nowait(NotLeft(why))
            return
        try:
            async with asyncio.timeout(max(0.0, by - time.monotonic())):
                await self._journal.do(lambda _: None)  # everything posted before it is on the disk
            await self._guard.leave(self.state.operation, by)
        except (StoreError, TimeoutError) as error:
            self._events.put_nowait(
                NotLeft(f"its journal is not on the disk: {error or 'the disk does not answer'}")
            )
        except GuardUnavailable as error:
            self._events.put_nowait(NotLeft(str(error)))
        except Exception as error:
            self._events.put_nowait(NotLeft(repr(error)))
            raise
        else:
            self._events.put_nowait(NotLeft("the pause guard says that it did, and this kernel still runs"))

    async def _drop(self, *vms: str) -> None:
        """Somebody else paused them, or has them: neither the guard nor our next life is to resume them."""
        try:
            await self._guard.drop(self.state.operation, vms)
        except GuardUnavailable as error:
            _log.warning("guard.not_dropped", vms=vms, why=str(error))
        self._pauses.remove(vms)

    def _stop_watching(self) -> None:
        if self._watching is not None:
            self._watching.cancel()
            self._watching = None

    async def _apply(self, key: str) -> None:
        if self._update is None:
            raise RuntimeError("an operation without an update cannot run one")
        operation = self.state.operation
        environ = update_environ(self._environ, self._update, operation=operation, host=self._host, vm=key)
        process = self._processes[key] = UpdateProcess(self._update, environ)
        try:
            await process.start()
        except UpdateNotStarted as error:
            self._events.put_nowait(UpdateEnded(key, "failed", None, 0.0, str(error)))
            return
        pid, start_ticks = process.identity
        self._journal.post(lambda journal: journal.note_update(operation, pid, start_ticks))
        code, seconds, tail = await process.wait()
        outcome: Outcome = "succeeded" if code == 0 else "failed"
        self._events.put_nowait(UpdateEnded(key, outcome, code, seconds, tail))

    async def _disarm(self, untouched: Sequence[str]) -> None:
        record = None
        try:
            # While the guard holds the operation, its record shows the next start who resumed what. It may be
            # released only when our own record is on disk; on a full disk there is nothing to wait for.
            with suppress(StoreError, TimeoutError):
                async with asyncio.timeout(_FLUSH_S):
                    await self._journal.do(lambda _: None)
            # A VM that somebody else has paused: the guard would resume it when it is released, and finds it paused.
            await self._actions.wait_dropped()
            if untouched and self._may_be_armed:
                await self._drop(*untouched)
            record = await self._guard.disarm(self.state.operation)
        except GuardUnavailable as error:
            _log.warning("guard.not_disarmed", operation=self.state.operation, why=str(error))
        finally:
            self._events.put_nowait(disarmed(record))


def disarmed(record: Intent | None) -> Disarmed:
    """The guard's record as the machine's event."""
    if record is None or record.fired is None:
        return Disarmed()
    interventions = tuple(
        GuardIntervention(vm, intervention.was_frozen, intervention.frozen_after, intervention.running_at)
        for vm, intervention in record.fired.vms.items()
    )
    return Disarmed(record.fired.why, interventions)


def inherited_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """What VMs and updates inherit: everything but this service's own settings."""
    return {name: value for name, value in environ.items() if not name.startswith("CAESURA_HOST_UPDATER_")}


__all__ = ["Guard", "Kernels", "OperationRunner", "disarmed", "inherited_environment", "to_wall_clock"]
