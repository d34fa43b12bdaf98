"""Containers as the guard sees them: their condition, their way out by the engine, and by the kernel where the engine is dead."""

# light imports on purpose: no pathlib here.
# ruff: noqa: PTH119, PTH120

from __future__ import annotations

import os

from caesura_vmcontrol import container_engine
from caesura_vmcontrol.container_engine import EnginePlan
from caesura_vmcontrol.freezer_control import Condition, cgroup_condition, freeze_cgroup, thaw_cgroup
from caesura_vmcontrol.resume_plans import CgroupPlan, cgroup_of


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


def container_condition(plan: EnginePlan) -> Condition:
    """What the kernel says, not the engine: one that was killed in a pause, or beside which the cgroup was thawed, is wrong.

    Raises:
        OSError: the kernel would not say.
    """
    return cgroup_condition(cgroup_of(plan))


def resume_container(plan: EnginePlan) -> None:
    """Unpause by the engine; if that does not make it run, thaw its cgroups. Raises OSError."""
    if not _unpaused(plan):
        for group in groups_of(plan):
            thaw_cgroup(group)


def _unpaused(plan: EnginePlan) -> bool:
    """Whether a container runs, or is gone, after its engine was asked; false: the kernel must be asked directly.

    The engine first: thawed by its cgroup under a live engine a container stays paused in the engine's records, and the next
    pause and unpause are refused.
    """
    try:
        container_engine.unpause(plan)
    except OSError:
        # Dead, hung, or of another opinion than the kernel, as an engine that was restarted in the pause may be.
        return container_condition(plan) in ("running", "gone")
    return True


def freeze_container(plan: EnginePlan) -> None:
    """Ask the kernel to freeze a container that its engine calls paused already. Raises OSError."""
    freeze_cgroup(groups_of(plan)[-1])
