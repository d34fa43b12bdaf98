"""What a rehearsal serves is recorded, and served again to another program, which is really paused."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import pytest

from caesura_testing.fleet import until
from caesura_testing.patience import patient
from caesura_testing.rehearsing import Rehearsed

pytestmark = pytest.mark.e2e


class Recorder:
    """One run of ``caesura rehearse record``."""

    running: ClassVar[list[subprocess.Popen[bytes]]] = []

    def __init__(self, url: str, file: Path, *words: str) -> None:
        self.file = file
        self._said = file.with_suffix(".said")
        argv = [str(Path(sys.executable).with_name("caesura")), "rehearse", "record", url, str(file), *words]
        with self._said.open("wb") as said:
            self.process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=said, stderr=said)
        self.running.append(self.process)

    @property
    def said(self) -> str:
        return self._said.read_text(encoding="utf-8")

    @property
    def lines(self) -> list[dict[str, object]]:
        text = self.file.read_text(encoding="utf-8") if self.file.exists() else ""
        return [json.loads(line) for line in text.splitlines()]

    def until_recorded(self, statuses: list[list[str]]) -> None:
        """Wait until the last documents showed these events."""

        def shown() -> list[list[str]]:
            documents = [line["document"] for line in self.lines if "document" in line]
            return [[each["EventStatus"] for each in document["Events"]] for document in documents]  # type: ignore[index]

        until(lambda: shown()[-len(statuses) :] == statuses, 60, lambda: self.said)

    def stop(self, number: signal.Signals) -> int:
        self.process.send_signal(number)
        return self.process.wait(patient(30))


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    yield
    for process in Recorder.running:
        process.kill()
        process.wait()
    Recorder.running.clear()


def approve(url: str) -> None:
    """Approve what is scheduled, so that it starts when the recorder is ready."""
    address = f"{url}/metadata/scheduledevents?api-version=2020-07-01"

    def ask(body: bytes | None = None) -> bytes:
        request = urllib.request.Request(address, data=body, headers={"Metadata": "true"})  # noqa: S310 - our own
        with urllib.request.urlopen(request, timeout=patient(10)) as answer:  # noqa: S310 - the same
            text: bytes = answer.read()
            return text

    (event,) = json.loads(ask())["Events"]
    ask(json.dumps({"StartRequests": [{"EventId": event["EventId"]}]}).encode())


def test_a_freeze_is_recorded_and_replayed(tmp_path: Path) -> None:
    origin = Rehearsed(
        tmp_path / "origin", ("--freeze", "2s", "--notice", "600s", "--settle", "600s"), "ignore"
    )
    until(lambda: "announced" in origin.said, 60, lambda: origin.said)
    url = re.findall(r"http://127\.0\.0\.1:\d+", origin.said)[0]
    recorder = Recorder(url, tmp_path / "events.jsonl", "--every", "0.2s")
    recorder.until_recorded([["Scheduled"]])
    approve(url)
    recorder.until_recorded([["Scheduled"], ["Started"], []])
    origin.process.send_signal(signal.SIGINT)
    assert origin.finish() == 130
    until(lambda: "no answer" in recorder.said, 60, lambda: recorder.said)
    assert recorder.stop(signal.SIGINT) == 0, recorder.said
    assert "events: 1" in recorder.said
    assert recorder.lines[-1]["ended"] is True
    assert Recorder(url, recorder.file).process.wait(patient(30)) == 2, "it would overwrite"

    # The client polls as fast as the machine lets it: it must meet the event while it is scheduled.
    lines = recorder.lines
    scheduled = next(n for n, line in enumerate(lines) if '"Scheduled"' in json.dumps(line))
    later = [{**line, "at": float(str(line["at"])) + 10.0} for line in lines[scheduled + 1 :]]
    recorder.file.write_text("".join(f"{json.dumps(line)}\n" for line in [*lines[: scheduled + 1], *later]))
    options = ("--replay", str(recorder.file), "--pause-at-start", "0.7s", "--settle", "0s", "--json")
    run = Rehearsed(tmp_path / "again", (*options, "--expect", "approved", "--expect", "survived"), "approve")
    assert run.finish() == 0, run.said
    report = run.report()
    (event,) = report["events"]
    (gap,) = event["gaps"]
    assert gap["seconds"] >= 0.7
    assert event["outcome"] == "completed"
    shown = [[each["EventStatus"] for each in document["events"]] for document in report["deliveries"]]
    assert shown[-3:] == [["Scheduled"], ["Started"], []], "an approval does not start it earlier"
    # As far apart as they were recorded, by the clocks of two processes that look at their own pace.
    at = {
        tuple(each["EventStatus"] for each in line["document"]["Events"]): line["at"]  # type: ignore[index]
        for line in recorder.lines
        if "document" in line
    }
    recorded_s = float(str(at["Started",])) - float(str(at["Scheduled",]))
    assert event["started"] - event["announced"] == pytest.approx(recorded_s, abs=patient(1.0))


def test_a_recorder_that_is_killed_leaves_what_it_has(tmp_path: Path) -> None:
    origin = Rehearsed(tmp_path / "origin", ("--freeze", "0s", "--notice", "600s"), "ignore")
    until(lambda: "announced" in origin.said, 60, lambda: origin.said)
    url = re.findall(r"http://127\.0\.0\.1:\d+", origin.said)[0]
    recorder = Recorder(url, tmp_path / "events.jsonl", "--every", "0.2s")
    recorder.until_recorded([["Scheduled"]])
    assert recorder.stop(signal.SIGKILL) == -signal.SIGKILL
    origin.process.send_signal(signal.SIGINT)
    assert origin.finish() == 130
    run = Rehearsed(
        tmp_path / "again",
        ("--replay", str(recorder.file), "--settle", "60s", "--expect", "drained-within", "50s"),
        "leave",
    )
    assert run.finish() == 0, run.said
    assert "its recorder did not end in order" in run.said


def test_a_server_that_is_none_leaves_no_file(tmp_path: Path) -> None:
    recorder = Recorder("http://127.0.0.1:9", tmp_path / "events.jsonl")
    assert recorder.process.wait(patient(60)) == 2
    assert "serves no document of scheduled events: no answer: Connection refused" in recorder.said
    assert not recorder.file.exists()
