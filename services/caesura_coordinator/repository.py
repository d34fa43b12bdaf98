"""The coordinator's rollouts and documents in memory, each change stored together with the messages that announce it.

The shell around the pure state machine: it applies effects to documents and adds facts to the outbox, all in one
transaction. It depends on the store, not on the bus.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import datetime
from functools import partial
from operator import attrgetter
from typing import Literal

import msgspec
import structlog

from caesura.contract.messages import (
    EventChanged,
    EventStatus,
    OperationReported,
    RequestAnswered,
    RolloutState,
    ScheduledEvent,
    SetDocument,
    VmClockSynced,
    VmReady,
    WaveChanged,
    WaveState,
)
from caesura.contract.parts import answer_in_parts
from caesura.contract.reasons import ReasonCode
from caesura.lifecycle import document as documents
from caesura_coordinator.active import ActiveRollouts
from caesura_coordinator.fleet import FleetFence
from caesura_coordinator.inputs import (
    Approve,
    Authority,
    Effect,
    EventApprovedEffect,
    EventEnded,
    EventScheduled,
    EventStarted,
    Fact,
    Input,
    Outdated,
    RolloutMoved,
    WaveMoved,
)
from caesura_coordinator.records import (
    FINAL,
    Rollout,
    Wave,
    WaveEvent,
    rollout_state,
    with_etags,
    without_waves,
)
from caesura_coordinator.rollout import after_restart, decide
from caesura_coordinator.store import Store

_SHOWN = 50
"""How many ended rollouts remain on the bus as retained messages; the store keeps more."""
_SHOWN_WITH_WAVES = 5
"""How many of these keep their waves, which a new subscriber receives all at once."""
_KEPT = 500
"""How many rollouts the store and memory keep."""

_MOST_WAVES = 10_000
"""A rollout on the bus may claim any number of waves; one of 10,000 VMs has no more than this."""

_NO_RECORD = "the coordinator that scheduled it has lost its record"
_NO_RECORD_CODES: tuple[ReasonCode, ...] = ("record_missing",)
Shown = Literal["with waves", "without waves", "hidden"]
"""How much of a rollout is retained on the bus."""

_log = structlog.get_logger("caesura.coordinator")

_DESCRIPTION = {
    "Freeze": "Host server is undergoing maintenance.",  # the wording of Azure for an in-place host update
    "Reboot": "Host server is undergoing maintenance that needs a reboot.",
}


class Removal(msgspec.Struct, frozen=True):
    """What must be removed from the bus for a rollout: its waves and, unless it remains shown, the rollout itself."""

    rollout: str
    waves: int
    whole: bool


class RolloutRepository:
    """All rollouts and documents.

    Args:
        store: where they are kept; read completely at start.
        now: the time of the start, for the deadlines that passed while no coordinator ran.
    """

    def __init__(self, store: Store, now: datetime) -> None:
        self.store = store
        self.rollouts: dict[str, Rollout] = {each.id: after_restart(each, now) for each in store.rollouts()}
        self.documents: dict[str, SetDocument] = store.documents()
        self._before: dict[str, SetDocument | None] = {}
        """Documents as they were before the transaction under way."""
        self._active = ActiveRollouts()
        for rollout in self.rollouts.values():
            self._active.put(rollout)
        self._shown = self._to_show()

    @property
    def active(self) -> list[Rollout]:
        """Rollouts that hold their sets, oldest first."""
        return [self.rollouts[name] for name in self._active.active]

    def holding(self, sets: Iterable[str]) -> list[Rollout]:
        """Rollouts that hold one of these sets, oldest first."""
        names = {self._active.of_set.get(each) for each in sets}
        return [self.rollouts[name] for name in self._active.active if name in names] if names else []

    def commanded(self, operation: str) -> bool:
        """Whether a rollout that has not ended commanded this operation."""
        return operation in self._active.of_operation

    def holder(self, sets: Iterable[str]) -> tuple[str, str] | None:
        """(set, rollout id) of the first of these sets that a rollout holds."""
        return next(((name, self._active.of_set[name]) for name in sets if name in self._active.of_set), None)

    def rollout_of(self, fact: Fact) -> Rollout | None:
        """The active rollout whose event or operation the fact is about; None if there is none."""
        match fact:
            case Approve() | VmReady():
                name = self._active.of_event.get(fact.event_id.lower())
            case OperationReported() | VmClockSynced():
                name = self._active.of_operation.get(fact.operation)
        return self.rollouts[name] if name is not None else None

    def add(self, rollout: Rollout, client: str, answer: RequestAnswered) -> None:
        """Store a new rollout with the answer to its request, and announce both.

        Raises:
            StoreError: nothing changed, in memory or on disk.
        """
        rollout, waves = with_etags(rollout)
        with self.store.transaction():
            self.store.save_rollout(rollout)
            self._enqueue_waves(waves)
            self.store.enqueue(rollout_state(rollout), rollout=rollout.id)
            self._keep_answer(client, answer)
        self._keep(rollout)

    def step(
        self,
        rollout: Rollout,
        received: Input,
        fleet: FleetFence,
        authority: Authority,
        now: datetime,
        *,
        answer: tuple[str, RequestAnswered] | None = None,
    ) -> Rollout:
        """Take one decision, stored and announced before it takes effect in memory.

        Args:
            answer: client and answer, when the input is a request: stored with the changes.

        Raises:
            StoreError: nothing changed, in memory or on disk.
            IllegalStatusChange, RequestRefused: as ``decide``.
        """
        fleet = fleet.with_commanded(lambda: self._commanded_by_others(rollout))
        changed, effects = decide(rollout, received, fleet, authority, now)
        if not effects and answer is None and (changed is rollout or changed == rollout):
            return rollout
        with self._all_or_nothing():
            changed = self._write(rollout, changed, effects, now)
            if answer is not None:
                self._keep_answer(*answer)
        self._believe(changed, effects)
        return changed

    @contextmanager
    def _all_or_nothing(self) -> Iterator[None]:
        """Store everything in the block or nothing, and the documents in memory likewise."""
        self._before.clear()
        try:
            with self.store.transaction():
                yield
        except BaseException:
            for name, document in self._before.items():
                if document is None:
                    del self.documents[name]
                else:
                    self.documents[name] = document
            raise

    def _set_document(self, document: SetDocument) -> None:
        """Change a document in memory, inside ``_all_or_nothing``."""
        self._before.setdefault(document.set, self.documents.get(document.set))
        self.documents[document.set] = document

    def _write(self, before: Rollout, changed: Rollout, effects: Iterable[Effect], now: datetime) -> Rollout:
        """Store a decision and its announcements; returns the rollout as stored."""
        changed, waves = with_etags(changed, before)
        self.store.save_rollout(changed, before)
        for effect in effects:
            self._perform(changed, effect, now)
        # The waves first, so that a reader has the complete rollout when it arrives.
        self._enqueue_waves(waves)
        if waves or without_waves(changed) != without_waves(before):
            self.store.enqueue(rollout_state(changed), rollout=changed.id)
        return changed

    def _enqueue_waves(self, waves: Iterable[WaveState]) -> None:
        for wave in waves:
            self.store.enqueue(wave, rollout=wave.rollout, wave=wave.wave)

    def _keep(self, rollout: Rollout) -> None:
        self.rollouts[rollout.id] = rollout
        self._active.put(rollout)

    def _believe(self, changed: Rollout, effects: Iterable[Effect]) -> None:
        self._keep(changed)
        for effect in effects:
            _report(changed, effect)

    def _commanded_by_others(self, rollout: Rollout) -> dict[str, str]:
        """Hosts that other rollouts have commanded: two rollouts may share a host, which runs one operation at a time."""
        return {
            operation.host: operation.operation
            for other in self.active
            if other.id != rollout.id and other.current is not None and other.current.status == "started"
            for operation in other.current.operations
            if operation.status not in FINAL
        }

    def adopt(self, published: SetDocument, fleet: FleetFence, authority: Authority, now: datetime) -> None:
        """Adopt a document that is newer than our copy (the store is older than the bus), and end the events that no rollout owns.

        Rollouts that hold the set are halted: their record differs from what was announced.

        Raises:
            StoreError: nothing changed, in memory or on disk; the document is adopted when it is received again.
        """
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
        halted = []
        with self._all_or_nothing():
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
                        reason=_NO_RECORD,
                        codes=_NO_RECORD_CODES,
                        at=now,
                    ),
                    set=published.set,
                    status="failed" if event.status == "started" else "cancelled",
                )
            self.store.save_document(document)
            self.store.enqueue(document, set=document.set)
            self._set_document(document)
            open_events = frozenset(each.event_id for each in document.events)
            found = Outdated(set=document.set, open_events=open_events)
            for rollout in self.active:
                if document.set in rollout.sets:
                    known = fleet.with_commanded(partial(self._commanded_by_others, rollout))
                    changed, effects = decide(rollout, found, known, authority, now)
                    halted.append((self._write(rollout, changed, effects, now), effects))
        _log.warning("document.adopted", set=document.set, incarnation=document.incarnation)
        for changed, effects in halted:
            self._believe(changed, effects)

    def abort_orphan(self, published: RolloutState, now: datetime) -> Removal | None:
        """End a rollout on the bus of which there is no record here: no coordinator leads it any more, and it would last indefinitely.

        Its hosts resume the VMs by themselves, and its scheduled events end when their document is adopted. Its waves are removed: nobody
        can vouch for their content.

        Raises:
            StoreError: nothing was published; it is tried again when the rollout is received again.
        """
        if published.rollout in self.rollouts or published.status in {"completed", "aborted"}:
            return None
        with self.store.transaction():
            wave, status = published.current_wave, published.current_status
            if wave is not None and status in {"scheduled", "started", "verifying", "soaking"}:
                self.store.enqueue(
                    WaveChanged(
                        rollout=published.rollout,
                        wave=wave,
                        status="cancelled" if status == "scheduled" else "failed",
                        domains={},
                        reason=_NO_RECORD,
                        codes=_NO_RECORD_CODES,
                        at=now,
                    ),
                    rollout=published.rollout,
                    wave=wave,
                )
            ended = msgspec.structs.replace(
                published,
                status="aborted",
                reason=_NO_RECORD,
                codes=_NO_RECORD_CODES,
                wave_etags=(),
                ended_at=now,
            )
            self.store.enqueue(ended, rollout=published.rollout)
            removal = Removal(published.rollout, min(published.wave_count, _MOST_WAVES), whole=False)
            self._enqueue_removal(removal)
        _log.warning("rollout.ended_unknown", rollout=published.rollout, was=published.status, why=_NO_RECORD)
        return removal

    def _enqueue_removal(self, removal: Removal) -> None:
        """Remove it through the outbox, even if this process is killed: afterwards there is no record of it."""
        for wave in range(removal.waves):
            self.store.enqueue_removal(WaveState, rollout=removal.rollout, wave=wave)
        if removal.whole:
            self.store.enqueue_removal(RolloutState, rollout=removal.rollout)

    def outlived(self, published: RolloutState) -> Removal | None:
        """The parts to remove of a rollout that is on the bus although it should not be: a broker may restore old retained messages."""
        shown = self._shown.get(published.rollout)
        if shown is None or shown == "with waves" or (shown == "without waves" and not published.wave_etags):
            return None
        return Removal(published.rollout, min(published.wave_count, _MOST_WAVES), whole=shown == "hidden")

    def republish_above(self, published: SetDocument) -> None:
        """Another coordinator's document is on the bus although we lead: publish ours again, above it.

        Raises:
            StoreError: nothing changed.
        """
        ours = self.documents.get(published.set)
        if ours is None or ours == published:
            return
        ours = documents.above(ours, published)
        with self.store.transaction():
            self.store.save_document(ours)
            self.store.enqueue(ours, set=ours.set)
        self.documents[ours.set] = ours
        _log.warning("document.reasserted", set=ours.set, incarnation=ours.incarnation)

    def ensure_documents(self, sets: Iterable[str]) -> bool:
        """Give every set a document, empty at first, so that workloads can poll before the first event.

        True when there was a new one.
        """
        new = {name for name in sets if name not in self.documents}
        fresh = {name: documents.first_document(name) for name in sorted(new)}
        if fresh:
            with self.store.transaction():
                for name, document in fresh.items():
                    self.store.save_document(document)
                    self.store.enqueue(document, set=name)
            self.documents.update(fresh)
        return bool(fresh)

    def republish(self) -> list[Removal]:
        """Add all retained state to the outbox again; returns what must be removed from the bus, regardless of who left it there.

        Raises:
            StoreError: nothing was added.
        """
        current_ones: list[Rollout] = []
        removals: list[Removal] = []
        with self.store.transaction():
            for document in self.documents.values():
                self.store.enqueue(document, set=document.set)
            for rollout, shown in [(self.rollouts[name], how) for name, how in self._to_show().items()]:
                if shown == "with waves":
                    # Compute etags again: this version may publish a wave differently from the one that stored it.
                    current, waves = with_etags(rollout)
                    current_ones.append(current)
                    self._enqueue_waves(waves)
                    self.store.enqueue(rollout_state(current), rollout=rollout.id)
                elif shown == "without waves":
                    self.store.enqueue(rollout_state(rollout, with_waves=False), rollout=rollout.id)
                    removals.append(Removal(rollout.id, len(rollout.waves), whole=False))
        for current in current_ones:
            self._keep(current)
        return removals

    def heal(self, published: RolloutState) -> bool:
        """Publish our version of a rollout again after somebody else published it; returns whether we have it.

        Raises:
            StoreError: it was not published.
        """
        rollout = self.rollouts.get(published.rollout)
        if rollout is None or self._shown.get(rollout.id, "with waves") != "with waves":
            return False
        current, waves = with_etags(rollout)
        with self.store.transaction():
            self._enqueue_waves(waves)
            self.store.enqueue(rollout_state(current), rollout=current.id)
        self._keep(current)
        _log.warning("rollout.reasserted", rollout=rollout.id)
        return True

    def forget(self) -> list[Removal]:
        """Drop old ended rollouts from the store and from memory; returns what the outbox removes from the bus.

        A rollout that still holds its sets is never dropped.

        Raises:
            StoreError: nothing was dropped.
        """
        shown = self._to_show()
        hidden = [name for name, how in shown.items() if how == "hidden"]
        old = hidden[: max(0, len(self.rollouts) - _KEPT)]
        removals = []
        with self.store.transaction():
            for name, how in shown.items():
                if how in {"with waves", self._shown.get(name, "with waves")}:
                    continue
                rollout = self.rollouts[name]
                removals.append(Removal(name, len(rollout.waves), whole=how == "hidden"))
                if how == "without waves":
                    self.store.enqueue(rollout_state(rollout, with_waves=False), rollout=name)
                self._enqueue_removal(removals[-1])
        self.store.forget(old)
        for name in old:
            self._active.forget(self.rollouts.pop(name))
            del shown[name]
        self._shown = shown
        return removals

    def _to_show(self) -> dict[str, Shown]:
        """Maps a rollout to how much of it is on the bus: every active one, and the newest of the ended ones."""
        shown: dict[str, Shown] = {}
        ended = sum(not each.active for each in self.rollouts.values())
        for each in self.rollouts.values():  # oldest first
            if each.active or ended <= _SHOWN_WITH_WAVES:
                shown[each.id] = "with waves"
            else:
                shown[each.id] = "without waves" if ended <= _SHOWN else "hidden"
            ended -= not each.active
        return shown

    def store_response(self, client: str, answer: RequestAnswered) -> None:
        """Store an answer that changed nothing else, and announce it.

        Raises:
            StoreError: it was not stored.
        """
        with self.store.transaction():
            self._keep_answer(client, answer)

    def _keep_answer(self, client: str, answer: RequestAnswered) -> None:
        if answer.request:
            self.store.save_answer(client, answer)
        self._enqueue_answer(client, answer)

    def repeat_answer(self, client: str, answer: RequestAnswered) -> None:
        """Send a stored answer again.

        Raises:
            StoreError: it is not sent.
        """
        with self.store.transaction():
            self._enqueue_answer(client, answer)

    def _enqueue_answer(self, client: str, answer: RequestAnswered) -> None:
        answer, parts = answer_in_parts(answer)
        for part in parts:
            self.store.enqueue(part, client=client, part=part.part)
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
            case EventEnded(event=event, reason=reason, codes=codes):
                document = documents.end(self._document(event), event.event_id)
                self._save(document)
                self._announce(rollout, event, event.status, now, reason, codes)
            case WaveMoved(wave=wave):
                self.store.enqueue(
                    WaveChanged(
                        rollout=rollout.id,
                        wave=wave.index,
                        status=wave.status,
                        domains=wave.domains,
                        hosts=wave.hosts,
                        reason=wave.reason,
                        codes=wave.codes,
                        at=now,
                    ),
                    rollout=rollout.id,
                    wave=wave.index,
                )
            case RolloutMoved():
                pass  # published as the rollout's retained state, enqueued by ``step``

    def _document(self, event: WaveEvent) -> SetDocument:
        return self.documents.get(event.set, documents.first_document(event.set))

    def _save(self, document: SetDocument) -> None:
        if self.documents.get(document.set) == document:
            return
        self.store.save_document(document)
        self.store.enqueue(document, set=document.set)
        self._set_document(document)

    def _announce(
        self,
        rollout: Rollout,
        event: WaveEvent,
        status: EventStatus,
        now: datetime,
        reason: str = "",
        codes: tuple[str, ...] = (),
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
                codes=codes,
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
    """The wave of an event that has just changed: the current one, or one that has just ended."""
    current = rollout.current
    place = current.index if current is not None else len(rollout.waves) - 1
    for wave in (*rollout.waves[place::-1], *rollout.waves[place + 1 :]):
        # Events are in the order of their sets' names.
        at = bisect_left(wave.events, event.set, key=attrgetter("set"))
        if at < len(wave.events) and wave.events[at].event_id == event.event_id:
            return wave
    raise AssertionError(f"event {event.event_id} is in no wave of rollout {rollout.id}")


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
                codes=wave.codes,
            )
        case RolloutMoved(rollout=moved):
            _log.info(
                "rollout.moved", rollout=moved.id, status=moved.status, reason=moved.reason, codes=moved.codes
            )
        case _:
            pass
