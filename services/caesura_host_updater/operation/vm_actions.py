"""What an operation does to its VMs through the driver; every result is an event of the ``machine``."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

from caesura.lifecycle.budget import START_S
from caesura.lifecycle.proof import SAVING
from caesura.runtime.logs import get_logger
from caesura_host_updater.drivers.port import (
    DigestCapable,
    Driver,
    DriverError,
    FreezeFailed,
    KillCapable,
    NotPossible,
    NotRunningYet,
    RebootCapable,
    ReplaceCapable,
    ShutdownFailed,
    SwapCapable,
    SwapFailed,
    states_within,
)
from caesura_host_updater.operation.inputs import (
    Digested,
    Event,
    ResumeEnded,
    Sampled,
    VmFroze,
    VmLost,
    VmNotFrozen,
    VmNotPrepared,
    VmNotShutDown,
    VmNotStarted,
    VmNotSwapped,
    VmPrepared,
    VmShutDown,
    VmStarted,
    VmSwapped,
)
from caesura_host_updater.operation.resume import ended_while_paused
from caesura_host_updater.operation.state import Operation

_RESUME_TRY_S = 0.25  # s: one try of a resume; then it is logged and retried
_RESTORE_TRY_S = 1.0  # s: the same for a replace, which starts a process
_START_RETRY_S = 0.5  # s: between two tries to start a VM
_LOOK_S = 0.2  # s: for a look before a resume, which must not wait for it
_WATCH_S = 0.1  # s: between two looks whether the paused VMs are still paused

_log = get_logger("caesura.pause")


class VmActions:
    """See the module. Instants are seconds on CLOCK_MONOTONIC.

    Args:
        state: the operation as it is now.
        emit: accepts each result; must not wait.
        on_change: called when a VM was seen to end.
        drop: has the guard forget a VM that the operation did not pause, or that was left.
    """

    def __init__(
        self,
        driver: Driver,
        state: Callable[[], Operation],
        emit: Callable[[Event], None],
        on_change: Callable[[], None],
        drop: Callable[[str], Awaitable[None]],
    ) -> None:
        self._drop_from_guard = drop
        self._dropped: dict[str, asyncio.Future[None]] = {}
        self._driver = driver
        self._state = state
        self._emit = emit
        self._on_change = on_change
        self._ran: dict[str, str] = {}
        """What ran each guest before its pause."""

    async def prepare(self, vm: str, binary: str) -> None:
        """Prepare a swap or replace, while the VM runs. ``binary``: the VMM that an update brings; else empty."""
        self._ran[vm] = self._driver.process_of(vm)
        try:
            await self._driver.prepare(vm, self._state().operation, self._state().method, binary)
        except DriverError as error:
            self._emit(VmNotPrepared(vm, error.why))
        except Exception as error:
            self._emit(VmNotPrepared(vm, repr(error)))
            raise
        else:
            self._emit(VmPrepared(vm))

    async def swap(self, by: float) -> None:
        """One guest after the other: side by side, each would wait for the others' device state."""
        left = [vm.vm for vm in self._state().vms]
        why = ""
        while left and not why:
            vm = left.pop(0)
            called_at = time.monotonic()
            if called_at >= by:
                why = "it was too late to begin"
                self._emit(VmNotSwapped(vm, None, why))
                continue
            try:
                if not isinstance(self._driver, SwapCapable):
                    raise NotPossible(vm, f"the {self._driver.name} driver cannot swap")
                done = await self._driver.hand_over(vm, by)
            except asyncio.CancelledError:
                self._emit(VmNotSwapped(vm, called_at, "its swap was called off"))
                raise
            except SwapFailed as error:
                why = error.why
                paused, back = error.frozen_at, error.resumed_at
                self._emit(VmNotSwapped(vm, called_at, why, paused, back, error.differs))
            except DriverError as error:
                why = error.why
                self._emit(VmNotSwapped(vm, called_at, why))
            else:
                swapped = VmSwapped(
                    vm,
                    done.called_at,
                    done.frozen_at,
                    done.resumed_at,
                    done.detail,
                    done.sampled,
                    done.sampled_note,
                )
                self._emit(swapped)
        for vm in left:
            self._emit(VmNotSwapped(vm, None, f"not begun, since another failed: {why}"))

    async def freeze(self, vm: str, by: float) -> None:
        """Freeze one VM, or save its state for a replace; not after ``by``."""
        # The last check before the call: a process that was stopped since the decision must not freeze any more.
        called_at = time.monotonic()
        if called_at >= by:
            self._emit(VmNotFrozen(vm, None, "it was too late to freeze it"))
            return
        try:
            if self._state().method in SAVING:
                await self._checkpoint(vm, by)
            else:
                self._ran[vm] = self._driver.process_of(vm)
                await self._driver.freeze(vm, by)
        except asyncio.CancelledError:
            self._emit(VmNotFrozen(vm, called_at, "its freeze was called off"))
            raise
        except (FreezeFailed, NotPossible) as error:
            self._emit(VmNotFrozen(vm, called_at, error.why))
            if isinstance(error, FreezeFailed) and error.untouched:
                self._drop(vm)
        except Exception as error:
            self._emit(VmNotFrozen(vm, called_at, repr(error)))
            raise
        else:
            self._emit(VmFroze(vm, called_at, time.monotonic()))

    def _drop(self, vm: str) -> None:
        """Once, beside everything else: a guard that hangs delays no other VM's resume."""
        if vm not in self._dropped:
            self._dropped[vm] = asyncio.ensure_future(self._drop_from_guard(vm))

    async def wait_dropped(self) -> None:
        """Return when the guard has answered, or not in time, for all VMs that it had to forget."""
        await asyncio.gather(*self._dropped.values())

    async def _checkpoint(self, vm: str, by: float) -> None:
        if not isinstance(self._driver, ReplaceCapable):
            raise NotPossible(vm, f"the {self._driver.name} driver cannot replace")
        await self._driver.checkpoint(vm, by, gone=bool(self._state().update))

    async def shut_down(self, vm: str, by: float) -> None:
        """Have one VM shut down for an update that needs a reboot."""
        try:
            how = await restarting(self._driver, vm).shut_down(vm, by)
        except DriverError as error:
            self._emit(VmNotShutDown(vm, error.why, isinstance(error, ShutdownFailed) and error.asked))
        except Exception as error:
            self._emit(VmNotShutDown(vm, repr(error)))
            raise
        else:
            self._emit(VmShutDown(vm, time.monotonic(), how))
            self._on_change()

    async def kill(self, vm: str, by: float) -> None:
        """Kill one VM that did not shut down, for an update that allows it."""
        try:
            await _killing(self._driver, vm).kill(vm, by)
        except DriverError as error:
            self._emit(VmNotShutDown(vm, error.why))
        except Exception as error:
            self._emit(VmNotShutDown(vm, repr(error)))
            raise
        else:
            _log.warning("vm.killed", vm=vm, hint="it did not shut down in time, and its update allows it")
            self._emit(VmShutDown(vm, time.monotonic(), "SIGKILL"))
            self._on_change()

    async def start(self, vm: str, shutting_down: asyncio.Task[None] | None) -> None:
        """Start one VM again; tried until it is up, or ``START_S`` have passed since it could be started."""
        if shutting_down is not None and not shutting_down.done():
            shutting_down.cancel()
            await asyncio.wait([shutting_down])
        state = self._state()
        asked_at = next((each.shutdown_at for each in state.vms if each.vm == vm), None)
        down_by = time.monotonic() if asked_at is None else asked_at + state.shutdown_s
        try:
            again = await started(self._driver, vm, down_by)
        except DriverError as error:
            self._emit(VmNotStarted(vm, error.why))
        except Exception as error:
            self._emit(VmNotStarted(vm, repr(error)))
            raise
        else:
            self._emit(VmStarted(vm, time.monotonic(), again))
        self._on_change()

    async def resume(self, vm: str, freezing: asyncio.Task[None] | None) -> None:
        """Never gives up: a VM that does not run is retried until it runs or is gone."""
        if freezing is not None and not freezing.done():
            freezing.cancel()
            await asyncio.wait([freezing])
        unconfirmed = any(each.vm == vm and each.frozen_at is None for each in self._state().vms)
        was_held = unconfirmed and (await states_within(self._driver, _LOOK_S)).get(vm, "paused") == "paused"
        tries = 0
        timeout_s = _RESTORE_TRY_S if self._state().method in SAVING else _RESUME_TRY_S
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
                match end:
                    case "left":
                        detail = self._driver.why_left(vm)
                        self._drop(vm)
                    case "gone":
                        detail = self._driver.health_error(vm)
                    case _:
                        detail = self._moved(vm)
                self._emit(ResumeEnded(vm, at, end, was_held and end != "left", detail))
                return

    def _moved(self, vm: str) -> str:
        """What runs the guest now and what ran it before, if that changed."""
        now, before = self._driver.process_of(vm), self._ran.get(vm, "")
        return f"{now}, was {before}" if now and before and now != before else ""

    async def watch(self) -> None:
        """Notice a paused VM that ended, or that somebody else resumed."""
        lost: set[str] = set()
        while True:
            await asyncio.sleep(_WATCH_S)
            names = [vm.vm for vm in self._state().vms if vm.frozen_at is not None and vm.vm not in lost]
            states = await self._driver.read_states() if names else {}
            for name in names:
                if states.get(name) == "stopped":
                    self._emit(VmLost(name, False, ended_while_paused(self._driver.health_error(name))))
                    self._on_change()
                elif states.get(name) == "running":
                    why = "ran although it was paused: somebody else resumed it"
                    self._emit(VmLost(name, True, why))
                else:
                    continue
                lost.add(name)

    async def digest(self, vm: str, until: float, *, whole: bool) -> None:
        """Digest its memory while it is paused: sampled pages where that is possible, all of it if ``whole``."""
        if any(each.vm == vm and each.can_sample for each in self._state().vms):
            await self._sample(vm)
        if not whole:
            self._emit(Digested(vm, ""))
            return
        try:
            if not isinstance(self._driver, DigestCapable):
                raise NotPossible(vm, f"the {self._driver.name} driver cannot read memory")
            digest = await self._driver.memory_digest(vm, until)
        except DriverError as error:
            self._emit(Digested(vm, "", error.why))
        else:
            note = "" if digest else "the digest took too long"
            self._emit(Digested(vm, digest or "", note))

    async def _sample(self, vm: str) -> None:
        try:
            if not isinstance(self._driver, DigestCapable):
                raise NotPossible(vm, f"the {self._driver.name} driver cannot read memory")
            digest = await self._driver.sampled_digest(vm, f"{self._state().operation}/{vm}")
        except DriverError as error:
            self._emit(Sampled(vm, "", error.why))
        else:
            self._emit(Sampled(vm, digest))


def _killing(driver: Driver, vm: str) -> KillCapable:
    """The driver, if it can. Raises NotPossible."""
    if not isinstance(driver, KillCapable):
        raise NotPossible(vm, f"it runs on, and the {driver.name} driver cannot kill it")
    return driver


def restarting(driver: Driver, vm: str) -> RebootCapable:
    """The driver, where it restarts VMs. Raises NotPossible."""
    if not isinstance(driver, RebootCapable):
        raise NotPossible(vm, f"the {driver.name} driver cannot restart VMs")
    return driver


async def started(driver: Driver, vm: str, down_by: float) -> bool:
    """Start a VM that was asked to shut down, and wait until it is up; whether it had ended.

    Args:
        down_by: one that still runs is waited for until this instant of CLOCK_MONOTONIC.

    Raises:
        DriverError: it is not up ``START_S`` after that.
    """
    restarts = restarting(driver, vm)
    until = max(down_by, time.monotonic()) + START_S
    tries, why = 0, "it is not up"
    while True:
        try:
            async with asyncio.timeout(max(until - time.monotonic(), 0.0)):
                return await restarts.start(vm, down_by)
        except TimeoutError:
            raise DriverError(vm, f"{why} {START_S:g} s after its start") from None
        except DriverError as error:
            tries, why = tries + 1, error.why
            if tries in (1, 4) or tries % 40 == 0:
                _log.error("vm.not_started_yet", vm=vm, tries=tries, why=error.why)
        if time.monotonic() + _START_RETRY_S >= until:
            raise DriverError(vm, why)
        await asyncio.sleep(_START_RETRY_S)
