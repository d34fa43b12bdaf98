"""How often a fleet may be asked to publish its state again: by one requester, and by all."""

from __future__ import annotations

import pytest

from caesura.bus.rates import Limit
from caesura_coordinator.resync_limits import FLEET, REQUESTERS, RequesterLimits, TokenBucket, spread_s


def test_one_vm_that_asks_without_end_is_answered_every_five_minutes() -> None:
    limits = RequesterLimits()
    answered = [now_s for now_s in range(3600) if limits.admits("vm", "web-1", float(now_s))]
    assert len(answered) <= REQUESTERS["vm"].burst + 3600 / 300
    assert len(answered) >= 12


def test_a_requester_that_asks_too_often_costs_no_other_anything() -> None:
    limits = RequesterLimits()
    while limits.admits("ctl", "ops", 0.0):
        pass
    assert limits.admits("ctl", "desk", 0.0)
    assert limits.admits("vm", "ops", 0.0)


@pytest.mark.parametrize("party", ["host", "coordinator", ""])
def test_who_is_no_requester_is_not_answered(party: str) -> None:
    assert not RequesterLimits().admits(party, "x", 0.0)


def test_all_requesters_together_cause_a_bounded_number_of_publications() -> None:
    bucket = TokenBucket(FLEET, 0.0)
    now_s, taken = 0.0, 0
    while now_s < 3600:
        if bucket.take(now_s):
            taken += 1
        else:
            now_s += bucket.wait_s(now_s)
    assert taken == pytest.approx(FLEET.burst + 3600 * FLEET.per_s, abs=1)


def test_a_bucket_says_how_long_to_wait() -> None:
    bucket = TokenBucket(Limit(per_s=0.5, burst=1), 10.0)
    assert bucket.take(10.0)
    assert not bucket.take(10.0)
    assert bucket.wait_s(11.0) == pytest.approx(1.0)
    assert bucket.take(12.0)


def test_a_large_fleet_answers_over_a_longer_time() -> None:
    assert spread_s(0) == spread_s(10)
    assert spread_s(10_000) == 5.0
    assert spread_s(10_000_000) == 60.0
