"""Domains of two libvirtds as VMs of the real services; what libvirt itself says is the witness."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import time
from contextlib import suppress
from typing import Any

import pytest

from caesura.contract import messages as m
from caesura_testing.found_fleets import BUDGET_S, begin_long_pause, outcome_of, report_of, vm_of
from caesura_testing.patience import patient


async def _long(fleet: Any) -> str:
    return await begin_long_pause(fleet, lambda: fleet.witness.paused, "web-1", "db-1")


async def test_a_rollout_over_domains(fleet: Any) -> None:
    state = await fleet.ended(await fleet.roll(budget_s=BUDGET_S, on_unproven="proceed"))
    assert state.status == "completed", state.reason
    assert sorted(name for name, _, _ in fleet.witness.pauses) == ["db-1", "web-1", "web-2"]
    assert not any({"web-1", "web-2"} <= each for each in fleet.witness.at_once)
    assert max(end - begin for _, begin, end in fleet.witness.pauses) < patient(BUDGET_S)
    assert fleet.daemons[0].state("web-1") == fleet.daemons[1].state("web-2") == "running"
    fleet.assert_one_end_each()
    proven, private = outcome_of(fleet, "web-2", "host-2").memory, outcome_of(fleet, "web-1").memory
    assert proven.held == ("digest_equal", "sampled_digest_equal"), "its memory is a file"
    assert private.held == ()
    assert "private to its QEMU process" in private.detail
    inventory = fleet.fleet_view.hosts["host-1"]
    assert inventory.driver == "libvirt"
    assert inventory.driver_detail.startswith("libvirt ")


@pytest.mark.parametrize("daemon_state", ["well", "hangs", "dead"])
async def test_an_updater_that_is_killed_in_the_pause_leaves_its_domains_to_the_guard(
    fleet: Any, daemon_state: str
) -> None:
    rollout = await _long(fleet)
    sandbox, (first, _) = fleet.sandbox, fleet.daemons
    pid = first.process.pid
    if daemon_state == "hangs":
        os.kill(pid, signal.SIGSTOP)
    elif daemon_state == "dead":
        first.kill()
    try:
        began = time.monotonic()
        await sandbox.kill("host-1")
        await sandbox.until(
            lambda: all(_runs(first, name) for name in ("web-1", "db-1")), BUDGET_S, "the guard resumed them"
        )
        assert time.monotonic() - began < patient(4.0), "at once, not at the deadline"
    finally:
        if daemon_state == "hangs":
            os.kill(pid, signal.SIGCONT)
        elif daemon_state == "dead":
            first.start()
    await sandbox.until(lambda: first.state("web-1") == "running", 20, "libvirt knows that it runs")
    await sandbox.start("host-1")
    state = await fleet.ended(rollout)
    assert state.status == "halted"
    report = report_of(fleet)
    assert {each.resumed_by for each in report.vms} == {"guard"}
    assert "updater_died" in report.codes


async def test_libvirt_is_upgraded_in_the_pause(fleet: Any) -> None:
    """Its daemon ends and another one begins: the pause ends as if nothing had been."""
    rollout = await _long(fleet)
    first = fleet.daemons[0]
    first.process.terminate()
    first.process.wait()
    first.start()
    state = await fleet.ended(rollout)
    assert state.status == "completed", state.reason
    assert {each.resumed_by for each in report_of(fleet).vms} == {"updater"}
    assert first.state("web-1") == first.state("db-1") == "running"


def _runs(daemon: Any, name: str) -> bool:
    """As QEMU itself says at the domain's own QMP socket, which nobody else holds."""
    from caesura_vmcontrol.procfs import read_process  # noqa: PLC0415
    from caesura_vmcontrol.qmp import Qmp  # noqa: PLC0415

    pid = daemon.pid(name)
    assert read_process(pid) is not None
    until = time.monotonic() + 2
    with suppress(OSError), Qmp(str(daemon.own_qmp(name)), pid, until) as qmp:
        return bool(qmp.execute("query-status", until=until)["status"] == "running")
    return False


@pytest.mark.parametrize("what", ["resume", "destroy", "undefine"])
async def test_an_operator_in_the_middle_of_a_pause(fleet: Any, what: str) -> None:
    """It is his domain: nothing of ours undoes it, it is reported, and the rollout does not go on as if nothing had been."""
    rollout = await _long(fleet)
    first = fleet.daemons[0]
    if what == "undefine":
        first.virsh("destroy", "web-1")
    first.virsh(what, "web-1")
    state = await fleet.ended(rollout)
    assert state.status == "halted", state.reason
    web = outcome_of(fleet, "web-1")
    if what == "resume":
        assert first.state("web-1") == "running"
        assert "somebody else resumed it" in web.error
    else:
        assert "ended while it was paused" in web.error
    assert first.state("db-1") == "running"
    assert tuple(sorted(fleet.witness.paused)) != ("db-1", "web-1")
    if what == "undefine":
        await fleet.sandbox.until(
            lambda: vm_of(fleet, "host-1", "web-1") is None, 10, "web-1 is no VM any more"
        )


async def test_a_domain_that_is_started_again_in_its_pause_did_not_survive_it(fleet: Any) -> None:
    """It runs, and what its memory held is lost: nothing may take that for a resume."""
    rollout = await _long(fleet)
    first = fleet.daemons[0]
    first.virsh("destroy", "web-1")
    first.virsh("start", "web-1")
    state = await fleet.ended(rollout)
    assert state.status == "halted", state.reason
    web = outcome_of(fleet, "web-1")
    assert "ended while it was paused" in web.error
    # On a busy machine libvirt may take longer for the start than the operation lasts; tests/integration/libvirt waits for it.
    assert "started again in its pause" in web.detail or web.detail == "its domain does not run"
    assert first.state("web-1") == first.state("db-1") == "running"
    await fleet.sandbox.until(
        lambda: vm_of(fleet, "host-1", "web-1").state == "running",
        10,
        "after the operation it is a VM as any other",
    )


async def test_a_domain_that_is_migrated_in_its_pause(fleet: Any) -> None:
    """It arrives paused, as it was: that is named with the remedy, and the other host has it from then on."""
    rollout = await _long(fleet)
    first, second = fleet.daemons
    moving = first.migrate("web-1", second)
    output, _ = await asyncio.to_thread(moving.communicate)
    assert moving.returncode == 0, output
    state = await fleet.ended(rollout)
    assert state.status == "halted", state.reason
    web = outcome_of(fleet, "web-1")
    assert "migrated to another host in its pause" in web.error
    assert " resume web-1`" in web.error
    assert first.state("db-1") == "running"
    assert second.state("web-1") == "paused"
    until = fleet.sandbox.until
    await until(lambda: vm_of(fleet, "host-1", "web-1") is None, 10, "its definition alone is no VM")
    await until(lambda: vm_of(fleet, "host-2", "web-1") is not None, 10, "the other host has it")
    second.virsh("resume", "web-1")
    await until(lambda: vm_of(fleet, "host-2", "web-1").state == "running", 10, "it runs there")
    await fleet.give_up(rollout)
    # libvirt forgets why a domain is off when it is restarted: then two hosts name it, and the one that has it keeps it.
    first.kill()
    first.start()
    await until(lambda: vm_of(fleet, "host-1", "web-1") is not None, 20, "two hosts name it")
    answer = await fleet.session.ask(
        m.RolloutRequested(
            request="both", update="patch", plan_only=True, policy=fleet.policy(budget_s=BUDGET_S)
        )
    )
    assert answer.codes == ("host_in_two_domains",), "it brought its update domain with it"
    assert answer.reason.startswith("host-2: ")
    assert "web-1 in update_domain 0" in answer.reason


async def test_two_hosts_that_claim_one_domain(fleet: Any) -> None:
    """As after a restore or a copy: it belongs to the host that had it, and nothing that the other one says of it counts."""
    first, second = fleet.daemons
    second.define("db-1", label="set='db' update-domain='0'")
    await fleet.sandbox.until(lambda: vm_of(fleet, "host-2", "db-1") is not None, 10, "two hosts name it")
    rollout = await fleet.roll(budget_s=BUDGET_S, on_unproven="proceed")
    state = await fleet.ended(rollout)
    assert state.status == "halted"
    assert "db-1" in state.reason, "the host that may not have it does not pause it with its own"
    assert [name for name, _, _ in fleet.witness.pauses].count("db-1") == 1
    assert "web-2" not in {name for name, _, _ in fleet.witness.pauses}
    assert first.state("db-1") == second.state("db-1") == second.state("web-2") == "running"
    second.virsh("destroy", "db-1")
    second.virsh("undefine", "db-1")
    await fleet.sandbox.until(lambda: vm_of(fleet, "host-2", "db-1") is None, 10, "it is undefined")
    await fleet.give_up(rollout)
    state = await fleet.ended(await fleet.roll(budget_s=BUDGET_S, on_unproven="proceed"))
    assert state.status == "completed", state.reason


async def test_domains_come_and_go_and_are_labelled(fleet: Any) -> None:
    first = fleet.daemons[0]
    until = fleet.sandbox.until
    first.define("new.one")
    await until(lambda: vm_of(fleet, "host-1", "new-one") is not None, 10, "the new domain is a VM")
    assert vm_of(fleet, "host-1", "new-one").set == "_new-one"
    assert "freeze" in vm_of(fleet, "host-1", "new-one").methods

    def label(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["caesura", "libvirt", "label", "new.one", *words, "--uri", "qemu:///session", "--socket", str(first.socket)],
            capture_output=True, text=True, check=False,
        )  # fmt: skip

    assert label("--set", "web", "--update-domain", "4").returncode == 0
    await until(lambda: vm_of(fleet, "host-1", "new-one").update_domain == 4, 10, "its label is noticed")
    refused = label("--set", "mail", "--update-domain", "4", "--name", "no/name")
    assert refused.returncode == 1
    assert "no/name" in refused.stderr
    # A typo by hand: it is named, and nothing of it is paused.
    first.virsh(
        "metadata",
        "new.one",
        "--uri",
        "urn:caesura:libvirt",
        "--key",
        "caesura",
        "--set",
        "<vm sett='web'/>",
        "--live",
    )
    await until(lambda: "sett" in vm_of(fleet, "host-1", "new-one").state_detail, 10, "the typo is named")
    assert "caesura libvirt label new.one" in vm_of(fleet, "host-1", "new-one").methods_missing["freeze"]
    assert label("--set", "web", "--update-domain", "5").returncode == 0
    await until(lambda: "freeze" in vm_of(fleet, "host-1", "new-one").methods, 10, "it is mended")
    first.define("new-one", start=False)
    await until(
        lambda: "new.one" in fleet.fleet_view.hosts["host-1"].driver_detail,
        10,
        "two of one name: the exact one wins",
    )
    assert label("--name", "other").returncode == 0
    await until(lambda: vm_of(fleet, "host-1", "other") is not None, 10, "it has a name of its own")
    first.virsh("undefine", "new-one")
    await until(lambda: vm_of(fleet, "host-1", "new-one") is None, 10, "the one that was undefined is gone")


async def test_the_doctor_looks_at_each_domain(fleet: Any) -> None:
    first = fleet.daemons[0]
    first.define("no.label")
    _, own = fleet.sandbox.environments["host-1"]
    process = await asyncio.create_subprocess_exec(
        "caesura", "doctor", "--no-broker", env={**os.environ, **own}, stdout=subprocess.PIPE
    )
    output = (await process.communicate())[0].decode()
    assert process.returncode == 0, output
    assert "ok       web-1 is resumed by libvirt, and" in output
    assert "no-label (no.label) is in no set" in output
    assert "web-1 has no guest agent" in output
