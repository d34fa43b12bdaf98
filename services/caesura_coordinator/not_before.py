"""When a wave may start at the earliest: NotBefore of its events, and what a rollout that waits knows of those ahead. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime, timedelta

from caesura.contract.messages import Policy
from caesura_coordinator.records import Rollout

_LEAD_MOST_S = 60.0
"""s: what workloads and agents have between the end of the rollout ahead and NotBefore, to recover and prepare again; less if the notice is less."""


def first_not_before(policy: Policy, ahead: Iterable[Rollout], now: datetime) -> datetime:
    """NotBefore of a wave that is announced now: with the whole notice, and after the expected end of those ahead."""
    notice = now + timedelta(seconds=policy.notice_s)
    ends = [expected_end(each, now) + lead(policy) for each in ahead]
    return whole_second(max([notice, *ends]))


def expected_end(rollout: Rollout, now: datetime) -> datetime:
    """When the rollout is expected to end, by the estimate of its plan. One that is halted is expected to be resumed now."""
    wave = rollout.current
    if wave is None:
        return now
    policy = rollout.policy
    each_s = rollout.estimate_s / max(1, len(rollout.waves))
    after_notice_s = max(0.0, each_s - policy.notice_s)
    match wave.status:
        case "scheduled" if wave.not_before is not None:
            left = max(wave.not_before - now, timedelta()) + timedelta(seconds=after_notice_s)
        case "soaking" if wave.soak_until is not None:
            left = max(wave.soak_until - now, timedelta())
        case "started" | "verifying":
            left = timedelta(seconds=after_notice_s)
        case _:
            left = timedelta(seconds=each_s)
    return now + left + (len(rollout.waves) - wave.index - 1) * timedelta(seconds=each_s)


def whole_second(at: datetime) -> datetime:
    """Rounded up: NotBefore is published in RFC 1123, and a wave must not start before it."""
    return at.replace(microsecond=0) + timedelta(seconds=1) if at.microsecond else at


def lead(policy: Policy) -> timedelta:
    """Between the end of the rollout ahead and NotBefore."""
    return timedelta(seconds=min(policy.notice_s, _LEAD_MOST_S))
