"""VMs that cannot be frozen, cannot be resumed at first, die while frozen, or whose agent is silent."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from caesura.runtime.processes import freezers
from caesura_testing.sandbox import Vm
from caesura_vmcontrol.procfs import read_process


def _web(**changes: Any) -> dict[str, list[Vm]]:
    return {
        "host_1": [Vm(name="web-1", set="web", **changes), Vm(name="web-2", set="web")],
        "host_2": [Vm(name="web-3", set="web", update_domain=1)],
    }


# A process that waits for its vfork child to call exec cannot be stopped (kernel/fork.c, wait_for_vfork_done), and this
# child never does: a file is opened for it before, a FIFO that nobody writes to.
_UNSTOPPABLE = """
import os, sys
os.posix_spawn("/bin/true", ["true"], {}, file_actions=[(os.POSIX_SPAWN_OPEN, 9, sys.argv[1], os.O_RDONLY, 0)])
"""


async def test_a_vm_that_cannot_be_frozen_fails_the_operation_and_all_run(
    stages: Callable[..., Any], tmp_path: Path
) -> None:
    os.mkfifo(tmp_path / "fifo")
    argv = (sys.executable, "-c", _UNSTOPPABLE, str(tmp_path / "fifo"))
    stage = await stages(freezer="sigstop", **_web(argv=argv))

    def stuck() -> bool:
        found = map(read_process, stage.sandbox.vm_pids("web-1"))
        return "D" in {each.state for each in found if each is not None}

    await stage.sandbox.until(stuck, 10, "a process of web-1 that waits for its vfork child")
    rollout = await stage.roll()
    state = await stage.ended(rollout)
    assert state.status == "halted"
    assert "web-1" in state.reason
    await stage.none_frozen()
    report = (await stage.reports(rollout))[0]
    assert report.update is None or report.update.outcome == "not_run"
    assert "web-3" not in {each.vm for each in stage.sandbox.watch.pauses}


async def test_a_vm_that_cannot_be_resumed_at_first_is_resumed_in_the_end(stages: Callable[..., Any]) -> None:
    stage = await stages(freezer="cgroup1", **_web())
    (inner,) = [each for each in freezers(stage.sandbox.vm_pids("web-1")[0]) if each.name == "freezer.state"]
    outer = inner.parent.parent / "freezer.state"
    assert outer.exists(), "the VM's cgroup has a parent that can be frozen"
    rollout = await stage.roll()
    await stage.frozen("web-1", "web-2")
    outer.write_text("FROZEN")  # thawing the VM has no effect while an ancestor is frozen
    try:
        await stage.sandbox.until(
            lambda: "0" in (inner.parent / "freezer.self_freezing").read_text(), 10, "a resume was tried"
        )
        assert "web-1" in stage.sandbox.watch.frozen(), "and had no effect"
    finally:
        outer.write_text("THAWED")
    await stage.none_frozen(timeout_s=3)
    state = await stage.ended(rollout)
    assert stage.sandbox.watch.longest_s() < 8.0
    assert state.status == "completed", state.reason


async def test_a_vm_that_dies_while_frozen_is_reported_and_the_others_run(stages: Callable[..., Any]) -> None:
    stage = await stages(freezer="sigstop", **_web())
    rollout = await stage.roll()
    await stage.frozen("web-1", "web-2")
    for pid in stage.sandbox.vm_pids("web-1"):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    state = await stage.ended(rollout)
    assert state.status == "halted"
    assert "web-1" in state.reason
    (report,) = await stage.reports(rollout)
    states = {each.vm: each.state for each in report.vms}
    assert states == {"web-1": "stopped", "web-2": "running"}
    assert not stage.sandbox.watch.frozen()


async def test_an_agent_that_never_answers_halts_before_any_pause(stages: Callable[..., Any]) -> None:
    stage = await stages(**_web(), up=False)
    await stage.up("host-1", "host-2")
    with stage.sandbox.silent_agent("web-1"):
        state = await stage.ended(await stage.roll(notice_s=2.0))
    assert state.status == "halted"
    assert "no answer of the agent" in state.reason
    assert "web-1" in state.reason
    assert not [each for each in stage.sandbox.watch.pauses if each.vm != "web-1"]
    await stage.sandbox.until(lambda: not stage.fleet_view.documents["web"].events, 5, "document empty")
    assert [each.status for facts in stage.fleet_view.events.values() for each in facts] == [
        "scheduled",
        "cancelled",
    ]


async def test_a_failing_prepare_hook_halts_before_any_pause(stages: Callable[..., Any]) -> None:
    hook = {"prepare_hook": '["sh", "-c", "echo cannot drain; exit 7"]'}
    stage = await stages(**_web(agent_settings=hook))
    state = await stage.ended(await stage.roll())
    assert state.status == "halted"
    assert "web-1 is not ready" in state.reason
    assert "7" in state.reason
    assert not stage.sandbox.watch.pauses


@pytest.mark.parametrize("policy", ["halt", "proceed"])
async def test_a_vm_whose_agent_is_silent_after_the_pause_is_flagged_and_policy_decides(
    policy: str, stages: Callable[..., Any]
) -> None:
    stage = await stages(**_web())
    if not freezers(stage.sandbox.vm_pids("web-1")[0]):
        pytest.skip("needs a cgroup freezer: a resume by SIGCONT would wake the agent")
    rollout = await stage.roll(on_unsynced=policy)
    await stage.frozen("web-1")
    with stage.sandbox.silent_agent("web-1"):
        state = await stage.ended(rollout)
    verdicts = {each.vm: each for each in stage.fleet_view.clocks.values() if each.operation}
    assert verdicts["web-1"].synced is False
    assert verdicts["web-1"].by == "nobody"
    assert state.status == ("halted" if policy == "halt" else "completed"), state.reason
    if policy == "halt":
        assert "web-1 is unsynced" in state.reason
    assert not stage.sandbox.watch.frozen()


async def test_a_process_vm_without_an_agent_has_no_clock_to_judge(stages: Callable[..., Any]) -> None:
    stage = await stages(**_web(agent=False, run_agent=False))
    rollout = await stage.roll(on_unsynced="halt")
    state = await stage.ended(rollout)
    assert state.status == "completed", state.reason
    assert "web-1" in {each.vm for each in stage.sandbox.watch.pauses}
    assert "web-1" not in {each.vm for each in stage.fleet_view.clocks.values()}
    assert not stage.sandbox.watch.frozen()
