"""The last acts of the guard in a kernel: claims, clocks and counters on disk, then the loaded kernel is started.

The guard does it and nobody else, for the guard is the one that would resume the guests otherwise: so both cannot happen.
"""

# light imports on purpose: no pathlib here.
# ruff: noqa: PTH123

from __future__ import annotations

import os
import platform
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Protocol

from caesura_vmcontrol import boot_counters, claims, kernel_clock
from caesura_vmcontrol.boots import boot8
from caesura_vmcontrol.bounded_calls import CallTimeout, within
from caesura_vmcontrol.claims import Owner
from caesura_vmcontrol.hardware_watchdog import HardwareWatchdog
from caesura_vmcontrol.intent import Intent
from caesura_vmcontrol.kernel_change import ClockPair, KernelChange, Left
from caesura_vmcontrol.kernel_clock import NoCounter, RateMeasurement
from caesura_vmcontrol.plan_errors import BadPlan
from caesura_vmcontrol.procfs import boot_id, read_process
from caesura_vmcontrol.qemu_plans import ReplacePlan
from caesura_vmcontrol.watchdog import GuardRefusal, Log, Watchdog

_LOADED = "/sys/kernel/kexec_loaded"
_RB_KEXEC = 0x45584543  # LINUX_REBOOT_CMD_KEXEC of include/uapi/linux/reboot.h
_SYNC_S = 2.0  # s: what must be durable was fsynced before; this is for everything else of the host
_STORE_S = 2.0  # s: a handful of small files; the guests are paused


class Kernel(Protocol):
    """What the guard does with the host at its leaving; ``ThisKernel`` is the real one."""

    def loaded(self) -> bool:
        """Whether another kernel is loaded. Raises OSError."""

    def sync(self) -> None:
        """Write everything to the disks. Blocking."""

    def arm_watchdog(self, seconds: int) -> str:
        """Have the hardware reset a host that hangs; why not, if not."""

    def disarm_watchdog(self) -> None:
        """It is not left after all."""

    def start_loaded(self) -> None:
        """Does not return. Raises OSError: it did not work."""


class ThisKernel:
    """See ``Kernel``."""

    def __init__(self) -> None:
        self._watchdog = HardwareWatchdog()

    def loaded(self) -> bool:
        """As sysfs says."""
        with open(_LOADED, encoding="ascii") as file:
            return file.read().strip() == "1"

    def sync(self) -> None:
        """All file systems."""
        os.sync()

    def arm_watchdog(self, seconds: int) -> str:
        """See ``HardwareWatchdog``."""
        return self._watchdog.arm(seconds)

    def disarm_watchdog(self) -> None:
        """See ``HardwareWatchdog``."""
        self._watchdog.disarm()

    def start_loaded(self) -> None:
        """reboot(2)."""
        import ctypes  # noqa: PLC0415 - a guard that never leaves its kernel does not need it

        libc = ctypes.CDLL(None, use_errno=True)
        libc.reboot(ctypes.c_int(_RB_KEXEC))
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def check_plans(intent: Intent) -> None:
    """What may be armed over a change of the kernel. Raises BadPlan."""
    change = intent.kernel_change
    if change is None:
        if any(isinstance(plan, ReplacePlan) and plan.across is not None for plan in intent.plans):
            raise BadPlan("a plan over a change of the kernel, and no such change is armed")
        return
    if change.left is not None or change.arrival is not None:
        raise BadPlan("the kernel is to be left, and was left already")
    if not os.path.isabs(change.carve_out):  # noqa: PTH117
        raise BadPlan(f"the carve-out {change.carve_out!r} is not an absolute path")
    if change.rehearsal and intent.plans:
        raise BadPlan("a rehearsal has no guests")
    for plan in intent.plans:
        if not isinstance(plan, ReplacePlan) or plan.across is None or plan.across.boot_id != intent.boot_id:
            raise BadPlan(f"VM {plan.vm}: its plan cannot be completed by another boot")


class Departure:
    """One guard's leaving of its kernel.

    Args:
        state_dir: the host updater's state folder.
        kernel: injected by tests only.
    """

    def __init__(self, state_dir: str, watch: Watchdog, log: Log, kernel: Kernel | None = None) -> None:
        self._state_dir = state_dir
        self._watch = watch
        self._log = log
        self._kernel = kernel or ThisKernel()
        self._rate: RateMeasurement | None = None

    def measure(self) -> None:
        """From now on the counter's rate is measured; called when a change of the kernel is armed."""
        try:
            self._rate = RateMeasurement()
        except (
            OSError
        ) as error:  # the way of measuring is refused, or there is no counter: the RTC is all there is
            self._rate = None
            self._log("guard.no_counter", why=str(error))

    def leave(self, operation: str, by: float) -> None:
        """Leave the kernel, not after ``by`` (CLOCK_MONOTONIC). Returns only by raising.

        Raises:
            GuardRefusal: it is not left, and everything is as it was: armed, with each guest in its files.
        """
        intent = self._watch.intent
        if intent is None or intent.operation != operation or intent.fired is not None:
            raise GuardRefusal(f"operation {operation} is not armed")
        change = intent.kernel_change
        if change is None:
            raise GuardRefusal(f"operation {operation} does not change the kernel")
        plans = [plan for plan in intent.plans if isinstance(plan, ReplacePlan)]
        self._check(plans, by)
        claimed: list[ReplacePlan] = []
        try:
            self._bounded("boot counters", lambda: self._reset_counters(intent, change))
            with suppress(CallTimeout):
                within(max(0.01, min(_SYNC_S, by - time.monotonic())), self._kernel.sync, key="sync")
            for plan in plans:
                claimed.append(plan)
                self._bounded(f"claims of {plan.vm}", lambda plan=plan: _claim_left(plan))
            change.left = Left(self._pair(), time.monotonic(), platform.release(), kernel_clock.rtc())
            self._bounded("intent", self._watch.record)
            self._jump(change, by)
        except (GuardRefusal, OSError, claims.BadClaim) as error:
            self._stay(change, claimed)
            if isinstance(error, GuardRefusal):
                raise
            raise GuardRefusal(f"the kernel cannot be left: {error}") from error
        except BaseException:
            self._stay(change, claimed)
            raise

    def _jump(self, change: KernelChange, by: float) -> None:
        if time.monotonic() >= by:
            raise GuardRefusal("it was too late to leave the kernel")
        # The last act: were this guard killed with it armed, the hardware would reset a host whose guests run again.
        if change.watchdog_s and (why := self._kernel.arm_watchdog(change.watchdog_s)):
            self._log("guard.no_hardware_watchdog", why=why)
        self._log("guard.leaves", to=change.expected_release)
        self._kernel.start_loaded()
        raise GuardRefusal("the loaded kernel was not started")

    def _check(self, plans: Sequence[ReplacePlan], by: float) -> None:
        if time.monotonic() >= by:
            raise GuardRefusal("it is too late to leave the kernel")
        try:
            if not self._kernel.loaded():
                raise GuardRefusal(f"no kernel is loaded ({_LOADED} is not 1)")
            for plan in plans:
                _, owner = claims.current(plan.claims)
                if owner is None or owner.kind != "file":
                    raise GuardRefusal(
                        f"VM {plan.vm} is not in its files: {owner.text if owner else 'undecided'}"
                    )
        except (OSError, claims.BadClaim) as error:
            raise GuardRefusal(f"the kernel cannot be left: {error}") from error

    @staticmethod
    def _bounded(what: str, work: object) -> None:
        try:
            within(_STORE_S, work, key=f"leaving: {what}")  # type: ignore[arg-type]
        except CallTimeout as error:
            raise GuardRefusal(f"{what}: the disk does not answer within {_STORE_S:g} s") from error

    def _reset_counters(self, intent: Intent, change: KernelChange) -> None:
        boot_counters.reset(self._state_dir, change.carve_out, intent.operation, boot_id())

    def _pair(self) -> ClockPair:
        if self._rate is not None:
            with suppress(NoCounter):
                return self._rate.pair()
        return ClockPair(0, time.time(), 0.0)

    def _stay(self, change: KernelChange, claimed: Sequence[ReplacePlan]) -> None:
        """The guests are in their files as before; whatever of it fails is done by the way out, which knows these claims."""
        change.left = None
        self._kernel.disarm_watchdog()
        for plan in claimed:
            with suppress(OSError, claims.BadClaim):
                within(_STORE_S, lambda plan=plan: _claim_file(plan), key=f"staying: {plan.vm}")  # type: ignore[misc]
        with suppress(OSError):
            within(_STORE_S, self._watch.record, key="staying: intent")


def _claim_left(plan: ReplacePlan) -> None:
    """The very last decision: who would start a process for the guest finds it and waits."""
    number, owner = claims.current(plan.claims)
    own = read_process(os.getpid())
    if owner is None or owner.kind != "file" or own is None:
        raise GuardRefusal(f"VM {plan.vm} is not in its files any more")
    text = Owner("left", pid=own.pid, start_ticks=own.start_ticks, boot8=boot8()).text
    if claims.claim(plan.claims, number + 1, text, durable=True) != text:
        raise GuardRefusal(f"VM {plan.vm} was given to a process in the meantime")


def _claim_file(plan: ReplacePlan) -> None:
    number, owner = claims.current(plan.claims)
    if owner is None or owner.kind != "left" or owner.pid != os.getpid() or owner.boot8 != boot8():
        return
    file = claims.last_file(plan.claims, number)
    if file is not None:
        claims.claim(plan.claims, number + 1, file.text, durable=True)
