"""VMs in Proxmox's layout under the real services; QEMU's own events are the witness, and another client is never kept waiting."""

from __future__ import annotations

import asyncio
import os
import subprocess
import time
from typing import Any

import pytest

from caesura.contract import messages as m
from caesura_testing.found_fleets import BUDGET_S, begin_long_pause, outcome_of, report_of, vm_of
from caesura_testing.patience import patient

MOST_WAIT_S = 0.2
"""s: how long Proxmox's own tools may be kept waiting."""


def _paused(fleet: Any) -> set[str]:
    return {fleet.pids[pid] for node in fleet.nodes for pid in list(node.events.paused)}


def _pauses(fleet: Any) -> list[tuple[str, float]]:
    return [(fleet.pids[pid], end - begin) for node in fleet.nodes for pid, begin, end in node.events.pauses]


def _assert_nobody_waited(fleet: Any) -> None:
    assert not fleet.status.errors
    assert fleet.status.waits
    assert max(fleet.status.waits) < patient(MOST_WAIT_S), sorted(fleet.status.waits)[-5:]


async def _long(fleet: Any) -> str:
    return await begin_long_pause(fleet, lambda: _paused(fleet), "vm-100", "vm-101")


async def test_a_rollout_over_two_nodes(fleet: Any) -> None:
    state = await fleet.ended(await fleet.roll(budget_s=BUDGET_S, on_unproven="proceed"))
    assert state.status == "completed", state.reason
    assert sorted(vm for vm, _ in _pauses(fleet)) == ["vm-100", "vm-101", "vm-200"]
    assert max(pause_s for _, pause_s in _pauses(fleet)) < patient(BUDGET_S)
    ends = {fleet.pids[pid]: (begin, end) for node in fleet.nodes for pid, begin, end in node.events.pauses}
    assert ends["vm-100"][1] < ends["vm-200"][0], "one update domain after the other"
    first, second = fleet.nodes
    assert first.status(100) == first.status(101) == second.status(200) == "running"
    fleet.assert_one_end_each()
    inventory = fleet.fleet_view.hosts["host-1"]
    assert inventory.driver == "proxmox"
    assert "vm-100 is web" in inventory.driver_detail
    _assert_nobody_waited(fleet)


async def test_an_updater_that_is_killed_in_the_pause_leaves_its_vms_to_the_guard(fleet: Any) -> None:
    rollout = await _long(fleet)
    sandbox = fleet.sandbox
    began = time.monotonic()
    await sandbox.kill("host-1")
    await sandbox.until(lambda: not _paused(fleet), BUDGET_S, "the guard resumed them")
    assert time.monotonic() - began < patient(4.0), "at once, not at the deadline"
    assert fleet.nodes[0].status(100) == fleet.nodes[0].status(101) == "running"
    await sandbox.start("host-1")
    state = await fleet.ended(rollout)
    assert state.status == "halted"
    report = report_of(fleet)
    assert {each.resumed_by for each in report.vms} == {"guard"}
    assert "updater_died" in report.codes
    _assert_nobody_waited(fleet)


async def test_a_backup_begins_in_the_pause(fleet: Any) -> None:
    """It is named, and the VM is resumed: it was paused by us, and the backup would leave it paused."""
    rollout = await _long(fleet)
    first = fleet.nodes[0]
    first.set_lock(100, "backup")
    await fleet.sandbox.until(
        lambda: "lock: backup" in vm_of(fleet, "host-1", "vm-100").state_detail, 10, "the lock is shown"
    )
    await fleet.ended(rollout)
    web = outcome_of(fleet, "vm-100")
    assert "locked by Proxmox (backup)" in web.detail
    assert first.status(100) == first.status(101) == "running"
    assert "freeze" in vm_of(fleet, "host-1", "vm-100").methods_missing


@pytest.mark.parametrize("what", ["resumes", "migrates", "ends"])
async def test_somebody_else_in_the_middle_of_a_pause(fleet: Any, what: str) -> None:
    """Nothing of ours undoes it, it is reported, and the rollout does not go on as if nothing had been."""
    rollout = await _long(fleet)
    first = fleet.nodes[0]
    if what == "resumes":
        first.qmp(100, "cont")
    elif what == "migrates":
        first.set_lock(100, "migrate")
        first.qmp(100, "migrate", uri="exec:cat > /dev/null")
        await fleet.sandbox.until(lambda: first.status(100) == "postmigrate", 10, "it is migrated")
        first.move_away(100)
        first.kill(100)
    else:
        first.kill(100)
    state = await fleet.ended(rollout)
    assert state.status == "halted", state.reason
    error = outcome_of(fleet, "vm-100").error
    if what == "resumes":
        assert "somebody else resumed it" in error
    elif what == "migrates":
        assert "migrated away" in error
        await fleet.sandbox.until(
            lambda: vm_of(fleet, "host-1", "vm-100") is None, 10, "it is another node's VM"
        )
    else:
        assert "ended while it was paused" in error
    assert first.status(101) == "running"
    assert "vm-101" not in _paused(fleet)


async def test_a_locked_vm_keeps_a_rollout_from_pausing_anything_of_its_host(fleet: Any) -> None:
    first = fleet.nodes[0]
    first.set_lock(100, "snapshot")
    await fleet.sandbox.until(
        lambda: "lock: snapshot" in vm_of(fleet, "host-1", "vm-100").methods_missing.get("freeze", ""),
        10,
        "the lock is shown",
    )
    answer = await fleet.session.ask(
        m.RolloutRequested(
            request="locked",
            update="patch",
            policy=fleet.policy(budget_s=BUDGET_S),
            limits=m.Limits(again=True),
        )
    )
    if answer.accepted:
        state = await fleet.ended(answer.rollout)
        assert state.status == "halted"
        assert "lock: snapshot" in state.reason
    else:
        assert "lock: snapshot" in answer.reason
    assert "vm-100" not in {vm for vm, _ in _pauses(fleet)}


async def test_the_doctor_looks_at_eachvm_of(fleet: Any) -> None:
    first = fleet.nodes[0]
    first.config(102, "mail", tags=("caesura-set-mail",))
    _, own = fleet.sandbox.environments["host-1"]
    process = await asyncio.create_subprocess_exec(
        "caesura", "doctor", "--no-broker", env={**os.environ, **own}, stdout=subprocess.PIPE
    )
    output = " ".join((await process.communicate())[0].decode().split())
    assert process.returncode == 1, output
    assert "vm-100, web is paused and resumed by" in output
    assert "vm-100, web has no guest agent" in output
    assert "in set mail and has no update domain" in output
