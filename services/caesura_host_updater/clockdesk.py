"""Waiting for the clocks of resumed VMs: who is asked, who answered, who is flagged as unsynced."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime

import structlog

from caesura.contract.messages import AgentClockSynced, VmClockSynced, VmResumed
from caesura_host_updater.clock import ClockWait, judge, unsynced
from caesura_host_updater.drivers.port import Driver, DriverError
from caesura_host_updater.journal import Letter

REPEAT_S = 2.0  # s: the agent may have been away when `resumed` was told: it is told again this often

_log = structlog.get_logger("caesura.clock")


class _Case:
    """One VM that waits. Instants on CLOCK_MONOTONIC."""

    def __init__(self, wait: ClockWait) -> None:
        self.wait = wait
        self.answer: AgentClockSynced | None = None
        self.resumed: Letter | None = None
        self.told_at: float | None = None
        self.repeat_at = 0.0


class ClockDesk:
    """Judges each resumed VM's clock once.

    The time to answer begins when the broker has taken `resumed`: before that no agent can know. It begins
    anew when the broker was away, and the verdict never comes before the operation's report.

    Args:
        verdict: takes each verdict, with the operation it is about.
        repeat: tells a `resumed` again.
    """

    def __init__(
        self,
        host: str,
        driver: Driver,
        *,
        without_agent: frozenset[str],
        timeout_s: float,
        verdict: Callable[[VmClockSynced], None],
        repeat: Callable[[Letter], None],
    ) -> None:
        self._host = host
        self._driver = driver
        self._without_agent = without_agent
        self._timeout_s = timeout_s
        self._verdict = verdict
        self._repeat = repeat
        self._open: dict[str, _Case] = {}
        self._early: dict[tuple[str, str], tuple[Letter | None, AgentClockSynced | None, float | None]] = {}
        self._stir = asyncio.Event()

    def __len__(self) -> int:
        return len(self._open)

    def resumed_told(self, letter: Letter, message: VmResumed) -> None:
        """The broker has a VM's `resumed`."""
        case = self._case(message.vm, message.operation)
        now = time.monotonic()
        if case is None:
            _, answer, _ = self._early.get((message.vm, message.operation), (None, None, None))
            self._early[message.vm, message.operation] = (letter, answer, now)
        elif case.resumed is None:
            case.resumed, case.told_at, case.repeat_at = letter, now, now + REPEAT_S
            self._stir.set()

    def answered(self, message: AgentClockSynced) -> None:
        """An agent measured its clock."""
        if message.trigger != "resume" or not message.operation:
            return
        case = self._case(message.vm, message.operation)
        if case is not None:
            case.answer = message
            self._stir.set()
            return
        letter, _, at = self._early.get((message.vm, message.operation), (None, None, None))
        if letter is not None:  # known to be resumed, its operation not reported yet
            self._early[message.vm, message.operation] = (letter, message, at)

    def expect(self, waits: Sequence[ClockWait], *, told: bool = False) -> None:
        """An operation was reported: its VMs may be judged from now on.

        ``told``: their `resumed` may have been taken by the broker in an earlier life of ours.
        """
        for wait in waits:
            if wait.vm in self._open:
                why = "it was paused again before its clock was put right"
                self._close(
                    self._open[wait.vm],
                    unsynced(self._host, self._open[wait.vm].wait, why, datetime.now(UTC)),
                )
            case = self._open[wait.vm] = _Case(wait)
            case.resumed, case.answer, case.told_at = self._early.get(
                (wait.vm, wait.operation), (None, None, None)
            )
            case.repeat_at = time.monotonic() + REPEAT_S
            if told and case.told_at is None:
                case.told_at = time.monotonic()
        self._early.clear()
        self._stir.set()

    def connected(self) -> None:
        """The broker is back: everybody who waits gets the whole time again."""
        for case in self._open.values():
            if case.told_at is not None:
                case.told_at = time.monotonic()
                case.repeat_at = case.told_at + REPEAT_S
        self._stir.set()

    def _case(self, vm: str, operation: str) -> _Case | None:
        case = self._open.get(vm)
        return case if case is not None and case.wait.operation == operation else None

    async def run(self) -> None:
        """Judge, repeat and give up, for ever."""
        while True:
            self._stir.clear()
            for case in list(self._open.values()):
                await self._look(case)
            due = [
                min(case.repeat_at, (case.told_at or case.repeat_at) + self._timeout_s)
                for case in self._open.values()
                if case.told_at is not None
            ]
            try:
                async with asyncio.timeout(max(0.01, min(due) - time.monotonic()) if due else None):
                    await self._stir.wait()
            except TimeoutError:
                continue

    async def _look(self, case: _Case) -> None:
        now = time.monotonic()
        if case.answer is not None:
            self._close(case, judge(self._host, case.wait, case.answer, datetime.now(UTC)))
        elif case.wait.vm in self._without_agent:
            self._close(case, await self._by_driver(case.wait))
        elif case.told_at is not None and now >= case.told_at + self._timeout_s:
            why = f"its agent did not answer within {self._timeout_s:g} s"
            self._close(case, unsynced(self._host, case.wait, why, datetime.now(UTC)))
        elif case.told_at is not None and case.resumed is not None and now >= case.repeat_at:
            case.repeat_at = now + REPEAT_S
            self._repeat(case.resumed)

    async def _by_driver(self, wait: ClockWait) -> VmClockSynced:
        try:
            error_s = await self._driver.sync_clock(wait.vm)
        except DriverError as error:
            return unsynced(self._host, wait, f"no agent, and {error.why}", datetime.now(UTC))
        return VmClockSynced(
            vm=wait.vm,
            host=self._host,
            set=wait.set,
            update_domain=wait.update_domain,
            operation=wait.operation,
            synced=abs(error_s) <= wait.bound_s,
            by="driver",
            error_after_s=error_s,
            reason="" if abs(error_s) <= wait.bound_s else f"{error_s:.4f} s off after the sync",
            at=datetime.now(UTC),
        )

    def _close(self, case: _Case, verdict: VmClockSynced) -> None:
        del self._open[case.wait.vm]
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
