"""The rehearsal itself: one event loop that plays coordinator and host for a handful of VMs, around the real metadata publisher.

The bus is in memory. The document of each set goes the way of the real one: retained on the bus, taken by the publisher, served;
an approval comes back as the publisher's message. A pause is guarded as on a host: the pause guard, a process of its own, holds
the way out before anything is stopped (I2), and VMs of two update domains of a set never pause at once (I1).
"""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TypeVar

from caesura.bus.memory import MemoryBroker, MemoryBus
from caesura.bus.messaging import MessageClient
from caesura.contract.codec import Received
from caesura.contract.envelope import source_of
from caesura.contract.messages import HostInventory, ScheduledEvent, SetDocument, VmApproved, VmRecord
from caesura.contract.topics import channel_of
from caesura.lifecycle import document as documents
from caesura.runtime.cleanup import shielded
from caesura.runtime.errors import CaesuraError
from caesura.runtime.identity import new_id
from caesura.runtime.logs import get_logger
from caesura_metadata_publisher.listeners import Listener
from caesura_metadata_publisher.service import filters
from caesura_metadata_publisher.settings import MetadataPublisherSettings
from caesura_rehearse.expectations import Expectation, HeldOrNot
from caesura_rehearse.faults import Faults
from caesura_rehearse.guarding import Guards, GuardUnavailable
from caesura_rehearse.impact import Impact
from caesura_rehearse.metadata import Witness, WitnessedPublisher, serve_vm
from caesura_rehearse.observations import EventRecord, Observations, ProgramRecord, describe_exit
from caesura_rehearse.orders import Order, OrderRefused
from caesura_rehearse.pausing import NotPaused
from caesura_rehearse.recording import Recording
from caesura_rehearse.replay import Replay
from caesura_rehearse.report import Report, judge_all
from caesura_rehearse.slots import Slot, ended_early, nothing_left
from caesura_rehearse.targets import NoTarget, Target

T = TypeVar("T")
HOST = "rehearsal"
_READY_S = 10.0  # s: for the publisher to take its documents off the bus; some milliseconds are usual
_GRACE_S = 5.0  # s between SIGTERM and SIGKILL of programs at the end of the rehearsal

_log = get_logger("caesura.rehearse")


class UnknownEvent(OrderRefused):
    """There is no open event with this id."""


class Engine:
    """A rehearsal under way; made by ``rehearsal``.

    Args:
        folder: for its files; removed by the caller.
        say: called with each piece of news, for people.
    """

    def __init__(self, folder: Path, say: Callable[[str], None]) -> None:
        self.began = time.monotonic()
        self.observations = Observations()
        self.slots: dict[str, Slot] = {}
        self.faults = Faults()
        """Of the requests for the document."""
        self._folder = folder
        self._say = say
        self._changed = asyncio.Event()
        self._documents: dict[str, SetDocument] = {}
        self._locks: dict[str, asyncio.Lock] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._cancelled: set[str] = set()
        self._stack = AsyncExitStack()
        self.broker = MemoryBroker()
        self._publisher_bus = MemoryBus(self.broker, client_id="metadata", filters=filters())
        self._bus = MemoryBus(self.broker, client_id=HOST, filters=(channel_of(VmApproved).filter(),))
        self._post = MessageClient(self._bus, source_of("default", HOST))
        self._post.subscribe(VmApproved, self._on_approved)
        self._witness = Witness(self.observations, self.began, self.notify)
        # The settings are given here, none is read from the environment; the listeners are opened one by one.
        settings = MetadataPublisherSettings(listeners_file="", health_listen="")
        self._publisher = WitnessedPublisher(settings, self._publisher_bus, self._witness)
        self._guards = Guards(folder)
        self._impact = Impact(self._guards, self.began, say, self.notify)

    # -- state --------------------------------------------------------------------------------------------

    @property
    def now(self) -> float:
        """Seconds since the rehearsal began."""
        return time.monotonic() - self.began

    @property
    def events(self) -> Sequence[EventRecord]:
        """Every event so far, in the order of announcement."""
        return list(self.observations.events.values())

    @property
    def programs(self) -> Sequence[ProgramRecord]:
        """What became of each VM's program so far."""
        return [record for slot in self.slots.values() if (record := slot.record()) is not None]

    def notify(self) -> None:
        """Something changed: conditions that are waited for are looked at."""
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    async def until(self, condition: Callable[[], bool], timeout_s: float | None) -> bool:
        """Wait until it holds, for ``timeout_s`` seconds (None: as long as it takes); whether it does."""
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while not condition():
                    await self._changed.wait()
        return condition()

    def report(self, expectations: Sequence[Expectation] = (), *, ordered: int = 0) -> Report:
        """What was found so far.

        Args:
            ordered: how many events were to come.
        """
        programs = self.programs
        verdicts = list(judge_all(self.events, programs, expectations, ordered=ordered))
        verdicts += [
            HeldOrNot(what=f"{each.what} ended well", held=False, detail=describe_exit(each.exit_code))
            for each in programs
            if each.exited is not None and each.exit_code
        ]
        seen = self.observations
        return Report(
            held=all(each.held for each in verdicts),
            verdicts=tuple(verdicts),
            events=tuple(self.events),
            programs=tuple(programs),
            deliveries=tuple(seen.deliveries),
            approvals=tuple(seen.approvals),
            refusals=tuple(seen.refusals),
            polls=dict(seen.polls),
            seconds=self.now,
        )

    # -- life ---------------------------------------------------------------------------------------------

    async def open(self) -> None:
        """Connect the publisher and the rehearsal to their bus."""
        loop = asyncio.get_running_loop()
        for name, work in (
            ("publisher bus", self._publisher.run_bus()),
            ("approvals", self._publisher.run_approvals()),
            ("bus", self._bus.run(self._post.deliver)),
        ):
            task = loop.create_task(work, name=name)
            self._stack.push_async_callback(_cancel, task)
        await self._bus.wait_connected(_READY_S)

    async def close(self) -> None:
        """End everything: what is paused is resumed first."""
        for task in list(self._tasks):
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        for slot in self.slots.values():
            slot.ending = True
        targets = [slot.target for slot in self.slots.values() if slot.target is not None]
        await asyncio.gather(*(target.close(_GRACE_S) for target in targets))
        await self._guards.close()
        await self._stack.aclose()

    def hurry(self) -> None:
        """From now on nothing is given time to end."""
        for slot in self.slots.values():
            if slot.target is not None:
                slot.target.hurry()

    async def add_vm(self, vm: str, set_name: str, update_domain: int, listen: str = "127.0.0.1:0") -> Slot:
        """Publish a VM and open its metadata API; the slot has its URL.

        Raises:
            ListenError: the address cannot be opened.
        """
        address = await self.listen(vm, listen)
        slot = Slot(
            vm=vm, set=set_name, update_domain=update_domain, url=f"http://{address.removesuffix(':80')}"
        )
        self.slots[vm] = slot
        await self._post.send(self._inventory(), host=HOST)
        if set_name not in self._documents:
            await self._publish(documents.first_document(set_name))
        listener = Listener(vm, address)
        if not await self.until(lambda: not self._publisher.documents_ping((listener,)), _READY_S):
            raise CaesuraError(f"the metadata publisher is not ready after {_READY_S:g} s")
        return slot

    async def listen(self, vm: str, where: str | socket.socket) -> str:
        """Open the metadata API of a VM at one more address, until the end; returns it.

        Raises:
            ListenError: the address cannot be opened.
        """
        return await self._stack.enter_async_context(
            serve_vm(self._publisher, vm, where, self._witness, self.faults)
        )

    async def enter(self, context: AbstractAsyncContextManager[T]) -> T:
        """Enter a context that is left when the rehearsal ends, after its programs."""
        return await self._stack.enter_async_context(context)

    async def attach(self, slot: Slot, target: Target) -> None:
        """Start the VM's program, or take what runs already.

        Raises:
            NoTarget: it cannot be started.
        """
        slot.target = target
        target.on_exit = lambda: self._on_exit(slot)
        await target.start()
        self.notify()

    def _on_exit(self, slot: Slot) -> None:
        if not slot.ending and slot.target is not None:
            slot.exited = self.now
            self._say(f"{slot.target.what} of {slot.vm} ended: {describe_exit(slot.target.exit_code)}")
        self.notify()

    async def replay(self, recording: Recording, slot: Slot, *, pause_s: float = 0.0) -> None:
        """Serve a recording to its end, in the place of documents of our own.

        Args:
            pause_s: seconds for which the VM's program is paused when an event becomes Started; 0: documents only.
        """

        async def pause(record: EventRecord) -> None:
            await self._impact.perform(record, Order(event="Freeze", duration_s=pause_s), [slot])

        replay = Replay(
            recording,
            slot.set,
            (slot.vm,),
            self.observations,
            self.began,
            self._say,
            self.notify,
            pause=pause if pause_s else None,
        )
        self._publisher.replay = replay
        await replay.run()

    def _inventory(self) -> HostInventory:
        vms = tuple(
            VmRecord(
                vm=slot.vm,
                set=slot.set,
                update_domain=slot.update_domain,
                state="running",
                methods=("freeze",),
            )
            for slot in self.slots.values()
        )
        return HostInventory(host=HOST, driver="process", driver_detail="a rehearsal", epoch=1, vms=vms)

    async def _publish(self, document: SetDocument) -> None:
        self._documents[document.set] = document
        await self._post.send(document, set=document.set)

    # -- orders -------------------------------------------------------------------------------------------

    async def order(self, order: Order) -> EventRecord:
        """Announce an event; what follows happens in the background.

        Raises:
            OrderRefused: it names VMs that there are not, of two sets or two update domains, or what it demands cannot be done.
        """
        slots = self._slots_of(order)
        if order.event in ("Reboot", "Redeploy"):
            for slot in slots:
                if slot.target is not None and slot.target.restart_obstacle:
                    raise OrderRefused(
                        f"{slot.target.what} cannot be started again after a {order.event}: {slot.target.restart_obstacle}"
                    )
        record = EventRecord(
            event_id=new_id().upper(),
            event=order.event,
            set=slots[0].set,
            vms=tuple(slot.vm for slot in slots),
            notice_s=order.notice,
            duration_s=order.duration_s if order.event == "Freeze" else 0.0,
            announced=self.now,
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
        self.observations.events[record.event_id.lower()] = record
        await self._publish(documents.schedule(self._documents[record.set], event))
        if event.status == "started":
            record.started = record.announced
        self._say(
            f"announced: {order.event} of {', '.join(record.vms)}"
            + (f", NotBefore in {order.notice:g} s" if order.notice else ", without notice")
        )
        task = asyncio.create_task(self._carry_out(record, order, slots), name=f"event {record.event_id}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        self.notify()
        return record

    async def cancel(self, event_id: str) -> EventRecord:
        """Take a scheduled event back. Raises UnknownEvent: it is not open, or has started."""
        record = self._open_event(event_id)
        if record.started is not None:
            raise UnknownEvent(f"the event {event_id} has started: it cannot be cancelled any more")
        self._cancelled.add(record.event_id)
        self.notify()
        await self.until(lambda: bool(record.outcome), None)
        return record

    async def approve(self, event_id: str) -> EventRecord:
        """Approve a scheduled event in the place of its clients. Raises UnknownEvent: it is not open."""
        record = self._open_event(event_id)
        await self._approve(record, "rehearse")
        return record

    def _open_event(self, event_id: str) -> EventRecord:
        record = self.observations.events.get(event_id.lower())
        if record is None or record.outcome:
            raise UnknownEvent(f"there is no open event {event_id}")
        return record

    def _slots_of(self, order: Order) -> list[Slot]:
        unknown = [vm for vm in order.vms if vm not in self.slots]
        if unknown:
            raise OrderRefused(
                f"there is no VM {unknown[0]} here: {', '.join(self.slots) or 'there is none'}"
            )
        if order.vms:
            slots = [self.slots[vm] for vm in dict.fromkeys(order.vms)]
        else:
            if not self.slots:
                raise OrderRefused("there is no VM")
            first = next(iter(self.slots.values()))
            lowest = min(slot.update_domain for slot in self.slots.values() if slot.set == first.set)
            slots = [
                slot for slot in self.slots.values() if slot.set == first.set and slot.update_domain == lowest
            ]
        if len({(slot.set, slot.update_domain) for slot in slots}) > 1:
            raise OrderRefused(
                "one event is for VMs of one update domain of one set: others must not pause at the same time"
            )
        return slots

    async def _on_approved(self, approved: VmApproved, _: Received) -> None:
        record = self.observations.events.get(approved.event_id.lower())
        if record is not None and not record.outcome:
            await self._approve(record, approved.vm)

    async def _approve(self, record: EventRecord, by: str) -> None:
        if record.approved is None and record.started is None:
            record.approved, record.approved_by = self.now, by
            self._say(f"approved by {by}")
        await self._publish(documents.approve(self._documents[record.set], record.event_id))
        self.notify()

    # -- an event's course --------------------------------------------------------------------------------

    async def _carry_out(self, record: EventRecord, order: Order, slots: Sequence[Slot]) -> None:
        try:
            if order.event == "Freeze" and order.duration_s > 0 and any(slot.target for slot in slots):
                await self._guards.ready(record.set)
            await self._course(record, order, slots)
            record.outcome = record.outcome or "completed"
        except (NotPaused, NoTarget, GuardUnavailable) as error:
            record.outcome, record.why = "failed", str(error)
        except CaesuraError as error:
            _log.exception("rehearse.event_failed")
            record.outcome, record.why = "failed", str(error)
        finally:
            if not record.outcome:
                record.why = "the rehearsal ended before"
            record.ended = self.now
            with suppress(CaesuraError):
                await shielded(self._publish(documents.end(self._documents[record.set], record.event_id)))
            self._say(
                f"{record.event} {record.outcome or 'called off'}" + (f": {record.why}" if record.why else "")
            )
            self.notify()

    async def _course(self, record: EventRecord, order: Order, slots: Sequence[Slot]) -> None:
        def decided() -> bool:
            return (
                record.approved is not None
                or record.event_id in self._cancelled
                or self._nothing_left(order, slots)
            )

        left_s = record.announced + order.notice - self.now
        await self.until(decided, max(left_s, 0.0))
        async with self._locks.setdefault(record.set, asyncio.Lock()):  # I1: one event of a set at a time
            if record.event_id in self._cancelled:
                record.outcome = "cancelled"
                return
            if self._nothing_left(order, slots):
                raise NotPaused(ended_early(slots))
            if record.started is None:
                await self._publish(documents.start(self._documents[record.set], record.event_id))
                record.started = self.now
                self._say(f"started: {record.event}")
                self.notify()
            await self._impact.perform(record, order, slots)
            await self.until(lambda: self._nothing_left(order, slots), order.checks_s)
        if order.event == "Freeze" and self._nothing_left(order, slots):
            raise NotPaused(ended_early(slots).replace("before", "after"))

    @staticmethod
    def _nothing_left(order: Order, slots: Sequence[Slot]) -> bool:
        """Whether nothing that a Freeze could pause runs any more. The other types end it anyway."""
        return order.event == "Freeze" and nothing_left(slots)


async def _cancel(task: asyncio.Task[None]) -> None:
    task.cancel()
    with suppress(asyncio.CancelledError, CaesuraError):
        await task


@asynccontextmanager
async def rehearsal(folder: Path, say: Callable[[str], None]) -> AsyncIterator[Engine]:
    """An engine, open while the block runs; at its end nothing is left that it started."""
    engine = Engine(folder, say)
    try:
        await engine.open()
        yield engine
    finally:
        await shielded(engine.close())
