"""All lanes, the last changed at the end, so that what changed since a revision is found from there. Pure."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator

from caesura_metrics_exporter.lanes import DomainKey, Lane, lane_name

LANES_KEPT = 4096  # 100 sets of 20 domains, twice


class LaneBook:
    """See the module.

    Args:
        touch: gives the next revision.
        members: the VMs of a domain, for a lane that is new.
    """

    def __init__(self, touch: Callable[[], int], members: Callable[[str, DomainKey, int], set[str]]) -> None:
        self._touch = touch
        self._members = members
        self._lanes: OrderedDict[str, Lane] = OrderedDict()
        self.full = False
        """A lane was asked for that there was no room for."""

    def __len__(self) -> int:
        return len(self._lanes)

    def __iter__(self) -> Iterator[Lane]:
        return iter(list(self._lanes.values()))

    def at(self, set_name: str, key: DomainKey, domain: int) -> Lane | None:
        """The lane, made where there is none yet; None where there are too many."""
        name = lane_name(set_name, key, domain)
        lane = self._lanes.get(name)
        if lane is not None:
            return lane
        if len(self._lanes) >= LANES_KEPT:
            self.full = True
            return None
        lane = self._lanes[name] = Lane(set_name, key, domain)
        lane.vms = self._members(set_name, key, domain)
        return lane

    def get(self, set_name: str, key: DomainKey, domain: int) -> Lane | None:
        """The lane, where there is one."""
        return self._lanes.get(lane_name(set_name, key, domain))

    def changed(self, lane: Lane) -> None:
        """Note that this lane changed."""
        lane.revision = self._touch()
        self._lanes.move_to_end(lane.name)

    def since(self, revision: int) -> Iterator[Lane]:
        """Lanes that changed after this revision, the last changed first."""
        for lane in reversed(self._lanes.values()):
            if lane.revision <= revision:
                return
            yield lane

    def expire(self, before: float) -> bool:
        """Forget what ended earlier, and lanes that nothing is left of; whether a lane went."""
        gone = False
        for lane in self:
            if lane.trim(before):
                self.changed(lane)
            # A domain that VMs say they are in stays; one that only a rollout went by goes with what is drawn of it.
            lives = lane.rollout or lane.waits if lane.key == "fault_domain" else lane.vms
            if not (lives or lane.segments or lane.marks):
                del self._lanes[lane.name]
                self.full, gone = False, True
        return gone
