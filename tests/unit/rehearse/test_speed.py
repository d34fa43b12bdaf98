"""What ``--speed`` shortens."""

from __future__ import annotations

import pytest

from caesura_rehearse.simulation.orders import LaterPause, Order
from caesura_rehearse.simulation.speed import LEAST_S, at_speed


def test_waits_are_shortened_and_what_is_rehearsed_is_not() -> None:
    order = Order(
        notice_s=900.0, duration_s=9.0, checks_s=600.0, soak_s=60.0, grace_s=30.0,
        later_pauses=(LaterPause(after_s=120.0, duration_s=2.0),),
    )  # fmt: skip
    fast = at_speed(order, 60.0)
    assert (fast.notice, fast.checks_s, fast.soak_s) == (15.0, 10.0, 1.0)
    assert fast.later_pauses == (LaterPause(after_s=2.0, duration_s=2.0),)
    assert (fast.duration_s, fast.grace_s, fast.shown_duration) == (9.0, 30.0, 9)


@pytest.mark.parametrize(("notice_s", "at_60"), [(None, 15.0), (30.0, LEAST_S), (1.0, 1.0), (0.0, 0.0)])
def test_a_client_that_polls_once_a_second_sees_every_state(notice_s: float | None, at_60: float) -> None:
    assert at_speed(Order(notice_s=notice_s), 60.0).notice == at_60


def test_at_its_own_pace_nothing_changes() -> None:
    order = Order(notice_s=900.0, soak_s=7.0)
    assert at_speed(order, 1.0) is order
