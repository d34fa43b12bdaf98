"""What a new life does with VMs that it finds paused."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from caesura_host_updater import startup
from caesura_host_updater.drivers.port import DriverError, NotRunningYet
from caesura_host_updater.startup import Startup


class Fleet:
    """A driver, a guard and a journal that write down what is asked of them."""

    def __init__(self, *resumes: object) -> None:
        self.resumes = list(resumes)
        self.asked: list[str] = []

    async def open(self) -> None:
        """Nothing to adopt."""

    def states(self) -> dict[str, str]:
        return {"a": "paused", "b": "running"}

    async def resume(self, vm: str, timeout_s: float) -> object:
        assert timeout_s > 0
        self.asked.append(f"resume {vm}")
        answer = self.resumes.pop(0)
        if isinstance(answer, Exception):
            await asyncio.sleep(0.01)
            raise answer
        return answer

    async def release(self, vm: str) -> None:
        self.asked.append(f"release {vm}")
        raise DriverError(vm, "this must not keep the host from starting")

    async def start(self) -> Any:
        return type("Held", (), {"operation": "op-1"})()

    async def disarm(self, operation: str) -> None:
        self.asked.append(f"disarm {operation}")

    async def do(self, _: object) -> list[object]:
        return []


def at_start(fleet: Fleet) -> Startup:
    given: Any = fleet
    return Startup("host-1", driver=given, guardian=given, journal=given, letters=given, endings=given)


async def test_what_was_prepared_for_a_vm_that_is_resumed_is_released_after_the_guard_let_go() -> None:
    fleet = Fleet(NotRunningYet("a", "not yet"), "running")
    await at_start(fleet).run(1)
    assert fleet.asked == ["resume a", "resume a", "disarm op-1", "release a"]


async def test_an_error_nobody_thought_of_does_not_end_the_tries() -> None:
    fleet = Fleet(ValueError("a bug"), "running")
    await at_start(fleet).run(1)
    assert fleet.asked.count("resume a") == 2


async def test_vm_that_takes_longer_than_the_start_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(startup, "_PATIENCE_S", 0.0)
    fleet = Fleet(*[NotRunningYet("a", "not yet")] * 3, "running")
    starting = at_start(fleet)
    await starting.run(1)
    assert "release a" not in fleet.asked
    await asyncio.gather(*starting.late)
    assert fleet.asked[-1] == "release a"
