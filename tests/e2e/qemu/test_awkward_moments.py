"""Real QEMU processes under the installed commands: swaps that fail, are stopped, or begin at a bad moment."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from typing import Any

import pytest

from caesura.contract import messages as m
from caesura_ctl.session import new_request_id
from caesura_testing.patience import patient
from caesura_testing.sandbox import Vm

QEMU = shutil.which("qemu-system-x86_64") or ""

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(not QEMU, reason="QEMU is not installed (on Debian: apt-get install qemu-system-x86)"),
]

LENIENT = {"on_unsynced": "proceed"}
"""Policy: firmware has no clock that anybody could set."""

_WRAPPER = """#!/usr/bin/python3 -SE
import os, sys, time
words = sys.argv[1:]
mine = open({wish!r}).read()
if "--version" not in words:
    exec(mine)
os.execv({qemu!r}, [{qemu!r}, *words])
"""


class Two:
    """One host with two VMs, and a QEMU that does what is wished of it."""

    def __init__(self, stage: Any) -> None:
        self.stage = stage
        self.qemu_witness = stage.sandbox.qemu_witness
        self.wish_file = stage.sandbox.folder / "wish"
        self.binary = stage.sandbox.folder / "qemu-wishful"
        self.binary.write_text(_WRAPPER.format(wish=str(self.wish_file), qemu=QEMU))
        self.binary.chmod(0o700)
        self.updating = stage.sandbox.folder / "updating"
        self.wish("pass")

    def wish(self, code: str) -> None:
        """Python code on the list ``words``, run before the next process of a VM becomes a QEMU."""
        self.wish_file.write_text(code)

    async def whole(self) -> None:
        """Exactly one process of each VM is there and it runs the guest."""
        await self.stage.sandbox.until(
            lambda: all(
                self.qemu_witness.running("host-1", vm) == self.qemu_witness.of(vm) != []
                for vm in ("vm-1", "vm-2")
            ),
            15,
            "one process runs each guest",
        )
        assert not list((self.stage.sandbox.folder / "host-1" / "vms").glob("*.operations"))

    def report(self, rollout: str) -> Any:
        """The host's last report of a rollout."""
        return [each for each in self.stage.fleet_view.reports.values() if each.rollout == rollout][-1]


@pytest.fixture
async def two(stages: Callable[..., Any]) -> Any:
    """Both VMs in one domain of one set: one operation has both."""
    stage = await stages(up=False)
    vms = [
        Vm(name=name, set="web", update_domain=0, agent=False, ram_bytes=32 << 20)
        for name in ("vm-1", "vm-2")
    ]
    stage.sandbox.qemu_host("host-1", *vms, clock_timeout_s="1")
    there = Two(stage)
    stage.sandbox.update("swap", ["sleep", "0.5"], vmm="beside", scope="vm", vmm_binary=str(there.binary))
    stage.sandbox.update(
        "replace",
        ["sh", "-c", f"touch {there.updating}; sleep 1"],
        vmm="instead",
        vmm_binary=str(there.binary),
    )
    stage.notice_s = 0.2
    await stage.up("host-1")
    return there


REFUSED = 'words = [w.replace("pc-q35-7.2,", "pc-q35-7.2,hpet=off,") for w in words]'
"""A board that lacks a timer: the new QEMU notices when it loads the state, and the guest is paused then."""


async def test_swap_that_fails_is_told_with_its_pause_and_can_be_repeated(two: Any) -> None:
    two.wish(REFUSED)
    before = {vm: two.qemu_witness.of(vm) for vm in ("vm-1", "vm-2")}
    rollout = await two.stage.roll("swap", **LENIENT)
    state = await two.stage.ended(rollout)
    assert state.status == "halted"
    assert "load of migration failed" in state.reason
    first, second = two.report(rollout).vms
    assert first.frozen
    assert first.pause_s > 0
    assert not second.frozen
    assert "not begun" in second.error
    await two.stage.sandbox.until(lambda: bool(two.stage.fleet_view.clocks), 10, "the verdict on its clock")
    await two.whole()
    assert before == {vm: two.qemu_witness.of(vm) for vm in ("vm-1", "vm-2")}
    await two.stage.give_up(rollout)
    two.wish("pass")
    for update in ("swap", "replace"):
        again = await two.stage.ended(await two.stage.roll(update, **LENIENT))
        assert again.status == "completed", again.reason
        await two.whole()


async def test_second_vm_that_cannot_be_prepared(two: Any) -> None:
    two.wish('words += ["-device", "virtio-rng-pci"] * ("vm-2" in words)')
    before = {vm: two.qemu_witness.of(vm) for vm in ("vm-1", "vm-2")}
    for update in ("swap", "replace"):
        rollout = await two.stage.roll(update, **LENIENT)
        state = await two.stage.ended(rollout)
        assert state.status == "halted"
        assert "nothing was frozen: VM vm-2" in state.reason
        await two.whole()
        assert before == {vm: two.qemu_witness.of(vm) for vm in ("vm-1", "vm-2")}
        assert not two.stage.fleet_view.frozen
        await two.stage.give_up(rollout)


@pytest.mark.parametrize("how", ["term", "kill", "abort"])
@pytest.mark.parametrize("update", ["swap", "replace"])
async def test_stopped_while_new_processes_are_starting(two: Any, how: str, update: str) -> None:
    two.wish("time.sleep(3)")
    before = {vm: two.qemu_witness.of(vm) for vm in ("vm-1", "vm-2")}
    rollout = await two.stage.roll(update, **LENIENT)
    await two.stage.sandbox.until(lambda: len(two.qemu_witness.of("vm-1")) == 2, 20, "its next process")
    if how == "abort":
        await two.stage.give_up(rollout)
    elif how == "kill":
        await two.stage.sandbox.kill("host-1")
    else:
        assert await two.stage.sandbox.stop("host-1", 40) == 0
    if how != "abort":
        two.wish("pass")
        await two.stage.sandbox.start("host-1")
        await two.stage.ended(rollout)
        await two.stage.give_up(rollout)
    await two.stage.ready("host-1")
    await two.whole()
    assert before == {vm: two.qemu_witness.of(vm) for vm in ("vm-1", "vm-2")}
    assert not two.stage.fleet_view.frozen
    two.wish("pass")
    assert (await two.stage.ended(await two.stage.roll(update, **LENIENT))).status == "completed"
    await two.whole()


async def test_told_to_stop_while_guests_are_in_their_files(two: Any) -> None:
    rollout = await two.stage.roll("replace", **LENIENT)
    await two.stage.sandbox.until(two.updating.exists, 20, "the update to run")
    assert two.qemu_witness.of("vm-1") == two.qemu_witness.of("vm-2") == []
    assert await two.stage.sandbox.stop("host-1", 40) == 0
    await two.whole()
    await two.stage.sandbox.start("host-1")
    await two.stage.ready("host-1")
    state = await two.stage.ended(rollout)
    assert two.report(rollout).status == "completed", state.reason
    assert state.status == "completed", state.reason
    await two.whole()


async def test_updater_and_guard_killed_while_guests_are_in_their_files(two: Any) -> None:
    """The next life restores them, and nothing of the operation stands in the way of the next one."""
    rollout = await two.stage.roll("replace", **LENIENT)
    await two.stage.sandbox.until(two.updating.exists, 20, "the update to run")
    guard = two.stage.sandbox.guard_pid("host-1")
    two.stage.sandbox.running["host-1"].kill()
    os.kill(guard, 9)
    await two.stage.sandbox.running["host-1"].wait()
    await two.stage.sandbox.start("host-1")
    assert (await two.stage.ended(rollout)).status == "halted"
    await two.stage.ready("host-1")
    await two.whole()
    await two.stage.give_up(rollout)
    for update in ("swap", "replace"):
        state = await two.stage.ended(await two.stage.roll(update, **LENIENT))
        assert state.status == "completed", state.reason
        await two.whole()


async def test_budget_that_is_as_short_as_can_be(two: Any) -> None:
    # At rest a second; two swaps want a little more on a machine that does other things.
    state = await two.stage.ended(await two.stage.roll("swap", budget_s=patient(1.0), **LENIENT))
    assert state.status == "completed", state.reason
    await two.whole()
    told = [each.vm for each in two.stage.fleet_view.pauses.values()]
    assert sorted(told) == ["vm-1", "vm-2"]
    assert all(each.pause_s < 0.5 for each in two.stage.fleet_view.pauses.values())


@pytest.mark.parametrize("update", ["swap", "replace"])
async def test_what_was_changed_at_run_time_is_refused_in_the_plan(two: Any, update: str) -> None:
    """Nothing is announced, nothing is scheduled: the operator reads what to do before anybody is warned."""

    def missing() -> str:
        inventory = two.stage.fleet_view.hosts["host-1"]
        (record,) = [vm for vm in inventory.vms if vm.vm == "vm-2"]
        return str(record.methods_missing.get(update, ""))

    two.qemu_witness.execute("host-1", "vm-2", "object-add", qom_type="iothread", id="io9")
    await two.stage.sandbox.until(lambda: "object io9" in missing(), 60, "the host to notice")
    answer = await two.stage.session.ask(
        m.RolloutRequested(
            request=new_request_id(),
            update=update,
            selection=m.Selection(),
            policy=two.stage.policy(**LENIENT),
        )
    )
    assert not answer.accepted
    assert "vm-2" in answer.reason
    assert "lacks object io9 (iothread)" in answer.reason
    two.qemu_witness.execute("host-1", "vm-2", "object-del", id="io9")
    await two.stage.sandbox.until(lambda: missing() == "", 60, "the host to notice that it is undone")
    state = await two.stage.ended(await two.stage.roll(update, **LENIENT))
    assert state.status == "completed", state.reason
