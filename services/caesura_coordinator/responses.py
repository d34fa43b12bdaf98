"""Answers with plans. Pure."""

from __future__ import annotations

import msgspec

from caesura.contract import messages as m
from caesura.contract.parts import answer_in_parts
from caesura_coordinator.request_refusals import RequestRefused

REASON_CHARACTERS = 4000
"""The contract allows 4096."""


def with_plan(
    request: str,
    plan: m.Plan,
    reason: str,
    codes: tuple[str, ...],
    *,
    rollout: str = "",
    note: str = "",
) -> m.RequestAnswered:
    """The answer with the plan, which is sent in parts where it does not fit into one message.

    Args:
        reason: why it is refused; empty: it is accepted.
        codes: the codes of ``reason`` or ``note``.
        note: remark on an accepted request.

    Raises:
        RequestRefused: the plan cannot be sent even in parts.
    """
    whole = m.RequestAnswered(
        request=request,
        accepted=not reason,
        reason=(reason or note)[:REASON_CHARACTERS],
        codes=codes,
        plan=plan,
        rollout=rollout,
    )
    if answer_in_parts(whole)[0].plan_parts <= m.MOST_PARTS:
        return whole
    if rollout or reason or note:
        return msgspec.structs.replace(whole, plan=None)
    vms = sum(len(wave.vms) for wave in plan.waves) + len(plan.skipped)
    raise RequestRefused(
        "too_large", f"the plan for {vms} VMs is too large to be sent: select fewer sets or hosts at a time"
    )
