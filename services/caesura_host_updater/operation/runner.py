"""Performs one operation: feeds the pure ``machine`` and carries out its effects."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from typing import Any, Protocol

import structlog

from caesura.contract.messages import StartOperation, VmFrozen, VmResumed
from caesura.contract.reasons import ReasonCode
from caesura.runtime.errors import StoreError
from caesura_host_updater.drivers.port import (
    DigestCapable,
    Driver,
    DriverError,
    FreezeFailed,
    NotPossible,
    NotRunningYet,
    ReplaceCapable,
    SwapCapable,
    SwapFailed,
    guard_plan,
    states_within,
)
from caesura_host_updater.guard_client import GuardUnavailable
from caesura_host_updater.inventory.updates import UpdateFile
from caesura_host_updater.journal import JournalThread
from caesura_host_updater.operation.effects import (
    Arm,
    DigestVms,
    Disarm,
    Effect,
    Finish,
    FreezeVms,
    Persist,
    PrepareVms,
    PublishFrozen,
    PublishResumed,
    ResumeVms,
    RunUpdate,
    StopUpdate,
    SwapVms,
)
from caesura_host_updater.operation.events import (
    AbortReceived,
    Armed,
    ArmRefused,
    Digested,
    Disarmed,
    Event,
    GuardIntervention,
    GuardLost,
    Outcome,
    ResumeEnded,
    Sampled,
    Start,
    TimePassed,
    UpdateEnded,
    VmFroze,
    VmLost,
    VmNotFrozen,
    VmNotPrepared,
    VmNotSwapped,
    VmPrepared,
    VmSwapped,
)
from caesura_host_updater.operation.machine import decide
from caesura_host_updater.operation.report import frozen_fact, resumed_fact
from caesura_host_updater.operation.state import Operation
from caesura_host_updater.pause_markers import NotMarked
from caesura_host_updater.update_process import UpdateNotStarted, UpdateProcess, update_environ
from caesura_vmcontrol.intent import Intent
from caesura_vmcontrol.plans import Plan

_RESUME_TRY_S = 0.25  # s: one try of a resume; then it is logged and retried
_RESTORE_TRY_S = 1.0  # s: the same for a replace, which starts a process
_FLUSH_S = 2.0  # s: for the journal to write what was posted, before the guard releases the operation
_LOOK_S = 0.2  # s: for a look before a resume, which must not wait for it
_WATCH_S = 0.1  # s: between two looks whether the paused VMs are still paused

_log = structlog.get_logger("caesura.pause")


def to_wall_clock(instant: float) -> datetime:
    """An instant on CLOCK_MONOTONIC as wall-clock time."""
    return datetime.now(UTC) + timedelta(seconds=instant - time.monotonic())


class Guard(Protocol):
    """What an operation needs of the pause guard; ``GuardClient`` is the real one."""

    on_lost: Callable[[], None]

    async def arm(self, operation: str, deadline: float, plans: Sequence[Plan]) -> None:
        """Hold the operation from now on. Raises GuardUnavailable."""

    async def disarm(self, operation: str) -> Intent | None:
        """Release the operation; returns what the guard did if it fired. Raises GuardUnavailable."""


class Marking(Protocol):
    """What an operation needs of the pause markers; ``PauseMarkers`` is the real one."""

    async def write(self, operation: str, plans: Sequence[Plan]) -> None:
        """Mark its VMs, durably. Raises NotMarked."""

    def remove(self, vms: Iterable[str]) -> None:
        """These VMs run again, or are gone."""


class OperationRunner:
    """One operation, run once.

    Args:
        pauses: marks the VMs before the first of them is frozen.
        announce: accepts each fact for the bus, with the state that makes it true; must not wait.
        on_change: called when the state of a VM may have changed.
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
    ) -> None:
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
        self._freezing: dict[str, asyncio.Task[None]] = {}
        self._ran: dict[str, str] = {}
        """What ran each guest before a swap or replace."""
        self._watching: asyncio.Task[None] | None = None
        self._processes: dict[str, UpdateProcess] = {}
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
            if self.state.method in ("swap", "replace"):
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
                for name in vms:
                    self._start(self._prepare(name))
            case SwapVms(by):
                swaps = self._start(self._swap(by))
                self._freezing = {vm.vm: swaps for vm in self.state.vms}
            case FreezeVms(by):
                for vm in self.state.vms:
                    self._freezing[vm.vm] = self._start(self._freeze(vm.vm, by))
                self._watching = self._start(self._watch())
            case DigestVms(vms, until, whole):
                for name in vms:
                    self._start(self._digest(name, until, whole=name in whole))
            case RunUpdate(keys):
                for key in keys:
                    self._start(self._apply(key))
            case StopUpdate(kill):
                for process in self._processes.values():
                    process.end(signal.SIGKILL if kill else signal.SIGTERM)
            case ResumeVms(vms):
                self._stop_watching()
                for name in vms:
                    self._start(self._resume(name, self._freezing.get(name)))
            case Disarm():
                self._start(self._disarm())
            case PublishFrozen(vm=name):
                self._announce(frozen_fact(self._host, self.state, name, to_wall_clock), self.state)
                self._on_change()
            case PublishResumed(vm=name):
                self._announce(resumed_fact(self._host, self.state, name, to_wall_clock), self.state)
                self._on_change()
            case Finish():
                pass  # run() returns, and the service persists and publishes the report

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
            await self._pauses.write(self.state.operation, plans)
            await self._guard.arm(self.state.operation, deadline, plans)
        except NotMarked as error:
            self._events.put_nowait(ArmRefused(str(error), "its VMs could not be marked"))
        except (GuardUnavailable, DriverError) as error:
            self._events.put_nowait(ArmRefused(str(error)))
        except Exception as error:
            self._events.put_nowait(ArmRefused(repr(error)))
            raise
        else:
            self._events.put_nowait(Armed())

    async def _prepare(self, vm: str) -> None:
        binary = self._update.vmm_binary if self._update is not None else ""
        self._ran[vm] = self._driver.process_of(vm)
        try:
            await self._driver.prepare(vm, self.state.operation, self.state.method, binary)
        except DriverError as error:
            self._events.put_nowait(VmNotPrepared(vm, error.why))
        except Exception as error:
            self._events.put_nowait(VmNotPrepared(vm, repr(error)))
            raise
        else:
            self._events.put_nowait(VmPrepared(vm))

    async def _swap(self, by: float) -> None:
        """One guest after the other: side by side, each would wait for the others' device state."""
        left = [vm.vm for vm in self.state.vms]
        why = ""
        while left and not why:
            vm = left.pop(0)
            called_at = time.monotonic()
            if called_at >= by:
                why = "it was too late to begin"
                self._events.put_nowait(VmNotSwapped(vm, None, why))
                continue
            try:
                if not isinstance(self._driver, SwapCapable):
                    raise NotPossible(vm, f"the {self._driver.name} driver cannot swap")
                done = await self._driver.hand_over(vm, by)
            except asyncio.CancelledError:
                self._events.put_nowait(VmNotSwapped(vm, called_at, "its swap was called off"))
                raise
            except SwapFailed as error:
                why = error.why
                paused, back = error.frozen_at, error.resumed_at
                self._events.put_nowait(VmNotSwapped(vm, called_at, why, paused, back, error.differs))
            except DriverError as error:
                why = error.why
                self._events.put_nowait(VmNotSwapped(vm, called_at, why))
            else:
                told = VmSwapped(
                    vm,
                    done.called_at,
                    done.frozen_at,
                    done.resumed_at,
                    done.detail,
                    done.sampled,
                    done.sampled_note,
                )
                self._events.put_nowait(told)
        for vm in left:
            self._events.put_nowait(VmNotSwapped(vm, None, f"not begun, since another failed: {why}"))

    async def _freeze(self, vm: str, by: float) -> None:
        # The last check before the call: a process that was stopped since the decision must not freeze any more.
        called_at = time.monotonic()
        if called_at >= by:
            self._events.put_nowait(VmNotFrozen(vm, None, "it was too late to freeze it"))
            return
        try:
            if self.state.method == "replace":
                await self._checkpoint(vm, by)
            else:
                await self._driver.freeze(vm, by)
        except asyncio.CancelledError:
            self._events.put_nowait(VmNotFrozen(vm, called_at, "its freeze was called off"))
            raise
        except (FreezeFailed, NotPossible) as error:
            self._events.put_nowait(VmNotFrozen(vm, called_at, error.why))
        except Exception as error:
            self._events.put_nowait(VmNotFrozen(vm, called_at, repr(error)))
            raise
        else:
            self._events.put_nowait(VmFroze(vm, called_at, time.monotonic()))

    async def _checkpoint(self, vm: str, by: float) -> None:
        if not isinstance(self._driver, ReplaceCapable):
            raise NotPossible(vm, f"the {self._driver.name} driver cannot replace")
        await self._driver.checkpoint(vm, by, gone=bool(self.state.update))

    async def _resume(self, vm: str, freezing: asyncio.Task[None] | None) -> None:
        """Never gives up: a VM that does not run is retried until it runs or is gone."""
        if freezing is not None and not freezing.done():
            freezing.cancel()
            await asyncio.wait([freezing])
        unconfirmed = any(each.vm == vm and each.frozen_at is None for each in self.state.vms)
        was_held = unconfirmed and (await states_within(self._driver, _LOOK_S)).get(vm, "paused") == "paused"
        tries = 0
        timeout_s = _RESTORE_TRY_S if self.state.method == "replace" else _RESUME_TRY_S
        while True:
            try:
                end = await self._driver.resume(vm, timeout_s)
            except NotRunningYet as error:
                tries += 1
                if tries in (1, 4) or tries % 40 == 0:
                    _log.error("vm.not_resumed_yet", vm=vm, tries=tries, why=error.why)
            except Exception as error:  # noqa: BLE001 - whatever it is, the VM must run: log it and continue
                tries += 1
                _log.error("vm.resume_failed", vm=vm, tries=tries, why=repr(error))
                await asyncio.sleep(_RESUME_TRY_S)
            else:
                at = time.monotonic()
                detail = self._driver.why_left(vm) if end == "left" else self._moved(vm)
                self._events.put_nowait(ResumeEnded(vm, at, end, was_held and end != "left", detail))
                return

    def _moved(self, vm: str) -> str:
        """What runs the guest now and what ran it before, if that changed."""
        now, before = self._driver.process_of(vm), self._ran.get(vm, "")
        return f"{now}, was {before}" if now and before and now != before else ""

    async def _watch(self) -> None:
        """Notice a paused VM that ended, or that somebody else resumed."""
        lost: set[str] = set()
        while True:
            await asyncio.sleep(_WATCH_S)
            names = [vm.vm for vm in self.state.vms if vm.frozen_at is not None and vm.vm not in lost]
            states = await self._driver.read_states() if names else {}
            for name in names:
                if states.get(name) == "stopped":
                    self._events.put_nowait(VmLost(name, False, "ended while it was paused"))
                    self._on_change()
                elif states.get(name) == "running":
                    why = "ran although it was paused: somebody else resumed it"
                    self._events.put_nowait(VmLost(name, True, why))
                else:
                    continue
                lost.add(name)

    def _stop_watching(self) -> None:
        if self._watching is not None:
            self._watching.cancel()
            self._watching = None

    async def _digest(self, vm: str, until: float, *, whole: bool) -> None:
        if any(each.vm == vm and each.can_sample for each in self.state.vms):
            await self._sample(vm)
        if not whole:
            self._events.put_nowait(Digested(vm, ""))
            return
        try:
            if not isinstance(self._driver, DigestCapable):
                raise NotPossible(vm, f"the {self._driver.name} driver cannot read memory")
            digest = await self._driver.memory_digest(vm, until)
        except DriverError as error:
            self._events.put_nowait(Digested(vm, "", error.why))
        else:
            note = "" if digest else "the digest took too long"
            self._events.put_nowait(Digested(vm, digest or "", note))

    async def _sample(self, vm: str) -> None:
        try:
            if not isinstance(self._driver, DigestCapable):
                raise NotPossible(vm, f"the {self._driver.name} driver cannot read memory")
            digest = await self._driver.sampled_digest(vm, f"{self.state.operation}/{vm}")
        except DriverError as error:
            self._events.put_nowait(Sampled(vm, "", error.why))
        else:
            self._events.put_nowait(Sampled(vm, digest))

    async def _apply(self, key: str) -> None:
        if self._update is None:
            raise RuntimeError("an operation without an update cannot run one")
        operation = self.state.operation
        told = update_environ(self._environ, self._update, operation=operation, host=self._host, vm=key)
        process = self._processes[key] = UpdateProcess(self._update, told)
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

    async def _disarm(self) -> None:
        record = None
        try:
            # While the guard holds the operation, its record shows the next start who resumed what. It may be
            # released only when our own record is on disk; on a full disk there is nothing to wait for.
            with suppress(StoreError, TimeoutError):
                async with asyncio.timeout(_FLUSH_S):
                    await self._journal.do(lambda _: None)
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


__all__ = ["Guard", "OperationRunner", "disarmed", "inherited_environment", "to_wall_clock"]
