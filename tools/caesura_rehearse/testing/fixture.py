"""What the fixture ``caesura`` is: a synchronous view of a rehearsal that runs in a process of its own.

In a process of its own since a test may freeze time, forbid sockets, turn warnings into errors or configure logging: none of that may
reach the rehearsal. Standard library only.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, overload

from caesura_rehearse.testing.handles import Duration, RehearsedEvent, RehearsedProgram, RehearsedRollout
from caesura_rehearse.testing.rehearsal_process import RehearsalAssertion, RehearsalError, RehearsalProcess

__all__ = ["Rehearsal", "RehearsalAssertion", "RehearsalError"]

_OUTPUT_SHOWN = 4000  # characters


class Rehearsal:
    """The fixture ``caesura``. One VM, ``app-1`` of the set ``app``, or several; their program is the one that ``run`` starts."""

    def __init__(self, process: RehearsalProcess, url: str) -> None:
        self._process = process
        self.url = url
        """Of the metadata API, without a path: the program has it as CAESURA_METADATA_URL."""
        self.program: RehearsedProgram | None = None
        """That of ``app-1``."""
        self.programs: list[RehearsedProgram] = []
        """All of them."""
        self.events: list[RehearsedEvent] = []
        """What was ordered, in order."""

    @overload
    def run(
        self,
        argv: Sequence[str | os.PathLike[str]],
        *,
        env: Mapping[str, str] | None = None,
        cwd: str | os.PathLike[str] | None = None,
    ) -> RehearsedProgram: ...

    @overload
    def run(
        self,
        argv: Sequence[str | os.PathLike[str]],
        *,
        env: Mapping[str, str] | None = None,
        cwd: str | os.PathLike[str] | None = None,
        vms: int,
    ) -> list[RehearsedProgram]: ...

    def run(
        self,
        argv: Sequence[str | os.PathLike[str]],
        *,
        env: Mapping[str, str] | None = None,
        cwd: str | os.PathLike[str] | None = None,
        vms: int | None = None,
    ) -> RehearsedProgram | list[RehearsedProgram]:
        """Start the program; what ran before is ended.

        Args:
            argv: may have ``{vm}``, ``{n}`` and ``{port}``.
            env: variables in addition to those of the test.
            cwd: the folder that it starts in; None: the present one.
            vms: how many VMs of the set run it, ``app-1`` and those after it, each in an update domain of its own up to five; None: one,
                which is returned, not a list.

        Raises:
            RehearsalError: it cannot be started.
        """
        environ = {**os.environ, **(env or {})}
        words = [os.fspath(word) for word in argv]
        started = self._process.ask(
            "run",
            argv=words,
            environ=environ,
            cwd=os.fspath(cwd or Path.cwd()),
            vms=1 if vms is None else vms,
        )
        self.programs = [RehearsedProgram(self._process, each) for each in started]
        self.program = self.programs[0]
        return self.program if vms is None else self.programs

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

    def rollout(
        self,
        event: str = "Freeze",
        *,
        sets: Sequence[str] = (),
        notice: Duration = 5.0,
        duration: Duration = 3.0,
        **more: Any,
    ) -> RehearsedRollout:
        """Order an event for all VMs, one update domain after the other; what follows happens in the background.

        Args:
            event: Freeze, Reboot, Redeploy, Preempt or Terminate.
            sets: only these.
            notice: as of ``freeze``, for each update domain.
            duration: of each pause of a Freeze.
            more: members of ``orders.Order``, such as ``soak_s="2s"``.

        Raises:
            RehearsalError: the order is not valid.
        """
        if event == "Freeze":
            more["duration_s"] = duration
        record = self._process.ask("roll", event=event, sets=list(sets), notice_s=notice, **more)
        return RehearsedRollout(self._process, record)

    def play(self, scenario: str | os.PathLike[str], *, speed: float = 1.0) -> None:
        """Play a scenario to its end.

        Args:
            scenario: the name of one that comes with the package, or a TOML file: a path with a slash in it, or ``.toml`` at its end. Its VMs are those that
                ``run`` has started.
            speed: shortens notices, checks and the time between steps; pauses last as long as ever.

        Raises:
            RehearsalError: it cannot be used; the text has file and line.
            RehearsalAssertion: a step could not be carried out, an event failed, or one of its own expectations does not hold.
        """
        self._process.ask("play", scenario=os.fspath(scenario), speed=speed)

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
        for program in self.programs:
            if output := program.output:
                name = "its program" if len(self.programs) == 1 else program.vm
                sections.append((f"output of {name}", output[-_OUTPUT_SHOWN:]))
        return sections
