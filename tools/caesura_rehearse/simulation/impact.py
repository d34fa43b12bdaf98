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
from caesura_rehearse.results.observations import EventRecord, Gap
from caesura_rehearse.simulation.conditions import Conditions
from caesura_rehearse.simulation.orders import Order
from caesura_rehearse.simulation.slots import Slot, nothing_left
from caesura_rehearse.targets.guards import Guards
from caesura_rehearse.targets.pause import NotPaused, TargetPlan, cpu_seconds, pause, resume

_RESUME_S = 1.0  # s: some milliseconds are usual
_GUARD_MARGIN_S = 2.0  # s after the pause should be over until the guard ends it; within 30 s in all
_CPU_S = 0.005  # s: the accounts of a thread that was just stopped are a scheduler's tick behind
_SHORT_S = 0.02  # s: what a pause may be shorter than ordered, by the granularity of two looks at the kernel


class Impact:
    """Performs it.

    Args:
        guards: of the pauses.
        conditions: the time of the rehearsal.
        say: called with each piece of news, for people.
    """

    def __init__(self, guards: Guards, conditions: Conditions, say: Callable[[str], None]) -> None:
        self._guards = guards
        self._conditions = conditions
        self._say = say

    async def prepare(self, set_name: str) -> None:
        """Have a guard ready for a pause of the set, before it is due. Raises GuardUnavailable."""
        await self._guards.ready(set_name)

    async def perform(self, records: Sequence[EventRecord], order: Order, slots: Sequence[Slot]) -> None:
        """What the events of a wave do to its VMs.

        Args:
            records: of the events, which get the pauses.
            slots: the VMs of all of them.

        Raises:
            NotPaused: a pause was not what was ordered.
            NoTarget: a program does not run, or cannot be started again.
            GuardUnavailable: nothing guards the pause.
        """
        concerned = [slot for slot in slots if slot.target is not None]
        match order.event:
            case "Freeze":
                if order.duration_s > 0 and concerned:
                    await self._freeze(records, records[0].event_id, order.duration_s, concerned)
                for number, each in enumerate(order.later_pauses, start=2):
                    await self._conditions.until(lambda: nothing_left(concerned), each.after_s)
                    if concerned and not nothing_left(concerned):
                        await self._freeze(
                            records, f"{records[0].event_id}-{number}", each.duration_s, concerned
                        )
            case "Reboot" | "Redeploy":
                await asyncio.gather(*(self._end(slot, order.grace_s, again=True) for slot in concerned))
                await asyncio.gather(*(self._start_again(slot) for slot in concerned))
            case "Preempt" | "Terminate":
                await asyncio.gather(*(self._end(slot, order.grace_s) for slot in concerned))

    async def _end(self, slot: Slot, grace_s: float, *, again: bool = False) -> None:
        if slot.target is not None:
            slot.ending = True
            await slot.target.end(grace_s, again=again)
            self._conditions.notify()

    async def _start_again(self, slot: Slot) -> None:
        if slot.target is not None:
            await slot.target.start()
            slot.ending, slot.exited = False, None
            self._conditions.notify()

    async def _freeze(
        self, records: Sequence[EventRecord], operation: str, duration_s: float, slots: Sequence[Slot]
    ) -> None:
        """One pause of all of them, by the guard of the first set: a wave holds the locks of all its sets."""
        plans: dict[str, TargetPlan] = {
            slot.vm: await in_thread(f"look at {slot.vm}", slot.target.plan)
            for slot in slots
            if slot.target is not None and slot.runs
        }
        guard = await self._guards.ready(records[0].set)
        deadline = time.monotonic() + min(duration_s + _GUARD_MARGIN_S, 30.0)
        await guard.arm(operation, deadline, list(plans.values()))
        try:
            gaps = await self._hold(records, duration_s, plans, guard.lost)
        finally:
            await shielded(guard.disarm(operation))
        _check(gaps, duration_s)

    async def _hold(
        self,
        records: Sequence[EventRecord],
        duration_s: float,
        plans: Mapping[str, TargetPlan],
        lost: asyncio.Event,
    ) -> Sequence[Gap]:
        """Pause, wait, resume, whatever happens in between."""
        stopped: dict[str, float] = {}
        cpu: dict[str, float] = {}
        gaps: list[Gap] = []
        try:
            await asyncio.gather(*(self._stop_one(plan, stopped) for plan in plans.values()))
            for record in records:
                record.paused = self._conditions.now if record.paused is None else record.paused
            self._say(f"paused: {', '.join(plans)}")
            self._conditions.notify()
            cpu = await in_thread("cpu", lambda: {vm: cpu_seconds(plan) for vm, plan in plans.items()})
            left_s = max(stopped.values()) + duration_s - time.monotonic()
            with suppress(TimeoutError):
                async with asyncio.timeout(max(left_s, 0.0)):
                    await lost.wait()
        finally:
            await shielded(self._resume_all(records, plans, stopped, cpu, gaps))
        return gaps

    @staticmethod
    async def _stop_one(plan: TargetPlan, stopped: dict[str, float]) -> None:
        def work(stop: threading.Event) -> float:
            return pause(plan, stop)

        stopped[plan.vm] = await in_thread_to_its_end(f"pause {plan.vm}", work)

    async def _resume_all(
        self,
        records: Sequence[EventRecord],
        plans: Mapping[str, TargetPlan],
        stopped: Mapping[str, float],
        cpu: Mapping[str, float],
        gaps: list[Gap],
    ) -> None:
        async def one(vm: str, plan: TargetPlan) -> None:
            def work() -> tuple[float, float, bool]:
                used = cpu_seconds(plan)
                return used, *resume(plan, _RESUME_S)

            used, running_at, was_stopped = await in_thread(f"resume {vm}", work)
            if vm in stopped:
                gap = Gap(
                    vm=vm,
                    began=stopped[vm] - self._conditions.began,
                    seconds=running_at - stopped[vm],
                    cpu_s=max(used - cpu.get(vm, used), 0.0),
                    resumed_by="rehearse" if was_stopped else "somebody else",
                )
                gaps.append(gap)
                next(each for each in records if vm in each.vms).gaps.append(gap)

        results = await asyncio.gather(*(one(vm, plan) for vm, plan in plans.items()), return_exceptions=True)
        for record in records:
            record.resumed = self._conditions.now
        self._say(f"resumed: {', '.join(plans)}")
        self._conditions.notify()
        for each in results:
            if isinstance(each, BaseException):
                raise each


def _check(gaps: Sequence[Gap], duration_s: float) -> None:
    """Whether the pause was what was ordered. Raises NotPaused."""
    for gap in gaps:
        if gap.resumed_by != "rehearse":
            raise NotPaused(f"{gap.vm} did not stay paused: {gap.resumed_by} resumed it")
        if gap.seconds < duration_s - _SHORT_S:
            raise NotPaused(f"{gap.vm} was paused for {gap.seconds:.3f} s only: the pause guard was lost")
        if gap.cpu_s > _CPU_S:
            raise NotPaused(f"{gap.vm} used {gap.cpu_s:.3f} s of CPU in its pause")
