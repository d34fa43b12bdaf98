"""First in the queue for a CPU, for the milliseconds of a hand-over.

Between the stop in one process and the start in the other, three processes wait for each other some ten times; on a
busy host every wait costs a scheduler's time slice. Where we may, they hurry. Guests' virtual CPUs have threads of
their own and are not concerned.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from caesura_vmcontrol.process_control import boost_priority, restore_priority


class RealtimeBoost:
    """Counts who hurries: two hand-overs at once share the host updater's own thread."""

    def __init__(self) -> None:
        self._hurried: Counter[int] = Counter()

    @contextmanager
    def __call__(self, pids: Sequence[int]) -> Iterator[None]:
        """The main threads of these processes, and ours."""
        threads = (os.getpid(), *pids)
        try:
            for pid in threads:
                self._hurried[pid] += 1
                if self._hurried[pid] == 1:
                    boost_priority(pid)
            yield
        finally:
            for pid in threads:
                self._hurried[pid] -= 1
                if self._hurried[pid] == 0:
                    del self._hurried[pid]
                    restore_priority(pid)
