"""The demo of method kexec: one host in emulation whose kernel is replaced while its guests are paused, seen from outside."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from urllib.parse import urlsplit

import msgspec
from rich.console import Console
from rich.table import Table

from caesura.bus.local_broker import LocalBroker
from caesura.contract import messages as m
from caesura.contract.parts import WholeRollout
from caesura.runtime.errors import CaesuraError
from caesura.runtime.identity import new_id
from caesura_ctl.follow import ENDED, Progress
from caesura_ctl.session import Session, connect, new_request_id
from caesura_ctl.settings import CtlSettings
from caesura_demo.checks import Check
from caesura_demo.image import build_host_image
from caesura_demo.layout import Broker, Layout, service_environments
from caesura_demo.results import verdict_table
from caesura_demo.run import BROKERS, NotReady, Options
from caesura_demo.service_processes import Processes
from caesura_demo.sweeper import start_sweeper
from caesura_demo.workspace import FIRST_PORT, CleanUp, free_ports, run_folder
from caesura_nested_host.fleet_host import SLOW, FleetHost
from caesura_nested_host.guests import GuestPause
from caesura_nested_host.image import Image
from caesura_nested_host.machine import CONSOLE
from caesura_nested_host.pause_parts import pause_parts

BUDGET_S = 30.0
"""s: what is promised of a pause."""
_UPDATE = "kernel-new"
_SERVICES = ("coordinator", "exporter")
_PATIENCE_S = 900.0
"""s: for a boot, a rollout; all of them take some two minutes on two cores that do nothing else."""
_TRIES = 4
"""Rollouts, where the emulation was too slow to save a guest in time."""
_LOOK_S = 0.2
_WAITING_S = 10.0
"""s: between two lines of somebody who waits for a boot."""
_PHASES = (
    (r"kexec_core: Starting new kernel", "the old kernel is left"),
    (r"\] Linux version (\S+)", "kernel {0} starts"),
    (r"caesura: guard begins", "the pause guard runs, from the initramfs"),
    (r"arrival\.clock_set", "the host's clock is right again"),
    (r"caesura: guard ended with 0", "the guests run"),
)
"""A line of the console, and what it means."""


class KernelDemo:
    """One run: a host, two guests, the kernel before the newest replaced by the newest."""

    def __init__(self, options: Options, console: Console) -> None:
        self.options = options
        self.console = console
        self.run_id = new_id()
        self._mark = {"CAESURA_DEMO_RUN": self.run_id}
        self._exporter_port = next(free_ports(1, start=FIRST_PORT + 200))
        self._progress = Progress()
        self._clean_up = CleanUp(self._acknowledge)

    async def until_signal(self) -> int:
        """``run``, until the first signal; later ones do not interrupt the clean-up.

        Raises:
            Interrupted: a signal ended it.
        """
        return await self._clean_up.run(self.run)

    async def run(self) -> int:
        """Run everything, and clean up in every case. 0 if every rule held, else 1.

        Raises:
            CaesuraError: the image cannot be built here, the host did not come up, the rollout was refused.
        """
        with run_folder(self.options.folder) as folder:
            sweeper = await start_sweeper(f"CAESURA_DEMO_RUN={self.run_id}", [])
            try:
                if self.options.folder is None:
                    sweeper.remember(folder)
                self._say("host: Debian with two kernels, QEMU and Caesura, built once and cached")
                image = await build_host_image(
                    self.run_id, lambda what: self._say(f"host: {what}"), self._clean_up
                )
                return await self._run_in(folder, image)
            finally:
                await self._clean_up.step(sweeper.dismiss())

    async def _run_in(self, folder: Path, image: Image) -> int:
        broker = LocalBroker(kind=self.options.broker, data_dir=folder, environ=self._mark)
        self._say(f"broker: {BROKERS[broker.kind]}; files and logs in {folder}")
        host = FleetHost("host-1", image, folder / "host-1", domain=0, environ=self._mark)
        async with (
            broker,
            self._services(folder, Broker(broker.url, broker.protocol)) as processes,
            self._machine(host),
        ):
            settings = CtlSettings(broker_url=broker.url, broker_protocol=broker.protocol, client="demo")
            async with connect(settings) as session:
                await self._come_up(session, processes, host, urlsplit(broker.url).port or 1883)
                for left in reversed(range(_TRIES)):
                    since = asyncio.get_running_loop().time()
                    rollout = await self._roll(session, processes, host)
                    if rollout.status == "completed" or not SLOW & set(rollout.codes) or not left:
                        break
                    await self._try_again(session, processes, host, rollout)
                checks, pauses = await self._judge(host, image, rollout, since)
                self._conclude(host, image, rollout, checks, pauses)
                if self.options.keep:
                    await self._stay(processes, broker)
        return 0 if all(check.held for check in checks) else 1

    @asynccontextmanager
    async def _services(self, folder: Path, broker: Broker) -> AsyncIterator[Processes]:
        processes = Processes(self.run_id, folder)
        try:
            found = service_environments(
                Layout(vms=()), broker=broker, folder=str(folder), ports={"exporter": self._exporter_port}
            )
            for name in _SERVICES:
                await processes.start(name, *found[name])
            self._say(f"live page: http://127.0.0.1:{self._exporter_port}/ (watch the rollout there)")
            yield processes
        finally:
            await self._clean_up.step(processes.stop(self._clean_up.hurry))

    @asynccontextmanager
    async def _machine(self, host: FleetHost) -> AsyncIterator[None]:
        try:
            await asyncio.to_thread(host.machine.start)
            yield
        finally:
            # Threads that wait for a line of it end with it.
            await self._clean_up.step(asyncio.to_thread(host.machine.stop))

    async def _come_up(self, session: Session, processes: Processes, host: FleetHost, port: int) -> None:
        self._say(f"host: boots kernel {host.image.old} in QEMU, without KVM")
        waiting = asyncio.ensure_future(asyncio.to_thread(host.prepare, port))
        await self._until(
            session, processes, waiting.done, "the host to boot and to be prepared", "host: boots"
        )
        await waiting
        self._say("host: prepared for method kexec; its guests start")
        await asyncio.to_thread(host.start_updater)
        await self._until(
            session,
            processes,
            lambda: host.ready(session.fleet_view),
            "host, guard and guests",
            "host: guests start",
        )
        await asyncio.to_thread(host.until_guests_beat)
        self._say(f"guests: {', '.join(host.guests)} beat five times a second, and compare their memory")

    async def _roll(self, session: Session, processes: Processes, host: FleetHost) -> WholeRollout:
        answer = await session.ask(
            m.RolloutRequested(
                request=new_request_id(),
                update=_UPDATE,
                selection=m.Selection(),
                policy=m.Policy(
                    notice_s=self.options.notice_s,
                    budget_s=BUDGET_S,
                    verify_timeout_s=600.0,
                    # The guests have no agent that would say how right their clocks are.
                    on_unsynced="proceed",
                ),
                limits=m.Limits(again=True),
            )
        )
        if not answer.accepted:
            raise CaesuraError(f"the coordinator refused: {answer.reason}")
        phases = _Phases(host)

        def ended() -> bool:
            rollout = session.fleet_view.rollouts.get(answer.rollout)
            for line in (*phases.new_lines(), *self._progress.lines(session.fleet_view, rollout)):
                self._say(line)
            return rollout is not None and rollout.status in ENDED

        await self._until(session, processes, ended, "the rollout to end", "")
        return session.fleet_view.rollouts[answer.rollout]

    async def _try_again(
        self, session: Session, processes: Processes, host: FleetHost, rollout: WholeRollout
    ) -> None:
        """A pause that was called off is what should happen there, and shows no other kernel."""
        self._say(f"{host.name}: the guests run again in the old kernel ({rollout.reason}); another try")
        await session.ask(m.AbortRequested(request=new_request_id(), rollout=rollout.rollout))
        self._progress = Progress()
        await self._until(
            session,
            processes,
            lambda: (
                session.fleet_view.rollouts[rollout.rollout].status == "aborted"
                and host.ready(session.fleet_view)
            ),
            "guests that can be paused again",
            "",
        )
        await asyncio.to_thread(host.until_guests_beat)

    async def _judge(
        self, host: FleetHost, image: Image, rollout: WholeRollout, since: float
    ) -> tuple[list[Check], Mapping[str, GuestPause]]:
        kernel = (await asyncio.to_thread(host.machine.run, "uname -r")).strip()
        try:
            pauses = await asyncio.to_thread(host.guest_pauses, since)
        except ValueError as error:
            raise CaesuraError(f"the guests say nothing that could be compared: {error}") from error
        return judge(rollout, kernel, image, pauses), pauses

    async def _stay(self, processes: Processes, broker: LocalBroker) -> None:
        self._note(
            f"\nStill running (--keep): export CAESURA_CTL_BROKER_URL={broker.url}. Ctrl-C ends it and leaves nothing."
        )
        while True:
            processes.check()
            await asyncio.sleep(_LOOK_S)

    async def _until(
        self, session: Session, processes: Processes, condition: Callable[[], bool], what: str, waiting: str
    ) -> None:
        """Wait for a condition, with a line now and then. Raises NotReady."""
        loop = asyncio.get_running_loop()
        begun = said = loop.time()
        while not condition():
            now = loop.time()
            if now > begun + _PATIENCE_S:
                raise NotReady(f"waited {_PATIENCE_S:g} s for {what}. Look into the logs (--dir keeps them).")
            if waiting and now > said + _WAITING_S:
                said = now
                self._say(f"{waiting}: {now - begun:.0f} s")
            processes.check()
            session.changed.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout(_LOOK_S):
                    await session.changed.wait()

    # -- output --

    def _say(self, text: str) -> None:
        if not self.options.json:
            self.console.print(text, soft_wrap=True)

    def _note(self, text: str) -> None:
        console = Console(stderr=True, highlight=False) if self.options.json else self.console
        console.print(text, soft_wrap=True)

    def _acknowledge(self, text: str) -> None:
        with suppress(OSError):
            Console(stderr=True, highlight=False).print(f"caesura: {text}", soft_wrap=True)

    def _conclude(
        self,
        host: FleetHost,
        image: Image,
        rollout: WholeRollout,
        checks: Sequence[Check],
        pauses: Mapping[str, GuestPause],
    ) -> None:
        longest = max(pauses.values(), key=lambda each: each.silence_s)
        parts = pause_parts(host.machine.lines(CONSOLE), longest.before.at, longest.after.at)
        if self.options.json:
            document = {
                "held": all(check.held for check in checks),
                "from": image.old,
                "to": image.new,
                "rollout": rollout,
                "checks": checks,
                "pause_s": longest.silence_s,
                "parts_s": parts,
                "guests": pauses,
            }
            self.console.out(msgspec.json.encode(document).decode(), highlight=False)
            return
        self.console.print(
            f"\nKernel {image.old} to {image.new} under running guests: they were silent for {longest.silence_s:.1f} s",
            style="bold",
        )
        table = Table.grid(padding=(0, 2))
        for name, seconds in parts.items():
            table.add_row(name, f"{seconds:.1f} s", f"{seconds / longest.silence_s:.0%}")
        self.console.print(table)
        self.console.print(verdict_table(checks))


class _Phases:
    """What a host's console says of a change of its kernel, in the words of this demo."""

    def __init__(self, host: FleetHost) -> None:
        self._host = host
        self._seen = len(host.machine.lines(CONSOLE))
        self._next = 0

    def new_lines(self) -> list[str]:
        """One for each phase that began since the last call."""
        lines = self._host.machine.lines(CONSOLE)
        found = []
        for line in lines[self._seen :]:
            for number, (pattern, text) in enumerate(_PHASES[self._next :], self._next):
                if match := re.search(pattern, line.text):
                    self._next = number + 1
                    found.append(f"{self._host.name}: {text.format(*match.groups())}")
                    break
        self._seen = len(lines)
        return found


def judge(rollout: WholeRollout, kernel: str, image: Image, pauses: Mapping[str, GuestPause]) -> list[Check]:
    """The rules, in the order in which a rollout meets them. Pure."""
    longest_s = max(each.silence_s for each in pauses.values())
    faults = [f"{vm}: {fault}" for vm, each in pauses.items() for fault in each.faults]
    memory = ", ".join(f"{vm}: {each.memory}" for vm, each in pauses.items())
    return [
        Check("the rollout completed", rollout.status == "completed", rollout.reason or rollout.status),
        Check("the host runs the new kernel", kernel == image.new, f"{kernel}, was {image.old}"),
        Check(
            f"silent for at most {BUDGET_S:g} s",
            longest_s <= BUDGET_S,
            f"{longest_s:.1f} s, seen from outside",
        ),
        Check("memory, boot and sequence as they were", not faults, "; ".join(faults) or memory),
    ]
