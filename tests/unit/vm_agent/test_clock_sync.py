"""How long a clock-sync waits for a peer that is silent."""

from __future__ import annotations

import time

import pytest

from caesura.bus.port import BusUnavailable
from caesura.contract.messages import ClockSyncAnswered, ClockSyncRequested
from caesura_vm_agent.clock_sync import ClockSync, Trigger
from caesura_vm_agent.ntp import SyncPolicy


class _Clock:
    """A guest clock that is right."""

    simulated = True

    def now_ns(self) -> int:
        return time.time_ns()

    def monotonic_ns(self) -> int:
        return time.monotonic_ns()

    async def run(self) -> None:
        return

    def step(self, by_ns: int) -> None:
        raise AssertionError(f"it is right, and was stepped by {by_ns} ns")


@pytest.mark.parametrize(("trigger", "synced"), [("resume", True), ("periodic", False), ("start", False)])
async def test_a_peer_that_is_silent_for_seconds_is_waited_for_after_a_pause_only(
    trigger: Trigger, *, synced: bool
) -> None:
    """It has just announced the pause: on a busy machine a rollout halted since the agent had given up before the host did."""
    asked = 0

    async def ask(request: ClockSyncRequested) -> None:
        nonlocal asked
        asked += 1
        if asked <= 6:
            raise BusUnavailable("lost")
        now_ns = time.time_ns()
        answer = ClockSyncAnswered(
            vm="a", host="h", exchange=request.exchange, t1_ns=request.t1_ns, t2_ns=now_ns, t3_ns=now_ns
        )
        sync.answered(answer, time.time_ns())

    sync = ClockSync("a", "boot", _Clock(), SyncPolicy(step_threshold_s=60.0, bound_s=60.0), ask)
    verdict = await sync.run(trigger, "op")
    assert verdict.synced is synced
    assert bool(verdict.exchanges) is synced


async def test_a_peer_that_is_gone_ends_it_all_the_same() -> None:
    async def ask(_: ClockSyncRequested) -> None:
        raise BusUnavailable("lost")

    verdict = await ClockSync("a", "boot", _Clock(), SyncPolicy(), ask).run("resume", "op")
    assert verdict.reason == "no answer to any clock-sync exchange"
