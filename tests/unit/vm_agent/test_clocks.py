"""The two guest clocks with injected time: this machine's clock is never touched."""

from __future__ import annotations

import errno
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from caesura_vm_agent.guest_clock import (
    ClockError,
    ProcessTime,
    SimulatedClock,
    SystemClock,
    setoffset_request,
)
from caesura_vm_agent.ntp import NS_PER_S

MS = 1_000_000


class Machine:
    """A made-up host: time passes, with the process running, waiting, or frozen."""

    def __init__(self) -> None:
        self.host_ns = 50 * NS_PER_S
        self.busy_ns = 0

    def idle(self, ns: int) -> None:
        self.host_ns += ns

    def busy(self, ns: int) -> None:
        self.host_ns += ns
        self.busy_ns += ns

    def clock(self) -> SimulatedClock:
        return SimulatedClock(
            tick_s=0.05,
            gap_threshold_s=0.2,
            monotonic_ns=lambda: self.host_ns,
            wall_ns=lambda: 1_800_000_000 * NS_PER_S,
            busy_ns=lambda: self.busy_ns,
        )


def test_a_running_guest_keeps_time_with_the_host() -> None:
    machine = Machine()
    clock = machine.clock()
    for _ in range(1_000):
        machine.idle(50 * MS)
        clock.monotonic_ns()
    assert clock.frozen_ns == 0
    assert clock.now_ns() == 1_800_000_050 * NS_PER_S


def test_after_a_pause_the_guest_is_behind_by_it() -> None:
    machine = Machine()
    clock = machine.clock()
    machine.idle(30 * MS)  # since the last tick
    machine.idle(9 * NS_PER_S)
    behind_ns = (1_800_000_000 * NS_PER_S + 9_030 * MS) - clock.now_ns()
    assert abs(behind_ns - 9 * NS_PER_S) <= 25 * MS


def test_a_starved_process_is_not_taken_for_a_paused_one() -> None:
    machine = Machine()
    clock = machine.clock()
    machine.idle(50 * MS)
    machine.busy(3 * NS_PER_S)  # ran, or waited for a CPU
    assert clock.now_ns() == 1_800_000_003 * NS_PER_S + 50 * MS
    assert clock.frozen_ns == 0


def test_a_pause_on_a_busy_machine_is_still_seen() -> None:
    machine = Machine()
    clock = machine.clock()
    machine.busy(2 * NS_PER_S)
    machine.idle(300 * MS)
    machine.busy(NS_PER_S)
    assert clock.now_ns() == 1_800_000_003 * NS_PER_S + 25 * MS
    assert clock.frozen_ns == 275 * MS


def test_a_step_moves_the_wall_clock_and_not_the_monotonic_one() -> None:
    machine = Machine()
    clock = machine.clock()
    before = clock.monotonic_ns()
    clock.step(-7 * NS_PER_S)
    assert clock.monotonic_ns() == before
    assert clock.now_ns() == 1_799_999_993 * NS_PER_S


@given(
    st.lists(
        st.tuples(st.sampled_from(["idle", "busy", "read", "step"]), st.integers(0, 40 * NS_PER_S)),
        max_size=40,
    )
)
def test_the_guest_monotonic_clock_never_goes_back(moves: list[tuple[str, int]]) -> None:
    machine = Machine()
    clock = machine.clock()
    last = clock.monotonic_ns()
    for move, ns in moves:
        match move:
            case "idle":
                machine.idle(ns)
            case "busy":
                machine.busy(ns)
            case "step":
                clock.step(ns - 20 * NS_PER_S)
        now = clock.monotonic_ns()
        assert last <= now
        last = now


def test_what_this_process_ran_is_counted() -> None:
    busy_ns = ProcessTime()
    before = busy_ns()
    end = time.monotonic() + 10
    while busy_ns() == before:  # the kernel brings the figure up to date at its ticks, not at every read
        assert time.monotonic() < end, "ten busy seconds were not counted"
        sum(range(100_000))
    assert busy_ns() > before


def test_without_schedstat_nothing_counts_as_busy() -> None:
    assert ProcessTime("/nowhere/schedstat")() == 0


def refuse(number: int) -> None:
    raise OSError(number, "no")


def test_the_system_clock_is_stepped_relatively() -> None:
    steps: list[int] = []
    clock = SystemClock(now_ns=lambda: 5, adjust=steps.append)
    clock.step(-123)
    assert steps == [-123]


def test_where_adjtimex_is_not_to_be_had_the_time_is_set() -> None:
    was_set: list[int] = []
    clock = SystemClock(
        now_ns=lambda: 1_000, adjust=lambda _: refuse(errno.ENOSYS), settime_ns=was_set.append
    )
    clock.step(500)
    assert was_set == [1_500]


def test_without_permission_it_says_what_to_do() -> None:
    clock = SystemClock(adjust=lambda _: refuse(errno.EPERM))
    with pytest.raises(ClockError, match="CAP_SYS_TIME"):
        clock.step(1)
    clock = SystemClock(adjust=lambda _: refuse(errno.EINVAL), settime_ns=lambda _: refuse(errno.EPERM))
    with pytest.raises(ClockError, match="CAP_SYS_TIME"):
        clock.step(1)


def test_a_kernel_that_refuses_is_an_error_with_its_words() -> None:
    clock = SystemClock(adjust=lambda _: refuse(errno.EINVAL), settime_ns=lambda _: refuse(errno.EINVAL))
    with pytest.raises(ClockError, match="kernel refused"):
        clock.step(1)


@given(st.integers(-(10**13), 10**13))
def test_the_adjtimex_request_has_a_fraction_the_kernel_takes(by_ns: int) -> None:
    request = setoffset_request(by_ns)
    assert 0 <= request.tv_fraction < NS_PER_S
    assert request.tv_sec * NS_PER_S + request.tv_fraction == by_ns
    assert request.modes == 0x2100
