"""A set's document on the wire: JSON per api-version, ETag. Pure.

Wire facts: scheduled-events.md of azure-compute-docs. ``NotBefore`` is RFC 1123 in GMT while Scheduled and an
empty string once Started; numbers are numbers; there is no Completed or Canceled, an event just vanishes.
"""

from __future__ import annotations

from datetime import UTC
from email.utils import format_datetime

import msgspec

from caesura.contract.messages import ScheduledEvent, SetDocument
from caesura_metadata_publisher.api_versions import EventsVersion


def wire_document(document: SetDocument, version: EventsVersion) -> bytes:
    """The body of GET /metadata/scheduledevents: every open event of the whole set."""
    events = [
        {name: value for name, value in _members(event, version).items() if name in version.members}
        for event in document.events
        if event.event_type in version.types
    ]
    return msgspec.json.encode({"DocumentIncarnation": document.incarnation, "Events": events})


def _members(event: ScheduledEvent, version: EventsVersion) -> dict[str, object]:
    scheduled = event.status == "scheduled"
    # Fractions of a second are cut off: the event never starts before the instant that is shown.
    not_before = format_datetime(event.not_before.astimezone(UTC), usegmt=True) if scheduled else ""
    return {
        "EventId": event.event_id,
        "EventStatus": "Scheduled" if scheduled else "Started",
        "EventType": event.event_type,
        "ResourceType": "VirtualMachine",
        "Resources": [version.name_prefix + vm for vm in event.resources],
        "NotBefore": not_before,
        "Description": event.description,
        "EventSource": event.source,
        "DurationInSeconds": event.duration_s,
    }


def entity_tag(document: SetDocument) -> str:
    """The incarnation, quoted: same tag, same events."""
    return f'"{document.incarnation}"'


def unchanged(if_none_match: str, etag: str) -> bool:
    """Whether a GET with this If-None-Match gets 304 (RFC 9110 section 13.1.2, weak comparison).

    Without quotes, too: a client may send the DocumentIncarnation, which "is an ETag" as older documents say.
    """
    tags = [tag.strip() for tag in if_none_match.split(",")]
    return "*" in tags or etag.strip('"') in {tag.removeprefix("W/").strip('"') for tag in tags}


def awaits_approval(event: ScheduledEvent | None) -> bool:
    """Whether an approval would still change anything."""
    return event is not None and event.status == "scheduled" and not event.approved
