"""Planner and host agree on what a budget leaves, else a plan is announced to workloads and refused at its start."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from caesura.lifecycle import budget
from caesura_host_updater.operation.pause_deadlines import PauseDeadlines


@given(st.floats(0.01, 30.0))
def test_planner_and_host_agree(budget_s: float) -> None:
    planned = budget.usable_s(budget_s)
    assert abs(planned - PauseDeadlines.of(0.0, budget_s).update_until) < 1e-9
    assert abs(planned - (budget_s - 3 * PauseDeadlines.of(0.0, budget_s).margin_s)) < 1e-9
