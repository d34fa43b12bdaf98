"""The next action when one rollout follows another: roll, watch, resume, or wait. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import msgspec

from caesura_demo.halts import is_transient

RESUME_AFTER_S = (10.0, 60.0, 180.0)
"""s from a halt to its resume, for the first, the second and the third time that a wave halts. A host that hangs
counts as online until the broker has not received anything from it for 90 s: the third delay is longer than that."""
MOST_RESUMES = len(RESUME_AFTER_S)
"""A wave that halts more often than this has a fault that does not resolve by itself."""


class HostFacts(msgspec.Struct, frozen=True):
    """A host as in ``caesura status --json``."""

    name: str
    online: bool
    guard: str


class HaltSnapshot(msgspec.Struct, frozen=True, kw_only=True):
    """The relevant part of ``caesura status --json``."""

    coordinator_online: bool
    hosts: tuple[HostFacts, ...]
    rollout: str = ""
    status: str = ""
    reason: str = ""
    codes: tuple[str, ...] = ()
    requested_by: str = ""
    waves_done: int = 0


class ResumeHistory(msgspec.Struct, frozen=True, kw_only=True):
    """Our earlier actions and observations."""

    resumed: int = 0
    """How often the halted wave has been resumed; a resume that was not accepted does not count."""
    halted_s: float = 0.0
    """Seconds since we first saw this halt."""
    found: str = ""
    """A rollout that was already aborted at our start: being started after the abort means to continue."""


class NextAction(msgspec.Struct, frozen=True):
    """The action, the rollout, and the reason; ``how`` is the command for a person."""

    what: Literal["wait", "roll", "watch", "resume", "leave"]
    rollout: str = ""
    why: str = ""
    how: str = ""


def facts_from(status: Mapping[str, Any]) -> HaltSnapshot:
    """The facts in the document of ``caesura status --json``."""
    coordinator = status.get("coordinator") or {}
    rollout = status.get("rollout") or {}
    return HaltSnapshot(
        coordinator_online=bool(coordinator.get("online", False)),
        hosts=tuple(
            HostFacts(each["inventory"]["host"], each["online"], each["inventory"].get("guard", "absent"))
            for each in status["hosts"]
        ),
        rollout=rollout.get("rollout", ""),
        status=rollout.get("status", ""),
        reason=rollout.get("reason", ""),
        codes=tuple(rollout.get("codes", ())),
        requested_by=rollout.get("requested_by", ""),
        waves_done=sum(wave["status"] == "completed" for wave in rollout.get("waves", ())),
    )


def next_action(facts: HaltSnapshot, *, client: str, hosts: Sequence[str], past: ResumeHistory) -> NextAction:
    """The next action of an operator.

    Args:
        client: the name under which we send requests: rollouts of other clients are left to them.
        hosts: every expected host.
        past: our earlier actions.
    """
    if facts.status in {"running", "aborting"}:
        return NextAction("watch", facts.rollout)
    missing = _missing(facts, hosts)
    if facts.status == "halted":
        return _halted(facts, client, missing, past)
    if facts.status == "aborted" and facts.rollout != past.found:
        why = f"{facts.reason or 'aborted'}; nothing is rolled out until you say so"
        return NextAction("leave", facts.rollout, why, "docker compose restart rollout")
    return NextAction("wait", why=missing) if missing else NextAction("roll")


def _halted(facts: HaltSnapshot, client: str, missing: str, past: ResumeHistory) -> NextAction:
    why = f"halted: {facts.reason or 'no reason given'}"
    theirs = ""
    if facts.requested_by != client:
        theirs = f"{facts.requested_by or 'somebody else'} started it"
    elif not is_transient(facts.codes):
        theirs = "that is for a person to judge"
    elif past.resumed >= MOST_RESUMES:
        theirs = f"resumed {past.resumed} times already"
    if theirs:
        how = f"docker compose run --rm caesura resume {facts.rollout}   (or abort)"
        return NextAction("leave", facts.rollout, f"{why}; {theirs}", how)
    if missing:
        return NextAction(
            "wait", facts.rollout, f"{why}; resumed when everything is available again: {missing}"
        )
    after_s = RESUME_AFTER_S[past.resumed]
    if past.halted_s < after_s:
        return NextAction("wait", facts.rollout, f"{why}; resumed {after_s:g} s after it halted")
    return NextAction("resume", facts.rollout, why)


def _missing(facts: HaltSnapshot, hosts: Sequence[str]) -> str:
    there = {each.name for each in facts.hosts}
    wrong = [] if facts.coordinator_online else ["the coordinator is not on the bus"]
    wrong += [f"{name} was never on the bus" for name in hosts if name not in there]
    wrong += [f"{each.name} is offline" for each in facts.hosts if not each.online]
    wrong += [
        f"{each.name} has no pause guard" for each in facts.hosts if each.online and each.guard == "absent"
    ]
    return ", ".join(wrong)


def update_for(updates: Sequence[str], count: int) -> str:
    """The update of the rollout number ``count``, in turn."""
    return updates[count % len(updates)]
