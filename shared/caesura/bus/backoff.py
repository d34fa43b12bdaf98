"""How long to wait before the next attempt: exponential backoff with full jitter above a floor. Pure except for the
random source, which is an argument."""

from __future__ import annotations

from collections.abc import Callable


class Backoff:
    """Delays in seconds, never under ``min_s``, never over ``max_s``.

    Full jitter keeps thousands of clients of a restarted broker from coming back in one wave; the floor
    keeps any one of them from spinning.

    Args:
        uniform: as ``random.uniform``.
    """

    def __init__(self, min_s: float, max_s: float, uniform: Callable[[float, float], float]) -> None:
        self._min_s = min_s
        self._max_s = max_s
        self._uniform = uniform
        self._ceiling_s = min_s

    def next_s(self) -> float:
        """The delay before the next attempt; each call doubles the ceiling of the one after."""
        self._ceiling_s = min(self._max_s, self._ceiling_s * 2)
        return self._uniform(self._min_s, self._ceiling_s)

    def reset(self) -> None:
        """After a stable connection: start again at the floor."""
        self._ceiling_s = self._min_s

    def longest_s(self) -> float:
        """A delay near the maximum, for failures that an earlier retry would only make worse."""
        self._ceiling_s = self._max_s
        return self._uniform(max(self._min_s, self._max_s / 2), self._max_s)
