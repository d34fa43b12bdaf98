"""The pause of a domain through its daemon, and its end, each awaited until it is seen. Blocking."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from typing import Literal

from caesura_host_updater.drivers.port import FreezeFailed, NotRunningYet
from caesura_vmcontrol.libvirt_control import (
    DomainNotPaused,
    DomainPausedBefore,
    domain_look,
    suspend_domain,
)
from caesura_vmcontrol.libvirt_rpc import LibvirtPlan, LibvirtSilent
from caesura_vmcontrol.vm_control import resume_vm

_STEP_S = 0.005  # s: between two looks at a domain that is to be paused or to run
PAUSED_BEFORE = "it was paused by somebody else before anything was done"
_NOT_BY_US = "it is paused, and not by Caesura"

End = Literal["running", "gone", "left"]


@dataclass(frozen=True)
class ResumeResult:
    """How a resume ended.

    Args:
        why_left: where it was left.
        was_paused: whether it was seen to be paused before.
    """

    end: End
    why_left: str = ""
    was_paused: bool = False


class SuspendedBefore(FreezeFailed):
    """Somebody else had paused it."""


class SuspendUnanswered(FreezeFailed):
    """The daemon did not answer; it may carry the pause out later."""


def pause_domain(plan: LibvirtPlan, by: float, stop: threading.Event) -> None:
    """Have the daemon suspend it, then look until it is seen to be paused; not begun after ``by`` (CLOCK_MONOTONIC).

    Raises:
        SuspendedBefore, SuspendUnanswered: as they say.
        FreezeFailed: it is not paused, or that could not be shown.
    """
    vm = plan.vm
    if stop.is_set() or time.monotonic() >= by:
        raise FreezeFailed(vm, "it was too late to freeze it", untouched=True)
    try:
        suspend_domain(plan, by)
    except DomainPausedBefore as error:
        raise SuspendedBefore(vm, f"{PAUSED_BEFORE}: {_by_hand(plan)}; {error}", untouched=True) from error
    except DomainNotPaused as error:
        raise FreezeFailed(vm, str(error), untouched=True) from error
    except LibvirtSilent as error:
        raise SuspendUnanswered(vm, f"{error}; if it is paused later it is resumed at once") from error
    except OSError as error:
        raise FreezeFailed(vm, str(error)) from error
    _await_pause(plan, by, stop)


def _await_pause(plan: LibvirtPlan, by: float, stop: threading.Event) -> None:
    """A look that fails is followed by the next: a daemon may be busy for a moment. Raises FreezeFailed."""
    while True:
        try:
            state = domain_look(plan).condition
        except OSError as error:
            seen = str(error)
        else:
            if state == "frozen":
                return
            if state == "gone":
                raise FreezeFailed(
                    plan.vm, "ended while it was being frozen, or was paused by something else"
                )
            seen = f"libvirt says {state}"
        if stop.is_set() or time.monotonic() >= by:
            raise FreezeFailed(plan.vm, f"is not paused in time: {seen}")
        time.sleep(_STEP_S)


def _by_hand(plan: LibvirtPlan) -> str:
    return f"resume it with `virsh -c {plan.uri} resume {plan.uuid}`"


def resume_until(plan: LibvirtPlan, timeout_s: float, *, ours: bool) -> ResumeResult:
    """Resume it until it runs, also where nobody says whether it does: there may be a way for that where none is to look.

    Args:
        ours: whether our pause may have reached it; if not, one that is paused is left.

    Raises:
        NotRunningYet: not within ``timeout_s`` seconds.
    """
    until = time.monotonic() + timeout_s
    was_paused = False
    while True:
        look, why = None, ""
        try:
            look = domain_look(plan)
        except OSError as error:
            why = str(error)
        if look is not None and look.condition == "running":
            return ResumeResult("running", was_paused=was_paused)
        if look is not None and look.condition == "gone":
            return ResumeResult("left", look.not_ours) if look.not_ours else ResumeResult("gone")
        if not ours:
            not_by_us = f"{_NOT_BY_US}: {_by_hand(plan)}"
            why_left = f"{why}; nothing was done to it" if look is None else look.busy or not_by_us
            return ResumeResult("left", why_left)
        was_paused = was_paused or (look is not None and look.condition == "frozen")
        try:
            resume_vm(plan)
        except OSError as error:
            why = str(error)
        if time.monotonic() >= until:
            state = "nothing" if look is None else look.condition
            raise NotRunningYet(plan.vm, why or f"libvirt says {state} after {timeout_s:.2f} s")
        time.sleep(_STEP_S)
