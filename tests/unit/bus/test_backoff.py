from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from caesura.bus.backoff import Backoff


def test_the_ceiling_doubles_up_to_the_maximum_and_starts_again_after_a_reset() -> None:
    backoff = Backoff(1, 10, lambda _low, high: high)
    assert [backoff.next_s() for _ in range(5)] == [2, 4, 8, 10, 10]
    backoff.reset()
    assert backoff.next_s() == 2


def test_the_longest_wait_is_in_the_upper_half_and_stays() -> None:
    lowest = Backoff(1, 10, lambda low, _high: low)
    assert lowest.longest_s() == 5
    highest = Backoff(1, 10, lambda _low, high: high)
    highest.longest_s()
    assert highest.next_s() == 10


@given(
    st.floats(0.01, 5),
    st.floats(0, 100),
    st.floats(0, 1),
    st.lists(st.sampled_from(["next", "longest", "reset"]), max_size=20),
)
def test_no_delay_is_ever_outside_its_bounds(low: float, more: float, share: float, calls: list[str]) -> None:
    backoff = Backoff(low, low + more, lambda a, b: min(b, a + (b - a) * share))
    for call in calls:
        if call == "reset":
            backoff.reset()
        else:
            delay = backoff.next_s() if call == "next" else backoff.longest_s()
            assert low <= delay <= low + more
