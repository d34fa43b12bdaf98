"""How to undo a pause, as data: one typed plan a VM, what the pause guard is given and keeps on disk."""

# light imports on purpose: no pathlib here.
# ruff: noqa: PTH119

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from caesura_vmcontrol import qemu_plans
from caesura_vmcontrol.container_engine import EnginePlan
from caesura_vmcontrol.libvirt_rpc import LibvirtPlan
from caesura_vmcontrol.plan_errors import BadPlan
from caesura_vmcontrol.procfs import DEAD, Process, thread_states
from caesura_vmcontrol.qemu_plans import QemuPlan, ReplacePlan, SwapPlan

_CGROUP_ROOT = "/sys/fs/cgroup/"
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


def _has_live_thread(pid: int) -> bool:
    return any(state not in DEAD for state in thread_states(pid))


ResumePlan = CgroupPlan | SignalPlan | EnginePlan | LibvirtPlan | QemuPlan | SwapPlan | ReplacePlan

Mechanism = Literal["signal", "cgroup", "qmp", "engine", "libvirt"]
"""How the guard resumes a VM alone: the signals of a process group, a cgroup's file, QMP, a container engine, libvirt's RPC. A closed
set, for the guard imports nothing of a driver. A further one is a member here, a plan, and a branch in
``mechanism_of``, ``plan_to_json``, ``plan_from_json``, and in ``vm_control``; with the standard library only."""

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
        case LibvirtPlan():
            return "libvirt"
        case _:
            return None


def plan_to_json(plan: ResumePlan) -> dict[str, Any]:
    """The plan as it goes over the socket and to disk."""
    if isinstance(plan, QemuPlan | SwapPlan | ReplacePlan):
        return qemu_plans.to_json(plan)
    if isinstance(plan, EnginePlan):
        return {**asdict(plan), "kind": "engine"}
    if isinstance(plan, LibvirtPlan):
        return {**asdict(plan), "kind": "libvirt"}
    kind = "signal" if isinstance(plan, SignalPlan) else plan.kind
    return {**asdict(plan), "kind": kind}


def plan_from_json(data: object) -> ResumePlan:
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
        if data.get("kind") == "libvirt":
            return _libvirt_plan(data)
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


def _libvirt_plan(data: Mapping[str, Any]) -> LibvirtPlan:
    paths = data["qmp"]
    if not isinstance(paths, list | tuple):
        raise BadPlan("qmp is a list of sockets")
    return LibvirtPlan(
        data["vm"],
        data["socket"],
        data["uri"],
        data["uuid"],
        data["number"],
        data["pid"],
        data["start_ticks"],
        tuple(paths),
    )


def cgroup_of(plan: EnginePlan) -> CgroupPlan:
    """The container as the kernel has it. Raises BadPlan: its freezer file cannot be one."""
    return CgroupPlan(plan.vm, plan.freezer, plan.control)
