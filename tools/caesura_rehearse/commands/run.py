"""One rehearsal from the command line: set up, carry out what was ordered, report, leave nothing behind."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from caesura.runtime.errors import CaesuraError
from caesura.runtime.threads import in_thread
from caesura_host_updater.drivers.process.freezers import choose_freezer
from caesura_rehearse.control.api import serve_control
from caesura_rehearse.control.call_dispatcher import CallDispatcher
from caesura_rehearse.network.address import local_address
from caesura_rehearse.network.namespace import URL, NoNamespace, metadata_inside, open_door, published, way_in
from caesura_rehearse.network.outbound import resolver_for_inside
from caesura_rehearse.network.ports import ports_for
from caesura_rehearse.recordings.recording import Recording
from caesura_rehearse.recordings.replay import load_recording
from caesura_rehearse.results.expectations import Expectation
from caesura_rehearse.results.report import Report
from caesura_rehearse.run_folder import cgroup_of, run_folder
from caesura_rehearse.scenarios.player import ScenarioPlayer
from caesura_rehearse.scenarios.scenario import Scenario
from caesura_rehearse.simulation.broker_mirror import mirrored
from caesura_rehearse.simulation.faults import Fault
from caesura_rehearse.simulation.fleet_simulation import FleetSimulation, rehearsal
from caesura_rehearse.simulation.members import SetMember
from caesura_rehearse.simulation.orders import Order
from caesura_rehearse.simulation.placeholders import arguments_of
from caesura_rehearse.simulation.slots import Slot, nothing_left
from caesura_rehearse.targets.container import RunningContainer, find_container
from caesura_rehearse.targets.container_lookup import NoContainer, ways_to_metadata
from caesura_rehearse.targets.existing import RunningCgroup, RunningProcess
from caesura_rehearse.targets.target import Program, Target, program_environ
from caesura_vmcontrol.freezer_control import FreezerChoice

EVENTS_PATH = "/metadata/scheduledevents?api-version=2020-07-01"


class RunOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What the command line asks for."""

    argv: tuple[str, ...] = ()
    pid: int | None = None
    cgroup: Path | None = None
    container: str = ""
    """A container that runs already, by name or id."""
    compose_service: str = ""
    """Or the one of this Compose service: ``SERVICE`` or ``PROJECT/SERVICE``."""
    engine: str = ""
    """The container engine's socket; empty: the usual ones."""
    order: Order | None = None
    expectations: tuple[Expectation, ...] = ()
    replay: Path | None = None
    """A recording that is served instead."""
    pause_at_start_s: float = 0.0
    """Seconds for which the program is paused when a recorded event becomes Started; 0: not at all."""
    scenario: Scenario | None = None
    """Instead of one order."""
    members: tuple[SetMember, ...] = (SetMember(vm="app-1", set="app"),)
    """The VMs: each runs the program."""
    port: int | None = None
    """Of the first VM's program, the next ones have those after it; None: free ones."""
    speed: float = 1.0
    """By which all waiting is shortened."""
    settle_s: float = 3.0
    """How long the program may run on after its event vanished from the document."""
    freezer: FreezerChoice = "auto"
    proxy: bool = False
    """Whether the program's ``http_proxy`` leads to the metadata API."""
    netns: bool = False
    """Whether the program gets a network of its own, in which 169.254.169.254 answers; with a container: whether it does in that's."""
    publish: tuple[int, ...] = ()
    """Ports of 127.0.0.1 that lead into that network."""
    address: str = ""
    """Where the metadata API listens, ``ADDRESS:PORT``, or ``gateway:PORT`` for the container's way out; empty: a free port of 127.0.0.1."""
    faults: tuple[Fault, ...] = ()
    """Of the metadata API, and of events."""
    broker: str = ""
    """A real broker at which everything is published, too."""
    control: Path | None = None
    """The file for address and token of the control API; None: one in the user's runtime folder."""
    quiet: bool = False
    own_stdout: bool = False
    """Whether standard output is for the report: the program's goes to standard error then."""


class StoppedBySignal(CaesuraError):
    """Ctrl-C, or another signal to stop."""

    def __init__(self, number: int) -> None:
        super().__init__("interrupted; everything was resumed and ended")
        self.exit_code = 128 + number


class Rehearse:
    """One run of the command.

    Args:
        say: prints a line for people.
    """

    def __init__(self, options: RunOptions, say: Callable[[str], None]) -> None:
        self._options = options
        self._say = say
        self._simulation: FleetSimulation | None = None
        self._signal = 0
        self._no_way_out = ""
        """Why the program's own network leads nowhere."""
        self._waiting = False
        """Whether it waits for orders, which a signal ends."""

    async def run(self) -> Report:
        """Carry it out. Raises StoppedBySignal, and CaesuraError for what could not be set up."""
        loop = asyncio.get_running_loop()
        body = asyncio.ensure_future(self._in_folder())
        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        for number in numbers:
            loop.add_signal_handler(number, self._on_signal, number, body)
        try:
            return await body
        except asyncio.CancelledError:
            raise StoppedBySignal(self._signal) from None
        finally:
            for number in numbers:
                loop.remove_signal_handler(number)

    def _on_signal(self, number: int, body: asyncio.Future[Report]) -> None:
        first, self._signal = not self._signal, self._signal or number
        if first and self._waiting and self._simulation is not None:
            self._simulation.notify()  # it is the end that was announced: what was found is reported
        elif first:
            body.cancel()
        elif self._simulation is not None:
            self._simulation.hurry()

    async def _in_folder(self) -> Report:
        folder = (
            run_folder()
        )  # not in a thread: a signal between its making and the next line would leave it behind
        try:
            async with rehearsal(folder, self._news, speed=self._options.speed) as simulation:
                self._simulation = simulation
                return await self._perform(simulation, folder)
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _news(self, text: str) -> None:
        if not self._options.quiet:
            at = self._simulation.now if self._simulation is not None else 0.0
            self._say(f"{at:7.1f} s  {text}")

    async def _perform(self, simulation: FleetSimulation, folder: Path) -> Report:
        options = self._options
        recording = None if options.replay is None else await load_recording(options.replay)
        container = await self._container()
        if options.broker:
            await simulation.enter(mirrored(simulation, simulation.broker, options.broker, self._news))
            self._say(f"broker    {options.broker}: its messages are there, too")
        address = with_gateway(options.address, container)
        if address:
            await simulation.enter(local_address(address))
        ports = ports_for([each.vm for each in options.members], options.port)
        for member, port in zip(options.members, ports, strict=True):
            slot = await simulation.add_vm(
                member.vm, member.set, member.update_domain, address or "127.0.0.1:0"
            )
            slot.port = port
        for fault in options.faults:
            simulation.add_fault(fault)
        await self._start_all(simulation, folder, container)
        control = await simulation.enter(serve_control(CallDispatcher(simulation), options.control))
        if recording is not None:
            return await self._replay(simulation, recording)
        scenario = None
        if options.scenario is not None:
            player = ScenarioPlayer(simulation, options.scenario)
            scenario = player.record
            await player.play()
        elif options.order is not None:
            rollout = await simulation.rollouts.roll(options.order)
            await simulation.until(lambda: rollout.ended is not None, None)
        else:
            programs = any(slot.target is not None for slot in simulation.slots.values())
            until = "until the program ends, or Ctrl-C" if programs else "Ctrl-C ends it"
            self._say(
                f"orders    caesura rehearse freeze --for 9s --notice 15s; control API in {control}; {until}"
            )
            self._waiting = True
            await simulation.until(lambda: self._signal != 0 or _is_over(simulation), None)
            self._waiting = False
        if options.scenario is not None or options.order is not None:
            await simulation.until(lambda: nothing_left(list(simulation.slots.values())), options.settle_s)
        return simulation.report(options.expectations, scenario=scenario)

    async def _replay(self, simulation: FleetSimulation, recording: Recording) -> Report:
        options = self._options
        events = len(recording.event_ids)
        self._say(
            f"replay    {options.replay}: {recording.seconds:.0f} s of {recording.head.server}, events: {events}"
            + ("" if recording.whole else "; its recorder did not end in order")
        )
        (slot,) = simulation.slots.values()
        replaying = asyncio.create_task(simulation.replay(recording, slot, pause_s=options.pause_at_start_s))
        replaying.add_done_callback(lambda _: simulation.notify())
        try:
            await simulation.until(lambda: replaying.done() or nothing_left([slot]), None)
            if replaying.done():
                await replaying
                await simulation.until(lambda: nothing_left([slot]), options.settle_s)
        finally:
            replaying.cancel()
            await asyncio.gather(replaying, return_exceptions=True)
        return simulation.report(options.expectations, recorded=events)

    async def _start_all(
        self, simulation: FleetSimulation, folder: Path, container: RunningContainer | None
    ) -> None:
        for member, slot in zip(self._options.members, simulation.slots.values(), strict=True):
            outside = slot.url
            if container is not None:
                await self._take(simulation, slot, container)
            else:
                await self._attach(simulation, slot, member, folder)
            self._tell_way(outside, slot, container)
        if len(simulation.slots) == 1:
            self._tell_how(simulation)

    async def _attach(self, simulation: FleetSimulation, slot: Slot, member: SetMember, folder: Path) -> None:
        options = self._options
        if not options.netns:
            target = await self._target(folder, slot, member)
            if target is not None:
                await simulation.attach(slot, target)
            return
        door = await simulation.enter(
            open_door(
                folder,
                slot.vm,
                lambda listener: simulation.listen(slot.vm, listener),
                simulation.notify,
                lead_out=True,
            )
        )
        slot.url = URL
        resolver = await in_thread("resolver", lambda: resolver_for_inside(folder))
        program = await self._program(folder, slot, member, way_in(folder, slot.vm, resolver))
        await simulation.attach(slot, program)
        await simulation.until(lambda: door.entered.is_set() or program.ended.is_set(), None)
        if door.problem:
            raise NoNamespace(f"--netns does not work here: {door.problem}")
        if options.publish:
            await simulation.enter(published(options.publish, lambda: program.pid))
        self._no_way_out = door.no_way_out

    async def _container(self) -> RunningContainer | None:
        options = self._options
        if not options.container and not options.compose_service:
            return None
        return await find_container(
            options.members[0].vm,
            options.engine,
            container=options.container,
            service=options.compose_service,
            folder=Path.cwd(),
        )

    async def _take(self, simulation: FleetSimulation, slot: Slot, container: RunningContainer) -> None:
        if self._options.netns:
            if container.facts.network == "host":
                raise NoNamespace(
                    f"{container.what} shares this machine's network: --netns would put 169.254.169.254 into that; --address does it"
                )
            container.entered = await simulation.enter(
                metadata_inside(lambda listener: simulation.listen(slot.vm, listener))
            )
        await simulation.attach(slot, container)

    async def _target(self, folder: Path, slot: Slot, member: SetMember) -> Target | None:
        options = self._options
        if options.pid is not None:
            return RunningProcess(slot.vm, options.pid)
        if options.cgroup is not None:
            return RunningCgroup(slot.vm, options.cgroup)
        return await self._program(folder, slot, member, ()) if options.argv else None

    async def _program(self, folder: Path, slot: Slot, member: SetMember, words: Sequence[str]) -> Program:
        options = self._options
        freezer, _ = await in_thread(
            "freezer", lambda: choose_freezer(options.freezer, cgroup_of(os.getpid()))
        )
        return Program(
            slot.vm,
            arguments_of(options.argv, member, slot.port, strict=len(options.members) > 1),
            {**program_environ(slot.vm, slot.set, slot.url, proxy=options.proxy), **slot.variables},
            folder,
            freezer,
            way_in=words,
            stdout=2 if options.own_stdout else None,
        )

    def _tell_way(self, outside: str, slot: Slot, container: RunningContainer | None) -> None:
        options = self._options
        port = f"; port {slot.port}" if options.argv and len(options.members) > 1 else ""
        vm = f"{slot.vm}: " if len(options.members) > 1 else ""
        self._say(f"metadata  {vm}{outside}{EVENTS_PATH}{port}")
        if container is not None:
            self._say(
                f"          {ways_to_metadata(container.facts, outside, options.address, inside=options.netns)}"
            )
            for note in container.notes:
                self._say(f"note      {note}")

    def _tell_how(self, simulation: FleetSimulation) -> None:
        """How clients find it, where there is one VM: with several there is too much to read already."""
        options = self._options
        (slot,) = simulation.slots.values()
        if options.netns and options.argv:
            ports = ", ".join(f"127.0.0.1:{port}" for port in options.publish) or "none (--publish PORT)"
            self._say(
                f"          {slot.url} inside, for every client. Ports of this machine that lead in: {ports}"
            )
            self._say(
                f"          no other network inside: {self._no_way_out}"
                if self._no_way_out
                else "          connections lead out; this machine's own services, too, at the address of the default route"
            )
        elif options.proxy:
            self._say(
                f"          and http_proxy leads there: the program may ask http://169.254.169.254{EVENTS_PATH}"
            )
        elif options.argv:
            self._say(
                "          the program finds it in CAESURA_METADATA_URL; for a client that has no option for the address: "
                "--netns, or --proxy where it honours http_proxy, or --address 169.254.169.254 as root"
            )


def with_gateway(address: str, container: RunningContainer | None) -> str:
    """``gateway:PORT`` as the address of this machine in the container's network; any other address as it is.

    Raises:
        NoContainer: the container has no such network.
    """
    if not address.startswith("gateway:") or container is None:
        return address
    if not container.facts.gateways:
        raise NoContainer(
            f"{container.what} has no network with a gateway (its network is {container.facts.network})"
        )
    return f"{container.facts.gateways[0]}:{address.removeprefix('gateway:')}"


def _is_over(simulation: FleetSimulation) -> bool:
    """Whether the programs have ended, and every event with them."""
    return nothing_left(list(simulation.slots.values())) and all(each.outcome for each in simulation.events)


def refused_together(options: Sequence[tuple[str, object]]) -> str:
    """Which two of these options were both given; empty: at most one was."""
    given = [name for name, value in options if value]
    return f"{given[0]} and {given[1]} exclude each other" if len(given) > 1 else ""
