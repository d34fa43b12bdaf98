"""What to do next where one rollout follows another: roll, watch, resume, or wait. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import msgspec

MOST_RESUMES = 3
"""A rollout that halts more often than this has a fault that does not go away by itself."""


class HostFacts(msgspec.Struct, frozen=True):
    """A host as ``caesura status --json`` shows it."""

    name: str
    online: bool
    guard: str


class Facts(msgspec.Struct, frozen=True, kw_only=True):
    """What ``caesura status --json`` says, as far as it matters here."""

    coordinator_online: bool
    hosts: tuple[HostFacts, ...]
    rollout: str = ""
    status: str = ""
    reason: str = ""
    requested_by: str = ""


class Step(msgspec.Struct, frozen=True):
    """What to do, about which rollout, and why."""

    what: Literal["wait", "roll", "watch", "resume", "leave"]
    rollout: str = ""
    why: str = ""


def facts_from(status: Mapping[str, Any]) -> Facts:
    """The facts in the document of ``caesura status --json``."""
    coordinator = status.get("coordinator") or {}
    rollout = status.get("rollout") or {}
    return Facts(
        coordinator_online=bool(coordinator.get("online", False)),
        hosts=tuple(
            HostFacts(each["inventory"]["host"], each["online"], each["inventory"].get("guard", "absent"))
            for each in status["hosts"]
        ),
        rollout=rollout.get("rollout", ""),
        status=rollout.get("status", ""),
        reason=rollout.get("reason", ""),
        requested_by=rollout.get("requested_by", ""),
    )


def next_step(facts: Facts, *, client: str, resumed: int) -> Step:
    """What an operator would do now.

    Args:
        client: under which name we ask: what somebody else started is theirs to go on with.
        resumed: how often this halted rollout was resumed already.
    """
    if facts.status in {"running", "aborting"}:
        return Step("watch", facts.rollout)
    missing = _missing(facts)
    if facts.status == "halted":
        why = f"halted: {facts.reason or 'no reason given'}"
        if facts.requested_by != client:
            return Step("leave", facts.rollout, f"{why}; {facts.requested_by or 'somebody else'} started it")
        if resumed >= MOST_RESUMES:
            return Step("leave", facts.rollout, f"{why}; resumed {resumed} times already")
        if missing:
            return Step("wait", facts.rollout, f"{why}; resumed when all is there again: {missing}")
        return Step("resume", facts.rollout, why)
    return Step("wait", why=missing) if missing else Step("roll")


def _missing(facts: Facts) -> str:
    wrong = [] if facts.coordinator_online else ["the coordinator is not on the bus"]
    wrong += [f"{each.name} is offline" for each in facts.hosts if not each.online]
    wrong += [
        f"{each.name} has no pause guard" for each in facts.hosts if each.online and each.guard == "absent"
    ]
    if not facts.hosts:
        wrong.append("no host is on the bus")
    return ", ".join(wrong)


def update_for(updates: Sequence[str], count: int) -> str:
    """The update of the rollout number ``count``, in turn."""
    return updates[count % len(updates)]
