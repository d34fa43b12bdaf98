"""The last lines of the live page's log; failures are kept separately, so that a large wave does not push them out. Pure."""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterator

import msgspec

from caesura_metrics_exporter.live.activity import LogEntry

LOG_KEPT = 100  # lines
WRONG_KEPT = 50  # lines of these levels
_WRONG = frozenset({"warning", "bad"})


class ActivityLog:
    """See the module."""

    def __init__(self) -> None:
        self._lines: deque[tuple[int, LogEntry]] = deque(maxlen=LOG_KEPT)
        self._wrong: deque[tuple[int, LogEntry]] = deque(maxlen=WRONG_KEPT)

    def add(self, revision: int, line: LogEntry) -> None:
        """Add one line; revisions rise."""
        (self._wrong if line.level in _WRONG else self._lines).append((revision, line))

    def since(self, revision: int) -> Iterator[LogEntry]:
        """Lines added after this revision, the oldest first."""
        for at, line in heapq.merge(self._lines, self._wrong, key=lambda each: each[0]):
            if at > revision:
                yield line

    def shift(self, by: float) -> None:
        """The wall clock jumped."""
        for lines in (self._lines, self._wrong):
            moved = [(at, msgspec.structs.replace(line, at=line.at + by)) for at, line in lines]
            lines.clear()
            lines.extend(moved)
