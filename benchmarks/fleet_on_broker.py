"""The whole fleet over a real broker: ``python benchmarks/fleet.py --mosquitto``.

The coordinator is the real process, with its store in SQLite, or two of them in PostgreSQL, of which the one that leads is killed in each tenth wave. Hosts,
agents and workloads are scripted, in this process, and share some hundred connections.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import aiohttp
from pause import percentile
from scripted_hosts import Host, Workloads, filters_of, record_of
from storms import Storms

from caesura.bus.messaging import MessageClient
from caesura.bus.mqtt import MqttBus
from caesura.bus.options import BrokerOptions
from caesura.contract import messages as m
from caesura.contract.codec import Received
from caesura.contract.topics import channel_of
from caesura_testing.broker import mosquitto
from caesura_testing.postgresql import PostgresServer
from caesura_testing.sandbox import Sandbox

_READY_S = 600.0
_NAMES = ("one", "two")
_KILL_EACH = 10
"""waves"""
_MB = 1024 * 1024
_QUIET, _FEW = 3, 50
"""looks half a second apart, with so many messages between two of them: announcements and pings"""


class Carrier:
    """One connection that carries several hosts."""

    def __init__(self, url: str, number: int, hosts: dict[str, tuple[m.VmRecord, ...]], world: World) -> None:
        self.bus = MqttBus(
            BrokerOptions(url=url, client_id=f"hosts-{number}", backlog_limit=100_000),
            filters=filters_of(*hosts),
        )
        self.post = MessageClient(self.bus, "/caesura/bench")
        self.post.subscribe(m.CoordinatorPresence, self._epoch)
        self.post.subscribe(m.StartOperation, self._start)
        self.hosts = {name: Host(self.bus, name, records, world) for name, records in hosts.items()}

    async def _epoch(self, claimed: m.CoordinatorPresence, received: Received) -> None:
        for each in self.hosts.values():
            await each.on_epoch(claimed, received)

    async def _start(self, command: m.StartOperation, received: Received) -> None:
        await self.hosts[command.host].on_start(command, received)

    async def report_in(self) -> None:
        """All hosts and agents are on the bus."""
        for host in self.hosts.values():
            await host.report_in()
            for each in host.records:
                await host.post.send(m.AgentPresence(vm=each.vm, online=True, boot_id="b"), vm=each.vm)


class Progress:
    """Says on standard error how far it is: what takes minutes must not look like what hangs."""

    def __init__(self) -> None:
        self._began = time.perf_counter()

    def say(self, text: str) -> None:
        """A line, with the seconds since the start before it."""
        print(f"{time.perf_counter() - self._began:7.1f} s  {text}", file=sys.stderr, flush=True)


class World:
    """The fleet, what its workloads do, and what is measured."""

    def __init__(
        self,
        url: str,
        vms: int,
        sets: int,
        domains: int,
        hosts: int,
        connections: int,
        progress: Progress,
    ) -> None:
        self.progress = progress
        self.domains = domains
        layout = Storms(vms, sets, domains, hosts)
        of_host: dict[str, list[m.VmRecord]] = {}
        for vm, group, domain, host in layout.vms:
            of_host.setdefault(host, []).append(record_of(vm, group, domain))
        names = list(of_host)
        count = min(connections, len(names))
        self.carriers = [
            Carrier(url, number, {name: tuple(of_host[name]) for name in names[number::count]}, self)
            for number in range(count)
        ]
        self.host_count = len(names)
        kinds = (
            m.SetDocument,
            m.WaveChanged,
            m.RolloutState,
            m.RequestAnswered,
            m.StartOperation,
            m.OperationReported,
            m.CoordinatorPresence,
            m.CoordinatorStatus,
        )
        self.bus = MqttBus(
            BrokerOptions(url=url, client_id="guests", backlog_limit=200_000),
            filters=[channel_of(each).filter() for each in kinds],
        )
        self.post = MessageClient(self.bus, "/caesura/bench")
        self.post.subscribe(m.SetDocument, Workloads(self.post, lambda vm: f"of-{vm}").on_document)
        self.post.subscribe(m.WaveChanged, self._wave)
        self.post.subscribe(m.RolloutState, self._rollout, whole=False)
        self.post.subscribe(m.RequestAnswered, self._answer)
        self.post.subscribe(m.StartOperation, self._commanded)
        self.post.subscribe(m.OperationReported, self._reported, whole=False)
        self.post.subscribe(m.CoordinatorPresence, self._presence)
        self.post.subscribe(m.CoordinatorStatus, self._status)
        self.leader, self.epoch = "", 0
        self.standby = asyncio.Event()
        self.over = asyncio.Event()
        self.halted = ""
        self.to_kill: asyncio.Queue[int] = asyncio.Queue()
        self.completed: set[int] = set()
        self.started: set[int] = set()
        self.commanded_at: dict[str, datetime] = {}
        """Operation to when the coordinator made its first command."""
        self.accepted_at: dict[str, datetime] = {}
        """Operation to when its acceptance was on the bus."""

    # -- hosts --

    async def before_last_report(self, command: m.StartOperation) -> None:
        """See ``scripted_hosts.Operations``."""

    def last_report(self, command: m.StartOperation) -> None:
        """See ``scripted_hosts.Operations``."""

    # -- guests and workloads --

    async def _wave(self, changed: m.WaveChanged, _: Received) -> None:
        if changed.status == "started" and changed.wave not in self.started:
            self.started.add(changed.wave)
            if (changed.wave + 1) % _KILL_EACH == 0:
                self.to_kill.put_nowait(changed.wave)
        elif changed.status == "completed" and changed.wave not in self.completed:
            self.completed.add(changed.wave)
            self.progress.say(
                f"{len(self.completed)} waves of {self.domains}, {len(self.accepted_at)} hosts of {self.host_count}"
            )
        elif changed.status in {"failed", "cancelled"}:
            self._halt(changed.reason)

    async def _rollout(self, state: m.RolloutState, _: Received) -> None:
        if state.status == "completed":
            self.over.set()
        elif state.status in {"halted", "aborted"}:
            self._halt(state.reason)

    async def _answer(self, answer: m.RequestAnswered, _: Received) -> None:
        if not answer.accepted:
            self._halt(answer.reason)

    def _halt(self, why: str) -> None:
        self.halted = self.halted or why
        self.over.set()

    # -- the coordinator --

    async def _commanded(self, command: m.StartOperation, received: Received) -> None:
        self.commanded_at.setdefault(command.operation, received.header.time)

    async def _reported(self, report: m.OperationReported, _: Received) -> None:
        if report.status == "accepted":
            self.accepted_at.setdefault(report.operation, datetime.now(UTC))

    async def _presence(self, presence: m.CoordinatorPresence, _: Received) -> None:
        if presence.online and presence.epoch > self.epoch:
            self.epoch, self.leader = presence.epoch, presence.coordinator.rsplit("-", 1)[0]

    async def _status(self, status: m.CoordinatorStatus, _: Received) -> None:
        if status.online and not status.leads and status.waits_for == "another coordinator leads":
            self.standby.set()

    @property
    def acceptances_s(self) -> list[float]:
        """Seconds from each command to its acceptance; the coordinator's clock is this machine's."""
        return [
            (at - self.commanded_at[operation]).total_seconds()
            for operation, at in self.accepted_at.items()
            if operation in self.commanded_at
        ]

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Everything but the coordinator is on the bus while the block runs."""
        tasks = [asyncio.create_task(self.bus.run(self.post.deliver))]
        tasks += [asyncio.create_task(each.bus.run(each.post.deliver)) for each in self.carriers]
        try:
            for each in (self.bus, *(carrier.bus for carrier in self.carriers)):
                assert await each.wait_connected(_READY_S)
            self.progress.say(f"{len(self.carriers)} connections, {self.host_count} hosts report in")
            await asyncio.gather(*(carrier.report_in() for carrier in self.carriers))
            self.progress.say("all hosts and agents are on the bus")
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def obeys(self) -> None:
        """All hosts obey the coordinator that leads."""
        async with asyncio.timeout(_READY_S):
            while not self.epoch or any(  # noqa: ASYNC110 - states of many
                host.epoch != self.epoch for carrier in self.carriers for host in carrier.hosts.values()
            ):
                await asyncio.sleep(0.05)


class Used:
    """Processor time and memory of coordinators, those that were killed included."""

    def __init__(self) -> None:
        self.cpu_s = 0.0
        self.most_bytes = 0
        self._began_s: dict[int, float] = {}

    def begin(self, pid: int) -> None:
        """Count from now on."""
        self._began_s[pid] = _cpu_s(pid)

    def end(self, pid: int) -> None:
        """Count until now."""
        self.cpu_s += _cpu_s(pid) - self._began_s.pop(pid)
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                self.most_bytes = max(self.most_bytes, int(line.split()[1]) * 1024)


def _cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def _sum(health: str, *names: str) -> float:
    """The sum of these metrics of a coordinator."""
    async with (
        aiohttp.ClientSession(connector=aiohttp.UnixConnector(health)) as session,
        session.get("http://coordinator/metrics") as answer,
    ):
        text = await answer.text()
    return sum(float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if line.startswith(names))


async def _messages(health: str) -> float:
    """What a coordinator has received and published since its start."""
    return await _sum(health, "caesura_bus_received_total", "caesura_bus_published_total")


async def _quiet(health: str) -> None:
    """Wait until a coordinator has taken in everything that was said so far."""
    seen, quiet = -1.0, 0
    async with asyncio.timeout(_READY_S):
        while quiet < _QUIET:
            await asyncio.sleep(0.5)
            now = await _messages(health)
            idle = now - seen < _FEW and not await _sum(health, "caesura_bus_backlog_messages")
            seen, quiet = now, quiet + 1 if idle else 0


async def measure(
    vms: int, sets: int, domains: int, hosts: int, *, connections: int, kills: bool, limit_s: float
) -> dict[str, Any]:
    """One rollout over everything; the figures.

    Raises:
        SystemExit: it did not complete, or not within ``limit_s`` seconds; the text says how far it came.
    """
    try:
        async with asyncio.timeout(limit_s) as limit:
            return await _measure(vms, sets, domains, hosts, connections=connections, kills=kills)
    except TimeoutError:
        if not limit.expired():
            raise
        raise SystemExit(f"fleet: not over after {limit_s:g} s (--limit); how far it came is above") from None


async def _measure(
    vms: int, sets: int, domains: int, hosts: int, *, connections: int, kills: bool
) -> dict[str, Any]:
    progress = Progress()
    with tempfile.TemporaryDirectory(prefix="caesura-bench-") as folder:
        async with (
            mosquitto(Path(folder)) as broker,
            PostgresServer() as server,
            Sandbox(broker) as sandbox,
        ):
            names = _NAMES if kills else _NAMES[:1]
            for name in names:
                sandbox.coordinator(name, **({"store": server.url} if kills else {}))
                _, environment = sandbox.environments[name]
                path = f"{Path(__file__).parent}:{os.environ.get('PYTHONPATH', '')}".rstrip(":")
                environment |= {"BENCH_STEPS": f"{folder}/steps", "PYTHONPATH": path}
                sandbox.environments[name] = ("timed_coordinator", environment)
            world = World(broker.url, vms, sets, domains, hosts, connections, progress)
            async with world.running():
                return await _roll(world, sandbox, Path(folder), kills=kills)


async def _roll(world: World, sandbox: Sandbox, folder: Path, *, kills: bool) -> dict[str, Any]:
    began = time.perf_counter()
    await sandbox.start("one")
    await world.obeys()
    start_s = time.perf_counter() - began
    world.progress.say(f"all hosts obey the coordinator, {start_s:.1f} s after its start")
    if kills:
        await sandbox.start("two")
        async with asyncio.timeout(_READY_S):
            await world.standby.wait()
    used, took_over_s = Used(), []
    await _quiet(f"{sandbox.folder}/one.health")
    for process in sandbox.running.values():
        used.begin(process.pid)
    steps = folder / "steps"
    steps.unlink(missing_ok=True)
    before = await _messages(f"{sandbox.folder}/one.health")
    world.progress.say("the coordinator has taken in everything: the rollout is requested")
    began = time.perf_counter()
    policy = m.Policy(notice_s=900.0, verify_timeout_s=600.0)
    await world.post.send(m.RolloutRequested(request="q", update="bench", policy=policy), client="bench")
    killer = asyncio.create_task(_kill(world, sandbox, used, took_over_s)) if kills else None
    try:
        await world.over.wait()
        took_s = time.perf_counter() - began
        if world.halted:
            raise SystemExit(f"fleet: the rollout did not complete: {world.halted}")
        messages = await _messages(f"{sandbox.folder}/{world.leader}.health")
        for process in sandbox.running.values():
            if process.returncode is None:
                used.end(process.pid)
    finally:
        if killer is not None:
            killer.cancel()
            await asyncio.gather(killer, return_exceptions=True)
    held = [json.loads(line) for line in steps.read_text().splitlines()] if steps.exists() else []
    longest = max(held, key=lambda step: step["cpu_ms"], default={"cpu_ms": 0.0, "wall_ms": 0.0, "what": ""})
    accepted = world.acceptances_s
    if len(accepted) < world.host_count:
        raise SystemExit(f"fleet: only {len(accepted)} of {world.host_count} hosts were seen to accept")
    found: dict[str, Any] = {
        "vms": sum(len(host.records) for carrier in world.carriers for host in carrier.hosts.values()),
        "hosts": world.host_count,
        "connections": len(world.carriers),
        "waves": len(world.completed),
        "start_s": round(start_s, 2),
        "rollout_s": round(took_s, 2),
        "cpu_s": round(used.cpu_s, 2),
        "memory_mb": round(used.most_bytes / _MB, 1),
        "accepted_median_s": round(percentile(accepted, 0.5), 4),
        "accepted_p99_s": round(percentile(accepted, 0.99), 4),
        "accepted_most_s": round(max(accepted), 4),
        "longest_step_cpu_ms": longest["cpu_ms"],
        "longest_step": longest["what"],
        "steps_over_50_ms": sum(step["cpu_ms"] > 50 for step in held),
    }
    if kills:
        found |= {"kills": len(took_over_s), "took_over_s": [round(each, 3) for each in took_over_s]}
    else:
        found["messages_per_s"] = round((messages - before) / took_s, 1)
    return found


async def _kill(world: World, sandbox: Sandbox, used: Used, took_over_s: list[float]) -> None:
    """Kill the leader whenever it is due, and start it again."""
    while True:
        wave = await world.to_kill.get()
        killed, epoch = world.leader, world.epoch
        world.standby.clear()
        process = sandbox.running[killed]
        used.end(process.pid)
        began = time.perf_counter()
        process.kill()
        await process.wait()
        while world.epoch == epoch:  # noqa: ASYNC110 - its claim
            await asyncio.sleep(0.01)
        took_over_s.append(time.perf_counter() - began)
        world.progress.say(f"killed {killed} in wave {wave + 1}: the next led after {took_over_s[-1]:.2f} s")
        await sandbox.start(killed)
        used.begin(sandbox.running[killed].pid)
        async with asyncio.timeout(_READY_S):
            await world.standby.wait()
