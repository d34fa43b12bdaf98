"""When each step of a scenario is due: in order, none before its time. Pure."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

from caesura_rehearse.scenarios.scenario import OnEventStep, OrderStep, Step


class Wait(NamedTuple):
    """Nothing is due before."""

    until_s: float | None
    """Seconds since the scenario began; None: until all events are over."""


class Script:
    """The steps that are to come.

    Args:
        steps: in order.
        speed: by which the time between them is shortened.
    """

    def __init__(self, steps: Sequence[Step], speed: float = 1.0) -> None:
        self._steps = list(steps)
        self._speed = speed
        self._due_s = 0.0

    def next(
        self, now_s: float, announced: Mapping[str, float], open_events: Collection[str]
    ) -> Step | Wait | None:
        """The step that is due, which counts as carried out then; or how long none is; None: that was the last one.

        Args:
            now_s: seconds since the scenario began.
            announced: when the events of the steps so far were announced, by name, in the same seconds.
            open_events: the names of those that are not over.
        """
        if not self._steps:
            return None
        step = self._steps[0]
        due_s = self._due(step, announced, open_events)
        if due_s is None:
            return Wait(None)
        if now_s < due_s:
            return Wait(due_s)
        self._due_s = due_s
        del self._steps[0]
        return step

    def _due(self, step: Step, announced: Mapping[str, float], open_events: Collection[str]) -> float | None:
        match step:
            case OnEventStep():
                if step.name not in open_events:
                    return self._due_s  # it is over: the step comes too late, which is said then
                return max(self._due_s, announced[step.name] + step.after_s / self._speed)
            case OrderStep(at_s=None):
                return None if open_events else self._due_s
            case _:
                return max(self._due_s, (step.at_s or 0.0) / self._speed)
