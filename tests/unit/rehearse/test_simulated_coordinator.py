"""The course of events: what waits for what. Programs and documents are stand-ins; the waits are those of the test."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest

from caesura_rehearse.results.observations import Observations
from caesura_rehearse.simulation.conditions import Conditions
from caesura_rehearse.simulation.faults import FaultQueue, RequestFaults, parse_fault
from caesura_rehearse.simulation.members import SetMember, members_of
from caesura_rehearse.simulation.orders import Order, OrderRefused
from caesura_rehearse.simulation.simulated_coordinator import SimulatedCoordinator, UnknownEvent
from caesura_rehearse.simulation.slots import Slot

LONG_S = 3600.0
"""Of a notice that no test waits for."""


class Target:
    """A program that runs until the test ends it."""

    def __init__(self, vm: str) -> None:
        self.vm, self.what, self.restart_obstacle = vm, "app", ""
        self.ended = asyncio.Event()
        self.exit_code: int | None = None


class Documents:
    """Writes down what the documents become."""

    def __init__(self) -> None:
        self.done: list[tuple[str, str]] = []
        self.gaps = 0

    async def schedule(self, _: str, event: Any, *, gap: bool = False) -> None:
        self.done.append((event.status, ",".join(event.resources)))
        self.gaps += gap

    async def approve(self, set_name: str, _: str) -> None:
        self.done.append(("approved", set_name))

    async def start(self, _: str, event: Any, **__: bool) -> None:
        self.done.append(("started", ",".join(event.resources)))

    async def move(self, _: str, event: Any) -> None:
        self.done.append(("moved", ",".join(event.resources)))

    async def end(self, set_name: str, _: str, **__: bool) -> None:
        self.done.append(("ended", set_name))


class Impact:
    """Lasts until the test lets it end."""

    def __init__(self, conditions: Conditions) -> None:
        self.under_way: list[tuple[str, ...]] = []
        self.release = asyncio.Event()
        self._conditions = conditions

    async def prepare(self, _: str) -> None:
        pass

    async def perform(self, _: object, __: Order, slots: Sequence[Slot]) -> None:
        vms = tuple(slot.vm for slot in slots)
        self.under_way.append(vms)
        self._conditions.notify()
        await self.release.wait()
        self.under_way.remove(vms)


class Stage:
    """The orders of a rehearsal with these VMs."""

    def __init__(self, members: Sequence[SetMember]) -> None:
        self.conditions = Conditions()
        self.targets = {each.vm: Target(each.vm) for each in members}
        self.slots = {
            each.vm: Slot(
                vm=each.vm, set=each.set, update_domain=each.update_domain, url="", faults=RequestFaults(),
                target=self.targets[each.vm],  # type: ignore[arg-type]
            )
            for each in members
        }  # fmt: skip
        self.seen = Observations()
        self.documents = Documents()
        self.impact = Impact(self.conditions)
        self.faults = FaultQueue()
        self.rollouts = SimulatedCoordinator(
            self.slots, self.seen, self.conditions, self.documents, self.impact, self.faults, lambda _: None  # type: ignore[arg-type]
        )  # fmt: skip

    async def until(self, condition: Callable[[], bool]) -> None:
        assert await self.conditions.until(condition, 60), self.documents.done

    async def settle(self) -> None:
        """Until nothing more happens by itself."""
        for _ in range(50):
            await asyncio.sleep(0)

    @property
    def outcomes(self) -> list[str]:
        return [each.outcome for each in self.seen.events.values()]


@asynccontextmanager
async def stage(*members: SetMember) -> AsyncIterator[Stage]:
    found = Stage(members)
    try:
        yield found
    finally:
        await found.rollouts.close()


def now(**given: Any) -> Order:
    return Order(**({"notice_s": 0.0, "checks_s": 0.0, "duration_s": 1.0} | given))


def later(**given: Any) -> Order:
    return now(notice_s=LONG_S, **given)


async def test_events_of_one_set_are_never_carried_out_at_once() -> None:
    """I1, though two orders overlap; another set is not concerned."""
    async with stage(*members_of("web", 2), *members_of("db", 1)) as on:
        for vm in ("web-1", "web-2", "db-1"):
            await on.rollouts.order(now(vms=(vm,)))
        await on.until(lambda: len(on.impact.under_way) == 2)
        await on.settle()
        assert sorted(on.impact.under_way) == [("db-1",), ("web-1",)]
        on.impact.release.set()
        await on.until(lambda: on.outcomes == ["completed"] * 3)


async def test_the_next_domain_is_announced_when_the_one_before_is_over() -> None:
    async with stage(*members_of("web", 3)) as on:
        record = await on.rollouts.roll(now())
        await on.until(lambda: on.impact.under_way == [("web-1",)])
        await on.settle()
        assert len(on.seen.events) == 1
        on.impact.release.set()
        await on.until(lambda: record.ended is not None)
        assert (record.outcome, record.waves_begun) == ("completed", 3)
        assert on.documents.done == [
            (status, vm)
            for number in (1, 2, 3)
            for status, vm in (("started", f"web-{number}"), ("ended", "web"))
        ]


async def test_a_program_that_has_ended_halts_the_rollout() -> None:
    """I8: its neighbours are not touched."""
    async with stage(*members_of("web", 3)) as on:
        on.slots["web-1"].exited = 1.0
        on.targets["web-1"].ended.set()
        on.targets["web-1"].exit_code = 3
        on.impact.release.set()
        record = await on.rollouts.roll(now(event="Reboot"))
        await on.until(lambda: record.ended is not None)
        assert (record.outcome, record.waves_begun) == ("failed", 1)
        assert record.why == "app of web-1 ended (exit code 3)"


async def test_a_host_waits_for_the_approvals_of_all_its_sets() -> None:
    async with stage(*members_of("web", 1), *members_of("db", 1)) as on:
        await on.rollouts.roll(later())
        web, db = on.seen.events.values()
        await on.rollouts.approved_by_client(web.event_id, "web-1")
        await on.settle()
        assert on.impact.under_way == []
        await on.rollouts.approve(db.event_id, "db-1")
        await on.until(lambda: on.impact.under_way == [("web-1", "db-1")])
        assert (web.approved_by_order, db.approved_by_order, db.approved_by) == (False, True, "db-1")
        on.impact.release.set()
        await on.until(lambda: on.outcomes == ["completed"] * 2)


async def test_cancelling_one_event_takes_back_its_wave_and_what_would_follow() -> None:
    async with stage(*members_of("web", 2), *members_of("db", 1)) as on:
        record = await on.rollouts.roll(later())
        web, db = on.seen.events.values()
        await on.rollouts.cancel(db.event_id)
        await on.until(lambda: record.ended is not None)
        assert (web.outcome, db.outcome, record.outcome, record.waves_begun) == (
            "cancelled",
            "cancelled",
            "cancelled",
            1,
        )
        with pytest.raises(UnknownEvent):
            await on.rollouts.cancel_rollout(record.rollout_id)


async def test_an_approval_that_does_not_start_it() -> None:
    async with stage(*members_of("web", 1)) as on:
        event = await on.rollouts.order(later(approval_starts=False))
        await on.rollouts.approved_by_client(event.event_id, "web-1")
        await on.settle()
        assert event.approved_by == "web-1"
        assert on.impact.under_way == []
        await on.rollouts.cancel(event.event_id)
        assert event.outcome == "cancelled"


async def test_not_before_that_moves() -> None:
    async with stage(*members_of("web", 1)) as on:
        event = await on.rollouts.order(later())
        await on.rollouts.move(event.event_id, 100.0)
        assert event.not_before - event.announced == pytest.approx(LONG_S + 100.0)
        await on.rollouts.move(event.event_id, -2 * LONG_S)
        await on.until(lambda: on.impact.under_way == [("web-1",)])
        with pytest.raises(UnknownEvent, match="has started"):
            await on.rollouts.move(event.event_id, 1.0)
        on.impact.release.set()


async def test_a_fault_hits_each_event_once() -> None:
    async with stage(*members_of("web", 2)) as on:
        on.impact.release.set()
        on.faults.add(parse_fault("gap x1"))
        record = await on.rollouts.roll(now())
        await on.until(lambda: record.ended is not None)
        assert on.documents.gaps == 1, "of two announcements"


async def test_what_cannot_be_ordered_changes_nothing() -> None:
    async with stage(*members_of("web", 2)) as on:
        on.targets["web-2"].restart_obstacle = "it was not started here"
        with pytest.raises(
            OrderRefused, match="cannot be started again after a Reboot: it was not started here"
        ):
            await on.rollouts.roll(now(event="Reboot"))
        for bad in (now(vms=("web-9",)), now(sets=("web",), vms=("web-1",))):
            with pytest.raises(OrderRefused):
                await on.rollouts.roll(bad)
        assert not on.seen.events
        assert not on.seen.rollouts
        assert not on.documents.done


async def test_a_wave_of_which_one_program_has_ended_did_not_come_about() -> None:
    async with stage(*members_of("web", 2, 1)) as on:
        on.impact.release.set()
        on.slots["web-2"].exited = 0.5
        on.targets["web-2"].ended.set()
        on.targets["web-2"].exit_code = 0
        event = await on.rollouts.order(now())
        await on.until(lambda: bool(event.outcome))
        assert event.outcome == "failed"
        assert event.why == "app of web-2 ended (exit code 0) before it could be paused"
