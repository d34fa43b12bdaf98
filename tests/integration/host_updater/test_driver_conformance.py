"""What every driver must do, over the process driver with each of its freezers and over QEMU, and what only the process driver does.

The QEMU VMs have no guest system: the firmware runs, which is enough to be paused and handed over.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Literal

import pytest

from caesura.conformance.drivers import DriverConformance, DriverHarness, DriverRuns
from caesura.conformance.drivers import freeze_deadline as soon
from caesura_host_updater.drivers.port import ClockCapable, Driver, FreezeFailed, NotPossible
from caesura_host_updater.drivers.process.definition import GuestProcess, ProcessVm
from caesura_host_updater.drivers.process.driver import ProcessDriver
from caesura_host_updater.drivers.process.freezers import FreezerUnusable, choose_freezer
from caesura_host_updater.drivers.qemu.definition import Definition, QemuOptions, QemuVm
from caesura_host_updater.drivers.qemu.driver import QemuDriver
from caesura_host_updater.drivers.sampling import sampled_offsets
from caesura_testing.guests import qemu_installed
from caesura_testing.patience import patient
from caesura_vmcontrol.procfs import process_table
from caesura_vmcontrol.resume_plans import CgroupPlan, SignalPlan

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


FreezerKind = Literal["cgroup2", "cgroup1", "sigstop"]
FREEZERS: tuple[FreezerKind, ...] = ("cgroup2", "cgroup1", "sigstop")


class ProcessHarness(DriverHarness):
    """The process driver with one of its freezers."""

    vms = tuple(spec.name for spec in specs())

    def __init__(self, freezer: FreezerKind, folder: Path) -> None:
        self._freezer = freezer
        self._folder = folder

    def build(self) -> ProcessDriver:
        chosen, passed = choose_freezer(self._freezer, f"caesura-driver-test-{os.getpid()}")
        assert passed == {}
        return ProcessDriver(
            "host-1", specs(), self._folder, chosen, environ=os.environ, max_digest_bytes=8 * 2**20
        )

    def processes(self, driver: Driver, vm: str) -> list[int]:
        return tree(driver, vm)


class QemuHarness(DriverHarness):
    """The QEMU driver."""

    vms = tuple(spec.name for spec in qemu_specs())
    exclusive = True

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def build(self) -> QemuDriver:
        return QemuDriver(
            "host-1",
            qemu_specs(),
            QemuOptions(run_dir=str(self._folder / "run"), powerdown_s=0),
            self._folder,
            accel="tcg,thread=multi",
            environ=os.environ,
            max_digest_bytes=16 * 2**20,
        )

    def processes(self, driver: Driver, vm: str) -> list[int]:
        assert isinstance(driver, QemuDriver)
        run = driver._guests[vm].run
        assert run is not None
        return [run.pid]


@pytest.fixture(params=FREEZERS)
def freezer(request: pytest.FixtureRequest) -> FreezerKind:
    """The process driver's ways of freezing; skipped where the machine lacks it."""
    kind: FreezerKind = request.param
    try:
        choose_freezer(kind, "caesura-test-probe")[0].remove("_probe")
    except FreezerUnusable as error:
        pytest.skip(f"{kind} does not work here: {error}")
    return kind


class TestProcessDriver(DriverConformance):
    """With each freezer."""

    @pytest.fixture
    def harness(self, freezer: FreezerKind, tmp_path: Path) -> ProcessHarness:
        return ProcessHarness(freezer, tmp_path)


@pytest.mark.skipif(not qemu_installed(), reason="no QEMU on this machine")
class TestQemuDriver(DriverConformance):
    """QEMU without KVM."""

    @pytest.fixture
    def harness(self) -> Iterator[QemuHarness]:
        # A unix socket's path has 107 bytes, and pytest's folders have long names.
        with tempfile.TemporaryDirectory(prefix="caesura-", dir="/tmp") as folder:
            yield QemuHarness(Path(folder))
            assert not (Path(folder) / "run").exists()


@pytest.fixture
async def process_runs(freezer: FreezerKind, tmp_path: Path) -> AsyncIterator[DriverRuns]:
    """Host updaters with the process driver, one after the other."""
    runs = DriverRuns(ProcessHarness(freezer, tmp_path))
    yield runs
    await runs.end()


@pytest.fixture
async def process_driver(process_runs: DriverRuns) -> ProcessDriver:
    """One process driver with its VMs running."""
    driver = await process_runs.start()
    assert isinstance(driver, ProcessDriver)
    return driver


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
    process_driver: ProcessDriver, freezer: FreezerKind
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


async def test_a_vm_whose_application_died_is_not_whole(process_runs: DriverRuns) -> None:
    driver = await process_runs.start()
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
    again = await process_runs.start()  # the next host updater knows it, too
    assert tree(again, "awkward")[0] == leader
    await again.read_states()
    assert again.health_error("awkward") == "sleep was ended by SIGKILL"
    await again.close(stop_vms=True)
    anew = await process_runs.start()
    assert set((await anew.read_states()).values()) == {"running"}
    assert anew.ping() == ""


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


async def test_vm_whose_program_is_missing(freezer: FreezerKind, tmp_path: Path) -> None:
    chosen, _ = choose_freezer(freezer, f"caesura-driver-test-{os.getpid()}")
    spec = ProcessVm(name="bad", process=(GuestProcess(argv=("no-such-program",)),))
    driver = ProcessDriver("host-1", (spec,), tmp_path, chosen, environ=os.environ, max_digest_bytes=0)
    await driver.open()
    assert (await driver.read_states()) == {"bad": "stopped"}
    assert (
        driver.ping()
        == "not running: bad (cannot be started: cannot start no-such-program: No such file or directory)"
    )
    await driver.close(stop_vms=True)


async def test_a_start_that_fails_leaves_no_cgroup(freezer: FreezerKind, tmp_path: Path) -> None:
    """A host updater may fail before it has VMs, or because it cannot write theirs (a full disk)."""
    chosen, _ = choose_freezer(freezer, f"caesura-start-test-{os.getpid()}")
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


async def settled_tree(driver: Driver, vm: str) -> list[int]:
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


def tree(driver: Driver, vm: str) -> list[int]:
    """Pids of a VM of the process driver, its first process first."""
    assert isinstance(driver, ProcessDriver)
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
