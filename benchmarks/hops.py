"""One real guest that hops from QEMU process to QEMU process in every way there is, watched from outside.

The product's own ways (swap, replace) go through its driver, as the host updater uses it. The others are what one
has without it, done as well as QEMU can: unlimited bandwidth, the new process started beforehand.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import msgspec

from caesura_host_updater.drivers.clock_setting import set_clock
from caesura_host_updater.drivers.guest_agent import guest_agent
from caesura_host_updater.drivers.port import ClockSet
from caesura_host_updater.drivers.qemu.async_qmp import AsyncQmp, QmpEvent, QmpUnreachable
from caesura_host_updater.drivers.qemu.definition import Adopt, QemuOptions, QemuVm
from caesura_host_updater.drivers.qemu.driver import QemuDriver
from caesura_host_updater.drivers.qemu.handover import set_capabilities
from caesura_testing.guests import Definition, Heartbeat, Image, command_line, connect, image
from caesura_vmcontrol.procfs import DEAD, thread_states

MIB = 1 << 20
_UNLIMITED = 10 << 30  # bytes a second; QEMU's own default would slow pre-copy and saving down
_CONNECT_S = 20.0
_MIGRATE_S = 300.0
_VERIFY_S = 600.0
_CLOCK_S = 60.0  # s: a guest on a busy machine may take its time; how long it took is in the figures
_SETTLE_S = 0.3  # s: beats before and after a hop, so that the silence around it is seen whole


class Hop(msgspec.Struct, frozen=True, kw_only=True):
    """What one hop cost. Seconds; ``extra_ram_bytes``: guest RAM that was needed a second time."""

    scenario: str
    ram_mib: int
    pause_s: float
    gap_s: float
    total_s: float
    extra_ram_bytes: int = 0
    moved_bytes: int = 0
    memory_ok: bool = True
    monotonic_ok: bool = True
    clock: ClockSet | None = None
    clock_took_s: float | None = None
    """From the resume to the clock that was set and measured again."""


class Bench:
    """The guest, wherever it runs. Everything of it lies below one folder and one file in /dev/shm."""

    def __init__(self, definition: Definition, folder: Path, files: Image) -> None:
        self.definition = definition
        self.folder = folder
        self.files = files
        self.state = folder / "state"
        self.vm = folder / "vm"
        self.ram_folder = Path(tempfile.mkdtemp(prefix="caesura-bench-", dir="/dev/shm"))
        self.ram_file = self.ram_folder / "0"
        self.argv: list[str] = []
        self.pid = 0
        self.heartbeat = Heartbeat()
        self._count = 0
        self._children: dict[int, asyncio.subprocess.Process] = {}

    # -- life -------------------------------------------------------------------------------------------

    async def boot(self) -> None:
        """Start the guest and wait for its heartbeat and its pattern."""
        self.vm.mkdir(parents=True, exist_ok=True)
        self.ram_file.touch(mode=0o600)
        self.argv = command_line(self.definition, self.vm, self.ram_file, self.files)
        self.pid = (await self._spawn(self.argv)).pid
        await self.heartbeat.connect(self.vm / "heartbeat")
        await self.heartbeat.next(120.0, after=0.0)
        if "memory" in self.definition.run:
            await self.verify()
        await set_clock(
            "vm", partial(guest_agent, "vm", str(self.vm / "ga"))
        )  # a guest boots up to a second late: its RTC has whole seconds

    async def _spawn(self, argv: list[str]) -> asyncio.subprocess.Process:
        with (self.folder / "qemu.log").open("ab") as log:
            process = await asyncio.create_subprocess_exec(
                *argv, stdin=asyncio.subprocess.DEVNULL, stdout=log, stderr=log
            )
        self._children[process.pid] = process
        return process

    async def close(self) -> None:
        """Kill it and remove what it leaves."""
        await self.heartbeat.close()
        self._kill(self.pid)
        while _runs(self.pid):  # noqa: ASYNC110
            await asyncio.sleep(0.01)  # a process that the driver started is nobody's child here
        for process in self._children.values():
            with suppress(ProcessLookupError):
                process.kill()
            await process.wait()
        shutil.rmtree(self.ram_folder, ignore_errors=True)

    def _kill(self, pid: int) -> None:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)

    # -- what is looked at ------------------------------------------------------------------------------

    async def ask(self, workload: str, request: str) -> dict[str, Any]:
        """A workload's answer."""
        async with asyncio.timeout(_VERIFY_S):
            reader, writer = await connect(self.vm / workload, _CONNECT_S)
            try:
                writer.write(f"{request}\n".encode())
                answer: dict[str, Any] = msgspec.json.decode(await reader.readline())
                return answer
            finally:
                writer.close()

    async def verify(self) -> bool:
        """Every byte of the pattern, by the guest."""
        return bool((await self.ask("memory", "verify"))["ok"])

    async def idle_gap(self, seconds: float) -> float:
        """The longest silence when nothing is done."""
        since = time.monotonic()
        await asyncio.sleep(seconds)
        return self.heartbeat.longest_gap_s(since)

    def adopting(self) -> QemuDriver:
        """A driver as the host updater has it, which adopts the guest as it runs now."""
        sockets = Adopt(
            qmp=str(self.vm / "qmp"), guard_qmp=str(self.vm / "guard"), guest_agent=str(self.vm / "ga")
        )
        return QemuDriver(
            "bench",
            (QemuVm(name="vm", adopt=sockets),),
            QemuOptions(run_dir=str(self.folder / "run")),
            self.state,
            accel=self.definition.accel,
            environ=os.environ,
            max_digest_bytes=0,
        )

    async def hop(self, scenario: str, *, verify: bool = True, clock: bool = True) -> Hop:
        """One hop, and everything that is looked at around it."""
        await asyncio.sleep(_SETTLE_S)
        began = time.monotonic()
        faults = len(self.heartbeat.faults())
        done = await SCENARIOS[scenario](self)
        resumed_at = began if not done.get("resumed_at") else done.pop("resumed_at")
        changes: dict[str, Any] = {}
        if clock:
            changes["clock"] = await set_clock(
                "vm", partial(guest_agent, "vm", str(self.vm / "ga")), timeout_s=_CLOCK_S
            )
            changes["clock_took_s"] = time.monotonic() - resumed_at
        await self.heartbeat.next(60.0, after=time.monotonic() + _SETTLE_S)
        changes["gap_s"] = self.heartbeat.longest_gap_s(began)
        if verify:
            changes["memory_ok"] = await self.verify()
        changes["monotonic_ok"] = len(self.heartbeat.faults()) == faults
        return Hop(scenario=scenario, ram_mib=self.definition.memory_mib, **done, **changes)

    # -- a second process, by hand ----------------------------------------------------------------------

    @contextmanager
    def _next(self, *, own_ram: bool) -> Iterator[tuple[list[str], Path, Path]]:
        """The command line of a second process that listens in ``vm/next``, with RAM of its own if wanted."""
        self._count += 1
        ram = self.ram_folder / str(self._count) if own_ram else self.ram_file
        if own_ram:
            ram.touch(mode=0o600)
        folder = self.vm / "next"
        folder.mkdir(exist_ok=True)
        plain = command_line(self.definition, folder, ram, self.files)
        yield [*plain, "-incoming", "defer", "-S"], folder, ram

    async def _move_in(self, process: asyncio.subprocess.Process, folder: Path, ram: Path) -> None:
        """The old process is gone: the new one's sockets get the settled names, and the old RAM goes."""
        for path in folder.iterdir():
            path.replace(self.vm / path.name)
        self.pid = process.pid
        if ram != self.ram_file:
            self.ram_file.unlink()
            self.ram_file = ram


def _runs(pid: int) -> bool:
    """Whether a thread of it is alive; the last one to go lets go of the disk's lock."""
    return any(state not in DEAD for state in thread_states(pid))


async def _stop_cont(bench: Bench) -> dict[str, Any]:
    qmp = await AsyncQmp.connect(str(bench.vm / "qmp"), _CONNECT_S)
    try:
        with qmp.watch() as told:
            began = time.monotonic()
            await qmp.execute("stop")
            await qmp.execute("cont")
            stopped, resumed = await told.first(_named("STOP")), await told.first(_named("RESUME"))
        return {
            "pause_s": resumed.at - stopped.at,
            "total_s": resumed.at - began,
            "resumed_at": resumed.at,
        }
    finally:
        await qmp.close()


async def _not_compared(*_: object) -> str:
    return "the benchmark measures what comparing costs"


async def _swap_uncompared(bench: Bench) -> dict[str, Any]:
    """The same swap without a look at the guest's memory: what the sampled pages add to the pause."""
    return await _swap(bench, compare=False)


async def _swap(bench: Bench, *, compare: bool = True) -> dict[str, Any]:
    driver = bench.adopting()
    if not compare:
        driver._migrator._views = _not_compared  # type: ignore[method-assign,assignment]  # noqa: SLF001
    await driver.open()
    try:
        await driver.prepare("vm", f"swap-{time.monotonic_ns()}", "swap", "")
        await bench.heartbeat.connect(bench.vm / "next" / "heartbeat")
        began = time.monotonic()
        done = await driver.hand_over("vm", began + 10)
        if (done.sampled is True) is not compare:
            raise RuntimeError(f"the swap's memory was not looked at as wanted: {done.sampled_note}")
        return {
            "pause_s": done.resumed_at - done.frozen_at,
            "total_s": done.resumed_at - began,
            "resumed_at": done.resumed_at,
        }
    finally:
        await _let_go(bench, driver)


async def _replace(bench: Bench) -> dict[str, Any]:
    driver = bench.adopting()
    await driver.open()
    tasks: list[asyncio.Task[Any]] = []
    try:
        await driver.prepare("vm", f"replace-{time.monotonic_ns()}", "replace", "")
        old = driver._guests["vm"].qmp  # noqa: SLF001 - its events, as for the other ways
        if old is None:
            raise RuntimeError("the driver is not connected")
        began = time.monotonic()
        with old.watch() as told:
            await driver.checkpoint("vm", began + 10, gone=False)
            stopped = await told.first(_named("STOP"))
        tasks.append(asyncio.create_task(bench.heartbeat.connect(bench.vm / "next" / "heartbeat")))
        tasks.append(asyncio.create_task(_resumed(bench.vm / "next" / "qmp")))
        if await driver.resume("vm", 10.0) != "running":
            raise RuntimeError("the guest is gone")
        total_s = time.monotonic() - began
        _, resumed_at = await asyncio.gather(*tasks)
        return {"pause_s": resumed_at - stopped.at, "total_s": total_s, "resumed_at": resumed_at}
    finally:
        for task in tasks:
            task.cancel()
        await _let_go(bench, driver)


async def _resumed(path: Path) -> float:
    """When the QEMU that will listen there lets its guest run; its connection is free again then."""
    qmp = await _connect_soon(path)
    try:
        with qmp.watch() as told:
            if await qmp.status() == "running":
                raise RuntimeError("it ran before it could be watched")
            return (await told.first(_named("RESUME"))).at
    finally:
        await qmp.close()


async def _let_go(bench: Bench, driver: QemuDriver) -> None:
    await driver.release("vm")
    words = driver.process_of("vm")
    if "pid " in words:
        bench.pid = int(words.rsplit("pid ", 1)[1].rstrip(")"))
    await driver.close(stop_vms=False)


def _precopy(downtime_limit_ms: int | None) -> Callable[[Bench], Awaitable[dict[str, Any]]]:
    async def hop(bench: Bench) -> dict[str, Any]:
        with bench._next(own_ram=True) as (argv, folder, ram):  # noqa: SLF001 - one module
            process = await bench._spawn(argv)  # noqa: SLF001
            new = await _connect_soon(folder / "qmp")
            old = await AsyncQmp.connect(str(bench.vm / "qmp"), _CONNECT_S)
            await bench.heartbeat.connect(folder / "heartbeat")
            try:
                for qmp in (old, new):
                    await set_capabilities(qmp, {"events": True, "return-path": True})
                await old.execute("migrate-set-parameters", **_parameters(downtime_limit_ms))
                uri = f"unix:{folder}/mig"
                await new.execute("migrate-incoming", uri=uri)
                with old.watch() as told_by_old, new.watch() as told_by_new:
                    began = time.monotonic()
                    await old.execute("migrate", uri=uri)
                    await _completed(told_by_old)
                    await _completed(told_by_new)
                    os.kill(bench.pid, signal.SIGKILL)
                    await new.execute("cont")
                    resumed = await told_by_new.first(_named("RESUME"))
                    stopped = await told_by_old.first(_named("STOP"))
            finally:
                await old.close()
                await new.close()
            size = bench.definition.memory_mib * MIB
            await bench._move_in(process, folder, ram)  # noqa: SLF001
            return {
                "pause_s": resumed.at - stopped.at,
                "total_s": resumed.at - began,
                "resumed_at": resumed.at,
                "extra_ram_bytes": size,
            }

    return hop


async def _save_restore(bench: Bench) -> dict[str, Any]:
    """What a managed save does: stop, all RAM to disk, the process ends; later a new one reads it all."""
    saved = bench.folder / "saved"
    old = await AsyncQmp.connect(str(bench.vm / "qmp"), _CONNECT_S)
    try:
        await set_capabilities(old, {"events": True})
        await old.execute("migrate-set-parameters", **_parameters(None))
        with saved.open("wb") as file:
            await old.pass_file(file.fileno(), "saved")
        with old.watch() as told:
            began = time.monotonic()
            await old.execute("stop")
            await old.execute("migrate", uri="fd:saved")
            await _completed(told)
            stopped = await told.first(_named("STOP"))
    finally:
        await old.close()
    os.kill(bench.pid, signal.SIGKILL)
    size = saved.stat().st_size
    with bench._next(own_ram=True) as (argv, folder, ram):  # noqa: SLF001
        process = await bench._spawn(argv)  # noqa: SLF001
        new = await _connect_soon(folder / "qmp")
        try:
            await bench.heartbeat.connect(folder / "heartbeat")
            await set_capabilities(new, {"events": True})
            with saved.open("rb") as file:
                await new.pass_file(file.fileno(), "saved")
            with new.watch() as told:
                await new.execute("migrate-incoming", uri="fd:saved")
                await _completed(told)
                await new.execute("cont")
                resumed = await told.first(_named("RESUME"))
        finally:
            await new.close()
            saved.unlink()
        await bench._move_in(process, folder, ram)  # noqa: SLF001
    return {
        "pause_s": resumed.at - stopped.at,
        "total_s": resumed.at - began,
        "resumed_at": resumed.at,
        "moved_bytes": size,
    }


def _parameters(downtime_limit_ms: int | None) -> dict[str, Any]:
    # 300 ms is QEMU's default (qapi/migration.json, downtime-limit); set, for it lasts from one hop to the next.
    return {"max-bandwidth": _UNLIMITED, "downtime-limit": downtime_limit_ms or 300}


async def _completed(told: Any) -> None:
    async with asyncio.timeout(_MIGRATE_S):
        verdict = await told.first(
            lambda event: event.name == "MIGRATION" and event.data["status"] in ("completed", "failed")
        )
    if verdict.data["status"] != "completed":
        raise RuntimeError(f"QEMU says that the migration {verdict.data['status']}")


async def _connect_soon(path: Path) -> AsyncQmp:
    end = time.monotonic() + _CONNECT_S
    while True:
        try:
            return await AsyncQmp.connect(str(path), _CONNECT_S)
        except QmpUnreachable:  # not made yet, or made and nobody listens yet: QEMU calls nobody
            if time.monotonic() > end:
                raise
        await asyncio.sleep(0.002)


def _named(name: str) -> Callable[[QmpEvent], bool]:
    return lambda event: event.name == name


SCENARIOS: dict[str, Callable[[Bench], Awaitable[dict[str, Any]]]] = {
    "stop + cont": _stop_cont,
    "swap": _swap,
    "swap, not compared": _swap_uncompared,
    "replace": _replace,
    "pre-copy, default": _precopy(None),
    "pre-copy, limit 20 ms": _precopy(20),
    "save + restore": _save_restore,
}


async def make(
    ram_mib: int,
    folder: Path,
    *,
    binary: str,
    run: tuple[str, ...] = ("heartbeat", "memory"),
    **parameters: str,
) -> Bench:
    """A guest that is up, 85 % of its RAM filled with a pattern, a beat every 5 ms."""
    files = await asyncio.to_thread(image)
    definition = Definition(
        memory_mib=ram_mib,
        binary=binary,
        run=run,
        parameters={"memory": "85", "heartbeat_ms": "5", **parameters},
    )
    bench = Bench(definition, folder, files)
    try:
        await bench.boot()
    except BaseException:
        await bench.close()
        raise
    return bench
