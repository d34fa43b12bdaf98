"""Scheduled events: the document of a set, its changes, and approvals."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from msgspec import Meta

from caesura.contract.envelope import Instant, Message
from caesura.contract.messages.fields import (
    INTEGER_MOST,
    Count,
    EventStatus,
    EventType,
    Id,
    OptionalId,
    OptionalName,
    Record,
    Seconds,
    Text,
)
from caesura.contract.names import Name
from caesura.contract.reasons import Code


class ScheduledEvent(Record, frozen=True, kw_only=True):
    """One scheduled event of a set, open (scheduled or started)."""

    event_id: Id
    event_type: EventType
    status: Literal["scheduled", "started"]
    resources: tuple[Name, ...]
    host: OptionalName = ""
    """The host of its resources. Empty: an event of version 0.1.0, whose resources may be on several hosts."""
    not_before: Instant
    description: Text = ""
    source: Literal["Platform", "User"] = "Platform"
    duration_s: Annotated[int, Meta(ge=-1, le=INTEGER_MOST)] = -1
    """Expected seconds of interruption; 0 none, -1 unknown."""
    approved: bool = False
    rollout: OptionalId = ""
    wave: Count = 0


class SetDocument(Message, frozen=True, kw_only=True):
    """The document of a set: its open events and the incarnation, which rises with every change that a workload sees. Retained."""

    TYPE: ClassVar[str] = "caesura.set.document.v1"

    set: Name
    incarnation: Count
    revision: Count = 0
    """Rises with every change that only services see, such as a host's part in an event; starts at 0 with each incarnation. Of two documents,
    the one with the higher incarnation, then revision, is newer."""
    events: tuple[ScheduledEvent, ...]


class EventChanged(Message, frozen=True, kw_only=True):
    """A scheduled event reached a status, or is `scheduled` again with a later NotBefore. Every event reaches exactly one of completed,
    cancelled, failed."""

    TYPE: ClassVar[str] = "caesura.event.changed.v1"

    event_id: Id
    set: Name
    event_type: EventType
    status: EventStatus
    resources: tuple[Name, ...]
    host: OptionalName = ""
    """As in the document."""
    incarnation: Count
    rollout: OptionalId = ""
    wave: Count = 0
    not_before: Instant
    approved_by: OptionalName = ""
    reason: Text = ""
    codes: tuple[Code, ...] = ()
    notice_s: Seconds = 0.0
    """Seconds between publication and NotBefore."""
    approval_delay_s: Seconds | None = None
    """Seconds from publication to approval, when it was approved."""
    at: Instant


class EventApproved(Message, frozen=True, kw_only=True):
    """A workload approved an event through the HTTP API; one approval covers all its resources."""

    TYPE: ClassVar[str] = "caesura.event.approved.v1"

    event_id: Id
    set: Name
    vm: Name
    at: Instant


class VmApproved(EventApproved, frozen=True, kw_only=True):
    """The same, on a topic that names the VM, so that the broker's access rules can limit for which VMs a publisher may approve."""

    TYPE: ClassVar[str] = "caesura.vm.approved.v1"


class PublisherPresence(Message, frozen=True, kw_only=True):
    """Whether a metadata publisher is on the bus."""

    TYPE: ClassVar[str] = "caesura.publisher.presence.v1"

    instance: Name
    online: bool
