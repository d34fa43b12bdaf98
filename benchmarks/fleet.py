"""What a rollout over a large fleet costs its coordinator: ``python benchmarks/fleet.py``. See --help.

The real coordinator, with its store on a disk, leads scripted hosts and agents over the bus in memory: every host is a client
of its own that acknowledges the epoch, pauses its VMs at once and reports; agents answer each event, workloads approve it. No
VM and no broker is there, so what is measured is what the suite's own decisions and messages cost. All of it is one process on one
event loop; the coordinator's part is told apart by its tasks.
"""

from __future__ import annotations

import argparse
import asyncio
import contextvars
import cProfile
import gc
import json
import logging
import pstats
import sys
import tempfile
import time
from collections.abc import Coroutine, Generator, Iterable
from pathlib import Path
from statistics import median
from typing import Any

import structlog
from scripted_hosts import Host, Workloads, filters_of, record_of
from storms import Storms

from caesura.bus.memory import MemoryBroker, MemoryBus
from caesura.bus.messaging import MessageClient
from caesura.contract import messages as m
from caesura.contract.codec import Received
from caesura.contract.topics import channel_of
from caesura_coordinator.service import Coordinator, subscriptions
from caesura_coordinator.shared_store import SharedStore, working_copy
from caesura_coordinator.store import MIGRATIONS, CoordinatorStore
from caesura_testing.postgresql import PostgresServer

_PER_HOST = 10
_RATIO_MOST = 1.5
_VERDICT_MOST_MS = 100.0
_STORES_MOST = 2.0
_STEP_MOST_MS = 50.0
_PATIENCE_S = 900.0
_of_coordinator: contextvars.ContextVar[Steps | None] = contextvars.ContextVar("steps", default=None)


class Steps:
    """How long the tasks of one service hold the event loop."""

    def __init__(self) -> None:
        self.total_s = 0.0
        self.longest_s = 0.0
        self.longest_cpu_s = 0.0

    def took(self, seconds: float, cpu_s: float) -> None:
        """One step of a task, from one await that waits to the next: how long it was, and its processor time."""
        self.total_s += cpu_s
        self.longest_s = max(self.longest_s, seconds)
        self.longest_cpu_s = max(self.longest_cpu_s, cpu_s)


class Timed:
    """A coroutine whose steps are timed."""

    def __init__(self, inner: Coroutine[Any, Any, Any], steps: Steps) -> None:
        self._inner = inner
        self._steps = steps

    def __await__(self) -> Generator[Any, Any, Any]:
        send, value = self._inner.send, None
        while True:
            began, began_cpu = time.perf_counter(), time.thread_time()
            try:
                waited = send(value)
            except StopIteration as end:
                return end.value
            finally:
                self._steps.took(time.perf_counter() - began, time.thread_time() - began_cpu)
            try:
                value = yield waited
                send = self._inner.send
            except BaseException as error:  # noqa: BLE001 - it is the inner one's to handle
                send, value = self._inner.throw, error


def timed_tasks(
    loop: asyncio.AbstractEventLoop, coro: Coroutine[Any, Any, Any], **options: Any
) -> asyncio.Task[Any]:
    """A task factory: tasks that the coordinator starts, and those that they start, are timed."""
    steps = _of_coordinator.get()
    if steps is None:
        return asyncio.Task(coro, loop=loop, **options)

    async def run() -> Any:
        return await Timed(coro, steps)

    return asyncio.Task(run(), loop=loop, **options)


class World:
    """The fleet on one broker, and one rollout over all of it."""

    def __init__(
        self,
        vms: int,
        sets: int,
        domains: int,
        hosts: int,
        folder: Path,
        *,
        patient: bool,
        store_url: str = "",
    ) -> None:
        layout = Storms(vms, sets, domains, hosts)
        self.vms = vms
        self.folder = folder
        self.store_url = store_url
        """Of a PostgreSQL; empty: SQLite in the folder."""
        self.broker = MemoryBroker()
        self.patient = patient
        """Whether the last host of a wave reports only when the coordinator has taken in all that the others said."""
        self.steps = Steps()
        self.verdicts_s: list[float] = []
        self.waves_seen = 0
        self.halted = ""
        self._hosts_of_wave: dict[int, int] = {}
        self._to_report: dict[int, int] = {}
        self._waiting: dict[int, int] = {}
        self._last_report: dict[int, float] = {}
        self.over = asyncio.Event()
        self.planned = asyncio.Event()
        of_host: dict[str, list[m.VmRecord]] = {}
        for vm, group, domain, host in layout.vms:
            record = record_of(vm, group, domain)
            of_host.setdefault(host, []).append(record)
            self._hosts_of_wave.setdefault(domain, 0)
        for host in of_host:
            self._hosts_of_wave[int(host.split("-")[1])] += 1
        self._to_report = dict(self._hosts_of_wave)
        self._waiting = dict(self._hosts_of_wave)
        self.hosts = [self._host(name, tuple(records)) for name, records in of_host.items()]
        kinds = (m.SetDocument, m.WaveChanged, m.RequestAnswered, m.PlanPart)
        self.bus = MemoryBus(
            self.broker, client_id="guests", filters=[channel_of(each).filter() for each in kinds]
        )
        self.post = MessageClient(self.bus, "/caesura/bench/guests")
        self.post.subscribe(m.SetDocument, Workloads(self.post, lambda _: "bench").on_document)
        self.post.subscribe(m.WaveChanged, self._wave)
        self.post.subscribe(m.RequestAnswered, self._answer)
        self.coordinator: Coordinator | None = None
        self.messages = 0

    def _host(self, name: str, records: tuple[m.VmRecord, ...]) -> Host:
        """A client of its own."""
        host = Host(MemoryBus(self.broker, client_id=name, filters=filters_of(name)), name, records, self)
        host.post.subscribe(m.CoordinatorPresence, host.on_epoch)
        host.post.subscribe(m.StartOperation, host.on_start)
        return host

    # -- what guests and workloads do --

    async def _wave(self, changed: m.WaveChanged, _: Received) -> None:
        if changed.status == "soaking":
            self.verdicts_s.append(time.perf_counter() - self._last_report[changed.wave])
        elif changed.status in {"failed", "cancelled"}:
            self.halted = changed.reason
            self.over.set()
        elif changed.status == "completed":
            self.waves_seen += 1
            if self.waves_seen == len(self._hosts_of_wave):
                self.over.set()

    async def _answer(self, answer: m.RequestAnswered, _: Received) -> None:
        if not answer.accepted:
            self.halted = answer.reason
            self.over.set()
        self.planned.set()

    # -- the end of a wave --

    async def before_last_report(self, command: m.StartOperation) -> None:
        """The last host of a wave waits until the others' words are taken in, if that is to be measured."""
        self._waiting[command.wave] -= 1
        if self._waiting[command.wave] or not self.patient or self.coordinator is None:
            return
        quiet = 0
        while quiet < 3:
            await asyncio.sleep(0.05)
            idle = not self.coordinator.bus.stats.backlog and not self.coordinator.waiting()
            quiet = quiet + 1 if idle else 0

    def last_report(self, command: m.StartOperation) -> None:
        """A host has said how its operation ended."""
        self._to_report[command.wave] -= 1
        if not self._to_report[command.wave]:
            self._last_report[command.wave] = time.perf_counter()

    # -- the run --

    async def run(self, profile: cProfile.Profile | None) -> dict[str, float]:
        """One rollout over everything; the figures."""
        tasks = [asyncio.ensure_future(self.bus.run(self.post.deliver))]
        tasks += [asyncio.ensure_future(host.bus.run(host.post.deliver)) for host in self.hosts]
        await asyncio.gather(*(host.bus.wait_connected(60) for host in self.hosts))
        await self.bus.wait_connected(60)
        for host in self.hosts:
            await host.report_in()
            for each in host.records:
                await self.post.send(m.AgentPresence(vm=each.vm, online=True, boot_id="b"), vm=each.vm)
        store, shared = self._store()
        bus = MemoryBus(self.broker, client_id="c", filters=subscriptions(), clean=False)
        loop = asyncio.get_running_loop()
        loop.set_task_factory(timed_tasks)
        token = _of_coordinator.set(self.steps)
        made = self.coordinator = Coordinator(bus, store, instance="c", settle_s=0.2, shared=shared)
        tasks += [asyncio.ensure_future(start()) for start in made.tasks().values()]
        _of_coordinator.reset(token)
        began_s = time.process_time()
        try:
            await self._until_acknowledged(made)
            start_s = time.process_time() - began_s
            self.steps.total_s = self.steps.longest_s = self.steps.longest_cpu_s = 0.0
            received = made.bus.stats.received
            gc.collect()
            began_s, began = time.process_time(), time.perf_counter()
            if profile is not None:
                profile.enable()
            request = m.RolloutRequested(
                request="q", update="bench", policy=m.Policy(notice_s=900.0, verify_timeout_s=600.0)
            )
            await self.post.send(request, client="bench")
            await self.planned.wait()
            plan_s = time.perf_counter() - began
            async with asyncio.timeout(_PATIENCE_S):
                await self.over.wait()
            if profile is not None:
                profile.disable()
            cpu_s, wall_s = time.process_time() - began_s, time.perf_counter() - began
            if self.halted:
                raise SystemExit(f"fleet: the rollout did not complete: {self.halted}")
            received = made.bus.stats.received - received
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            store.database.close()
        return {
            "vms": self.vms,
            "hosts": len(self.hosts),
            "waves": len(self._hosts_of_wave),
            "start_s": start_s,
            "plan_s": plan_s,
            "rollout_s": wall_s,
            "cpu_s": cpu_s,
            "cpu_per_vm_ms": cpu_s / self.vms * 1000,
            "coordinator_per_vm_ms": self.steps.total_s / self.vms * 1000,
            "coordinator_messages": received,
            "longest_step_ms": self.steps.longest_s * 1000,
            "longest_step_cpu_ms": self.steps.longest_cpu_s * 1000,
            "verdict_ms": max(self.verdicts_s) * 1000,
        }

    def _store(self) -> tuple[CoordinatorStore, SharedStore | None]:
        if not self.store_url:
            return CoordinatorStore(str(self.folder / "coordinator.sqlite")), None
        from caesura.runtime.postgresql import PostgresRows  # noqa: PLC0415 - an extra
        from caesura.runtime.postgresql_options import PostgresOptions  # noqa: PLC0415 - an extra

        store, copy = working_copy()
        options = PostgresOptions(url=self.store_url, fleet="default", name="c", lease_s=60.0)
        rows = lambda: PostgresRows(options, copy.columns, len(MIGRATIONS))  # noqa: E731
        return store, SharedStore(store, copy, rows, name="c", lease_s=60.0)

    async def _until_acknowledged(self, made: Coordinator) -> None:
        async with asyncio.timeout(_PATIENCE_S):
            while not made.is_leader or made.bus.stats.backlog or made.waiting():  # noqa: ASYNC110
                await asyncio.sleep(0.05)
            while any(host.epoch != made.authority.epoch for host in self.hosts):  # noqa: ASYNC110
                await asyncio.sleep(0.05)
            while made.bus.stats.backlog or made.waiting():  # noqa: ASYNC110
                await asyncio.sleep(0.05)


def measure(
    vms: int,
    sets: int,
    domains: int,
    hosts: int,
    *,
    patient: bool,
    profile: bool = False,
    postgresql: bool = False,
) -> dict[str, float]:
    """One fleet and one rollout, in a store of its own."""
    recorded = cProfile.Profile() if profile else None
    with tempfile.TemporaryDirectory(prefix="caesura-bench-") as folder:

        async def run() -> dict[str, float]:
            if postgresql:
                async with PostgresServer() as server:
                    world = World(
                        vms, sets, domains, hosts, Path(folder), patient=patient, store_url=server.url
                    )
                    return await world.run(recorded)
            world = World(vms, sets, domains, hosts, Path(folder), patient=patient)
            return await world.run(recorded)

        figures = asyncio.run(run())
    if recorded is not None:
        pstats.Stats(recorded, stream=sys.stderr).sort_stats("tottime").print_stats(45)
    gc.collect()
    return {name: round(value, 4) for name, value in figures.items()}


def compare_stores(wave: int, per_set: int, rounds: int) -> dict[str, Any]:
    """One wave of so many VMs, its coordinator's store in SQLite and in PostgreSQL by turns; the medians."""
    found: dict[str, list[dict[str, float]]] = {"sqlite": [], "postgresql": []}
    hosts = -(-wave // _PER_HOST)
    for _ in range(rounds):
        for name, runs in found.items():
            runs.append(
                measure(
                    wave, max(1, wave // per_set), 1, hosts, patient=False, postgresql=name == "postgresql"
                )
            )
    told: dict[str, Any] = {
        name: {figure: median(run[figure] for run in runs) for figure in runs[0]}
        for name, runs in found.items()
    }
    one, two = told["postgresql"], told["sqlite"]
    told["rollout_ratio"] = round(one["rollout_s"] / two["rollout_s"], 3)
    told["cpu_ratio"] = round(one["cpu_s"] / two["cpu_s"], 3)
    told["longest_step_cpu_ms"] = one["longest_step_cpu_ms"]
    return told


def _arguments(words: Iterable[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="""targets:
  processor time of a VM of a rollout at most 1.5 times that of the smallest fleet; at most 100 ms from the last report of a
  wave of 1,000 VMs, everything before it taken in, to its verdict on the bus; --stores: a wave takes at most twice as long with PostgreSQL, and the
  coordinator holds its event loop for at most 50 ms of processor time

examples:
  python benchmarks/fleet.py
  python benchmarks/fleet.py --vms 500 --vms 2000 --json
  python benchmarks/fleet.py --vms 2000 --no-verdict --profile
  python benchmarks/fleet.py --stores 5
  python benchmarks/fleet.py --mosquitto --vms 10000 --kill

exit codes: 0 all targets were met, 1 one was missed, 2 bad usage""",
    )
    parser.add_argument(
        "--vms",
        type=int,
        action="append",
        help="VMs of a fleet; several times for several (500, 2000, 10000)",
    )
    parser.add_argument("--domains", type=int, default=20, help="update domains, so waves (%(default)s)")
    parser.add_argument("--per-set", type=int, default=200, help="VMs of a set (%(default)s)")
    parser.add_argument(
        "--wave", type=int, default=1000, help="VMs of the waves whose verdict is timed (%(default)s)"
    )
    parser.add_argument(
        "--stores",
        type=int,
        metavar="ROUNDS",
        default=0,
        help="instead: one wave with the store in SQLite and in PostgreSQL by turns, so often each",
    )
    parser.add_argument(
        "--mosquitto",
        action="store_true",
        help="instead: one fleet over a real Mosquitto, its coordinator a process of its own, its store in SQLite",
    )
    parser.add_argument(
        "--kill",
        action="store_true",
        help="with --mosquitto: two coordinators on a PostgreSQL; the leader is killed in each tenth wave",
    )
    parser.add_argument(
        "--connections",
        type=int,
        default=200,
        help="with --mosquitto: connections that carry the hosts and agents (%(default)s)",
    )
    parser.add_argument(
        "--limit",
        type=float,
        metavar="SECONDS",
        default=3600.0,
        help="with --mosquitto: give up after so long (%(default)s)",
    )
    parser.add_argument("--no-verdict", action="store_true", help="do not time the verdict")
    parser.add_argument(
        "--profile", action="store_true", help="print where the time goes; times are larger then"
    )
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    return parser.parse_args(list(words) if words is not None else None)


def main() -> int:
    """Entry point."""
    options = _arguments()
    logging.disable(logging.WARNING)
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    if options.stores:
        return _stores(options)
    if options.mosquitto:
        return _on_mosquitto(options)
    fleets = []
    for vms in options.vms or [500, 2000, 10_000]:
        hosts = -(-vms // options.domains // _PER_HOST) * options.domains
        sets = max(1, vms // options.per_set)
        figures = measure(vms, sets, options.domains, hosts, patient=False, profile=options.profile)
        fleets.append(figures)
        if not options.json:
            _print(figures)
    told: dict[str, Any] = {"fleets": fleets}
    smallest, largest = fleets[0], fleets[-1]
    told["ratio"] = round(largest["cpu_per_vm_ms"] / smallest["cpu_per_vm_ms"], 3)
    missed = told["ratio"] > _RATIO_MOST
    if not options.no_verdict:
        waves = 4
        vms = options.wave * waves
        hosts = -(-options.wave // _PER_HOST) * waves
        verdict = measure(vms, max(1, vms // options.per_set), waves, hosts, patient=True)
        told["verdict"] = verdict
        missed = missed or verdict["verdict_ms"] > _VERDICT_MOST_MS
    if options.json:
        print(json.dumps(told, indent=2))
    else:
        print(
            f"\nprocessor time of a VM, {largest['vms']:,.0f} against {smallest['vms']:,.0f}: {told['ratio']:.2f} x (at most {_RATIO_MOST})"
        )
        if not options.no_verdict:
            print(
                f"last report of a wave of {options.wave} VMs to its verdict: {told['verdict']['verdict_ms']:.0f} ms at most, "
                f"of {told['verdict']['waves']:.0f} waves (at most {_VERDICT_MOST_MS:.0f} ms); "
                f"longest step of the coordinator there {told['verdict']['longest_step_ms']:.0f} ms"
            )
    return int(missed)


def _stores(options: argparse.Namespace) -> int:
    told = compare_stores(options.wave, options.per_set, options.stores)
    if options.json:
        print(json.dumps(told, indent=2))
    else:
        for name in ("sqlite", "postgresql"):
            each = told[name]
            print(
                f"{name:>10}: rollout {each['rollout_s']:.2f} s, processor time {each['cpu_s']:.2f} s, longest step {each['longest_step_ms']:.0f} ms "
                f"({each['longest_step_cpu_ms']:.0f} ms of processor time)"
            )
        print(
            f"a wave of {options.wave} VMs, PostgreSQL against SQLite: {told['rollout_ratio']:.2f} x as long (at most {_STORES_MOST}), "
            f"{told['cpu_ratio']:.2f} x the processor time; longest step {told['longest_step_cpu_ms']:.0f} ms of processor time (at most {_STEP_MOST_MS:.0f})"
        )
    return int(told["rollout_ratio"] > _STORES_MOST or told["longest_step_cpu_ms"] > _STEP_MOST_MS)


def _on_mosquitto(options: argparse.Namespace) -> int:
    from fleet_on_broker import measure as measure_on_broker  # noqa: PLC0415 - it needs aiohttp and PostgreSQL

    (vms,) = options.vms or [10_000]
    hosts = -(-vms // options.domains // _PER_HOST) * options.domains
    sets = max(1, vms // options.per_set)
    told = asyncio.run(
        measure_on_broker(
            vms,
            sets,
            options.domains,
            hosts,
            connections=options.connections,
            kills=options.kill,
            limit_s=options.limit,
        )
    )
    if options.json:
        print(json.dumps(told, indent=2))
    else:
        print(
            f"{told['vms']:,.0f} VMs on {told['hosts']:,.0f} hosts over {told['connections']} connections to a Mosquitto, {told['waves']} waves: "
            f"{told['rollout_s']:.0f} s, coordinators {told['cpu_s']:.1f} s of processor time and {told['memory_mb']:.0f} MB; "
            f"command to acceptance {told['accepted_median_s'] * 1000:.0f} ms (median), {told['accepted_p99_s'] * 1000:.0f} ms (99 %); "
            f"longest step {told['longest_step_cpu_ms']:.0f} ms of processor time (at most {_STEP_MOST_MS:.0f}): {told['longest_step']}"
        )
        if options.kill:
            print(f"{told['kills']} kills of the leader, the next one's claim after {told['took_over_s']} s")
        else:
            print(
                f"{told['messages_per_s']:,.0f} messages a second received and published by the coordinator"
            )
    return int(told["longest_step_cpu_ms"] > _STEP_MOST_MS)


def _print(figures: dict[str, float]) -> None:
    print(
        f"{figures['vms']:>6,.0f} VMs on {figures['hosts']:,.0f} hosts, {figures['waves']:.0f} waves: "
        f"{figures['cpu_s']:.1f} s of processor time, {figures['cpu_per_vm_ms']:.2f} ms a VM "
        f"({figures['coordinator_per_vm_ms']:.2f} ms in the coordinator), longest step {figures['longest_step_ms']:.0f} ms "
        f"({figures['longest_step_cpu_ms']:.0f} ms of processor time), "
        f"plan {figures['plan_s'] * 1000:.0f} ms, verdict {figures['verdict_ms']:.0f} ms in the storm, "
        f"{figures['coordinator_messages']:,.0f} messages, start {figures['start_s']:.1f} s",
        flush=True,
    )


if __name__ == "__main__":
    sys.exit(main())
