"""Serves a recording again, with its timing; on demand a program is paused when an event becomes Started."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast, get_args

import msgspec

from caesura.contract.messages import EventType
from caesura.runtime.errors import CaesuraError, ConfigError
from caesura.runtime.threads import in_thread
from caesura_metadata_publisher.request import HttpResponse, error_body
from caesura_rehearse.recordings.recording import (
    MOST_BYTES,
    RecordedEvent,
    RecordedLine,
    Recording,
    events_in,
    instant_of,
    parse_recording,
    shifted,
)
from caesura_rehearse.results.observations import EventRecord, Observations

Pause = Callable[[EventRecord], Awaitable[None]]
"""What is done to the program when an event becomes Started. Raises CaesuraError."""


class Replay:
    """A recording under way.

    Args:
        recording: that is served.
        set_name: the set of the VMs that see it.
        vms: these.
        observations: where its events are written down, as those that are ordered.
        began: the instant (CLOCK_MONOTONIC, seconds) at which the rehearsal began.
        say: called with each piece of news, for people.
        changed: called after each change.
        speed: how many times faster than it was recorded.
        pause: what a Started event does; None: nothing, there are documents only.
    """

    def __init__(
        self,
        recording: Recording,
        set_name: str,
        vms: tuple[str, ...],
        observations: Observations,
        began: float,
        say: Callable[[str], None],
        changed: Callable[[], None],
        *,
        speed: float = 1.0,
        pause: Pause | None = None,
    ) -> None:
        self._recording = recording
        self._set = set_name
        self._vms = vms
        self._observations = observations
        self._began = began
        self._say = say
        self._changed = changed
        self._speed = speed
        self._pause = pause
        self._replay_began = datetime.now(UTC)
        self._document: dict[str, Any] | None = None
        self._refusal: HttpResponse | None = None
        self._open: dict[str, EventRecord] = {}
        self._pauses: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        """Serve it to its end. Then no event is open."""
        self._replay_began = datetime.now(UTC)
        start = time.monotonic()
        try:
            for line in self._recording.lines:
                await asyncio.sleep(max(start + line.at / self._speed - time.monotonic(), 0.0))
                self._show(line)
            if self._pauses:
                await asyncio.wait(self._pauses)
        finally:
            for task in self._pauses:
                task.cancel()
            if self._pauses:
                await asyncio.wait(self._pauses)
            for record in self._open.values():
                record.ended = self._now
                record.outcome = record.outcome or "completed"
                record.why = "the recording ended before it vanished"
            self._open.clear()

    @property
    def _now(self) -> float:
        return time.monotonic() - self._began

    def _show(self, line: RecordedLine) -> None:
        if line.document is None:
            if line.status and not line.ended:
                body = error_body(line.error or "recorded")
                self._refusal = HttpResponse(status=line.status, body=body)
                self._say(f"the recorded server answers {line.status}")
            return
        self._refusal = None
        self._document = shifted(line.document, self._recording.head, self._replay_began, self._speed)
        seen = {each.event_id.lower(): each for each in events_in(self._document).events}
        for event_id, event in seen.items():
            self._follow(event_id, event)
        for event_id in [each for each in self._open if each not in seen]:
            self._vanished(self._open.pop(event_id))
        self._changed()

    def _follow(self, event_id: str, event: RecordedEvent) -> None:
        record = self._open.get(event_id)
        if record is None:
            if event_id in self._observations.events:
                return  # it vanished, and is back
            not_before = instant_of(event.not_before) if event.not_before else None
            notice_s = max((not_before - datetime.now(UTC)).total_seconds(), 0.0) if not_before else 0.0
            record = EventRecord(
                event_id=event.event_id,
                event=_event_type(event.event_type),
                set=self._set,
                vms=self._vms,
                notice_s=round(notice_s, 1),
                duration_s=0.0,
                announced=self._now,
            )
            self._open[event_id] = self._observations.events[event_id] = record
            self._say(f"announced: {event.event_type} {event.event_id}, NotBefore in {notice_s:.0f} s")
        if event.status == "Started" and record.started is None:
            record.started = self._now
            self._say(f"started: {event.event_type}")
            if self._pause is not None:
                task = asyncio.create_task(self._pause_for(record), name=f"pause for {event_id}")
                self._pauses.add(task)
                task.add_done_callback(self._pauses.discard)

    async def _pause_for(self, record: EventRecord) -> None:
        assert self._pause is not None  # noqa: S101 - asked for before
        try:
            await self._pause(record)
        except CaesuraError as error:
            record.outcome, record.why = "failed", str(error)
            self._say(f"{record.event} failed: {error}")
        self._changed()

    def _vanished(self, record: EventRecord) -> None:
        record.ended = self._now
        record.outcome = record.outcome or ("completed" if record.started is not None else "cancelled")
        self._say(f"vanished: {record.event}")

    def read(self, if_none_match: str) -> HttpResponse:
        """The answer to a request for the document."""
        if self._refusal is not None:
            return self._refusal
        if self._document is None:
            return HttpResponse(status=200, body=b'{"DocumentIncarnation":0,"Events":[]}')
        tag = f'"{self._document["DocumentIncarnation"]}"'
        if if_none_match and if_none_match.strip('"') == tag.strip('"'):
            return HttpResponse(status=304, headers={"ETag": tag})
        return HttpResponse(status=200, body=msgspec.json.encode(self._document), headers={"ETag": tag})

    def approved(self, vm: str, event_ids: tuple[str, ...]) -> None:
        """A client of ``vm`` approves these events. It is noted, and changes nothing: the recorded time counts."""
        for event_id in event_ids:
            record = self._open.get(event_id.lower())
            if record is not None and record.approved is None and record.started is None:
                record.approved, record.approved_by = self._now, vm
                self._say(f"approved by {vm}; the recording continues as it was")
        self._changed()


def _event_type(recorded: str) -> EventType:
    """A type that we do not know is treated as a Freeze in the report; clients get what was recorded."""
    return cast("EventType", recorded) if recorded in get_args(EventType) else "Freeze"


async def load_recording(file: Path) -> Recording:
    """Read a recording.

    Raises:
        BadRecording: it is not one.
        ConfigError: it cannot be read.
    """

    def load() -> Recording:
        try:
            if file.stat().st_size > MOST_BYTES:
                raise ConfigError(f"{file} has more than {MOST_BYTES} bytes: no recording has")
            with file.open("rb") as opened:
                return parse_recording(opened, str(file))
        except OSError as error:
            raise ConfigError(f"cannot read {file}: {error.strerror or error}") from error

    return await in_thread("read the recording", load)
