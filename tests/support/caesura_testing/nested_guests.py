"""What must hold of the guests of a nested host after its kernel was replaced."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from caesura.contract import messages as m
from caesura_nested_host.fleet_host import FleetHost

TRIES = 6
"""Rollouts, where guests are not saved in time."""
STEP_S = 400.0
"""For a boot with all that follows it, in the emulation of a busy machine: 90 s at rest."""
ROLLOUT_S = 2 * STEP_S
"""For a rollout of one or two hosts."""

CLOCK_S = 0.1
"""By which a host's clock may have moved over a change of its kernel, beyond what the answer took; its rate is measured, too."""
TEST_S = 1500.0
"""For the cases of one host, one after the other: 300 to 400 s at rest. A host that hangs is reported long before."""


async def until_ready(stage: Any, *hosts: FleetHost) -> None:
    """Wait until each can have its kernel replaced, and its guests beat."""
    await stage.sandbox.until(
        lambda: all(host.ready(stage.fleet_view) for host in hosts), STEP_S, "hosts, guards and guests"
    )
    await asyncio.gather(*(asyncio.to_thread(each.until_guests_beat) for each in hosts))


async def roll(
    stage: Any, hosts: Sequence[FleetHost], update: str, *, selection: m.Selection | None = None
) -> str:
    """Start a rollout; its id.

    A QEMU that is started for a comparison may crash in an emulated host (it is emulated itself there). The host refuses by name then, and
    compares again after a minute.
    """
    for _ in range(TRIES):
        answer = await stage.request(
            update,
            selection=selection,
            budget_s=30.0,
            verify_timeout_s=STEP_S,
            on_unsynced="proceed",
        )
        if answer.accepted:
            return str(answer.rollout)
        assert "a new process cannot be started beside it" in answer.reason, answer.reason
        print(f"\n{update}: not yet: {answer.reason}")
        await until_ready(stage, *hosts)
    raise AssertionError(answer.reason)


def assert_continued(host: FleetHost, since: float, release: str) -> None:
    """Each guest had one pause, beats again, without a gap in its numbers, in the same boot, with its memory as it was.

    Args:
        since: an instant before the pause, at which the guests beat.
        release: what the host went to, for the line that is printed.
    """
    for vm, found in host.guest_pauses(since).items():
        assert not found.faults, f"{vm}: {found}"
        print(
            f"\n{host.name} to {release}: {vm}: beat {found.before.number} -> {found.after.number},"
            f" silence {found.silence_s:.1f} s, its clock +{found.own_s:.2f} s, {found.memory}"
        )


def assert_clock_kept(host: FleetHost, before: tuple[float, float]) -> None:
    """The host's wall clock is where it was, as this machine sees it: a kernel alone would be off by up to half a second.

    Args:
        before: what the host said before the change of its kernel.
    """
    after = host.clock_offset_s()
    print(f"\n{host.name}: its clock, minus that of this machine: {before} s, then {after} s")
    assert after[0] <= before[1] + CLOCK_S
    assert after[1] >= before[0] - CLOCK_S
