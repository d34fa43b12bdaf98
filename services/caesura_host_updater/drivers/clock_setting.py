"""Setting a guest's clock from outside, through qemu-guest-agent, and measuring how right it is.

A measurement is the exchange with the least round trip of several: the true error lies within half of it. What is
known of the ways to set (measured, TCG): ``guest-set-time`` leaves 0.2 to 2 ms, the first call after a hand-over
more; a relative step inside the guest (`caesura-set-clock NANOSECONDS`, which a guest may offer) leaves less than
0.1 ms and takes some 0.03 s. So: a clock that is far off is set at once, what is left is stepped away.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import Literal

import msgspec

from caesura_host_updater.drivers.guest_agent import AgentRefused, GuestAgent, OpenAgent
from caesura_host_updater.drivers.port import ClockSet, DriverError

STEP_PROGRAM = "/usr/sbin/caesura-set-clock"
_NS_PER_S = 1_000_000_000
_SAMPLES = 8
_FAR_NS = 20_000_000
"""ns: from here on guest-set-time helps at once; below, it may leave the clock worse than it was."""
_GOOD_NS = 300_000
"""ns: as good as guest-set-time gets."""
_SLACK_NS = 2_000_000
"""ns: by how much two samples may contradict each other: guests' clocks are slewed, and hosts are busy."""
_MAX_ACTIONS = 6
"""Each costs some 30 ms; a guest that is busy just then answers late, and the next one finds it better."""


class GuestTimeSample(msgspec.Struct, frozen=True):
    """One exchange. ``error_ns``: guest minus host, half of ``round_trip_ns`` either way."""

    error_ns: int
    round_trip_ns: int
    guest_ns: int


def sample(sent_ns: int, guest_ns: int, received_ns: int) -> GuestTimeSample:
    """From the host's clock before and after, and the guest's in between."""
    return GuestTimeSample(guest_ns - (sent_ns + received_ns) // 2, received_ns - sent_ns, guest_ns)


def best(vm: str, samples: Sequence[GuestTimeSample]) -> GuestTimeSample:
    """The one with the least round trip.

    Raises:
        DriverError: they cannot all be true: the agent's time does not advance or jumps about.
    """
    if len(samples) > 1 and len({each.guest_ns for each in samples}) == 1:
        raise DriverError(vm, "the guest agent's time does not move")
    latest_begin = max(each.error_ns - each.round_trip_ns // 2 for each in samples)
    earliest_end = min(each.error_ns + each.round_trip_ns // 2 for each in samples)
    if latest_begin > earliest_end + _SLACK_NS:
        apart = (latest_begin - earliest_end) / 1e6
        raise DriverError(vm, f"the guest agent's times contradict each other by {apart:.1f} ms")
    return min(samples, key=lambda each: each.round_trip_ns)


Action = Literal["set", "step", "done"]


def next_action(now: GuestTimeSample, *, actions: int, may_step: bool) -> Action:
    """What to do about an error: set far clocks, step near ones (where the guest can), a few times at most."""
    off = abs(now.error_ns)
    # Nothing can be distinguished that is smaller than the uncertainty.
    if actions >= _MAX_ACTIONS or off <= max(_GOOD_NS, now.round_trip_ns // 2):
        return "done"
    if off > _FAR_NS or not may_step:
        return "set"
    return "step"


async def set_clock(
    vm: str, open_agent: OpenAgent, *, timeout_s: float = 5.0, now_ns: Callable[[], int] = time.time_ns
) -> ClockSet:
    """Put the guest's clock right by the host's, and say how right it is.

    Args:
        open_agent: the way to the guest agent.
        timeout_s: for everything together.

    Raises:
        DriverError: no agent, garbage, a time that does not advance or contradicts itself, or no effect.
    """
    by = asyncio.get_running_loop().time() + timeout_s
    async with open_agent(by) as agent:
        first = now = await _measure(vm, agent, now_ns)
        may_step, complaint, actions = True, "", 0
        while (action := next_action(now, actions=actions, may_step=may_step)) != "done":
            if action == "step":
                may_step = await _step(agent, -now.error_ns)
                if not may_step:
                    continue  # the guest has no such program: nothing was done
            else:
                complaint = await agent.set_time(now_ns)
            actions += 1
            now = await _measure(vm, agent, now_ns)
    if abs(now.error_ns) > _FAR_NS:
        why = complaint or "guest-set-time had no effect"
        raise DriverError(vm, f"the guest's clock is still {now.error_ns / _NS_PER_S:+.3f} s off: {why}")
    return ClockSet(
        before_s=first.error_ns / _NS_PER_S,
        after_s=now.error_ns / _NS_PER_S,
        uncertainty_s=(now.round_trip_ns + 1) // 2 / _NS_PER_S,
    )


async def _measure(vm: str, agent: GuestAgent, now_ns: Callable[[], int]) -> GuestTimeSample:
    samples = []
    for _ in range(_SAMPLES):
        sent_ns = now_ns()
        guest_ns = await agent.time_ns()
        samples.append(sample(sent_ns, guest_ns, now_ns()))
    return best(vm, samples)


async def _step(agent: GuestAgent, by_ns: int) -> bool:
    try:
        return await agent.run(STEP_PROGRAM, str(by_ns)) == 0
    except AgentRefused:
        return False
