"""One line every few milliseconds: count, CLOCK_MONOTONIC ns, CLOCK_REALTIME ns, boot id, steps back.

``caesura.heartbeat_ms`` (5). *Steps back* counts how often CLOCK_MONOTONIC went back, which must stay 0.
A line that nobody reads is dropped; its count is not reused, so the reader sees the gap.
"""

from __future__ import annotations

import time

from .parameters import Parameters
from .ports import open_port, send

PORT = "org.caesura.heartbeat.0"


def run(parameters: Parameters) -> None:
    """Beat indefinitely."""
    interval_ns = int(float(parameters.get("heartbeat_ms", "5")) * 1e6)
    with open("/proc/sys/kernel/random/boot_id", "rb") as file:  # noqa: PTH123 - start-up time
        boot_id = file.read().strip()
    port = open_port(PORT)
    count = back = 0
    last = due = time.monotonic_ns()
    while True:
        now = time.monotonic_ns()
        if now < last:
            back += 1
        last = now
        count += 1
        send(port, b"%d %d %d %s %d\n" % (count, now, time.time_ns(), boot_id, back))
        # Late by more than a beat: continue from now, without a burst of beats.
        due = max(due + interval_ns, now)
        time.sleep(max(0, due - time.monotonic_ns()) / 1e9)
