"""Coordinator, hosts and agents of different versions on one bus: each works with the other, or is refused by name before anything pauses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from caesura_testing.sandbox import Vm


@pytest.fixture
def fleet(mixed: Callable[..., Any]) -> Any:
    """A coordinator and two hosts with one VM each, of one set and two domains; not started."""
    return mixed(
        host_1=[Vm(name="web-1", set="web", update_domain=0)],
        host_2=[Vm(name="web-2", set="web", update_domain=1)],
    )


async def _up(fleet: Any, version: Any) -> None:
    for host in ("host-1", "host-2"):
        await fleet.up(host, version)


async def _acknowledged(fleet: Any, presence: dict[str, Any]) -> None:
    """Wait until both hosts obey this coordinator and their agents are on the bus."""

    def all_do() -> bool:
        agents = [fleet.wire.last.get(f"caesura/v1/vm/{vm}/presence", {}) for vm in ("web-1", "web-2")]
        return all(each.get("online") for each in agents) and all(
            (fleet.inventory(host)["epoch"], fleet.inventory(host)["coordinator"])
            == (presence["epoch"], presence["coordinator"])
            for host in ("host-1", "host-2")
        )

    await fleet.until(all_do, "both hosts have acknowledged the epoch, both agents are there")


async def _completes(fleet: Any, rollout: str) -> None:
    await fleet.until(
        lambda: fleet.rollout(rollout).get("status") in {"completed", "halted", "aborted"},
        "the rollout ends",
        60,
    )
    assert fleet.rollout(rollout)["status"] == "completed", fleet.rollout(rollout)["reason"]


async def test_the_order_of_an_upgrade_coordinator_first_then_hosts_and_agents_whenever_it_suits(
    fleet: Any, other: Any, this: Any
) -> None:
    presence = await fleet.coordinator_up(other)
    await _up(fleet, other)
    await _acknowledged(fleet, presence)
    answer = await fleet.ask()
    assert answer["accepted"], answer
    await _completes(fleet, answer["rollout"])
    pauses = len(fleet.sandbox.watch.pauses)
    agents = {vm: fleet.wire.last[f"caesura/v1/vm/{vm}/presence"]["boot_id"] for vm in ("web-1", "web-2")}

    # The coordinator: it opens the store of the version before.
    assert await fleet.sandbox.stop("coordinator") == 0
    newer = await fleet.coordinator_up(this)
    assert newer["epoch"] > presence["epoch"]
    await _acknowledged(fleet, newer)
    answer = await fleet.ask()
    if other.speaks:
        assert answer["accepted"], answer
        await _completes(fleet, answer["rollout"])
        pauses = len(fleet.sandbox.watch.pauses)
    else:
        assert not answer["accepted"]
        for host in ("host-1", "host-2"):
            assert f"{host}: its host updater is of a version that does not read" in answer["reason"]
        assert answer["codes"] == ["host_outdated"]
        assert sorted(each["host"] for each in fleet.logged("coordinator", "host.outdated")) == [
            "host-1",
            "host-2",
        ]

    # The hosts, one after the other; their VMs and the agents in them run on.
    assert await fleet.sandbox.stop("host-1") == 0
    await fleet.up("host-1", this)
    answer = await fleet.ask(plan_only=True)
    if not other.speaks:
        assert "host-2: its host updater is of a version" in answer["reason"]
        assert "host-1: its host updater is of a version" not in answer["reason"]
    assert await fleet.sandbox.stop("host-2") == 0
    await fleet.up("host-2", this)
    assert len(fleet.sandbox.watch.pauses) == pauses, "nothing was paused by the upgrade"
    await _acknowledged(fleet, newer)

    # Agents of the version before work with all that is newer: ready, clocks, boot ids.
    said = len(fleet.wire.heard)
    answer = await fleet.ask(
        policy={"notice_s": 1.0, "budget_s": 8.0, "on_unsynced": "halt", "on_not_ready": "halt"}
    )
    assert answer["accepted"], answer
    await _completes(fleet, answer["rollout"])
    assert len(fleet.sandbox.watch.pauses) == pauses + 2
    since = fleet.wire.heard[said:]
    for vm in ("web-1", "web-2"):
        assert any(topic == f"caesura/v1/vm/{vm}/ready" and data["ready"] for topic, data in since)
        verdicts = [data for topic, data in since if topic.endswith(f"/vm/{vm}/clock-synced")]
        assert [(each["synced"], each["by"]) for each in verdicts if "by" in each] == [(True, "agent")]
        now = fleet.wire.last[f"caesura/v1/vm/{vm}/presence"]
        assert now["boot_id"] == agents[vm], "it is still the agent of the version before"
    assert not fleet.sandbox.watch.clashes(fleet.sandbox.places)


async def test_a_coordinator_of_another_version_over_hosts_of_this_one(
    fleet: Any, other: Any, this: Any
) -> None:
    """Hosts were upgraded first, or the coordinator was set back: it pauses nothing, and both sides say why."""
    presence = await fleet.coordinator_up(other)
    await _up(fleet, this)
    if other.speaks:
        await _acknowledged(fleet, presence)
        answer = await fleet.ask()
        await _completes(fleet, answer["rollout"])
        return
    await fleet.until(
        lambda: all(
            "upgrade the coordinator" in fleet.inventory(host)["refused_epoch"]
            for host in ("host-1", "host-2")
        ),
        "both hosts refuse it by name",
    )
    for host in ("host-1", "host-2"):
        assert fleet.inventory(host)["coordinator"] == ""
        (line,) = fleet.logged(host, "coordinator.outdated")
        assert presence["coordinator"] in line["why"]
    answer = await fleet.ask()
    assert answer["accepted"], answer
    rollout = answer["rollout"]
    await fleet.until(
        lambda: any(
            "upgrade the coordinator" in wave["reason"] for wave in fleet.rollout(rollout).get("waves", ())
        ),
        "the old coordinator shows what it waits for",
    )
    assert fleet.sandbox.watch.pauses == []

    # It is upgraded in place, in the middle of that rollout: nothing is lost, and the rollout is carried out.
    assert await fleet.sandbox.stop("coordinator") == 0
    newer = await fleet.coordinator_up(this)
    await _acknowledged(fleet, newer)
    await fleet.until(
        lambda: fleet.rollout(rollout).get("status") in {"completed", "halted"}, "the rollout ends", 60
    )
    assert fleet.rollout(rollout)["status"] == "completed", fleet.rollout(rollout)["reason"]
    assert len(fleet.sandbox.watch.pauses) == 2
    assert all(fleet.inventory(host)["refused_epoch"] == "" for host in ("host-1", "host-2"))
