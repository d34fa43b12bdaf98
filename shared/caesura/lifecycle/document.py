"""The document of a set: which events are open, and an incarnation that strictly rises with every change that a workload sees.

A change that only services see, the approval of an event, raises the revision within the incarnation.

Events that change together change the document once: a wave has an event for each of its hosts, and workloads see all of them
scheduled, started or ended at one incarnation.

Events only ever go scheduled → started → ended (removed), or scheduled → ended; completed and cancelled
look the same in the document, as in Azure's. Source: Azure Scheduled Events, "Scheduled Events API".
"""

from __future__ import annotations

from datetime import datetime

import msgspec

from caesura.contract.messages import ScheduledEvent, SetDocument
from caesura.lifecycle.errors import IllegalStatusChange


def nothing_yet(set_name: str) -> SetDocument:
    """The version of a document that was never published: below every published one."""
    return SetDocument(set=set_name, incarnation=0, events=())


def first_document(set_name: str) -> SetDocument:
    """The document of a set before its first event."""
    return SetDocument(set=set_name, incarnation=1, events=())


def version_of(document: SetDocument) -> tuple[int, int]:
    """The order of the documents of one set: the higher one is newer."""
    return document.incarnation, document.revision


def find_event(document: SetDocument, event_id: str) -> ScheduledEvent | None:
    """The open event with this id, compared case-insensitively, since ids are GUIDs; None if there is none (any more)."""
    return _by_id(document).get(event_id.lower())


def schedule(document: SetDocument, *events: ScheduledEvent) -> SetDocument:
    """Add scheduled events. Adding the same event again changes nothing.

    Raises:
        IllegalStatusChange: the id is taken by a different event.
    """
    known = _by_id(document)
    new = []
    for event in events:
        existing = known.get(event.event_id.lower())
        if existing is None:
            new.append(event)
        elif existing != event:
            raise IllegalStatusChange(f"event {event.event_id}", existing.status, event.status)
    return _changed(document, (*document.events, *new)) if new else document


def postpone(document: SetDocument, not_before: datetime, *event_ids: str) -> SetDocument:
    """Move NotBefore of scheduled events later; an earlier instant, and an event that is not scheduled, change nothing.

    Workloads may rely on it that an event does not start before the NotBefore that they have seen.
    """
    moving = {each.lower() for each in event_ids}
    events = tuple(
        msgspec.structs.replace(each, not_before=not_before)
        if each.event_id.lower() in moving and each.status == "scheduled" and each.not_before < not_before
        else each
        for each in document.events
    )
    return _changed(document, events) if events != document.events else document


def approve(document: SetDocument, event_id: str) -> SetDocument:
    """Mark a scheduled event approved. Approving it again, a started or an ended one changes nothing.

    Azure's document has no member for it, so for workloads it stays the same.
    """
    event = find_event(document, event_id)
    if event is None or event.approved or event.status == "started":
        return document
    approved = _events_with(document, msgspec.structs.replace(event, approved=True))
    return msgspec.structs.replace(document, revision=document.revision + 1, events=approved)


def start(document: SetDocument, *event_ids: str) -> SetDocument:
    """Scheduled to started. Starting a started event changes nothing.

    Raises:
        IllegalStatusChange: an event is not open, or no longer.
    """
    known = _by_id(document)
    for event_id in event_ids:
        if event_id.lower() not in known:
            raise IllegalStatusChange(f"event {event_id}", "ended or unknown", "started")
    starting = {each.lower() for each in event_ids}
    events = tuple(
        msgspec.structs.replace(each, status="started")
        if each.status == "scheduled" and each.event_id.lower() in starting
        else each
        for each in document.events
    )
    return _changed(document, events) if events != document.events else document


def end(document: SetDocument, *event_ids: str) -> SetDocument:
    """Remove events. Ending one that is not open changes nothing."""
    ending = {each.lower() for each in event_ids}
    events = tuple(each for each in document.events if each.event_id.lower() not in ending)
    return _changed(document, events) if len(events) < len(document.events) else document


def adopt(document: SetDocument, published: SetDocument) -> SetDocument:
    """Never fall behind what subscribers have seen: adopt a published document if it is newer.

    For a coordinator that lost its store, or was restored from an old backup of it.
    """
    return published if version_of(published) > version_of(document) else document


def above(document: SetDocument, published: SetDocument) -> SetDocument:
    """The document with an incarnation above that of a published one that says something else.

    For a coordinator that leads and receives what another has published: subscribers that accepted the other's
    document only accept ours when it is higher. Where workloads see no difference, only the revision rises.
    """
    if version_of(document) > version_of(published):
        return document
    if _shown(document) == _shown(published):
        return msgspec.structs.replace(published, revision=published.revision + 1, events=document.events)
    return SetDocument(set=document.set, incarnation=published.incarnation + 1, events=document.events)


def _shown(document: SetDocument) -> tuple[ScheduledEvent, ...]:
    """The events without what only services see."""
    return tuple(
        msgspec.structs.replace(each, host="", approved=False, rollout="", wave=0) for each in document.events
    )


def _by_id(document: SetDocument) -> dict[str, ScheduledEvent]:
    return {each.event_id.lower(): each for each in document.events}


def _events_with(document: SetDocument, event: ScheduledEvent) -> tuple[ScheduledEvent, ...]:
    return tuple(event if each.event_id == event.event_id else each for each in document.events)


def _changed(document: SetDocument, events: tuple[ScheduledEvent, ...]) -> SetDocument:
    return SetDocument(set=document.set, incarnation=document.incarnation + 1, events=events)
