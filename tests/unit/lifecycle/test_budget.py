"""Planner and host agree on what a budget leaves, else a plan is announced to workloads and refused at its start."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from caesura.lifecycle import budget
from caesura_host_updater import schedule


@given(st.floats(0.01, 30.0))
def test_planner_and_host_agree(budget_s: float) -> None:
    assert abs(budget.usable_s(budget_s) - schedule.usable_s(budget_s)) < 1e-9
    assert budget.MIN_BUDGET_S == schedule.MIN_BUDGET_S
