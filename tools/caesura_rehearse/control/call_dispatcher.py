"""What can be done with a rehearsal from outside, by name and JSON arguments: for the pytest plug-in and for other programs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from caesura.runtime.errors import CaesuraError, ConfigError
from caesura.runtime.threads import in_thread
from caesura_rehearse.durations import seconds_in
from caesura_rehearse.results.expectations import parse_expectation
from caesura_rehearse.results.observations import EventRecord, RolloutRecord, ScenarioRecord
from caesura_rehearse.results.report import judge_all, text_lines
from caesura_rehearse.scenarios.player import ScenarioPlayer
from caesura_rehearse.scenarios.reader import read_scenario
from caesura_rehearse.simulation.faults import parse_fault
from caesura_rehearse.simulation.fleet_simulation import FleetSimulation
from caesura_rehearse.simulation.orders import Order, order_from
from caesura_rehearse.simulation.simulated_coordinator import UnknownEvent
from caesura_rehearse.simulation.speed import MOST_SPEED

_PATIENCE_S = 15.0  # s: what a step may take longer than its own time, on a busy machine

Step = Literal["seen", "approved", "started", "paused", "resumed", "ended"]


class BadCall(ConfigError):
    """There is no such call, or its arguments are wrong."""


class StepMissed(CaesuraError):
    """What was waited for did not happen."""


class EventStep(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What is waited for. ``timeout``: seconds, or a text such as 5s; None: what the event itself takes, and some patience."""

    step: Step
    timeout: float | str | None = None


class WaitArguments(EventStep, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Of ``wait``."""

    event_id: str


class RolloutWait(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """``timeout``: seconds, or a text such as 5s; None: as long as it takes, since every rollout ends."""

    timeout: float | str | None = None


class RolloutArguments(RolloutWait, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Of ``wait_rollout`` and ``cancel_rollout``."""

    rollout_id: str


class PlayArguments(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Of ``play``."""

    scenario: str
    speed: Annotated[float, Meta(ge=1, le=MOST_SPEED)] = 1.0


class EventArguments(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Of ``cancel`` and ``approve``."""

    event_id: str


class ExpectArguments(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Of ``expect``."""

    expectations: tuple[str, ...]


class FaultArguments(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Of ``fault``."""

    fault: str


class CallDispatcher:
    """The calls that need no program; each has a method of its name."""

    def __init__(self, simulation: FleetSimulation) -> None:
        self._simulation = simulation

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
                return await self._simulation.rollouts.order(_order_in(arguments))
            case "cancel":
                return await self._simulation.rollouts.cancel(
                    msgspec.convert(arguments, EventArguments).event_id
                )
            case "approve":
                return await self._simulation.rollouts.approve(
                    msgspec.convert(arguments, EventArguments).event_id
                )
            case "wait":
                return await self._wait(msgspec.convert(arguments, WaitArguments))
            case "expect":
                return await self._expect(msgspec.convert(arguments, ExpectArguments))
            case "fault":
                return self._simulation.add_fault(
                    parse_fault(msgspec.convert(arguments, FaultArguments).fault)
                )
            case "no_faults":
                return self._simulation.clear_faults()
            case "state":
                return self._simulation.report()
            case "text":
                return "\n".join(text_lines(self._simulation.report()))
        return await self._call_rollouts(name, arguments)

    async def _call_rollouts(self, name: str, arguments: Mapping[str, Any]) -> Any:
        match name:
            case "roll":
                return await self._simulation.rollouts.roll(_order_in(arguments))
            case "cancel_rollout":
                given = msgspec.convert(arguments, RolloutArguments)
                return await self._simulation.rollouts.cancel_rollout(given.rollout_id)
            case "wait_rollout":
                return await self._wait_rollout(msgspec.convert(arguments, RolloutArguments))
            case "play":
                return await self._play(msgspec.convert(arguments, PlayArguments))
        raise BadCall(f"there is no call {name!r}")

    async def _wait_rollout(self, arguments: RolloutArguments) -> RolloutRecord:
        record = self._simulation.rollouts.find(arguments.rollout_id)
        timeout_s = None if arguments.timeout is None else seconds_in(arguments.timeout)
        if not await self._simulation.until(lambda: record.ended is not None, timeout_s):
            raise StepMissed(
                f"{record.waves_begun} of {len(record.waves)} update domains were begun "
                f"{self._simulation.now - record.began:.1f} s after the rollout"
            )
        if record.outcome == "failed":
            raise StepMissed(f"the rollout halted: {record.why}")
        return record

    async def _play(self, arguments: PlayArguments) -> ScenarioRecord:
        simulation = self._simulation
        scenario = await in_thread("scenario", lambda: read_scenario(arguments.scenario))
        scenario.check_members(list(simulation.slots.values()))
        before, earlier = simulation.rollouts.speed, len(simulation.events)
        simulation.rollouts.speed = arguments.speed
        try:
            player = ScenarioPlayer(simulation, scenario)
            await player.play()
        finally:
            simulation.rollouts.speed = before
        verdicts = judge_all(
            simulation.events[earlier:], [], [], scenario.expectations, player.record, list(simulation.slots)
        )
        failed = [f"{each.what}: {each.detail}" for each in verdicts if not each.held]
        if failed:
            raise StepMissed("; ".join(failed))
        return player.record

    async def _wait(self, arguments: WaitArguments) -> EventRecord:
        record = self._simulation.observations.events.get(arguments.event_id.lower())
        if record is None:
            raise UnknownEvent(f"there is no event {arguments.event_id}")
        usual_s = record.not_before + record.impact_s + _PATIENCE_S - self._simulation.now
        timeout_s = usual_s if arguments.timeout is None else seconds_in(arguments.timeout)

        def reached() -> bool:
            return instant_of(record, arguments.step) is not None

        await self._simulation.until(lambda: reached() or bool(record.outcome), max(timeout_s, 0.0))
        if record.outcome == "failed":
            raise StepMissed(f"the {record.event} failed: {record.why}")
        if not reached():
            raise StepMissed(missed(record, arguments.step, self._simulation.now))
        return record

    async def _expect(self, arguments: ExpectArguments) -> None:
        expectations = [parse_expectation(each) for each in arguments.expectations]
        records = self._simulation.events
        usual_s = max((each.not_before + each.impact_s for each in records), default=0.0) + _PATIENCE_S
        rollouts = list(self._simulation.observations.rollouts.values())
        await self._simulation.until(lambda: all(each.ended is not None for each in rollouts), None)
        await self._simulation.until(
            lambda: all(each.outcome for each in records), max(usual_s - self._simulation.now, 0.0)
        )
        failed = [each for each in self._simulation.report(expectations).verdicts if not each.held]
        if failed:
            raise StepMissed("; ".join(f"{each.what}: {each.detail}" for each in failed))


def _order_in(arguments: Mapping[str, Any]) -> Order:
    """The order, whose times may be texts such as 5s. Raises OrderRefused and ValueError."""
    given = dict(arguments)
    for name in ("notice_s", "duration_s", "checks_s", "grace_s", "soak_s"):
        if given.get(name) is not None:
            given[name] = seconds_in(given[name])
    return order_from(given)


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
