"""The scenarios that come with the package, each played at speed with real programs."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from caesura_rehearse.scenarios.reader import shipped_names
from caesura_testing.rehearsing import Rehearsed

pytestmark = pytest.mark.e2e

PAUSES: dict[str, dict[str, list[float]]] = {
    "cancelled": {},
    "hardware-failure": {},
    "host-update": {"app-1": [9.0]},
    "live-migration": {"app-1": [5.0]},
    "network-blip": {},
    "second-impact": {"app-1": [9.0, 2.0]},
    "spot-eviction": {},
    "three-domains": {"app-1": [5.0], "app-2": [5.0], "app-3": [5.0]},
    "two-sets": {"web-1": [5.0], "db-1": [5.0]},
    "user-reboot": {},
}
"""Seconds for which each VM is paused."""
SEVERAL = {"three-domains": ("app-1", "app-2", "app-3"), "two-sets": ("web-1", "db-1")}


def gaps(report: dict[str, Any]) -> list[dict[str, Any]]:
    return [gap for event in report["events"] for gap in event["gaps"]]


@pytest.mark.parametrize("name", shipped_names())
def test_a_shipped_scenario_comes_about(tmp_path: Path, name: str) -> None:
    """With a program that approves what it sees."""
    vms = SEVERAL.get(name, ("app-1",))
    expected = (
        ["seen"] if name in ("cancelled", "hardware-failure") else ["seen", "approved", "drained-within 100s"]
    )
    options = [word for each in expected for word in ("--expect", each)]
    # At 3600 what is to be cancelled vanishes within the tenth of a second.
    speed = "60" if name == "cancelled" else "3600"
    options += ["--scenario", name, "--speed", speed, "--settle", "0s", "--json"]
    run = Rehearsed(tmp_path, options, "approve", place="{vm}")
    assert run.finish() == 0, run.said
    report = run.report()
    assert report["held"], report["verdicts"]
    verdicts = {(each["vm"], each["what"].split(": ")[-1]) for each in report["verdicts"]}
    assert {(vm if len(vms) > 1 else "", each) for vm in vms for each in expected} <= verdicts
    assert {each["outcome"] for each in report["events"]} == (
        {"cancelled"} if name == "cancelled" else {"completed"}
    )
    starts = {each["vm"]: each["starts"] for each in report["programs"]}
    assert starts == dict.fromkeys(vms, 2 if name in ("user-reboot", "hardware-failure") else 1)
    check_pauses(report, PAUSES[name])
    if check := CHECKS.get(name):
        check(report)
    if name in ("spot-eviction", "user-reboot"):
        assert run.read("app-1/terminated") == "yes"


def check_pauses(report: dict[str, Any], wanted: dict[str, list[float]]) -> None:
    found: dict[str, list[float]] = {}
    for gap in gaps(report):
        found.setdefault(gap["vm"], []).append(gap["seconds"])
    assert found.keys() == wanted.keys()
    for vm, seconds in wanted.items():
        assert len(found[vm]) == len(seconds)
        assert all(gap >= ordered - 0.02 for gap, ordered in zip(found[vm], seconds, strict=True))


def one_domain_after_the_other(report: dict[str, Any]) -> None:
    spans = [(gap["began"], gap["began"] + gap["seconds"]) for gap in gaps(report)]
    assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(spans)), "never two at once"
    lives = [(each["announced"], each["ended"]) for each in report["events"]]
    assert all(ended <= announced for (_, ended), (announced, _) in itertools.pairwise(lives))
    assert all(set(each["seen_by"]) == {"app-1", "app-2", "app-3"} for each in report["events"]), (
        "all VMs of the set see each event"
    )


def both_at_once(report: dict[str, Any]) -> None:
    web, db = gaps(report)
    assert max(web["began"], db["began"]) < min(web["began"] + web["seconds"], db["began"] + db["seconds"])
    assert {tuple(each["seen_by"]) for each in report["events"]} == {("web-1",), ("db-1",)}, (
        "each set has a document of its own"
    )


def never_started(report: dict[str, Any]) -> None:
    (event,) = report["events"]
    assert event["started"] is None
    assert event["approved_by"] == "app-1", "an approval does not start what waits for others"


def started_when_it_appeared(report: dict[str, Any]) -> None:
    (event,) = report["events"]
    assert event["started"] == event["announced"]
    assert {seen["EventStatus"] for each in report["deliveries"] for seen in each["events"]} == {"Started"}


CHECKS: dict[str, Callable[[dict[str, Any]], None]] = {
    "cancelled": never_started,
    "hardware-failure": started_when_it_appeared,
    "three-domains": one_domain_after_the_other,
    "two-sets": both_at_once,
}


def test_a_program_that_leaves_before_the_steps_are_reached(tmp_path: Path) -> None:
    scenario = tmp_path / "own.toml"
    scenario.write_text(
        """
title = "late"
[[step]]
event = "Terminate"
notice = "60s"
[[step]]
at = "1000s"
event = "Freeze"
"""
    )
    run = Rehearsed(tmp_path, ("--scenario", str(scenario), "--settle", "0s"), "leave")
    assert run.finish() == 1
    assert f"FAILED      {scenario}:6: Freeze step 2: not reached: the program ended before" in run.said


def test_a_bad_file_is_one_line_and_nothing_starts(tmp_path: Path) -> None:
    scenario = tmp_path / "own.toml"
    scenario.write_text('title = "t"\n[[step]]\nevnt = "Freeze"\n')
    run = Rehearsed(tmp_path, ("--scenario", str(scenario)), ("sh", "-c", f"touch {tmp_path}/started"))
    assert run.finish() == 2
    assert run.said.count("\n") == 1
    assert f"{scenario}:3: there is no key 'evnt' here, did you mean event?" in run.said
    assert not (tmp_path / "started").exists()
