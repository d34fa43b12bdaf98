"""The effects of a decision, which the repository stores and announces: ``decide`` returns them, and does not perform them. Pure."""

from __future__ import annotations

from datetime import datetime
from typing import TypeAlias

from caesura_coordinator.records import Rollout, StateRecord, Wave, WaveEvent


class EventScheduled(StateRecord, frozen=True, kw_only=True):
    """Add the event to its set's document."""

    event: WaveEvent


class EventPostponed(StateRecord, frozen=True, kw_only=True):
    """NotBefore of the event moves later."""

    event: WaveEvent
    not_before: datetime


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
    EventScheduled
    | EventPostponed
    | EventApprovedEffect
    | EventStarted
    | EventEnded
    | WaveMoved
    | RolloutMoved
)
