"""Processes paused by the kernel: by a cgroup's freezer or by signals. Their condition, always read from the kernel, and their resume.

The condition is read from ``cgroup.events`` (v2), ``freezer.state`` (v1), or the states of all threads (signals).
Sources: kernel documentation ``admin-guide/cgroup-v2.rst`` ("cgroup.freeze", "cgroup.events") and
``cgroup-v1/freezer-subsystem.rst``; signal(7).
"""

# light imports on purpose: no pathlib here.
# ruff: noqa: PTH120, PTH123

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Mapping
from typing import Literal

from caesura_vmcontrol.procfs import DEAD, STOPPED, Process, process_table, send_signal, thread_states
from caesura_vmcontrol.resume_plans import CgroupPlan, SignalPlan

FreezerChoice = Literal["auto", "cgroup2", "cgroup1", "sigstop"]
"""How processes are to be paused; ``auto``: the first of the others that works."""

Condition = Literal["running", "held", "frozen", "gone"]
"""``held``: on its way into or out of a freeze, or only partly frozen; ``gone``: no process is left."""

_REMOVED = (errno.ENOENT, errno.ENODEV)  # ENODEV: the cgroup was removed while its file was open


def cgroup_condition(plan: CgroupPlan) -> Condition:
    """What the kernel's freezer says. Raises OSError: it would not say (not: the cgroup is gone, which is an answer)."""
    folder = os.path.dirname(plan.control)
    try:
        return _condition_v2(folder) if plan.kind == "cgroup2" else _condition_v1(folder)
    except OSError as error:
        if error.errno in _REMOVED:
            return "gone"
        raise


def signal_condition(plan: SignalPlan, table: Mapping[int, Process] | None = None) -> Condition:
    """What the states of all threads say. Raises OSError."""
    return _condition_of_members(plan.members(process_table() if table is None else table))


def _condition_of_members(members: list[Process]) -> Condition:
    if not members:
        return "gone"
    states = {state for member in members for state in thread_states(member.pid)} - DEAD
    if not states:
        return "gone"
    if STOPPED not in states:
        return "running"
    return "frozen" if states <= {STOPPED, "t"} else "held"


def _condition_v2(folder: str) -> Condition:
    events = dict(line.split() for line in _read(f"{folder}/cgroup.events").splitlines())
    if events.get("populated") == "0":
        return "gone"
    wanted = _read(f"{folder}/cgroup.freeze").strip() == "1"
    is_frozen = events.get("frozen") == "1"
    if not wanted and not is_frozen:
        return "running"
    # A parent that is frozen keeps it frozen although its own switch is off: `frozen` tells the truth.
    return "frozen" if is_frozen else "held"


def _condition_v1(folder: str) -> Condition:
    if not _read(f"{folder}/cgroup.procs").strip():
        return "gone"
    state = _read(f"{folder}/freezer.state").strip()
    return {"THAWED": "running", "FROZEN": "frozen"}.get(state, "held")  # type: ignore[return-value]


def thaw_cgroup(plan: CgroupPlan) -> None:
    """Ask the kernel to let the cgroup run; one that is gone is not an error. Raises OSError."""
    try:
        _write(plan.control, "0" if plan.kind == "cgroup2" else "THAWED")
    except OSError as error:
        if error.errno not in _REMOVED:
            raise


def freeze_cgroup(plan: CgroupPlan) -> None:
    """Ask the kernel to freeze the cgroup. Raises OSError."""
    _write(plan.control, "1" if plan.kind == "cgroup2" else "FROZEN")


def continue_processes(plan: SignalPlan, table: Mapping[int, Process] | None = None) -> None:
    """SIGCONT to every process of the VM."""
    for member in plan.members(process_table() if table is None else table):
        send_signal(member.pid, member.start_ticks, signal.SIGCONT)


def _read(path: str) -> str:
    with open(path, encoding="ascii") as file:
        return file.read()


def _write(path: str, text: str) -> None:
    # O_WRONLY without O_CREAT: a cgroup that is gone must not become a plain file somewhere.
    handle = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(handle, text.encode("ascii"))
    finally:
        os.close(handle)
