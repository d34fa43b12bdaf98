"""Plays a scenario on a rehearsal: carries out each step when it is due, and waits until all is over."""

from __future__ import annotations

from caesura_rehearse.results.observations import RolloutRecord, ScenarioRecord, StepRecord
from caesura_rehearse.scenarios.scenario import FaultStep, OnEventStep, OrderStep, Scenario, Step
from caesura_rehearse.scenarios.script import Script, Wait
from caesura_rehearse.simulation.fleet_simulation import FleetSimulation
from caesura_rehearse.simulation.orders import OrderRefused


class ScenarioPlayer:
    """One performance.

    Args:
        simulation: with the scenario's VMs.
        scenario: whose members were checked.
    """

    def __init__(self, simulation: FleetSimulation, scenario: Scenario) -> None:
        self._simulation = simulation
        self._scenario = scenario
        self._script = Script(scenario.steps, simulation.rollouts.speed)
        self._rollouts: dict[str, RolloutRecord] = {}
        self._began = 0.0
        self.record = ScenarioRecord(
            file=scenario.file,
            title=scenario.title,
            steps=[StepRecord(line=step.line, what=describe_step(step)) for step in scenario.steps],
        )
        """What became of each step so far."""

    async def play(self) -> None:
        """Play it to its end, or until all programs have ended by themselves."""
        self._began = self._simulation.now
        for fault in self._scenario.faults:
            self._simulation.add_fault(fault)
        steps = iter(self.record.steps)
        while (due := self._next()) is not None:
            if isinstance(due, Wait):
                await self._wait(due)
                if self._gone():
                    break
                continue
            record = next(steps)
            record.at = self._simulation.now
            try:
                await self._perform(due)
            except OrderRefused as error:
                record.why = str(error)
        for record in steps:
            record.why = "not reached: the program ended before"
        await self._simulation.until(lambda: not self._open(), None)

    def _next(self) -> Step | Wait | None:
        announced = {name: each.began - self._began for name, each in self._rollouts.items()}
        return self._script.next(self._simulation.now - self._began, announced, self._open())

    def _open(self) -> set[str]:
        """The names of the events that are not over."""
        return {name for name, each in self._rollouts.items() if each.ended is None}

    def _gone(self) -> bool:
        """Whether all programs have ended by themselves."""
        programs = self._simulation.programs
        return bool(programs) and all(each.exited is not None for each in programs)

    async def _wait(self, wait: Wait) -> None:
        before = self._open()
        timeout_s = (
            None if wait.until_s is None else max(wait.until_s + self._began - self._simulation.now, 0.0)
        )
        await self._simulation.until(lambda: self._open() != before or self._gone(), timeout_s)

    async def _perform(self, step: Step) -> None:
        match step:
            case OrderStep():
                self._rollouts[step.name] = await self._simulation.rollouts.roll(step.order)
            case FaultStep(fault=None):
                self._simulation.clear_faults()
            case FaultStep(fault=fault) if fault is not None:
                self._simulation.add_fault(fault)
            case OnEventStep():
                await self._on_event(step)

    async def _on_event(self, step: OnEventStep) -> None:
        rollouts = self._simulation.rollouts
        events = rollouts.open_events(self._rollouts[step.name].rollout_id)
        if not events:
            raise OrderRefused(f"{step.name} is over already")
        for event in events:
            match step.what:
                case "cancel":
                    await rollouts.cancel(event.event_id)
                case "approve":
                    await rollouts.approve(event.event_id, step.by or "rehearse")
                case "move":
                    await rollouts.move(event.event_id, step.by_s)
            if step.what == "cancel":
                break  # with the others of its wave


def describe_step(step: Step) -> str:
    """A step in a few words."""
    match step:
        case OrderStep():
            return f"{step.order.event} {step.name}"
        case OnEventStep():
            return f"{step.what} {step.name}"
        case FaultStep():
            return "no_faults" if step.fault is None else f"fault {step.fault}"
