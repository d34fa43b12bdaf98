"""All lanes, the last changed at the end, so that changes since a revision are found from there. Pure."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator

from caesura_metrics_exporter.live.timelines import DomainKey, LaneView, Timeline, lane_name

LANES_KEPT = 4096  # 100 sets of 20 domains, twice


class TimelineStore:
    """See the module.

    Args:
        touch: returns the next revision.
        members: gives the number of VMs of a domain.
    """

    def __init__(self, touch: Callable[[], int], members: Callable[[str, DomainKey, int], int]) -> None:
        self._touch = touch
        self._members = members
        self._lanes: OrderedDict[str, Timeline] = OrderedDict()
        self._of_set: Counter[str] = Counter()
        self.domains = 0
        """Lanes of update domains."""
        self.full = False
        """A lane was requested for which there was no room."""

    @property
    def sets(self) -> int:
        """Sets that have a lane."""
        return len(self._of_set)

    def __len__(self) -> int:
        return len(self._lanes)

    def __iter__(self) -> Iterator[Timeline]:
        return iter(list(self._lanes.values()))

    def at(self, set_name: str, key: DomainKey, domain: int) -> Timeline | None:
        """The lane, created if necessary; None if there are too many."""
        name = lane_name(set_name, key, domain)
        lane = self._lanes.get(name)
        if lane is not None:
            return lane
        if len(self._lanes) >= LANES_KEPT:
            self.full = True
            return None
        lane = self._lanes[name] = Timeline(set_name, key, domain)
        self._of_set[set_name] += 1
        self.domains += key == "update_domain"
        self.changed(lane)
        return lane

    def get(self, set_name: str, key: DomainKey, domain: int) -> Timeline | None:
        """The lane, if it exists."""
        return self._lanes.get(lane_name(set_name, key, domain))

    def named(self, name: str) -> Timeline | None:
        """The lane with this id, if it exists."""
        return self._lanes.get(name)

    def view(self, lane: Timeline) -> LaneView:
        """A lane as it is sent."""
        return lane.view(self._members(lane.set, lane.key, lane.domain))

    def changed(self, lane: Timeline) -> None:
        """Mark this lane as changed."""
        lane.revision = self._touch()
        self._lanes.move_to_end(lane.name)

    def since(self, revision: int) -> Iterator[Timeline]:
        """Lanes that changed after this revision, the last changed first."""
        for lane in reversed(self._lanes.values()):
            if lane.revision <= revision:
                return
            yield lane

    def expire(self, before: float) -> bool:
        """Drop segments that ended earlier, and empty lanes; returns whether a lane was dropped."""
        gone = False
        for lane in self:
            if lane.trim(before):
                self.changed(lane)
            # A domain with VMs keeps its lane; one known only from a rollout is dropped together with its segments.
            if lane.key == "fault_domain":
                lives = bool(lane.rollout or lane.waits)
            else:
                lives = self._members(lane.set, lane.key, lane.domain) > 0
            if not (lives or lane.segments or lane.marks):
                self._drop(lane)
                self.full, gone = False, True
        return gone

    def _drop(self, lane: Timeline) -> None:
        del self._lanes[lane.name]
        self._of_set[lane.set] -= 1
        if not self._of_set[lane.set]:
            del self._of_set[lane.set]
        self.domains -= lane.key == "update_domain"
