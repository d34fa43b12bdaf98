"""Requests of operators, and the coordinator's answers."""

from __future__ import annotations

from typing import Annotated, ClassVar

from msgspec import Meta

from caesura.contract.envelope import Instant, Message
from caesura.contract.messages.fields import MAX_BUDGET_S, MOST_PARTS, Id, OptionalId, PartNumber, Text
from caesura.contract.messages.plans import Limits, Plan, PlannedVm, PlannedWave, Policy, Refusal, Selection
from caesura.contract.names import Name
from caesura.contract.reasons import Code


class RolloutRequested(Message, frozen=True, kw_only=True):
    """Start a rollout of a named update, or only plan it."""

    TYPE: ClassVar[str] = "caesura.rollout.requested.v1"

    request: Id
    update: Name
    selection: Selection = Selection()
    policy: Policy = Policy()
    plan_only: bool = False
    limits: Limits = Limits()
    queue: bool = False
    """Wait for the rollouts that hold its sets, announced with a later NotBefore, instead of being refused."""


class FreezeRequested(Message, frozen=True, kw_only=True):
    """Freeze VMs on demand for ``hold_s`` seconds, with notice, one domain of a set at a time."""

    TYPE: ClassVar[str] = "caesura.freeze.requested.v1"

    request: Id
    selection: Selection
    hold_s: Annotated[float, Meta(gt=0, le=MAX_BUDGET_S)]
    policy: Policy = Policy()
    plan_only: bool = False
    limits: Limits = Limits()
    queue: bool = False
    """Wait for the rollouts that hold its sets, announced with a later NotBefore, instead of being refused."""


class AbortRequested(Message, frozen=True, kw_only=True):
    """Abort a rollout, in any state. Empty ``rollout``: the only one that has not ended."""

    TYPE: ClassVar[str] = "caesura.abort.requested.v1"

    request: Id
    rollout: OptionalId = ""
    reason: Text = ""


class ResumeRequested(Message, frozen=True, kw_only=True):
    """Resume a halted rollout: the failed wave is tried again, completed ones are not."""

    TYPE: ClassVar[str] = "caesura.resume.requested.v1"

    request: Id
    rollout: OptionalId = ""


class RequestAnswered(Message, frozen=True, kw_only=True):
    """The coordinator's answer to a request. A repeated request gets the same answer.

    Accepted without a rollout, and not only planned: there is nothing to do, and `reason` says why.
    """

    TYPE: ClassVar[str] = "caesura.request.answered.v1"

    request: Id
    accepted: bool
    reason: Text = ""
    codes: tuple[Code, ...] = ()
    rollout: OptionalId = ""
    queued_behind: OptionalId = ""
    """The rollout that this one waits for."""
    not_before: Instant | None = None
    """Of a queued rollout: its first pause is not before this instant, which may move later."""
    plan: Plan | None = None
    """Without waves, skipped VMs and refusals where there are parts."""
    plan_parts: Annotated[int, Meta(ge=0, le=MOST_PARTS)] = 0
    """The number of parts, on topics of their own, with the waves, the skipped VMs and the refusals of the plan."""


class PlanPart(Message, frozen=True, kw_only=True):
    """A part of the plan in an answer that does not fit into one message. A wave may continue in the next part, under the same number."""

    TYPE: ClassVar[str] = "caesura.plan.part.v1"

    request: Id
    part: PartNumber
    waves: tuple[PlannedWave, ...] = ()
    skipped: tuple[PlannedVm, ...] = ()
    refusals: tuple[Refusal, ...] = ()
