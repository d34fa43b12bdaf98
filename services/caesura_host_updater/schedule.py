"""The instants that a pause budget gives. Pure."""

from __future__ import annotations

import msgspec

MIN_BUDGET_S = 0.5  # s: below it the margins (0.1 s each, see Schedule) leave nothing for the update


class Schedule(msgspec.Struct, frozen=True):
    """The instants that a budget gives, from ``started_at``, which is before the first freeze call.

    The margin is a tenth of the budget, at least 0.1 s and at most 1 s. Three margins before the budget ends
    the update is asked to end, two before it is killed and the VMs are resumed, one before the guard does it.
    """

    started_at: float
    budget_s: float
    margin_s: float

    @classmethod
    def of(cls, started_at: float, budget_s: float) -> Schedule:
        """The schedule of a budget."""
        return cls(started_at, budget_s, min(max(budget_s / 10, 0.1), 1.0))

    @property
    def freeze_by(self) -> float:
        """A VM not confirmed frozen by then fails the operation: a quarter of the budget, at most 5 s."""
        return self.started_at + min(self.budget_s / 4, 5.0)

    @property
    def digest_until(self) -> float:
        """No digest goes on after this: the last third of the budget is for the resume."""
        # A small budget is mostly margins: there the update's end comes before the last third.
        return min(self.started_at + self.budget_s * 2 / 3, self.update_until)

    @property
    def update_until(self) -> float:
        """The update is asked to end."""
        return self.started_at + self.budget_s - 3 * self.margin_s

    @property
    def resume_at(self) -> float:
        """The VMs are resumed, whatever the update does."""
        return self.started_at + self.budget_s - 2 * self.margin_s

    @property
    def guard_at(self) -> float:
        """The guard's deadline; one margin is left for its work."""
        return self.started_at + self.budget_s - self.margin_s


def usable_s(budget_s: float) -> float:
    """Seconds of a budget that an update or a hold can use, at best."""
    return Schedule.of(0.0, budget_s).update_until
