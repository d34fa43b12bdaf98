"""The documents of the sets, as the coordinator publishes them: retained on the bus, each version newer than the one before."""

from __future__ import annotations

import msgspec

from caesura.bus.messaging import MessageClient
from caesura.contract.messages import ScheduledEvent, SetDocument
from caesura.lifecycle import document as documents

GAP = 3
"""Incarnations that a fault skips. A real client's log has 1, 2, 4: Azure/vm-scheduled-events, README.md."""


class SetDocuments:
    """The newest version of each set's document.

    Args:
        post: where they are published.
    """

    def __init__(self, post: MessageClient) -> None:
        self._post = post
        self._newest: dict[str, SetDocument] = {}

    async def ensure(self, set_name: str) -> None:
        """Publish the set's first document, if it has none."""
        if set_name not in self._newest:
            await self._publish(documents.first_document(set_name))

    async def schedule(self, set_name: str, event: ScheduledEvent, *, gap: bool = False) -> None:
        """Add an event.

        Args:
            gap: skips incarnations with this change; also below.
        """
        await self._change(documents.schedule(self._newest[set_name], event), gap=gap)

    async def approve(self, set_name: str, event_id: str) -> None:
        """Mark a scheduled event approved."""
        await self._change(documents.approve(self._newest[set_name], event_id))

    async def start(self, set_name: str, event: ScheduledEvent, *, gap: bool = False) -> None:
        """From scheduled to started; an event that has vanished comes back."""
        current = self._newest[set_name]
        if documents.find_event(current, event.event_id) is None:
            started = msgspec.structs.replace(event, status="started")
            await self._change(documents.schedule(current, started), gap=gap)
        else:
            await self._change(documents.start(current, event.event_id), gap=gap)

    async def move(self, set_name: str, event: ScheduledEvent) -> None:
        """Give an open event another NotBefore."""
        current = self._newest[set_name]
        events = tuple(
            msgspec.structs.replace(each, not_before=event.not_before)
            if each.event_id == event.event_id
            else each
            for each in current.events
        )
        await self._change(
            msgspec.structs.replace(current, incarnation=current.incarnation + 1, revision=0, events=events)
        )

    async def end(self, set_name: str, event_id: str, *, gap: bool = False) -> None:
        """Remove an event."""
        await self._change(documents.end(self._newest[set_name], event_id), gap=gap)

    async def _change(self, document: SetDocument, *, gap: bool = False) -> None:
        if gap and document.incarnation > self._newest[document.set].incarnation:
            document = msgspec.structs.replace(document, incarnation=document.incarnation + GAP)
        await self._publish(document)

    async def _publish(self, document: SetDocument) -> None:
        self._newest[document.set] = document
        await self._post.send(document, set=document.set)
