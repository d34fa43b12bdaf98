"""What a pause budget leaves for the work during the pause: planner and host must agree, or the host refuses a plan at its start.

A margin is a tenth of the budget, at least 0.1 s and at most 1 s. The last three are for ending the update,
resuming the VMs, and the guard's own resume.
"""

from __future__ import annotations

DIGEST_S = 0.5  # s: what a plan allows for one digest of all memory; 64 MiB, the default limit, take 0.1 s
PREPARE_S = 60.0  # s: to start and check new VMM processes while the VMs run; a QEMU starts in 50 ms
SHUTDOWN_S = 120.0
"""s: what a VM may take to shut down for an update with impact reboot, unless the update says otherwise."""
START_S = 90.0
"""s: what a VM may take from its start until it is up again, after such an update."""
MIN_BUDGET_S = 0.5  # s: below it the margins leave nothing for the update


def margin_s(budget_s: float) -> float:
    """One margin of a budget, seconds."""
    return min(max(budget_s / 10, 0.1), 1.0)


def usable_s(budget_s: float) -> float:
    """Seconds of a budget that an update or a hold can use, at best."""
    return budget_s - 3 * margin_s(budget_s)


def budget_refusal(budget_s: float, needs_s: float) -> str | None:
    """Why a budget is too short for what happens during the pause, which takes ``needs_s`` seconds; None if it suffices."""
    if budget_s < MIN_BUDGET_S:
        return f"a pause budget of {budget_s:g} s is too short: resuming in time needs at least {MIN_BUDGET_S:g} s"
    if needs_s > usable_s(budget_s):
        return (
            f"takes {needs_s:g} s, a pause budget of {budget_s:g} s leaves {usable_s(budget_s):.2f} s for it "
            "(the rest is for the resume)"
        )
    return None


def digest_by_s(budget_s: float) -> float:
    """Seconds after the start of a pause by which a digest of all memory must be done: the last third of the budget is for the resume."""
    # A small budget is mostly margins: there the update must end before the last third.
    return min(budget_s * 2 / 3, usable_s(budget_s))
