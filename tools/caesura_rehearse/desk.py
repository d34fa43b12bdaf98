"""What can be done with a rehearsal from outside, by name and JSON arguments: for the pytest plug-in and for other programs."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from caesura.runtime.errors import CaesuraError, ConfigError
from caesura.runtime.threads import in_thread
from caesura_host_updater.drivers.process.freezers import Freezer, choose_freezer
from caesura_rehearse.durations import seconds_in
from caesura_rehearse.engine import Engine
from caesura_rehearse.expectations import parse_expectation
from caesura_rehearse.faults import parse_fault
from caesura_rehearse.observations import EventRecord
from caesura_rehearse.orders import order_from
from caesura_rehearse.report import text_lines
from caesura_rehearse.rollouts import UnknownEvent
from caesura_rehearse.run_folder import cgroup_of
from caesura_rehearse.targets import Program, program_environ

VM, SET = "app-1", "app"
_PATIENCE_S = 15.0  # s: what a step may take longer than its own time, on a busy machine
_LOOK_S = 0.02  # s: between two looks at a program's output: nobody notifies us

Step = Literal["seen", "approved", "started", "paused", "resumed", "ended"]


class BadCall(ConfigError):
    """There is no such call, or its arguments are wrong."""


class StepMissed(CaesuraError):
    """What was waited for did not happen."""


class RunArguments(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Of ``run``."""

    argv: Annotated[tuple[str, ...], Meta(min_length=1)]
    environ: dict[str, str]
    cwd: str


class EventStep(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What is waited for. ``timeout``: seconds, or a text such as 5s; None: what the event itself takes, and some patience."""

    step: Step
    timeout: float | str | None = None


class WaitArguments(EventStep, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Of ``wait``."""

    event_id: str


class OutputArguments(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Of ``wait_output``."""

    text: str
    timeout: float | str = 30.0


class EventArguments(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Of ``cancel`` and ``approve``."""

    event_id: str


class ExpectArguments(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Of ``expect``."""

    expectations: tuple[str, ...]


class FaultArguments(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Of ``fault``."""

    fault: str


class Desk:
    """The calls that need no program; each has a method of its name."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    async def call(self, name: str, arguments: Mapping[str, Any]) -> Any:
        """Carry out one call; what it returns can be written as JSON.

        Raises:
            CaesuraError: it was refused, or failed; the text says why.
        """
        try:
            return msgspec.to_builtins(await self._call(name, arguments))
        except msgspec.ValidationError as error:
            raise BadCall(f"{name}: {error}") from error
        except ValueError as error:
            raise BadCall(f"{name}: {error}") from error

    async def _call(self, name: str, arguments: Mapping[str, Any]) -> Any:
        match name:
            case "order":
                return await self._order(arguments)
            case "cancel":
                return await self._engine.rollouts.cancel(msgspec.convert(arguments, EventArguments).event_id)
            case "approve":
                return await self._engine.rollouts.approve(
                    msgspec.convert(arguments, EventArguments).event_id
                )
            case "wait":
                return await self._wait(msgspec.convert(arguments, WaitArguments))
            case "expect":
                return await self._expect(msgspec.convert(arguments, ExpectArguments))
            case "fault":
                return self._engine.add_fault(parse_fault(msgspec.convert(arguments, FaultArguments).fault))
            case "no_faults":
                return self._engine.clear_faults()
            case "state":
                return self._engine.report()
            case "text":
                return "\n".join(text_lines(self._engine.report()))
        raise BadCall(f"there is no call {name!r}")

    async def _order(self, arguments: Mapping[str, Any]) -> EventRecord:
        given = dict(arguments)
        for name in ("notice_s", "duration_s", "checks_s", "grace_s"):
            if given.get(name) is not None:
                given[name] = seconds_in(given[name])
        return await self._engine.rollouts.order(order_from(given))

    async def _wait(self, arguments: WaitArguments) -> EventRecord:
        record = self._engine.observations.events.get(arguments.event_id.lower())
        if record is None:
            raise UnknownEvent(f"there is no event {arguments.event_id}")
        usual_s = record.not_before + record.impact_s + _PATIENCE_S - self._engine.now
        timeout_s = usual_s if arguments.timeout is None else seconds_in(arguments.timeout)

        def reached() -> bool:
            return instant_of(record, arguments.step) is not None

        await self._engine.until(lambda: reached() or bool(record.outcome), max(timeout_s, 0.0))
        if record.outcome == "failed":
            raise StepMissed(f"the {record.event} failed: {record.why}")
        if not reached():
            raise StepMissed(missed(record, arguments.step, self._engine.now))
        return record

    async def _expect(self, arguments: ExpectArguments) -> None:
        expectations = [parse_expectation(each) for each in arguments.expectations]
        records = self._engine.events
        usual_s = max((each.not_before + each.impact_s for each in records), default=0.0) + _PATIENCE_S
        await self._engine.until(
            lambda: all(each.outcome for each in records), max(usual_s - self._engine.now, 0.0)
        )
        failed = [each for each in self._engine.report(expectations).verdicts if not each.held]
        if failed:
            raise StepMissed("; ".join(f"{each.what}: {each.detail}" for each in failed))


class ProgramDesk(Desk):
    """The calls that start and watch the program of ``app-1``, too.

    Args:
        engine: with the VM already added.
        folder: for the output of its programs.
        freezer: how they are paused.
    """

    def __init__(self, engine: Engine, folder: Path, freezer: Freezer) -> None:
        super().__init__(engine)
        self._folder = folder
        self._freezer = freezer

    async def _call(self, name: str, arguments: Mapping[str, Any]) -> Any:
        match name:
            case "run":
                return await self._run(msgspec.convert(arguments, RunArguments))
            case "wait_output":
                return await self._wait_output(msgspec.convert(arguments, OutputArguments))
            case "wait_exit":
                return await self._wait_exit(seconds_in(arguments.get("timeout", 30.0)))
            case "stop":
                return await self._program().end(10.0)
        return await super()._call(name, arguments)

    async def _run(self, arguments: RunArguments) -> dict[str, Any]:
        slot = self._engine.slots[VM]
        if slot.target is not None:
            await slot.target.close(0.0)
        output = self._folder / "output"
        output.unlink(missing_ok=True)
        program = Program(
            VM,
            arguments.argv,
            program_environ(VM, SET, slot.url, base=arguments.environ),
            self._folder,
            self._freezer,
            cwd=Path(arguments.cwd),
            output=output,
        )
        slot.exited = None
        await self._engine.attach(slot, program)
        return {"pid": program.pid, "output": str(output)}

    def _program(self) -> Program:
        target = self._engine.slots[VM].target
        if not isinstance(target, Program):
            raise BadCall("no program was started: call run first")
        return target

    async def _wait_output(self, arguments: OutputArguments) -> None:
        path, wanted = self._folder / "output", arguments.text.encode()
        program = self._program()
        try:
            async with asyncio.timeout(seconds_in(arguments.timeout)):
                while wanted not in await in_thread("output", path.read_bytes):
                    if program.ended.is_set():
                        raise StepMissed(f"{program.what} ended and has not written {arguments.text!r}")
                    await asyncio.sleep(_LOOK_S)
        except TimeoutError:
            raise StepMissed(f"{program.what} has not written {arguments.text!r} in time") from None

    async def _wait_exit(self, timeout_s: float) -> int | None:
        program = self._program()
        if not await self._engine.until(program.ended.is_set, timeout_s):
            raise StepMissed(f"{program.what} did not end within {timeout_s:g} s")
        return program.exit_code


def instant_of(record: EventRecord, step: Step) -> float | None:
    """When the event reached the step; None: not yet."""
    match step:
        case "seen":
            return record.first_seen
        case "approved":
            return record.approved
        case "started":
            return record.started
        case "paused":
            return record.paused
        case "resumed":
            return record.resumed
        case "ended":
            return record.ended


def missed(record: EventRecord, step: Step, now: float) -> str:
    """Why a step was not reached, for people."""
    reached = [
        each
        for each in ("seen", "approved", "started", "paused", "resumed", "ended")
        if instant_of(record, each)
    ]
    course = f"it was {', '.join(reached)}" if reached else "no client has asked for the document since"
    return (
        f"the {record.event} was not {step} {now - record.announced:.1f} s after its announcement: {course}"
    )


async def best_freezer() -> Freezer:
    """How programs are paused here."""
    freezer, _ = await in_thread("freezer", lambda: choose_freezer("auto", cgroup_of(os.getpid())))
    return freezer
