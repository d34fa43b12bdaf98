"""How a new boot sets its clock: from the counter, else from the RTC's own progress, else not at all."""

from __future__ import annotations

import time

import pytest

from caesura_pause_guard import arrival
from caesura_vmcontrol import kernel_clock
from caesura_vmcontrol.kernel_change import ClockPair, HostClock, Left

KHZ = 2_000_000.0


def arrives(
    monkeypatch: pytest.MonkeyPatch, *, kernel_off_s: float, rtc_off_s: float, trusted: bool
) -> tuple[HostClock, float, list[float]]:
    """20 s after the leaving. ``kernel_off_s``: of the new kernel's time. ``rtc_off_s``: of the RTC, in both boots."""
    true_now = 1_800_000_020.0
    left = Left(
        ClockPair(10**12, true_now - 20.0, KHZ, trusted), 5.0, "6.1", float(int(true_now - 20.0 + rtc_off_s))
    )
    told: list[float] = []
    monkeypatch.setattr(kernel_clock, "trusted_here", lambda: True)
    monkeypatch.setattr(kernel_clock, "tsc", lambda: 10**12 + round(20.0 * KHZ * 1000))
    monkeypatch.setattr(kernel_clock, "rtc", lambda: float(int(true_now + rtc_off_s)))
    monkeypatch.setattr(time, "time", lambda: true_now + kernel_off_s)
    monkeypatch.setattr(time, "clock_settime", lambda _, seconds: told.append(seconds - true_now))
    clock, elapsed_s = arrival._set_clock(left, lambda *_, **__: None)
    return clock, elapsed_s, told


def test_from_the_counter(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, elapsed_s, told = arrives(monkeypatch, kernel_off_s=-0.4, rtc_off_s=0.0, trusted=True)
    assert clock.source == "tsc"
    assert told == [pytest.approx(0.0, abs=1e-5)]
    assert clock.error_before_s == pytest.approx(-0.4, abs=1e-5)
    assert elapsed_s == pytest.approx(20.0)


@pytest.mark.parametrize("off_s", [-142.0, 3600.0])
def test_whatever_the_rtc_says(monkeypatch: pytest.MonkeyPatch, off_s: float) -> None:
    """In local time, or never set: the new kernel's time is as far off, and no guest is lost for that."""
    clock, elapsed_s, told = arrives(monkeypatch, kernel_off_s=off_s + 0.5, rtc_off_s=off_s, trusted=True)
    assert clock.source == "tsc"
    assert told == [pytest.approx(0.0, abs=1e-5)]
    assert elapsed_s == pytest.approx(20.0)


def test_without_the_counter_from_how_far_the_rtc_went(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, elapsed_s, told = arrives(monkeypatch, kernel_off_s=3600.5, rtc_off_s=3600.0, trusted=False)
    assert clock.source == "rtc"
    assert told == [pytest.approx(0.0, abs=1.0)]
    assert clock.uncertainty_s == kernel_clock.RTC_UNCERTAINTY_S
    assert elapsed_s == pytest.approx(20.0, abs=1.0)


def test_the_kernels_own_time_stands_where_nothing_is_better(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, _, told = arrives(monkeypatch, kernel_off_s=0.4, rtc_off_s=0.0, trusted=False)
    assert (clock.source, clock.error_before_s, told) == ("rtc", None, [])
