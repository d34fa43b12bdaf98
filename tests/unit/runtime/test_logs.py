"""Logging never waits for whoever reads it."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from caesura.runtime.logs import NonBlockingHandler


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    """A pipe that nobody reads until the test does."""
    read, write = os.pipe2(os.O_CLOEXEC)
    yield read, write
    os.close(read)
    os.close(write)


def fill(write: int) -> int:
    """Write until the pipe takes no more; how many bytes that were."""
    os.set_blocking(write, False)
    filled = 0
    try:
        while True:
            filled += os.write(write, b"x" * 4096)
    except BlockingIOError:
        os.set_blocking(write, True)
    return filled


def drain(read: int, count: int) -> None:
    """Take exactly this many bytes out of a pipe."""
    while count:
        count -= len(os.read(read, count))


def record(text: str) -> logging.LogRecord:
    return logging.LogRecord("test", logging.INFO, "", 0, text, (), None)


def test_a_full_pipe_delays_nobody_and_what_was_dropped_is_counted(pipe: tuple[int, int]) -> None:
    read, write = pipe
    filled = fill(write)
    handler = NonBlockingHandler(write, room=10)
    for number in range(100):
        handler.handle(record(f"line {number}"))  # a blocking write would never return here
    handler.flush(0.01)
    missing = handler.dropped
    assert missing >= 89  # ten wait, and one may be in the writer's hands
    drain(read, filled)
    handler.flush(20)
    handler.handle(record("after"))
    handler.flush(20)
    *lines, last = os.read(read, 65536).decode().splitlines()
    assert last == "after"
    assert sum(line.startswith("line") for line in lines) == 100 - missing
    said = [int(line.split()[1]) for line in lines if line.startswith("log.dropped: ")]
    assert sum(said) == missing


SERVICE = """
import structlog
from caesura.runtime.logs import configure_logging
configure_logging("test", style="json")
for number in range(300):
    structlog.get_logger().info("some.event", number=number)
"""


def test_everything_is_written_before_the_process_ends() -> None:
    done = subprocess.run([sys.executable, "-c", SERVICE], capture_output=True, text=True, check=True)
    assert [json.loads(line)["number"] for line in done.stderr.splitlines()] == list(range(300))


def test_a_process_with_a_full_standard_error_ends_all_the_same(pipe: tuple[int, int]) -> None:
    _, write = pipe
    fill(write)
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", SERVICE], stderr=write, check=False, timeout=60)
    assert done.returncode == 0
    assert time.monotonic() - began < 30  # the flush at the end is bounded by a second


@pytest.mark.parametrize("style", ["console", "json"])
def test_no_value_of_a_local_variable_gets_into_the_log(style: str) -> None:
    text = f"""
import structlog
from caesura.runtime.logs import configure_logging
configure_logging("test", style={style!r})
def connect(password):
    raise OSError("refused")
try:
    connect("s3c" + "ret")
except OSError:
    structlog.get_logger().exception("bus.failed")
"""
    said = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=True).stderr
    assert "refused" in said
    assert "connect" in said, "where it was raised"
    assert "s3cret" not in said


def test_a_service_does_not_load_what_only_a_terminal_needs() -> None:
    """Rich takes a third of an agent's start and some megabytes of each guest."""
    code = (
        "import sys, caesura_vm_agent.__main__; loaded = 'rich' in sys.modules; "
        "import rich.console; print(loaded, rich.console.Console.__name__)"
    )
    out = subprocess.run((sys.executable, "-c", code), capture_output=True, text=True, check=True).stdout
    assert out.split() == ["False", "Console"]
