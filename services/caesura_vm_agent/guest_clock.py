"""The guest's clock: the system's, or a simulated one for a guest that is only a process.

``SystemClock`` steps CLOCK_REALTIME with adjtimex(2) ADJ_SETOFFSET | ADJ_NANO (relative, so nothing is lost
between reading and setting) and falls back to clock_settime(2). Both need CAP_SYS_TIME.

``SimulatedClock`` is used where the VM is a frozen process: such a process sees host time pass, a paused
guest does not. Host time counts as frozen when, between two looks at the clock, the process neither ran nor
waited for a CPU for longer than ``gap_threshold_s``. What it ran and waited comes from /proc/self/schedstat
(Linux, Documentation/scheduler/sched-stats.rst): a starved process is in the run queue and its wait is
counted there, a stopped or cgroup-frozen one is not. So a busy machine is not mistaken for a pause. Where
that file is missing, every long gap counts as frozen.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import time
import weakref
from collections.abc import Callable
from typing import Protocol

from caesura.runtime.errors import CaesuraError
from caesura_vm_agent.ntp import NS_PER_S

_ADJ_SETOFFSET = 0x0100  # include/uapi/linux/timex.h: add `time` to the current time
_ADJ_NANO = 0x2000  # `time.tv_usec` holds nanoseconds


class ClockError(CaesuraError):
    """The guest clock could not be stepped."""


class GuestClock(Protocol):
    """The clock that clock-sync measures and steps."""

    simulated: bool

    def now_ns(self) -> int:
        """Guest wall clock, nanoseconds since 1970."""

    def monotonic_ns(self) -> int:
        """Guest monotonic clock, nanoseconds; is stopped during a pause, never goes back."""

    def step(self, by_ns: int) -> None:
        """Move the wall clock by this much. Raises ClockError if that is not possible."""

    async def run(self) -> None:
        """What the clock needs done for as long as the agent runs."""


AdjustOffset = Callable[[int], None]
"""Moves CLOCK_REALTIME by nanoseconds; raises OSError."""


class SystemClock:
    """CLOCK_REALTIME of this machine."""

    simulated = False

    def __init__(
        self,
        *,
        now_ns: Callable[[], int] = time.time_ns,
        monotonic_ns: Callable[[], int] = time.monotonic_ns,
        adjust: AdjustOffset | None = None,
        settime_ns: Callable[[int], None] | None = None,
    ) -> None:
        self._now_ns = now_ns
        self._monotonic_ns = monotonic_ns
        self._adjust = adjust if adjust is not None else adjtimex_setoffset
        self._settime_ns = settime_ns if settime_ns is not None else set_realtime

    def now_ns(self) -> int:
        """See ``GuestClock``."""
        return self._now_ns()

    def monotonic_ns(self) -> int:
        """See ``GuestClock``."""
        return self._monotonic_ns()

    def step(self, by_ns: int) -> None:
        """See ``GuestClock``."""
        try:
            self._adjust(by_ns)
        except PermissionError as error:
            raise ClockError(
                "not permitted to set the clock: run the agent with CAP_SYS_TIME (as root, or by its systemd unit)"
            ) from error
        except OSError:
            # An old kernel, or a seccomp profile that knows only one of the two calls.
            self._settime(by_ns)

    def _settime(self, by_ns: int) -> None:
        try:
            self._settime_ns(self._now_ns() + by_ns)
        except PermissionError as error:
            raise ClockError(
                "not permitted to set the clock: run the agent with CAP_SYS_TIME (as root, or by its systemd unit)"
            ) from error
        except OSError as error:
            raise ClockError(f"the kernel refused to set the clock: {error}") from error

    async def run(self) -> None:
        """The kernel keeps this clock; nothing to do."""
        await asyncio.get_running_loop().create_future()


class SimulatedClock:
    """A guest clock that advances only while this process is not frozen.

    Args:
        tick_s: seconds between two looks of the background task. A pause begins somewhere between two looks, so
            it is left out to within half a tick. Ten looks a second cost a quarter of a percent of a core.
        gap_threshold_s: an idle gap longer than this is a pause. Pauses of interest last 0.3 s and more; a
            running process is idle for one tick at most, so 0.2 s tells the two apart with room on both sides.
        monotonic_ns: host monotonic clock. wall_ns: host wall clock, read once: guest time starts right.
        busy_ns: nanoseconds that this process ran or waited for a CPU so far.
    """

    simulated = True

    def __init__(
        self,
        *,
        tick_s: float = 0.1,
        gap_threshold_s: float = 0.2,
        monotonic_ns: Callable[[], int] = time.monotonic_ns,
        wall_ns: Callable[[], int] = time.time_ns,
        busy_ns: Callable[[], int] | None = None,
    ) -> None:
        self._tick_s = tick_s
        self._tick_ns = round(tick_s * NS_PER_S)
        self._threshold_ns = round(gap_threshold_s * NS_PER_S)
        self._host_ns = monotonic_ns
        self._busy_ns = busy_ns if busy_ns is not None else ProcessTime()
        self._seen_ns = monotonic_ns()
        self._seen_busy_ns = self._busy_ns()
        self._wall_minus_guest_ns = wall_ns() - self._seen_ns
        self.frozen_ns = 0
        """Host nanoseconds that were left out so far."""

    def monotonic_ns(self) -> int:
        """See ``GuestClock``."""
        host_ns = self._host_ns()
        busy_ns = self._busy_ns()
        idle_ns = (host_ns - self._seen_ns) - (busy_ns - self._seen_busy_ns)
        if idle_ns > self._threshold_ns:
            # Up to one tick of the gap was sleep before the pause; half of it is the best guess.
            self.frozen_ns += idle_ns - self._tick_ns // 2
        self._seen_ns = host_ns
        self._seen_busy_ns = busy_ns
        return host_ns - self.frozen_ns

    def now_ns(self) -> int:
        """See ``GuestClock``."""
        return self.monotonic_ns() + self._wall_minus_guest_ns

    def step(self, by_ns: int) -> None:
        """See ``GuestClock``."""
        self._wall_minus_guest_ns += by_ns

    async def run(self) -> None:
        """Look at the clock often enough that only a pause leaves a long gap."""
        while True:
            self.monotonic_ns()
            await asyncio.sleep(self._tick_s)


class ProcessTime:
    """Nanoseconds that this process's main thread ran plus waited for a CPU; always 0 where there is no such file."""

    def __init__(self, path: str = "/proc/self/schedstat") -> None:
        self._file: int | None = None
        try:
            # Open for the life of the clock: it is read some 20 times a second.
            self._file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return
        weakref.finalize(self, os.close, self._file)

    def __call__(self) -> int:
        """The sum so far."""
        if self._file is None:
            return 0
        ran, waited, *_ = os.pread(self._file, 128, 0).split()
        return int(ran) + int(waited)


def set_realtime(ns: int) -> None:
    """Set CLOCK_REALTIME of this machine, nanoseconds since 1970. Raises OSError."""
    time.clock_settime_ns(time.CLOCK_REALTIME, ns)


class _Timex(ctypes.Structure):
    """struct timex of adjtimex(2), 64-bit Linux."""

    _fields_ = (
        ("modes", ctypes.c_uint),
        ("offset", ctypes.c_long),
        ("freq", ctypes.c_long),
        ("maxerror", ctypes.c_long),
        ("esterror", ctypes.c_long),
        ("status", ctypes.c_int),
        ("constant", ctypes.c_long),
        ("precision", ctypes.c_long),
        ("tolerance", ctypes.c_long),
        ("tv_sec", ctypes.c_long),
        ("tv_fraction", ctypes.c_long),
        ("tick", ctypes.c_long),
        ("reserved", ctypes.c_long * 16),
    )


def setoffset_request(by_ns: int) -> _Timex:
    """The adjtimex request for a step. The fraction must be 0 to 999,999,999 also when the step is negative."""
    seconds, fraction = divmod(by_ns, NS_PER_S)
    return _Timex(modes=_ADJ_SETOFFSET | _ADJ_NANO, tv_sec=seconds, tv_fraction=fraction)


def adjtimex_setoffset(by_ns: int) -> None:
    """Move CLOCK_REALTIME of this machine.

    Raises:
        OSError: the kernel refused; PermissionError without CAP_SYS_TIME.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    request = setoffset_request(by_ns)
    if libc.adjtimex(ctypes.byref(request)) < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
