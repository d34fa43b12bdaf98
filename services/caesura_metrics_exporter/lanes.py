"""One update domain of a set over time, as the live page draws it. Pure; times are unix seconds and come in as arguments."""

from __future__ import annotations

from collections import deque
from statistics import median
from typing import Literal

import msgspec

SEGMENTS_KEPT = 40  # a wave makes some five
MARKS_KEPT = 40  # pauses of a domain that are drawn one by one

LaneState = Literal["scheduled", "started", "frozen", "resumed", "verified", "failed", "cancelled"]
DomainKey = Literal["update_domain", "fault_domain"]

OF_WAVE: dict[str, LaneState] = {
    "scheduled": "scheduled",
    "started": "started",
    "verifying": "resumed",
    "soaking": "resumed",
    "completed": "verified",
    "failed": "failed",
    "cancelled": "cancelled",
}
"""Wave status to what a lane shows. ``frozen`` comes from the hosts' facts, never from a wave."""


def lane_name(set_name: str, key: DomainKey, domain: int) -> str:
    """The id of a lane on the page."""
    return f"{set_name}/{'fd' if key == 'fault_domain' else 'ud'}/{domain}"


class Segment(msgspec.Struct, omit_defaults=True):
    """A stretch of time in one state. ``end`` is None while it lasts."""

    state: LaneState
    start: float
    end: float | None = None
    wave: int = 0
    not_before: float | None = None
    """Of a scheduled one: when it starts at the latest."""
    note: str = ""


class Mark(msgspec.Struct, frozen=True, omit_defaults=True):
    """One finished pause, seconds by the host's monotonic clock."""

    at: float
    vm: str
    seconds: float
    budget: float
    over: bool = False
    guard: bool = False
    """The pause guard had to end it."""


class Clock(msgspec.Struct, frozen=True, omit_defaults=True):
    """A VM's clock after its last pause; seconds, guest minus host."""

    vm: str
    synced: bool
    before: float | None = None
    after: float | None = None
    simulated: bool = False


class PauseFigures(msgspec.Struct, frozen=True):
    """Of the pauses that are kept: how many, and seconds."""

    count: int
    least: float
    median: float
    most: float


class LaneView(msgspec.Struct, frozen=True, omit_defaults=True):
    """A lane as it is sent. ``state`` is what it shows now, empty when nothing is under way."""

    lane: str
    set: str
    key: DomainKey
    domain: int
    vms: int
    state: LaneState | Literal[""]
    segments: tuple[Segment, ...] = ()
    pauses: PauseFigures | None = None
    marks: tuple[Mark, ...] = ()
    budget: float | None = None
    clock: Clock | None = None
    """Of the VM that is off most."""
    unsynced: int = 0


class Lane:
    """What is remembered of one domain. Bounded: ``SEGMENTS_KEPT``, ``MARKS_KEPT``, and one clock a VM."""

    def __init__(self, set_name: str, key: DomainKey, domain: int) -> None:
        self.set = set_name
        self.key = key
        self.domain = domain
        self.revision = 0
        self.vms: set[str] = set()
        self.rollout = ""
        self.wave = -1
        self.wave_status = ""
        self.segments: deque[Segment] = deque(maxlen=SEGMENTS_KEPT)
        self.marks: deque[Mark] = deque(maxlen=MARKS_KEPT)
        self.clocks: dict[str, Clock] = {}

    @property
    def name(self) -> str:
        """Its id on the page."""
        return lane_name(self.set, self.key, self.domain)

    @property
    def state(self) -> LaneState | Literal[""]:
        """What it shows now."""
        last = self.segments[-1] if self.segments else None
        return last.state if last is not None and last.end is None else ""

    def enter(self, state: LaneState, at: float, *, not_before: float | None = None, note: str = "") -> None:
        """Begin a stretch, ending the one before. A time before that one's start counts as its start."""
        last = self.segments[-1] if self.segments else None
        if last is not None and last.end is None:
            if last.state == state and last.wave == max(self.wave, 0):
                last.note = note or last.note
                last.not_before = not_before or last.not_before
                return
            at = max(at, last.start)
        elif last is not None and last.end is not None:
            at = max(at, last.end)
        self.close(at)
        self.segments.append(Segment(state, at, None, max(self.wave, 0), not_before, note))

    def close(self, at: float) -> None:
        """End the stretch that lasts, if there is one."""
        if self.segments and self.segments[-1].end is None:
            self.segments[-1].end = max(at, self.segments[-1].start)

    def shift(self, by: float) -> None:
        """The clock was put back: what was seen moves with it, so that the order stays."""
        for segment in self.segments:
            segment.start += by
            segment.end = None if segment.end is None else segment.end + by
        self.marks = deque(
            (msgspec.structs.replace(mark, at=mark.at + by) for mark in self.marks), maxlen=MARKS_KEPT
        )

    def trim(self, before: float) -> bool:
        """Forget what ended earlier; whether there was something."""
        old = len(self.segments) + len(self.marks)
        while self.segments and (end := self.segments[0].end) is not None and end < before:
            self.segments.popleft()
        while self.marks and self.marks[0].at < before:
            self.marks.popleft()
        return len(self.segments) + len(self.marks) != old

    def view(self) -> LaneView:
        """As it is sent."""
        seconds = [mark.seconds for mark in self.marks]
        off = [clock for clock in self.clocks.values() if clock.after is not None]
        return LaneView(
            lane=self.name,
            set=self.set,
            key=self.key,
            domain=self.domain,
            vms=len(self.vms),
            state=self.state,
            segments=tuple(self.segments),
            pauses=PauseFigures(len(seconds), min(seconds), median(seconds), max(seconds))
            if seconds
            else None,
            marks=tuple(self.marks),
            budget=self.marks[-1].budget if self.marks else None,
            clock=max(off, key=lambda clock: abs(clock.after or 0.0), default=None),
            unsynced=sum(not clock.synced for clock in self.clocks.values()),
        )
