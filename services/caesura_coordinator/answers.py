"""Answers with plans that fit into a message. Pure."""

from __future__ import annotations

import msgspec

from caesura.contract import messages as m
from caesura.contract.codec import MAX_PAYLOAD_BYTES, size_bytes
from caesura.contract.fitting import fitted
from caesura_coordinator.inputs import RequestRefused

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
    """The answer with the plan, its texts cut if need be; when it is too large even so, without it and saying so.

    Args:
        reason: why it is refused; empty: it is accepted.
        codes: of ``reason``, or of ``note``.
        note: what is to be said of one that is accepted.
    """
    whole = m.RequestAnswered(
        request=request,
        accepted=not reason,
        reason=(reason or note)[:REASON_CHARACTERS],
        codes=codes,
        plan=plan,
        rollout=rollout,
    )
    answer = msgspec.structs.replace(fitted(whole), reason=whole.reason)
    size = size_bytes(answer)
    if size <= MAX_PAYLOAD_BYTES:
        return answer
    if rollout or reason or note:
        return msgspec.structs.replace(answer, plan=None)
    vms = sum(len(wave.vms) for wave in plan.waves)
    raise RequestRefused(
        "too_large",
        f"the plan for {vms} VMs is too large for a message ({size} bytes of {MAX_PAYLOAD_BYTES}): "
        "select fewer sets or hosts at a time",
    )
