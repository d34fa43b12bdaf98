"""Rollouts by id and by set, and what their waves say of each set's domains. Pure.

A rollout's state costs its own size when it is received, and once more when it is asked for; a fact of a VM finds its
rollout by its set.
"""

from __future__ import annotations

import msgspec

from caesura.contract import messages as m
from caesura.contract.parts import WholeRollout

ROLLOUTS_KEPT = 100  # retained rollouts pile up at the broker; the newest are enough to say what is so now

OVER = frozenset({"completed", "aborted"})

# Where two waves of a rollout touch one domain, the more telling status counts.
_TELLING = ("started", "verifying", "soaking", "scheduled", "failed", "cancelled", "pending", "completed")


class SetProgress(msgspec.Struct):
    """How far a rollout is with one set. Times are unix seconds, by domain."""

    waves: int = 0
    completed: int = 0
    status: dict[int, m.WaveStatus] = {}
    """Of the wave that touches the domain."""
    started: dict[int, float] = {}
    """When its last wave began."""
    ended: dict[int, tuple[float, m.WaveStatus]] = {}
    """When its last wave ended, and how."""


class RolloutIndex:
    """Rollouts that are under way, all of them, and of the others the newest: ``ROLLOUTS_KEPT`` together. Each set has at most one under way."""

    def __init__(self) -> None:
        self.known: dict[str, WholeRollout] = {}
        self._of_set: dict[str, dict[str, WholeRollout]] = {}
        self._first: dict[str, WholeRollout] = {}
        """Set to the rollout that says most about it."""
        self._progress: dict[str, dict[str, SetProgress]] = {}
        """Of the rollouts that were asked for since their last state: by set."""

    def __len__(self) -> int:
        return len(self.known)

    def take(self, rollout: WholeRollout) -> WholeRollout | None:
        """The state of a rollout; the one before, None of a new one. The oldest that is over goes when there are too many."""
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
        """It is gone; what was known of it."""
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
        """The rollout that says most about the set: the one that holds it, else the newest."""
        return self._first.get(set_name)

    def holder(self, set_name: str) -> WholeRollout | None:
        """The rollout under way that has the set."""
        first = self._first.get(set_name)
        return first if first is not None and first.status not in OVER else None

    def of_sets(self) -> dict[str, WholeRollout]:
        """Set to the rollout that says most about it, sorted by set."""
        return {name: self._first[name] for name in sorted(self._first)}

    def under_way(self, set_name: str) -> list[WholeRollout]:
        """Those of the set that are not over."""
        return [each for each in self._of_set.get(set_name, {}).values() if each.status not in OVER]

    def progress(self, rollout: WholeRollout) -> dict[str, SetProgress]:
        """By set; sets that none of its waves touch are left out."""
        known = self._progress.get(rollout.rollout)
        if known is None:
            known = self._progress[rollout.rollout] = progress_of(rollout)
        return known


def progress_of(rollout: WholeRollout) -> dict[str, SetProgress]:
    """Set to how far the rollout is with it."""
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


def _importance(rollout: WholeRollout) -> tuple[bool, float]:
    return (rollout.status not in OVER, rollout.created_at.timestamp())
