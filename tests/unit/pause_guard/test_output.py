"""The guard's log never waits for whoever reads it."""

from __future__ import annotations

import json
import os
from contextlib import suppress

from caesura_pause_guard.output import Output


def test_lines_come_in_order_and_what_was_dropped_is_counted() -> None:
    read, write = os.pipe2(os.O_CLOEXEC)
    os.set_blocking(write, False)
    filled = 0
    with suppress(BlockingIOError):
        while True:
            filled += os.write(write, b"x" * 4096)
    os.set_blocking(write, True)
    output = Output(write, room=10)
    for number in range(100):
        output.log("guard.line", number=number)  # a blocking write would never return here
    output.flush(0.01)
    while filled:
        filled -= len(os.read(read, filled))
    output.flush(20)
    output.log("guard.after")
    output.flush(20)
    lines = [json.loads(line) for line in os.read(read, 65536).decode().splitlines()]
    assert all(line["service"] == "pause-guard" and line["timestamp"] for line in lines)
    numbers = [line["number"] for line in lines if line["event"] == "guard.line"]
    assert numbers == sorted(numbers)
    assert 10 <= len(numbers) <= 21  # ten wait, and up to as many are in the writer's hands
    assert sum(line["lines"] for line in lines if line["event"] == "guard.log_dropped") == 100 - len(numbers)
    os.close(read)
    output.log("guard.nobody_reads")
    output.flush(20)
    os.close(write)
