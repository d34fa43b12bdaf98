"""Rate limit for log lines that others can cause at will: one now and then, with a count of those left out. Pure except for its clock."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable

EVERY_S = 10.0
_KEYS = 1024  # bounds the memory that a sender with invented keys can use

CUT = 200
"""Characters kept of a text from others in a log line."""


class Sampler:
    """Decides for each key when a line is due again.

    Args:
        every_s: seconds between two lines of one key.
        now: a monotonic clock, seconds.
    """

    def __init__(self, every_s: float = EVERY_S, now: Callable[[], float] = time.monotonic) -> None:
        self._every_s = every_s
        self._now = now
        self._seen: OrderedDict[str, tuple[float, int]] = OrderedDict()

    def due(self, key: str) -> int | None:
        """None: no line now. Otherwise how many were left out since the last line of this key."""
        now = self._now()
        said_at, left_out = self._seen.get(key, (float("-inf"), 0))
        if now - said_at < self._every_s:
            self._seen[key] = (said_at, left_out + 1)
            return None
        self._seen[key] = (now, 0)
        self._seen.move_to_end(key)
        if len(self._seen) > _KEYS:
            self._seen.popitem(last=False)
        return left_out


def cut(text: str) -> str:
    """Text from others, shortened for a log line."""
    return text if len(text) <= CUT else text[: CUT - 1] + "…"
