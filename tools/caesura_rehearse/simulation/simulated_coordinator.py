"""Events in their course, as the coordinator has them: announced, approved or due, started, carried out, ended.

An order for a set takes its update domains one after the other: the next one is announced when the one before is over and all its
programs run. The events of one wave, one for each set, start together: when all are approved, or at NotBefore.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, suppress
from datetime import UTC, datetime, timedelta

import msgspec

from caesura.contract.messages import ScheduledEvent
from caesura.runtime.cleanup import shielded
from caesura.runtime.errors import CaesuraError
from caesura.runtime.identity import new_id
from caesura.runtime.logs import get_logger
from caesura_rehearse.results.observations import (
    EventRecord,
    Observations,
    Outcome,
    RolloutRecord,
    describe_exit,
)
from caesura_rehearse.simulation.conditions import Conditions
from caesura_rehearse.simulation.faults import Fault, FaultQueue
from caesura_rehearse.simulation.impact import Impact
from caesura_rehearse.simulation.members import Part, Wave, first_event, plan_waves
from caesura_rehearse.simulation.orders import Order, OrderRefused
from caesura_rehearse.simulation.set_documents import SetDocuments
from caesura_rehearse.simulation.slots import Slot, ended_early, nothing_left
from caesura_rehearse.simulation.speed import at_speed
from caesura_rehearse.targets.guards import GuardUnavailable
from caesura_rehearse.targets.pause import NotPaused
from caesura_rehearse.targets.target import NoTarget

HOST = "rehearsal"
ORDERED = "rehearse"
"""Who has approved an event, if nobody else is named."""

_log = get_logger("caesura.rehearse")


class UnknownEvent(OrderRefused):
    """There is no open event, or no rollout, with this id."""


class _Course(msgspec.Struct, kw_only=True):
    """The events of a wave on their way."""

    order: Order
    records: tuple[EventRecord, ...]
    slots: tuple[Slot, ...]
    announced: dict[str, ScheduledEvent]
    """As in the documents, by id."""
    fault: Fault | None = None
    cancelled: bool = False

    @property
    def gap(self) -> bool:
        """Whether each of its changes of the document skips incarnations."""
        return self.fault is not None and self.fault.kind == "gap"

    @property
    def over(self) -> bool:
        """Whether nothing that a Freeze could pause runs any more. The other types end it anyway."""
        return self.order.event == "Freeze" and nothing_left(self.slots)

    @property
    def started(self) -> bool:
        return self.records[0].started is not None

    @property
    def due(self) -> float:
        """When it starts at the latest."""
        return max(each.not_before for each in self.records)

    @property
    def approved(self) -> bool:
        return self.order.approval_starts and all(each.approved is not None for each in self.records)


class SimulatedCoordinator:
    """Carries out the orders of a rehearsal.

    Args:
        slots: its VMs, by name.
        observations: where the records are kept.
        conditions: its time.
        documents: of its sets.
        impact: what is done to the programs.
        faults: what happens to events; each wave takes one.
        say: called with each piece of news, for people.
        speed: by which all waiting is shortened.
    """

    def __init__(
        self,
        slots: Mapping[str, Slot],
        observations: Observations,
        conditions: Conditions,
        documents: SetDocuments,
        impact: Impact,
        faults: FaultQueue,
        say: Callable[[str], None],
        *,
        speed: float = 1.0,
    ) -> None:
        self._slots = slots
        self._seen = observations
        self._conditions = conditions
        self._documents = documents
        self._impact = impact
        self._faults = faults
        self.speed = speed
        self._say = say
        self._courses: dict[str, _Course] = {}
        self._locks: dict[str, asyncio.Lock] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    async def close(self) -> None:
        """End all that is open: what is paused is resumed first."""
        for task in list(self._tasks):
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)

    # -- orders -------------------------------------------------------------------------------------------

    async def order(self, order: Order) -> EventRecord:
        """Announce one event; what follows happens in the background.

        Raises:
            OrderRefused: it names VMs that there are not, of two sets or two update domains, or what it demands cannot be done.
        """
        order = at_speed(order, self.speed)
        part = first_event(order, list(self._slots.values()))
        self._check_startable(order, (part,))
        course = await self._announce(order, (part,))
        self._spawn(self._carry_out(course), f"event {course.records[0].event_id}")
        return course.records[0]

    async def roll(self, order: Order) -> RolloutRecord:
        """Announce the events of the first wave; they, and the waves after it, are carried out in the background.

        Raises:
            OrderRefused: it names VMs or sets that there are not, VMs of two update domains of a set, or what it demands cannot be done.
        """
        order = at_speed(order, self.speed)
        waves = plan_waves(order, list(self._slots.values()))
        for wave in waves:
            self._check_startable(order, wave)
        record = RolloutRecord(
            rollout_id=new_id(),
            event=order.event,
            waves=tuple(tuple(vm for part in wave for vm in part.vms) for wave in waves),
            began=self._conditions.now,
        )
        self._seen.rollouts[record.rollout_id] = record
        first = await self._announce(order, waves[0], record)
        self._spawn(self._roll(order, record, first, waves[1:]), f"rollout {record.rollout_id}")
        return record

    async def cancel(self, event_id: str) -> EventRecord:
        """Take a scheduled event back, with the others of its wave. Raises UnknownEvent: it is not open, or has started."""
        record, course = self._open_event(event_id)
        if course.started:
            raise UnknownEvent(f"the event {event_id} has started: it cannot be cancelled any more")
        course.cancelled = True
        self._conditions.notify()
        await self._conditions.until(lambda: bool(record.outcome), None)
        return record

    async def approve(self, event_id: str, by: str = ORDERED) -> EventRecord:
        """Approve a scheduled event in the place of its clients. Raises UnknownEvent: it is not open."""
        record, _ = self._open_event(event_id)
        await self._approve(record, by, by_order=True)
        return record

    async def move(self, event_id: str, by_s: float) -> EventRecord:
        """Move the NotBefore of a scheduled event so many seconds, divided by the speed; earlier if negative. Raises UnknownEvent: it is not open, or has started."""
        record, course = self._open_event(event_id)
        if course.started:
            raise UnknownEvent(f"the event {event_id} has started: its NotBefore cannot move any more")
        await self._move(course, record, by_s / self.speed)
        return record

    async def approved_by_client(self, event_id: str, vm: str) -> None:
        """A client of ``vm`` has approved an event; one that is not open (any more) is ignored."""
        record = self._seen.events.get(event_id.lower())
        if record is not None and not record.outcome:
            await self._approve(record, vm, by_order=False)

    async def cancel_rollout(self, rollout_id: str) -> RolloutRecord:
        """Take back what is scheduled; nothing of it follows. Raises UnknownEvent: it is not open, or has an event that has started."""
        record = self.find(rollout_id)
        events = self.open_events(rollout_id)
        if record.ended is not None or not events:
            raise UnknownEvent(f"the rollout {rollout_id} has no scheduled event to cancel")
        await self.cancel(events[0].event_id)
        await self._conditions.until(lambda: record.ended is not None, None)
        return record

    def find(self, rollout_id: str) -> RolloutRecord:
        """A rollout. Raises UnknownEvent."""
        record = self._seen.rollouts.get(rollout_id)
        if record is None:
            raise UnknownEvent(f"there is no rollout {rollout_id}")
        return record

    def open_events(self, rollout_id: str) -> list[EventRecord]:
        """The events of a rollout that are not over. Raises UnknownEvent: there is no such rollout."""
        events = [self._seen.events[each.lower()] for each in self.find(rollout_id).event_ids]
        return [each for each in events if not each.outcome]

    def _open_event(self, event_id: str) -> tuple[EventRecord, _Course]:
        record = self._seen.events.get(event_id.lower())
        if record is None or record.outcome:
            raise UnknownEvent(f"there is no open event {event_id}")
        return record, self._courses[event_id.lower()]

    def _check_startable(self, order: Order, wave: Wave) -> None:
        if order.event not in ("Reboot", "Redeploy"):
            return
        for vm in (vm for part in wave for vm in part.vms):
            target = self._slots[vm].target
            if target is not None and target.restart_obstacle:
                raise OrderRefused(
                    f"{target.what} cannot be started again after a {order.event}: {target.restart_obstacle}"
                )

    def _of(self, record: EventRecord) -> str:
        """Whose event it is, in the news, where there are several VMs."""
        return f" of {', '.join(record.vms)}" if len(self._slots) > 1 else ""

    def _spawn(self, work: Awaitable[None], name: str) -> None:
        async def run() -> None:
            await work

        task = asyncio.create_task(run(), name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # -- a rollout's course -------------------------------------------------------------------------------

    async def _roll(self, order: Order, record: RolloutRecord, first: _Course, waves: Sequence[Wave]) -> None:
        try:
            await self._carry_out(first)
            record.outcome, record.why = self._verdict(order, first)
            for wave in waves:
                if record.outcome != "completed":
                    break
                record.outcome = ""
                await self._conditions.until(lambda: False, order.soak_s)
                course = await self._announce(order, wave, record)
                await self._carry_out(course)
                record.outcome, record.why = self._verdict(order, course)
        finally:
            if not record.outcome:
                record.why = record.why or "the rehearsal ended before"
            record.ended = self._conditions.now
            if len(record.waves) > 1:
                self._say(
                    f"rollout {record.outcome or 'called off'}" + (f": {record.why}" if record.why else "")
                )
            self._conditions.notify()

    def _verdict(self, order: Order, course: _Course) -> tuple[Outcome, str]:
        """The outcome of a wave, and why no other may follow: a program that ended must not lose its neighbours, too (I8)."""
        bad = next((each for each in course.records if each.outcome != "completed"), None)
        if bad is not None:
            return bad.outcome, bad.why
        if order.event in ("Freeze", "Reboot", "Redeploy"):
            for slot in course.slots:
                if slot.exited is not None and slot.target is not None:
                    return (
                        "failed",
                        f"{slot.target.what} of {slot.vm} ended ({describe_exit(slot.target.exit_code)})",
                    )
        return "completed", ""

    # -- a wave's course ----------------------------------------------------------------------------------

    async def _announce(self, order: Order, wave: Wave, rollout: RolloutRecord | None = None) -> _Course:
        slots = tuple(self._slots[vm] for part in wave for vm in part.vms)
        course = _Course(order=order, records=(), slots=slots, announced={}, fault=self._faults.next())
        for part in wave:
            record, event = self._event_of(order, part)
            if rollout is not None:
                record.rollout = rollout.rollout_id
                rollout.event_ids.append(record.event_id)
            course.records = (*course.records, record)
            course.announced[record.event_id] = event
            self._courses[record.event_id.lower()] = course
            self._seen.events[record.event_id.lower()] = record
        if rollout is not None:
            rollout.waves_begun += 1
        for record in course.records:
            await self._documents.schedule(record.set, course.announced[record.event_id], gap=course.gap)
            if order.notice <= 0:
                record.started = record.announced
            self._say(
                f"announced: {order.event} of {', '.join(record.vms)}"
                + (f", NotBefore in {order.notice:g} s" if order.notice else ", without notice")
            )
        self._conditions.notify()
        return course

    def _event_of(self, order: Order, part: Part) -> tuple[EventRecord, ScheduledEvent]:
        now = self._conditions.now
        record = EventRecord(
            event_id=new_id().upper(),
            event=order.event,
            set=part.set,
            vms=part.vms,
            notice_s=order.notice,
            duration_s=order.duration_s if order.event == "Freeze" else 0.0,
            impact_s=order.impact_s,
            announced=now,
            not_before=now + order.notice,
        )
        event = ScheduledEvent(
            event_id=record.event_id,
            event_type=order.event,
            status="scheduled" if order.notice > 0 else "started",
            resources=record.vms,
            host=HOST,
            not_before=datetime.now(UTC) + timedelta(seconds=order.notice),
            description=order.text,
            source=order.source,
            duration_s=order.shown_duration,
        )
        return record, event

    async def _approve(self, record: EventRecord, by: str, *, by_order: bool) -> None:
        if record.approved is None and record.started is None:
            record.approved, record.approved_by = self._conditions.now, by
            record.approved_by_order = by_order
            self._say(f"approved by {by}{self._of(record)}")
        await self._documents.approve(record.set, record.event_id)
        self._conditions.notify()

    async def _move(self, course: _Course, record: EventRecord, by_s: float) -> None:
        moved = max(record.not_before + by_s, self._conditions.now)
        event = course.announced[record.event_id]
        event = msgspec.structs.replace(
            event, not_before=event.not_before + timedelta(seconds=moved - record.not_before)
        )
        course.announced[record.event_id], record.not_before = event, moved
        await self._documents.move(record.set, event)
        self._say(f"moved: NotBefore{self._of(record)} is in {moved - self._conditions.now:.1f} s")
        self._conditions.notify()

    async def _disturb(self, course: _Course, fault: Fault) -> None:
        """What a fault does in the middle of the notice."""
        for record in course.records:
            match fault.kind:
                case "vanish":
                    await self._documents.end(record.set, record.event_id)
                    self._say(
                        f"vanished from the document: {record.event}{self._of(record)}; it will start all the same"
                    )
                case "neighbour":
                    await self._approve(record, "neighbour", by_order=True)
                case "moved":
                    await self._move(course, record, fault.seconds / self.speed)
        self._conditions.notify()

    async def _carry_out(self, course: _Course) -> None:
        order, why = course.order, ""
        outcome: Outcome = ""
        try:
            if order.impact_s > 0 and any(slot.target for slot in course.slots):
                await self._impact.prepare(course.records[0].set)
            outcome = await self._course(course)
        except (NotPaused, NoTarget, GuardUnavailable) as error:
            outcome, why = "failed", str(error)
        except CaesuraError as error:
            _log.exception("rehearse.event_failed")
            outcome, why = "failed", str(error)
        finally:
            for record in course.records:
                record.outcome = outcome
                record.why = why if outcome else "the rehearsal ended before"
                record.ended = self._conditions.now
                with suppress(CaesuraError):
                    await shielded(self._documents.end(record.set, record.event_id, gap=course.gap))
                self._say(
                    f"{record.event}{self._of(record)} {record.outcome or 'called off'}"
                    + (f": {record.why}" if record.why else "")
                )
            self._conditions.notify()

    async def _course(self, course: _Course) -> Outcome:
        """Wait for the start, and perform the impact; the outcome."""
        order, conditions = course.order, self._conditions

        def decided() -> bool:
            return course.approved or course.cancelled or course.over

        if course.fault is not None and order.notice > 0:
            await conditions.until(decided, order.notice / 2)
            if not decided():
                await self._disturb(course, course.fault)
        while not decided() and (left_s := course.due - conditions.now) > 0:
            due = course.due
            await conditions.until(lambda: decided() or course.due != due, left_s)  # noqa: B023 - awaited here
        async with AsyncExitStack() as locks:  # I1: one wave of a set at a time
            for name in sorted({each.set for each in course.records}):
                await locks.enter_async_context(self._locks.setdefault(name, asyncio.Lock()))
            if course.cancelled:
                return "cancelled"
            if course.over:
                raise NotPaused(ended_early(course.slots))
            for record in course.records:
                if record.started is None:
                    await self._documents.start(record.set, course.announced[record.event_id], gap=course.gap)
                    record.started = conditions.now
                    self._say(f"started: {record.event}{self._of(record)}")
            conditions.notify()
            await self._impact.perform(course.records, order, course.slots)
            await conditions.until(lambda: course.over, order.checks_s)
        if order.event == "Freeze" and (course.over or any(slot.exited is not None for slot in course.slots)):
            paused = {gap.vm for record in course.records for gap in record.gaps}
            missed = any(not slot.runs and slot.vm not in paused for slot in course.slots)
            raise NotPaused(
                ended_early(course.slots, "before it could be paused" if missed else "after its pause")
            )
        return "completed"
