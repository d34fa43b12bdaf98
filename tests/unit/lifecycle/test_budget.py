"""Planner and host agree on what a budget leaves, else a plan is announced to workloads and refused at its start."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from caesura.lifecycle import budget
from caesura_host_updater.operation.pause_deadlines import PauseDeadlines


@given(st.floats(0.01, 30.0))
def test_planner_and_host_agree(budget_s: float) -> None:
    planned = budget.usable_s(budget_s)
    assert abs(planned - PauseDeadlines.of(0.0, budget_s).update_until) < 1e-9
    assert abs(planned - (budget_s - 3 * PauseDeadlines.of(0.0, budget_s).margin_s)) < 1e-9


@pytest.mark.parametrize(
    ("budget_s", "needs_s", "why"),
    [
        (0.49, 0.0, "too short"),
        (0.5, 0.0, None),
        (10.0, 7.0, None),
        (10.0, 7.1, "takes 7.1 s, a pause budget of 10 s leaves 7.00 s"),
        (30.0, 27.0, None),
        (30.0, 27.1, "leaves 27.00 s"),
    ],
)
def test_a_budget_is_refused_if_the_rest_is_too_short_for_the_resume(
    budget_s: float, needs_s: float, why: str | None
) -> None:
    found = budget.budget_refusal(budget_s, needs_s)
    assert found is None if why is None else found is not None and why in found
