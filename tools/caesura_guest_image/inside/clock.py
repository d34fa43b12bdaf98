"""Waits for `caesura-set-clock` and steps CLOCK_REALTIME by what it says, exactly.

Always runs. Requests come in through the FIFO /run/set-clock, one number of nanoseconds a line; each is answered with
``done`` or ``refused`` through /run/set-clock.done.
"""

from __future__ import annotations

import os
import time

from .parameters import Parameters

ASK = "/run/set-clock"
DONE = "/run/set-clock.done"
_EXACT_NS = 5000
_TRIES = 4


def offset_ns() -> int:
    """CLOCK_REALTIME minus CLOCK_MONOTONIC, which a step must change by exactly its size."""
    tries = []
    for _ in range(5):
        before = time.monotonic_ns()
        real = time.time_ns()
        after = time.monotonic_ns()
        tries.append((after - before, real - (before + after) // 2))
    return min(tries)[1]


def step(by_ns: int) -> None:
    """Move the clock. Raises OSError.

    adjtimex(2) would be exact at once but needs ctypes, which takes RAM in every guest. Setting an absolute time loses
    the time between reading and setting (0.4 ms the first time, under TCG): so it is measured, and corrected.
    """
    wanted = offset_ns() + by_ns
    for _ in range(_TRIES):
        left = wanted - offset_ns()
        if abs(left) < _EXACT_NS:
            return
        time.clock_settime_ns(time.CLOCK_REALTIME, time.time_ns() + left)


def run(_: Parameters) -> None:
    """Answer requests indefinitely."""
    for path in (DONE, ASK):  # in this order: a client that finds the second also finds the first
        if not os.path.exists(path):  # noqa: PTH110 - start-up time
            os.mkfifo(path, 0o600)
    # Opened for both directions: neither side has to wait for the other to open, and there is no end of file.
    requests = os.open(ASK, os.O_RDWR)
    answers = os.open(DONE, os.O_RDWR)
    while True:
        for line in os.read(requests, 4096).split(b"\n")[:-1]:
            try:
                step(int(line))
                said = b"done\n"
            except (OSError, ValueError, OverflowError):
                said = b"refused\n"
            os.write(answers, said)
