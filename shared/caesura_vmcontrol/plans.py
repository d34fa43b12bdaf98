"""How to undo a freeze: one typed plan a VM, and the code that carries it out and looks at the result.

The host updater's drivers resume through the same code, so there is one way back from a freeze, not two.
The condition of process guests is always read from the kernel: ``cgroup.events`` (v2), ``freezer.state`` (v1), or the
states of all threads (signals). Sources: kernel documentation ``admin-guide/cgroup-v2.rst`` ("cgroup.freeze",
"cgroup.events") and ``cgroup-v1/freezer-subsystem.rst``; signal(7).
"""

# light imports on purpose: no pathlib here.
# ruff: noqa: PTH119, PTH120, PTH123

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from caesura_vmcontrol import container_engine, qemu_control, qemu_plans
from caesura_vmcontrol.container_engine import EnginePlan
from caesura_vmcontrol.procfs import (
    DEAD,
    STOPPED,
    Process,
    process_table,
    send_signal,
    thread_states,
)
from caesura_vmcontrol.qemu_plans import BadPlan, QemuPlan, ReplacePlan, SwapPlan, Vmm

__all__ = [
    "MECHANISMS",
    "BadPlan",
    "CgroupPlan",
    "Condition",
    "EnginePlan",
    "Mechanism",
    "Plan",
    "QemuPlan",
    "ReplacePlan",
    "SignalPlan",
    "SwapPlan",
    "Vmm",
    "condition",
    "freeze_cgroup",
    "mechanism_of",
    "plan_from_json",
    "plan_to_json",
    "thaw",
]

Condition = Literal["running", "held", "frozen", "gone"]
"""``held``: on its way into or out of a freeze, or only partly frozen; ``gone``: no process is left."""

_CGROUP_ROOT = "/sys/fs/cgroup/"
_REMOVED = (errno.ENOENT, errno.ENODEV)  # ENODEV: the cgroup was removed while its file was open
_CONTROL = {"cgroup2": "cgroup.freeze", "cgroup1": "freezer.state"}


@dataclass(frozen=True)
class CgroupPlan:
    """A VM in a cgroup of its own. ``control`` is the file that freezes and thaws it."""

    vm: str
    kind: Literal["cgroup1", "cgroup2"]
    control: str

    def __post_init__(self) -> None:
        wanted = _CONTROL.get(self.kind)
        if (
            wanted is None
            or not self.control.startswith(_CGROUP_ROOT)
            or os.path.normpath(self.control) != self.control
            or os.path.basename(self.control) != wanted
        ):
            raise BadPlan(f"{self.control!r} is no {self.kind} freezer file under {_CGROUP_ROOT}")


@dataclass(frozen=True)
class SignalPlan:
    """A VM stopped by signals: its first process leads a session; ``others`` were its descendants when asked."""

    vm: str
    leader: int
    start_ticks: int
    others: tuple[tuple[int, int], ...] = ()

    def __post_init__(self) -> None:
        pids = (self.leader, self.start_ticks, *(number for pair in self.others for number in pair))
        if self.leader <= 1 or any(type(number) is not int or number < 0 for number in pids):
            raise BadPlan(f"{self.leader!r} cannot be the first process of a VM")

    def members(self, table: Mapping[int, Process]) -> list[Process]:
        """Every process of this VM that is alive, wherever it moved to.

        The leader is a child subreaper, so while it lives nothing can leave its tree. When it is dead, its
        session and the remembered descendants are what is left. A pid that carries a session is not given
        out again while the session lasts, so a stranger with the leader's pid means that it is over.
        """
        found: dict[int, Process] = {}
        leader = table.get(self.leader)
        if leader is not None and leader.start_ticks == self.start_ticks:
            children: dict[int, list[Process]] = {}
            for process in table.values():
                children.setdefault(process.ppid, []).append(process)
            queue = [leader]
            while queue:
                member = queue.pop()
                if member.pid not in found:
                    found[member.pid] = member
                    queue.extend(children.get(member.pid, ()))
        if leader is None or leader.start_ticks == self.start_ticks:
            found |= {each.pid: each for each in table.values() if each.session == self.leader}
        for pid, start_ticks in self.others:
            other = table.get(pid)
            if other is not None and other.start_ticks == start_ticks:
                found[pid] = other
        return [each for each in found.values() if each.state not in DEAD or _has_live_thread(each.pid)]


Plan = CgroupPlan | SignalPlan | EnginePlan | QemuPlan | SwapPlan | ReplacePlan

Mechanism = Literal["signal", "cgroup", "qmp", "engine"]
"""How the guard resumes a VM alone: the signals of a process group, a cgroup's file, QMP, a container engine. A closed set, for
the guard imports nothing of a driver. A further one (libvirt's RPC) is a member here, a plan, and a branch in
``mechanism_of``, ``plan_to_json``, ``plan_from_json``, ``condition`` and ``thaw``; with the standard library only."""

MECHANISMS: tuple[Mechanism, ...] = get_args(Mechanism)


def mechanism_of(plan: object) -> Mechanism | None:
    """How the guard would carry the plan out; None: it is not a plan that it knows."""
    match plan:
        case SignalPlan():
            return "signal"
        case CgroupPlan():
            return "cgroup"
        case QemuPlan() | SwapPlan() | ReplacePlan():
            return "qmp"
        case EnginePlan():
            return "engine"
        case _:
            return None


def _has_live_thread(pid: int) -> bool:
    return any(state not in DEAD for state in thread_states(pid))


def plan_to_json(plan: Plan) -> dict[str, Any]:
    """The plan as it goes over the socket and to disk."""
    if isinstance(plan, QemuPlan | SwapPlan | ReplacePlan):
        return qemu_plans.to_json(plan)
    if isinstance(plan, EnginePlan):
        return {**asdict(plan), "kind": "engine"}
    kind = "signal" if isinstance(plan, SignalPlan) else plan.kind
    return {**asdict(plan), "kind": kind}


def plan_from_json(data: object) -> Plan:
    """Read a plan.

    Raises:
        BadPlan: anything that is not exactly a plan this guard knows how to carry out.
    """
    if not isinstance(data, dict) or not isinstance(data.get("vm"), str):
        raise BadPlan("a plan is an object with a vm")
    try:
        if data.get("kind") == "signal":
            others = tuple((pair[0], pair[1]) for pair in data["others"])
            return SignalPlan(data["vm"], data["leader"], data["start_ticks"], others)
        if data.get("kind") in ("qemu", "swap", "replace"):
            return qemu_plans.from_json(data)
        if data.get("kind") == "engine":
            return _engine_plan(data)
        return CgroupPlan(data["vm"], data["kind"], data["control"])
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise BadPlan(f"plan of {data['vm']!r} lacks or garbles {error}") from error


def _engine_plan(data: Mapping[str, Any]) -> EnginePlan:
    plan = EnginePlan(
        data["vm"],
        data["socket"],
        data["container"],
        data["pid"],
        data["start_ticks"],
        data["freezer"],
        data["control"],
    )
    cgroup_of(plan)
    return plan


def cgroup_of(plan: EnginePlan) -> CgroupPlan:
    """The container as the kernel has it. Raises BadPlan: its freezer file cannot be one."""
    return CgroupPlan(plan.vm, plan.freezer, plan.control)


def groups_of(plan: EnginePlan) -> list[CgroupPlan]:
    """The cgroup of the container's first process, and those above it that are the container's, too, the topmost last.

    A container with an init system of its own has its first process in a group below the one that its engine made and freezes.
    """
    file, folder = os.path.basename(plan.control), os.path.dirname(plan.control)
    found = [cgroup_of(plan)]
    while plan.container in os.path.dirname(folder):
        folder = os.path.dirname(folder)
        found.append(CgroupPlan(plan.vm, plan.freezer, f"{folder}/{file}"))
    return found


def condition(plan: Plan, table: Mapping[int, Process] | None = None) -> Condition:
    """What the kernel says of the VM now, for QEMU guests also what QEMU says: see ``qemu_control``.

    ``table`` saves reading the process table once per VM.

    Raises:
        OSError: the kernel would not say (not: the VM is gone, which is an answer).
    """
    if isinstance(plan, QemuPlan | SwapPlan | ReplacePlan):
        return qemu_control.condition(plan)
    if isinstance(plan, SignalPlan):
        return _condition_of_members(plan.members(process_table() if table is None else table))
    if isinstance(plan, EnginePlan):
        # Not what the engine says: one that was killed in a pause, or beside which the cgroup was thawed, is wrong.
        plan = cgroup_of(plan)
    folder = os.path.dirname(plan.control)
    try:
        return _condition_v2(folder) if plan.kind == "cgroup2" else _condition_v1(folder)
    except OSError as error:
        if error.errno in _REMOVED:
            return "gone"
        raise


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


def thaw(plan: Plan, table: Mapping[int, Process] | None = None) -> None:
    """Ask the kernel to let the VM run; for QEMU guests, bring what was begun to an end: see ``qemu_control``.

    Whether it runs is what ``condition`` says afterwards.

    Raises:
        OSError: the kernel refused, or QEMU did, or does not answer; a VM that is gone is not an error.
    """
    if isinstance(plan, QemuPlan | SwapPlan | ReplacePlan):
        qemu_control.thaw(plan)
        return
    if isinstance(plan, SignalPlan):
        for member in plan.members(process_table() if table is None else table):
            send_signal(member.pid, member.start_ticks, signal.SIGCONT)
        return
    if isinstance(plan, EnginePlan):
        if not _unpaused(plan):
            for group in groups_of(plan):
                thaw(group)
        return
    try:
        _write(plan.control, "0" if plan.kind == "cgroup2" else "THAWED")
    except OSError as error:
        if error.errno not in _REMOVED:
            raise


def _unpaused(plan: EnginePlan) -> bool:
    """Whether a container runs, or is gone, after its engine was asked; false: the kernel must be asked directly.

    The engine first: thawed by its cgroup under a live engine a container stays paused in the engine's records, and the next
    pause and unpause are refused.
    """
    try:
        container_engine.unpause(plan)
    except OSError:
        # Dead, hung, or of another opinion than the kernel, as an engine that was restarted in the pause may be.
        return condition(plan) in ("running", "gone")
    return True


def freeze_cgroup(plan: EnginePlan) -> None:
    """Ask the kernel to freeze a container that its engine calls paused already. Raises OSError."""
    cgroup = groups_of(plan)[-1]
    _write(cgroup.control, "1" if cgroup.kind == "cgroup2" else "FROZEN")


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
