"""How much each writer may send to a reader: a writer that floods is refused, and the others are served. Pure.

The first levels of a topic name its writer (``caesura/v1/vm/web-1/...``), and access rules restrict every writer to its own. So one
token bucket for each is enough: a message costs one token, plus one for each 4 KiB. The coordinator has no limit; state that the broker had
retained costs nothing, since a writer has few topics for it, with one message on each.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping

import msgspec

_TOKEN_BYTES = 4096
_WRITERS = 50_000
"""Buckets kept; those that are full again can be dropped."""

MUTED_S = 30.0
"""s: how long a writer that flooded stays unsubscribed."""


class Limit(msgspec.Struct, frozen=True):
    """Tokens a second, and how many may be spent at once."""

    per_s: float
    burst: float


LIMITS: Mapping[str, Limit] = {
    # 48 clock exchanges at once, an answer every few seconds, and what waited at the broker while this reader was disconnected.
    "vm": Limit(50, 1_000),
    # Three facts for each of 1,024 VMs at once, and an inventory of 65 tokens with each change.
    "host": Limit(500, 20_000),
    "metadata": Limit(200, 5_000),
    "ctl": Limit(20, 500),
    # Requests for a resync, by a reader that otherwise writes nothing.
    "exporter": Limit(1, 50),
}


class Rates:
    """The buckets. Times are seconds on one monotonic clock."""

    def __init__(self, limits: Mapping[str, Limit] = LIMITS) -> None:
        self._limits = limits
        self._buckets: OrderedDict[tuple[str, str], tuple[float, float]] = OrderedDict()
        """Maps a writer to its tokens and when they were counted."""

    def admits(self, topic: str, size_bytes: int, now_s: float) -> bool:
        """Count the message; whether it is within its writer's limit."""
        writer = writer_of(topic)
        limit = self._limits.get(writer[0])
        if limit is None:
            return True
        tokens, at_s = self._buckets.pop(writer, (limit.burst, now_s))
        tokens = min(limit.burst, tokens + (now_s - at_s) * limit.per_s)
        cost = 1 + size_bytes // _TOKEN_BYTES
        admitted = tokens >= cost
        self._buckets[writer] = (tokens - cost if admitted else tokens, now_s)
        if len(self._buckets) > _WRITERS:
            self._buckets.popitem(last=False)
        return admitted


def writer_of(topic: str) -> tuple[str, str]:
    """Role and name of a topic's writer, empty where it names none."""
    parts = topic.split("/", 4)
    return (parts[2], parts[3]) if len(parts) > 4 else ("", "")
