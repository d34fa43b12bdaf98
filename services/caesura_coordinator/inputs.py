"""The events that move a rollout: facts from the bus, operators' requests, time. Pure."""

from __future__ import annotations

from typing import TypeAlias

from caesura.contract.messages import OperationReported, VmClockSynced, VmReady
from caesura_coordinator.records import StateRecord


class Tick(StateRecord, frozen=True, kw_only=True):
    """Time passed, or the fleet changed."""


class Approve(StateRecord, frozen=True, kw_only=True):
    """A workload approved an event."""

    event_id: str
    by: str


class Abort(StateRecord, frozen=True, kw_only=True):
    """An operator aborts the rollout."""

    reason: str = ""


class Resume(StateRecord, frozen=True, kw_only=True):
    """An operator resumes a halted rollout."""


class DocumentSuperseded(StateRecord, frozen=True, kw_only=True):
    """A set's document on the bus is ahead of our record: another coordinator, or a newer copy of our store, has been active."""

    set: str
    open_events: frozenset[str]
    """Ids of the events that the document on the bus still shows."""


Fact: TypeAlias = Approve | VmReady | OperationReported | VmClockSynced
"""The inputs about one event or operation, and hence about one rollout."""
Input: TypeAlias = Tick | Abort | Resume | DocumentSuperseded | Fact
