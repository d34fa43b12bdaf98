"""Containers as VMs of the real services: a rollout, and a host updater that is killed in the pause; the kernel is the witness."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Callable
from itertools import groupby
from typing import Any

import pytest

from caesura.contract import messages as m
from caesura_host_updater.drivers.container.cgroup import read_freezer
from caesura_testing.containers import Engine
from caesura_testing.patience import patient
from caesura_vmcontrol.resume_plans import CgroupPlan
from caesura_vmcontrol.vm_control import condition

BUDGET_S = 6.0


class Freezers:
    """The containers' freezers, looked at all the time."""

    def __init__(self, pids: dict[str, int]) -> None:
        self._plans = {vm: CgroupPlan(vm, *read_freezer(pid)) for vm, pid in pids.items()}
        self.seen: list[tuple[str, ...]] = []
        """Which VMs were paused at once, each time that this changed."""
        self.longest_s = 0.0

    def frozen(self) -> tuple[str, ...]:
        return tuple(vm for vm, plan in self._plans.items() if condition(plan) in ("frozen", "held"))

    async def watch(self) -> None:
        since: dict[str, float] = {}
        while True:
            now, frozen = time.monotonic(), self.frozen()
            if not self.seen or self.seen[-1] != frozen:
                self.seen.append(frozen)
            for vm in set(since) - set(frozen):
                del since[vm]
            for vm in frozen:
                self.longest_s = max(self.longest_s, now - since.setdefault(vm, now))
            await asyncio.sleep(0.005)


@pytest.fixture
async def fleet(
    stages: Callable[..., Any], docker: Engine, run_container: Callable[..., str], inspect: Any
) -> Any:
    """A coordinator and two hosts with a container each, of two domains of one set."""
    stage = await stages(up=False)
    pids = {}
    for number in (1, 2):
        container = run_container()
        stage.sandbox.container_host(
            f"host-{number}", str(docker.socket), {f"web-{number}": (container, "web", number - 1)}
        )
        pids[f"web-{number}"] = int(inspect(container, "{{.State.Pid}}"))
    await stage.up("host-1", "host-2")
    stage.freezers = Freezers(pids)
    watching = asyncio.create_task(stage.freezers.watch())
    yield stage
    watching.cancel()
    await asyncio.gather(watching, return_exceptions=True)


async def test_a_rollout_over_containers(fleet: Any) -> None:
    state = await fleet.ended(await fleet.roll(budget_s=BUDGET_S, on_unproven="proceed"))
    assert state.status == "completed", state.reason
    # While it freezes a cgroup of version 1, runc thaws it for a moment now and then (libcontainer, fs/freezer.go): one pause all the same.
    assert [each for each, _ in groupby(filter(None, fleet.freezers.seen))] == [("web-1",), ("web-2",)]
    assert fleet.freezers.longest_s < patient(BUDGET_S)
    fleet.assert_one_end_each()
    inventory = fleet.fleet_view.hosts["host-1"]
    assert inventory.driver == "container"
    assert inventory.driver_detail.startswith("Docker ")


@pytest.mark.parametrize("engine_state", ["well", "hangs", "dead"])
async def test_an_updater_that_is_killed_in_the_pause_leaves_its_container_to_the_guard(
    fleet: Any, docker: Engine, engine_state: str
) -> None:
    sandbox = fleet.sandbox
    sandbox.update("long", ["sleep", "5"], expected_s=2.0)
    await sandbox.until(
        lambda: any(each.update == "long" for each in fleet.fleet_view.hosts["host-1"].updates),
        20,
        "the update",
    )
    rollout = await fleet.roll("long", budget_s=BUDGET_S, on_unproven="proceed")
    await sandbox.until(lambda: fleet.freezers.frozen() == ("web-1",), 20, "web-1 is paused")
    # And the engine has answered: killed before that, the pause is one that failed, and the updater's to undo.
    await sandbox.until(lambda: "web-1" in fleet.fleet_view.frozen, 20, "the updater has seen it paused")
    assert docker.daemon is not None
    if engine_state == "hangs":
        os.kill(docker.daemon.pid, signal.SIGSTOP)
    elif engine_state == "dead":
        docker.kill()
    try:
        began = time.monotonic()
        await sandbox.kill("host-1")
        await sandbox.until(lambda: not fleet.freezers.frozen(), BUDGET_S, "the guard resumed it")
        assert time.monotonic() - began < patient(2.0), "at once, not at the deadline"
    finally:
        if engine_state == "hangs":
            os.kill(docker.daemon.pid, signal.SIGCONT)
        elif engine_state == "dead":
            docker.start()
    await sandbox.start("host-1")
    state = await fleet.ended(rollout)
    assert state.status == "halted"
    (report,) = [
        each
        for each in fleet.fleet_view.reports.values()
        if each.host == "host-1" and isinstance(each, m.OperationReported)
    ]
    assert report.vms[0].resumed_by == "guard"
    assert "updater_died" in report.codes
    assert fleet.freezers.longest_s < patient(BUDGET_S)
    # Whatever the engine came to believe: the next pause works, and engine and kernel agree after it.
    await fleet.ready("host-1", "host-2")
    await fleet.give_up(rollout)
    state = await fleet.ended(await fleet.roll(budget_s=BUDGET_S, on_unproven="proceed"))
    assert state.status == "completed", state.reason
    assert fleet.freezers.frozen() == ()


async def test_a_guard_alone_keeps_the_deadline(fleet: Any, docker: Engine) -> None:
    """The updater is stopped, not dead: only the deadline speaks."""
    del docker
    sandbox = fleet.sandbox
    await fleet.roll(budget_s=2.0, on_unproven="proceed")
    await sandbox.until(lambda: fleet.freezers.frozen() == ("web-1",), 20, "web-1 is paused")
    sandbox.signal("host-1", signal.SIGSTOP)
    try:
        await sandbox.until(lambda: not fleet.freezers.frozen(), 5, "the guard resumed it")
        assert fleet.freezers.longest_s < patient(2.0)
    finally:
        sandbox.signal("host-1", signal.SIGCONT)
