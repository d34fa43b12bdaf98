"""Scenario files: what they say, and what is wrong with one, with its line."""

from __future__ import annotations

import json
import tomllib

import jsonschema
import pytest
from click.testing import CliRunner

from caesura.runtime.errors import ConfigError
from caesura_rehearse.commands.rehearse import rehearse
from caesura_rehearse.scenarios.file_format import schema, schema_text
from caesura_rehearse.scenarios.reader import SHIPPED, parse_scenario, read_scenario, shipped_names
from caesura_rehearse.scenarios.scenario import FaultStep, OnEventStep, OrderStep, ScenarioError
from caesura_rehearse.simulation.members import members_of
from caesura_rehearse.simulation.orders import LaterPause

SCHEMA_FILE = SHIPPED / "scenario.schema.json"


def test_the_schema_file_is_fresh() -> None:
    assert SCHEMA_FILE.read_text(encoding="utf-8") == schema_text(), (
        "write it again: python -m caesura_rehearse.scenarios.file_format >tools/caesura_rehearse/scenarios/scenario.schema.json"
    )


@pytest.mark.parametrize("name", shipped_names())
def test_shipped_scenarios_can_be_used_and_fit_the_schema(name: str) -> None:
    assert read_scenario(name).title
    table = tomllib.loads((SHIPPED / f"{name}.toml").read_text(encoding="utf-8"))
    jsonschema.validate(table, schema(), jsonschema.Draft202012Validator)


@pytest.mark.parametrize(
    "text",
    ['step = [{}]', 'step = [{ event = "Freeze", cancel = "x" }]', 'step = [{ event = "Pause" }]', 'step = [{ event = "Freeze", x = 1 }]'],
)  # fmt: skip
def test_the_schema_refuses_what_the_command_refuses(text: str) -> None:
    table = tomllib.loads(f'title = "t"\n{text}')
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(table, schema())
    with pytest.raises(ScenarioError):
        parse_scenario(f'title = "t"\n{text}', "t.toml")


def test_what_a_file_says() -> None:
    found = parse_scenario(
        """
title = "all of it"
expect = ["approved", "web-2: seen"]
fault = ["slow 1s x1"]
[[set]]
name = "web"
vms = 3
update_domains = 2
[[step]]
event = "Freeze"
name = "first"
notice = "1m30s"
duration = 2.5
pauses = [{ after = "10s", duration = "1s" }]
sets = ["web"]
soak = "5s"
[[step]]
move = "first"
after = "10s"
earlier = "20s"
[[step]]
approve = "first"
after = "30s"
by = "web-3"
[[step]]
at = "1h"
fault = "web-1: 500 x2"
[[step]]
at = "1h"
no_faults = true
""",
        "x.toml",
    )
    assert [(each.vm, each.update_domain) for each in found.members] == [
        ("web-1", 0),
        ("web-2", 1),
        ("web-3", 0),
    ]
    event, move, approve, fault, end = found.steps
    assert isinstance(event, OrderStep)
    assert (event.line, event.order.notice, event.order.duration_s, event.order.soak_s) == (9, 90.0, 2.5, 5.0)
    assert event.order.later_pauses == (LaterPause(after_s=10.0, duration_s=1.0),)
    assert isinstance(move, OnEventStep)
    assert (move.after_s, move.by_s) == (10.0, -20.0)
    assert isinstance(approve, OnEventStep)
    assert approve.by == "web-3"
    assert isinstance(fault, FaultStep)
    assert (fault.at_s, str(fault.fault)) == (3600.0, "web-1: 500 x2")
    assert isinstance(end, FaultStep)
    assert end.fault is None
    assert [str(each) for each in (*found.expectations, *found.faults)] == [
        "approved",
        "web-2: seen",
        "slow 1s x1",
    ]


STEP = '[[step]]\nevent = "Freeze"\nname = "first"\nat = "10s"\nnotice = "60s"\n'


@pytest.mark.parametrize(
    ("text", "line", "says"),
    [
        ("[[step]]\nevent = ", 3, "Invalid value"),
        ("", 0, "missing required field `step`"),
        ("step = []", 2, "length >= 1"),
        ('[[stp]]\nevent = "Freeze"', 2, "there is no key 'stp' here, did you mean step?"),
        ('[[step]]\nevent = "Freeze"\nnotce = "5s"', 4, "there is no key 'notce' here, did you mean notice?"),
        ('[[step]]\nevent = "Pause"', 3, "step.event: Invalid enum value 'Pause': write 'Freeze'"),
        ("[[step]]\nevent = 5", 3, "step.event: Expected"),
        ('[[step]]\nevent = "Freeze"\nnotice = "soon"', 4, "notice: 'soon' is not a duration"),
        ('[[step]]\nevent = "Freeze"\nnotice = -1', 4, "is not between 0s and a week"),
        ('[[step]]\nevent = "Freeze"\nduration = "31s"', 4, "duration: it must be a number of seconds <= 27"),
        ('[[step]]\nevent = "Freeze"\n[[step.pauses]]\nafter = "1s"\nduration = "0s"', 6, "pauses.duration:"),
        ('[[step]]\nevent = "Reboot"\nduration = "5s"', 4, "duration is for a Freeze"),
        ('[[step]]\nat = "5s"', 2, "a step has exactly one of event, cancel, approve, move, fault, no_faults: this has none"),
        (STEP + 'cancel = "first"', 2, "this has event and cancel"),
        (STEP + '[[step]]\ncancel = "first"\nnotice = "5s"', 9, "notice says nothing in a step with cancel"),
        (STEP + '[[step]]\ncancel = "frist"', 8, "no step before has an event 'frist', did you mean first?"),
        (STEP + '[[step]]\ncancel = "first"\nafter = "60s"', 9, "to cancel it 60 s after it is too late"),
        (STEP + '[[step]]\nmove = "first"', 8, "move needs later or earlier"),
        (STEP + '[[step]]\nat = "9s"\nfault = "500"', 8, "steps are in the order of time: this one is at 9s, the one before it at 10s"),
        (STEP + STEP, 9, "there are two events 'first'"),
        (STEP + '[[step]]\nat = "20s"\nfault = "teapot"', 9, "is not a fault"),
        ('expect = ["sen"]\n' + STEP, 2, "is not an expectation"),
        ('[[set]]\nname = "web"\nvms = 0\n' + STEP, 4, "set.vms: Expected `int` >= 1"),
        ('[[set]]\nname = "web"\nvms = 51\n' + STEP, 4, "set.vms: Expected `int` <= 50"),
        ('[[set]]\nname = "web"\nvms = 30\n[[set]]\nname = "db"\nvms = 30\n' + STEP, 5, "these are 60 VMs; there may be 50"),
        ('[[set]]\nname = "web"\n[[set]]\nname = "web"\n' + STEP, 5, "the set web is there twice"),
        ('[[set]]\nname = "web"\n' + STEP + 'vms = ["web-2"]', 4, "there is no VM web-2 here, did you mean web-1?"),
        ('[[set]]\nname = "web"\n' + STEP + 'sets = ["wbe"]', 4, "there is no set wbe here, did you mean web?"),
        ('[[set]]\nname = "web"\nvms = 2\n' + STEP + 'vms = ["web-1", "web-2"]', 5, "two update domains of web"),
        ('[[set]]\nname = "web"\n' + STEP + '[[step]]\napprove = "first"\nby = "web-7"', 9, "there is no VM web-7 here"),
    ],
)  # fmt: skip
def test_an_error_has_its_line(text: str, line: int, says: str) -> None:
    with pytest.raises(ScenarioError) as caught:
        parse_scenario(f'title = "t"\n{text}', "x.toml")
    assert says in str(caught.value)
    assert caught.value.line == line, str(caught.value)
    assert str(caught.value).startswith(f"x.toml:{line}: " if line else "x.toml: ")
    assert "\n" not in str(caught.value)


def test_vms_of_the_command_line_are_checked_too() -> None:
    found = parse_scenario(f'title = "t"\n{STEP}vms = ["app-2"]', "x.toml")
    found.check_members(members_of("app", 2))
    with pytest.raises(ScenarioError, match=r"x\.toml:2: there is no VM app-2 here"):
        found.check_members(members_of("app", 1))


def test_files_that_there_are_not() -> None:
    with pytest.raises(ScenarioError, match=r"\./none\.toml: cannot be read: No such file"):
        read_scenario("./none.toml")
    with pytest.raises(
        ConfigError, match=r"did you mean host-update\? .*named with its path: \./host-updte\.toml"
    ):
        read_scenario("host-updte")


def test_the_list_and_its_files() -> None:
    run = CliRunner().invoke
    listed = run(rehearse, ["scenarios"]).output
    assert [line.split()[0] for line in listed.splitlines()] == shipped_names()
    whole = json.loads(run(rehearse, ["scenarios", "--json"]).output)["scenarios"]
    assert next(each["vms"] for each in whole if each["name"] == "three-domains") == [
        "app-1",
        "app-2",
        "app-3",
    ]
    assert run(rehearse, ["scenarios", "show", "cancelled"]).output == (SHIPPED / "cancelled.toml").read_text(
        encoding="utf-8"
    )
    assert json.loads(run(rehearse, ["scenarios", "schema"]).output) == json.loads(schema_text())
    assert "VMs: web-1, db-1" in run(rehearse, ["scenarios", "check", "two-sets"]).output
    for bad in (["show", "canceled"], ["check", "./none.toml"]):
        result = run(rehearse, ["scenarios", *bad])
        assert (result.exit_code, result.output.count("\n")) == (2, 1), result.output
