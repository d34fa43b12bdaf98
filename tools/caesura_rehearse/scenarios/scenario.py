"""A scenario that can be played: which VMs there are, and what happens to them at which time. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import msgspec

from caesura.runtime.errors import ConfigError
from caesura_rehearse.results.expectations import Expectation
from caesura_rehearse.simulation.faults import Fault
from caesura_rehearse.simulation.members import Placed, SetMember, hint_for, plan_waves
from caesura_rehearse.simulation.orders import Order, OrderRefused


class ScenarioError(ConfigError):
    """A scenario that cannot be used; the text has file and line."""

    def __init__(self, file: str, line: int, reason: str) -> None:
        self.file = file
        self.line = line
        self.reason = reason
        super().__init__(f"{file}:{line}: {reason}" if line else f"{file}: {reason}")


class OrderStep(msgspec.Struct, frozen=True, kw_only=True, tag="event"):
    """Announces the events of an order."""

    line: int
    at_s: float | None
    name: str
    order: Order


class OnEventStep(msgspec.Struct, frozen=True, kw_only=True, tag="on event"):
    """Does something to the events of an earlier step."""

    line: int
    what: Literal["cancel", "approve", "move"]
    name: str
    """Of the event."""
    after_s: float
    by: str = ""
    """Of approve."""
    by_s: float = 0.0
    """Of move: seconds later."""


class FaultStep(msgspec.Struct, frozen=True, kw_only=True, tag="fault"):
    """One more fault, or the end of all."""

    line: int
    at_s: float | None
    fault: Fault | None
    """None: the end of all."""


Step = OrderStep | OnEventStep | FaultStep


class Scenario(msgspec.Struct, frozen=True, kw_only=True):
    """A scenario that can be played."""

    file: str
    title: str
    members: tuple[SetMember, ...]
    """Empty: the VMs of the command line."""
    steps: tuple[Step, ...]
    expectations: tuple[Expectation, ...] = ()
    faults: tuple[Fault, ...] = ()

    def check_members(self, members: Sequence[Placed]) -> None:
        """Whether what it names is among the VMs of the command line. Raises ScenarioError."""
        for step in self.steps:
            if isinstance(step, OrderStep):
                try:
                    plan_waves(step.order, members)
                except OrderRefused as error:
                    raise ScenarioError(self.file, step.line, str(error)) from error
            named = step.by if isinstance(step, OnEventStep) else ""
            named = step.fault.vm if isinstance(step, FaultStep) and step.fault else named
            known = [each.vm for each in members]
            if named and named not in known:
                raise ScenarioError(
                    self.file, step.line, f"there is no VM {named} here{hint_for(named, known)}"
                )
