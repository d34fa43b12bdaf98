"""The processor's time stamp counter: the one clock that continues while one kernel follows another.

CLOCK_MONOTONIC begins again, and CLOCK_REALTIME is set by the new kernel from the RTC's whole seconds plus a half (``rtc_hctosys``): wrong
by up to half a second. An invariant counter is right within some parts in a million of its rate (Intel SDM volume 3, "Invariant TSC").
"""

# light imports on purpose: no pathlib here.
# ruff: noqa: PTH123

from __future__ import annotations

import os
import platform
import time
from dataclasses import dataclass

from caesura_vmcontrol.kernel_change import ClockPair, Left

_RDTSC = bytes.fromhex("0faee80f3148c1e2204809d0c3")  # lfence; rdtsc; shl rdx,32; or rax,rdx; ret
_RTC_S = 1.5  # s: by how much the RTC, read in whole seconds, may differ from the counter before the counter is not believed
_RTC = "/sys/class/rtc/rtc0/since_epoch"
_RATE_ERROR = 20e-6  # of the elapsed time: 2 to 9 parts in a million were seen
_READ_S = 0.001  # s: to set a clock
RTC_UNCERTAINTY_S = 1.0
"""Where the counter cannot be trusted: whole seconds of the RTC, and half a second added."""


def rtc() -> float | None:
    """What the host's RTC says, whole seconds since 1970; it may be in local time, or wrong. None: there is none."""
    try:
        with open(_RTC, encoding="ascii") as file:
            return float(file.read())
    except (OSError, ValueError):
        return None


class NoCounter(OSError):
    """This processor, or what the kernel allows us, has no time stamp counter."""


def tsc() -> int:
    """The counter now, in ticks. Raises NoCounter."""
    return _Counter.the().read()


class _Counter:
    """The instruction, in a file of memory that is mapped for reading and executing, never for writing."""

    _one: _Counter | None = None

    def __init__(self) -> None:
        import ctypes  # noqa: PLC0415 - a guard that never leaves its kernel does not need it

        if platform.machine() != "x86_64":
            raise NoCounter(f"{platform.machine()} has no time stamp counter")
        handle = os.memfd_create("rdtsc", os.MFD_CLOEXEC)
        try:
            os.write(handle, _RDTSC)
            libc = ctypes.CDLL(None, use_errno=True)
            libc.mmap.restype = ctypes.c_void_p
            libc.mmap.argtypes = (
                ctypes.c_void_p,
                ctypes.c_size_t,
                ctypes.c_int,
                ctypes.c_int,
                ctypes.c_int,
                ctypes.c_long,
            )
            read_execute, private = 1 | 4, 2
            place = libc.mmap(None, len(_RDTSC), read_execute, private, handle, 0)
            if place in (None, ctypes.c_void_p(-1).value):
                raise NoCounter(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        finally:
            os.close(handle)
        self._call = ctypes.CFUNCTYPE(ctypes.c_uint64)(place)

    @classmethod
    def the(cls) -> _Counter:
        if cls._one is None:
            cls._one = cls()
        return cls._one

    def read(self) -> int:
        return int(self._call())


def trusted_tsc(cpuinfo: str, command_line: str) -> bool:
    """Whether the counter has one rate whatever the processor does, or the command line says so. Pure.

    Args:
        cpuinfo: ``/proc/cpuinfo``.
        command_line: ``/proc/cmdline``.
    """
    flags = next((line.split() for line in cpuinfo.splitlines() if line.startswith("flags")), [])
    return {"constant_tsc", "nonstop_tsc"} <= set(flags) or "tsc=reliable" in command_line.split()


def trusted_here() -> bool:
    """As ``trusted_tsc``, of this host."""
    try:
        with open("/proc/cpuinfo", encoding="ascii", errors="replace") as file:
            cpuinfo = file.read()
        with open("/proc/cmdline", encoding="utf-8", errors="replace") as file:
            return trusted_tsc(cpuinfo, file.read())
    except OSError:
        return False


class RateMeasurement:
    """The counter's rate, measured against CLOCK_MONOTONIC, which NTP keeps at the rate of true seconds."""

    def __init__(self) -> None:
        self._begin = _both()

    def pair(self) -> ClockPair:
        """Now, on both clocks. Raises NoCounter."""
        ticks, monotonic = _both()
        elapsed_s = monotonic - self._begin[1]
        khz = (ticks - self._begin[0]) / elapsed_s / 1000 if elapsed_s > 0 else 0.0
        before = tsc()
        realtime = time.time()
        ticks = (before + tsc()) // 2
        return ClockPair(ticks, realtime, khz, trusted_here() and khz > 0)


def _both() -> tuple[int, float]:
    before = tsc()
    monotonic = time.monotonic()
    return (before + tsc()) // 2, monotonic


def by_rtc(left: Left, realtime: float, rtc_now: float | None) -> float:
    """How long ago the former kernel was left by the RTC, s. Pure.

    The RTC is compared with itself. The kernel's own time, which comes from it, was another clock's in the former boot: an RTC in
    local time, or one that nobody sets, differs from that by any amount.

    Args:
        realtime: CLOCK_REALTIME now, as the new kernel has set it.
        rtc_now: as ``rtc``.
    """
    if left.rtc is not None and rtc_now is not None:
        return rtc_now - left.rtc
    return realtime - left.pair.realtime


@dataclass(frozen=True)
class Elapsed:
    """Since the former kernel was left: seconds, by which clock, and how far they may be off, in seconds."""

    seconds: float
    by_tsc: bool
    uncertainty_s: float


def elapsed_since(left: ClockPair, ticks: int | None, by_rtc_s: float) -> Elapsed:
    """How long ago ``left`` was. Pure.

    Args:
        left: the last instant of the former kernel.
        ticks: the counter now; None: there is none that can be trusted.
        by_rtc_s: how long ago it was by the RTC, s, see ``by_rtc``.
    """
    if ticks is not None and left.trusted and left.khz > 0:
        by_tsc_s = (ticks - left.tsc) / left.khz / 1000
        # A reset through the firmware starts the counter again.
        if by_tsc_s > 0 and abs(by_tsc_s - by_rtc_s) <= _RTC_S:
            return Elapsed(by_tsc_s, True, _READ_S + _RATE_ERROR * by_tsc_s)
    return Elapsed(by_rtc_s, False, RTC_UNCERTAINTY_S)
