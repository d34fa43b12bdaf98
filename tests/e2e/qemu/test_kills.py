"""Real QEMU processes under the installed commands, and kill -9 in the middle of what is most dangerous.

The witness is a QMP socket of the test's own in every QEMU process: who runs the guest, and who else is alive.
"""

from __future__ import annotations

import asyncio
import os
import re
import shutil
from collections.abc import Callable
from typing import Any

import pytest

from caesura_testing.sandbox import Vm

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(
        shutil.which("qemu-system-x86_64") is None,
        reason="QEMU is not installed (on Debian: apt-get install qemu-system-x86)",
    ),
]

LENIENT = {"on_unsynced": "proceed"}
"""Policy: firmware has no clock that anybody could set."""


def accepted(stage: Any, rollout: str) -> bool:
    return any(each.rollout == rollout for each in stage.fleet_view.reports.values())


def gone(stage: Any, vm: str, pid: int) -> bool:
    return pid not in stage.sandbox.qemu_witness.of(vm)


@pytest.fixture
async def one(stages: Callable[..., Any]) -> Any:
    """One host with one VM of firmware, up."""
    stage = await stages(up=False)
    stage.sandbox.qemu_host("host-1", Vm(name="vm-1", agent=False, ram_bytes=32 << 20), clock_timeout_s="1")
    stage.sandbox.update("patch", ["sleep", "2"])
    stage.sandbox.update("replace", ["sleep", "2"], vmm="instead")
    stage.sandbox.update("swap", ["true"], vmm="beside", scope="vm")
    stage.notice_s = 0.2
    await stage.up("host-1")
    return stage


async def whole(stage: Any) -> None:
    """Exactly one process is there and it runs the guest."""
    await stage.sandbox.until(
        lambda: (
            stage.sandbox.qemu_witness.running("host-1", "vm-1")
            == stage.sandbox.qemu_witness.of("vm-1")
            != []
        ),
        15,
        "one process runs the guest",
    )


async def test_swap_and_replace_move_the_guest_to_a_new_process(one: Any) -> None:
    for update in ("swap", "replace", "patch"):
        (before,) = one.sandbox.qemu_witness.of("vm-1")
        rollout = await one.roll(update, **LENIENT)
        state = await one.ended(rollout)
        assert state.status == "completed", (update, state.reason)
        await whole(one)
        (after,) = one.sandbox.qemu_witness.of("vm-1")
        assert (before == after) == (update == "patch")
        result = (await one.reports(rollout))[-1].vms[0]
        told = f"QEMU 7.2.22 (pid {after}), was QEMU 7.2.22 (pid {before})"
        assert re.sub(r"\d+\.\d+\.\d+", "7.2.22", result.detail) == ("" if update == "patch" else told)
    pauses = [pause.pause_s for pause in one.fleet_view.pauses.values()]
    assert pauses[0] < 0.5  # the swap's update ran before
    assert min(pauses[1:]) >= 2.0


async def _replace_begun(stage: Any) -> str:
    """Start a replace and wait until no QEMU is there any more."""
    rollout = str(await stage.roll("replace", **LENIENT))
    await stage.sandbox.until(
        lambda: stage.sandbox.qemu_witness.of("vm-1") == [], 20, "the old QEMU to be gone"
    )
    return rollout


async def test_updater_killed_while_no_qemu_is_there(one: Any) -> None:
    rollout = await _replace_begun(one)
    await one.sandbox.kill("host-1")
    # The guard alone starts the new process from its intent.
    await whole(one)
    await one.sandbox.start("host-1")
    state = await one.ended(rollout)
    assert state.status == "halted"
    assert "pause guard" in state.reason
    await one.ready("host-1")
    await whole(one)
    await one.give_up(rollout)
    assert (await one.ended(await one.roll("swap", **LENIENT))).status == "completed"


async def test_guard_killed_while_no_qemu_is_there(one: Any) -> None:
    rollout = await _replace_begun(one)
    os.kill(one.sandbox.guard_pid("host-1"), 9)
    state = await one.ended(rollout)
    assert state.status == "halted"
    assert "the pause guard died" in state.reason
    await whole(one)


async def test_both_killed_while_no_qemu_is_there(one: Any) -> None:
    rollout = await _replace_begun(one)
    guard = one.sandbox.guard_pid("host-1")
    one.sandbox.running["host-1"].kill()
    os.kill(guard, 9)
    await one.sandbox.running["host-1"].wait()
    assert one.sandbox.qemu_witness.of("vm-1") == []
    await one.sandbox.start("host-1")
    await whole(one)
    assert (await one.ended(rollout)).status == "halted"


async def test_qemu_killed_while_its_guest_stands_still(one: Any) -> None:
    rollout = await one.roll("patch", **LENIENT)
    await one.sandbox.until(lambda: bool(one.fleet_view.frozen), 20, "the freeze")
    (pid,) = one.sandbox.qemu_witness.of("vm-1")
    os.kill(pid, 9)
    state = await one.ended(rollout)
    assert state.status == "halted"
    assert "vm-1" in state.reason
    assert gone(one, "vm-1", pid)


async def test_updater_killed_while_the_guest_stands_still(one: Any) -> None:
    rollout = await one.roll("patch", **LENIENT)
    await one.sandbox.until(lambda: bool(one.fleet_view.frozen), 20, "the freeze")
    await one.sandbox.kill("host-1")
    await whole(one)
    await one.sandbox.start("host-1")
    assert (await one.ended(rollout)).status == "halted"
    await whole(one)


async def test_updater_killed_again_and_again_during_swaps(one: Any) -> None:
    """At whatever moment it hits: one process runs the guest afterwards, and the next updater knows which."""
    halted = 0
    for number in range(8):
        rollout = await one.roll("swap", **LENIENT)
        await one.sandbox.until(lambda: accepted(one, rollout), 20, "the host to begin")  # noqa: B023
        await asyncio.sleep(number * 0.02)  # what varies here is the moment of the kill
        await one.sandbox.kill("host-1")
        await one.sandbox.until(
            lambda: len(one.sandbox.qemu_witness.running("host-1", "vm-1")) == 1,
            10,
            "one process to run the guest",
        )
        await one.sandbox.start("host-1")
        if (await one.ended(rollout)).status == "halted":
            halted += 1
            await one.give_up(rollout)
        await one.ready("host-1")
        await whole(one)
    assert halted, "no kill came in the middle of a swap"


async def test_a_binary_that_is_no_qemu_is_refused_before_anything_pauses(one: Any) -> None:
    one.sandbox.update("bad", ["true"], vmm="beside", scope="vm", vmm_binary="/bin/true")
    (before,) = one.sandbox.qemu_witness.of("vm-1")
    await one.ready("host-1")
    one.sandbox.running["host-1"].send_signal(1)  # SIGHUP: read the updates again
    await one.sandbox.until(
        lambda: any(each.update == "bad" for each in one.fleet_view.hosts["host-1"].updates), 10, "the update"
    )
    state = await one.ended(await one.roll("bad", **LENIENT))
    assert state.status == "halted"
    assert "/bin/true" in state.reason
    assert "nothing was frozen" in state.reason
    assert one.sandbox.qemu_witness.of("vm-1") == [before]
    assert not one.fleet_view.pauses
