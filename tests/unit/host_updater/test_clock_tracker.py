"""Who is asked about a clock, and what is flagged: agents first, then the driver, then loudly nobody."""

# The fakes take what the ports give them.
# ruff: noqa: ARG002

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any, Literal

import msgspec
import pytest

from caesura.contract.messages import AgentClockSynced, CanaryReport, VmClockSynced, VmResumed
from caesura_host_updater.clocks.tracker import ClockSyncTracker
from caesura_host_updater.clocks.verdict import ClockCheck
from caesura_host_updater.drivers.port import Capabilities, ClockSet, DriverError, NotPossible
from caesura_testing.patience import patient

NOW = datetime(2026, 1, 1, tzinfo=UTC)


class OutsideClock:
    """The part of a driver that sets clocks."""

    def __init__(self) -> None:
        self.answer: ClockSet | Exception = NotPossible("vm", "there is no guest agent")
        self.boot_id: str | Exception = "kernel-1"
        self.asked: list[str] = []
        self.clock: Literal["simulated", "system"] = "system"
        self.hold: asyncio.Event | None = None

    def capabilities(self, vm: str) -> Capabilities:
        return Capabilities(methods=(), missing={}, clock=self.clock)

    async def sync_clock(self, vm: str) -> ClockSet:
        self.asked.append(vm)
        if self.hold is not None:
            await self.hold.wait()
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer

    async def guest_boot_id(self, vm: str) -> str:
        if isinstance(self.boot_id, Exception):
            raise self.boot_id
        return self.boot_id


class Desk:
    """A desk with everything around it made up."""

    def __init__(self, *without_agent: str, timeout_s: float = 0.2) -> None:
        self.host_clock = ""
        self.driver = OutsideClock()
        driver: Any = self.driver
        self.verdicts: asyncio.Queue[VmClockSynced] = asyncio.Queue()
        self.desk = ClockSyncTracker(
            "host-1",
            driver,
            has_agent=lambda vm: vm not in without_agent,
            timeout_s=timeout_s,
            verdict=self.verdicts.put_nowait,
            repeat=lambda _: None,
            host_clock_error=lambda: self.host_clock,
        )

    def resumed(self, vm: str) -> None:
        """It runs again, and the broker has taken that."""
        resumed = VmResumed(
            vm=vm,
            host="host-1",
            set="web",
            update_domain=0,
            operation="op",
            method="swap",
            pause_s=1.0,
            budget_s=10.0,
            within_budget=True,
            resumed_by="updater",
            at=NOW,
        )
        letter: Any = object()
        self.desk.on_resume_published(letter, resumed)

    def paused(self, vm: str, boot_id: str = "") -> None:
        """It was resumed, and its operation is reported."""
        self.resumed(vm)
        self.desk.track([ClockCheck(vm, "web", 0, "op", 0.1, "agent-1", boot_id)])

    async def verdict(self) -> VmClockSynced:
        async with asyncio.timeout(patient(5)):
            return await self.verdicts.get()


@pytest.fixture
async def make() -> AsyncIterator[Any]:
    tasks = []

    def build(*without_agent: str, **options: float) -> Desk:
        desk = Desk(*without_agent, **options)
        tasks.append(asyncio.create_task(desk.desk.run()))
        return desk

    yield build
    for task in tasks:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


async def test_a_vm_without_an_agent_is_set_by_the_driver(make: Any) -> None:
    desk = make("vm")
    desk.driver.answer = ClockSet(before_s=-2.0, after_s=0.0003, uncertainty_s=0.0001)
    desk.paused("vm", boot_id="kernel-1")
    told = await desk.verdict()
    assert (told.synced, told.by) == (True, "driver")
    assert (told.error_before_s, told.error_after_s, told.uncertainty_s) == (-2.0, 0.0003, 0.0001)
    assert told.memory is not None
    assert (told.memory.proof, told.memory.ok) == ("heartbeat", True)


async def test_another_kernel_after_the_pause_is_lost_memory(make: Any) -> None:
    desk = make("vm")
    desk.driver.answer = ClockSet(before_s=-2.0, after_s=0.0, uncertainty_s=0.0)
    desk.driver.boot_id = "kernel-2"
    desk.paused("vm", boot_id="kernel-1")
    told = await desk.verdict()
    assert told.memory is not None
    assert told.memory.ok is False


async def test_an_error_beyond_the_bound_with_its_uncertainty_is_unsynced(make: Any) -> None:
    desk = make("vm")
    desk.driver.answer = ClockSet(before_s=-2.0, after_s=0.06, uncertainty_s=0.05)
    desk.paused("vm")
    told = await desk.verdict()
    assert told.synced is False
    assert "0.1100 s off" in told.reason


async def test_a_silent_agent_is_followed_by_the_driver(make: Any) -> None:
    desk = make()
    desk.driver.answer = ClockSet(before_s=-1.0, after_s=0.0, uncertainty_s=0.001)
    desk.paused("vm", boot_id="kernel-1")
    told = await desk.verdict()
    assert (told.synced, told.by) == (True, "driver")
    assert told.memory is not None
    assert (told.memory.proof, told.memory.ok) == ("heartbeat", True)


async def test_an_agent_that_answers_before_the_broker_acknowledges_the_resume_is_not_missed(
    make: Any,
) -> None:
    """Two connections: the agent may have `resumed`, and answer, before the host updater gets its acknowledgement."""
    desk = make(timeout_s=60.0)
    answer = AgentClockSynced(
        vm="vm",
        boot_id="agent-1",
        trigger="resume",
        operation="op",
        synced=True,
        error_after_s=0.001,
        uncertainty_s=0.001,
    )
    for earlier in (
        "older-1",
        "older-2",
    ):  # an answer that nobody waits for any more: only the newest is kept
        desk.desk.answered(msgspec.structs.replace(answer, operation=earlier))
    desk.desk.answered(answer)
    assert len(desk.desk._early) == 1
    desk.paused("vm")
    told = await desk.verdict()
    assert (told.synced, told.by, told.error_after_s) == (True, "agent", 0.001)


async def test_when_neither_answers_it_says_what_both_said(make: Any) -> None:
    for answer in (DriverError("vm", "the guest agent does not answer"), RuntimeError("a bug")):
        desk = make()
        desk.driver.answer = answer
        desk.paused("vm")
        told = await desk.verdict()
        assert (told.synced, told.by) == (False, "nobody")
        assert "its agent did not answer within 0.2 s" in told.reason
        assert str(answer.args[0] if isinstance(answer, RuntimeError) else answer.why) in told.reason


def told(vm: str, *, synced: bool, boot_id: str = "agent-1") -> AgentClockSynced:
    """What an agent says after a resume."""
    return AgentClockSynced(
        vm=vm,
        operation="op",
        trigger="resume",
        synced=synced,
        error_before_s=-1.0,
        error_after_s=0.0 if synced else -0.5,
        uncertainty_s=0.001,
        boot_id=boot_id,
        reason="" if synced else "not permitted to set the clock",
    )


@pytest.mark.parametrize("answered", [True, False])
async def test_a_refused_command_does_not_make_it_forget_who_was_resumed(answered: bool, make: Any) -> None:
    """It is reported while another operation is under way, whose VMs run again already."""
    desk = make(timeout_s=0.1)
    desk.resumed("vm")
    if answered:
        desk.desk.answered(told("vm", synced=True))
    desk.desk.track([])  # the refusal
    desk.desk.track([ClockCheck("vm", "web", 0, "op", 0.1, "agent-1", "")])
    verdict = await desk.verdict()
    assert verdict.synced is answered


async def test_an_agent_that_cannot_is_followed_by_the_driver_and_its_proof_of_memory_counts(
    make: Any,
) -> None:
    desk = make(timeout_s=2.0)
    desk.driver.answer = ClockSet(before_s=-1.0, after_s=0.0, uncertainty_s=0.001)
    desk.paused("vm")
    desk.desk.answered(told("vm", synced=False))
    verdict = await desk.verdict()
    assert (verdict.synced, verdict.by) == (True, "driver")
    assert verdict.memory is not None
    assert (verdict.memory.proof, verdict.memory.ok) == ("heartbeat", True)


@pytest.mark.parametrize("clock", ["simulated", "system"])
async def test_when_neither_can_the_agent_is_quoted(make: Any, clock: str) -> None:
    desk = make(timeout_s=2.0)
    desk.driver.clock = clock
    desk.paused("vm")
    desk.desk.answered(told("vm", synced=False))
    verdict = await desk.verdict()
    assert (verdict.synced, verdict.by, verdict.reason) == (False, "agent", "not permitted to set the clock")
    assert desk.driver.asked == (["vm"] if clock == "system" else [])


async def test_a_driver_that_hangs_holds_up_nobody_else(make: Any) -> None:
    desk = make("vm-1", timeout_s=1.0)
    desk.driver.hold = asyncio.Event()
    desk.paused("vm-1")
    async with asyncio.timeout(patient(5)):
        while not desk.driver.asked:  # noqa: ASYNC110 - a plain list
            await asyncio.sleep(0.005)
    desk.paused("vm-2")
    desk.desk.answered(told("vm-2", synced=True))
    first, second = await desk.verdict(), await desk.verdict()
    assert (first.vm, first.by) == ("vm-2", "agent")
    assert (second.vm, second.by) == ("vm-1", "nobody")
    assert "could not be set from outside within 1 s" in second.reason


# -- the canary ---------------------------------------------------------------------------------------------


def answer(**changes: Any) -> AgentClockSynced:
    """A good answer of the agent to the resume."""
    values: dict[str, Any] = {
        "vm": "a",
        "boot_id": "agent-1",
        "trigger": "resume",
        "operation": "op",
        "synced": True,
        "error_after_s": 0.001,
        **changes,
    }
    return AgentClockSynced(**values)


def expect(desk: Desk, *, canary_writes: int) -> None:
    desk.resumed("a")
    desk.desk.track([ClockCheck("a", "web", 0, "op", 0.1, "agent-1", "", canary_writes)])


CANARY = CanaryReport(pages=8, writes=50)


@pytest.mark.parametrize("canary_first", [True, False])
async def test_the_verdict_waits_for_the_canary_of_an_agent_that_holds_one(
    make: Any, canary_first: bool
) -> None:
    """Messages may overtake each other; the fuller answer counts."""
    desk = make(timeout_s=60)
    expect(desk, canary_writes=40)
    answers = [answer(), answer(canary=CANARY)]
    if canary_first:
        answers.reverse()
    desk.desk.answered(answers[0])
    if not canary_first:
        await asyncio.sleep(0)
        assert len(desk.desk) == 1, "not judged without it"
    desk.desk.answered(answers[1])
    verdict = await desk.verdict()
    assert verdict.synced
    assert verdict.memory is not None
    assert verdict.memory.held == ("canary_equal", "not_rebooted")


async def test_a_canary_that_does_not_come_leaves_the_clock_right_and_memory_unproven(make: Any) -> None:
    desk = make(timeout_s=0.2)
    expect(desk, canary_writes=40)
    desk.desk.answered(answer())
    verdict = await desk.verdict()
    assert (verdict.synced, verdict.by) == (True, "agent")
    assert verdict.memory is not None
    assert verdict.memory.held == ("not_rebooted",)
    assert not desk.driver.asked, "its clock is right: nobody sets it from outside"


async def test_an_agent_without_a_canary_is_judged_at_once(make: Any) -> None:
    desk = make(timeout_s=60)
    expect(desk, canary_writes=0)
    desk.desk.answered(answer())
    assert (await desk.verdict()).synced


async def test_an_answer_before_the_report_is_completed_by_the_canary(make: Any) -> None:
    desk = make(timeout_s=60)
    desk.resumed("a")
    desk.desk.answered(answer(canary=CANARY))
    desk.desk.answered(answer())
    desk.desk.track([ClockCheck("a", "web", 0, "op", 0.1, "agent-1", "", 40)])
    verdict = await desk.verdict()
    assert verdict.memory is not None
    assert "canary_equal" in verdict.memory.held


async def test_nothing_that_was_measured_against_a_wrong_clock_is_in_bound(make: Any) -> None:
    """After a change of the host's kernel whose time nothing carried over: what the guest shows of its memory counts all the same."""
    desk: Desk = make(timeout_s=60)
    desk.host_clock = "the host's own clock may be 1 s off"
    desk.paused("a")
    desk.desk.answered(answer())
    verdict = await desk.verdict()
    assert (verdict.synced, verdict.by, verdict.reason) == (False, "nobody", desk.host_clock)
    assert verdict.memory is not None
    assert desk.driver.asked == []


async def test_nor_is_a_guest_set_by_it_from_outside(make: Any) -> None:
    desk: Desk = make("vm")
    desk.host_clock = "the host's own clock may be 1 s off"
    desk.driver.answer = ClockSet(before_s=0.5, after_s=0.0, uncertainty_s=0.001)
    desk.paused("vm")
    verdict = await desk.verdict()
    assert not verdict.synced
    assert desk.host_clock in verdict.reason
    assert desk.driver.asked == [], "it would be given the wrong time"
