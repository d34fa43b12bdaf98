"""The arithmetic of clock-sync, against the truth that the test made up."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from caesura_vm_agent.ntp import (
    MAX_ROUNDS,
    MAX_STEPS,
    NS_PER_S,
    Done,
    ImplausibleExchange,
    MeasureAgain,
    NtpSample,
    StepClock,
    best,
    error_found,
    measure,
    next_step,
)

MAX_DELAY_NS = 2 * NS_PER_S

errors = st.integers(-40 * NS_PER_S, 40 * NS_PER_S)
legs = st.integers(0, NS_PER_S)
instants = st.integers(1_700_000_000 * NS_PER_S, 1_900_000_000 * NS_PER_S)


def exchange(host_ns: int, error_ns: int, out_ns: int, host_work_ns: int, back_ns: int) -> NtpSample:
    """What a guest measures whose clock is off by ``error_ns``, over these two legs."""
    t1 = host_ns + error_ns
    t2 = host_ns + out_ns
    t3 = t2 + host_work_ns
    t4 = t3 + back_ns + error_ns
    return measure(t1, t2, t3, t4, max_delay_ns=MAX_DELAY_NS)


@given(instants, errors, legs, legs, legs)
def test_the_error_is_found_within_half_the_delay_whatever_the_legs(
    host_ns: int, error_ns: int, out_ns: int, work_ns: int, back_ns: int
) -> None:
    sample = exchange(host_ns, error_ns, out_ns, work_ns, back_ns)
    assert sample.delay_ns == out_ns + back_ns
    assert abs(sample.error_ns - error_ns) <= sample.uncertainty_ns


@given(instants, errors, legs, legs)
def test_with_equal_legs_the_error_is_exact(host_ns: int, error_ns: int, leg_ns: int, work_ns: int) -> None:
    assert exchange(host_ns, error_ns, leg_ns, work_ns, leg_ns).error_ns == error_ns


def test_the_example_of_rfc_5905_signs() -> None:
    # The guest is 100 ns ahead; 10 ns out, 5 ns of work, 10 ns back.
    assert measure(1100, 1010, 1015, 1125, max_delay_ns=MAX_DELAY_NS) == NtpSample(
        error_ns=100, delay_ns=20, host_ns=1010
    )


@given(st.lists(st.tuples(errors, legs, legs), min_size=1, max_size=12), errors)
def test_the_best_exchange_is_off_by_no_more_than_the_least_delay_allows(
    exchanges: list[tuple[int, int, int]], error_ns: int
) -> None:
    samples = [
        exchange(1_800_000_000 * NS_PER_S, error_ns, out_ns, 1, back_ns) for _, out_ns, back_ns in exchanges
    ]
    chosen = best(samples)
    assert chosen is not None
    least = min(out_ns + back_ns for _, out_ns, back_ns in exchanges)
    assert abs(chosen.error_ns - error_ns) <= (least + 1) // 2


def test_no_samples_have_no_best() -> None:
    assert best([]) is None


@pytest.mark.parametrize(
    ("stamps", "why"),
    [
        ((100, 50, 50, 99), "guest clock went back"),
        ((100, 60, 50, 200), "host clock went back"),
        ((100, 0, 500, 200), "negative delay"),
        ((0, 0, 0, MAX_DELAY_NS + 1), "delay of 2000000001 ns"),
    ],
)
def test_timestamps_that_cannot_be_are_refused(stamps: tuple[int, int, int, int], why: str) -> None:
    with pytest.raises(ImplausibleExchange, match=why):
        measure(*stamps, max_delay_ns=MAX_DELAY_NS)


def ms(error: float, delay: float = 0.2) -> NtpSample:
    return NtpSample(error_ns=round(error * 1e6), delay_ns=round(delay * 1e6))


def decide(
    *rounds: NtpSample | None,
    steps: int | None = None,
    threshold_s: float = 0.001,
    bound_s: float = 0.1,
    most_s: float = 60.0,
) -> StepClock | MeasureAgain | Done:
    """After these rounds; each but the last led to a step, unless told otherwise."""
    made = len(rounds) - 1 if steps is None else steps
    return next_step(rounds, steps=made, threshold_s=threshold_s, bound_s=bound_s, most_s=most_s)


@pytest.mark.parametrize("sign", [1, -1])
def test_a_step_above_the_most_is_refused_with_what_was_found(sign: int) -> None:
    far = ms(sign * 61_000)
    refused = decide(far)
    assert isinstance(refused, Done)
    assert not refused.synced
    assert refused.refused_ns == far.error_ns
    assert "outside a resume" in refused.reason
    assert decide(far, most_s=math.inf) == StepClock(by_ns=-far.error_ns), (
        "after a pause it is stepped, however far"
    )
    assert decide(ms(sign * 59_000)) == StepClock(by_ns=-ms(sign * 59_000).error_ns)


def test_what_an_earlier_sync_stepped_away_is_what_the_pause_did() -> None:
    def at(host_s: float, error_s: float) -> NtpSample:
        return NtpSample(round(error_s * 1e9), 100, round(host_s * 1e9))

    right = at(13, 0.0001)
    assert error_found(right, [at(12.5, -2)], paused_at_s=10) == -2
    assert error_found(right, [at(9.9, -5)], paused_at_s=10) == 0.0001, "of an earlier pause"
    assert error_found(right, [at(9, -5), at(12.5, -2), at(12.6, 0.2)], paused_at_s=10) == -2
    assert error_found(None, [at(12.5, -2)], paused_at_s=10) == -2
    assert error_found(right, [at(12.5, -2)], paused_at_s=None) == 0.0001, "not about a pause"
    assert error_found(None, [], paused_at_s=10) is None


def test_a_guest_behind_by_a_pause_is_stepped_forward_by_it() -> None:
    assert decide(ms(-9_000)) == StepClock(by_ns=9_000_000_000)


def test_after_the_step_an_error_within_the_bound_is_the_end() -> None:
    assert decide(ms(-9_000), ms(0.3)) == Done(synced=True)


def test_an_error_within_the_bound_is_not_stepped_twice() -> None:
    assert decide(ms(-9_000), ms(5)) == Done(synced=True)


def test_a_step_that_left_too_much_is_followed_by_one_more_and_no_third() -> None:
    assert decide(ms(-9_000), ms(-200)) == StepClock(by_ns=200_000_000)
    end = decide(ms(-9_000), ms(-200), ms(-150))
    assert isinstance(end, Done)
    assert not end.synced
    assert "-0.150000 s" in end.reason
    assert "after 2 steps" in end.reason


def test_a_small_error_is_left_alone() -> None:
    assert decide(ms(0.9)) == Done(synced=True)
    assert decide(ms(40), threshold_s=0.05) == Done(synced=True)


def test_an_error_below_its_own_uncertainty_is_no_reason_to_step() -> None:
    assert decide(ms(20, delay=50)) == Done(synced=True)


def test_an_uncertainty_beyond_the_bound_is_not_called_synced() -> None:
    assert decide(ms(1, delay=400)) == MeasureAgain()
    end = decide(*[ms(1, delay=400)] * MAX_ROUNDS, steps=0)
    assert isinstance(end, Done)
    assert not end.synced


def test_a_round_that_says_too_little_is_measured_again_until_it_says_enough() -> None:
    """A guest that hardly gets a CPU: the step was right, the exchanges after it take long."""
    vague = ms(-64, delay=170)
    assert decide(ms(-9_000), vague) == MeasureAgain()
    assert decide(ms(-9_000), vague, ms(-2, delay=20), steps=1) == Done(synced=True)
    assert decide(ms(-9_000), vague, ms(-150, delay=20), steps=1) == StepClock(by_ns=150_000_000)


@pytest.mark.parametrize("rounds", [(None,), (ms(-9_000), None)])
def test_no_answer_is_not_synced_and_says_so(rounds: tuple[NtpSample | None, ...]) -> None:
    end = decide(*rounds)
    assert isinstance(end, Done)
    assert not end.synced
    assert "no answer" in end.reason


@given(st.lists(st.builds(NtpSample, errors, st.integers(0, MAX_DELAY_NS)), min_size=1, max_size=8))
def test_it_always_ends_and_synced_means_within_the_bound(samples: list[NtpSample]) -> None:
    rounds: list[NtpSample] = []
    steps = 0
    for sample in samples:
        rounds.append(sample)
        step = decide(*rounds, steps=steps)
        if isinstance(step, Done):
            worst_s = (abs(sample.error_ns) + sample.uncertainty_ns) / NS_PER_S
            assert step.synced == (worst_s <= 0.1)
            return
        if isinstance(step, StepClock):
            steps += 1
            assert step.by_ns == -sample.error_ns
        assert steps <= MAX_STEPS
    assert len(rounds) < MAX_ROUNDS
