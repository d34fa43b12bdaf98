"""How far one word can raise an epoch."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from caesura.contract.messages import EPOCH_MOST
from caesura.lifecycle.epoch import EPOCH_LEAP, HOST_LEAP, epoch_floor, leaps

EPOCHS = st.integers(0, EPOCH_MOST) | st.integers(0, 3000)


@pytest.mark.parametrize(
    ("stored", "announced", "hosts", "floor"),
    [
        (0, [], [], 0),
        (7, [], [5, 7], 7),
        (7, [9], [], 9),
        (7, [], [9], 9),
        (7, [EPOCH_MOST], [EPOCH_MOST, EPOCH_MOST, EPOCH_MOST], 7),
        (7, [], [7 + HOST_LEAP, 8 + HOST_LEAP], 7 + HOST_LEAP),
        (7, [6 + EPOCH_LEAP], [], 6 + EPOCH_LEAP),
        (7, [7 + EPOCH_LEAP], [], 7),
        (0, [], [5000, 5000, 5001], 5001),  # the store was lost
        (0, [5002], [5000, 5000, 5001], 5002),
        (0, [], [0, 0, 0, 500], 500),
        (0, [], [500, EPOCH_MOST], 500),
        (0, [EPOCH_MOST], [EPOCH_MOST], 0),
        (0, [10**9], [], 10**9),
    ],
)
def test_the_floor_of_a_claim(stored: int, announced: list[int], hosts: list[int], floor: int) -> None:
    assert epoch_floor(stored, announced, hosts) == floor


@given(st.integers(1, EPOCH_MOST), st.lists(EPOCHS), st.lists(EPOCHS))
def test_who_obeys_what_was_claimed_last_obeys_the_next_claim(
    stored: int, announced: list[int], hosts: list[int]
) -> None:
    floor = epoch_floor(stored, announced, hosts)
    assert floor >= stored
    assert not leaps(stored, floor + 1)


@given(st.integers(0, 10_000), st.lists(EPOCHS, max_size=5), st.integers(10, 20))
def test_a_few_hosts_do_not_lift_it_beyond_the_others_reach(
    most: int, strange: list[int], honest: int
) -> None:
    floor = epoch_floor(0, [], [most] * honest + strange)
    assert floor >= most
    assert not leaps(most, floor + 1)


def test_a_lying_host_locks_out_no_host_that_missed_fewer_than_nine_starts() -> None:
    """It can raise each claim by no more than its own leap, and only a start of a coordinator is a claim."""
    stored, obeyed = 7, [7]
    for _ in range(50):
        claim = epoch_floor(stored, [], [*obeyed[-1:], stored + HOST_LEAP]) + 1
        assert claim <= stored + HOST_LEAP + 1
        assert not any(leaps(each, claim) for each in obeyed[-9:]), (
            "one that is on the bus, or missed up to eight"
        )
        stored = claim
        obeyed.append(claim)
