"""The way out of a swap: two processes, each alive or not, and the claims decide which one may run the guest."""

# light imports on purpose: no pathlib here.
# ruff: noqa: PTH112

from __future__ import annotations

import os
import time
from contextlib import suppress

from caesura_vmcontrol import claims
from caesura_vmcontrol.claims import Owner
from caesura_vmcontrol.process_control import kill_and_wait, sigcont, sigstop
from caesura_vmcontrol.procfs import alive
from caesura_vmcontrol.qemu_plans import SwapPlan, Vmm
from caesura_vmcontrol.qmp import Qmp, QmpError
from caesura_vmcontrol.qmp_commands import (
    CONT_S,
    LOADING,
    NOT_OURS,
    OVER,
    RUNNING,
    NotRunning,
    ProcessGone,
    cont,
    end_unless_it_ran,
    has_run,
    keep_memory_along,
    make_run,
    migration,
    note_ran,
    reach,
    run_state,
)

_TOTAL_S = 1.0  # s: one call; the caller tries again
_NOBODY_COMES_S = (
    0.1  # s: a dead process's connection that is not accepted yet is accepted within a millisecond
)
_ARRIVED_S = 0.5  # s: an answer takes a millisecond
_STEP_S = 0.002


def recover(plan: SwapPlan) -> None:
    """Bring the swap to an end, one way or the other. Safe at any time, repeated or concurrently.

    Raises:
        OSError: not complete yet; try again.
    """
    until = time.monotonic() + _TOTAL_S
    while True:
        number, owner = claims.current(plan.claims)
        if owner is None:
            if not os.path.isdir(plan.claims):
                _after_the_operation(plan, until)
                return
            _decide(plan, until)
        elif owner.kind == "old":
            begun = claims.noted(plan.claims, "begun")
            ours = begun and _find_out_whose(plan, until)
            roll_back(plan.old, [(plan.new.pid, plan.new.start_ticks)], until, ours=ours, begun=begun)
            return
        elif owner.kind == "new":
            if _commit_new(plan, number, owner, until):
                return
            until = time.monotonic() + _TOTAL_S  # another decision is valid: a new time limit for it
        elif owner.kind == "gone":
            kill_and_wait(plan.new.pid, plan.new.start_ticks, until)
            kill_and_wait(plan.old.pid, plan.old.start_ticks, until)
            return
        else:
            raise claims.BadClaim(f"{owner.text!r} in a swap")


def roll_back(old: Vmm, others: list[tuple[int, int]], until: float, *, ours: bool, begun: bool) -> None:
    """The old process has the guest permanently: every other process is dead before it is resumed.

    A QEMU that sends its state to one that hangs hangs itself until that one is dead.
    ``ours``: whether its last migration is ours; if not, a complete one is somebody else's. ``begun``: whether we may
    have stopped it; if not, its pause is somebody else's, too.
    """
    for pid, start_ticks in others:
        kill_and_wait(pid, start_ticks, until)
    if alive(old.pid, old.start_ticks):
        sigcont(old.pid, old.start_ticks)
        try:
            with reach(old.pid, old.start_ticks, [old.qmp], until) as qmp:
                make_run(qmp, until, ours=ours, stopped=begun)
                if begun:
                    keep_memory_along(qmp, until)
        except ProcessGone:
            return


def is_ours(plan: SwapPlan) -> bool:
    """Whether the old process's last migration is ours.

    The process that began it may have died before it recorded that QEMU accepted it; then it is ours if it arrived.
    """
    if _known_as_ours(plan):
        return True
    if claims.noted(plan.claims, "refused") or not claims.noted(plan.claims, "begun") or not _arrived(plan):
        return False
    with suppress(OSError):
        claims.note(plan.claims, "accepted")
    return True


def _known_as_ours(plan: SwapPlan) -> bool:
    return claims.noted(plan.claims, "accepted") or claims.first_kind(plan.claims) == "new"


def _find_out_whose(plan: SwapPlan, until: float) -> bool:
    """As ``is_ours``, for the last time: the new process, which alone may know, is ended next.

    It is stopped first, so that the answer stays true: our migration has a return path, and cannot complete while its
    other end is stopped. If the old process has not been migrated by then, one that completes later is somebody else's.
    """
    if _known_as_ours(plan):
        return True
    sigstop(plan.new.pid, plan.new.start_ticks)
    sigcont(plan.old.pid, plan.old.start_ticks)
    try:
        with reach(
            plan.old.pid, plan.old.start_ticks, [plan.old.qmp], min(until, time.monotonic() + _ARRIVED_S)
        ) as qmp:
            away = run_state(qmp, time.monotonic() + _ARRIVED_S) == "postmigrate"
    except QmpError:
        return False  # dead, or waiting for the new one to receive what it sends
    if not away:
        return False
    sigcont(plan.new.pid, plan.new.start_ticks)
    return is_ours(plan)


def _arrived(plan: SwapPlan) -> bool:
    """Whether the new process has received anything; a dead or silent one gives no answer."""
    until = time.monotonic() + _ARRIVED_S
    try:
        with reach(plan.new.pid, plan.new.start_ticks, [plan.new.qmp, plan.old.qmp], until) as qmp:
            return run_state(qmp, until) not in LOADING or migration(qmp, until) not in ("none", "setup")
    except QmpError:
        return False


def _decide(plan: SwapPlan, until: float) -> None:
    """Undecided so far: the old process if it lives, else the new one if it has everything."""
    if alive(plan.old.pid, plan.old.start_ticks):
        claims.claim(plan.claims, 1, "old")
        return
    sigcont(plan.new.pid, plan.new.start_ticks)
    try:
        with reach(plan.new.pid, plan.new.start_ticks, [plan.new.qmp, plan.old.qmp], until) as qmp:
            loaded = _has_everything(qmp, until)
    except ProcessGone:
        loaded = False
    text = f"new:{plan.new.pid}:{plan.new.start_ticks}" if loaded else "gone"
    claims.claim(plan.claims, 1, text)


def _has_everything(qmp: Qmp, until: float) -> bool:
    """Whether a new process whose sender is dead has loaded the state. It may be about to.

    Raises:
        NotRunning: not known yet.
    """
    nobody_comes = time.monotonic() + _NOBODY_COMES_S
    while True:
        state = run_state(qmp, until)
        if state not in LOADING:
            return state not in OVER
        if migration(qmp, until) not in ("none", "setup"):
            nobody_comes = time.monotonic() + _NOBODY_COMES_S
        if time.monotonic() >= nobody_comes:
            return False
        if time.monotonic() >= until:
            raise NotRunning("the new process is still loading and the old one is dead")
        time.sleep(_STEP_S)


def _commit_new(plan: SwapPlan, number: int, owner: Owner, until: float) -> bool:
    """The new process has the guest, unless it is proved that it never ran it. False: read the claims again."""
    old, pid, ticks = plan.old, owner.pid, owner.start_ticks
    sigstop(old.pid, old.start_ticks)
    sigcont(pid, ticks)
    try:
        qmp = reach(pid, ticks, [plan.new.qmp, old.qmp], until)
    except ProcessGone:
        claims.claim(plan.claims, number + 1, "gone")  # nothing can show whether it ran
        return False
    with qmp:
        if not has_run(plan.claims, run_state(qmp, until)):
            until = max(until, time.monotonic() + CONT_S)
            refused = cont(qmp, until)
            if refused is not None:
                if not alive(old.pid, old.start_ticks):
                    raise refused  # there is no process to return to: what it waits for may become free
                # Extra time, so that it is dead here: after a KillTimeout the next try finds it dead, and nothing shows whether it ran.
                found = end_unless_it_ran(qmp, pid, ticks, until + _TOTAL_S)
                if found != "runs":
                    claims.note_failure(plan.claims, str(refused))
                    claims.claim(plan.claims, number + 1, "old" if found == "never_ran" else "gone")
                    return False
                until = time.monotonic() + CONT_S
            note_ran(plan.claims)
        keep_memory_along(qmp, until)
    kill_and_wait(old.pid, old.start_ticks, until)
    return True


def _after_the_operation(plan: SwapPlan, until: float) -> None:
    """The claims were removed: exactly one of the two is left and has the guest; if it is paused, by somebody else.

    If both are left, the claims were lost midway: the new one has the guest if it has its state.
    """
    old, new = plan.old, plan.new
    left = [each for each in (old, new) if alive(each.pid, each.start_ticks)]
    for vmm in left:
        sigcont(vmm.pid, vmm.start_ticks)
    if len(left) == 1:
        return
    try:
        with reach(new.pid, new.start_ticks, [new.qmp, old.qmp], until) as qmp:
            state = run_state(qmp, until)
            if state not in LOADING:
                sigstop(old.pid, old.start_ticks)
                if not (state in RUNNING or state in OVER or state in NOT_OURS):
                    refused = cont(qmp, max(until, time.monotonic() + CONT_S))
                    if refused is not None:
                        raise refused
                kill_and_wait(old.pid, old.start_ticks, until + _TOTAL_S)
                return
    except ProcessGone:
        return
    roll_back(old, [(new.pid, new.start_ticks)], until, ours=False, begun=True)
