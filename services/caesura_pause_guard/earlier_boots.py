"""What the ordinary guard does with an intent of another boot, where neither the initramfs nor a unit has resumed its guests."""

from __future__ import annotations

import threading
from collections.abc import Mapping

from caesura_pause_guard.arrival import Log, examine, out_of_reach, rehearse
from caesura_vmcontrol.intent import Intent
from caesura_vmcontrol.kernel_change import Arrival
from caesura_vmcontrol.procfs import Process
from caesura_vmcontrol.qemu_plans import ReplacePlan
from caesura_vmcontrol.resume_plans import ResumePlan
from caesura_vmcontrol.vm_control import resume_vm


class Examination:
    """At the guard's start, and again before each try until it succeeds.

    A full disk, or a carve-out that does not answer, must not keep guests in their files when it is mended.
    """

    def __init__(self, folder: str, log: Log) -> None:
        self._folder = folder
        self._log = log
        self._open: Intent | None = None
        self._lock = threading.Lock()

    def begin(self, intent: Intent) -> None:
        """At the guard's start, with an intent of another boot. Raises OSError: it is tried again before guests are resumed."""
        self._open = intent
        arrival = self._examine(intent)
        if intent.kernel_change is not None and intent.kernel_change.rehearsal:
            rehearse(arrival, self._log)
        intent.plans = tuple(plan for plan in intent.plans if not out_of_reach(intent, plan))

    def _examine(self, intent: Intent) -> Arrival:
        arrival = examine(intent, self._folder, "guard", self._log)
        self._open = None
        return arrival

    def release(self, plan: ResumePlan, table: Mapping[int, Process] | None) -> None:
        """As ``vm_control.resume_vm``; called in several threads."""
        with self._lock:
            if self._open is not None and isinstance(plan, ReplacePlan):
                self._examine(self._open)
        resume_vm(plan, table)
