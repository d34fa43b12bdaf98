"""``docker compose --profile ha up`` on a project that ran with SQLite: its coordinators share a PostgreSQL, and one continues the other's rollout."""

from __future__ import annotations

from typing import Any

import pytest

from caesura_testing.fleet import Fleet, until

_PROFILE = ("--profile", "ha")
_BUDGET_S = 15.0
_COORDINATORS = {"coordinator", "coordinator-2"}

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]


def _status(fleet: Fleet) -> dict[str, Any]:
    """Of each coordinator that is on the bus: its status by its name, and the epoch."""
    code, told, said = fleet.caesura("status")
    assert code == 0, said
    return {each["coordinator"]: each for each in told["coordinators"] if each["online"]} | {
        "epoch": told["coordinator"]["epoch"]
    }


def _leader(fleet: Fleet) -> str:
    """Who leads; empty while it is nobody. Of one that was killed the last word stays, with its epoch."""
    found = _status(fleet)
    leads = [name for name in _COORDINATORS & found.keys() if found[name]["leads"]]
    return next((name for name in leads if found[name]["epoch"] == found["epoch"]), "")


def _both(fleet: Fleet) -> bool:
    """Whether one leads, and the other would take over."""
    found = _status(fleet)
    waits = [found[name]["waits_for"] for name in _COORDINATORS & found.keys() if not found[name]["leads"]]
    return bool(_leader(fleet)) and waits == ["another coordinator leads"]


def test_a_leader_is_killed_and_the_other_continues_its_rollout(fleet: Fleet) -> None:
    project = fleet.project
    project.up("--build")  # the image of an earlier run is not this one
    fleet.quiet()  # what is under way in the one store is not in the other
    services = [each for each in project.services if each != "rollout"]
    second = 'up{job="caesura-coordinator", instance="coordinator-2:9301"}'
    assert fleet.query(second) == {}

    project.run(*_PROFILE, "up", "-d", "--wait", *services, "store", "database", "coordinator-2")

    until(lambda: _both(fleet), 90.0, lambda: f"one leads, one stands by: {_status(fleet)}")
    until(
        lambda: list(fleet.query(second).values()) == [1.0], 60.0, lambda: "Prometheus scrapes the second one"
    )
    epoch, leader = _status(fleet)["epoch"], _leader(fleet)
    (other,) = _COORDINATORS - {leader}
    words = ("--all", "--again", "--detach", "--notice", "5s", "--budget", "15s", "--soak", "1s")
    code, told, said = fleet.caesura("roll", "hypervisor-patch", *words)
    assert code == 0, (told, said)
    rollout = str(told["rollout"])
    with fleet.watched() as watch:
        until(
            lambda: bool(fleet.frozen()), 60.0, lambda: f"a VM stands still; {project.logs(leader)[-2000:]}"
        )
        project.run(*_PROFILE, "kill", leader)
        until(lambda: _leader(fleet) == other, 60.0, lambda: f"{other} leads: {_status(fleet)}")
        state = fleet.ended(rollout)
    assert state["status"] == "completed", state["reason"]
    assert {each.vm for each in watch.seen} == set(fleet.workloads())
    assert max(each.until - each.since for each in watch.seen) < _BUDGET_S
    assert _status(fleet)["epoch"] > epoch

    shown = project.run("run", "--rm", "-T", "caesura", "status").out
    assert f"{other}: leads" in shown
    assert f"{leader}: led with epoch {epoch}, it has sent nothing since" in shown
    project.run(*_PROFILE, "up", "-d", "--no-deps", leader)
    until(lambda: _both(fleet), 60.0, lambda: f"{leader} stands by: {_status(fleet)}")
    assert _leader(fleet) == other


def test_without_the_profile_the_store_stays_the_same_and_is_named_when_it_is_away(fleet: Fleet) -> None:
    """The other store knows nothing of this one's rollouts."""
    project = fleet.project
    project.run(*_PROFILE, "stop", "database", "coordinator-2")

    project.run("up", "-d", "--no-deps", "--force-recreate", "coordinator")

    def waits_for() -> str:
        return str(_status(fleet).get("coordinator", {}).get("waits_for", ""))

    until(
        lambda: "database" in waits_for(),
        60.0,
        lambda: f"it names the store: {waits_for()}; {project.logs('coordinator')[-2000:]}",
    )
    assert not _leader(fleet)
    project.run(*_PROFILE, "up", "-d", "--no-deps", "database", "coordinator-2")
    until(lambda: _both(fleet), 90.0, lambda: f"one leads, one stands by: {_status(fleet)}")
