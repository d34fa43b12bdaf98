"""Turns: one at a time, given back by death, never waited for beyond the limit, stopped holders passed over."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from caesura_testing.patience import patient
from caesura_vmcontrol.operation_lock import try_lock
from caesura_vmcontrol.procfs import thread_states

HOLDER = """
import sys, time
from caesura_vmcontrol.operation_lock import try_lock
with try_lock(sys.argv[1], 5) as ours:
    print(ours, flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Another process that has the turn."""
    made = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE)
    assert made.stdout is not None
    assert made.stdout.readline() == b"True\n"
    yield made
    made.kill()
    made.wait()
    made.stdout.close()


def test_one_at_a_time_and_given_back(tmp_path: Path) -> None:
    for _ in range(2):
        with try_lock(str(tmp_path), 0.5) as first:
            assert first
            began = time.monotonic()
            with try_lock(str(tmp_path), 0.05) as second:
                assert not second
            assert 0.04 < time.monotonic() - began < patient(0.5)
    assert list(tmp_path.iterdir()) == [], "the first turn needs no room on the disk"


def test_nothing_to_take_turns_at(tmp_path: Path) -> None:
    with try_lock(str(tmp_path / "over"), 5) as ours:
        assert not ours


def test_death_gives_it_back(tmp_path: Path, holder: subprocess.Popen[bytes]) -> None:
    with try_lock(str(tmp_path), 0.05) as ours:
        assert not ours
    holder.kill()
    with try_lock(str(tmp_path), 5) as ours:
        assert ours


def test_stopped_in_the_middle(tmp_path: Path, holder: subprocess.Popen[bytes]) -> None:
    holder.send_signal(signal.SIGSTOP)
    until = time.monotonic() + patient(5)
    while set(thread_states(holder.pid)) != {"T"}:
        assert time.monotonic() < until
    began = time.monotonic()
    with try_lock(str(tmp_path), 100) as ours:
        assert ours
        with try_lock(str(tmp_path), 0.05) as another:
            assert not another, "those that pass it over take turns as well"
    assert time.monotonic() - began < patient(1)
