"""What every driver must do; run over the process driver with each of its freezers, over QEMU, and over the example of the docs.

The QEMU VMs have no guest system: the firmware runs, which is enough to stand still and to be handed over.
"""

from __future__ import annotations

import asyncio
import os
import re
import signal
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from caesura_host_updater.drivers.plugin import DriverSetup, check_plans, load_plugin
from caesura_host_updater.drivers.port import (
    ClockCapable,
    DigestCapable,
    Driver,
    DriverError,
    FreezeFailed,
    NotPossible,
    ReplaceCapable,
    SwapCapable,
)
from caesura_host_updater.drivers.process.definition import GuestProcess, ProcessVm
from caesura_host_updater.drivers.process.driver import ProcessDriver
from caesura_host_updater.drivers.process.freezers import FreezerUnusable, choose_freezer
from caesura_host_updater.drivers.qemu.definition import Definition, QemuOptions, QemuVm
from caesura_host_updater.drivers.qemu.driver import QemuDriver
from caesura_host_updater.drivers.sampling import sampled_offsets
from caesura_testing.example_driver import ExampleDriver, ExampleOptions, ExampleVm, Program
from caesura_testing.guests import qemu_installed
from caesura_testing.patience import patient
from caesura_testing.plugins import install_driver
from caesura_vmcontrol.plans import CgroupPlan, condition, mechanism_of, thaw
from caesura_vmcontrol.procfs import alive, read_process

# Leaves its process group and session, forks, and starts threads: all of it must stand still.
ESCAPING = """
import os, sys, threading, time
threading.Thread(target=time.sleep, args=(600,), daemon=True).start()
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        while True: time.sleep(0.005)
    os._exit(0)
while True: time.sleep(0.005)
"""


def specs() -> tuple[ProcessVm, ...]:
    """Three VMs, one of them awkward, one with memory."""
    busy = GuestProcess(argv=(sys.executable, "-S", "-c", "while True: pass"))
    awkward = GuestProcess(argv=(sys.executable, "-S", "-c", ESCAPING))
    return (
        ProcessVm(name="plain", process=(GuestProcess(argv=("sleep", "600")),), ram_bytes=3 * 2**20 + 5),
        ProcessVm(name="awkward", process=(awkward, GuestProcess(argv=("sleep", "601")))),
        ProcessVm(name="busy", process=(busy,)),
    )


def qemu_specs() -> tuple[QemuVm, ...]:
    """The same VMs as guests."""
    guest = Definition(memory_mib=16, machine="pc-q35-7.2")
    return tuple(QemuVm(name=spec.name, qemu=guest) for spec in specs())


class Lives:
    """Drivers on one state folder, as one host updater after the other would have."""

    def __init__(self, folder: Path, build: Callable[[], Any], *, exclusive: bool) -> None:
        self.folder = folder
        self._build = build
        self._exclusive = exclusive
        self._made: list[Any] = []

    async def next(self) -> Any:
        """The next life, open. A QMP socket serves one at a time, so with QEMU the one before is over."""
        driver = self._build()
        if self._exclusive:
            await self._end_all()
        self._made.append(driver)
        await driver.open()
        return driver

    async def _end_all(self) -> None:
        while self._made:
            await self._made.pop().close(stop_vms=False)

    async def end(self) -> None:
        """Stop everything."""
        last = await self.next()
        for vm in last.states():
            await last.resume(vm, 5)
        await last.close(stop_vms=True)
        self._made.remove(last)
        await self._end_all()


KINDS = ("cgroup2", "cgroup1", "sigstop", "qemu", "example")


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    """Every driver, the process driver once for each way of freezing; skipped where the machine lacks it."""
    return _usable(request.param)


@pytest.fixture(params=KINDS[:3])
def freezer(request: pytest.FixtureRequest) -> str:
    """The process driver's ways of freezing."""
    return _usable(request.param)


def _usable(kind: str) -> str:
    if kind == "qemu":
        if not qemu_installed():
            pytest.skip("no QEMU on this machine")
        return kind
    if kind == "example":
        return kind
    try:
        choose_freezer(kind, "caesura-test-probe")[0].remove("_probe")  # type: ignore[arg-type]
    except FreezerUnusable as error:
        pytest.skip(f"{kind} does not work here: {error}")
    return kind


def _process_driver(kind: Any, folder: Path) -> ProcessDriver:
    chosen, passed = choose_freezer(kind, f"caesura-driver-test-{os.getpid()}")
    assert passed == {}
    return ProcessDriver("host-1", specs(), folder, chosen, environ=os.environ, max_digest_bytes=8 * 2**20)


def _qemu_driver(folder: Path) -> QemuDriver:
    return QemuDriver(
        "host-1",
        qemu_specs(),
        QemuOptions(run_dir=str(folder / "run"), powerdown_s=0),
        folder,
        accel="tcg,thread=multi",
        environ=os.environ,
        max_digest_bytes=16 * 2**20,
    )


def _example_driver(folder: Path) -> ExampleDriver:
    programs = {spec.name: Program(argv=("sleep", "600")) for spec in specs()}
    return ExampleDriver(
        DriverSetup(
            host="host-1",
            vms=tuple(ExampleVm(name=name, example=program) for name, program in programs.items()),
            options=ExampleOptions(),
            state_dir=folder,
            environ=os.environ,
            max_digest_bytes=0,
        )
    )


@pytest.fixture(autouse=True)
def example_is_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The example driver is no part of the product: it is a plug-in, as anybody's."""
    target = "caesura_testing.example_driver:ExamplePlugin"
    monkeypatch.syspath_prepend(install_driver(tmp_path / "plugins", "example", target))


async def _lives(kind: str, tmp_path: Path) -> AsyncIterator[Lives]:
    # A unix socket's path has 107 bytes, and pytest's folders have long names.
    with tempfile.TemporaryDirectory(prefix="caesura-", dir="/tmp") as short:
        folder = Path(short) if kind == "qemu" else tmp_path
        makers = {"qemu": _qemu_driver, "example": _example_driver}
        build = partial(makers.get(kind) or partial(_process_driver, kind), folder)
        lives = Lives(folder, build, exclusive=kind == "qemu")
        yield lives
        await lives.end()
        assert not (folder / "run").exists()


@pytest.fixture
async def lives(kind: str, tmp_path: Path) -> AsyncIterator[Lives]:
    """Lives of any driver."""
    async for each in _lives(kind, tmp_path):
        yield each


@pytest.fixture
async def driver(lives: Lives) -> Any:
    """One driver with its VMs running."""
    return await lives.next()


@pytest.fixture
async def process_lives(freezer: str, tmp_path: Path) -> AsyncIterator[Lives]:
    """Lives of the process driver."""
    async for each in _lives(freezer, tmp_path):
        yield each


@pytest.fixture
async def process_driver(process_lives: Lives) -> Any:
    """One process driver with its VMs running."""
    return await process_lives.next()


def soon() -> float:
    """A generous instant by which to freeze."""
    return time.monotonic() + 10


async def test_freeze_and_resume_all_at_once(driver: Driver) -> None:
    assert set((await driver.read_states()).values()) == {"running"}
    began = time.monotonic()
    await asyncio.gather(*(driver.freeze(vm, soon()) for vm in (await driver.read_states())))
    assert time.monotonic() - began < patient(5)
    assert set((await driver.read_states()).values()) == {"paused"}
    assert {condition(driver.resume_plan(vm)) for vm in (await driver.read_states())} == {"frozen"}
    for vm in await driver.read_states():
        assert await driver.resume(vm, 5) == "running"
        assert await driver.resume(vm, 5) == "running"  # right in every state
    assert set((await driver.read_states()).values()) == {"running"}


async def test_nothing_of_a_frozen_vm_uses_time(process_driver: ProcessDriver) -> None:
    driver = process_driver
    leader = driver.resume_plan("busy")
    pids = tree(driver, "busy")
    assert len(pids) >= 2, leader
    await driver.freeze("busy", soon())
    before = {pid: ticks_of(pid) for pid in pids}
    await asyncio.sleep(0.2)  # the thing measured: time passes and nothing is used
    assert {pid: ticks_of(pid) for pid in pids} == before
    await driver.resume("busy", 5)
    async with asyncio.timeout(patient(10)):
        while {pid: ticks_of(pid) for pid in pids} == before:  # noqa: ASYNC110 - the kernel does not call us
            await asyncio.sleep(0.01)


async def test_processes_that_escaped_stand_still_too(process_driver: ProcessDriver) -> None:
    driver = process_driver
    pids = await settled_tree(driver, "awkward")
    await driver.freeze("awkward", soon())
    switches = {pid: switches_of(pid) for pid in pids}
    await asyncio.sleep(0.1)  # the thing measured: nobody is scheduled meanwhile
    assert {pid: switches_of(pid) for pid in pids} == switches
    assert await driver.resume("awkward", 5) == "running"


async def test_a_process_that_was_moved_out_of_the_freezer_is_no_frozen_vm(
    process_driver: ProcessDriver, freezer: str
) -> None:
    driver = process_driver
    plan = driver.resume_plan("awkward")
    (stray,) = (pid for pid in await settled_tree(driver, "awkward") if "601" in words_of(pid))
    if not isinstance(plan, CgroupPlan):  # signals find it by its parents, wherever it is
        await driver.freeze("awkward", soon())
        assert await driver.resume("awkward", 5) == "running"
        return
    elsewhere = Path(plan.control).parent.parent / "somebody-elses"
    elsewhere.mkdir()
    try:
        (elsewhere / "cgroup.procs").write_text(str(stray))
        with pytest.raises(FreezeFailed, match=rf"in another cgroup than .*/awkward and run on: {stray} \("):
            await driver.freeze("awkward", soon())
        assert await driver.resume("awkward", 5) == "running"
        inside = Path(plan.control).parent / "below"  # a cgroup in the VM's own is frozen with it
        inside.mkdir()
        (inside / "cgroup.procs").write_text(str(stray))
        await driver.freeze("awkward", soon())
        assert await driver.resume("awkward", 5) == "running"
        (Path(plan.control).parent / "cgroup.procs").write_text(str(stray))
        inside.rmdir()
    finally:
        elsewhere.rmdir()
    assert freezer == plan.kind


async def test_a_vm_whose_application_died_is_not_whole(process_lives: Lives) -> None:
    driver = await process_lives.next()
    assert driver.ping() == ""
    leader, *rest = await settled_tree(driver, "awkward")
    (sleeper,) = (pid for pid in rest if "601" in words_of(pid))
    os.kill(sleeper, signal.SIGKILL)
    async with asyncio.timeout(patient(10)):
        while (await driver.read_states())["awkward"] == "running" and not driver.health_error("awkward"):  # noqa: ASYNC110 - nobody calls us
            await asyncio.sleep(0.01)
    assert driver.health_error("awkward") == "sleep was ended by SIGKILL"
    assert driver.ping() == "not whole: awkward (sleep was ended by SIGKILL)"
    # What is left of it is paused and resumed like any other.
    await driver.freeze("awkward", soon())
    assert (await driver.read_states())["awkward"] == "paused"
    assert await driver.resume("awkward", 5) == "running"
    await driver.close(stop_vms=False)
    again = await process_lives.next()  # the next host updater knows it, too
    assert tree(again, "awkward")[0] == leader
    await again.read_states()
    assert again.health_error("awkward") == "sleep was ended by SIGKILL"
    await again.close(stop_vms=True)
    anew = await process_lives.next()
    assert set((await anew.read_states()).values()) == {"running"}
    assert anew.ping() == ""


async def test_the_guard_plan_resumes_without_the_driver(driver: Driver) -> None:
    plan = driver.resume_plan("awkward")
    await driver.freeze("awkward", soon())
    thaw(plan)
    async with asyncio.timeout(patient(5)):
        while condition(plan) != "running" or (await driver.read_states())["awkward"] != "running":  # noqa: ASYNC110 - nobody calls us
            await asyncio.sleep(0.002)


async def test_a_freeze_that_comes_too_late_does_not_keep_trying(driver: Driver) -> None:
    """The updater was stopped before the call: at most one try, and it says so or finds it frozen."""
    with suppress(FreezeFailed):
        await driver.freeze("plain", time.monotonic() - 1)
    assert await driver.resume("plain", 5) == "running"
    assert (await driver.read_states())["plain"] == "running"


async def test_cancelled_freeze_leaves_nothing_behind(driver: Driver) -> None:
    task = asyncio.create_task(driver.freeze("plain", soon()))
    await asyncio.sleep(0)
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task
    assert await driver.resume("plain", 5) == "running"
    assert (await driver.read_states())["plain"] == "running"


async def test_vm_that_ends(driver: Any, kind: str) -> None:
    pids = tree(driver, "awkward")
    if kind != "cgroup1":  # a frozen v1 group does not die before it is thawed
        await driver.freeze("awkward", soon())
    os.kill(pids[0], signal.SIGKILL)
    async with asyncio.timeout(patient(10)):
        await driver.changed()
    assert (await driver.read_states())["awkward"] == "stopped"
    assert await driver.resume("awkward", 5) == "gone"
    async with asyncio.timeout(patient(10)):
        while any(runs(pid) for pid in pids):  # noqa: ASYNC110 - the kernel does not call us
            await asyncio.sleep(0.01)
    with pytest.raises(FreezeFailed):
        await driver.freeze("awkward", soon())
    with pytest.raises(DriverError):
        driver.resume_plan("awkward")
    assert driver.ping().startswith("not running: awkward")
    assert driver.process_of("awkward") == ""


async def test_next_life_adopts_what_runs_and_what_is_frozen(lives: Lives) -> None:
    first = await lives.next()
    before = {vm: tree(first, vm)[0] for vm in first.states()}
    await first.freeze("plain", soon())
    second = await lives.next()
    assert {vm: tree(second, vm)[0] for vm in second.states()} == before
    assert second.states() == {"plain": "paused", "awkward": "running", "busy": "running"}
    assert await second.resume("plain", 5) == "running"


async def test_what_is_not_possible_is_refused_before_the_pause(driver: Any) -> None:
    can = driver.capabilities("plain")
    assert {"live", "freeze"} <= set(can.methods)
    assert can.missing["reboot"]
    assert not set(can.methods) & can.missing.keys()
    for method in ("swap", "replace"):
        if method in can.missing:
            with pytest.raises(DriverError, match=re.escape(can.missing[method])):
                await driver.prepare("plain", "op-1", method, "")
    await driver.prepare("plain", "op-2", "freeze", "")
    await driver.release("plain")
    await driver.release("plain")  # right in every state
    if isinstance(driver, SwapCapable):
        with pytest.raises(DriverError):
            await driver.hand_over("plain", soon())
    if isinstance(driver, ReplaceCapable):
        with pytest.raises(DriverError):
            await driver.checkpoint("plain", soon())
    assert (await driver.read_states())["plain"] == "running"


async def test_a_driver_has_the_protocols_of_what_it_says_it_can_do(driver: Any) -> None:
    for vm in await driver.read_states():
        can = driver.capabilities(vm)
        for method, protocol in (("swap", SwapCapable), ("replace", ReplaceCapable)):
            assert isinstance(driver, protocol) or can.missing[method], method
        assert isinstance(driver, DigestCapable) or (not can.digests and can.no_digest)
        assert isinstance(driver, ClockCapable) or can.clock != "system"


async def test_the_guard_plan_is_one_that_the_plug_in_promised(driver: Driver) -> None:
    promised = load_plugin(driver.name).mechanisms
    check_plans(driver, await driver.read_states())
    assert {mechanism_of(driver.resume_plan(vm)) for vm in await driver.read_states()} <= promised


async def test_memory_digest(process_driver: ProcessDriver, tmp_path: Path) -> None:
    driver = process_driver
    await driver.freeze("plain", soon())
    assert driver.memory_size("plain") == 3 * 2**20 + 5
    first = await driver.memory_digest("plain", soon())
    assert first is not None
    assert await driver.memory_digest("plain", soon()) == first
    with (tmp_path / "vms" / "plain.ram").open("r+b") as file:
        file.seek(2**21)
        file.write(b"x")
    assert await driver.memory_digest("plain", soon()) != first
    assert await driver.memory_digest("plain", time.monotonic() - 1) is None
    await driver.resume("plain", 5)
    with pytest.raises(NotPossible):
        await driver.memory_digest("busy", soon())
    assert not isinstance(driver, ClockCapable)


async def test_sampled_digest(process_driver: ProcessDriver, tmp_path: Path) -> None:
    """Of pages that the seed chooses, whatever the memory's size and the limit for digests of all of it."""
    driver = process_driver
    assert driver.capabilities("plain").digests == ("digest_equal", "sampled_digest_equal")
    assert driver.capabilities("busy").digests == ()
    assert "ram_bytes" in driver.capabilities("busy").no_digest
    await driver.freeze("plain", soon())
    first = await driver.sampled_digest("plain", "op-1/plain")
    assert await driver.sampled_digest("plain", "op-1/plain") == first
    assert await driver.sampled_digest("plain", "op-2/plain")
    ram = tmp_path / "vms" / "plain.ram"
    chosen = sampled_offsets("op-1/plain", ram.stat().st_size)
    with ram.open("r+b") as file:
        file.seek(chosen[-1])
        file.write(b"x")
    assert await driver.sampled_digest("plain", "op-1/plain") != first
    await driver.resume("plain", 5)
    with pytest.raises(NotPossible):
        await driver.sampled_digest("busy", "op-1/busy")


async def test_vm_whose_program_is_missing(freezer: str, tmp_path: Path) -> None:
    chosen, _ = choose_freezer(freezer, f"caesura-driver-test-{os.getpid()}")  # type: ignore[arg-type]
    spec = ProcessVm(name="bad", process=(GuestProcess(argv=("no-such-program",)),))
    driver = ProcessDriver("host-1", (spec,), tmp_path, chosen, environ=os.environ, max_digest_bytes=0)
    await driver.open()
    assert (await driver.read_states()) == {"bad": "stopped"}
    assert (
        driver.ping()
        == "not running: bad (cannot be started: cannot start no-such-program: No such file or directory)"
    )
    await driver.close(stop_vms=True)


async def test_a_start_that_fails_leaves_no_cgroup(freezer: str, tmp_path: Path) -> None:
    """A host updater may fail before it has VMs, or because it cannot write theirs (a full disk)."""
    chosen, _ = choose_freezer(freezer, f"caesura-start-test-{os.getpid()}")  # type: ignore[arg-type]
    base = getattr(chosen, "_base", None)
    assert base is None or not base.exists(), "to find out whether it works needs no place that stays"
    (tmp_path / "vms" / "full.spec.json").mkdir(parents=True)  # stands for what cannot be written
    spec = ProcessVm(name="full", process=(GuestProcess(argv=("sleep", "600")),))
    driver = ProcessDriver("host-1", (spec,), tmp_path, chosen, environ=os.environ, max_digest_bytes=0)
    await driver.open()
    try:
        assert "cannot be started" in driver.ping()
        assert base is None or not base.exists()
    finally:
        await driver.close(stop_vms=True)


async def test_vm_starts_in_a_place_that_was_left_frozen(lives: Lives) -> None:
    first = await lives.next()
    plan = first.resume_plan("plain")
    pids = tree(first, "plain")
    await first.freeze("plain", soon())
    for pid in reversed(pids):
        os.kill(pid, signal.SIGKILL)
    await first.close(stop_vms=False)
    if isinstance(plan, CgroupPlan) and plan.kind == "cgroup1":
        thaw(plan)  # a frozen v1 group does not even die
    async with asyncio.timeout(patient(10)):
        while condition(plan) != "gone":  # noqa: ASYNC110 - the kernel does not call us
            await asyncio.sleep(0.01)
    second = await lives.next()
    assert second.states()["plain"] == "running"
    assert tree(second, "plain")[0] not in pids


async def settled_tree(driver: Any, vm: str) -> list[int]:
    """Pids of the VM ``awkward``, when all that it starts is there and what only forks has ended."""
    async with asyncio.timeout(patient(10)):
        while True:
            pids = tree(driver, vm)
            with suppress(ProcessLookupError):
                escaped = [pid for pid in pids if os.getsid(pid) != pids[0]]
                if len(pids) == 4 and len(escaped) == 1:
                    return pids
            await asyncio.sleep(0.01)


def words_of(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/cmdline").read_text().split("\0")


def tree(driver: Any, vm: str) -> list[int]:
    """Pids of a VM, its first process first."""
    if isinstance(driver, QemuDriver):
        run = driver._guests[vm].run
        assert run is not None
        return [run.pid]
    from caesura_vmcontrol.plans import SignalPlan  # noqa: PLC0415
    from caesura_vmcontrol.procfs import process_table  # noqa: PLC0415

    if isinstance(driver, ExampleDriver):
        return [driver._runs[vm].leader]
    first = driver._supervisor.runs[vm]
    members = SignalPlan(vm, first.pid, first.start_ticks).members(process_table())
    return sorted((each.pid for each in members), key=lambda pid: pid != first.pid)


def ticks_of(pid: int) -> str:
    """Processor time used, from /proc."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return f"{fields[11]} {fields[12]}"


def switches_of(pid: int) -> list[str]:
    """How often it was scheduled, from /proc."""
    return [line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if "ctxt_switches" in line]


def runs(pid: int) -> bool:
    """Whether there is such a process that is no zombie."""
    process = read_process(pid)
    return process is not None and alive(pid, process.start_ticks)
