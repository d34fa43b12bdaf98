"""Recordings: what is written down, what is refused by line, and how instants move with the replay."""

from __future__ import annotations

import asyncio
import json
import time
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from caesura.runtime.errors import ConfigError
from caesura_rehearse.commands.rehearse import rehearse
from caesura_rehearse.recordings import recording
from caesura_rehearse.recordings.recorder import BadServer, Server, check_free
from caesura_rehearse.recordings.recording import (
    BadRecording,
    ChangeLog,
    RecordedLine,
    Recording,
    RecordingHead,
    encode_line,
    instant_of,
    parse_recording,
    schema,
    shifted,
)
from caesura_rehearse.recordings.replay import Replay
from caesura_rehearse.results.observations import EventRecord, Observations
from caesura_rehearse.targets.pause import NotPaused

BEGAN = datetime(2026, 11, 29, 1, 0, 0, tzinfo=UTC)
HEAD = RecordingHead(caesura_recording=1, server="http://169.254.169.254", began=BEGAN, every_s=1.0)


def document(incarnation: int, *statuses: str, not_before: str = "") -> dict[str, Any]:
    events = [
        {"EventId": f"E{number}", "EventType": "Freeze", "EventStatus": status, "NotBefore": not_before}
        for number, status in enumerate(statuses)
    ]
    return {"DocumentIncarnation": incarnation, "Events": events}


def body(incarnation: int, *statuses: str) -> bytes:
    return json.dumps(document(incarnation, *statuses)).encode()


def test_only_changes_are_written_down() -> None:
    changes = ChangeLog()
    said = [
        changes.line(0.0, 200, body(1)),
        changes.line(1.0, 200, body(1)),
        changes.line(2.0, 200, body(2, "Scheduled")),
        changes.line(3.0, 429, b'{"error": "Too many requests"}'),
        changes.line(4.0, 429, b'{"error": "Too many requests"}'),
        changes.line(5.0, 0, b"", "no answer: timed out"),
        changes.line(6.0, 0, b"", "no answer: Connection refused"),
        changes.line(7.0, 200, body(2, "Scheduled")),
        changes.line(8.0, 200, b"<html>"),
    ]
    assert [(each.at, each.status) for each in said if each] == [
        (0.0, 200),
        (2.0, 200),
        (3.0, 429),
        (5.0, 0),
        (7.0, 200),
        (8.0, 0),
    ]
    assert said[-1] is not None
    assert "what came is not a document" in said[-1].error


lines = st.lists(
    st.builds(
        lambda at, incarnation, statuses: RecordedLine(at=at, document=document(incarnation, *statuses)),
        st.floats(0, 1e6),
        st.integers(0, 1000),
        st.lists(st.sampled_from(["Scheduled", "Started"]), max_size=3),
    ),
    min_size=1,
    max_size=6,
).map(lambda found: sorted(found, key=lambda each: each.at))


@given(lines, st.booleans())
def test_what_was_written_is_read_again(written: list[RecordedLine], ended: bool) -> None:
    all_lines = [*written, *([RecordedLine(at=written[-1].at, ended=True)] if ended else [])]
    texts = [encode_line(HEAD), *map(encode_line, all_lines)]
    if not ended:
        texts.append(b'{"at":1e6,"docu')  # the recorder was killed
    found = parse_recording(texts, "events.jsonl")
    assert (found.head, list(found.lines), found.whole) == (HEAD, all_lines, ended)


@pytest.mark.parametrize(
    ("texts", "says"),
    [
        ([], "events.jsonl: the file is empty"),
        ([b"hello\n"], "events.jsonl:1: this is not a recording of caesura rehearse record"),
        ([b'{"caesura_recording":2}\n'], "events.jsonl:1: this is not a recording"),
        ([encode_line(HEAD)], "events.jsonl: there is no document in it"),
        ([encode_line(HEAD), b'{"at":"soon"}\n'], "events.jsonl:2: Expected `float`"),
        ([encode_line(HEAD), b'{"at":1}\n'], "events.jsonl:2: a line of status 200 needs a document"),
        (
            [encode_line(HEAD), b'{"at":1,"document":{"Events":[]}}\n'],
            "events.jsonl:2: .*DocumentIncarnation",
        ),
        (
            [
                encode_line(HEAD),
                encode_line(RecordedLine(at=2, document=document(1))),
                encode_line(RecordedLine(at=1, document=document(2))),
            ],
            "events.jsonl:3: at 1 is before the line above it",
        ),
    ],
)
def test_what_is_not_a_recording_is_refused_by_line(texts: list[bytes], says: str) -> None:
    with pytest.raises(BadRecording, match=says):
        parse_recording(texts, "events.jsonl")


@pytest.mark.parametrize("speed", [1.0, 60.0])
def test_not_before_is_as_far_away_as_it_was(speed: float) -> None:
    now = BEGAN + timedelta(days=3)
    at = format_datetime(BEGAN + timedelta(minutes=15), usegmt=True)
    moved = shifted(document(1, "Scheduled", not_before=at), HEAD, now, speed)["Events"][0]["NotBefore"]
    assert moved.endswith("GMT")
    assert instant_of(moved) == now + timedelta(seconds=900 / speed)
    iso = shifted(document(1, "Scheduled", not_before="2026-11-29T01:15:00Z"), HEAD, now, speed)
    assert iso["Events"][0]["NotBefore"] == f"{now + timedelta(seconds=900 / speed):%Y-%m-%dT%H:%M:%SZ}"
    for odd in ("", "soon"):
        assert (
            shifted(document(1, "Started", not_before=odd), HEAD, now, speed)["Events"][0]["NotBefore"] == odd
        )


def test_the_schema_is_that_of_the_lines() -> None:
    """Write it again: ``python -m caesura_rehearse.recordings.recording >tools/caesura_rehearse/recordings/recording.schema.json``."""
    file = Path(recording.__file__).with_name("recording.schema.json")
    assert json.loads(file.read_bytes()) == schema()


class Served:
    """A replay under test, with what clients get at each of its changes."""

    def __init__(self, *recorded: RecordedLine, pause: Any = None) -> None:
        self.observations = Observations()
        self.bodies: list[Any] = []
        self.shown = asyncio.Event()
        recording = Recording(head=HEAD, lines=recorded, whole=True)
        self.replay = Replay(
            recording,
            "app",
            ("app-1",),
            self.observations,
            time.monotonic(),
            lambda _: None,
            self._changed,
            pause=pause,
        )

    def _changed(self) -> None:
        self.shown.set()
        answer = self.replay.read("")
        self.bodies.append(json.loads(answer.body) if answer.status == 200 else answer.status)

    async def run(self) -> list[EventRecord]:
        await self.replay.run()
        return list(self.observations.events.values())


SCHEDULED = RecordedLine(at=0, document=document(2, "Scheduled", "Scheduled"))
STARTED = RecordedLine(at=0.02, document=document(3, "Started"))
OVER = RecordedLine(at=0.04, document=document(4))


async def test_a_replay_serves_what_was_recorded_and_tells_what_became_of_each_event() -> None:
    served = Served(SCHEDULED, STARTED, OVER, RecordedLine(at=0.05, ended=True))
    first, second = await served.run()
    assert [each["DocumentIncarnation"] for each in served.bodies] == [2, 3, 4]
    assert (first.outcome, second.outcome) == ("completed", "cancelled")
    assert first.started is not None
    assert second.started is None
    assert served.replay.read('"4"').status == 304


async def test_an_approval_is_noted_and_changes_nothing() -> None:
    served = Served(SCHEDULED, RecordedLine(at=0.5, document=document(3, "Started")))
    running = asyncio.create_task(served.run())
    await served.shown.wait()
    served.replay.approved("app-1", ("e0", "unknown"))
    first, _ = await running
    assert first.approved is not None
    assert first.approved_by == "app-1"
    assert first.why == "the recording ended before it vanished"


async def test_a_status_is_served_until_the_next_document_and_no_answer_is_not() -> None:
    served = Served(
        SCHEDULED,
        RecordedLine(at=0.01, status=0, error="no answer"),
        RecordedLine(at=0.02, status=429, error="Too many requests"),
    )
    await served.run()
    assert served.replay.read("").status == 429
    assert [each["DocumentIncarnation"] for each in served.bodies] == [2]


async def test_what_cannot_be_paused_fails_its_event() -> None:
    async def pause(_: EventRecord) -> None:
        raise NotPaused("it ended before")

    served = Served(SCHEDULED, STARTED, OVER, pause=pause)
    first, _ = await served.run()
    assert (first.outcome, first.why) == ("failed", "it ended before")


@pytest.mark.parametrize(
    "url", ["", "169.254.169.254", "https://x", "http://", "http://x:port", "file:///etc"]
)
def test_addresses_that_cannot_be_asked(url: str) -> None:
    with pytest.raises(BadServer, match="is not an address such as"):
        Server(url)


def test_a_file_that_exists_is_kept(tmp_path: Path) -> None:
    file = tmp_path / "events.jsonl"
    check_free(file, overwrite=False)
    file.touch()
    with pytest.raises(ConfigError, match="exists: name another file, or give --overwrite"):
        check_free(file, overwrite=False)
    check_free(file, overwrite=True)
    with pytest.raises(ConfigError, match="there is no folder"):
        check_free(tmp_path / "nowhere" / "events.jsonl", overwrite=False)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("record", "http://127.0.0.1:9", "/dev/null/x"), "there is no folder /dev/null"),
        (("record", "ftp://x", "x.jsonl"), "is not an address such as"),
        (("record", "http://127.0.0.1:9", "x.jsonl", "--every", "0.1s"), "--every must be 0.2s at least"),
        (("--replay", "x.jsonl", "--freeze", "1s", "--", "true"), "--freeze and --replay exclude each other"),
        (("--replay", "x.jsonl", "--notice", "1s", "--", "true"), "--notice and --replay exclude each other"),
        (("--pause-at-start", "1s", "--", "true"), "--pause-at-start needs --replay"),
        (("--replay", "/no/such.jsonl", "--", "true"), "cannot read /no/such.jsonl: No such file"),
        (("--replay", "/etc/passwd", "--", "true"), "/etc/passwd:1: this is not a recording"),
    ],
)
def test_bad_usage_is_one_clear_line_and_2(words: tuple[str, ...], says: str) -> None:
    result = CliRunner().invoke(rehearse, list(words))
    assert result.exit_code == 2, result.output
    assert says in " ".join(result.output.split())
