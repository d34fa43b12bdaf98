"""One update domain of a set over time, as the live page draws it. Pure; times are unix seconds and are passed as arguments."""

from __future__ import annotations

from heapq import nlargest
from math import inf
from statistics import median
from typing import Literal

import msgspec

SEGMENTS_KEPT = 40  # a wave makes some five
SEGMENTS_IDLE = 12  # sent of an idle lane
MARKS_KEPT = 200  # pauses of a domain
MARKS_SENT = 40  # of these, to be drawn individually
MARKS_IDLE = 12  # of an idle lane

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
"""Maps a wave's status to the state of a lane. ``frozen`` comes from the hosts' facts, never from a wave."""


def lane_name(set_name: str, key: DomainKey, domain: int) -> str:
    """The id of a lane on the page."""
    return f"{set_name}/{'fd' if key == 'fault_domain' else 'ud'}/{domain}"


class Segment(msgspec.Struct, omit_defaults=True):
    """A period in one state. ``end`` is None while it lasts."""

    state: LaneState
    start: float
    end: float | None = None
    wave: int = 0
    not_before: float | None = None
    """For a scheduled one: the latest start."""
    note: str = ""
    since_unknown: bool = False
    """It began before ``start`` at an unknown time."""


class PausePoint(msgspec.Struct, frozen=True, omit_defaults=True):
    """One finished pause, seconds by the host's monotonic clock."""

    at: float
    vm: str
    seconds: float
    budget: float
    over: bool = False
    guard: bool = False
    """The pause guard ended it."""


class Clock(msgspec.Struct, frozen=True, omit_defaults=True):
    """A VM's clock after its last pause; seconds, guest minus host."""

    vm: str
    synced: bool
    before: float | None = None
    after: float | None = None
    simulated: bool = False


class PauseFigures(msgspec.Struct, frozen=True):
    """Statistics of the last hour's pauses: number, and seconds."""

    count: int
    least: float
    median: float
    """Of the last ``MARKS_KEPT``."""
    most: float
    over: int
    """The number of pauses longer than their budget."""


class _Minute(msgspec.Struct):
    """The summary of all pauses that ended within one minute."""

    count: int = 0
    over: int = 0
    least: float = inf
    most: float = 0.0


class LaneView(msgspec.Struct, frozen=True, omit_defaults=True):
    """A lane as it is sent. ``state`` is its current state, empty if idle."""

    lane: str
    set: str
    key: DomainKey
    domain: int
    vms: int
    state: LaneState | Literal[""]
    standing: int = 0
    """The VMs of it that are paused now."""
    waits: int | None = None
    """The next wave."""
    segments: tuple[Segment, ...] = ()
    pauses: PauseFigures | None = None
    marks: tuple[PausePoint, ...] = ()
    """The worst first."""
    budget: float | None = None
    clock: Clock | None = None
    """For the VM with the largest error."""
    unsynced: int = 0


class Timeline:
    """The history of one domain. Bounded: ``SEGMENTS_KEPT``, ``MARKS_KEPT``, an hour's minutes, and one clock per VM."""

    def __init__(self, set_name: str, key: DomainKey, domain: int) -> None:
        self.set = set_name
        self.key = key
        self.domain = domain
        self.revision = 0
        self.rollout = ""
        self.wave = -1
        self.wave_status = ""
        self.waits: tuple[str, int] | None = None
        """The rollout and its next wave."""
        self.standing = 0
        self.segments: list[Segment] = []
        self.marks: list[PausePoint] = []
        self.clocks: dict[str, Clock] = {}
        self._minutes: dict[int, _Minute] = {}

    @property
    def name(self) -> str:
        """Its id on the page."""
        return lane_name(self.set, self.key, self.domain)

    @property
    def state(self) -> LaneState | Literal[""]:
        """Its current state."""
        last = self.segments[-1] if self.segments else None
        return last.state if last is not None and last.end is None else ""

    def enter(
        self,
        state: LaneState,
        at: float,
        *,
        not_before: float | None = None,
        note: str = "",
        since_unknown: bool = False,
    ) -> None:
        """Begin a segment, ending the previous one. A time before that one's start counts as its start."""
        last = self.segments[-1] if self.segments else None
        if last is not None and last.end is None:
            if last.state == state and last.wave == max(self.wave, 0):
                last.note = note or last.note
                last.not_before = not_before or last.not_before
                if last.since_unknown and not since_unknown:
                    before = self.segments[-2].end if len(self.segments) > 1 else None
                    last.start, last.since_unknown = max(before or 0.0, min(at, last.start)), False
                return
            at = max(at, last.start)
        elif last is not None and last.end is not None:
            at = max(at, last.end)
        self.close(at)
        self.segments.append(Segment(state, at, None, max(self.wave, 0), not_before, note, since_unknown))
        if len(self.segments) > SEGMENTS_KEPT:
            self._make_room()

    def _make_room(self) -> None:
        """Consecutive swaps are many short segments of one wave: two are merged, so that earlier segments are kept."""
        for index in range(len(self.segments) - 3):
            first, _, third = three = self.segments[index : index + 3]
            alike = len({each.wave for each in three}) == 1 and third.end is not None
            if alike and [each.state for each in three] == ["frozen", "resumed", "frozen"]:
                first.end, first.note = third.end, "several pauses, one after another"
                del self.segments[index + 1 : index + 3]
                return
        del self.segments[0]

    def close(self, at: float) -> None:
        """End the open segment, if there is one."""
        if self.segments and self.segments[-1].end is None:
            self.segments[-1].end = max(at, self.segments[-1].start)

    def take_back(self) -> None:
        """Retract the open segment, which was never true."""
        if self.segments and self.segments[-1].end is None:
            del self.segments[-1]

    def mark(self, mark: PausePoint) -> None:
        """Add a finished pause."""
        minute = self._minutes.setdefault(int(mark.at // 60), _Minute())
        minute.count += 1
        minute.over += mark.over
        minute.least, minute.most = min(minute.least, mark.seconds), max(minute.most, mark.seconds)
        self.marks.append(mark)
        if len(self.marks) > MARKS_KEPT:
            most = max(each.seconds for each in self.marks)  # this one is kept, as are those with a failure
            self.marks.remove(min(self.marks, key=lambda each: (each.over, each.guard, each.seconds == most)))

    def shift(self, by: float) -> None:
        """The wall clock jumped: recorded times move with it, so that the order is kept."""
        for segment in self.segments:
            segment.start += by
            segment.end = None if segment.end is None else segment.end + by
        self.marks = [msgspec.structs.replace(mark, at=mark.at + by) for mark in self.marks]
        self._minutes = {minute + round(by / 60): each for minute, each in self._minutes.items()}

    def trim(self, before: float) -> bool:
        """Drop what ended earlier; returns whether there was anything."""
        old = len(self.segments) + len(self.marks) + len(self._minutes)
        self.segments = [each for each in self.segments if each.end is None or each.end >= before]
        self.marks = [each for each in self.marks if each.at >= before]
        self._minutes = {minute: each for minute, each in self._minutes.items() if minute >= before // 60}
        return len(self.segments) + len(self.marks) + len(self._minutes) != old

    def view(self, vms: int) -> LaneView:
        """As it is sent. ``vms``: how many VMs its domain has."""
        off = [clock for clock in self.clocks.values() if clock.after is not None]
        idle = not self.rollout and not self.state
        return LaneView(
            lane=self.name,
            set=self.set,
            key=self.key,
            domain=self.domain,
            vms=vms,
            state=self.state,
            standing=self.standing,
            waits=self.waits[1] if self.waits is not None else None,
            segments=tuple(self.segments[-SEGMENTS_IDLE:] if idle else self.segments),
            pauses=self._figures(),
            marks=tuple(nlargest(MARKS_IDLE if idle else MARKS_SENT, self.marks, key=_badness)),
            budget=self.marks[-1].budget if self.marks else None,
            clock=max(off, key=lambda clock: abs(clock.after or 0.0), default=None),
            unsynced=sum(not clock.synced for clock in self.clocks.values()),
        )

    def _figures(self) -> PauseFigures | None:
        minutes = self._minutes.values()
        if not self.marks or not minutes:
            return None
        return PauseFigures(
            count=sum(each.count for each in minutes),
            least=min(each.least for each in minutes),
            median=median(mark.seconds for mark in self.marks),
            most=max(each.most for each in minutes),
            over=sum(each.over for each in minutes),
        )


def _badness(mark: PausePoint) -> tuple[bool, bool, float]:
    return mark.over, mark.guard, mark.seconds
