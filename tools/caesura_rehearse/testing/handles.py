"""What a test sees of a rehearsal: its programs, events and rollouts. Standard library only."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from caesura_rehearse.testing.rehearsal_process import RehearsalProcess

Duration = float | str
"""Seconds, or a text such as ``5s`` or ``1m30s``."""


class RehearsedProgram:
    """A program that the test runs."""

    def __init__(self, process: RehearsalProcess, started: Mapping[str, Any]) -> None:
        self._process = process
        self.vm: str = started["vm"]
        """The VM that it runs on."""
        self.pid: int = started["pid"]
        """At its start; a Reboot gives it another."""
        self.port: int = started["port"]
        """For it to listen on: it has it as CAESURA_PORT, and as {port} in its arguments."""
        self.url: str = started["url"]
        """Of its VM's metadata API."""
        self._output = Path(started["output"])

    @property
    def output(self) -> str:
        """What it has written so far, to standard output and standard error."""
        return self._output.read_text(errors="replace") if self._output.exists() else ""

    @property
    def exit_code(self) -> int | None:
        """Negative: the signal that ended it; None: it runs."""
        code: int | None = self._state["exit_code"]
        return code

    @property
    def starts(self) -> int:
        """How often it was started."""
        return int(self._state["starts"])

    @property
    def _state(self) -> Any:
        return next(each for each in self._process.ask("state")["programs"] if each["vm"] == self.vm)

    def wait_for_output(self, text: str, timeout: Duration = 30.0) -> None:
        """Wait until it has written ``text``. Raises RehearsalAssertion."""
        self._process.ask("wait_output", vm=self.vm, text=text, timeout=timeout)

    def wait(self, timeout: Duration = 30.0) -> int:
        """Wait until it has ended; its exit code. Raises RehearsalAssertion."""
        return int(self._process.ask("wait_exit", vm=self.vm, timeout=timeout))

    def stop(self) -> None:
        """SIGTERM, after 10 s SIGKILL, and wait for its end."""
        self._process.ask("stop", vm=self.vm)


class RehearsedEvent:
    """An event that was ordered. All instants are seconds since the rehearsal began."""

    def __init__(self, process: RehearsalProcess, record: Mapping[str, Any]) -> None:
        self._process = process
        self.event_id: str = record["event_id"]
        self.type: str = record["event"]

    @property
    def record(self) -> Mapping[str, Any]:
        """Everything about it, as in the report of ``--json``."""
        events: list[dict[str, Any]] = self._process.ask("state")["events"]
        return next(each for each in events if each["event_id"] == self.event_id)

    @property
    def approved_by(self) -> str:
        """Whose client approved it; empty: none did, ``rehearse``: the test did."""
        return str(self.record["approved_by"])

    @property
    def gap(self) -> float:
        """Seconds for which the program was stopped, as the kernel reports it; 0 before."""
        return float(sum(each["seconds"] for each in self.record["gaps"]))

    def wait_seen(self, timeout: Duration | None = None) -> RehearsedEvent:
        """Wait until a client of the program got the document with it. Raises RehearsalAssertion."""
        return self._wait("seen", timeout)

    def wait_approved(self, timeout: Duration | None = None) -> RehearsedEvent:
        """Wait until a client has approved it. Raises RehearsalAssertion."""
        return self._wait("approved", timeout)

    def wait_started(self, timeout: Duration | None = None) -> RehearsedEvent:
        """Wait until it is Started: at NotBefore, or when it was approved. Raises RehearsalAssertion."""
        return self._wait("started", timeout)

    def wait_paused(self, timeout: Duration | None = None) -> RehearsedEvent:
        """Wait until the program is stopped. Raises RehearsalAssertion."""
        return self._wait("paused", timeout)

    def wait_resumed(self, timeout: Duration | None = None) -> RehearsedEvent:
        """Wait until the program runs again. Raises RehearsalAssertion."""
        return self._wait("resumed", timeout)

    def wait_ended(self, timeout: Duration | None = None) -> RehearsedEvent:
        """Wait until it has vanished from the document. Raises RehearsalAssertion."""
        return self._wait("ended", timeout)

    def _wait(self, step: str, timeout: Duration | None) -> RehearsedEvent:
        self._process.ask("wait", event_id=self.event_id, step=step, timeout=timeout)
        return self

    def cancel(self) -> None:
        """Take it back: it vanishes, as if the platform had cancelled it."""
        self._process.ask("cancel", event_id=self.event_id)

    def approve(self) -> None:
        """Approve it in the place of the program."""
        self._process.ask("approve", event_id=self.event_id)


class RehearsedRollout:
    """An order for one update domain after the other."""

    def __init__(self, process: RehearsalProcess, record: Mapping[str, Any]) -> None:
        self._process = process
        self.rollout_id: str = record["rollout_id"]
        self.waves: list[list[str]] = record["waves"]
        """The VMs of each update domain, in order."""

    @property
    def record(self) -> Mapping[str, Any]:
        """Everything about it, as in the report of ``--json``."""
        rollouts: list[dict[str, Any]] = self._process.ask("state")["rollouts"]
        return next(each for each in rollouts if each["rollout_id"] == self.rollout_id)

    @property
    def events(self) -> list[RehearsedEvent]:
        """Those that were announced so far, in order."""
        ids = self.record["event_ids"]
        events = {each["event_id"]: each for each in self._process.ask("state")["events"]}
        return [RehearsedEvent(self._process, events[each]) for each in ids]

    def wait_ended(self, timeout: Duration | None = None) -> RehearsedRollout:
        """Wait until the last update domain is done. Raises RehearsalAssertion: it halted, or was not over in time."""
        self._process.ask("wait_rollout", rollout_id=self.rollout_id, timeout=timeout)
        return self

    def cancel(self) -> None:
        """Take back the event that is scheduled; no other follows."""
        self._process.ask("cancel_rollout", rollout_id=self.rollout_id)
