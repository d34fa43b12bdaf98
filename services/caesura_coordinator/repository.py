"""The coordinator's rollouts and documents in memory, each change stored together with the messages that announce it.

The shell around the pure state machine: it applies effects to documents and adds facts to the outbox, all in one
transaction. It depends on the store, not on the bus.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from functools import partial
from itertools import groupby, islice

from caesura.contract.messages import (
    EventStatus,
    OperationReported,
    RequestAnswered,
    RolloutState,
    SetDocument,
    VmClockSynced,
    VmReady,
    WaveState,
)
from caesura.contract.parts import answer_in_parts
from caesura.contract.reasons import ReasonCode
from caesura.lifecycle import document as documents
from caesura.runtime.logs import get_logger
from caesura_coordinator.announcements import (
    NO_RECORD,
    event_changed,
    orphan_aborted,
    orphan_event_ended,
    orphan_wave_ended,
    scheduled_event,
    wave_changed,
)
from caesura_coordinator.authority import Authority
from caesura_coordinator.document_repository import DocumentRepository
from caesura_coordinator.effects import (
    Effect,
    EventApprovedEffect,
    EventEnded,
    EventPostponed,
    EventScheduled,
    EventStarted,
    RolloutMoved,
    WaveMoved,
)
from caesura_coordinator.fleet_lookup import FleetLookup
from caesura_coordinator.inputs import Approve, DocumentSuperseded, Fact, Input
from caesura_coordinator.published_state import rollout_state, with_etags
from caesura_coordinator.records import FINAL, Rollout, WaveEvent, has_parts, without_parts, without_waves
from caesura_coordinator.retention import Removal, all_waves, excess, how_shown, no_longer_kept
from caesura_coordinator.rollout import after_restart, decide
from caesura_coordinator.rollout_queue import ActiveRollouts
from caesura_coordinator.store import CoordinatorStore

_log = get_logger("caesura.coordinator")


_FORGOTTEN_AT_ONCE = 2
"""rollouts, each with some rows for each VM: the event loop waits for them"""
_POSTPONED: tuple[str, tuple[ReasonCode, ...]] = (
    "NotBefore moved later: a rollout ahead in the queue has not ended, or ended late",
    ("queued",),
)


class RolloutRepository:
    """All rollouts and documents.

    Args:
        store: where they are kept; read completely at start.
        now: the time of the start, for the deadlines that passed while no coordinator ran.
    """

    def __init__(self, store: CoordinatorStore, now: datetime) -> None:
        self.store = store
        self.load(now, store.rollouts())

    def load(self, now: datetime, rollouts: Iterable[Rollout]) -> None:
        """Read everything again: the store has other content.

        Args:
            now: as of the class.
            rollouts: those of the store, read where that holds up nobody.
        """
        store = self.store
        self.rollouts: dict[str, Rollout] = {each.id: after_restart(each, now) for each in rollouts}
        self._documents = DocumentRepository(store)
        self._active = ActiveRollouts()
        for rollout in self.rollouts.values():
            self._active.put(rollout)
        self._shown = how_shown(self.rollouts.values())

    @property
    def documents(self) -> Mapping[str, SetDocument]:
        """Maps a set to its document."""
        return self._documents.all

    @property
    def active(self) -> list[Rollout]:
        """Rollouts that hold their sets or wait for them, oldest first."""
        return [self.rollouts[name] for name in self._active.active]

    def holding_or_waiting(self, sets: Iterable[str]) -> list[Rollout]:
        """Rollouts that hold one of these sets or wait for one, oldest first."""
        names = {name for each in sets for name in self._active.of_set.get(each, ())}
        return [self.rollouts[name] for name in self._active.active if name in names] if names else []

    def commanded(self, operation: str) -> bool:
        """Whether a rollout that has not ended commanded this operation."""
        return operation in self._active.of_operation

    def holder(self, sets: Iterable[str]) -> tuple[str, str] | None:
        """(set, rollout id) of the first of these sets that a rollout holds."""
        found = ((name, self._active.of_set[name]) for name in sets if name in self._active.of_set)
        return next(((name, next(iter(of_set))) for name, of_set in found), None)

    def _ahead(self, rollout: Rollout) -> list[Rollout]:
        return [self.rollouts[name] for name in self._active.ahead.get(rollout.id, ())]

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

        It holds its sets, unless another one does: then it is ``queued_behind`` that one.

        Raises:
            StoreError: nothing changed, in memory or on disk.
        """
        held = self.holder(rollout.sets) if rollout.active else None
        if held is not None and not rollout.queued_behind:
            raise AssertionError(
                f"rollout {rollout.id} is not queued though {held[1]} holds set {held[0]} (I1)"
            )
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
        fleet: FleetLookup,
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
        changed, effects = decide(rollout, received, fleet, authority, now, self._ahead(rollout))
        if not effects and answer is None and (changed is rollout or changed == rollout):
            return rollout
        with self._documents.transaction():
            changed = self._write(rollout, changed, effects, now)
            if answer is not None:
                self._keep_answer(*answer)
        self._take_effect(changed, effects)
        return changed

    def _write(self, before: Rollout, changed: Rollout, effects: Iterable[Effect], now: datetime) -> Rollout:
        """Store a decision and its announcements; returns the rollout as stored."""
        changed, waves = with_etags(changed, before)
        self.store.save_rollout(changed, before)
        for alike in _alike(effects):
            self._perform(changed, alike, now)
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

    def _take_effect(self, changed: Rollout, effects: Iterable[Effect]) -> None:
        self._keep(changed)
        for effect in effects:
            _log_effect(changed, effect)

    def _commanded_by_others(self, rollout: Rollout) -> dict[str, str]:
        """Hosts that other rollouts have commanded: two rollouts may share a host, which runs one operation at a time."""
        return {
            operation.host: operation.operation
            for other in self.active
            if other.id != rollout.id and other.current is not None and other.current.status == "started"
            for operation in other.current.operations
            if operation.status not in FINAL
        }

    def adopt_document(
        self, published: SetDocument, fleet: FleetLookup, authority: Authority, now: datetime
    ) -> None:
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
        with self._documents.transaction():
            orphans = [each for each in published.events if each.event_id not in owned]
            document = documents.end(document, *(each.event_id for each in orphans))
            for event in orphans:
                ended = orphan_event_ended(event, document, now)
                self.store.enqueue(ended, set=ended.set, status=ended.status)
            self._documents.replace(document)
            open_events = frozenset(each.event_id for each in document.events)
            found = DocumentSuperseded(set=document.set, open_events=open_events)
            for rollout in self.active:
                if document.set in rollout.sets:
                    known = fleet.with_commanded(partial(self._commanded_by_others, rollout))
                    changed, effects = decide(rollout, found, known, authority, now, self._ahead(rollout))
                    halted.append((self._write(rollout, changed, effects, now), effects))
        _log.warning("document.adopted", set=document.set, incarnation=document.incarnation)
        for changed, effects in halted:
            self._take_effect(changed, effects)

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
            if (ended := orphan_wave_ended(published, now)) is not None:
                self.store.enqueue(ended, rollout=ended.rollout, wave=ended.wave)
            self.store.enqueue(orphan_aborted(published, now), rollout=published.rollout)
            removal = all_waves(published)
            self._enqueue_removal(removal)
        _log.warning("rollout.ended_unknown", rollout=published.rollout, was=published.status, why=NO_RECORD)
        return removal

    def _enqueue_removal(self, removal: Removal) -> None:
        """Remove it through the outbox, even if this process is killed: afterwards there is no record of it."""
        for wave in range(removal.waves):
            self.store.enqueue_removal(WaveState, rollout=removal.rollout, wave=wave)
        if removal.whole:
            self.store.enqueue_removal(RolloutState, rollout=removal.rollout)

    def excess(self, published: RolloutState) -> Removal | None:
        """The parts to remove of a rollout that is on the bus although it should not be: a broker may restore old retained messages."""
        return excess(published, self._shown.get(published.rollout))

    def republish_above(self, published: SetDocument) -> None:
        """Another coordinator's document is on the bus although we lead: publish ours again, above it.

        Raises:
            StoreError: nothing changed.
        """
        self._documents.republish_above(published)

    def ensure_documents(self, sets: Iterable[str]) -> bool:
        """Give every set a document, empty at first, so that workloads can poll before the first event.

        True when there was a new one.
        """
        return self._documents.ensure(sets)

    def republish(self) -> list[Removal]:
        """Add all retained state to the outbox again; returns what must be removed from the bus, regardless of who left it there.

        Raises:
            StoreError: nothing was added.
        """
        current_ones: list[Rollout] = []
        removals: list[Removal] = []
        with self.store.transaction():
            self._documents.republish()
            for rollout, shown in [
                (self.rollouts[name], how) for name, how in how_shown(self.rollouts.values()).items()
            ]:
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

    def republish_rollout(self, published: RolloutState) -> bool:
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

    def prune(self) -> list[Removal]:
        """Drop old ended rollouts from the store and from memory; returns what the outbox removes from the bus.

        A rollout that still holds its sets is never dropped.

        Raises:
            StoreError: nothing was dropped.
        """
        shown = how_shown(self.rollouts.values())
        old = no_longer_kept(shown)
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
        self._forget_parts()
        return removals

    def _forget_parts(self) -> None:
        """Drop the state of each VM and host of rollouts whose waves nobody sees any more: a take-over reads all that is kept."""
        hidden = (self.rollouts[name] for name, how in self._shown.items() if how != "with waves")
        for rollout in list(islice(filter(has_parts, hidden), _FORGOTTEN_AT_ONCE)):
            self.store.forget_parts(rollout.id)
            self.rollouts[rollout.id] = without_parts(rollout)

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

    def response(self, client: str, request: str) -> RequestAnswered | None:
        """The stored answer to this request of this client.

        Raises:
            StoreError: it cannot be read.
        """
        return self.store.answer(client, request)

    def repeat_response(self, client: str, answer: RequestAnswered) -> None:
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

    def _perform(self, rollout: Rollout, alike: Sequence[Effect], now: datetime) -> None:
        """Store and announce effects of one kind, of events those of one set: its document changes once for all of them."""
        match alike[0]:
            case EventScheduled(event=first):
                new = (scheduled_event(rollout, event) for event in _events(alike))
                self._documents.save(documents.schedule(self._documents.of(first.set), *new))
            case EventPostponed(event=first, not_before=not_before):
                ids = (event.event_id for event in _events(alike))
                self._documents.save(documents.postpone(self._documents.of(first.set), not_before, *ids))
            case EventApprovedEffect(event=event):
                self._documents.save(documents.approve(self._documents.of(event.set), event.event_id))
            case EventStarted(event=first):
                ids = (event.event_id for event in _events(alike))
                self._documents.save(documents.start(self._documents.of(first.set), *ids))
            case EventEnded(event=first):
                ids = (event.event_id for event in _events(alike))
                self._documents.save(documents.end(self._documents.of(first.set), *ids))
            case WaveMoved() | RolloutMoved():
                pass
        for effect in alike:
            self._announce(rollout, effect, now)

    def _announce(self, rollout: Rollout, effect: Effect, now: datetime) -> None:
        match effect:
            case EventScheduled(event=event):
                self._event_changed(rollout, event, "scheduled", now)
            case EventPostponed(event=event):
                self._event_changed(rollout, event, "scheduled", now, *_POSTPONED)
            case EventStarted(event=event):
                self._event_changed(rollout, event, "started", now)
            case EventEnded(event=event, reason=reason, codes=codes):
                self._event_changed(rollout, event, event.status, now, reason, codes)
            case WaveMoved(wave=wave):
                fact = wave_changed(rollout, wave, now)
                self.store.enqueue(fact, rollout=rollout.id, wave=wave.index)
            case EventApprovedEffect() | RolloutMoved():
                # A document says that an event is approved. A rollout is published as its retained state, enqueued when the step is written.
                pass

    def _event_changed(
        self,
        rollout: Rollout,
        event: WaveEvent,
        status: EventStatus,
        now: datetime,
        reason: str = "",
        codes: tuple[str, ...] = (),
    ) -> None:
        incarnation = self._documents.of(event.set).incarnation
        fact = event_changed(
            rollout, event, status, incarnation=incarnation, now=now, reason=reason, codes=codes
        )
        self.store.enqueue(fact, set=event.set, status=status)


def _alike(effects: Iterable[Effect]) -> Iterator[Sequence[Effect]]:
    """Consecutive effects of one kind together; those of events also by set."""
    for _, alike in groupby(
        effects,
        lambda each: (type(each), "" if isinstance(each, WaveMoved | RolloutMoved) else each.event.set),
    ):
        yield list(alike)


def _events(effects: Iterable[Effect]) -> Iterator[WaveEvent]:
    for effect in effects:
        if not isinstance(effect, WaveMoved | RolloutMoved):
            yield effect.event


def _log_effect(rollout: Rollout, effect: Effect) -> None:
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
