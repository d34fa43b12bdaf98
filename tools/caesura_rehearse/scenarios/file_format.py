"""Scenario files as people write them, and their JSON schema for editors. Pure."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from caesura.contract.messages import EventType
from caesura_rehearse.simulation.members import MOST_UPDATE_DOMAINS, MOST_VMS, UPDATE_DOMAINS

Time = Annotated[float | str, Meta(description="Seconds, or a text such as 9s, 1m30s, 15m or 2h.")]


class SetTable(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An availability set. Its VMs are NAME-1, NAME-2 and so on; those of the same update domain of several sets share a host."""

    name: Annotated[str, Meta(pattern="^[A-Za-z0-9-][A-Za-z0-9_-]{0,59}$")]
    vms: Annotated[int, Meta(ge=1, le=MOST_VMS)] = 1
    update_domains: Annotated[int, Meta(ge=1, le=MOST_UPDATE_DOMAINS)] = UPDATE_DOMAINS
    """How many there are; VMs are assigned to them round robin."""


class PauseTable(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One more pause while the event is Started."""

    after: Time
    """From the end of the pause before it."""
    duration: Time


class StepTable(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What happens: exactly one of event, cancel, approve, move, fault and no_faults."""

    at: Time | None = None
    """Since the beginning. An event without it follows when those before it are over, any other step at once."""
    event: EventType | None = None
    """Announces an event. Without vms and sets: for all, one update domain after the other."""
    name: Annotated[str, Meta(min_length=1, max_length=63)] | None = None
    """By which other steps know the event."""
    notice: Time | None = None
    """Until NotBefore; by default the real one's least. 0s: none, the event appears as Started."""
    duration: Time | None = None
    """Of a Freeze's pause, at most 27s; 0s: nothing pauses. By default 9s."""
    pauses: tuple[PauseTable, ...] = ()
    """Of a Freeze, after the first."""
    vms: tuple[str, ...] = ()
    sets: tuple[str, ...] = ()
    source: Literal["Platform", "User"] | None = None
    description: Annotated[str, Meta(max_length=4096)] | None = None
    shown_duration: Annotated[int, Meta(ge=-1, le=86400)] | None = None
    """DurationInSeconds; by default the pause of a Freeze, -1 for the others."""
    checks: Time | None = None
    """How long it is shown as Started after the impact; by default 2s."""
    grace: Time | None = None
    """Between SIGTERM and SIGKILL; by default 10s."""
    soak: Time | None = None
    """From the end of one update domain's events to the announcement of the next one's; by default 0s."""
    approval_starts: bool | None = None
    """Whether an approval starts it at once. False: it waits for NotBefore, or for a step that cancels it."""
    cancel: str | None = None
    """Takes back the event of this name."""
    approve: str | None = None
    """Approves the event of this name in the place of the programs."""
    by: str | None = None
    """Of approve: the VM whose client it is said to be."""
    move: str | None = None
    """Moves the NotBefore of the event of this name."""
    later: Time | None = None
    earlier: Time | None = None
    after: Time | None = None
    """Of cancel, approve and move: since the announcement of the event."""
    fault: str | None = None
    """What requests for the document, or the events announced next, meet from now on; as --fault."""
    no_faults: Literal[True] | None = None
    """The end of all faults."""


class ScenarioTable(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A scenario file."""

    title: Annotated[str, Meta(min_length=1, max_length=120)]
    set: Annotated[tuple[SetTable, ...], Meta(max_length=MOST_VMS)] = ()
    """Without any: the VMs of the command line."""
    expect: tuple[str, ...] = ()
    """What must hold, as --expect."""
    fault: tuple[str, ...] = ()
    """Faults from the beginning on, as --fault."""
    step: Annotated[tuple[StepTable, ...], Meta(min_length=1, max_length=1000)]
    """In the order of time."""


KINDS = ("event", "cancel", "approve", "move", "fault", "no_faults")
_OF_EVENT = (
    "at", "name", "notice", "duration", "pauses", "vms", "sets", "source", "description", "shown_duration",
    "checks", "grace", "soak", "approval_starts",
)  # fmt: skip
KEYS: dict[str, tuple[str, ...]] = {
    "event": _OF_EVENT,
    "cancel": ("after",),
    "approve": ("after", "by"),
    "move": ("after", "later", "earlier"),
    "fault": ("at",),
    "no_faults": ("at",),
}
"""Which keys say something in which step."""


def schema() -> dict[str, Any]:
    """The JSON schema of scenario files."""
    (top,), parts = msgspec.json.schema_components((ScenarioTable,), ref_template="#/$defs/{name}")
    parts["StepTable"]["oneOf"] = [{"required": [kind]} for kind in KINDS]
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "A scenario of caesura rehearse",
        **top,
        "$defs": parts,
    }


def schema_text() -> str:
    """The file ``scenario.schema.json``."""
    return msgspec.json.format(msgspec.json.encode(schema()), indent=1).decode() + "\n"


if __name__ == "__main__":
    print(schema_text(), end="")  # noqa: T201 - what it is for
