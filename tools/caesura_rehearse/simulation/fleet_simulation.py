"""The rehearsal itself: one event loop that plays coordinator and host for a handful of VMs, around the real metadata publisher.

The bus is in memory. The document of each set goes the way of the real one: retained on the bus, taken by the publisher, served;
an approval comes back as the publisher's message. A pause is guarded as on a host: the pause guard, a process of its own, holds
the way out before anything is stopped (I2), and VMs of two update domains of a set never pause at once (I1).
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import TypeVar

from caesura.bus.memory import MemoryBroker, MemoryBus
from caesura.bus.messaging import MessageClient
from caesura.contract.codec import Received
from caesura.contract.envelope import source_of
from caesura.contract.messages import HostInventory, VmApproved, VmRecord
from caesura.contract.topics import channel_of
from caesura.runtime.cleanup import shielded
from caesura.runtime.errors import CaesuraError
from caesura_metadata_publisher.listeners import Listener
from caesura_metadata_publisher.service import filters
from caesura_metadata_publisher.settings import MetadataPublisherSettings
from caesura_rehearse.recordings.recording import Recording
from caesura_rehearse.recordings.replay import Replay
from caesura_rehearse.results.expectations import Expectation
from caesura_rehearse.results.observations import (
    EventRecord,
    Observations,
    ProgramRecord,
    ScenarioRecord,
    describe_exit,
)
from caesura_rehearse.results.report import Report, judge_all
from caesura_rehearse.simulation.conditions import Conditions
from caesura_rehearse.simulation.faults import Fault, FaultQueue, RequestFaults
from caesura_rehearse.simulation.impact import Impact
from caesura_rehearse.simulation.members import check_known
from caesura_rehearse.simulation.metadata import Witness, WitnessedPublisher, serve_vm
from caesura_rehearse.simulation.orders import Order
from caesura_rehearse.simulation.set_documents import SetDocuments
from caesura_rehearse.simulation.simulated_coordinator import HOST, SimulatedCoordinator
from caesura_rehearse.simulation.slots import Slot
from caesura_rehearse.targets.guards import Guards
from caesura_rehearse.targets.target import Target

T = TypeVar("T")
_READY_S = 10.0  # s: for the publisher to take its documents off the bus; some milliseconds are usual
_GRACE_S = 5.0  # s between SIGTERM and SIGKILL of programs at the end of the rehearsal


class FleetSimulation:
    """A rehearsal under way; made by ``rehearsal``.

    Args:
        folder: for its files; removed by the caller.
        say: called with each piece of news, for people.
        speed: by which all waiting is shortened, see ``speed``.
    """

    def __init__(self, folder: Path, say: Callable[[str], None], *, speed: float = 1.0) -> None:
        self.conditions = Conditions()
        self.observations = Observations()
        self.slots: dict[str, Slot] = {}
        self._event_faults = FaultQueue()
        self._request_faults: list[Fault] = []
        """Those of all VMs, for VMs that are added later."""
        self._folder = folder
        self._say = say
        self._stack = AsyncExitStack()
        self.broker = MemoryBroker()
        self._publisher_bus = MemoryBus(self.broker, client_id="metadata", filters=filters())
        self._bus = MemoryBus(self.broker, client_id=HOST, filters=(channel_of(VmApproved).filter(),))
        self._post = MessageClient(self._bus, source_of("default", HOST))
        self._post.subscribe(VmApproved, self._on_approved)
        self._witness = Witness(self.observations, self.conditions.began, self.conditions.notify)
        # The settings are given here, none is read from the environment; the listeners are opened one by one.
        settings = MetadataPublisherSettings(listeners_file="", health_listen="")
        self._publisher = WitnessedPublisher(settings, self._publisher_bus, self._witness)
        self._guards = Guards(folder)
        self._documents = SetDocuments(self._post)
        self._impact = Impact(self._guards, self.conditions, say)
        self.rollouts = SimulatedCoordinator(
            self.slots,
            self.observations,
            self.conditions,
            self._documents,
            self._impact,
            self._event_faults,
            say,
            speed=speed,
        )

    # -- state --------------------------------------------------------------------------------------------

    @property
    def now(self) -> float:
        """Seconds since the rehearsal began."""
        return self.conditions.now

    def notify(self) -> None:
        """As ``Conditions.notify``."""
        self.conditions.notify()

    async def until(self, condition: Callable[[], bool], timeout_s: float | None) -> bool:
        """As ``Conditions.until``."""
        return await self.conditions.until(condition, timeout_s)

    @property
    def events(self) -> Sequence[EventRecord]:
        """Every event so far, in the order of announcement."""
        return list(self.observations.events.values())

    @property
    def programs(self) -> Sequence[ProgramRecord]:
        """What became of each VM's program so far."""
        return [record for slot in self.slots.values() if (record := slot.record()) is not None]

    def report(
        self,
        expectations: Sequence[Expectation] = (),
        *,
        scenario: ScenarioRecord | None = None,
        recorded: int = 0,
    ) -> Report:
        """What was found so far.

        Args:
            scenario: what became of the steps of one.
            recorded: how many events a recording has.
        """
        seen, programs = self.observations, self.programs
        rollouts = list(seen.rollouts.values())
        verdicts = judge_all(
            self.events, rollouts, programs, expectations, scenario, list(self.slots), recorded=recorded
        )
        return Report(
            held=all(each.held for each in verdicts),
            verdicts=tuple(verdicts),
            events=tuple(self.events),
            rollouts=tuple(rollouts),
            scenario=scenario,
            speed=self.rollouts.speed,
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
        await self.rollouts.close()
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
        faults = RequestFaults()
        for each in self._request_faults:
            faults.add(each)
        address = await self._listen(vm, listen, faults)
        slot = Slot(
            vm=vm,
            set=set_name,
            update_domain=update_domain,
            url=f"http://{address.removesuffix(':80')}",
            faults=faults,
        )
        self.slots[vm] = slot
        await self._post.send(self._inventory(), host=HOST)
        await self._documents.ensure(set_name)
        listener = Listener(vm, address)
        if not await self.conditions.until(lambda: not self._publisher.documents_ping((listener,)), _READY_S):
            raise CaesuraError(f"the metadata publisher is not ready after {_READY_S:g} s")
        return slot

    async def listen(self, vm: str, where: str | socket.socket) -> str:
        """Open the metadata API of a VM at one more address, until the end; returns it.

        Raises:
            ListenError: the address cannot be opened.
        """
        return await self._listen(vm, where, self.slots[vm].faults)

    async def _listen(self, vm: str, where: str | socket.socket, faults: RequestFaults) -> str:
        return await self._stack.enter_async_context(
            serve_vm(self._publisher, vm, where, self._witness, faults)
        )

    def add_fault(self, fault: Fault) -> None:
        """What requests, or the events announced next, meet from now on, after the faults that are there.

        Raises:
            OrderRefused: it is for a VM that there is not.
        """
        if fault.of_events:
            self._event_faults.add(fault)
        elif fault.vm:
            check_known("VM", (fault.vm,), list(self.slots))
            self.slots[fault.vm].faults.add(fault)
        else:
            self._request_faults.append(fault)
            for slot in self.slots.values():
                slot.faults.add(fault)

    def clear_faults(self) -> None:
        """The end of all faults."""
        self._event_faults.clear()
        self._request_faults.clear()
        for slot in self.slots.values():
            slot.faults.clear()

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
        self.conditions.notify()

    def _on_exit(self, slot: Slot) -> None:
        if not slot.ending and slot.target is not None:
            slot.exited = self.conditions.now
            self._say(f"{slot.target.what} of {slot.vm} ended: {describe_exit(slot.target.exit_code)}")
        self.conditions.notify()

    async def replay(self, recording: Recording, slot: Slot, *, pause_s: float = 0.0) -> None:
        """Serve a recording to its end, in the place of documents of our own.

        Args:
            pause_s: seconds for which the VM's program is paused when an event becomes Started; 0: documents only.
        """

        async def pause(record: EventRecord) -> None:
            await self._impact.perform([record], Order(event="Freeze", duration_s=pause_s), [slot])

        replay = Replay(
            recording,
            slot.set,
            (slot.vm,),
            self.observations,
            self.conditions.began,
            self._say,
            self.notify,
            speed=self.rollouts.speed,
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

    async def _on_approved(self, approved: VmApproved, _: Received) -> None:
        await self.rollouts.approved_by_client(approved.event_id, approved.vm)


async def _cancel(task: asyncio.Task[None]) -> None:
    task.cancel()
    with suppress(asyncio.CancelledError, CaesuraError):
        await task


@asynccontextmanager
async def rehearsal(
    folder: Path, say: Callable[[str], None], *, speed: float = 1.0
) -> AsyncIterator[FleetSimulation]:
    """A simulation, open while the block runs; at its end nothing is left that it started."""
    simulation = FleetSimulation(folder, say, speed=speed)
    try:
        await simulation.open()
        yield simulation
    finally:
        await shielded(simulation.close())
