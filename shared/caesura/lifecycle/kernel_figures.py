"""What a measured change of a host's kernel says of the next one: planner and host must agree, or the host refuses a plan at its start. Pure."""

from __future__ import annotations

from collections.abc import Iterable

from caesura.contract.messages import KernelFigure

RESERVE = 1.5
"""A measured pause times this must fit the budget."""


def newest_figure(figures: Iterable[KernelFigure], release: str) -> KernelFigure | None:
    """The newest measurement of a change to this kernel; None: there is none."""
    return max((each for each in figures if each.to == release), key=lambda each: each.at, default=None)


def budget_error(figure: KernelFigure, budget_s: float) -> str:
    """Why a measured change does not fit a pause budget of that many seconds; empty: it does."""
    if figure.seconds * RESERVE <= budget_s:
        return ""
    return (
        f"kernel {figure.to} took {figure.seconds:.1f} s on {figure.at:%Y-%m-%d}: half as much again does not fit a pause budget "
        f"of {budget_s:g} s"
    )
