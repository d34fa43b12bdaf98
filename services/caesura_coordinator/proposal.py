"""What a request would start, and its answer: all that is computed of the fleet, without a decision. Pure.

For 10,000 VMs it takes tenths of a second, so it is computed in a thread, from what does not change in the meantime.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import datetime

import msgspec

from caesura.contract import messages as m
from caesura.contract.codec import MAX_PAYLOAD_BYTES, size_bytes
from caesura.contract.envelope import Message
from caesura_coordinator.fleet_snapshot import FleetSnapshot
from caesura_coordinator.plan import make_plan, most_targets, nothing_to_do, sets_of
from caesura_coordinator.published_state import largest_events, largest_states
from caesura_coordinator.records import Rollout, new_rollout
from caesura_coordinator.responses import with_plan


class Proposal(msgspec.Struct, frozen=True, kw_only=True):
    """See the module."""

    sets: tuple[str, ...]
    """Of the plan."""
    answer: m.RequestAnswered
    """As long as no other rollout is in the way."""
    rollout: Rollout | None
    """The one that would be started; None: there is nothing to start."""
    too_large: str = ""
    """Why the rollout could not be announced; empty: it can be."""
    largest_events: Mapping[str, Mapping[str, int]] = {}
    """Maps this rollout and those that it may have to wait for to the most bytes that their events take in each set's document."""


def propose(
    fleet: FleetSnapshot,
    request: m.RolloutRequested | m.FreezeRequested,
    *,
    client: str,
    rollout_id: str,
    now: datetime,
    ahead: Iterable[Rollout] = (),
) -> Proposal:
    """Plan what is asked for.

    Args:
        client: who asks.
        rollout_id: of the rollout, if one is started.
        now: when it would be created.
        ahead: the rollouts that have not ended, of which it may have to wait for some.

    Raises:
        RequestRefused: the plan cannot be sent.
    """
    plan = make_plan(
        fleet,
        update=request.update if isinstance(request, m.RolloutRequested) else "",
        selection=request.selection,
        policy=request.policy,
        limits=request.limits,
        hold_s=request.hold_s if isinstance(request, m.FreezeRequested) else 0.0,
    )
    sets = sets_of(plan)
    reason = "; ".join(f"{each.subject}: {each.reason}" for each in plan.refusals)
    codes = tuple(dict.fromkeys(each.code for each in plan.refusals))
    if not reason and (reason := most_targets(plan)):
        codes = ("too_large",)
    if reason or request.plan_only or not plan.waves:
        note = nothing_to_do(plan)
        if note and not reason:
            codes = ("nothing_to_do",)
        answer = with_plan(request.request, plan, reason, codes, note=note)
        return Proposal(sets=sets, answer=answer, rollout=None)
    rollout = new_rollout(
        rollout_id,
        plan,
        policy=request.policy,
        fence_hosts=tuple(sorted(fleet.hosts_of(sets))),
        requested_by=client,
        now=now,
    )
    largest = max(largest_states(rollout), key=size_bytes)
    return Proposal(
        sets=sets,
        answer=with_plan(request.request, plan, "", (), rollout=rollout.id),
        rollout=rollout,
        too_large=_too_large(largest, rollout) if size_bytes(largest) > MAX_PAYLOAD_BYTES else "",
        largest_events={
            each.id: largest_events(each)
            for each in (rollout, *ahead)
            if each is rollout or not {*sets}.isdisjoint(each.sets)
        }
        if request.queue
        else {},
    )


def _too_large(message: Message, rollout: Rollout) -> str:
    """Why a rollout cannot be announced, derived from the message that would be too large."""
    size = f"{size_bytes(message)} bytes of {MAX_PAYLOAD_BYTES}"
    match message:
        case m.WaveState():
            return (
                f"wave {message.wave + 1} with {len(message.vms)} VMs is too large to be announced ({size}): allow fewer hosts in "
                "a wave (--max-hosts), or select fewer sets at a time"
            )
        case m.SetDocument():
            vms = sum(len(each.resources) for each in message.events)
            return (
                f"set {message.set} has {vms} VMs on {len(message.events)} hosts in one wave, too many for its document ({size}): "
                "allow fewer hosts in a wave (--max-hosts), or put its VMs in more sets or domains"
            )
        case _:
            return (
                f"a rollout over {len(rollout.sets)} sets in {len(rollout.waves)} waves is too large to be announced ({size}): select "
                "fewer sets at a time"
            )
