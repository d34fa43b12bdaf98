"""One clock-sync: measure over the bus, step, measure again. The arithmetic and the decisions are in ``ntp``."""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Literal

from caesura.bus.port import BusError
from caesura.contract.messages import AgentClockSynced, ClockSyncAnswered, ClockSyncRequested
from caesura.runtime.identity import new_id
from caesura.runtime.logs import get_logger
from caesura_vm_agent.guest_clock import ClockError, GuestClock
from caesura_vm_agent.ntp import (
    NS_PER_S,
    Done,
    ImplausibleExchange,
    MeasureAgain,
    NtpSample,
    SyncPolicy,
    best,
    error_found,
    measure,
    next_step,
)

Trigger = Literal["start", "resume", "periodic"]
Ask = Callable[[ClockSyncRequested], Awaitable[None]]
"""Publishes one request at QoS 0; raises BusError when there is no connection."""

_STEPS_KEPT = 16  # a pause that is announced late is still matched with the step that corrected it
_SILENCE = 4  # exchanges lost in a row: there is no peer to answer, waiting for more only delays the verdict
# After a pause there is one, which has just announced it and waits 10 s for the verdict: a busy machine may keep all of them silent for seconds.
_SILENCE_AFTER_PAUSE = 16

_log = get_logger("caesura.agent")


class ClockSync:
    """Keeps the guest clock right against the host's. One sync at a time."""

    def __init__(self, vm: str, boot_id: str, clock: GuestClock, policy: SyncPolicy, ask: Ask) -> None:
        self._vm = vm
        self._boot_id = boot_id
        self._clock = clock
        self._policy = policy
        self._ask = ask
        self._waiting: dict[str, asyncio.Future[tuple[ClockSyncAnswered, int]]] = {}
        self._one = asyncio.Lock()
        self._stepped: deque[NtpSample] = deque(maxlen=_STEPS_KEPT)

    def answered(self, answer: ClockSyncAnswered, t4_ns: int) -> None:
        """An answer arrived at guest time ``t4_ns``; one that nothing waits for any more is ignored."""
        waiting = self._waiting.get(answer.exchange)
        if waiting is not None and not waiting.done():
            waiting.set_result((answer, t4_ns))

    async def run(
        self,
        trigger: Trigger,
        operation: str = "",
        *,
        paused_at_s: float | None = None,
        host_known: bool = True,
    ) -> AgentClockSynced:
        """Measure, step if needed, measure again; returns the message with the result.

        Args:
            host_known: whether only the VM's own host is accepted. If not, anybody may have announced the resume.
            paused_at_s: when the pause began that this sync is about, seconds since 1970 by the host's clock.
        """
        async with self._one:
            return await self._run(trigger, operation, paused_at_s, host_known=host_known)

    async def _run(
        self, trigger: Trigger, operation: str, paused_at_s: float | None, *, host_known: bool
    ) -> AgentClockSynced:
        earlier = tuple(self._stepped)
        policy = self._policy
        threshold_s = policy.periodic_threshold_s if trigger == "periodic" else policy.step_threshold_s
        resumed = trigger == "resume"
        most_s = math.inf if resumed and host_known else policy.step_most_s
        limited = "while no record names this VM's host" if resumed else "outside a resume"
        rounds: list[NtpSample | None] = []
        answers = steps = 0
        while True:
            samples = await self._measure(_SILENCE_AFTER_PAUSE if resumed else _SILENCE)
            answers += len(samples)
            rounds.append(best(samples))
            step = next_step(
                rounds,
                steps=steps,
                threshold_s=threshold_s,
                bound_s=policy.bound_s,
                most_s=most_s,
                limited=limited,
            )
            if isinstance(step, Done):
                break
            if isinstance(step, MeasureAgain):
                continue
            steps += 1
            try:
                self._clock.step(step.by_ns)
            except ClockError as error:
                step = Done(synced=False, reason=str(error))
                break
            if (found := rounds[-1]) is not None:
                self._stepped.append(found)
            _log.info("clock.stepped", by_s=step.by_ns / NS_PER_S, trigger=trigger, operation=operation)
        first, last = rounds[0], rounds[-1]
        return AgentClockSynced(
            vm=self._vm,
            boot_id=self._boot_id,
            trigger=trigger,
            operation=operation,
            synced=step.synced,
            error_before_s=error_found(first, earlier, paused_at_s=paused_at_s),
            error_after_s=None if last is None else last.error_ns / NS_PER_S,
            uncertainty_s=None if last is None else last.uncertainty_ns / NS_PER_S,
            exchanges=answers,
            simulated=self._clock.simulated,
            reason=step.reason,
            refused_step_s=None if step.refused_ns is None else step.refused_ns / NS_PER_S,
        )

    async def _measure(self, silence: int) -> list[NtpSample]:
        """One round of exchanges, one after the other: side by side they would delay each other.

        Args:
            silence: exchanges, all lost, after which it ends without a sample.
        """
        samples: list[NtpSample] = []
        tried = 0
        while tried < (self._policy.exchanges if samples else silence):
            tried += 1
            sample = await self._exchange()
            if sample is not None:
                samples.append(sample)
        return samples

    async def _exchange(self) -> NtpSample | None:
        exchange = new_id()
        answer: asyncio.Future[tuple[ClockSyncAnswered, int]] = asyncio.get_running_loop().create_future()
        self._waiting[exchange] = answer
        try:
            t1_ns = self._clock.now_ns()
            async with asyncio.timeout(self._policy.answer_timeout_s):
                await self._ask(ClockSyncRequested(vm=self._vm, exchange=exchange, t1_ns=t1_ns))
                reply, t4_ns = await answer
            # t1 from our own memory: the one that the answer repeats was in other hands.
            return measure(
                t1_ns,
                reply.t2_ns,
                reply.t3_ns,
                t4_ns,
                max_delay_ns=round(self._policy.max_delay_s * NS_PER_S),
            )
        except (TimeoutError, BusError) as error:
            _log.debug("clock.no_answer", error=type(error).__name__)
        except ImplausibleExchange as error:
            _log.debug("clock.exchange_discarded", why=str(error))
        finally:
            del self._waiting[exchange]
        return None
