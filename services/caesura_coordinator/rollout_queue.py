"""The rollouts that have not ended: which one holds a set, which ones wait for it, and which one a message belongs to. Pure.

The order is that in which the rollouts were accepted, and never changes: a rollout waits for every older one that has not ended and
shares a set with it. So the oldest rollout of a set holds it, no two can wait for each other, and a coordinator that restarts knows
the order from its store.
What a wave of a rollout that waits does is in ``queued_waves``.
"""

from __future__ import annotations

from collections.abc import Hashable

from caesura_coordinator.records import Rollout, Wave


class ActiveRollouts:
    """The rollouts that hold their sets or wait for them, the oldest first, with the indexes to find them."""

    def __init__(self) -> None:
        self.active: dict[str, None] = {}
        self.of_set: dict[str, dict[str, None]] = {}
        """Maps a set to its rollouts, the oldest first: that one holds it, the others wait."""
        self.ahead: dict[str, dict[str, None]] = {}
        """Maps a rollout to the older ones that share a set with it, the oldest first; without those that wait for none."""
        self.of_event: dict[str, str] = {}
        """Maps the id of an event, in lower case, to the rollout."""
        self.of_operation: dict[str, str] = {}
        self._seen: dict[str, dict[int, tuple[Hashable, ...]]] = {}
        """Maps a rollout to its waves and their indexed ids."""

    def put(self, rollout: Rollout) -> None:
        """Index a new or changed rollout."""
        if not rollout.active:
            self.forget(rollout)
            return
        seen = self._seen.get(rollout.id)
        if seen is None:
            self.active[rollout.id] = None
            for name in rollout.sets:
                of_set = self.of_set.setdefault(name, {})
                if of_set:
                    self.ahead.setdefault(rollout.id, {}).update(of_set)
                of_set[rollout.id] = None
            if rollout.id in self.ahead:
                older = self.ahead[rollout.id]
                self.ahead[rollout.id] = {name: None for name in self.active if name in older}
            self._seen[rollout.id] = {}
            for wave in rollout.waves:
                self._put_wave(rollout.id, wave)
        else:
            current = rollout.current
            if current is not None:
                self._put_wave(rollout.id, current)

    def forget(self, rollout: Rollout) -> None:
        """Remove a rollout that has ended."""
        if rollout.id not in self._seen:
            return
        del self._seen[rollout.id], self.active[rollout.id]
        for name in rollout.sets:
            of_set = self.of_set.get(name, {})
            of_set.pop(rollout.id, None)
            if not of_set:
                self.of_set.pop(name, None)
        self.ahead.pop(rollout.id, None)
        for waiting in list(self.ahead):
            self.ahead[waiting].pop(rollout.id, None)
            if not self.ahead[waiting]:
                del self.ahead[waiting]
        for index in (self.of_event, self.of_operation):
            for name in [name for name, holder in index.items() if holder == rollout.id]:
                del index[name]

    def _put_wave(self, name: str, wave: Wave) -> None:
        # A wave's events and operations are all created at once, when it is scheduled or started.
        events = (wave.events[0].event_id, len(wave.events)) if wave.events else ()
        operations = (wave.operations[0].operation, len(wave.operations)) if wave.operations else ()
        made = wave.attempt, events, operations
        if self._seen[name].get(wave.index) == made:
            return
        self._seen[name][wave.index] = made
        self.of_event |= {each.event_id.lower(): name for each in wave.events}
        self.of_operation |= {each.operation: name for each in (*wave.completed_operations, *wave.operations)}
