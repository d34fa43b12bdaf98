"""What the fixture ``caesura`` is: a synchronous view of a rehearsal that runs in a process of its own.

In a process of its own since a test may freeze time, forbid sockets, turn warnings into errors or configure logging: none of that may
reach the rehearsal. Standard library only.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

_END_S = 30.0  # s: it ends what it has started, then itself
_OUTPUT_SHOWN = 4000  # characters


class RehearsalError(Exception):
    """A call that cannot be carried out: an unknown event, a program that cannot be started, a bad duration."""


class RehearsalAssertion(AssertionError):
    """What was waited for did not happen. The text says what happened instead."""


Duration = float | str
"""Seconds, or a text such as ``5s`` or ``1m30s``."""


class RehearsalProcess:
    """The process, and the conversation with it."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._errors: IO[bytes] | None = None
        self._count = 0

    def open(self) -> Rehearsal:
        """A new rehearsal; the process is started if it does not run."""
        if self._process is None or self._process.poll() is not None:
            self.close()
            self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - it is open as long as the process
            # -P: no module of the tests' folder may be taken for one of the standard library. A session of its own: Ctrl-C is for pytest, which
            # then ends the fixture.
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "caesura_rehearse.serve"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                start_new_session=True,
            )
        return Rehearsal(self, self.ask("open")["url"])

    def ask(self, do: str, **arguments: Any) -> Any:
        """One request and its answer."""
        process = self._process
        if process is None or process.stdin is None or process.stdout is None:
            raise RehearsalError("the rehearsal is over")
        self._count += 1
        try:
            process.stdin.write(json.dumps({"id": self._count, "do": do, "with": arguments}).encode() + b"\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except OSError:
            line = b""
        except BaseException:
            self._kill()  # the answer to this request must not be taken for that to another
            raise
        if not line:
            raise RehearsalError(f"the process of the rehearsal ended: {self._last_words()}")
        answer = json.loads(line)
        if "error" not in answer:
            return answer["ok"]
        if answer["kind"] == "StepMissed":
            raise RehearsalAssertion(answer["error"])
        raise RehearsalError(answer["error"])

    def end(self) -> None:
        """End the rehearsal that is open."""
        if self._process is not None and self._process.poll() is None:
            self.ask("close")

    def _kill(self) -> None:
        """It ends everything when its input is closed."""
        if self._process is not None and self._process.stdin is not None:
            self._process.stdin.close()

    def _last_words(self) -> str:
        if self._errors is None:
            return ""
        self._errors.seek(0)
        return self._errors.read()[-_OUTPUT_SHOWN:].decode(errors="replace")

    def close(self) -> None:
        """End the process."""
        process, self._process = self._process, None
        if process is not None:
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    pipe.close()
            try:
                process.wait(_END_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        if self._errors is not None:
            self._errors.close()
            self._errors = None


class RehearsedProgram:
    """The program that the test runs."""

    def __init__(self, process: RehearsalProcess, pid: int, output: Path) -> None:
        self._process = process
        self.pid = pid
        """At its start; a Reboot gives it another."""
        self._output = output

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
        return self._process.ask("state")["programs"][0]

    def wait_for_output(self, text: str, timeout: Duration = 30.0) -> None:
        """Wait until it has written ``text``. Raises RehearsalAssertion."""
        self._process.ask("wait_output", text=text, timeout=timeout)

    def wait(self, timeout: Duration = 30.0) -> int:
        """Wait until it has ended; its exit code. Raises RehearsalAssertion."""
        return int(self._process.ask("wait_exit", timeout=timeout))

    def stop(self) -> None:
        """SIGTERM, after 10 s SIGKILL, and wait for its end."""
        self._process.ask("stop")


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


class Rehearsal:
    """The fixture ``caesura``. One VM, ``app-1`` of the set ``app``; its program is the one that ``run`` starts."""

    def __init__(self, process: RehearsalProcess, url: str) -> None:
        self._process = process
        self.url = url
        """Of the metadata API, without a path: the program has it as CAESURA_METADATA_URL."""
        self.program: RehearsedProgram | None = None
        self.events: list[RehearsedEvent] = []
        """What was ordered, in order."""

    def run(
        self,
        argv: Sequence[str | os.PathLike[str]],
        *,
        env: Mapping[str, str] | None = None,
        cwd: str | os.PathLike[str] | None = None,
    ) -> RehearsedProgram:
        """Start the program; one that ran before is ended.

        Args:
            env: variables in addition to those of the test.
            cwd: the folder that it starts in; None: the present one.

        Raises:
            RehearsalError: it cannot be started.
        """
        environ = {**os.environ, **(env or {})}
        words = [os.fspath(word) for word in argv]
        started = self._process.ask("run", argv=words, environ=environ, cwd=os.fspath(cwd or Path.cwd()))
        self.program = RehearsedProgram(self._process, started["pid"], Path(started["output"]))
        return self.program

    def freeze(self, notice: Duration = 5.0, duration: Duration = 3.0, **more: Any) -> RehearsedEvent:
        """Announce a Freeze; what follows happens in the background.

        Args:
            notice: until NotBefore; 0: none at all.
            duration: of the pause, at most 27 s; 0: it is announced and started, and nothing pauses.
            more: members of ``orders.Order``, such as ``source="User"``.

        Raises:
            RehearsalError: the order is not valid.
        """
        return self._order("Freeze", notice, duration_s=duration, **more)

    def reboot(self, notice: Duration = 5.0, **more: Any) -> RehearsedEvent:
        """Announce a Reboot: SIGTERM, later SIGKILL, and the program is started again."""
        return self._order("Reboot", notice, **more)

    def redeploy(self, notice: Duration = 5.0, **more: Any) -> RehearsedEvent:
        """Announce a Redeploy: the same under another name."""
        return self._order("Redeploy", notice, **more)

    def preempt(self, notice: Duration = 5.0, **more: Any) -> RehearsedEvent:
        """Announce a Preempt, a spot eviction: SIGTERM, later SIGKILL."""
        return self._order("Preempt", notice, **more)

    def terminate(self, notice: Duration = 5.0, **more: Any) -> RehearsedEvent:
        """Announce a Terminate, the end of a scale set's VM: SIGTERM, later SIGKILL."""
        return self._order("Terminate", notice, **more)

    def _order(self, event: str, notice: Duration, **more: Any) -> RehearsedEvent:
        ordered = RehearsedEvent(
            self._process, self._process.ask("order", event=event, notice_s=notice, **more)
        )
        self.events.append(ordered)
        return ordered

    @property
    def _last(self) -> RehearsedEvent:
        if not self.events:
            raise RehearsalError("nothing was ordered yet: call freeze, for example")
        return self.events[-1]

    def wait_seen(self, timeout: Duration | None = None) -> RehearsedEvent:
        """As of the event that was ordered last."""
        return self._last.wait_seen(timeout)

    def wait_approved(self, timeout: Duration | None = None) -> RehearsedEvent:
        """As of the event that was ordered last."""
        return self._last.wait_approved(timeout)

    def wait_started(self, timeout: Duration | None = None) -> RehearsedEvent:
        """As of the event that was ordered last."""
        return self._last.wait_started(timeout)

    def wait_paused(self, timeout: Duration | None = None) -> RehearsedEvent:
        """As of the event that was ordered last."""
        return self._last.wait_paused(timeout)

    def wait_resumed(self, timeout: Duration | None = None) -> RehearsedEvent:
        """As of the event that was ordered last."""
        return self._last.wait_resumed(timeout)

    def wait_ended(self, timeout: Duration | None = None) -> RehearsedEvent:
        """As of the event that was ordered last."""
        return self._last.wait_ended(timeout)

    def cancel(self) -> None:
        """Take back the event that was ordered last."""
        self._last.cancel()

    def approve(self) -> None:
        """Approve the event that was ordered last, in the place of the program."""
        self._last.approve()

    def fault(self, fault: str) -> None:
        """What requests for the document meet from now on, after the faults that were given before: ``slow 20s``, ``410``, ``429``, ``500``,
        ``drop``, ``stale``, ``empty``; with ``x3`` after it only the next three.

        Raises:
            RehearsalError: it is not a fault.
        """
        self._process.ask("fault", fault=fault)

    def no_faults(self) -> None:
        """The end of all faults."""
        self._process.ask("no_faults")

    def expect(self, *expectations: str) -> None:
        """Wait until everything that was ordered is over, and hold it to ``seen``, ``approved``, ``drained-within 10s``, ``survived``.

        Raises:
            RehearsalAssertion: one does not hold, or what was ordered did not come about.
        """
        self._process.ask("expect", expectations=list(expectations))

    @property
    def approvals(self) -> list[str]:
        """The ids of the events that clients have approved, one for each time."""
        return [each["event_id"] for each in self.report["approvals"]]

    @property
    def documents(self) -> list[dict[str, Any]]:
        """The different documents that clients got, each with ``at``, ``incarnation`` and ``events``."""
        deliveries: list[dict[str, Any]] = self.report["deliveries"]
        return deliveries

    @property
    def report(self) -> dict[str, Any]:
        """Everything so far, as with ``caesura rehearse --json``."""
        state: dict[str, Any] = self._process.ask("state")
        return state

    def failure_sections(self) -> list[tuple[str, str]]:
        """For the report of a failed test."""
        try:
            text = str(self._process.ask("text"))
        except RehearsalError as error:
            text = str(error)
        sections = [("caesura rehearse", text)]
        if self.program is not None and (output := self.program.output):
            sections.append(("output of its program", output[-_OUTPUT_SHOWN:]))
        return sections
