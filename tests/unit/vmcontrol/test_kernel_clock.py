"""The clock that continues while one kernel follows another."""

from __future__ import annotations

import math
import platform
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from caesura_vmcontrol import kernel_clock
from caesura_vmcontrol.kernel_change import ClockPair, Left
from caesura_vmcontrol.kernel_clock import NoCounter, RateMeasurement, elapsed_since, trusted_tsc, tsc

FLAGS = "processor\t: 0\nflags\t\t: fpu {}\n"
X86 = platform.machine() == "x86_64"


def test_the_counter_of_this_machine_goes_forward() -> None:
    """The instruction really runs; on another processor the reason is named."""
    if not X86:
        with pytest.raises(NoCounter, match=platform.machine()):
            tsc()
        return
    seen = [tsc() for _ in range(1000)]
    assert seen == sorted(seen)
    assert seen[0] < seen[-1]
    assert seen[0] > 0


def test_its_rate_does_not_depend_on_when_it_is_measured() -> None:
    """Two stretches of one run, one inside the other: each reading has both clocks within the time between two counts, so the
    bound on the rate's error is known from the readings themselves, however busy the machine is."""
    if not X86:
        return

    def reading() -> tuple[int, float, int]:
        before = tsc()
        now = time.monotonic()
        return before, now, tsc()

    first, middle = reading(), reading()
    while middle[1] - first[1] < 0.5:
        middle = reading()
    last = reading()
    while last[1] - middle[1] < 0.5:
        last = reading()

    def bounds(begin: tuple[int, float, int], end: tuple[int, float, int]) -> tuple[float, float]:
        """The least and the greatest rate, kHz, that these readings allow."""
        seconds = end[1] - begin[1]
        return (end[0] - begin[2]) / seconds / 1000, (end[2] - begin[0]) / seconds / 1000

    (low, high), (other_low, other_high) = bounds(first, middle), bounds(middle, last)
    ppm = 1 + 500e-6  # by which NTP may steer CLOCK_MONOTONIC (adjtimex(2)) between the two
    assert low <= other_high * ppm
    assert other_low <= high * ppm
    assert low > 100_000, "no x86-64 processor counts that slowly"


def test_a_pair_agrees_with_what_is_counted_and_read_around_it() -> None:
    if not X86:
        return
    begun = tsc(), time.monotonic()
    measurement = RateMeasurement()
    begin = time.monotonic()
    while time.monotonic() - begin < 0.2:
        pass
    before, earlier = tsc(), time.time()
    pair = measurement.pair()
    after, later = tsc(), time.time()
    ended = tsc(), time.monotonic()
    assert before <= pair.tsc <= after
    if earlier <= later:  # else somebody has set the clock meanwhile
        assert earlier <= pair.realtime <= later
    outside_khz = (ended[0] - begun[0]) / 0.2 / 1000
    assert 0 < pair.khz <= outside_khz
    assert pair.trusted in (True, False)


@pytest.mark.parametrize(
    ("flags", "line", "trusted"),
    [
        ("constant_tsc nonstop_tsc", "quiet", True),
        ("constant_tsc", "quiet", False),
        ("nonstop_tsc", "quiet", False),
        ("", "quiet tsc=reliable", True),
        ("", "quiet tsc=unstable", False),
    ],
)
def test_which_counters_are_believed(flags: str, line: str, trusted: bool) -> None:
    assert trusted_tsc(FLAGS.format(flags), line) is trusted


LEFT = ClockPair(10**12, 1_800_000_000.0, 2_000_000.0, True)


@given(st.floats(0.001, 1e5), st.floats(-1.4, 1.4))
def test_the_counter_measures_and_the_rtc_only_says_whether_to_believe_it(
    seconds: float, rtc_s: float
) -> None:
    ticks = LEFT.tsc + round(seconds * LEFT.khz * 1000)
    found = elapsed_since(LEFT, ticks, seconds + rtc_s)
    assert found.by_tsc
    assert math.isclose(found.seconds, seconds, abs_tol=1e-6)
    assert found.uncertainty_s < 1.0 or seconds > 1e4


@given(st.floats(0.001, 1e5), st.sampled_from([-1.0, 1.0]), st.floats(1.6, 1e6))
def test_one_that_firmware_has_reset_is_not_believed(seconds: float, sign: float, off_s: float) -> None:
    ticks = LEFT.tsc + round(seconds * LEFT.khz * 1000)
    found = elapsed_since(LEFT, ticks, seconds + sign * off_s)
    assert not found.by_tsc
    assert found.uncertainty_s == kernel_clock.RTC_UNCERTAINTY_S


@pytest.mark.parametrize(
    ("left", "ticks"),
    [(LEFT, None), (LEFT, LEFT.tsc - 1), (ClockPair(10**12, 1_800_000_000.0, 2_000_000.0), LEFT.tsc + 10**9)],
)
def test_without_a_counter_that_is_trusted_on_both_sides_the_rtc_is_all_there_is(
    left: ClockPair, ticks: int | None
) -> None:
    assert not elapsed_since(left, ticks, 1.0).by_tsc


@given(st.floats(-1e5, 1e5), st.floats(0, 600))
def test_an_rtc_that_is_in_local_time_or_was_never_set_does_not_matter(off_s: float, seconds: float) -> None:
    """The new kernel takes its time from it, so that is as far off; the RTC has run on all the same."""
    left = Left(LEFT, 100.0, "6.1", float(math.floor(LEFT.realtime + off_s)))
    there = float(math.floor(LEFT.realtime + off_s + seconds))
    found = kernel_clock.by_rtc(left, there + 0.5, there)
    assert abs(found - seconds) <= 1.0
    assert elapsed_since(LEFT, LEFT.tsc + round(seconds * LEFT.khz * 1000) + 1, found).by_tsc


@pytest.mark.parametrize(("before", "now"), [(None, 5.0), (5.0, None), (None, None)])
def test_without_an_rtc_that_can_be_read_the_kernels_time_is_all_there_is(
    before: float | None, now: float | None
) -> None:
    left = Left(LEFT, 100.0, "6.1", before)
    assert kernel_clock.by_rtc(left, LEFT.realtime + 7.0, now) == pytest.approx(7.0)
