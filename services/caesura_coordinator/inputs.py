"""The inputs and effects of a rollout's state machine. Pure."""

from __future__ import annotations

from typing import TypeAlias

from caesura.contract.messages import OperationReported, VmClockSynced, VmReady
from caesura.contract.reasons import ReasonCode
from caesura.runtime.errors import CaesuraError
from caesura_coordinator.records import Rollout, StateRecord, Wave, WaveEvent


class RequestRefused(CaesuraError):
    """A request that cannot be carried out; the text says why, and what to do."""

    def __init__(self, code: ReasonCode, why: str) -> None:
        self.code: ReasonCode = code
        super().__init__(why)


class Authority(StateRecord, frozen=True, kw_only=True):
    """The coordinator and epoch under which commands are sent."""

    coordinator: str
    epoch: int


# --- inputs ----------------------------------------------------------------------------------------------


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


class Outdated(StateRecord, frozen=True, kw_only=True):
    """A set's document on the bus is ahead of our record: another coordinator, or a newer copy of our store, has been active."""

    set: str
    open_events: frozenset[str]
    """Ids of the events that the document on the bus still shows."""


Fact: TypeAlias = Approve | VmReady | OperationReported | VmClockSynced
"""The inputs about one event or operation, and hence about one rollout."""
Input: TypeAlias = Tick | Abort | Resume | Outdated | Fact

# --- effects ---------------------------------------------------------------------------------------------


class EventScheduled(StateRecord, frozen=True, kw_only=True):
    """Add the event to its set's document."""

    event: WaveEvent


class EventApprovedEffect(StateRecord, frozen=True, kw_only=True):
    """Mark the event approved in the document."""

    event: WaveEvent


class EventStarted(StateRecord, frozen=True, kw_only=True):
    """The event starts now."""

    event: WaveEvent


class EventEnded(StateRecord, frozen=True, kw_only=True):
    """The event reached its final status; it is removed from the document."""

    event: WaveEvent
    reason: str
    codes: tuple[str, ...] = ()


class WaveMoved(StateRecord, frozen=True, kw_only=True):
    """The wave reached a status."""

    wave: Wave


class RolloutMoved(StateRecord, frozen=True, kw_only=True):
    """The rollout reached a status."""

    rollout: Rollout


Effect: TypeAlias = (
    EventScheduled | EventApprovedEffect | EventStarted | EventEnded | WaveMoved | RolloutMoved
)
