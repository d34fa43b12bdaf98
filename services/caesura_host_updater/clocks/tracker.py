"""Waiting for the clocks of resumed VMs: which are queried, which answered, which are flagged as unsynced."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import UTC, datetime

import msgspec

from caesura.contract.messages import AgentClockSynced, MemoryProof, VmClockSynced, VmResumed
from caesura.delivery.message import OutboxMessage
from caesura.lifecycle.proof import memory_proof
from caesura.runtime.logs import get_logger
from caesura_host_updater.clocks.verdict import (
    ClockCheck,
    by_wrong_clock,
    judge,
    judge_driver,
    same_boot,
    unsynced,
)
from caesura_host_updater.drivers.port import ClockCapable, Driver, DriverError, NotPossible

_BOOT_ID_S = 0.5  # s: for a guest to report its boot id before it is paused
REPEAT_S = 2.0  # s: the agent may have been away when `resumed` was published: it is repeated this often

_log = get_logger("caesura.clock")


class _PendingSync:
    """One VM that waits. Instants on CLOCK_MONOTONIC."""

    def __init__(self, wait: ClockCheck) -> None:
        self.wait = wait
        self.answer: AgentClockSynced | None = None
        self.resumed: OutboxMessage | None = None
        self.published_at: float | None = None
        self.repeat_at = 0.0
        self.asking: asyncio.Task[VmClockSynced] | None = None
        """The driver is setting the clock from outside."""


def _fuller(earlier: AgentClockSynced | None, later: AgentClockSynced) -> AgentClockSynced:
    """Of two answers to one resume, the one with the canary, whichever arrived first."""
    return earlier if earlier is not None and later.canary is None and earlier.canary is not None else later


class ClockSyncTracker:
    """Judges each resumed VM's clock once.

    The time limit begins when the broker has accepted `resumed`: before that no agent can know. It begins
    again when the broker was away, and the verdict never precedes the operation's report. A VM without an
    agent, or whose agent is silent or fails, is set through the driver where that is possible.

    Args:
        verdict: receives each verdict, with the operation it is about.
        repeat: publishes a `resumed` again.
        host_clock_error: why the host's own clock cannot be the reference; then no clock that was set by it is called right.
    """

    def __init__(
        self,
        host: str,
        driver: Driver,
        *,
        has_agent: Callable[[str], bool],
        timeout_s: float,
        verdict: Callable[[VmClockSynced], None],
        repeat: Callable[[OutboxMessage], None],
        host_clock_error: Callable[[], str] = lambda: "",
    ) -> None:
        self._host_clock_error = host_clock_error
        self._host = host
        self._driver = driver
        self._has_agent = has_agent
        self._timeout_s = timeout_s
        self._verdict = verdict
        self._repeat = repeat
        self._open: dict[str, _PendingSync] = {}
        self._early: dict[
            tuple[str, str], tuple[OutboxMessage | None, AgentClockSynced | None, float | None]
        ] = {}
        self._stir = asyncio.Event()
        self._all_judged = asyncio.Event()
        self._all_judged.set()

    def __len__(self) -> int:
        return len(self._open)

    async def kernel_boot_ids(self, vms: Sequence[str]) -> dict[str, str]:
        """Before a pause: what shows afterwards that memory stayed, should no agent answer. Empty: unknown."""

        async def ask(vm: str) -> str:
            with suppress(DriverError, TimeoutError):
                async with asyncio.timeout(_BOOT_ID_S):
                    return await self._clocks(vm).guest_boot_id(vm)
            return ""

        return dict(zip(vms, await asyncio.gather(*map(ask, vms)), strict=True))

    def on_resume_published(self, resumed: OutboxMessage, message: VmResumed) -> None:
        """The broker has accepted a VM's `resumed`."""
        pending = self._find_pending(message.vm, message.operation)
        now = time.monotonic()
        if pending is None:
            _, answer, _ = self._early.get((message.vm, message.operation), (None, None, None))
            self._early[message.vm, message.operation] = (resumed, answer, now)
        elif pending.resumed is None:
            pending.resumed, pending.published_at, pending.repeat_at = resumed, now, now + REPEAT_S
            self._stir.set()

    def answered(self, message: AgentClockSynced) -> None:
        """An agent measured its clock."""
        if message.trigger != "resume" or not message.operation:
            return
        pending = self._find_pending(message.vm, message.operation)
        if pending is not None:
            pending.answer = _fuller(pending.answer, message)
            self._stir.set()
            return
        this = (message.vm, message.operation)
        resumed, earlier, at = self._early.get(this, (None, None, None))
        if resumed is None:
            # It may arrive before the broker's acknowledgement of `resumed`. One such answer of a VM is kept.
            for key, early in list(self._early.items()):
                if key[0] == message.vm and key != this and early[0] is None:
                    del self._early[key]
        self._early[this] = (resumed, _fuller(earlier, message), at)

    def track(self, waits: Sequence[ClockCheck], *, already_published: bool = False) -> None:
        """An operation was reported: its VMs may be judged from now on.

        ``already_published``: the broker may have accepted their `resumed` in a previous run of this service.
        """
        for wait in waits:
            if wait.vm in self._open:
                why = "it was paused again before its clock was corrected"
                self._close(
                    self._open[wait.vm],
                    unsynced(self._host, self._open[wait.vm].wait, why, datetime.now(UTC)),
                )
            pending = self._open[wait.vm] = _PendingSync(wait)
            pending.resumed, pending.answer, pending.published_at = self._early.get(
                (wait.vm, wait.operation), (None, None, None)
            )
            pending.repeat_at = time.monotonic() + REPEAT_S
            if already_published and pending.published_at is None:
                pending.published_at = time.monotonic()
        if waits:  # a report without VMs (refused, cancelled) may arrive while another operation is under way
            self._early.clear()
        if self._open:
            self._all_judged.clear()
        self._stir.set()

    def waits_for(self, wait: ClockCheck) -> bool:
        """Whether the verdict is still due."""
        return self._find_pending(wait.vm, wait.operation) is not None

    async def wait_all_judged(self, timeout_s: float) -> bool:
        """Wait until no VM waits for its verdict; whether that happened in time."""
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._all_judged.wait()
        return self._all_judged.is_set()

    def connected(self) -> None:
        """The broker is back: every VM that waits gets the whole time limit again."""
        for pending in self._open.values():
            if pending.published_at is not None:
                pending.published_at = time.monotonic()
                pending.repeat_at = pending.published_at + REPEAT_S
        self._stir.set()

    def _find_pending(self, vm: str, operation: str) -> _PendingSync | None:
        pending = self._open.get(vm)
        return pending if pending is not None and pending.wait.operation == operation else None

    async def run(self) -> None:
        """Judge, repeat and give up. Never ends."""
        try:
            while True:
                self._stir.clear()
                for pending in list(self._open.values()):
                    self._look(pending)
                due = [
                    min(pending.repeat_at, (pending.published_at or pending.repeat_at) + self._timeout_s)
                    for pending in self._open.values()
                    if pending.published_at is not None and pending.asking is None
                ]
                try:
                    async with asyncio.timeout(max(0.01, min(due) - time.monotonic()) if due else None):
                        await self._stir.wait()
                except TimeoutError:
                    continue
        finally:
            for pending in self._open.values():
                if pending.asking is not None:
                    pending.asking.cancel()

    def _look(self, pending: _PendingSync) -> None:
        now = time.monotonic()
        if pending.asking is not None:
            if pending.asking.done():
                self._close(pending, self._better(pending, pending.asking.result()))
        elif pending.answer is not None and not self._waits_for_canary(pending, now):
            if why := self._host_clock_error():
                verdict = by_wrong_clock(self._host, pending.wait, pending.answer, why, datetime.now(UTC))
                self._close(pending, verdict)
                return
            verdict = judge(self._host, pending.wait, pending.answer, datetime.now(UTC))
            if verdict.synced or not self._settable(pending.wait.vm):
                self._close(pending, verdict)
            else:
                self._ask_driver(pending, f"its agent could not: {verdict.reason}")
        elif not self._has_agent(pending.wait.vm):
            self._ask_driver(pending, "no agent")
        elif pending.published_at is not None and now >= pending.published_at + self._timeout_s:
            why = f"its agent did not answer within {self._timeout_s:g} s"
            self._ask_driver(pending, why)
        elif pending.published_at is not None and pending.resumed is not None and now >= pending.repeat_at:
            pending.repeat_at = now + REPEAT_S
            self._repeat(pending.resumed)

    def _waits_for_canary(self, pending: _PendingSync, now: float) -> bool:
        """Whether the agent has its clock and still compares its canary; no longer than for a silent agent."""
        if not pending.wait.canary_writes or pending.answer is None or pending.answer.canary is not None:
            return False
        return pending.published_at is None or now < pending.published_at + self._timeout_s

    def _clocks(self, vm: str) -> ClockCapable:
        """The driver, where it reaches into guests."""
        if not isinstance(self._driver, ClockCapable):
            raise NotPossible(
                vm, f"the {self._driver.name} driver cannot set a guest's clock; its agent does"
            )
        return self._driver

    def _settable(self, vm: str) -> bool:
        """Whether the driver may be able to set the clock from outside."""
        return self._driver.capabilities(vm).clock == "system"

    def _better(self, pending: _PendingSync, by_driver: VmClockSynced) -> VmClockSynced:
        """The agent's answer, if there is one: it may have arrived while the driver was asked."""
        if pending.answer is None:
            return by_driver
        if why := self._host_clock_error():
            return by_wrong_clock(self._host, pending.wait, pending.answer, why, datetime.now(UTC))
        by_agent = judge(self._host, pending.wait, pending.answer, datetime.now(UTC))
        if by_agent.synced or not by_driver.synced:
            return by_agent
        return msgspec.structs.replace(by_driver, memory=by_agent.memory or by_driver.memory)

    def _ask_driver(self, pending: _PendingSync, why: str) -> None:
        pending.asking = asyncio.create_task(self._by_driver(pending.wait, why))
        pending.asking.add_done_callback(lambda _: self._stir.set())

    async def _by_driver(self, wait: ClockCheck, why: str) -> VmClockSynced:
        if wrong := self._host_clock_error():
            return unsynced(self._host, wait, f"{why}, and {wrong}", datetime.now(UTC))
        try:
            async with asyncio.timeout(self._timeout_s):
                clock_set = await self._clocks(wait.vm).sync_clock(wait.vm)
                memory = await self._same_boot(wait.vm, wait.kernel_boot_id)
        except DriverError as error:
            return unsynced(self._host, wait, f"{why}, and {error.why}", datetime.now(UTC))
        except TimeoutError:
            late = f"{why}, and its clock could not be set from outside within {self._timeout_s:g} s"
            return unsynced(self._host, wait, late, datetime.now(UTC))
        except Exception as error:  # noqa: BLE001 - a broken adapter must not leave the other clocks unjudged
            _log.exception("clock.driver_broken", vm=wait.vm)
            return unsynced(self._host, wait, f"{why}, and {error!r}", datetime.now(UTC))
        return judge_driver(self._host, wait, clock_set, memory, datetime.now(UTC))

    async def _same_boot(self, vm: str, before: str) -> MemoryProof | None:
        if not before:
            return None
        try:
            return same_boot(before, await self._clocks(vm).guest_boot_id(vm))
        except DriverError as error:
            return memory_proof(detail=f"its boot id could not be read: {error.why}")

    def _close(self, pending: _PendingSync, verdict: VmClockSynced) -> None:
        del self._open[pending.wait.vm]
        if not self._open:
            self._all_judged.set()
        if pending.asking is not None:
            pending.asking.cancel()
        log = _log.info if verdict.synced else _log.error
        log(
            "clock.judged",
            vm=verdict.vm,
            operation=verdict.operation,
            synced=verdict.synced,
            by=verdict.by,
            error_before_s=verdict.error_before_s,
            error_after_s=verdict.error_after_s,
            reason=verdict.reason,
        )
        self._verdict(verdict)
