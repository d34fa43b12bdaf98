"""VMs that are paused with our marker though no process holds their operation: found at a start, and resumed.

The guard does this when its intent is missing or damaged, the host updater before it opens its journal: neither
needs anything but the markers, and both use the same code.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from queue import Empty, SimpleQueue

from caesura_vmcontrol import markers
from caesura_vmcontrol.freezer_control import Condition
from caesura_vmcontrol.intent import Intent
from caesura_vmcontrol.procfs import process_table
from caesura_vmcontrol.resume_plans import ResumePlan, SignalPlan
from caesura_vmcontrol.vm_control import condition
from caesura_vmcontrol.watchdog import Log, Watchdog

_LOOK_S = 1.0  # s: for a first look at all marked VMs; a QEMU is queried for half a second
_STEP_S = 0.02  # s: between two steps at most, so that it ends soon after ``stop`` is set


class _NoStore:
    """The result is returned to the caller and kept in no file."""

    def store(self, _intent: Intent) -> None:
        """Does nothing."""

    def clear(self) -> None:
        """Does nothing."""


def marked_and_paused(state_dir: str, boot: str, log: Log) -> Intent | None:
    """What is paused with our marker, as an operation to undo at once; None: nothing is. Blocking, about a second.

    A marker of another boot is about processes that ended with that boot.
    """
    plans: dict[str, tuple[str, float, ResumePlan]] = {}
    for vm, marker in markers.read(state_dir).items():
        if marker is None:
            plan = markers.recovery_plan(state_dir, vm, boot)
            log("marker.damaged", vm=vm, way_out="from its run files" if plan is not None else "none")
            if plan is not None:
                plans[vm] = ("", time.monotonic(), plan)
        elif marker.boot_id == boot:
            plans[vm] = (marker.operation, marker.at, marker.plan)
    paused = _paused([plan for _, _, plan in plans.values()])
    if not paused:
        return None
    known = [plans[vm] for vm in paused if plans[vm][0]]
    operation, armed_at, _ = (
        max(known, key=lambda each: each[1]) if known else ("unknown", time.monotonic(), None)
    )
    return Intent(operation, boot, armed_at, time.monotonic(), tuple(plans[vm][2] for vm in sorted(paused)))


def _paused(plans: list[ResumePlan]) -> set[str]:
    """Those that do not run, or cannot be inspected in time."""
    found: SimpleQueue[tuple[str, Condition]] = SimpleQueue()
    table = process_table() if any(isinstance(plan, SignalPlan) for plan in plans) else None

    def look(plan: ResumePlan) -> None:
        try:
            state = condition(plan, table)
        except Exception:  # noqa: BLE001 - whatever it is, it cannot be seen to run
            state = "held"
        found.put((plan.vm, state))

    for plan in plans:
        with suppress(RuntimeError):  # no thread can be started: it counts as not seen to run
            threading.Thread(target=look, args=(plan,), name=f"look at {plan.vm}", daemon=True).start()
    left = {plan.vm for plan in plans}
    until = time.monotonic() + _LOOK_S
    paused = set()
    for _ in plans:
        try:
            vm, state = found.get(timeout=max(until - time.monotonic(), 0))
        except Empty:
            break
        left.discard(vm)
        if state not in ("running", "gone"):
            paused.add(vm)
    return paused | left


def resume(intent: Intent, why: str, log: Log, until: float, stop: Callable[[], bool]) -> Mapping[str, float]:
    """Resume everything of ``intent``, as the guard does; returns who runs, and since when (CLOCK_MONOTONIC). Blocking.

    Ends at ``until``, or when ``stop`` says so: VMs that do not run by then are left to the caller.
    """
    watch = Watchdog(_NoStore(), log)
    watch.adopt(intent, why)
    while watch.state == "firing" and time.monotonic() < until and not stop():
        wait_s = watch.step()
        if watch.state == "firing":
            time.sleep(min(_STEP_S, wait_s or 0))
    fired = intent.fired
    caught = fired.vms.items() if fired is not None else ()
    return {
        vm: catch.running_at
        for vm, catch in caught
        if catch.end == "running" and catch.running_at is not None
    }
