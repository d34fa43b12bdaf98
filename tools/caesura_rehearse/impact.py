"""What an event does to the programs of its VMs: they are paused and continue, are ended, or are started again.

A pause is guarded as on a host: the pause guard, a process of its own, holds the way out before anything is stopped (I2).
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress

from caesura.runtime.cleanup import shielded
from caesura.runtime.threads import in_thread, in_thread_to_its_end
from caesura_rehearse.guarding import Guards
from caesura_rehearse.observations import EventRecord, Gap
from caesura_rehearse.orders import Order
from caesura_rehearse.pausing import NotPaused, TargetPlan, cpu_seconds, pause, resume
from caesura_rehearse.slots import Slot

_RESUME_S = 1.0  # s: some milliseconds are usual
_GUARD_MARGIN_S = 2.0  # s after the pause should be over until the guard ends it; within 30 s in all
_CPU_S = 0.005  # s: the accounts of a thread that was just stopped are a scheduler's tick behind
_SHORT_S = 0.02  # s: what a pause may be shorter than ordered, by the granularity of two looks at the kernel


class Impact:
    """Performs it.

    Args:
        guards: of the pauses.
        began: the instant (CLOCK_MONOTONIC, seconds) at which the rehearsal began.
        say: called with each piece of news, for people.
        changed: called after each change.
    """

    def __init__(
        self, guards: Guards, began: float, say: Callable[[str], None], changed: Callable[[], None]
    ) -> None:
        self._guards = guards
        self._began = began
        self._say = say
        self._changed = changed

    async def perform(self, record: EventRecord, order: Order, slots: Sequence[Slot]) -> None:
        """What the event does to these VMs.

        Raises:
            NotPaused: a pause was not what was ordered.
            NoTarget: a program does not run, or cannot be started again.
            GuardUnavailable: nothing guards the pause.
        """
        concerned = [slot for slot in slots if slot.target is not None]
        match order.event:
            case "Freeze":
                if order.duration_s > 0 and concerned:
                    await self._freeze(record, order.duration_s, concerned)
            case "Reboot" | "Redeploy":
                await asyncio.gather(*(self._end(slot, order.grace_s, again=True) for slot in concerned))
                await asyncio.gather(*(self._start_again(slot) for slot in concerned))
            case "Preempt" | "Terminate":
                await asyncio.gather(*(self._end(slot, order.grace_s) for slot in concerned))

    async def _end(self, slot: Slot, grace_s: float, *, again: bool = False) -> None:
        if slot.target is not None:
            slot.ending = True
            await slot.target.end(grace_s, again=again)
            self._changed()

    async def _start_again(self, slot: Slot) -> None:
        if slot.target is not None:
            await slot.target.start()
            slot.ending, slot.exited = False, None
            self._changed()

    async def _freeze(self, record: EventRecord, duration_s: float, slots: Sequence[Slot]) -> None:
        plans: dict[str, TargetPlan] = {
            slot.vm: await in_thread(f"look at {slot.vm}", slot.target.plan)
            for slot in slots
            if slot.target is not None and not slot.target.ended.is_set()
        }
        guard = await self._guards.ready(record.set)
        deadline = time.monotonic() + min(duration_s + _GUARD_MARGIN_S, 30.0)
        await guard.arm(record.event_id, deadline, list(plans.values()))
        try:
            await self._hold(record, duration_s, plans, guard.lost)
        finally:
            await shielded(guard.disarm(record.event_id))
        self._check(record, duration_s)

    async def _hold(
        self, record: EventRecord, duration_s: float, plans: Mapping[str, TargetPlan], lost: asyncio.Event
    ) -> None:
        """Pause, wait, resume, whatever happens in between."""
        stopped: dict[str, float] = {}
        cpu: dict[str, float] = {}
        try:
            await asyncio.gather(*(self._stop_one(plan, stopped) for plan in plans.values()))
            record.paused = time.monotonic() - self._began
            self._say(f"paused: {', '.join(plans)}")
            self._changed()
            cpu = await in_thread("cpu", lambda: {vm: cpu_seconds(plan) for vm, plan in plans.items()})
            left_s = max(stopped.values()) + duration_s - time.monotonic()
            with suppress(TimeoutError):
                async with asyncio.timeout(max(left_s, 0.0)):
                    await lost.wait()
        finally:
            await shielded(self._resume_all(record, plans, stopped, cpu))

    @staticmethod
    async def _stop_one(plan: TargetPlan, stopped: dict[str, float]) -> None:
        def work(stop: threading.Event) -> float:
            return pause(plan, stop)

        stopped[plan.vm] = await in_thread_to_its_end(f"pause {plan.vm}", work)

    async def _resume_all(
        self,
        record: EventRecord,
        plans: Mapping[str, TargetPlan],
        stopped: Mapping[str, float],
        cpu: Mapping[str, float],
    ) -> None:
        async def one(vm: str, plan: TargetPlan) -> None:
            def work() -> tuple[float, float, bool]:
                used = cpu_seconds(plan)
                return used, *resume(plan, _RESUME_S)

            used, running_at, was_stopped = await in_thread(f"resume {vm}", work)
            if vm in stopped:
                gap = Gap(
                    vm=vm,
                    began=stopped[vm] - self._began,
                    seconds=running_at - stopped[vm],
                    cpu_s=max(used - cpu.get(vm, used), 0.0),
                    resumed_by="rehearse" if was_stopped else "somebody else",
                )
                record.gaps.append(gap)

        results = await asyncio.gather(*(one(vm, plan) for vm, plan in plans.items()), return_exceptions=True)
        record.resumed = time.monotonic() - self._began
        self._say(f"resumed: {', '.join(plans)}")
        self._changed()
        for each in results:
            if isinstance(each, BaseException):
                raise each

    def _check(self, record: EventRecord, duration_s: float) -> None:
        """Whether the pause was what was ordered. Raises NotPaused."""
        for gap in record.gaps:
            if gap.resumed_by != "rehearse":
                raise NotPaused(f"{gap.vm} did not stay paused: {gap.resumed_by} resumed it")
            if gap.seconds < duration_s - _SHORT_S:
                raise NotPaused(f"{gap.vm} was paused for {gap.seconds:.3f} s only: the pause guard was lost")
            if gap.cpu_s > _CPU_S:
                raise NotPaused(f"{gap.vm} used {gap.cpu_s:.3f} s of CPU in its pause")
