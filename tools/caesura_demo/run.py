"""Run the demo: start everything, roll an update out, judge, clean up."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import msgspec
import tomli_w
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from caesura.bus.local_broker import LocalBroker
from caesura.contract import messages as m
from caesura.contract.parts import WholeRollout
from caesura.runtime.errors import CaesuraError
from caesura.runtime.identity import new_id
from caesura.runtime.processes import cgroup_name, frozen_processes
from caesura_ctl.follow import ENDED, Progress
from caesura_ctl.session import Session, connect, new_request_id
from caesura_ctl.settings import CtlSettings
from caesura_ctl.tables import live_view, pauses_view
from caesura_demo.checks import Check, judge, judge_guests
from caesura_demo.guests import (
    GUESTS,
    UPDATES,
    GuestImage,
    GuestMethod,
    guest_host_file,
    guest_update_file,
    read_guest,
)
from caesura_demo.image import build_image
from caesura_demo.layout import (
    UPDATE,
    Broker,
    Layout,
    host_file,
    listeners_file,
    service_environments,
    small_layout,
    standard_layout,
    update_file,
)
from caesura_demo.results import RolloutResult, document_of, read_patched, read_workloads, verdict_table
from caesura_demo.service_processes import Processes
from caesura_demo.sweeper import Sweeper, start_sweeper
from caesura_demo.workspace import FIRST_PORT, CleanUp, free_ports, ram_folder, run_folder
from caesura_vmcontrol.freezer_control import FreezerChoice

_COUNTS_EVERY_S = 2.0  # s: a log needs no line for each of 25 agents
_READY_S = 45.0
"""s: without another of 6 hosts and 25 VMs coming up; all of them take some 8 s on two cores that do nothing else."""
_ROLLOUT_S = 90.0
"""s: without another state of a wave; a wave takes some 6 s."""
_GUESTS_READY_S = 300.0
"""s: without another of 9 guests coming up; all of them take some 60 s on two cores without KVM."""
_GUESTS_ROLLOUT_S = 240.0
_GUESTS_SETTLE_S = 20.0
_REFRESH_S = 0.2


BROKERS = {"mosquitto": "Mosquitto", "embedded": "amqtt, embedded (install mosquitto to use that instead)"}


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """The options of the command line."""

    driver: Literal["process", "qemu"] = "process"
    methods: tuple[GuestMethod, ...] = ("freeze", "swap")
    """Driver qemu: one rollout by each of these, in this order."""
    vms: int | None = None
    """None: as many as the driver's fleet has by default."""
    memory_mib: int = 160
    accel: Literal["auto", "kvm", "tcg"] = "auto"

    broker: Literal["auto", "mosquitto", "embedded"] = "auto"
    freezer: FreezerChoice = "auto"
    update_s: float = 2.0
    notice_s: float = 8.0
    budget_s: float = 10.0
    keep: bool = False
    json: bool = False
    folder: Path | None = None


class NotReady(CaesuraError):
    """The fleet did not come up in time."""


def _layout(options: Options, ports: Sequence[int]) -> Layout:
    if options.vms is not None:
        return small_layout(ports, options.vms)
    return small_layout(ports, GUESTS) if options.driver == "qemu" else standard_layout(ports)


class Demo:
    """One run of the demo."""

    def __init__(self, options: Options, console: Console) -> None:
        self.options = options
        self.console = console
        self.run_id = new_id()
        ports = list(free_ports(26))
        self._real = options.driver == "qemu"
        self.layout = _layout(options, ports)
        self._image: GuestImage | None = None
        self._accel = ""
        self.exporter_port = next(free_ports(1, start=FIRST_PORT + 200))
        self._page_url = f"http://127.0.0.1:{self.exporter_port}/"
        self.progress = Progress()
        self._stage = "starting the broker"
        self._counts: dict[str, tuple[int, int]] = {}
        self._next_counts_s = 0.0
        self._session: Session | None = None
        self._live: Live | None = None
        self._clean_up = CleanUp(self._acknowledge)

    async def until_signal(self) -> int:
        """``run``, until the first signal; later ones do not interrupt the clean-up.

        Raises:
            Interrupted: a signal ended it.
        """
        return await self._clean_up.run(self.run)

    async def run(self) -> int:
        """Run everything, and clean up in every case. 0 if every rule held, else 1."""
        with run_folder(self.options.folder) as folder:  # first, since it may be refused
            sweeper = await start_sweeper(f"CAESURA_DEMO_RUN={self.run_id}", self._cgroups(folder))
            try:
                if self.options.folder is None:
                    sweeper.remember(folder)
                if self._real:
                    self._image = await self._guest_image()
                return await self._run_in(folder, sweeper)
            finally:
                await self._clean_up.step(sweeper.dismiss())

    def _cgroups(self, folder: Path) -> list[str]:
        return [cgroup_name(host, folder / host) for host in self.layout.hosts]  # their state folders

    async def _run_in(self, folder: Path, sweeper: Sweeper) -> int:
        with ram_folder(needed=self._real) as ram_dir, self._display():
            if ram_dir:
                sweeper.remember(ram_dir)
            broker = LocalBroker(
                kind=self.options.broker, data_dir=folder, environ={"CAESURA_DEMO_RUN": self.run_id}
            )
            self._say(f"broker: {BROKERS[broker.kind]}; files and logs in {folder}")
            async with (
                self._broker(broker),
                self._services(folder, ram_dir, Broker(broker.url, broker.protocol)) as processes,
            ):
                settings = CtlSettings(broker_url=broker.url, broker_protocol=broker.protocol, client="demo")
                async with connect(settings) as session:
                    self._session = session
                    await self._come_up(session, processes)
                    results = [await self._roll(session, processes, folder, kind) for kind in self._kinds()]
                    self._stop_display()
                    self._conclude(session, results, broker)
                    if self.options.keep:
                        await self._stay(processes)
        return 0 if all(check.held for result in results for check in result.checks) else 1

    def _kinds(self) -> tuple[GuestMethod, ...]:
        return self.options.methods if self._real else ("freeze",)

    def _update(self, kind: GuestMethod) -> str:
        return UPDATES[kind] if self._real else UPDATE

    async def _guest_image(self) -> GuestImage:
        if shutil.which("qemu-system-x86_64") is None:
            raise CaesuraError(
                "QEMU is not installed: on Debian, apt-get install qemu-system-x86 (or run the demo without "
                "--driver qemu: its VMs are process groups then)"
            )
        self._say("guest: Debian's kernel, Python and the agent, built once and cached")
        return await build_image(self.run_id, lambda what: self._say(f"guest: {what}"), self._clean_up)

    # -- stages --

    @asynccontextmanager
    async def _services(self, folder: Path, ram_dir: str, broker: Broker) -> AsyncIterator[Processes]:
        self._write_files(folder, ram_dir, broker)
        processes = Processes(self.run_id, folder, self._cgroups(folder))
        self._stage = f"starting {len(self.layout.hosts) + 3} services and {len(self.layout.vms)} VMs"
        try:
            environments = service_environments(
                self.layout,
                broker=broker,
                folder=str(folder),
                ports={"exporter": self.exporter_port},
                of_hosts=self._host_settings(),
            )
            for name, (module, environment) in environments.items():
                await processes.start(name, module, environment)
            tell = self._note if self.options.keep else self._say
            tell(f"live page: {self._page_url} (watch the rollout there)")
            yield processes
        finally:
            self._stage = "stopping: resuming and ending every VM"
            await self._clean_up.step(processes.stop(self._clean_up.hurry))

    @asynccontextmanager
    async def _broker(self, broker: LocalBroker) -> AsyncIterator[None]:
        async with broker:
            try:
                yield
            finally:
                if self._clean_up.hurry.is_set():
                    await self._clean_up.step(broker.kill())

    def _host_settings(self) -> dict[str, str]:
        if not self._real:
            return {}
        return {"CLOCK_TIMEOUT_S": "20"}  # many guests without KVM leave little CPU for each

    def _write_files(self, folder: Path, ram_dir: str, broker: Broker) -> None:
        (folder / "workloads").mkdir()
        (folder / "updates.d").mkdir()
        for host in self.layout.hosts:
            table = self._host_file(host, folder, ram_dir, broker)
            (folder / f"{host}.toml").write_text(tomli_w.dumps(table), encoding="utf-8")
        (folder / "listeners.toml").write_text(tomli_w.dumps(listeners_file(self.layout)), encoding="utf-8")
        for kind in self._kinds():
            seconds = self.options.update_s
            update = (
                guest_update_file(kind, folder=str(folder), seconds=0.0 if kind == "swap" else seconds)
                if self._real
                else update_file(folder=str(folder), seconds=seconds)
            )
            path = folder / "updates.d" / f"{self._update(kind)}.toml"
            path.write_text(tomli_w.dumps(update), encoding="utf-8")

    def _host_file(self, host: str, folder: Path, ram_dir: str, broker: Broker) -> dict[str, Any]:
        if self._image is None:
            return host_file(
                self.layout,
                host,
                broker=broker,
                folder=str(folder),
                freezer=self.options.freezer,
                run_id=self.run_id,
            )
        return guest_host_file(
            self.layout,
            host,
            broker=broker,
            folder=str(folder),
            ram_dir=ram_dir,
            image=self._image,
            memory_mib=self.options.memory_mib,
            accel=self.options.accel,
        )

    async def _come_up(self, session: Session, processes: Processes) -> None:
        """Wait until every host, VM, agent and the publisher are there and every workload polls."""
        fleet_view = session.fleet_view

        def ready() -> bool:
            places = fleet_view.vm_places()
            running = sum(record.state == "running" for _, record in places.values())
            agents = sum(agent.online for agent in fleet_view.agents.values())
            epoch = (
                fleet_view.coordinator.epoch
                if fleet_view.coordinator and fleet_view.coordinator.online
                else 0
            )
            acknowledged = sum(
                each.epoch == epoch > 0 and each.guard == "ready" for each in fleet_view.hosts.values()
            )
            self._counts = {
                "host updaters with a pause guard": (acknowledged, len(self.layout.hosts)),
                "VMs running": (running, len(self.layout.vms)),
                "agents": (agents, len(self.layout.vms)),
                "metadata publishers": (sum(fleet_view.publishers.values()), 1),
            }
            return all(have >= wanted for have, wanted in self._counts.values())

        patience_s = _GUESTS_READY_S if self._real else _READY_S
        if not await self._until(session, processes, ready, patience_s, lambda: self._counts):
            missing = "; ".join(
                f"{name} {have}/{wanted}" for name, (have, wanted) in self._counts.items() if have < wanted
            )
            raise NotReady(
                f"the fleet did not come up, and nothing more came within {patience_s:g} s: {missing}. Look into the logs."
            )
        if self._real:
            detail = next(iter(fleet_view.hosts.values())).driver_detail
            self._say(f"guests: {len(self.layout.vms)} of {self.options.memory_mib} MiB; {detail}")

    async def _roll(
        self, session: Session, processes: Processes, folder: Path, kind: GuestMethod
    ) -> RolloutResult:
        rollout = await self._follow(session, processes, self._update(kind))
        return RolloutResult(rollout, await self._judge(session, rollout, folder, kind))

    async def _follow(self, session: Session, processes: Processes, update: str) -> WholeRollout:
        self._stage = f"rolling out {update}"
        request = m.RolloutRequested(
            request=new_request_id(),
            update=update,
            policy=m.Policy(
                notice_s=self.options.notice_s,
                budget_s=self.options.budget_s,
                soak_s=0.5,
                verify_timeout_s=60.0 if self._real else 30.0,
            ),
        )
        answer = await session.ask(request)
        if not answer.accepted:
            raise CaesuraError(f"the coordinator refused: {answer.reason}")
        name = answer.rollout

        def ended() -> bool:
            state = session.fleet_view.rollouts.get(name)
            if state is None or state.status not in ENDED:
                return False
            if state.status != "completed":
                return True
            # The facts of the last wave may still be in transit when the state says completed.
            expected = {vm for wave in state.waves for vm in wave.vms}
            return expected <= {pause.vm for pause in session.fleet_view.pauses_of(name)} and not any(
                document.events for document in session.fleet_view.documents.values()
            )

        def progress() -> object:
            state = session.fleet_view.rollouts.get(name)
            return state and (state.status, [wave.status for wave in state.waves])

        patience_s = _GUESTS_ROLLOUT_S if self._real else _ROLLOUT_S
        await self._until(session, processes, ended, patience_s, progress)
        return session.fleet_view.rollouts[name]

    async def _judge(
        self, session: Session, rollout: WholeRollout, folder: Path, kind: GuestMethod
    ) -> list[Check]:
        self._stage = "checking what was promised"
        loop = asyncio.get_running_loop()
        end = loop.time() + (_GUESTS_SETTLE_S if self._real else 3.0)
        while True:
            # Guests and workloads report their last observation a second later: give them time.
            checks = await self._look(session, rollout, folder, kind)
            if all(check.held for check in checks) or loop.time() > end:
                return checks
            await asyncio.sleep(_REFRESH_S)

    async def _look(
        self, session: Session, rollout: WholeRollout, folder: Path, kind: GuestMethod
    ) -> list[Check]:
        if self._real:
            guests = await asyncio.gather(*(read_guest(folder, vm) for vm in self.layout.vms))
            patched = read_patched(folder / f"patched-{kind}")
            return judge_guests(session.fleet_view, rollout, guests, patched, method=kind)
        return judge(
            session.fleet_view,
            rollout,
            read_workloads(folder, self.layout),
            read_patched(folder / "patched"),
            [f"process {pid}" for pid in frozen_processes(f"CAESURA_DEMO_RUN={self.run_id}")],
        )

    async def _stay(self, processes: Processes) -> None:
        self._note("\nStill running (--keep). Ctrl-C ends it and leaves nothing behind.")
        while True:
            processes.check()
            await asyncio.sleep(_REFRESH_S)

    async def _until(
        self,
        session: Session,
        processes: Processes,
        condition: Callable[[], bool],
        patience_s: float,
        progress: Callable[[], object],
    ) -> bool:
        """Wait for a condition; whether it came true. A slow machine is given time while ``progress`` changes."""
        loop = asyncio.get_running_loop()
        end, reached = loop.time() + patience_s, progress()
        while not (held := condition()) and loop.time() < end:
            if (now := progress()) != reached:
                end, reached = loop.time() + patience_s, now
            processes.check()
            self._refresh()
            session.changed.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout(_REFRESH_S):
                    await session.changed.wait()
        self._refresh()
        return held

    # -- output --

    def _say(self, text: str) -> None:
        if not self.options.json:
            self.console.print(text, soft_wrap=True)

    def _note(self, text: str) -> None:
        """A line for the waiting person, separate from the answer of ``--json``."""
        console = Console(stderr=True, highlight=False) if self.options.json else self.console
        console.print(text, soft_wrap=True)

    def _acknowledge(self, text: str) -> None:
        """A line for the person who pressed Ctrl-C, even if standard output is redirected."""
        with suppress(OSError):
            Console(stderr=True, highlight=False).print(f"caesura: {text}", soft_wrap=True)

    @contextmanager
    def _display(self) -> Iterator[None]:
        if self.console.is_terminal and not self.options.json:
            self._live = Live(
                console=self.console, get_renderable=self._render, refresh_per_second=5, transient=True
            )
            self._live.start()
        try:
            yield
        finally:
            self._stop_display()

    def _stop_display(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _render(self) -> RenderableType:
        head = Text.assemble(("Caesura demo: ", "bold"), self._stage)
        fleet_view = self._session.fleet_view if self._session is not None else None
        if fleet_view is None or fleet_view.latest() is None:
            table = Table.grid(padding=(0, 2))
            for name, (have, wanted) in self._counts.items():
                table.add_row(name, ProgressBar(total=wanted, completed=have, width=30), f"{have}/{wanted}")
            return Group(head, table)
        return Group(head, live_view(fleet_view, datetime.now(UTC)))

    def _refresh(self) -> None:
        """On a terminal the live display redraws itself; elsewhere each change is a line, of the counts now and then."""
        if self._live is not None or self.options.json:
            return
        counts = ", ".join(f"{name} {have}/{wanted}" for name, (have, wanted) in self._counts.items())
        fleet_view = self._session.fleet_view if self._session is not None else None
        rollout = fleet_view.latest() if fleet_view is not None else None
        now_s = asyncio.get_running_loop().time()
        lines = []
        if rollout is None and now_s >= self._next_counts_s:
            lines.append(f"{self._stage}: {counts}")
            self._next_counts_s = now_s + _COUNTS_EVERY_S
        if fleet_view is not None:
            lines += self.progress.lines(fleet_view, rollout)
        for line in lines:
            if line != getattr(self, "_last_line", None):
                self._last_line = line
                self.console.print(line, soft_wrap=True)

    def _conclude(self, session: Session, results: Sequence[RolloutResult], broker: LocalBroker) -> None:
        urls = {
            "live page": self._page_url,
            "metrics": f"{self._page_url}metrics",
            "scheduled events": f"{self.layout.vms[0].metadata_url} (header Metadata: true)",
            "broker": broker.url,
        }
        if self.options.json:
            document = document_of(session, results, urls)
            self.console.out(msgspec.json.encode(document).decode(), highlight=False)
            return
        for result in results:
            if self._real:
                self.console.print(f"\n{result.rollout.update}", style="bold")
            pauses = session.fleet_view.pauses_of(result.rollout.rollout)
            self.console.print(pauses_view(pauses, session.fleet_view.clocks))
            self.console.print(verdict_table(result.checks))
        if not self.options.keep:
            self.console.print(
                f"\nWith --keep the fleet stays, to look around: {', '.join(urls)}.", soft_wrap=True
            )
            return
        self.console.print("\nLook around:")
        for name, url in urls.items():
            self.console.print(f"  {name}: {url}", soft_wrap=True)
        self.console.print(f"  other commands: export CAESURA_CTL_BROKER_URL={broker.url}", soft_wrap=True)
