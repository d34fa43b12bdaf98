"""One rehearsal from the command line: set up, carry out what was ordered, report, leave nothing behind."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import msgspec

from caesura.runtime.errors import CaesuraError
from caesura.runtime.threads import in_thread
from caesura_host_updater.drivers.process.freezers import choose_freezer
from caesura_rehearse.address import local_address
from caesura_rehearse.control import serve_control
from caesura_rehearse.desk import Desk
from caesura_rehearse.engine import Engine, rehearsal
from caesura_rehearse.expectations import Expectation
from caesura_rehearse.faults import Fault
from caesura_rehearse.namespace import URL, NoNamespace, open_door, published, way_in
from caesura_rehearse.observations import EventRecord
from caesura_rehearse.orders import Order
from caesura_rehearse.report import Report
from caesura_rehearse.run_folder import cgroup_of, run_folder
from caesura_rehearse.running_targets import RunningCgroup, RunningProcess
from caesura_rehearse.slots import Slot
from caesura_rehearse.targets import Program, Target, program_environ

EVENTS_PATH = "/metadata/scheduledevents?api-version=2020-07-01"


class RunOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What the command line asks for."""

    argv: tuple[str, ...] = ()
    pid: int | None = None
    cgroup: Path | None = None
    order: Order | None = None
    expectations: tuple[Expectation, ...] = ()
    vm: str = "app-1"
    set: str = "app"
    settle_s: float = 3.0
    """How long the program may run on after its event vanished from the document."""
    freezer: Literal["auto", "cgroup2", "cgroup1", "sigstop"] = "auto"
    proxy: bool = False
    """Whether the program's ``http_proxy`` leads to the metadata API."""
    netns: bool = False
    """Whether the program gets a network of its own, in which 169.254.169.254 answers."""
    publish: tuple[int, ...] = ()
    """Ports of 127.0.0.1 that lead into that network."""
    address: str = ""
    """Where the metadata API listens, ``ADDRESS:PORT``; empty: a free port of 127.0.0.1."""
    faults: tuple[Fault, ...] = ()
    """Of the metadata API."""
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
        self._engine: Engine | None = None
        self._signal = 0
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
        if first and self._waiting and self._engine is not None:
            self._engine.notify()  # it is the end that was announced: what was found is reported
        elif first:
            body.cancel()
        elif self._engine is not None:
            self._engine.hurry()

    async def _in_folder(self) -> Report:
        folder = (
            run_folder()
        )  # not in a thread: a signal between its making and the next line would leave it behind
        try:
            async with rehearsal(folder, self._news) as engine:
                self._engine = engine
                return await self._perform(engine, folder)
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _news(self, text: str) -> None:
        if not self._options.quiet:
            at = self._engine.now if self._engine is not None else 0.0
            self._say(f"{at:7.1f} s  {text}")

    async def _perform(self, engine: Engine, folder: Path) -> Report:
        options = self._options
        if options.address:
            await engine.enter(local_address(options.address))
        for fault in options.faults:
            engine.faults.add(fault)
        slot = await engine.add_vm(options.vm, options.set, 0, options.address or "127.0.0.1:0")
        outside = slot.url
        target = await self._attach(engine, slot, folder)
        self._tell_way(outside, slot.url)
        control = await engine.enter(serve_control(Desk(engine), options.control))
        records: list[EventRecord] = []
        if options.order is not None:
            records.append(await engine.rollouts.order(options.order))
            await engine.until(lambda: all(each.outcome for each in records), None)
            await engine.until(lambda: target is not None and target.ended.is_set(), options.settle_s)
        else:
            until = "Ctrl-C ends it" if target is None else "until the program ends, or Ctrl-C"
            self._say(
                f"orders    caesura rehearse freeze --for 9s --notice 15s; control API in {control}; {until}"
            )
            self._waiting = True
            await engine.until(lambda: self._signal != 0 or _is_over(engine, target), None)
            self._waiting = False
        return engine.report(options.expectations, ordered=len(records))

    async def _attach(self, engine: Engine, slot: Slot, folder: Path) -> Target | None:
        options = self._options
        if not options.netns:
            target = await self._target(folder, slot.url)
            if target is not None:
                await engine.attach(slot, target)
            return target
        door = await engine.enter(
            open_door(folder, slot.vm, lambda listener: engine.listen(slot.vm, listener), engine.notify)
        )
        slot.url = URL
        program = await self._program(folder, slot.url, way_in(folder, slot.vm))
        await engine.attach(slot, program)
        await engine.until(lambda: door.entered.is_set() or program.ended.is_set(), None)
        if door.problem:
            raise NoNamespace(f"--netns does not work here: {door.problem}")
        if options.publish:
            await engine.enter(published(options.publish, lambda: program.pid))
        return program

    async def _target(self, folder: Path, url: str) -> Target | None:
        options = self._options
        if options.pid is not None:
            return RunningProcess(options.vm, options.pid)
        if options.cgroup is not None:
            return RunningCgroup(options.vm, options.cgroup)
        return await self._program(folder, url, ()) if options.argv else None

    async def _program(self, folder: Path, url: str, words: Sequence[str]) -> Program:
        options = self._options
        freezer, _ = await in_thread(
            "freezer", lambda: choose_freezer(options.freezer, cgroup_of(os.getpid()))
        )
        return Program(
            options.vm,
            options.argv,
            program_environ(options.vm, options.set, url, proxy=options.proxy),
            folder,
            freezer,
            way_in=words,
            stdout=2 if options.own_stdout else None,
        )

    def _tell_way(self, outside: str, inside: str) -> None:
        options = self._options
        self._say(f"metadata  {outside}{EVENTS_PATH}")
        if options.netns:
            ports = ", ".join(f"127.0.0.1:{port}" for port in options.publish) or "none (--publish PORT)"
            self._say(
                f"          {inside} inside, for every client; the program has no other network. Ports that lead in: {ports}"
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


def _is_over(engine: Engine, target: Target | None) -> bool:
    """Whether the program has ended, and every event with it."""
    return target is not None and target.ended.is_set() and all(each.outcome for each in engine.events)


def refused_together(options: Sequence[tuple[str, object]]) -> str:
    """Which two of these options were both given; empty: at most one was."""
    given = [name for name, value in options if value]
    return f"{given[0]} and {given[1]} exclude each other" if len(given) > 1 else ""
