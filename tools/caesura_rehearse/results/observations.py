"""What the clients of a rehearsal asked for and got, and what became of each event. Pure.

Instants are seconds since the rehearsal began, on a monotonic clock.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from caesura.contract.messages import EventType

Outcome = Literal["", "completed", "cancelled", "failed"]
"""Empty while it is open."""


class SeenEvent(msgspec.Struct, frozen=True):
    """An event as a delivered document showed it."""

    event_id: str = msgspec.field(name="EventId")
    status: str = msgspec.field(name="EventStatus")
    not_before: str = msgspec.field(name="NotBefore", default="")


class SeenDocument(msgspec.Struct, frozen=True):
    """The body of a 200."""

    incarnation: int = msgspec.field(name="DocumentIncarnation")
    events: tuple[SeenEvent, ...] = msgspec.field(name="Events")


class DocumentDelivery(msgspec.Struct, frozen=True, kw_only=True):
    """A document that a client of the VM got for the first time; the same one again is only counted."""

    at: float
    vm: str
    incarnation: int
    events: tuple[SeenEvent, ...]


class Approval(msgspec.Struct, frozen=True, kw_only=True):
    """A POST with a StartRequest that was accepted."""

    at: float
    vm: str
    event_id: str


class RefusedRequest(msgspec.Struct, frozen=True, kw_only=True):
    """A request that was not answered with success, and why."""

    at: float
    vm: str
    method: str
    path: str
    status: int
    why: str = ""


class Gap(msgspec.Struct, frozen=True, kw_only=True):
    """One VM's pause as the kernel reports it."""

    vm: str
    began: float
    seconds: float
    """From the instant at which all its processes were reported as stopped to the one at which all were reported as running."""
    cpu_s: float
    """CPU time that the kernel charged to its processes in between."""
    resumed_by: Literal["rehearse", "guard", "somebody else"] = "rehearse"


class EventRecord(msgspec.Struct, kw_only=True):
    """One ordered event, from its announcement to its end."""

    event_id: str
    event: EventType
    set: str
    vms: tuple[str, ...]
    notice_s: float
    duration_s: float
    """Of the first pause."""
    announced: float
    impact_s: float = 0.0
    """Seconds from the beginning of the first pause to the end of the last one."""
    not_before: float = 0.0
    """When it starts at the latest."""
    rollout: str = ""
    """The rollout that it is a part of."""
    first_seen: float | None = None
    """When a client first got a document that has it."""
    seen_by: dict[str, float] = {}
    """The same for each VM's clients: all VMs of the set see it."""
    approved: float | None = None
    approved_by: str = ""
    """The VM whose client approved it, or is said to have; ``rehearse`` or ``neighbour`` for an approval by order or by a fault."""
    approved_by_order: bool = False
    """Whether that was an order or a fault: no client of the rehearsal had approved it."""
    started: float | None = None
    seen_started: float | None = None
    paused: float | None = None
    """When everything that it pauses was stopped."""
    resumed: float | None = None
    """When all of that ran again."""
    gaps: list[Gap] = []
    ended: float | None = None
    outcome: Outcome = ""
    why: str = ""
    """Why it failed."""


class RolloutRecord(msgspec.Struct, kw_only=True):
    """An order for one update domain after the other, from its first announcement to the end of its last event."""

    rollout_id: str
    event: EventType
    waves: tuple[tuple[str, ...], ...]
    """The VMs of each wave, in order."""
    began: float
    waves_begun: int = 0
    """How many of them were announced."""
    event_ids: list[str] = []
    """Of the events that were announced so far."""
    ended: float | None = None
    outcome: Outcome = ""
    why: str = ""
    """Why it halted."""


class StepRecord(msgspec.Struct, kw_only=True):
    """A step of a scenario."""

    line: int
    what: str
    at: float | None = None
    """When it was carried out; None: never."""
    why: str = ""
    """Why it could not be."""


class ScenarioRecord(msgspec.Struct, kw_only=True):
    """A scenario that is played."""

    file: str
    title: str
    steps: list[StepRecord]


class ProgramRecord(msgspec.Struct, kw_only=True):
    """What became of a VM's program."""

    vm: str
    what: str
    starts: int = 0
    exit_code: int | None = None
    """Of the program's own process; negative: the signal that ended it. None: it runs."""
    exited: float | None = None
    """When it ended by itself; None: it did not."""
    left: tuple[str, ...] = ()
    """Processes that were in the background when it had ended; they were ended with it."""
    terminal_taken: bool = False
    """Whether the rehearsal had a terminal that the program did not get."""


class Observations:
    """Everything that was seen so far."""

    def __init__(self) -> None:
        self.rollouts: dict[str, RolloutRecord] = {}
        self.events: dict[str, EventRecord] = {}
        self.deliveries: list[DocumentDelivery] = []
        self.approvals: list[Approval] = []
        self.refusals: list[RefusedRequest] = []
        self.polls: dict[str, int] = {}
        """Requests for the document, by VM."""
        self._last: dict[str, SeenDocument] = {}

    def delivered(self, vm: str, body: bytes, at: float) -> None:
        """A client of ``vm`` got a document."""
        document = msgspec.json.decode(body, type=SeenDocument)
        if self._last.get(vm) == document:
            return
        self._last[vm] = document
        self.deliveries.append(
            DocumentDelivery(at=at, vm=vm, incarnation=document.incarnation, events=document.events)
        )
        for seen in document.events:
            record = self.events.get(seen.event_id.lower())
            if record is None:
                continue
            if record.first_seen is None:
                record.first_seen = at
            record.seen_by.setdefault(vm, at)
            if record.seen_started is None and seen.status == "Started":
                record.seen_started = at


def describe_exit(code: int | None) -> str:
    """How a program ended, for people."""
    if code is None:
        return "exit code unknown"
    if code < 0:
        return f"ended by signal {-code}"
    return f"exit code {code}"
