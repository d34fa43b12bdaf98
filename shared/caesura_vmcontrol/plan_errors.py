"""Why a plan is not carried out."""

from __future__ import annotations


class BadPlan(ValueError):
    """A plan that the guard refuses to carry out."""
