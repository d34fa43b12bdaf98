"""What services would say on the bus about a rehearsal's events and pauses. Pure.

The documents and the approvals are on the bus anyway; these are the facts that the coordinator and the host updater publish beside them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from datetime import datetime

import msgspec

from caesura.contract.messages import (
    EventChanged,
    EventStatus,
    ScheduledEvent,
    SetDocument,
    VmFrozen,
    VmResumed,
)
from caesura_rehearse.results.observations import EventRecord

BUDGET_S = 30.0
"""Of every pause of a rehearsal: the longest that there is."""

Fact = EventChanged | VmFrozen | VmResumed


class Place(msgspec.Struct, frozen=True, kw_only=True):
    """Where a VM is, and whether something runs on it that can be paused."""

    set: str
    update_domain: int
    pausable: bool


class FactLog:
    """Which facts were published already.

    Args:
        host: the host of all VMs.
        to_wall: the wall-clock time of an instant of the rehearsal.
    """

    def __init__(self, host: str, to_wall: Callable[[float], datetime]) -> None:
        self._host = host
        self._to_wall = to_wall
        self._events: dict[str, tuple[ScheduledEvent, int]] = {}
        """As last seen in a document, with its incarnation."""
        self._incarnations: dict[str, int] = {}
        self._published: set[tuple[object, ...]] = set()

    def document(self, document: SetDocument) -> None:
        """A document was published."""
        self._incarnations[document.set] = document.incarnation
        for event in document.events:
            self._events[event.event_id.lower()] = event, document.incarnation

    def pending(self, records: Iterable[EventRecord], places: Mapping[str, Place]) -> list[Fact]:
        """The facts that were not published yet, in their order; from now on they count as published."""
        found: list[Fact] = []
        for record in records:
            known = self._events.get(record.event_id.lower())
            if known is None:
                continue
            event = known[0]
            if record.notice_s > 0:
                found += self._changed(record, event, "scheduled", record.announced)
            if record.started is not None:
                found += self._changed(record, event, "started", record.started)
            found += self._pauses(record, places)
            if record.outcome and record.ended is not None:
                found += self._changed(record, event, record.outcome, record.ended)
        return found

    def _first(self, *what: object) -> bool:
        if what in self._published:
            return False
        self._published.add(what)
        return True

    def _changed(
        self, record: EventRecord, event: ScheduledEvent, status: EventStatus, at: float
    ) -> list[EventChanged]:
        if not self._first(record.event_id, status):
            return []
        delay_s = None if record.approved is None else record.approved - record.announced
        return [
            EventChanged(
                event_id=record.event_id,
                set=record.set,
                event_type=event.event_type,
                status=status,
                resources=event.resources,
                host=event.host,
                incarnation=self._incarnations[record.set],
                not_before=event.not_before,
                approved_by=record.approved_by if record.approved_by in record.vms else "",
                reason=record.why if status == "failed" else "",
                notice_s=record.notice_s,
                approval_delay_s=delay_s,
                at=self._to_wall(at),
            )
        ]

    def _pauses(self, record: EventRecord, places: Mapping[str, Place]) -> list[Fact]:
        found: list[Fact] = []
        paused = [vm for vm in record.vms if vm in places and places[vm].pausable]
        if record.paused is not None and not record.gaps:
            found += [
                fact for vm in paused for fact in self._frozen(record, vm, 0, record.paused, places[vm])
            ]
        counts: dict[str, int] = {}
        for gap in record.gaps:
            number = counts[gap.vm] = counts.get(gap.vm, 0) + 1
            place = places[gap.vm]
            found += self._frozen(record, gap.vm, number - 1, gap.began, place)
            if self._first(record.event_id, gap.vm, "resumed", number):
                found.append(
                    VmResumed(
                        vm=gap.vm,
                        host=self._host,
                        set=place.set,
                        update_domain=place.update_domain,
                        operation=record.event_id,
                        event_id=record.event_id,
                        method="freeze",
                        pause_s=gap.seconds,
                        budget_s=BUDGET_S,
                        within_budget=gap.seconds <= BUDGET_S,
                        resumed_by="updater" if gap.resumed_by == "rehearse" else "guard",
                        at=self._to_wall(gap.began + gap.seconds),
                    )
                )
        return found

    def _frozen(self, record: EventRecord, vm: str, number: int, at: float, place: Place) -> list[VmFrozen]:
        if not self._first(record.event_id, vm, "frozen", number):
            return []
        return [
            VmFrozen(
                vm=vm,
                host=self._host,
                set=place.set,
                update_domain=place.update_domain,
                operation=record.event_id,
                event_id=record.event_id,
                method="freeze",
                budget_s=BUDGET_S,
                at=self._to_wall(at),
            )
        ]
