"""Where the budget of a pause begins, whatever its method: the deadline of the pause guard is set. Pure part of ``machine``."""

from __future__ import annotations

from caesura_host_updater.operation.effects import Arm
from caesura_host_updater.operation.pause_deadlines import PauseDeadlines
from caesura_host_updater.operation.state import Decision, Operation, changed


def arm(op: Operation, now: float) -> Decision:
    """Everything is ready: the budget begins, and the guard is armed."""
    deadlines = PauseDeadlines.of(now, op.budget_s, durable=op.method == "kexec")
    op = changed(op, phase="arming", deadlines=deadlines, wake_at=deadlines.freeze_by)
    return op, (Arm(deadlines.guard_at),)
