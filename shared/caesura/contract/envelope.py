"""CloudEvents 1.0 in JSON, structured mode: what surrounds every message on the bus.

Source of the members: CloudEvents 1.0.2, section 3.1 (required and optional attributes). MQTT binding 1.0.2,
section 3.2: the whole event is the payload, so nothing depends on MQTT 5 properties.
"""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, ClassVar, Literal

import msgspec
from msgspec import Meta

Instant = Annotated[datetime, Meta(tz=True, description="RFC 3339, with a time zone; Caesura writes UTC.")]


def source_of(fleet: str, *writer: str) -> str:
    """The CloudEvents source of a writer, such as ``/caesura/default/host/host-1``."""
    return "/".join(("/caesura", fleet, *writer))


def fleet_of(source: str) -> str:
    """The fleet in the source of a named writer; empty: there is none, as in those of versions before 0.1.0 (``/caesura/host/host-1``)."""
    parts = source.split("/")
    return parts[2] if len(parts) > 4 and parts[:2] == ["", "caesura"] else ""


class Message(msgspec.Struct, frozen=True, kw_only=True):
    """The base of every message body. ``TYPE`` is the CloudEvents ``type``; v1 only grows."""

    TYPE: ClassVar[str] = ""


class Header(msgspec.Struct, frozen=True, kw_only=True):
    """The attributes of an event without its data."""

    specversion: Literal["1.0"]
    id: Annotated[str, Meta(min_length=1, max_length=128)]
    source: Annotated[
        str,
        Meta(min_length=1, max_length=256, description="URI reference, for example `/caesura/host/host-1`."),
    ]
    type: Annotated[str, Meta(min_length=1, max_length=128)]
    time: Instant
    datacontenttype: Literal["application/json"] = "application/json"


class RawEnvelope(Header, frozen=True, kw_only=True):
    """An event whose data is not decoded yet: the type decides how to read it."""

    data: msgspec.Raw


class OutgoingEnvelope(Header, frozen=True, kw_only=True):
    """An event to be sent."""

    data: Message
