"""Limits of the real service that few want on their own hosts: rate limit, switch-off, slow first answer. Pure.

- Five requests a second and VM, then 429 ("Rate limiting", instance-metadata-service.md). How the real service counts is not documented;
  here no second on the clock has more than five that were served.
- The first call for events switches the feature on, for all VMs of the set ("Enabling and disabling scheduled events",
  scheduled-events.md). That answer may take up to two minutes; the log of a real VM shows one.
- After 24 hours without a call of any VM of the set it is off again.

A restart of the publisher forgets all of this: the next call is a first one.
"""

from __future__ import annotations

from collections import deque

REQUESTS_A_SECOND = 5
SWITCHED_OFF_S = 24 * 3600.0


class RateLimit:
    """The requests of each VM."""

    def __init__(self) -> None:
        self._served: dict[str, deque[float]] = {}

    def allows(self, vm: str, now_s: float) -> bool:
        """Whether this request is served; one that is not does not count.

        Args:
            now_s: seconds on a monotonic clock.
        """
        served = self._served.setdefault(vm, deque(maxlen=REQUESTS_A_SECOND))
        if len(served) == REQUESTS_A_SECOND and now_s - served[0] < 1.0:
            return False
        served.append(now_s)
        return True


class FirstCalls:
    """Since when each set's events are switched on.

    Args:
        first_answer_s: seconds that the first answer takes.
    """

    def __init__(self, first_answer_s: float) -> None:
        self._first_answer_s = first_answer_s
        self._on_at: dict[str, float] = {}
        self._called_at: dict[str, float] = {}

    def called(self, set_name: str, now_s: float) -> float:
        """A VM of the set asks for events: seconds until it is answered; 0 once they are switched on.

        Args:
            now_s: seconds on a monotonic clock.
        """
        before = self._called_at.get(set_name)
        self._called_at[set_name] = now_s
        if before is None or now_s - before >= SWITCHED_OFF_S:
            self._on_at[set_name] = now_s + self._first_answer_s
        return max(0.0, self._on_at[set_name] - now_s)
