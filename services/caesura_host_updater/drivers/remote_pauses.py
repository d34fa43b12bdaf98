"""What drivers need whose pauses another process carries out (an engine, a daemon): a pause that comes late, one resume at a time."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Literal

from caesura.runtime.logs import get_logger
from caesura.runtime.threads import in_thread
from caesura_host_updater.drivers.port import NotRunningYet
from caesura_vmcontrol.resume_plans import ResumePlan
from caesura_vmcontrol.vm_control import condition, resume_vm

_LATE_S = 600.0
"""s: how long a pause that was not answered is looked for: a request that was accepted may take effect later."""

_log = get_logger("caesura.driver")


class LatePauses:
    """Pauses that were asked for and not answered; one that is carried out after all is undone.

    Args:
        plan_of: how a VM is resumed; None: it does not run.
        who: what carries pauses out, for the log.
    """

    def __init__(self, plan_of: Callable[[str], ResumePlan | None], who: str) -> None:
        self._plan_of = plan_of
        self._who = who
        self._until: dict[str, float] = {}
        self._lock = threading.Lock()

    def forget(self, vm: str) -> None:
        """A new pause of it begins. In a thread: waits until one that is being undone is over."""
        with self._lock:
            self._until.pop(vm, None)

    def expect(self, vm: str) -> None:
        """A pause of it was not answered."""
        self._until[vm] = time.monotonic() + _LATE_S

    async def undo(self) -> None:
        """Resume what was paused late."""
        for vm in [vm for vm, until in self._until.items() if time.monotonic() > until]:
            self._until.pop(vm, None)
        for vm in list(self._until):
            plan = self._plan_of(vm)
            if plan is None:
                continue
            with suppress(OSError):
                if await in_thread(f"resume {vm}", lambda plan=plan: self._undo(plan)):  # type: ignore[misc]
                    _log.error(
                        "vm.paused_late", vm=vm, hint=f"{self._who} carried out a pause that had failed"
                    )

    def _undo(self, plan: ResumePlan) -> bool:
        with self._lock:
            # Our next pause may have begun since.
            if plan.vm not in self._until or condition(plan) in ("running", "gone"):
                return False
            resume_vm(plan)
            return True


class ResumeTries:
    """One try at a time for each VM: while another process keeps one waiting, no further request is sent after it."""

    def __init__(self) -> None:
        self._under_way: dict[str, asyncio.Future[Literal["running", "gone"]]] = {}

    async def resume(
        self, vm: str, timeout_s: float, work: Callable[[], Literal["running", "gone"]], silent: str
    ) -> Literal["running", "gone"]:
        """What ``work`` returns, in a thread; the try that is under way, if there is one.

        Raises:
            NotRunningYet: not within ``timeout_s`` seconds; the text begins with ``silent``.
        """
        trying = self._under_way.get(vm)
        if trying is None or trying.done():
            trying = asyncio.ensure_future(in_thread(f"resume {vm}", work))
            self._under_way[vm] = trying
        done, _ = await asyncio.wait([trying], timeout=timeout_s)
        if not done:
            raise NotRunningYet(vm, f"{silent} within {timeout_s:g} s")
        self._under_way.pop(vm, None)
        return trying.result()
