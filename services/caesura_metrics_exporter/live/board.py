"""The state shared by the parts of the live page: revisions, time, lanes, log and alarms. Pure."""

from __future__ import annotations

from collections.abc import Callable

from caesura_metrics_exporter.live.activity import LogEntry
from caesura_metrics_exporter.live.activity_log import ActivityLog
from caesura_metrics_exporter.live.alarms import Alarms
from caesura_metrics_exporter.live.paused_vms import PausedVms
from caesura_metrics_exporter.live.timeline_store import TimelineStore
from caesura_metrics_exporter.live.timelines import DomainKey, Timeline

KEPT_S = 3600.0  # s of lanes and pauses
_AHEAD_S = 1.0  # s that a sender's clock may be ahead before its times are rejected
_JUMP_S = 2.0  # s by which the exporter's own clock must step to count as a jump


class Board:
    """See the module. Everything carries the revision of its last change.

    Args:
        members: gives the number of VMs of a domain.
    """

    def __init__(self, members: Callable[[str, DomainKey, int], int]) -> None:
        self.revision = 1
        self.floor = 1
        """Something was removed at this revision: a reader with an older one needs everything again."""
        self.head_at = self.rollouts_at = self.paused_at = 1
        """Revisions of the last change of the fleet's numbers and alarms, the rollouts, and the paused VMs."""
        self.now = 0.0
        self._ahead: float | None = None  # s, the wall clock minus the monotonic one
        self.lanes = TimelineStore(self.touch, members)
        self.log = ActivityLog()
        self.paused = PausedVms()
        self.alarms = Alarms()

    def touch(self) -> int:
        """The next revision."""
        self.revision += 1
        return self.revision

    def touch_head(self) -> None:
        """The numbers or the problems of the fleet changed."""
        self.head_at = self.touch()

    def say(self, line: LogEntry) -> None:
        """Add a line to the log."""
        self.log.add(self.touch(), line)

    def at(self, at: float) -> float:
        """The time of an event, unix seconds, by its sender's clock; the time of receipt if that cannot be right."""
        return at if self.now - KEPT_S <= at <= self.now + _AHEAD_S else self.now

    def lane(self, set_name: str, key: DomainKey, domain: int) -> Timeline | None:
        """The lane of a domain; None where there are too many."""
        before = (len(self.lanes), self.lanes.full)
        lane = self.lanes.at(set_name, key, domain)
        if before != (len(self.lanes), self.lanes.full):
            self.touch_head()
        return lane

    def tick(self, now: float, mono: float) -> float:
        """Advance the time; returns the seconds by which the wall clock jumped, and moves recorded times with it; usually 0."""
        ahead = now - mono
        by = ahead - self._ahead if self._ahead is not None else 0.0
        self._ahead, self.now = ahead, now
        if abs(by) <= _JUMP_S:
            return 0.0
        for lane in self.lanes:
            lane.shift(by)
        self.paused.shift(by)
        self.alarms.shift(by)
        self.log.shift(by)
        self.floor = self.head_at = self.paused_at = self.touch()
        return by

    def expire(self) -> None:
        """Drop what is older than ``KEPT_S``."""
        if self.lanes.expire(self.now - KEPT_S):
            self.floor = self.head_at = self.touch()
        if self.alarms.expire(self.now - KEPT_S):
            self.touch_head()
