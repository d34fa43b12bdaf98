"""Clock-sync arithmetic: what four timestamps show, which exchange counts, when to step. Pure.

Source: RFC 5905 section 8. The guest is A (t1 sent, t4 received, guest clock), the host is B (t2 received,
t3 answered, host clock); offset = ((t2 - t1) + (t3 - t4)) / 2 is host minus guest, delay = (t4 - t1) - (t3 - t2).
If the true offset is T, then |offset - T| <= delay / 2 whatever the two legs are, so the exchange with the
least delay is the most precise. All values are integer nanoseconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import msgspec
from msgspec import Meta

from caesura.runtime.errors import CaesuraError

NS_PER_S = 1_000_000_000
MAX_STEPS = 2  # a second step corrects what the first one left; a third would only chase noise
MAX_ROUNDS = 6  # of measuring: in a starved guest exchanges take long and are imprecise, so they are repeated


class ImplausibleExchange(CaesuraError):
    """Four timestamps that cannot belong together; the exchange is discarded."""


class NtpSample(msgspec.Struct, frozen=True):
    """The result of one exchange. ``error_ns``: guest clock minus host clock. ``host_ns``: the host's clock when it was asked."""

    error_ns: int
    delay_ns: int
    host_ns: int = 0

    @property
    def uncertainty_ns(self) -> int:
        """The true error lies within plus or minus this (half the delay, rounded up)."""
        return (self.delay_ns + 1) // 2


class SyncPolicy(msgspec.Struct, frozen=True, kw_only=True):
    """How to measure and when to step; times in seconds."""

    exchanges: Annotated[int, Meta(ge=1)] = 8
    answer_timeout_s: float = 0.5
    """How long to wait for one answer; QoS 0 answers may be lost, that is normal."""
    max_delay_s: float = 2.0
    """An exchange that took longer is too imprecise to step a clock by."""
    bound_s: float = 0.1
    """The clock counts as synced when error plus uncertainty are within this."""
    step_threshold_s: float = 0.001
    """Errors up to this are left alone after a resume and at start: a step would do more harm than good."""
    periodic_threshold_s: float = 0.05
    """The same for periodic syncs, where an NTP daemon may be at work too."""
    step_most_s: float = 60.0
    """The largest step that is made outside a resume, or for a host that is not known to be the VM's."""


class Done(msgspec.Struct, frozen=True):
    """The end of a sync: the verdict, and the reason if it failed."""

    synced: bool
    reason: str = ""
    refused_ns: int | None = None
    """Guest minus host: the clock would have to be stepped by more than is allowed now."""


class MeasureAgain(msgspec.Struct, frozen=True):
    """Undecided: the exchanges took too long to show whether the clock is right."""


class StepClock(msgspec.Struct, frozen=True):
    """Move the guest clock by this much, then measure again."""

    by_ns: int


def measure(t1_ns: int, t2_ns: int, t3_ns: int, t4_ns: int, *, max_delay_ns: int) -> NtpSample:
    """The sample of one exchange.

    Raises:
        ImplausibleExchange: a clock ran backwards within the exchange, or the delay is negative or too long.
    """
    if t4_ns < t1_ns:
        raise ImplausibleExchange(f"the guest clock went back by {t1_ns - t4_ns} ns during the exchange")
    if t3_ns < t2_ns:
        raise ImplausibleExchange(f"the host clock went back by {t2_ns - t3_ns} ns during the exchange")
    delay_ns = (t4_ns - t1_ns) - (t3_ns - t2_ns)
    if delay_ns < 0:
        raise ImplausibleExchange(f"negative delay of {delay_ns} ns: a clock was stepped during the exchange")
    if delay_ns > max_delay_ns:
        raise ImplausibleExchange(f"delay of {delay_ns} ns, at most {max_delay_ns} ns says anything")
    offset_ns = ((t2_ns - t1_ns) + (t3_ns - t4_ns)) // 2
    return NtpSample(error_ns=-offset_ns, delay_ns=delay_ns, host_ns=t2_ns)


def best(samples: Sequence[NtpSample]) -> NtpSample | None:
    """The sample with the least delay; None if there is none."""
    return min(samples, key=lambda sample: sample.delay_ns, default=None)


def error_found(
    first: NtpSample | None, stepped: Sequence[NtpSample], *, paused_at_s: float | None
) -> float | None:
    """How far off the clock was after a pause, in seconds; None when it is unknown.

    A check that falls due in a pause runs the moment the guest runs again, before the pause is announced to it: at the
    sync for that pause the clock is right, and what was wrong is what the check stepped away.

    Args:
        first: what the sync for this pause found before its own first step.
        stepped: what earlier syncs found and stepped away, the oldest first.
        paused_at_s: the host's clock at the pause's begin, seconds since 1970; None when the sync is not about a pause.
    """
    if paused_at_s is not None:
        earlier = next((each for each in stepped if each.host_ns >= paused_at_s * NS_PER_S), None)
        first = earlier or first
    return None if first is None else first.error_ns / NS_PER_S


def next_step(
    rounds: Sequence[NtpSample | None],
    *,
    steps: int,
    threshold_s: float,
    bound_s: float,
    most_s: float,
    limited: str = "outside a resume",
) -> StepClock | MeasureAgain | Done:
    """What to do after these rounds of measuring (each round's best sample, None where no answer arrived).

    The first round steps above ``threshold_s`` (and above its own uncertainty: a step smaller than that is a
    guess). Later rounds step again only if the bound is still missed. A round that is too uncertain to show
    either is measured again.

    Args:
        steps: made so far.
        most_s: the largest step that is allowed; infinite after a pause, whose length is not known here.
        limited: why there is a largest one, in words.
    """
    last = rounds[-1]
    if last is None:
        when = "no answer to any clock-sync exchange" if len(rounds) == 1 else "no answer after the step"
        return Done(synced=False, reason=when)
    inside = abs(last.error_ns) + last.uncertainty_ns <= bound_s * NS_PER_S
    worth_it = abs(last.error_ns) > max(threshold_s * NS_PER_S, last.uncertainty_ns)
    if len(rounds) < MAX_ROUNDS:
        if worth_it and abs(last.error_ns) > most_s * NS_PER_S:
            return Done(
                synced=False,
                reason=f"the clock is {last.error_ns / NS_PER_S:+.3f} s off, and {limited} it is stepped by {most_s:g} s at most",
                refused_ns=last.error_ns,
            )
        if steps < MAX_STEPS and worth_it and (not inside or len(rounds) == 1):
            return StepClock(by_ns=-last.error_ns)
        if not inside and not worth_it:
            return MeasureAgain()
    if inside:
        return Done(synced=True)
    return Done(
        synced=False,
        reason=f"error {last.error_ns / NS_PER_S:+.6f} s, uncertain by {last.uncertainty_ns / NS_PER_S:.6f} s, "
        f"bound {bound_s:g} s, after {steps} steps",
    )
