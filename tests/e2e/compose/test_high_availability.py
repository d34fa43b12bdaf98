"""``docker compose --profile ha up``: PostgreSQL and two coordinators, and a rollout that outlives the one that leads."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from caesura.bus.local_broker import free_port
from caesura_testing.compose import Project
from caesura_testing.containers import Engine
from caesura_testing.fake_images import WITHOUT_STAND_IN
from caesura_testing.fleet import Fleet, until

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

_NAMES = ("coordinator", "coordinator-2")


@pytest.fixture(scope="module")
def pair(docker: Engine, checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    ports = {name: free_port() for name in ("BROKER", "EXPORTER", "PROMETHEUS", "GRAFANA")}
    variables = {f"CAESURA_PORT_{name}": str(port) for name, port in ports.items()}
    project = Project(
        docker,
        checkout,
        "caesura-e2e-ha",
        # As --profile ha, for every command.
        {**variables, "CAESURA_ROLLOUTS": "off", "COMPOSE_PROFILES": "ha"},
        without=(*WITHOUT_STAND_IN, "prometheus"),
    )
    found = Fleet(project, ports, tmp_path_factory.mktemp("operator"))
    try:
        yield found
    finally:
        project.run("down", "--volumes", "--timeout", "60", check=False)


def coordinators(fleet: Fleet) -> dict[str, Any]:
    code, told, said = fleet.caesura("status")
    assert code == 0, said
    return {each["coordinator"]: each for each in told["coordinators"]}


def leader(fleet: Fleet) -> str:
    """Who leads while the other one stands by; empty: not yet."""
    found = coordinators(fleet)
    leads = [name for name in _NAMES if name in found and found[name]["online"] and found[name]["leads"]]
    waits = [
        name for name in _NAMES if name in found and found[name]["waits_for"] == "another coordinator leads"
    ]
    return leads[0] if len(leads) == len(waits) == 1 else ""


def test_a_rollout_outlives_the_coordinator_that_leads(pair: Fleet) -> None:
    pair.project.up()
    until(lambda: bool(leader(pair)), 120.0, lambda: f"one leads, one stands by: {coordinators(pair)}")
    first = leader(pair)
    (other,) = {*_NAMES} - {first}
    words = ("--notice", "5s", "--budget", "15s", "--soak", "1s", "--again", "--detach")
    code, told, said = pair.caesura("roll", "hypervisor-patch", "--all", *words)
    assert code == 0, (told, said)
    until(
        lambda: bool(pair.frozen()), 120.0, lambda: f"a VM stands still; {pair.project.logs(first)[-2000:]}"
    )

    pair.project.run("kill", first)

    until(
        lambda: pair.rollouts()[told["rollout"]]["status"] == "completed",
        240.0,
        lambda: f"the other one continues: {pair.rollouts()}; {pair.project.logs(other)[-3000:]}",
    )
    assert pair.frozen() == []
    assert coordinators(pair)[other]["leads"]

    pair.project.up()
    until(lambda: leader(pair) == other, 120.0, lambda: f"the first one stands by: {coordinators(pair)}")


def test_coordinators_keep_the_shared_store_without_the_profile(pair: Fleet) -> None:
    """One with a store of its own would take the fleet, and know nothing of the rollouts."""
    pair.project.run("stop", *_NAMES, "database")
    del pair.project.environ["COMPOSE_PROFILES"]
    try:
        pair.project.run("up", "-d", "--no-deps", "coordinator")
        until(
            lambda: "cannot use postgresql://database/caesura" in pair.project.logs("coordinator"),
            120.0,
            lambda: f"it waits for the shared one: {pair.project.logs('coordinator')[-2000:]}",
        )
    finally:
        pair.project.environ["COMPOSE_PROFILES"] = "ha"
