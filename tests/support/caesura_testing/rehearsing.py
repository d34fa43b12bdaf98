"""A rehearsal under test: the installed command, with a program that does as it is asked."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import urllib.error
import urllib.request
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from caesura.runtime.processes import marked_processes
from caesura_testing.fleet import until
from caesura_testing.patience import patient

CLIENT = """
import json, os, pathlib, signal, sys, time, urllib.request

what, folder = sys.argv[1], pathlib.Path(sys.argv[2])
folder.mkdir(exist_ok=True)
url = os.environ["CAESURA_METADATA_URL"] + "/metadata/scheduledevents?api-version=2020-07-01"

def ask(body=None):
    request = urllib.request.Request(url, data=body, headers={"Metadata": "true"})
    with urllib.request.urlopen(request, timeout=10) as answer:
        return answer.read()

def note(name, text):
    (folder / (name + ".new")).write_text(text)
    (folder / (name + ".new")).rename(folder / name)

def on_term(*_):
    note("terminated", "yes")
    sys.exit(0)

signal.signal(signal.SIGTERM, on_term)
runs = int((folder / "runs").read_text()) + 1 if (folder / "runs").exists() else 1
note("runs", str(runs))
note("pid", str(os.getpid()))
beats, seen = 0, []
while True:
    beats += 1
    note("beats", str(beats))
    try:
        document = json.loads(ask())
    except OSError:  # the rehearsal was killed
        time.sleep(0.05)
        continue
    statuses = [event["EventStatus"] for event in document["Events"]]
    if statuses != seen[-1:]:
        seen.append(statuses)
        note("seen", json.dumps(seen))
    for event in document["Events"]:
        if event["EventStatus"] != "Scheduled":
            continue
        if what == "approve":
            ask(json.dumps({"StartRequests": [{"EventId": event["EventId"]}]}).encode())
        elif what == "leave":
            sys.exit(0)
    time.sleep(0.05)
"""
"""Polls and beats. ``approve``: approves what is scheduled; ``leave``: ends then; ``ignore``: neither."""


class Rehearsed:
    """One run of ``caesura rehearse``.

    Args:
        arguments: the options before the program.
        folder: where the program writes.
        program: the program; a word of ``CLIENT`` stands for that.
        place: the folder below that ``CLIENT`` writes to; may have a placeholder.
    """

    def __init__(
        self, folder: Path, arguments: Sequence[str], program: Sequence[str] | str = (), *, place: str = "."
    ) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "client.py").write_text(CLIENT, encoding="utf-8")
        argv = (
            [sys.executable, str(folder / "client.py"), program, str(folder / place)]
            if isinstance(program, str)
            else [*program]
        )
        # A folder of a developer's, with a module that is named as one of the standard library's.
        cwd = folder / "cwd"
        cwd.mkdir(exist_ok=True)
        (cwd / "selectors.py").write_text(
            "raise RuntimeError('not the standard library')\n", encoding="utf-8"
        )
        self.mark = f"CAESURA_TEST_REHEARSAL={uuid.uuid4().hex}"
        name, value = self.mark.split("=")
        with (folder / "stderr").open("wb") as stderr:
            self.process = subprocess.Popen(
                [
                    str(Path(sys.executable).with_name("caesura")),
                    "rehearse",
                    *arguments,
                    *(["--", *argv] if argv else []),
                ],
                env={**os.environ, name: value},
                cwd=cwd,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
            )

    def read(self, name: str) -> str:
        """What the program has written, empty before."""
        path = self.folder / name
        return path.read_text(encoding="utf-8") if path.exists() else ""

    def until(self, name: str, holds: Any = bool, within_s: float = 60.0) -> str:
        """Wait for what the program writes."""
        until(lambda: holds(self.read(name)) or self.process.poll() is not None, within_s, lambda: self.said)
        assert holds(self.read(name)), self.said
        return self.read(name)

    @property
    def said(self) -> str:
        """Its standard error so far."""
        return self.read("stderr")

    def finish(self, within_s: float = 60.0) -> int:
        """Its exit code; nothing that it has started is left."""
        self.out, _ = self.process.communicate(timeout=patient(within_s))
        until(lambda: not self.left(), 10, lambda: f"left: {self.left()}\n{self.said}")
        return self.process.returncode

    def report(self) -> Any:
        """What it printed with ``--json``."""
        return json.loads(self.out)

    def left(self) -> list[int]:
        """Living processes that it has started."""
        return list(marked_processes(self.mark))


def caesura(control: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """An order by the command, for the rehearsal of this control file."""
    return subprocess.run(
        [str(Path(sys.executable).with_name("caesura")), "rehearse", *words, "--control", str(control)],
        capture_output=True,
        text=True,
        timeout=patient(60),
        check=False,
    )


def ask(
    control: Path, method: str, path: str, body: Any = None, *, token: str | None = None
) -> tuple[int, Any]:
    """Status and JSON, as a test in another language would see them."""
    address = json.loads(control.read_text())
    request = urllib.request.Request(  # noqa: S310 - our own
        address["url"] + path,
        data=None if body is None else json.dumps(body).encode() if not isinstance(body, bytes) else body,
        method=method,
        headers={"Authorization": f"Bearer {address['token'] if token is None else token}"},
    )
    try:
        with urllib.request.urlopen(request, timeout=patient(60)) as answer:  # noqa: S310 - the same
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.loads(error.read())
