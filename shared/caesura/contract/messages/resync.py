"""Requests to publish retained state again, for brokers that do not keep it for everybody (``caesura.bus.resync``).

Readers ask the coordinator, each on a topic of its own; the coordinator, which limits how often, asks all writers at once.
"""

from __future__ import annotations

from typing import Annotated, ClassVar

from msgspec import Meta

from caesura.contract.envelope import Message
from caesura.contract.names import Name

RESYNC_SPREAD_MOST_S = 60.0


class FleetResyncRequested(Message, frozen=True, kw_only=True):
    """The coordinator asks every writer to publish its retained state again."""

    TYPE: ClassVar[str] = "caesura.fleet.resync-requested.v1"

    coordinator: Name
    spread_s: Annotated[float, Meta(ge=0, le=RESYNC_SPREAD_MOST_S)] = 1.0
    """Each writer waits a random part of this, so that a fleet does not answer at once."""


class AgentResyncRequested(Message, frozen=True, kw_only=True):
    """A VM's agent needs the state that it reads."""

    TYPE: ClassVar[str] = "caesura.agent.resync-requested.v1"

    vm: Name


class PublisherResyncRequested(Message, frozen=True, kw_only=True):
    """A metadata publisher needs the state that it reads."""

    TYPE: ClassVar[str] = "caesura.publisher.resync-requested.v1"

    instance: Name


class ClientResyncRequested(Message, frozen=True, kw_only=True):
    """An operator's client needs the state of the fleet."""

    TYPE: ClassVar[str] = "caesura.client.resync-requested.v1"

    client: Name


class ExporterResyncRequested(Message, frozen=True, kw_only=True):
    """An exporter, or a consumer with its rights, needs the state of the fleet."""

    TYPE: ClassVar[str] = "caesura.exporter.resync-requested.v1"

    instance: Name
