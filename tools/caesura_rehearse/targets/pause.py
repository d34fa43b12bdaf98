"""Pauses the processes of a target and lets them run again: what the kernel says, and when it said it. Blocking.

The same plans, and the same way back, as the host updater's process driver and the pause guard.
"""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

from caesura.runtime.errors import CaesuraError
from caesura_host_updater.drivers.container.pausing import (
    NotFrozen,
    PauseUnanswered,
    engine_call,
    pause_container,
)
from caesura_host_updater.drivers.process.freezers import ProcessPlan, request_freeze
from caesura_vmcontrol.container_control import groups_of
from caesura_vmcontrol.container_engine import EnginePlan
from caesura_vmcontrol.procfs import process_table
from caesura_vmcontrol.resume_plans import SignalPlan
from caesura_vmcontrol.vm_control import condition, resume_vm

_LOOK_S = 0.002  # s: between two looks: cgroup v1 and signals notify nobody
_SETTLE_S = 0.004  # s: a stop by signals must last this long to count: somebody may send SIGCONT all the time
_FREEZE_S = 5.0  # s: some milliseconds are usual; a process in a call that cannot be interrupted takes longer


TargetPlan = ProcessPlan | EnginePlan
"""How a target is resumed."""


class NotPaused(CaesuraError):
    """The processes could not be paused, or did not stay so; they run."""


def pause(plan: TargetPlan, stop: threading.Event) -> float:
    """Stop everything of the target; returns the instant (CLOCK_MONOTONIC, seconds) from which the kernel reports it as stopped.

    Args:
        stop: requests that it is called off.

    Raises:
        NotPaused: it ended in the meantime, or is not stopped after five seconds. What was stopped already is for ``resume``.
    """
    if isinstance(plan, EnginePlan):
        return _pause_container(plan, stop)
    began = time.monotonic()
    stopped_at: float | None = None
    try:
        while not stop.is_set():
            request_freeze(plan)
            state, now = condition(plan), time.monotonic()
            if state == "gone":
                raise NotPaused("it ended before it was paused")
            if state == "frozen":
                stopped_at = now if stopped_at is None else stopped_at
                if not isinstance(plan, SignalPlan) or now - stopped_at >= _SETTLE_S:
                    return stopped_at
            else:
                stopped_at = None
            if now - began > _FREEZE_S:
                raise NotPaused(f"the kernel does not report it as stopped after {_FREEZE_S:g} s ({state})")
            stop.wait(_LOOK_S)
    except OSError as error:
        raise NotPaused(f"the kernel refuses to pause it: {error.strerror or error}") from error
    raise NotPaused("the pause was called off")


def _pause_container(plan: EnginePlan, stop: threading.Event) -> float:
    try:
        pause_container(plan, time.monotonic() + _FREEZE_S, stop, engine_call(plan.socket))
    except PauseUnanswered as error:
        raise NotPaused(
            f"{error}. It may pause the container when it answers again: resume it then (docker unpause {plan.container[:12]})"
        ) from error
    except NotFrozen as error:
        raise NotPaused(f"the container {error}" if error.__cause__ is None else str(error)) from error
    return time.monotonic()


def resume(plan: TargetPlan, timeout_s: float) -> tuple[float, bool]:
    """Let everything run; the instant (CLOCK_MONOTONIC, seconds) at which the kernel reports that it does, and whether it was still stopped.

    Raises:
        NotPaused: it does not run after ``timeout_s`` seconds, or the kernel refuses. The pause guard continues to try.
    """
    until = time.monotonic() + timeout_s
    was_stopped = False
    try:
        while True:
            state, now = condition(plan), time.monotonic()
            if state in ("running", "gone"):
                return now, was_stopped
            was_stopped = True
            resume_vm(plan)
            if condition(plan) in ("running", "gone"):
                return time.monotonic(), was_stopped
            if now > until:
                raise NotPaused(f"it does not run {timeout_s:g} s after its resume ({state})")
            time.sleep(_LOOK_S)
    except OSError as error:
        raise NotPaused(f"the kernel refuses to resume it: {error.strerror or error}") from error


def cpu_seconds(plan: TargetPlan) -> float:
    """CPU time that the processes of the target have used so far, from the scheduler's accounts (nanoseconds, ``/proc/PID/task/TID/schedstat``)."""
    total_ns = 0
    for pid in pids_of(plan):
        for task in _tasks(pid):
            try:
                total_ns += int((task / "schedstat").read_text(encoding="ascii").split()[0])
            except (OSError, ValueError, IndexError):
                continue
    return total_ns / 1e9


def pids_of(plan: TargetPlan) -> list[int]:
    """The processes of the target."""
    if isinstance(plan, SignalPlan):
        return [each.pid for each in plan.members(process_table())]
    found: list[int] = []
    control = groups_of(plan)[-1].control if isinstance(plan, EnginePlan) else plan.control
    for folder, _, names in os.walk(Path(control).parent):
        if "cgroup.procs" in names:
            try:
                found += map(int, (Path(folder) / "cgroup.procs").read_text(encoding="ascii").split())
            except OSError:
                continue
    return found


def _tasks(pid: int) -> list[Path]:
    try:
        return list(Path(f"/proc/{pid}/task").iterdir())
    except OSError:
        return []
