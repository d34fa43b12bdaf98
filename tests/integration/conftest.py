"""Fixtures that the tests of several services share."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import suppress

import pytest

from caesura.bus.embedded import embedded_available
from caesura_testing.broker import mosquitto_installed


@pytest.fixture(params=["mosquitto", "embedded"])
def broker_kind(request: pytest.FixtureRequest) -> str:
    """Each of the local brokers: the embedded one keeps fewer promises than Mosquitto, and a service must work with both."""
    kind: str = request.param
    if not (mosquitto_installed() if kind == "mosquitto" else embedded_available()):
        pytest.skip(f"{'mosquitto' if kind == 'mosquitto' else 'amqtt'} is not installed")
    return kind


@pytest.fixture
def full_pipe() -> Iterator[int]:
    """The writing end of a pipe that takes not one byte more, and that nobody reads."""
    read, write = os.pipe2(os.O_CLOEXEC)
    os.set_blocking(write, False)
    with suppress(BlockingIOError):
        while True:
            os.write(write, b"x" * 4096)
    os.set_blocking(write, True)
    yield write
    os.close(read)
    os.close(write)


def freezers() -> Sequence[str]:
    """All three, everywhere: one that is missing is a failure where CI=true, else a skip in the test."""
    return ("cgroup2", "cgroup1", "sigstop")


@pytest.fixture(params=freezers())
def freezer(request: pytest.FixtureRequest) -> str:
    """Each way of freezing; skipped where the machine lacks it."""
    from caesura_host_updater.drivers.process.freezers import FreezerUnusable, choose_freezer  # noqa: PLC0415

    kind: str = request.param
    try:
        choose_freezer(request.param, "caesura-test-probe")[0].remove("_probe")
    except FreezerUnusable as error:
        pytest.skip(f"{kind} does not work here: {error}")
    return kind
