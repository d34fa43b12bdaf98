"""Updates that need a reboot, on real QEMU processes under the installed commands; the test is the guest that obeys, or does not."""

from __future__ import annotations

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


@pytest.fixture
async def one(stages: Callable[..., Any]) -> Any:
    """One host with one VM of firmware, up."""
    stage = await stages(up=False)
    stage.sandbox.qemu_host("host-1", Vm(name="vm-1", agent=False, ram_bytes=32 << 20), clock_timeout_s="1")
    stage.notice_s = 0.2
    return stage


async def asked(stage: Any, shutdown_s: float, **more: bool) -> tuple[str, int]:
    """Roll an update that takes long, until the guest was asked to shut down; the rollout, and its QEMU."""
    running = stage.sandbox.folder / "running"
    stage.sandbox.update(
        "kernel",
        ["sh", "-c", f"touch {running}; sleep 3"],
        impact="reboot",
        shutdown_s=shutdown_s,
        **more,
    )
    await stage.up("host-1")
    (pid,) = stage.sandbox.qemu_witness.of("vm-1")
    rollout = await stage.roll("kernel", allow_reboot=True)
    noted = stage.sandbox.folder / "host-1" / "vms" / "vm-1.shutdown"
    await stage.sandbox.until(noted.exists, 20, "the guest is asked")
    return rollout, pid


async def new_process(stage: Any, pid: int) -> None:
    """Wait until another process runs the guest."""
    await stage.sandbox.until(
        lambda: [each != pid for each in stage.sandbox.qemu_witness.running("host-1", "vm-1")] == [True],
        20,
        "it was started again",
    )


async def test_the_update_runs_while_no_process_of_the_vm_exists(one: Any) -> None:
    rollout, pid = await asked(one, 60.0)
    assert not (one.sandbox.folder / "running").exists()
    one.sandbox.qemu_witness.execute("host-1", "vm-1", "quit")
    await one.sandbox.until((one.sandbox.folder / "running").exists, 20, "the update runs")
    assert one.sandbox.qemu_witness.of("vm-1") == []
    state = await one.ended(rollout)
    assert state.status == "completed", state.reason
    await new_process(one, pid)


async def test_a_guest_that_ignores_it_halts_the_rollout_and_is_not_killed(one: Any) -> None:
    rollout, pid = await asked(one, 5.0)
    state = await one.ended(rollout)
    assert (state.status, state.codes) == ("halted", ("shutdown_failed",)), state.reason
    assert "VM vm-1 did not shut down: its guest was asked by ACPI and runs on" in state.reason
    assert one.sandbox.qemu_witness.running("host-1", "vm-1") == [pid]
    assert not (one.sandbox.folder / "running").exists()


async def test_a_guest_that_ignores_it_is_killed_where_the_update_says_so(one: Any) -> None:
    rollout, pid = await asked(one, 3.0, kill_after_timeout=True)
    await one.sandbox.until((one.sandbox.folder / "running").exists, 60, "the update runs")
    assert one.sandbox.qemu_witness.of("vm-1") == []
    state = await one.ended(rollout)
    assert state.status == "completed", state.reason
    await new_process(one, pid)


@pytest.mark.parametrize("when", ["while it shuts down", "while it is down"])
async def test_an_updater_that_is_killed_starts_the_vm_in_its_next_life(one: Any, when: str) -> None:
    rollout, pid = await asked(one, 60.0)
    if when == "while it is down":
        one.sandbox.qemu_witness.execute("host-1", "vm-1", "quit")
        await one.sandbox.until((one.sandbox.folder / "running").exists, 20, "the update runs")
    await one.sandbox.kill("host-1")
    if when == "while it shuts down":
        await one.sandbox.start("host-1")
        await one.sandbox.until(
            lambda: one.fleet_view.hosts["host-1"].guard == "ready" and one.fleet_view.is_online("host-1"),
            20,
            "the next life",
        )
        one.sandbox.qemu_witness.execute("host-1", "vm-1", "quit")
    else:
        assert one.sandbox.qemu_witness.of("vm-1") == []
        await one.sandbox.start("host-1")
    await new_process(one, pid)
    state = await one.ended(rollout, timeout_s=90.0)
    assert (state.status, state.codes) == ("halted", ("updater_died",)), state.reason
    assert "every VM that was shut down was started again" in state.reason
