"""Rollouts by id and by set, and the state of each set's domains from their waves. Pure.

The cost of a rollout's state depends on its size, on receipt and once more on a query; a VM's fact finds its
rollout by its set.
"""

from __future__ import annotations

import msgspec

from caesura.contract import messages as m
from caesura.contract.parts import WholeRollout

ROLLOUTS_KEPT = 100  # retained rollouts accumulate at the broker; the newest are enough for the current state

OVER = frozenset({"completed", "aborted"})

# If two waves of a rollout touch one domain, the more significant status counts.
_TELLING = ("started", "verifying", "soaking", "scheduled", "failed", "cancelled", "pending", "completed")


class SetProgress(msgspec.Struct):
    """The progress of a rollout in one set. Times are unix seconds, by domain."""

    waves: int = 0
    completed: int = 0
    status: dict[int, m.WaveStatus] = {}
    """The status of the wave that touches the domain."""
    started: dict[int, float] = {}
    """When its last wave began."""
    ended: dict[int, tuple[float, m.WaveStatus]] = {}
    """When its last wave ended, and how."""


class RolloutIndex:
    """All active rollouts, and the newest of the others: ``ROLLOUTS_KEPT`` together. At most one active rollout holds a set; others may be
    queued behind it."""

    def __init__(self) -> None:
        self.known: dict[str, WholeRollout] = {}
        self._of_set: dict[str, dict[str, WholeRollout]] = {}
        self._first: dict[str, WholeRollout] = {}
        """Maps a set to its most relevant rollout."""
        self._progress: dict[str, dict[str, SetProgress]] = {}
        """The progress by set of the rollouts queried since their last state."""

    def __len__(self) -> int:
        return len(self.known)

    def take(self, rollout: WholeRollout) -> WholeRollout | None:
        """Take the state of a rollout; returns the previous one, None for a new rollout. The oldest ended one is dropped if there are too many."""
        before = self.known.get(rollout.rollout)
        if before is not None and before.sets != rollout.sets:
            self.forget(rollout.rollout)
        self.known[rollout.rollout] = rollout
        self._progress.pop(rollout.rollout, None)
        for name in rollout.sets:
            self._of_set.setdefault(name, {})[rollout.rollout] = rollout
            first = self._first.get(name)
            if first is None or _importance(rollout) >= _importance(first):
                self._first[name] = rollout
            elif first.rollout == rollout.rollout:
                self._look(name)
        if len(self.known) > ROLLOUTS_KEPT:
            over = (each for each in self.known.values() if each.status in OVER)
            oldest = min(over, key=_importance, default=None)
            if oldest is not None:
                self.forget(oldest.rollout)
        return before

    def forget(self, rollout: str) -> WholeRollout | None:
        """The rollout was removed; returns its last state."""
        gone = self.known.pop(rollout, None)
        self._progress.pop(rollout, None)
        for name in set(gone.sets) if gone is not None else ():
            of_set = self._of_set[name]
            del of_set[rollout]
            if not of_set:
                del self._of_set[name], self._first[name]
            elif self._first[name].rollout == rollout:
                self._look(name)
        return gone

    def _look(self, name: str) -> None:
        self._first[name] = max(self._of_set[name].values(), key=_importance)

    def of_set(self, set_name: str) -> WholeRollout | None:
        """The most relevant rollout of the set: the one that holds it, else the newest."""
        return self._first.get(set_name)

    def holder(self, set_name: str) -> WholeRollout | None:
        """The active rollout that holds the set."""
        first = self._first.get(set_name)
        return first if first is not None and first.status not in OVER and not first.queued_behind else None

    def of_sets(self) -> dict[str, WholeRollout]:
        """Maps a set to its most relevant rollout, sorted by set."""
        return {name: self._first[name] for name in sorted(self._first)}

    def under_way(self, set_name: str) -> list[WholeRollout]:
        """The rollouts of the set that have not ended."""
        return [each for each in self._of_set.get(set_name, {}).values() if each.status not in OVER]

    def progress(self, rollout: WholeRollout) -> dict[str, SetProgress]:
        """By set; sets that none of its waves touch are left out."""
        known = self._progress.get(rollout.rollout)
        if known is None:
            known = self._progress[rollout.rollout] = progress_of(rollout)
        return known


def progress_of(rollout: WholeRollout) -> dict[str, SetProgress]:
    """Maps a set to the rollout's progress in it."""
    made: dict[str, SetProgress] = {}
    for wave in rollout.waves:
        started = wave.started_at.timestamp() if wave.started_at is not None else None
        ended = wave.ended_at.timestamp() if wave.ended_at is not None else None
        for name, domain in wave.domains.items():
            of_set = made.get(name)
            if of_set is None:
                of_set = made[name] = SetProgress()
            of_set.waves += 1
            of_set.completed += wave.status == "completed"
            known = of_set.status.get(domain)
            if known is None or _TELLING.index(wave.status) < _TELLING.index(known):
                of_set.status[domain] = wave.status
            if started is not None:
                of_set.started[domain] = max(started, of_set.started.get(domain, started))
            if ended is not None:
                last = (ended, wave.status)
                of_set.ended[domain] = max(last, of_set.ended.get(domain, last))
    return made


def _importance(rollout: WholeRollout) -> tuple[bool, bool, float]:
    # One that is queued has done nothing yet: the newest that ended says more about a set.
    holds = rollout.status not in OVER and not rollout.queued_behind
    return holds, rollout.status in OVER, rollout.created_at.timestamp()
