"""A recording of a Scheduled Events server: the documents that it served, and when. Pure.

A file of JSON lines: ``RecordingHead`` first, then a ``RecordedLine`` for each change. ``recording.schema.json`` beside this module is the
JSON schema of both. A file without its last line, of a recorder that was killed, can be replayed.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime, parsedate_to_datetime
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from caesura.runtime.errors import ConfigError
from caesura_metadata_publisher.api_versions import EVENTS_VERSIONS

MOST_BYTES = 64 * 1024 * 1024
"""Of a file."""
MOST_DOCUMENT_BYTES = 1024 * 1024
MOST_S = 30 * 86400.0
"""s: the longest recording."""
API_VERSION = EVENTS_VERSIONS[0].version

_ISO = "%Y-%m-%dT%H:%M:%SZ"


class BadRecording(ConfigError):
    """The file cannot be replayed; the text names the line."""


class RecordingHead(msgspec.Struct, frozen=True, kw_only=True):
    """The first line."""

    caesura_recording: Literal[1]
    """The version of the format."""
    server: str
    """The address that was asked."""
    began: datetime
    """When ``at`` was 0, by the recorder's wall clock: what NotBefore is compared with."""
    every_s: Annotated[float, Meta(gt=0)]
    """Seconds between two requests."""


class RecordedLine(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Each further line: what the server answered from then on."""

    at: Annotated[float, Meta(ge=0, le=MOST_S)]
    """Seconds since ``began``, on the recorder's monotonic clock. They never go back."""
    status: Annotated[int, Meta(ge=0, le=599)] = 200
    """HTTP's; 0: there was no answer, and ``error`` says why. A replay continues to serve what it served before."""
    document: dict[str, Any] | None = None
    """The body of a 200."""
    error: Annotated[str, Meta(max_length=1000)] = ""
    """The text of another status."""
    ended: bool = False
    """The last line: nothing changed until then."""


class RecordedEvent(msgspec.Struct, frozen=True):
    """What a replay must know of an event in a document."""

    event_id: Annotated[str, Meta(min_length=1)] = msgspec.field(name="EventId")
    status: str = msgspec.field(name="EventStatus")
    event_type: str = msgspec.field(name="EventType", default="Freeze")
    not_before: str = msgspec.field(name="NotBefore", default="")


class RecordedDocument(msgspec.Struct, frozen=True):
    """What must be in a document."""

    incarnation: int = msgspec.field(name="DocumentIncarnation")
    events: tuple[RecordedEvent, ...] = msgspec.field(name="Events")


class Recording(msgspec.Struct, frozen=True, kw_only=True):
    """All of it."""

    head: RecordingHead
    lines: tuple[RecordedLine, ...]
    whole: bool
    """Whether its last line is there."""

    @property
    def seconds(self) -> float:
        """How long it lasted."""
        return self.lines[-1].at if self.lines else 0.0

    @property
    def event_ids(self) -> tuple[str, ...]:
        """The events in it, in the order of their appearance."""
        found: dict[str, None] = {}
        for line in self.lines:
            if line.document is not None:
                found |= dict.fromkeys(each.event_id.lower() for each in events_in(line.document).events)
        return tuple(found)


def events_in(document: object) -> RecordedDocument:
    """A document's events. Raises msgspec.ValidationError: it is not a document."""
    return msgspec.convert(document, RecordedDocument)


class ChangeLog:
    """Which answers of a server are written down: each that says something else than the one before."""

    def __init__(self) -> None:
        self._last: tuple[int, object] | None = None

    def line(self, at: float, status: int, body: bytes, error: str = "") -> RecordedLine | None:
        """The line for an answer; None: it says the same.

        Args:
            at: seconds since the recording began.
            status: 0: there was no answer.
        """
        document: dict[str, Any] | None = None
        if status == 200:
            try:
                document = json.loads(body)
                events_in(document)
            except (ValueError, RecursionError) as problem:
                status, document, error = 0, None, f"what came is not a document: {problem}"
        elif status:
            error = error or body.decode(errors="replace")
        said = (status, document if status == 200 else error if status else "")
        if said == self._last:
            return None
        self._last = said
        return RecordedLine(at=round(at, 3), status=status, document=document, error=error[:1000])


def encode_line(line: RecordingHead | RecordedLine) -> bytes:
    """A line of the file."""
    return msgspec.json.encode(line) + b"\n"


def parse_recording(lines: Iterable[bytes], name: str) -> Recording:
    """Read a file, line by line.

    Raises:
        BadRecording: it is not a recording; the text has ``name`` and the line's number.
    """
    head: RecordingHead | None = None
    found: list[RecordedLine] = []
    for number, text in enumerate(lines, start=1):
        if not text.endswith(b"\n") and head is not None:
            break  # its recorder was killed while it wrote this line
        try:
            if head is None:
                head = msgspec.json.decode(text, type=RecordingHead)
                continue
            line = msgspec.json.decode(text, type=RecordedLine)
            if line.document is not None:
                events_in(line.document)
            elif line.status == 200 and not line.ended:
                raise msgspec.ValidationError("a line of status 200 needs a document")
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            what = "this is not a recording of caesura rehearse record" if head is None else str(error)
            raise BadRecording(f"{name}:{number}: {what}") from error
        if found and line.at < found[-1].at:
            raise BadRecording(f"{name}:{number}: at {line.at:g} is before the line above it")
        found.append(line)
        if line.ended:
            break
    if head is None:
        raise BadRecording(f"{name}: the file is empty")
    if not any(line.document is not None for line in found):
        raise BadRecording(f"{name}: there is no document in it")
    return Recording(head=head, lines=tuple(found), whole=found[-1].ended)


def shifted(document: dict[str, Any], head: RecordingHead, began: datetime, speed: float) -> dict[str, Any]:
    """A document with its NotBefore as far from now as it was when it was recorded.

    Args:
        began: when the replay did.
        speed: how many times faster it is.
    """
    events: Sequence[Any] = document.get("Events", ())
    return {
        **document,
        "Events": [
            {**each, "NotBefore": _shifted_time(str(each["NotBefore"]), head.began, began, speed)}
            if each.get("NotBefore")
            else each
            for each in events
        ],
    }


def instant_of(not_before: str) -> datetime | None:
    """NotBefore as the real server writes it (RFC 1123), or as mocks do (ISO 8601); None: neither."""
    try:
        found = parsedate_to_datetime(not_before)
    except ValueError:
        try:
            found = datetime.fromisoformat(not_before)
        except ValueError:
            return None
    return found.astimezone(UTC) if found.tzinfo is not None else found.replace(tzinfo=UTC)


def _shifted_time(text: str, recorded: datetime, replayed: datetime, speed: float) -> str:
    instant = instant_of(text)
    if instant is None:
        return text
    moved = replayed + timedelta(seconds=(instant - recorded).total_seconds() / speed)
    return format_datetime(moved.astimezone(UTC), usegmt=True) if "," in text else moved.strftime(_ISO)


def schema() -> dict[str, Any]:
    """The JSON schema of a line."""
    (head, line), components = msgspec.json.schema_components(
        (RecordingHead, RecordedLine), ref_template="#/$defs/{name}"
    )
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "A line of a recording of caesura rehearse record",
        "anyOf": [head, line],
        "$defs": components,
    }


if __name__ == "__main__":
    sys.stdout.write(f"{json.dumps(schema(), indent=2)}\n")
