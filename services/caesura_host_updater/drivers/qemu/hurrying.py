"""First in the queue for a CPU, for the milliseconds of a hand-over.

Between the stop in one process and the start in the other, three processes wait for each other some ten times; on a
busy host every wait costs a scheduler's time slice. Where we may, they are scheduled round-robin before everybody
else meanwhile (sched(7)). Guests' virtual CPUs have threads of their own and are not concerned.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

_LOWEST = 1  # of the real-time priorities: enough to come before everything ordinary


class Hurry:
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
                    with suppress(OSError):  # not allowed to, or gone
                        os.sched_setscheduler(pid, os.SCHED_RR, os.sched_param(_LOWEST))
            yield
        finally:
            for pid in threads:
                self._hurried[pid] -= 1
                if self._hurried[pid] == 0:
                    del self._hurried[pid]
                    calm(pid)


def calm(pid: int) -> None:
    """No thread of the process hurries any more; those that were started meanwhile had inherited it."""
    with suppress(OSError):
        for name in os.listdir(f"/proc/{pid}/task"):  # noqa: PTH208 - as short as can be
            with suppress(OSError):
                thread = int(name)
                hurries = os.sched_getscheduler(thread) == os.SCHED_RR
                if hurries and os.sched_getparam(thread).sched_priority == _LOWEST:
                    os.sched_setscheduler(thread, os.SCHED_OTHER, os.sched_param(0))
