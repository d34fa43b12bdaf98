"""Whose processes a plan names: a pid with a start time names a process in one boot only.

A boot is deterministic enough that another boot gives the same pair to a stranger, so this is decided by the boot's id.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TypeVar

from caesura_vmcontrol.claims import Owner
from caesura_vmcontrol.procfs import boot_id
from caesura_vmcontrol.qemu_plans import ReplacePlan, Vmm

NOBODY = 2**31 - 1
"""A pid that no process has: the kernel's highest is 2**22 (``PID_MAX_LIMIT`` of include/linux/threads.h)."""
_DIGITS = 8

P = TypeVar("P")


def boot8() -> str:
    """This boot, as claims name it: the first eight hex digits of its id."""
    return boot_id()[:_DIGITS]


def of_another_boot(plan: object) -> bool:
    """Whether the plan was made in another boot than this one, and is to be completed over a change of the kernel."""
    return isinstance(plan, ReplacePlan) and plan.across is not None and plan.across.boot_id != boot_id()


def in_this_boot(plan: P) -> P:
    """The plan with the processes that it names in this boot: the old one of another boot is nobody."""
    if isinstance(plan, ReplacePlan) and of_another_boot(plan):
        return replace(plan, old=Vmm(NOBODY, 0, plan.old.qmp))
    return plan


def of_this_boot(plan: object, owner: Owner) -> bool:
    """Whether the process that a claim names is one of this boot."""
    return not isinstance(plan, ReplacePlan) or plan.across is None or owner.boot8 == boot8()
