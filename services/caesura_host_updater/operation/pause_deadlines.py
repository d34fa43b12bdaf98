"""The instants that follow from a pause budget. Pure."""

from __future__ import annotations

import msgspec

from caesura.lifecycle.budget import digest_by_s, margin_s


class PauseDeadlines(msgspec.Struct, frozen=True, omit_defaults=True):
    """The instants that follow from a budget, from ``started_at``, which is before the first freeze call.

    The margin is that of ``caesura.lifecycle.budget``, which the planner uses too. Three margins before the budget ends
    the update is asked to end, two before it is killed and the VMs are resumed, one before the guard resumes them.
    """

    started_at: float
    budget_s: float
    margin_s: float
    durable: bool = False
    """Whether a freeze ends on a disk, as that of method kexec does: one that is busy may take seconds."""

    @classmethod
    def of(cls, started_at: float, budget_s: float, *, durable: bool = False) -> PauseDeadlines:
        """The deadlines of a budget."""
        return cls(started_at, budget_s, margin_s(budget_s), durable)

    @property
    def freeze_by(self) -> float:
        """A VM not confirmed frozen by then fails the operation: a quarter of the budget, at most 5 s where no disk is awaited."""
        quarter_s = self.budget_s / 4
        return self.started_at + (quarter_s if self.durable else min(quarter_s, 5.0))

    @property
    def digest_until(self) -> float:
        """No digest of all memory continues after this: the last third of the budget is for the resume."""
        return self.started_at + digest_by_s(self.budget_s)

    @property
    def leave_by(self) -> float:
        """The other kernel is not started any more (kexec): two thirds of the budget are for its boot."""
        return self.started_at + self.budget_s / 3

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
