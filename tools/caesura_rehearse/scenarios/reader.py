"""Reads scenario files: what is wrong with one is said with its line, before anything is started. Parsing is pure; reading is one call."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from caesura.contract.names import InvalidName, check_name
from caesura.runtime.errors import ConfigError
from caesura.runtime.toml_lines import KeyPath, key_lines, line_of, path_in, syntax_error_at
from caesura.runtime.validation_errors import describe_error
from caesura_rehearse.durations import seconds_in
from caesura_rehearse.results.expectations import BadExpectation, parse_expectation
from caesura_rehearse.scenarios.file_format import KEYS, KINDS, PauseTable, ScenarioTable, SetTable, StepTable
from caesura_rehearse.scenarios.scenario import (
    FaultStep,
    OnEventStep,
    OrderStep,
    Scenario,
    ScenarioError,
    Step,
)
from caesura_rehearse.simulation.faults import BadFault, parse_fault
from caesura_rehearse.simulation.members import MOST_VMS, SetMember, hint_for, members_of
from caesura_rehearse.simulation.orders import Order

SHIPPED = Path(__file__).parent
"""The folder of the scenarios that come with the package."""


def read_scenario(word: str) -> Scenario:
    """The scenario in a file, or the shipped one of this name.

    Args:
        word: a path with a slash in it or ``.toml`` at its end, or a name.

    Raises:
        ScenarioError: it cannot be used; the text says where and why.
        ConfigError: there is no shipped one of this name.
    """
    path = Path(word)
    if "/" not in word and path.suffix != ".toml":
        path = shipped_file(word)
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ScenarioError(word, 0, f"it is not UTF-8: {error.reason} at byte {error.start}") from error
    except OSError as error:
        raise ScenarioError(word, 0, f"cannot be read: {error.strerror or error}") from error
    return parse_scenario(text, word)


def shipped_names() -> list[str]:
    """The scenarios that come with the package."""
    return sorted(path.stem for path in SHIPPED.glob("*.toml"))


def shipped_file(name: str) -> Path:
    """The file of a shipped scenario. Raises ConfigError: there is none of this name."""
    if name not in (known := shipped_names()):
        raise ConfigError(
            f"there is no scenario {name!r}{hint_for(name, known)}; a file of your own is named with its path: ./{name}.toml"
        )
    return SHIPPED / f"{name}.toml"


def parse_scenario(text: str, file: str) -> Scenario:
    """The scenario in ``text``.

    Raises:
        ScenarioError: naming ``file`` and the line.
    """
    try:
        raw = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ScenarioError(file, *syntax_error_at(text, error)) from error
    try:
        table = msgspec.convert(raw, ScenarioTable)
    except msgspec.ValidationError as error:
        line, reason = _validation_error(text, error)
        raise ScenarioError(file, line, reason) from error
    return _TableReader(text, file).scenario(table)


_UNKNOWN = "Object contains unknown field `"


def _validation_error(text: str, error: msgspec.ValidationError) -> tuple[int, str]:
    """The line, and what is wrong in words of TOML."""
    what, _, place = str(error).partition(" - at `")
    path = path_in(place.removesuffix("`"))
    lines = key_lines(text)
    if what.startswith(_UNKNOWN):
        key = what.removeprefix(_UNKNOWN).removesuffix("`")
        known = _keys_at(path)
        return line_of(lines, (*path, key)), f"there is no key {key!r} here{hint_for(key, known)}"
    shown = ".".join(str(each) for each in path if isinstance(each, str))
    reason = describe_error(error, ScenarioTable).partition(" - at `")[0].replace("Object", "It")
    reason = reason.replace("`object`", "a table").replace("`array`", "an array").replace(" | null`", "`")
    return line_of(lines, path), f"{shown}: {reason}" if shown else reason


def _keys_at(path: KeyPath) -> list[str]:
    tables: dict[str, type[msgspec.Struct]] = {"set": SetTable, "step": StepTable, "pauses": PauseTable}
    names = [each for each in path if isinstance(each, str)]
    kind = tables[names[-1]] if names and names[-1] in tables else ScenarioTable
    return [field.encode_name for field in msgspec.structs.fields(kind)]


class _TableReader:
    """Makes a scenario of a file's tables.

    Args:
        text: of the file, for its lines.
        file: its name in errors.
    """

    def __init__(self, text: str, file: str) -> None:
        self._lines = key_lines(text)
        self._file = file
        self._events: dict[str, OrderStep] = {}
        self._latest = ("", 0.0)
        """The time of the latest step so far, as written, and in seconds."""

    def _fail(self, reason: str, *path: str | int) -> ScenarioError:
        return ScenarioError(self._file, line_of(self._lines, path), reason)

    def _seconds(self, value: float | str, *path: str | int) -> float:
        try:
            seconds = seconds_in(value)
        except ValueError as error:
            raise self._fail(f"{path[-1]}: {error}", *path) from error
        if not 0 <= seconds <= 7 * 86400:
            raise self._fail(f"{path[-1]}: {value} is not between 0s and a week", *path)
        return seconds

    def scenario(self, table: ScenarioTable) -> Scenario:
        members = self._members(table.set)
        scenario = Scenario(
            file=self._file,
            title=table.title,
            members=members,
            expectations=tuple(self._parsed(parse_expectation, each, "expect") for each in table.expect),
            faults=tuple(self._parsed(parse_fault, each, "fault") for each in table.fault),
            steps=tuple(self._step(step, index) for index, step in enumerate(table.step)),
        )
        if members:
            scenario.check_members(members)
        return scenario

    def _parsed(self, parse: Any, text: str, *path: str | int) -> Any:
        try:
            return parse(text)
        except (BadExpectation, BadFault) as error:
            raise self._fail(str(error), *path) from error

    def _members(self, sets: Sequence[SetTable]) -> tuple[SetMember, ...]:
        members: list[SetMember] = []
        for index, each in enumerate(sets):
            try:
                check_name("set", each.name)
            except InvalidName as error:
                raise self._fail(str(error), "set", index, "name") from error
            if any(each.name == other.name for other in sets[:index]):
                raise self._fail(f"the set {each.name} is there twice", "set", index, "name")
            members += members_of(each.name, each.vms, each.update_domains)
            if len(members) > MOST_VMS:
                raise self._fail(f"these are {len(members)} VMs; there may be {MOST_VMS}", "set", index)
        return tuple(members)

    def _step(self, step: StepTable, index: int) -> Step:
        given = [
            field.name
            for field in msgspec.structs.fields(StepTable)
            if getattr(step, field.name) not in (None, ())
        ]
        kinds = [each for each in given if each in KINDS]
        if len(kinds) != 1:
            what = f"this has {' and '.join(kinds)}" if kinds else "this has none"
            raise self._fail(f"a step has exactly one of {', '.join(KINDS)}: {what}", "step", index)
        (kind,) = kinds
        for key in given:
            if key != kind and key not in KEYS[kind]:
                raise self._fail(
                    f"{key} says nothing in a step with {kind}: it may have {', '.join(KEYS[kind])}",
                    "step",
                    index,
                    key,
                )
        line = line_of(self._lines, ("step", index))
        match kind:
            case "event":
                return self._event(step, index, line)
            case "fault" | "no_faults":
                fault = self._parsed(parse_fault, step.fault, "step", index, "fault") if step.fault else None
                return FaultStep(line=line, at_s=self._at(step, index), fault=fault)
            case _:
                return self._on_event(step, index, line, kind)

    def _at(self, step: StepTable, index: int) -> float | None:
        if step.at is None:
            return None
        at_s = self._seconds(step.at, "step", index, "at")
        self._in_order(at_s, str(step.at), index, "at")
        return at_s

    def _in_order(self, at_s: float, shown: str, index: int, key: str) -> None:
        before, before_s = self._latest
        if at_s < before_s:
            raise self._fail(
                f"steps are in the order of time: this one is at {shown}, the one before it at {before}",
                "step",
                index,
                key,
            )
        self._latest = (shown, at_s)

    def _event(self, step: StepTable, index: int, line: int) -> OrderStep:
        def seconds(key: str) -> float | None:
            value = getattr(step, key)
            return None if value is None else self._seconds(value, "step", index, key)

        if step.event != "Freeze":
            for key in ("duration", "pauses"):
                if getattr(step, key) not in (None, ()):
                    raise self._fail(
                        f"{key} is for a Freeze: a {step.event} ends the program", "step", index, key
                    )
        given: dict[str, Any] = {
            "event": step.event,
            "notice_s": seconds("notice"),
            "duration_s": seconds("duration"),
            "checks_s": seconds("checks"),
            "grace_s": seconds("grace"),
            "soak_s": seconds("soak"),
            "later_pauses": [
                {
                    "after_s": self._seconds(each.after, "step", index, "pauses", number, "after"),
                    "duration_s": self._seconds(each.duration, "step", index, "pauses", number, "duration"),
                }
                for number, each in enumerate(step.pauses)
            ],
            "vms": step.vms,
            "sets": step.sets,
            "source": step.source,
            "description": step.description,
            "shown_duration_s": step.shown_duration,
            "approval_starts": step.approval_starts,
        }
        name = step.name or f"step {index + 1}"
        if name in self._events:
            raise self._fail(f"there are two events {name!r}", "step", index, "name")
        order = self._order({key: value for key, value in given.items() if value is not None}, index)
        found = OrderStep(line=line, at_s=self._at(step, index), name=name, order=order)
        self._events[name] = found
        return found

    def _order(self, given: dict[str, Any], index: int) -> Order:
        try:
            return msgspec.convert(given, Order)
        except msgspec.ValidationError as error:
            what, _, place = str(error).partition(" - at `")
            path = path_in(place.removesuffix("`"))
            key = {"later_pauses": "pauses"}.get(str(path[0]), str(path[0]).removesuffix("_s"))
            number = [each for each in path[1:2] if isinstance(each, int)]
            inner = [str(each).removesuffix("_s") for each in path[2:3]]
            reason = what.replace("Expected `float`", "it must be a number of seconds")
            raise self._fail(
                f"{'.'.join((key, *inner))}: {reason}", "step", index, key, *number, *inner
            ) from error

    def _on_event(self, step: StepTable, index: int, line: int, kind: str) -> OnEventStep:
        name = str(getattr(step, kind))
        event = self._events.get(name)
        if event is None:
            raise self._fail(
                f"no step before has an event {name!r}{hint_for(name, list(self._events))}",
                "step",
                index,
                kind,
            )
        after_s = 0.0 if step.after is None else self._seconds(step.after, "step", index, "after")
        notice_s = event.order.notice
        if after_s >= notice_s:
            raise self._fail(
                f"{name} starts {notice_s:g} s after its announcement: it cannot {kind} {after_s:g} s after it"
                if kind == "move"
                else f"{name} starts {notice_s:g} s after its announcement: to {kind} it {after_s:g} s after it is too late",
                "step",
                index,
                "after" if step.after is not None else kind,
            )
        if event.at_s is not None:
            self._in_order(event.at_s + after_s, f"{event.at_s + after_s:g} s", index, kind)
        by_s = 0.0
        if kind == "move":
            if (step.later is None) == (step.earlier is None):
                raise self._fail("move needs later or earlier", "step", index, "move")
            by_s = (
                self._seconds(step.later, "step", index, "later")
                if step.later is not None
                else -self._seconds(step.earlier or 0.0, "step", index, "earlier")
            )
        what: Any = kind
        return OnEventStep(line=line, what=what, name=name, after_s=after_s, by=step.by or "", by_s=by_s)
