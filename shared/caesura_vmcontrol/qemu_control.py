"""QEMU guests as the guard sees them: their condition, their way out, whether it is complete."""

# light imports on purpose: no pathlib here.
# ruff: noqa: PTH112

from __future__ import annotations

import os
import time
from typing import Literal

from caesura_vmcontrol import claims, qemu_replace, qemu_swap
from caesura_vmcontrol.boots import in_this_boot, of_this_boot
from caesura_vmcontrol.operation_lock import try_lock
from caesura_vmcontrol.process_control import sigcont
from caesura_vmcontrol.procfs import alive
from caesura_vmcontrol.qemu_plans import QemuPlan, ReplacePlan, SwapPlan, VmmPlan
from caesura_vmcontrol.qmp_commands import ProcessGone, look, make_run, reach

_FREEZE_S = 1.0  # s: one call
_TURN_SWAP_S = 1.5  # s: how long we wait for another ``resume_guest`` of the same operation, a little longer than one takes
_TURN_REPLACE_S = 4.5


class OwnershipUnknown(OSError):
    """The claims are not ours: nothing is done."""


def condition(plan: VmmPlan) -> Literal["running", "held", "frozen", "gone"]:
    """The condition of the process that has the guest by the claims. Raises OSError: it is unknown."""
    if isinstance(plan, QemuPlan):
        return look(plan.vmm.pid, plan.vmm.start_ticks, [plan.vmm.qmp], ours=lambda: False)
    plan = in_this_boot(plan)
    qemu_replace.check_place(plan)
    paths = [plan.new.qmp if isinstance(plan, SwapPlan) else plan.qmp, plan.old.qmp]
    _, owner = _current(plan)
    theirs = claims.untouched(plan.claims)

    def ours() -> bool:
        return qemu_swap.is_ours(plan) if isinstance(plan, SwapPlan) else qemu_replace.is_ours(plan)

    if owner is None:
        over = heir(plan) if isinstance(plan, ReplacePlan) and not os.path.isdir(plan.claims) else None
        if over is not None and over.kind == "new":  # the operation is over, and was released
            return look(over.pid, over.start_ticks, paths, ours=lambda: False, theirs=True)
        if alive(plan.old.pid, plan.old.start_ticks) or not isinstance(plan, SwapPlan):
            return look(plan.old.pid, plan.old.start_ticks, [plan.old.qmp], ours=ours, theirs=theirs)
        return look(plan.new.pid, plan.new.start_ticks, paths, ours=lambda: True)
    if owner.kind == "old":
        theirs = not claims.noted(plan.claims, "begun")
        return look(plan.old.pid, plan.old.start_ticks, [plan.old.qmp], ours=ours, theirs=theirs)
    if owner.kind == "new" and not of_this_boot(plan, owner):
        return "held"  # undecided: its process ended with its boot, and the next claim says so
    if owner.kind == "new":
        ran = claims.noted(plan.claims, "ran")
        found = look(owner.pid, owner.start_ticks, paths, ours=lambda: False, claimed=True, theirs=ran)
        # Dead and nothing is decided about it yet: the process that killed it may know that it never ran.
        undecided = found == "gone" and not alive(owner.pid, owner.start_ticks)
        return "held" if undecided else found
    return "gone" if owner.kind == "gone" else "held"


def resume_guest(plan: VmmPlan) -> None:
    """Make the guest run in exactly one process; which one is decided here if it is undecided. Blocking, about a second.

    Raises:
        OSError: not complete yet, with QEMU's reason where it gave one; call again.
    """
    if isinstance(plan, QemuPlan):
        vmm, until = plan.vmm, time.monotonic() + _FREEZE_S
        sigcont(vmm.pid, vmm.start_ticks)
        try:
            with reach(vmm.pid, vmm.start_ticks, [vmm.qmp], until) as qmp:
                make_run(qmp, until, ours=False, stopped=True, once=True)
        except ProcessGone:
            return
        return
    try:
        if isinstance(plan, SwapPlan):
            with try_lock(plan.claims, _TURN_SWAP_S):
                qemu_swap.recover(plan)
        else:
            with try_lock(plan.claims, _TURN_REPLACE_S) as alone:
                qemu_replace.recover(plan, alone=alone)
    except claims.BadClaim as error:
        raise OwnershipUnknown(f"{plan.claims}: {error}") from error


def heir(plan: SwapPlan | ReplacePlan) -> claims.Owner | None:
    """Which process has the guest when the claims are removed; None: two processes may."""
    plan = in_this_boot(plan)
    if isinstance(plan, SwapPlan):
        others = [(each.pid, each.start_ticks) for each in (plan.new,) if alive(each.pid, each.start_ticks)]
    else:
        others = [(each.pid, each.start_ticks) for each in qemu_replace.started(plan)]
    lives = alive(plan.old.pid, plan.old.start_ticks)
    if len(others) + lives > 1:
        return None
    if others:
        return claims.Owner("new", *others[0])
    return claims.Owner("old" if lives else "gone")


def holder(plan: SwapPlan | ReplacePlan) -> tuple[int, int] | None:
    """The living process that has the guest, pid and start time; None: none has, or it is undecided."""
    plan = in_this_boot(plan)
    _, owner = _current(plan)
    if not os.path.isdir(plan.claims):
        owner = heir(plan)
    if owner is None or owner.kind == "old":
        found = plan.old.pid, plan.old.start_ticks
    elif owner.kind == "new" and of_this_boot(plan, owner):
        found = owner.pid, owner.start_ticks
    else:
        return None
    return found if alive(*found) else None


def owner_of(plan: VmmPlan) -> str:
    """Which process has the guest by the claims: ``old``, ``new:PID:TICKS``, or empty: undecided, in a file, or gone."""
    if isinstance(plan, QemuPlan):
        return ""
    _, owner = _current(plan)
    return owner.text if owner is not None and owner.kind in ("old", "new") else ""


def settled(plan: VmmPlan) -> bool:
    """Whether it is decided which process has the guest and every other one is dead, as far as a quick look shows."""
    plan = in_this_boot(plan)
    if isinstance(plan, QemuPlan) or not os.path.isdir(plan.claims):
        return True
    _, owner = _current(plan)
    if (
        owner is None
        or owner.kind in ("file", "left")
        or (owner.kind == "new" and not of_this_boot(plan, owner))
    ):
        return False
    old_lives = alive(plan.old.pid, plan.old.start_ticks)
    if owner.kind == "old":
        return not isinstance(plan, SwapPlan) or not alive(plan.new.pid, plan.new.start_ticks)
    return not old_lives


def tries(plan: VmmPlan) -> list[str]:
    """Why new processes could not take the guest, oldest first."""
    return [] if isinstance(plan, QemuPlan) else claims.failures(plan.claims)


def _current(plan: SwapPlan | ReplacePlan) -> tuple[int, claims.Owner | None]:
    try:
        return claims.current(plan.claims)
    except claims.BadClaim as error:
        raise OwnershipUnknown(f"{plan.claims}: {error}") from error
