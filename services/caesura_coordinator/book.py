"""The coordinator's book: rollouts and documents in memory, each change stored with what announces it.

The shell around the pure machine: it applies effects to documents and puts facts into the outbox, all in one
transaction. It knows the store, no bus.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime

import structlog

from caesura.contract.messages import (
    EventChanged,
    EventStatus,
    RequestAnswered,
    ScheduledEvent,
    SetDocument,
    WaveChanged,
)
from caesura.lifecycle import document as documents
from caesura_coordinator.fleet import Fleet
from caesura_coordinator.records import Rollout, Wave, WaveEvent, rollout_state
from caesura_coordinator.rollout import (
    Authority,
    Effect,
    EventApprovedEffect,
    EventEnded,
    EventScheduled,
    EventStarted,
    Input,
    RolloutMoved,
    WaveMoved,
    after_restart,
    decide,
)
from caesura_coordinator.store import Store

_SHOWN = 50
"""How many rollouts stay on the bus as retained messages; the store keeps more."""

_log = structlog.get_logger("caesura.coordinator")

_DESCRIPTION = {
    "Freeze": "Host server is undergoing maintenance.",  # the wording of Azure for an in-place host update
    "Reboot": "Host server is undergoing maintenance that needs a reboot.",
}


class Book:
    """All rollouts and documents.

    Args:
        store: where they are kept; read whole at start.
        now: the time of the start, for the deadlines that passed while nobody was there.
    """

    def __init__(self, store: Store, now: datetime) -> None:
        self.store = store
        self.rollouts: dict[str, Rollout] = {each.id: after_restart(each, now) for each in store.rollouts()}
        self.documents: dict[str, SetDocument] = store.documents()

    @property
    def active(self) -> list[Rollout]:
        """Rollouts that hold their sets, oldest first."""
        return [each for each in self.rollouts.values() if each.active]

    def holder(self, sets: Iterable[str]) -> tuple[str, str] | None:
        """(set, rollout id) of the first of these sets that a rollout holds."""
        wanted = set(sets)
        for rollout in self.active:
            for name in rollout.sets:
                if name in wanted:
                    return name, rollout.id
        return None

    def add(self, rollout: Rollout) -> None:
        """Store a new rollout and announce it. Call inside a transaction with its answer."""
        self.store.save_rollout(rollout)
        self.store.enqueue(rollout_state(rollout), rollout=rollout.id)
        self.rollouts[rollout.id] = rollout

    def step(
        self, rollout: Rollout, received: Input, fleet: Fleet, authority: Authority, now: datetime
    ) -> Rollout:
        """One decision, stored and announced before it is believed.

        Raises:
            StoreError: nothing changed, in memory or on disk.
            IllegalTransition, NotYet: as ``decide``.
        """
        changed, effects = decide(rollout, received, fleet, authority, now)
        if changed == rollout and not effects:
            return rollout
        held = dict(self.documents)
        try:
            with self.store.transaction():
                self.store.save_rollout(changed)
                for effect in effects:
                    self._perform(changed, effect, now)
                if rollout_state(changed) != rollout_state(rollout):
                    self.store.enqueue(rollout_state(changed), rollout=changed.id)
        except BaseException:
            self.documents = held
            raise
        self.rollouts[changed.id] = changed
        for effect in effects:
            _report(changed, effect)
        return changed

    def adopt(self, published: SetDocument, now: datetime) -> None:
        """Take up a document that is ahead of ours (our store is older than the bus), and end what nobody owns."""
        ours = self.documents.get(published.set, documents.nothing_yet(published.set))
        if documents.adopt(ours, published) is ours:
            return
        owned = {
            event.event_id
            for rollout in self.active
            for wave in rollout.waves
            for event in wave.events
            if event.status in {"scheduled", "started"}
        }
        document = published
        with self.store.transaction():
            for event in published.events:
                if event.event_id in owned:
                    continue
                document = documents.end(document, event.event_id)
                self.store.enqueue(
                    EventChanged(
                        event_id=event.event_id,
                        set=published.set,
                        event_type=event.event_type,
                        status="failed" if event.status == "started" else "cancelled",
                        resources=event.resources,
                        incarnation=document.incarnation,
                        rollout=event.rollout,
                        wave=event.wave,
                        not_before=event.not_before,
                        reason="the coordinator that scheduled it has lost its record",
                        at=now,
                    ),
                    set=published.set,
                    status="failed" if event.status == "started" else "cancelled",
                )
            self.store.save_document(document)
            self.store.enqueue(document, set=document.set)
        self.documents[document.set] = document
        _log.warning("document.adopted", set=document.set, incarnation=document.incarnation)

    def open_sets(self, sets: Iterable[str]) -> bool:
        """Give every set its document, empty at first, so that workloads can poll before anything happens.

        True when there was a new one.
        """
        fresh = sorted({*sets} - self.documents.keys())
        if fresh:
            with self.store.transaction():
                for name in fresh:
                    self._save(documents.first_document(name))
        return bool(fresh)

    def republish(self) -> list[str]:
        """Put every retained document and rollout into the outbox again; ids of rollouts to clear from the bus."""
        shown = list(self.rollouts.values())[-_SHOWN:]
        with self.store.transaction():
            for document in self.documents.values():
                self.store.enqueue(document, set=document.set)
            for rollout in shown:
                self.store.enqueue(rollout_state(rollout), rollout=rollout.id)
            forgotten = self.store.forget_old()
        for name in forgotten:
            self.rollouts.pop(name, None)
        return [*forgotten, *(each for each in self.rollouts if each not in {one.id for one in shown})]

    def remember_answer(self, client: str, answer: RequestAnswered) -> None:
        """Store an answer and announce it. Call inside a transaction with what the request changed."""
        if answer.request:
            self.store.save_answer(client, answer)
        self.store.enqueue(answer, client=client)

    def _perform(self, rollout: Rollout, effect: Effect, now: datetime) -> None:
        match effect:
            case EventScheduled(event=event):
                wave = _wave_of(rollout, event)
                document = documents.schedule(self._document(event), _scheduled_event(rollout, wave, event))
                self._save(document)
                self._announce(rollout, event, "scheduled", now)
            case EventApprovedEffect(event=event):
                self._save(documents.approve(self._document(event), event.event_id))
            case EventStarted(event=event):
                document = documents.start(self._document(event), event.event_id)
                self._save(document)
                self._announce(rollout, event, "started", now)
            case EventEnded(event=event, reason=reason):
                document = documents.end(self._document(event), event.event_id)
                self._save(document)
                self._announce(rollout, event, event.status, now, reason)
            case WaveMoved(wave=wave):
                self.store.enqueue(
                    WaveChanged(
                        rollout=rollout.id,
                        wave=wave.index,
                        status=wave.status,
                        domains=wave.domains,
                        hosts=wave.hosts,
                        reason=wave.reason,
                        at=now,
                    ),
                    rollout=rollout.id,
                    wave=wave.index,
                )
            case RolloutMoved():
                pass  # the rollout's retained state, enqueued by ``step``, says it

    def _document(self, event: WaveEvent) -> SetDocument:
        return self.documents.get(event.set, documents.first_document(event.set))

    def _save(self, document: SetDocument) -> None:
        if self.documents.get(document.set) == document:
            return
        self.store.save_document(document)
        self.store.enqueue(document, set=document.set)
        self.documents[document.set] = document

    def _announce(
        self, rollout: Rollout, event: WaveEvent, status: EventStatus, now: datetime, reason: str = ""
    ) -> None:
        wave = _wave_of(rollout, event)
        published = wave.published_at or now
        not_before = wave.not_before or now
        self.store.enqueue(
            EventChanged(
                event_id=event.event_id,
                set=event.set,
                event_type=rollout.event_type,
                status=status,
                resources=event.resources,
                incarnation=self._document(event).incarnation,
                rollout=rollout.id,
                wave=wave.index,
                not_before=not_before,
                approved_by=event.approved_by,
                reason=reason,
                notice_s=max(0.0, (not_before - published).total_seconds()),
                approval_delay_s=max(0.0, (event.approved_at - published).total_seconds())
                if event.approved_at
                else None,
                at=now,
            ),
            set=event.set,
            status=status,
        )


def _wave_of(rollout: Rollout, event: WaveEvent) -> Wave:
    return next(
        wave for wave in rollout.waves if any(each.event_id == event.event_id for each in wave.events)
    )


def _scheduled_event(rollout: Rollout, wave: Wave, event: WaveEvent) -> ScheduledEvent:
    if wave.not_before is None:
        raise AssertionError(f"wave {wave.index} of rollout {rollout.id} was scheduled without NotBefore")
    return ScheduledEvent(
        event_id=event.event_id,
        event_type=rollout.event_type,
        status="scheduled",
        resources=event.resources,
        not_before=wave.not_before,
        description=_DESCRIPTION[rollout.event_type],
        source="User" if rollout.hold_s else "Platform",
        duration_s=round(rollout.expected_pause_s) if rollout.event_type == "Freeze" else -1,
        rollout=rollout.id,
        wave=wave.index,
    )


def _report(rollout: Rollout, effect: Effect) -> None:
    match effect:
        case WaveMoved(wave=wave):
            _log.info(
                "wave.moved",
                rollout=rollout.id,
                wave=wave.index,
                status=wave.status,
                domains=wave.domains,
                reason=wave.reason,
            )
        case RolloutMoved(rollout=moved):
            _log.info("rollout.moved", rollout=moved.id, status=moved.status, reason=moved.reason)
        case _:
            pass
