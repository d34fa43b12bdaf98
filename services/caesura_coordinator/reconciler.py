"""Compares the documents and rollouts on the bus with our records: adopts what is newer, replaces what others published, ends what nobody leads."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from datetime import datetime

from caesura.contract import messages as m
from caesura.contract.codec import Received
from caesura.runtime.errors import StoreError
from caesura.runtime.logs import get_logger
from caesura_coordinator.fleet_lookup import FleetLookup
from caesura_coordinator.leadership import Leadership
from caesura_coordinator.outbox_relay import OutboxRelay
from caesura_coordinator.repository import RolloutRepository
from caesura_coordinator.retention import KEPT

_ENDED = ("completed", "aborted")
_log = get_logger("caesura.coordinator")


class Reconciler:
    """See the module. What arrives before an epoch is claimed waits for the claim.

    Args:
        repository: our records.
        relay: publishes what differs.
        leadership: a coordinator that does not lead changes nothing.
        source: CloudEvents source of this coordinator, by which it knows its own messages.
        fleet_now: the view of the fleet that decisions read.
        now: the time of decisions.
    """

    def __init__(
        self,
        repository: RolloutRepository,
        relay: OutboxRelay,
        leadership: Leadership,
        *,
        source: str,
        fleet_now: Callable[[], FleetLookup],
        now: Callable[[], datetime],
    ) -> None:
        self._repository = repository
        self._relay = relay
        self._leadership = leadership
        self._source = source
        self._fleet_now = fleet_now
        self._now = now
        self._pending_documents: dict[str, tuple[m.SetDocument, str]] = {}
        self._pending_rollouts: dict[str, m.RolloutState] = {}

    async def on_document(self, document: m.SetDocument, received: Received) -> None:
        """A set's document arrived."""
        # A coordinator that does not lead must not end another's event: the other may be alive and end it itself.
        if self._leadership.is_leader:
            self._reconcile_document(document, received.header.source)
        elif not self._leadership.claimed:
            self._pending_documents[document.set] = document, received.header.source

    async def on_rollout(self, rollout: m.RolloutState, received: Received) -> None:
        """A rollout's state arrived."""
        if self._leadership.is_leader:
            self._reconcile_rollout(rollout)
            if received.header.source != self._source:
                self._republish_above(rollout)
        elif not self._leadership.claimed:
            self._pending_rollouts.pop(rollout.rollout, None)
            self._pending_rollouts[rollout.rollout] = rollout
            self._forget_ended()

    async def on_rollout_removed(self, parameters: Mapping[str, str]) -> None:
        """A rollout is no longer on the bus."""
        self._pending_rollouts.pop(parameters["rollout"], None)

    def _forget_ended(self) -> None:
        """A coordinator may stand by for years: of the rollouts that ended, those that arrived last stay."""
        if len(self._pending_rollouts) > KEPT:
            ended = [name for name, each in self._pending_rollouts.items() if each.status in _ENDED]
            for name in ended[: max(0, len(ended) - KEPT)]:
                del self._pending_rollouts[name]

    def reconcile_pending_documents(self) -> None:
        """The documents that arrived before the epoch was claimed."""
        documents, self._pending_documents = self._pending_documents, {}
        for document, source in documents.values():
            self._reconcile_document(document, source)

    def reconcile_pending_rollouts(self) -> None:
        """The rollouts that arrived before the epoch was claimed."""
        rollouts, self._pending_rollouts = self._pending_rollouts, {}
        for rollout in rollouts.values():
            self._reconcile_rollout(rollout)

    def ensure_documents(self, sets: Iterable[str]) -> None:
        """Give every one of these sets a document."""
        # Not before the epoch is claimed: a document that is already on the bus must be received first.
        if not self._leadership.claimed:
            return
        try:
            if self._repository.ensure_documents(sets):
                self._relay.notify()
        except StoreError as error:
            _log.error("coordinator.store_failed", why=str(error))  # retried with the next inventory

    def _reconcile_document(self, document: m.SetDocument, source: str) -> None:
        try:
            self._repository.adopt_document(
                document, self._fleet_now(), self._leadership.authority, self._now()
            )
            # Our own documents are echoed to us, and may be older than a later decision; another's must not stay.
            if source != self._source:
                self._repository.republish_above(document)
        except StoreError as error:
            _log.error("document.not_taken", set=document.set, why=str(error))
        self._relay.notify()

    def _reconcile_rollout(self, rollout: m.RolloutState) -> None:
        removal = self._repository.excess(rollout)
        try:
            self._repository.abort_orphan(rollout, self._now())
        except StoreError as error:
            _log.error("rollout.not_ended", rollout=rollout.rollout, why=str(error))
        if removal is not None:
            self._relay.remove_later(removal)
        self._relay.notify()

    def _republish_above(self, rollout: m.RolloutState) -> None:
        """Another coordinator, perhaps one that was suspended, published one of our rollouts: its version must not stay."""
        try:
            self._repository.republish_rollout(rollout)
        except StoreError as error:
            _log.error("rollout.not_reasserted", rollout=rollout.rollout, why=str(error))
