"""What an armed operation knows of a change of the host's kernel, as data: part of the guard's intent, read by another boot.

Instants of CLOCK_MONOTONIC mean nothing in another boot, so everything that is to be read there is on CLOCK_REALTIME, seconds since 1970.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

By = Literal["initramfs", "unit", "crash-kernel", "guard"]
"""Who resumed the guests in the new boot."""
VmEnd = Literal["running", "lost", "undecided"]
"""``lost``: its memory is not what it was, or was run on already. ``undecided``: it is in its files, and is tried again."""


class UnreadableChange(ValueError):
    """Not what a guard of this version wrote."""


@dataclass(frozen=True)
class ClockPair:
    """One instant on the two clocks that a jump can be measured with.

    Args:
        tsc: the processor's time stamp counter, ticks.
        realtime: CLOCK_REALTIME, s.
        khz: the counter's rate, 1000 ticks a second.
        trusted: whether the counter is known to be steady and to continue over a jump.
    """

    tsc: int
    realtime: float
    khz: float
    trusted: bool = False


@dataclass(frozen=True)
class Left:
    """The last that the former kernel's guard wrote. ``monotonic``: s on that boot's clock at ``pair``.

    ``rtc``: what the RTC itself said, s since 1970; it may be in local time, or wrong, and is compared with itself only. None: there is none.
    """

    pair: ClockPair
    monotonic: float
    release: str
    rtc: float | None = None


@dataclass(frozen=True)
class HostClock:
    """How the new boot set CLOCK_REALTIME. ``source``: ``tsc``, or ``rtc`` where the counter cannot be trusted."""

    source: Literal["tsc", "rtc"]
    error_before_s: float | None
    """What it was off by as the kernel had set it; None: not known."""
    uncertainty_s: float


@dataclass
class VmArrival:
    """What became of one guest. ``running_at``: s on CLOCK_REALTIME, corrected."""

    end: VmEnd
    running_at: float | None = None
    pid: int = 0
    start_ticks: int = 0
    why: str = ""


@dataclass
class Arrival:
    """What the new boot found and did."""

    boot_id: str
    release: str
    by: By
    clock: HostClock
    at: float
    """s on CLOCK_REALTIME, corrected: when it began."""
    vms: dict[str, VmArrival] = field(default_factory=dict)
    doubts: list[str] = field(default_factory=list)
    """Why guests' memory may not be what it was; then none of them is loaded."""
    phases: dict[str, float] = field(default_factory=dict)
    """What the pause consists of, as far as it is known: name to seconds."""
    unseen_s: float = 0.0
    """From the leaving of the former kernel, or the arrival in another boot since, to the start of this boot's kernel, s."""


@dataclass
class KernelChange:
    """That the host's kernel is to be replaced while the operation's guests are paused.

    Args:
        expected_release: the kernel that is loaded, as ``uname -r`` names it.
        carve_out: where the file system with guests' RAM is mounted.
        rehearsal: there are no guests; a throw-away QEMU is started so that its time is part of the measurement.
        watchdog_s: after which a hardware watchdog resets the host; 0: none.
        left: None until the guard leaves the kernel.
        arrival: None until another boot has seen it.
    """

    expected_release: str
    carve_out: str
    rehearsal: bool = False
    watchdog_s: int = 0
    left: Left | None = None
    arrival: Arrival | None = None


def to_json(change: KernelChange) -> dict[str, Any]:
    """As it is on disk and goes over the socket."""
    return asdict(change)


def from_json(data: Any) -> KernelChange:
    """Read one. Raises UnreadableChange."""
    try:
        left, arrival = data["left"], data["arrival"]
        return KernelChange(
            str(data["expected_release"]),
            str(data["carve_out"]),
            bool(data["rehearsal"]),
            int(data["watchdog_s"]),
            None if left is None else _left(left),
            None if arrival is None else _arrival(arrival),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UnreadableChange(f"the change of the kernel cannot be read: {error!r}") from error


def _left(data: Any) -> Left:
    pair = data["pair"]
    return Left(
        ClockPair(int(pair["tsc"]), float(pair["realtime"]), float(pair["khz"]), bool(pair["trusted"])),
        float(data["monotonic"]),
        str(data["release"]),
        None if data.get("rtc") is None else float(data["rtc"]),
    )


def _arrival(data: Any) -> Arrival:
    clock = data["clock"]
    if data["by"] not in get_args(By) or clock["source"] not in ("tsc", "rtc"):
        raise UnreadableChange(f"an arrival by {data['by']!r} with a clock of {clock['source']!r}")
    vms = {str(vm): VmArrival(**each) for vm, each in data["vms"].items()}
    if any(each.end not in get_args(VmEnd) for each in vms.values()):
        raise UnreadableChange("a VM with an unknown end")
    return Arrival(
        str(data["boot_id"]),
        str(data["release"]),
        data["by"],
        HostClock(clock["source"], clock["error_before_s"], float(clock["uncertainty_s"])),
        float(data["at"]),
        vms,
        [str(each) for each in data["doubts"]],
        {str(name): float(seconds) for name, seconds in data["phases"].items()},
        float(data.get("unseen_s", 0.0)),
    )
