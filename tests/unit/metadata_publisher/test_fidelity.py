"""Limits of the real service, on a clock of the test's own."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from caesura_metadata_publisher.fidelity import SWITCHED_OFF_S, FirstCalls, RateLimit


def test_the_sixth_request_within_a_second_is_not_served_and_does_not_count() -> None:
    limit = RateLimit()
    assert all(limit.allows("a", 10.0 + each / 10) for each in range(5))
    assert not limit.allows("a", 10.5)
    assert not limit.allows("a", 10.99)
    assert limit.allows("b", 10.5), "each VM has its own"
    assert limit.allows("a", 11.0)
    assert not limit.allows("a", 11.05)
    assert limit.allows("a", 11.1)


@given(st.lists(st.floats(0.0, 0.5), max_size=60))
def test_no_second_has_more_than_five_that_were_served(gaps: list[float]) -> None:
    limit = RateLimit()
    now, served = 0.0, []
    for gap in gaps:
        now += gap
        if limit.allows("a", now):
            served.append(now)
    for first in served:
        assert sum(first <= each < first + 1.0 for each in served) <= 5


def test_the_first_call_of_a_set_is_answered_late_and_so_are_those_until_then() -> None:
    calls = FirstCalls(60.0)
    assert calls.called("web", 100.0) == 60.0
    assert calls.called("web", 130.0) == 30.0, "a retry of the same or of another VM"
    assert calls.called("web", 160.0) == 0.0
    assert calls.called("other", 160.0) == 60.0


def test_a_day_without_a_call_switches_it_off_again() -> None:
    calls = FirstCalls(60.0)
    calls.called("web", 0.0)
    assert calls.called("web", SWITCHED_OFF_S - 1) == 0.0
    assert calls.called("web", 2 * SWITCHED_OFF_S - 2) == 0.0
    assert calls.called("web", 3 * SWITCHED_OFF_S) == 60.0
