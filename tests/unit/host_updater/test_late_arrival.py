"""After a change of the host's kernel: guests of which the pause guard does not know yet what became of them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from caesura.contract.messages import OperationReported, StartOperation
from caesura.delivery.message import OutboxMessage, prepare
from caesura_host_updater.command_admission import Underway
from caesura_host_updater.drivers.port import NotRunningYet
from caesura_host_updater.guard_client import GuardUnavailable
from caesura_host_updater.journal import JournalThread
from caesura_host_updater.operation import crash_recovery
from caesura_host_updater.operation.crash_recovery import CrashRecovery
from caesura_host_updater.operation.finalizer import OperationFinalizer
from caesura_host_updater.operation.state import Operation, VmPause
from caesura_host_updater.pause_markers import PauseMarkers
from caesura_testing.patience import patient
from caesura_vmcontrol import claims
from caesura_vmcontrol.intent import Intent
from caesura_vmcontrol.kernel_change import Arrival, ClockPair, HostClock, KernelChange, Left, VmArrival
from caesura_vmcontrol.procfs import boot_id
from caesura_vmcontrol.qemu_plans import AcrossBoots, ReplacePlan, Vmm

FORMER = "aaaaaaaa-0000-4000-8000-000000000001"
NEW = "6.1.0-48-amd64"
AT = 1_800_000_000.0
FILE = f"file:10:{'a' * 64}"


class Host:
    """Driver, guard and all that is told; what the guard says is ``record``, or why it says nothing."""

    def __init__(self) -> None:
        self.record: Intent | GuardUnavailable | None = None
        self.state = "paused"
        self.asked: list[str] = []
        self.queued: list[OutboxMessage] = []

    async def open(self) -> None:
        """The guest is in its files."""

    def health_error(self, _: str) -> str:
        return ""

    async def read_states(self) -> dict[str, str]:
        return {"a": self.state}

    def resume_plan(self, _: str) -> ReplacePlan:
        return plan()

    async def resume(self, *_: object) -> str:
        await asyncio.Event().wait()
        raise AssertionError

    async def release(self, vm: str) -> None:
        self.asked.append(f"release {vm}")

    async def start(self) -> Intent | None:
        return await self.held()

    async def held(self) -> Intent | None:
        self.asked.append("held")
        if isinstance(self.record, GuardUnavailable):
            raise self.record
        return self.record

    async def disarm(self, operation: str) -> None:
        self.asked.append(f"disarm {operation}")


def plan() -> ReplacePlan:
    """Of the former boot."""
    return ReplacePlan(
        vm="a",
        old=Vmm(4711, 1, "/run/a/guard"),
        claims="/carve-out/operations/a/op.claims",
        state_file="/carve-out/operations/a/op.state",
        qmp="/run/a/next/guard",
        argv=(("/usr/bin/qemu-system-x86_64", "-incoming", "defer", "-S"),),
        environ=(("MARK", "a"),),
        mark="MARK=a",
        log="/log/a.log",
        ram=("/carve-out/ram/a.ram", 1, 2),
        across=AcrossBoots(FORMER, "0", 2, 1 << 20, "/carve-out", 0, 0, (), ()),
    )


def record(found: VmArrival | None, *, arrived_in: str = "") -> Intent:
    """What the guard holds; ``found`` is what it knows of the guest."""
    vms = {} if found is None else {"a": found}
    arrival = Arrival(arrived_in or boot_id(), NEW, "initramfs", HostClock("tsc", 0.1, 0.001), AT, vms)
    left = Left(ClockPair(1, AT - 10.0, 2e6, True), 100.0, "6.1.0-47-amd64")
    change = KernelChange(NEW, "/carve-out", left=left, arrival=arrival)
    return Intent("op", FORMER, 0.0, 1.0, (plan(),), kernel_change=change)


async def until(holds: Callable[[], bool]) -> None:
    """Let the others go on until then."""
    end = time.monotonic() + patient(20.0)  # the loop's own clock jumps
    while not holds():
        assert time.monotonic() < end
        await asyncio.sleep(0)


Start = Callable[[Host], Any]


@pytest.fixture
async def start(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    freeze_one: Callable[..., StartOperation],
    marked: Callable[..., PauseMarkers],
) -> AsyncIterator[Start]:
    """A host updater that begins with an operation that its former boot left for another kernel."""
    monkeypatch.setattr(crash_recovery, "_PATIENCE_S", 0.0)
    monkeypatch.setattr(crash_recovery, "_ASK_S", 0.0)
    vm = VmPause(vm="a", set="web", update_domain=0, called_at=99.0, frozen_at=99.5)
    state = Operation(
        operation="op", method="kexec", budget_s=30.0, kernel_release=NEW, vms=(vm,), phase="leaving"
    )
    command = freeze_one()
    journal = JournalThread()
    await journal.open(str(tmp_path / "journal.sqlite"))
    await journal.do(lambda j: j.accept(command, state, FORMER, []))

    def make(host: Host) -> tuple[CrashRecovery, OperationFinalizer]:
        place: dict[str, Any] = {"set": "web", "ud": 0, "vm": "a", "host": "host-1"}
        given: Any = host
        nothing: Any = SimpleNamespace(
            queue=lambda *letters: host.queued.extend(letters),
            track=lambda _: None,
            finished=lambda *_: None,
        )
        facts: Any = SimpleNamespace(
            fact=lambda fact: prepare(fact, source="/s", event_id=fact.TYPE, at=fact.at, **place),
            report=lambda report: (
                prepare(report, source="/s", event_id=report.status, at=report.at, host="host-1"),
            ),
        )
        finalizer = OperationFinalizer(
            facts, journal=journal, outbox=nothing, clocks=nothing, metrics=nothing
        )
        recovery = CrashRecovery(
            "host-1",
            driver=given,
            guard=given,
            journal=journal,
            fact_factory=facts,
            finalizer=finalizer,
            pauses=marked(),
            has_clock=lambda _: False,
            resumed={},
        )
        return recovery, finalizer

    yield make
    await journal.close()


def end_of(host: Host) -> OperationReported:
    """The report that was published, and nothing else that is one."""
    (report,) = [
        each for each in (letter.read() for letter in host.queued) if isinstance(each, OperationReported)
    ]
    return report


@pytest.mark.parametrize(
    "first",
    [
        record(VmArrival("undecided", why="no memory yet")),
        record(None),
        record(VmArrival("running", AT), arrived_in=FORMER),
        GuardUnavailable("it is starting"),
    ],
    ids=["undecided", "nothing said of it", "of another boot", "no guard"],
)
async def test_a_guest_that_may_be_resumed_later_is_not_said_to_be_lost(
    start: Start, first: Intent | GuardUnavailable
) -> None:
    host = Host()
    host.record = first
    recovery, finalizer = start(host)
    await recovery.run(1)
    await until(lambda: host.asked.count("held") >= 5)
    assert host.queued == []
    assert await finalizer.known("op") == Underway()
    assert "disarm op" not in host.asked, "the guard would forget the guest"
    assert recovery.resuming == {"a"}, "the inventory shows it as paused by Caesura"
    assert "release a" not in host.asked

    host.record = record(VmArrival("running", AT + 5.0, 400, 7))
    await until(lambda: "disarm op" in host.asked)
    report = end_of(host)
    assert report.status == "completed"
    assert report.vms[0].pause_s == pytest.approx(16.0)
    for task in recovery.late:
        task.cancel()


async def test_what_is_decided_is_reported_at_once(start: Start) -> None:
    host = Host()
    host.state = "stopped"
    host.record = record(VmArrival("lost", why="its RAM file is gone"))
    recovery, finalizer = start(host)
    await recovery.run(1)
    known = await finalizer.known("op")
    assert known is not None
    assert not isinstance(known, Underway)
    assert "disarm op" in host.asked
    for task in recovery.late:
        task.cancel()


async def test_a_guard_that_knows_nothing_of_the_operation_will_not_resume_its_guests(start: Start) -> None:
    host = Host()
    host.state = "stopped"
    recovery, finalizer = start(host)
    host.record = replace(record(None), operation="another")
    await recovery.run(1)
    assert await finalizer.known("op") != Underway()
    for task in recovery.late:
        task.cancel()


class Stuck(Host):
    """The guest's process cannot be started until its memory was examined, or it is given up."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.place = folder / "carve-out" / "operations" / "a" / "op.claims"
        self.place.mkdir(parents=True)
        claims.claim(str(self.place), 1, FILE)
        claims.claim(str(self.place), 2, f"left:4711:1:{FORMER[:8]}")

    def resume_plan(self, _: str) -> ReplacePlan:
        return replace(plan(), claims=str(self.place))

    async def resume(self, *_: object) -> str:
        await asyncio.sleep(0)
        self.asked.append("resume")
        if self.owner == "gone":
            return "gone"
        raise NotRunningYet("a", "its memory was not examined")

    @property
    def owner(self) -> str:
        found = claims.current(str(self.place))[1]
        return "" if found is None else found.kind


@pytest.mark.parametrize("said", ["nothing", "of another operation", "lost"])
async def test_a_guest_that_nobody_will_examine_does_not_wait_for_ever(
    start: Start, tmp_path: Path, said: str
) -> None:
    """The guard's record was garbled and put aside, or its carve-out came too late: doubt makes it lost, and it can be started cold."""
    host = Stuck(tmp_path)
    held = replace(record(VmArrival("lost", why="no carve-out")), plans=(host.resume_plan("a"),))
    host.record = {
        "nothing": None,
        "of another operation": replace(record(None), operation="another"),
        "lost": held,
    }[said]
    recovery, _ = start(host)
    await recovery.run(1)
    await until(lambda: host.owner == "gone")
    await until(lambda: not recovery.resuming)
    assert "no record" in " ".join(claims.failures(str(host.place)))
    for task in recovery.late:
        task.cancel()


class OutOfReach(Host):
    """A kernel without the carve-out runs: where it was decided who has the guest is not to be seen."""

    async def resume(self, *_: object) -> str:
        await asyncio.sleep(0)
        self.asked.append("resume")
        raise NotRunningYet("a", "the carve-out is not mounted")


async def test_a_guest_whose_carve_out_is_away_is_reported_as_the_guard_says(
    start: Start, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing can be written down about it in this boot; the report must not wait for that, nor the log fill."""
    host = OutOfReach()
    host.record = record(VmArrival("undecided", why="no carve-out yet"))
    recovery, finalizer = start(host)
    await recovery.run(1)
    await until(lambda: host.asked.count("resume") >= 50)
    assert host.queued == [], "the guard has not decided"
    host.record = replace(record(VmArrival("lost", why="this kernel has no carve-out")), plans=())
    await until(lambda: not recovery.resuming)
    await until(lambda: "disarm op" in host.asked)
    report = end_of(host)
    assert report.codes == ("memory_lost",)
    assert "this kernel has no carve-out" in report.vms[0].error
    assert await finalizer.known("op") != Underway()
    assert capsys.readouterr().out.count("vm.not_resumed_yet") <= 1
    for task in recovery.late:
        task.cancel()


@pytest.mark.parametrize("why_not", ["the guard has it", "examined", "no guard", "another boot is to come"])
async def test_a_guest_that_may_be_examined_is_not_given_up(
    start: Start, tmp_path: Path, why_not: str
) -> None:
    host = Stuck(tmp_path)
    host.record = replace(record(VmArrival("undecided")), plans=(host.resume_plan("a"),))
    if why_not == "no guard":
        host.record = GuardUnavailable("it is starting")
    elif why_not == "examined":
        host.record = None
        claims.admit(str(host.place), boot_id()[:8])
    elif why_not == "another boot is to come":
        host.record = replace(record(None, arrived_in=FORMER), plans=(host.resume_plan("a"),))
    recovery, _ = start(host)
    await recovery.run(1)
    await until(lambda: host.asked.count("resume") >= 5)
    assert host.owner == "left"
    for task in recovery.late:
        task.cancel()


@pytest.mark.parametrize(
    ("phase", "left"),
    [("preparing", False), ("freezing", True), ("leaving", True), ("resuming", True), ("resumed", False)],
)
def test_vms_that_ran_again_are_not_said_to_be_lost_with_their_memory(phase: Any, left: bool) -> None:
    """The kernel was not left, and the host was reset before that had been reported: it was restarted, as any other."""
    state = Operation(operation="op", method="kexec", budget_s=30.0, kernel_release=NEW, vms=(), phase=phase)
    entry: Any = SimpleNamespace(state=state, boot_id=FORMER)
    assert crash_recovery._left_its_kernel(entry) == left
