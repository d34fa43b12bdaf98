"""The shell around the pause machine, with a driver and a guard that misbehave on demand."""

# The fakes take what the ports give them.
# ruff: noqa: ARG002

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import pytest

from caesura.contract.messages import Method, OperationTarget, StartOperation, VmFrozen, VmResumed, VmState
from caesura.runtime.errors import StoreError
from caesura_host_updater.drivers.port import (
    Capabilities,
    ClockCapable,
    ClockSet,
    DigestCapable,
    DriverError,
    FreezeFailed,
    HandOver,
    NotPossible,
    NotRunningYet,
    ReplaceCapable,
    SwapCapable,
    SwapFailed,
)
from caesura_host_updater.guard_client import GuardUnavailable
from caesura_host_updater.inventory.updates import UpdateFile
from caesura_host_updater.journal import JournalThread
from caesura_host_updater.operation import runner as runner_module
from caesura_host_updater.operation.runner import OperationRunner
from caesura_host_updater.operation.state import Operation, UpdateRun, VmPause
from caesura_host_updater.pause_markers import NotMarked
from caesura_testing.patience import patient
from caesura_vmcontrol.intent import Intent
from caesura_vmcontrol.kernel_change import KernelChange
from caesura_vmcontrol.resume_plans import CgroupPlan, ResumePlan


class FakeDriver:
    """VMs that are made up."""

    name = "fake"

    def __init__(self, *names: str) -> None:
        self.prepared: set[str] = set()
        self.released: list[str] = []
        self.broken_prepares: dict[str, Exception] = {}
        self.hand_overs: dict[str, Any] = {}
        """What a swap of this VM does instead of going well: an exception, or an event to wait for."""
        self.swapped: list[str] = []
        self.checkpointed: list[str] = []
        self.vms: dict[str, VmState] = dict.fromkeys(names, "running")
        self.freeze_s = 0.0
        self.meet: Callable[[], Awaitable[object]] | None = None
        """Awaited in every freeze, before it takes effect, if a test sets it."""
        self.digests = ["same", "same"]
        self.samples = ["same", "same"]
        self.sampled: tuple[bool | None, str] = (True, "2 pages")
        self.broken_freezes: dict[str, Exception] = {}
        self.broken_resumes: list[Exception] = []
        self.left: dict[str, str] = {}
        self.freezing = asyncio.Event()
        self.frozen: list[str] = []
        """Every VM that was asked to freeze, whatever came of it."""
        self.on_first: Callable[[], None] = lambda: None
        """Called once, inside the first call that pauses a VM."""

    def _pausing(self) -> None:
        self.freezing.set()
        first, self.on_first = self.on_first, lambda: None
        first()

    def ping(self) -> str:
        return ""

    def health_error(self, vm: str) -> str:
        return ""

    async def open(self) -> None:
        return

    async def close(self, *, stop_vms: bool) -> None:
        return

    async def read_states(self) -> Mapping[str, VmState]:
        return self.vms

    async def changed(self) -> None:
        await asyncio.Event().wait()

    def capabilities(self, vm: str) -> Capabilities:
        return Capabilities(methods=("live", "freeze", "swap", "replace"), missing={}, clock="none")

    async def prepare(self, vm: str, operation: str, method: Method, binary: str) -> None:
        if vm in self.broken_prepares:
            raise self.broken_prepares[vm]
        self.prepared.add(vm)

    async def hand_over(self, vm: str, by: float) -> HandOver:
        assert vm in self.prepared
        at = time.monotonic()
        self._pausing()
        trouble = self.hand_overs.get(vm)
        if isinstance(trouble, asyncio.Event):
            self.vms[vm] = "paused"
            await trouble.wait()
        elif trouble is not None:
            raise trouble
        self.swapped.append(vm)
        return HandOver(
            called_at=at,
            frozen_at=at,
            resumed_at=at + 0.004,
            detail="B, was A",
            sampled=self.sampled[0],
            sampled_note=self.sampled[1],
        )

    async def checkpoint(self, vm: str, by: float, *, gone: bool = True) -> None:
        assert vm in self.prepared
        self.checkpointed.append(vm)
        await self.freeze(vm, by)

    async def release(self, vm: str) -> None:
        self.released.append(vm)

    def process_of(self, vm: str) -> str:
        return "process B" if vm in self.checkpointed else "process A"

    def detail(self) -> str:
        return ""

    async def guest_boot_id(self, vm: str) -> str:
        raise NotPossible(vm, "no kernel")

    def resume_plan(self, vm: str) -> ResumePlan:
        return CgroupPlan(vm, "cgroup2", f"/sys/fs/cgroup/x/{vm}/cgroup.freeze")

    async def freeze(self, vm: str, by: float) -> None:
        self.frozen.append(vm)
        self._pausing()
        if vm in self.broken_freezes:
            raise self.broken_freezes[vm]
        self.vms[vm] = "paused"
        if self.meet is not None:
            await self.meet()
        await asyncio.sleep(self.freeze_s)
        if time.monotonic() >= by:
            raise FreezeFailed(vm, "too slow")

    def why_left(self, vm: str) -> str:
        return self.left.get(vm, "")

    async def resume(self, vm: str, timeout_s: float) -> Literal["running", "gone", "left"]:
        if vm in self.left:
            return "left"
        if self.broken_resumes:
            raise self.broken_resumes.pop()
        self.vms[vm] = "running"
        return "running"

    def memory_size(self, vm: str) -> int:
        return 1

    async def memory_digest(self, vm: str, stop_at: float) -> str | None:
        return self.digests.pop()

    async def sampled_digest(self, vm: str, seed: str) -> str:
        assert seed == f"op/{vm}", "the same pages before and after"
        return self.samples.pop()

    async def sync_clock(self, vm: str) -> ClockSet:
        raise NotPossible(vm, "no clock")


class FakeGuard:
    """A guard that arms unless told otherwise."""

    def __init__(self) -> None:
        self.on_lost: Callable[[], None] = lambda: None
        self.armed: list[str] = []
        self.broken: Exception | None = None
        self.change: KernelChange | None = None
        self.no_jump: Exception | None = None
        self.asked_to_leave = 0
        self.dropped: list[str] = []

    async def arm(
        self,
        operation: str,
        deadline: float,
        plans: Sequence[ResumePlan],
        change: KernelChange | None = None,
    ) -> None:
        if self.broken is not None:
            raise self.broken
        self.armed.append(operation)
        self.change = change

    async def leave(self, operation: str, by: float) -> None:
        assert operation in self.armed
        assert time.monotonic() < by
        self.asked_to_leave += 1
        if self.no_jump is not None:
            raise self.no_jump

    async def drop(self, operation: str, vms: Sequence[str]) -> None:
        if self.broken is not None:
            raise self.broken
        if operation not in self.armed:
            raise GuardUnavailable(f"operation {operation} is not armed")
        self.dropped += vms

    async def disarm(self, operation: str) -> Intent | None:
        if self.broken is not None:
            raise self.broken
        return None


@pytest.fixture
async def journal(tmp_path: Path) -> AsyncIterator[JournalThread]:
    """A real journal."""
    made = JournalThread()
    await made.open(str(tmp_path / "journal.sqlite"))
    yield made
    await made.close()


class FakeKernels:
    """A host whose loaded kernel is right unless told otherwise."""

    def __init__(self) -> None:
        self.wrong: str | Exception = ""

    async def error(self, release: str, budget_s: float) -> str:
        assert (release, budget_s) == ("6.1.0-9-amd64", 8.0)
        if isinstance(self.wrong, Exception):
            raise self.wrong
        return self.wrong

    def change_to(self, release: str) -> KernelChange:
        return KernelChange(release, "/carve-out")


class FakeMarkers:
    """Pause markers that are written unless the disk is full; ``said`` is what was asked, in order."""

    def __init__(self, driver: FakeDriver) -> None:
        self.driver = driver
        self.full = False
        self.marked: set[str] = set()
        self.said: list[str] = []

    async def write(self, operation: str, plans: Sequence[ResumePlan]) -> None:
        self.said.append("write")
        assert not self.driver.freezing.is_set(), "a marker is on disk before the first freeze call"
        if self.full:
            raise NotMarked("cannot write the pause markers: No space left on device")
        self.marked |= {plan.vm for plan in plans}

    def remove(self, vms: Iterable[str]) -> None:
        self.said.append("remove")
        for vm in vms:
            left = vm in self.driver.left
            assert left or self.driver.vms[vm] == "running", "a marker is kept until its VM runs"
            self.marked.discard(vm)


_LOAD = UpdateFile(
    name="kernel",
    impact="pause",
    scope="host",
    argv=("true",),
    expected_s=0.1,
    timeout_s=patient(10),
    kernel="kexec",
    kernel_release="6.1.0-9-amd64",
)


class Scene:
    """One operation over a fake driver and guard."""

    def __init__(
        self,
        journal: JournalThread,
        *names: str,
        hold_s: float = 0.05,
        can_digest: bool = False,
        can_sample: bool = False,
        method: Method = "freeze",
    ) -> None:
        self.driver = FakeDriver(*names)
        self.kernels = FakeKernels()
        self.published: list[int] = []
        """How many facts there were when the broker was to have them all."""
        self.guard = FakeGuard()
        self.markers = FakeMarkers(self.driver)
        self.facts: list[VmFrozen | VmResumed] = []
        targets = tuple(OperationTarget(vm=name, set="web", update_domain=0) for name in names)
        command = StartOperation(
            operation="op",
            epoch=1,
            coordinator="c",
            host="host-1",
            rollout="r",
            wave=0,
            method=method,
            targets=targets,
            hold_s=hold_s,
            budget_s=8.0,
            not_after=datetime.now(UTC),
        )
        state = Operation(
            operation="op",
            method=method,
            budget_s=8.0,
            hold_s=hold_s,
            update="kernel" if method == "kexec" else "",
            update_timeout_s=patient(10),
            kernel_release="6.1.0-9-amd64" if method == "kexec" else "",
            runs=(UpdateRun(),) if method == "kexec" else (),
            vms=tuple(
                VmPause(vm=name, set="web", update_domain=0, can_digest=can_digest, can_sample=can_sample)
                for name in names
            ),
        )
        self.runner = OperationRunner(
            command,
            state,
            _LOAD if method == "kexec" else None,
            host="host-1",
            driver=self.driver,
            guard=self.guard,
            pauses=self.markers,
            journal=journal,
            environ={},
            announce=lambda fact, _: self.facts.append(fact),
            on_change=lambda: None,
            kernels=self.kernels,
            published=self._all_published,
        )

    async def _all_published(self, timeout_s: float) -> None:
        assert timeout_s < 1.0, "the VMs are paused meanwhile"
        self.published.append(len(self.facts))

    async def run(self) -> Operation:
        """To the end; no VM stands still then."""
        async with asyncio.timeout(patient(10)):
            op = await self.runner.run()
        assert set(self.driver.vms.values()) == {"running"}
        return op

    def told(self) -> list[tuple[str, str]]:
        """What was announced."""
        return [(type(fact).__name__, fact.vm) for fact in self.facts]


async def test_vms_are_frozen_concurrently(journal: JournalThread) -> None:
    scene = Scene(journal, *(f"vm-{number}" for number in range(20)))
    together = asyncio.Barrier(20)
    scene.driver.meet = together.wait  # one after the other, the first would wait indefinitely
    op = await scene.run()
    assert (op.end, op.failure) == ("completed", "")
    assert together.n_waiting == 0
    assert len(scene.told()) == 40


async def test_nothing_is_frozen_without_a_guard(journal: JournalThread) -> None:
    for error in (GuardUnavailable("no guard"), RuntimeError("a bug")):
        scene = Scene(journal, "a")
        scene.guard.broken = error
        op = await scene.run()
        assert op.end == "failed"
        assert "could not be armed" in op.failure
        assert not scene.driver.freezing.is_set()


class Basic:
    """A driver that has nothing beside the protocol ``Driver``."""

    def __init__(self, inner: FakeDriver) -> None:
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        if any(
            hasattr(beside, name) for beside in (SwapCapable, ReplaceCapable, DigestCapable, ClockCapable)
        ):
            raise AttributeError(name)
        return getattr(self._inner, name)


@pytest.mark.parametrize("method", ["swap", "replace"])
async def test_a_driver_that_cannot_is_not_asked(journal: JournalThread, method: Method) -> None:
    scene = Scene(journal, "a", method=method)
    scene.runner._driver = scene.runner._actions._driver = Basic(scene.driver)
    op = await scene.run()
    assert op.end == "failed"
    assert f"the fake driver cannot {method}" in op.vms[0].error
    assert not scene.driver.freezing.is_set()


async def test_a_driver_that_cannot_read_memory_leaves_the_digests_out(journal: JournalThread) -> None:
    scene = Scene(journal, "a", can_digest=True, can_sample=True)
    scene.runner._driver = scene.runner._actions._driver = Basic(scene.driver)
    op = await scene.run()
    assert op.end == "completed"
    assert "the fake driver cannot read memory" in op.vms[0].digest_note


async def test_nothing_is_frozen_that_the_guard_would_not_know_how_to_resume(journal: JournalThread) -> None:
    scene = Scene(journal, "a", "b")
    ours = scene.driver.resume_plan
    odd: Any = lambda vm: ours(vm) if vm == "a" else object()  # noqa: E731
    scene.driver.resume_plan = odd  # type: ignore[method-assign]
    op = await scene.run()
    assert op.end == "failed"
    assert "the fake driver would have it resumed by 'object'" in op.failure
    assert (scene.guard.armed, scene.markers.said, scene.driver.frozen) == ([], ["remove"], [])


@pytest.mark.parametrize("method", ["freeze", "swap", "replace"])
async def test_vms_are_marked_before_they_are_paused_and_until_they_run(
    journal: JournalThread, method: Method
) -> None:
    scene = Scene(journal, "a", "b", method=method)
    assert (await scene.run()).end == "completed"
    assert scene.markers.said == ["write", "remove"]  # one batch for all
    assert scene.markers.marked == set()


async def test_connections_are_opened_once_for_all_before_anything_is_paused(
    journal: JournalThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once for each VM a daemon that is dead was connected to hundreds of times."""
    scene = Scene(journal, "a", "b")
    opened: list[tuple[list[str], list[str]]] = []
    monkeypatch.setattr(
        runner_module,
        "open_ahead",
        lambda plans: opened.append(([plan.vm for plan in plans], list(scene.driver.frozen))),
    )
    assert (await scene.run()).end == "completed"
    assert opened == [(["a", "b"], [])]


@pytest.mark.parametrize("method", ["freeze", "swap", "replace"])
async def test_nothing_is_frozen_that_cannot_be_marked(journal: JournalThread, method: Method) -> None:
    scene = Scene(journal, "a", "b", method=method)
    scene.markers.full = True
    op = await scene.run()
    assert op.end == "failed"
    assert op.failure == (
        "nothing was frozen: its VMs could not be marked: cannot write the pause markers: No space left on device"
    )
    assert not scene.driver.freezing.is_set()
    assert scene.guard.armed == []


async def test_an_operation_that_breaks_keeps_its_markers(
    journal: JournalThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its VMs may still be paused: whoever resumes them removes the markers."""
    scene = Scene(journal, "a", hold_s=5.0)
    task = asyncio.create_task(scene.runner.run())
    await scene.driver.freezing.wait()
    monkeypatch.setattr(runner_module, "decide", lambda *_: 1 / 0)
    scene.runner.abort("aborted", "anything")
    with pytest.raises(ZeroDivisionError):
        await task
    assert scene.markers.marked == {"a"}


async def test_one_broken_freeze_lets_the_others_go(journal: JournalThread) -> None:
    for error in (FreezeFailed("b", "stubborn"), ZeroDivisionError("a bug")):
        scene = Scene(journal, "a", "b")
        scene.driver.broken_freezes["b"] = error
        op = await scene.run()
        assert op.end == "failed"
        assert op.failure.startswith("VM b could not be frozen")


@pytest.mark.parametrize("method", ["freeze", "replace", "swap"])
async def test_whoever_was_stopped_before_the_call_freezes_nothing_after_the_deadline(
    method: Method, journal: JournalThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last look (I2): decided in time, then stopped (SIGSTOP, a busy host) until long after the guard has released it."""
    stopped_s = 0.0

    def after_the_stop() -> None:
        nonlocal stopped_s
        stopped_s = 20.0  # more than the whole budget of 8 s

    clock = SimpleNamespace(monotonic=lambda: time.monotonic() + stopped_s)
    for module in ("runner", "vm_actions"):
        monkeypatch.setattr(f"caesura_host_updater.operation.{module}.time", clock)
    scene = Scene(journal, "a", "b", "c", method=method)
    scene.driver.on_first = after_the_stop
    op = await scene.run()
    paused = scene.driver.swapped if method == "swap" else scene.driver.frozen
    assert paused == ["a"], "only the one whose call was made before the stop"
    assert op.end == "failed"
    assert [vm.frozen_at is None for vm in op.vms[1:]] == [True, True]


async def test_resume_is_tried_until_it_takes(journal: JournalThread) -> None:
    scene = Scene(journal, "a")
    scene.driver.broken_resumes = [
        NotRunningYet("a", "not yet"),
        OSError("a bug"),
        NotRunningYet("a", "not yet"),
    ]
    op = await scene.run()
    assert op.end == "completed"
    assert op.vms[0].pause_s > 0.2
    assert scene.told() == [("VmFrozen", "a"), ("VmResumed", "a")]


async def test_abort_calls_off_the_freeze(journal: JournalThread) -> None:
    scene = Scene(journal, "a", "b")
    scene.driver.freeze_s = 1.5
    task = asyncio.create_task(scene.run())
    await scene.driver.freezing.wait()
    began = time.monotonic()
    scene.runner.abort("aborted", "enough")
    op = await task
    assert time.monotonic() - began < patient(1)
    # Both stood still without a confirmation, which is told and counted all the same.
    assert (op.end, op.failure) == ("failed", "aborted: enough")
    assert sorted(scene.told()) == sorted((kind, vm) for kind in ("VmFrozen", "VmResumed") for vm in "ab")


async def test_guard_lost_resumes_at_once(journal: JournalThread) -> None:
    scene = Scene(journal, "a", hold_s=5.0)
    task = asyncio.create_task(scene.run())
    await scene.driver.freezing.wait()
    began = time.monotonic()
    scene.guard.on_lost()
    op = await task
    assert time.monotonic() - began < patient(1)
    assert "the pause guard died" in op.failure


async def test_memory_that_changed(journal: JournalThread) -> None:
    scene = Scene(journal, "a", can_digest=True)
    scene.driver.digests = ["after", "before"]
    op = await scene.run()
    assert op.failure == "the memory of VM a changed while it was paused"
    fact: Any = scene.facts[-1]
    assert (fact.memory.ok, fact.memory.broken) == (False, ("digest_equal",))


@pytest.mark.parametrize(
    ("after", "held", "broken"),
    [("before", ("sampled_digest_equal",), ()), ("after", (), ("sampled_digest_equal",))],
)
async def test_memory_too_large_for_a_digest_is_sampled(
    journal: JournalThread, after: str, held: tuple[str, ...], broken: tuple[str, ...]
) -> None:
    scene = Scene(journal, "a", can_sample=True)
    scene.driver.samples = [after, "before"]
    op = await scene.run()
    assert (op.end == "completed") is bool(held)
    fact: Any = scene.facts[-1]
    assert (fact.memory.held, fact.memory.broken) == (held, broken)


@pytest.mark.parametrize(("sampled", "held"), [(True, ("sampled_digest_equal",)), (None, ())])
async def test_what_a_swap_compared_is_reported(
    journal: JournalThread, sampled: bool | None, held: tuple[str, ...]
) -> None:
    scene = Scene(journal, "a", method="swap", hold_s=0.0)
    scene.driver.sampled = (sampled, "128 pages" if sampled else "reading memory is not permitted")
    assert (await scene.run()).end == "completed", "whether that is enough is the rollout's policy"
    fact: Any = scene.facts[-1]
    assert fact.memory.held == held
    assert scene.driver.sampled[1] in fact.memory.detail


async def test_a_swap_into_other_memory_says_so(journal: JournalThread) -> None:
    scene = Scene(journal, "a", method="swap", hold_s=0.0)
    at = time.monotonic()
    scene.driver.hand_overs["a"] = SwapFailed(
        "a", "the page at 4096 differs; it is back", frozen_at=at, resumed_at=at + 0.1, differs="at 4096"
    )
    op = await scene.run()
    assert op.end == "failed"
    fact: Any = scene.facts[-1]
    assert fact.memory.broken == ("sampled_digest_equal",)


async def test_somebody_else_resumed_it(journal: JournalThread) -> None:
    scene = Scene(journal, "a", "b", hold_s=5.0)
    task = asyncio.create_task(scene.run())
    async with asyncio.timeout(patient(5)):
        while len(scene.facts) < 2:  # noqa: ASYNC110 - the facts are a list
            await asyncio.sleep(0.005)
    scene.driver.vms["a"] = "running"
    op = await task
    assert "VM a ran although it was paused" in op.failure


async def test_a_vm_that_somebody_else_has_is_left_and_said_so(journal: JournalThread) -> None:
    """Paused by its operator before the freeze, or migrated away in it: the others run, and it is not announced."""
    scene = Scene(journal, "a", "b")
    scene.driver.left["a"] = "it was migrated away"
    async with asyncio.timeout(10):
        op = await scene.runner.run()
    assert (op.end, op.failure) == ("failed", "VM a was not resumed: it was migrated away")
    assert op.vms[0].end == "left"
    assert op.vms[0].resumed_by == "nobody"
    assert op.vms[0].error == "was not resumed: it was migrated away"
    assert scene.driver.vms["b"] == "running"
    assert ("VmResumed", "a") not in scene.told()
    assert ("VmResumed", "b") in scene.told()


async def test_a_vm_that_was_paused_already_does_not_count_as_paused_by_us(journal: JournalThread) -> None:
    scene = Scene(journal, "a")
    scene.driver.vms["a"] = "paused"
    scene.driver.broken_freezes["a"] = FreezeFailed("a", "was paused by somebody else")
    scene.driver.left["a"] = "was paused by somebody else"
    async with asyncio.timeout(10):
        op = await scene.runner.run()
    assert op.failure == "VM a could not be frozen: was paused by somebody else"
    assert scene.told() == []
    assert scene.driver.vms["a"] == "paused"


async def test_guests_are_swapped_one_after_the_other_each_paused_for_milliseconds(
    journal: JournalThread,
) -> None:
    scene = Scene(journal, "a", "b", "c", method="swap")
    op = await scene.run()
    assert (op.end, op.failure) == ("completed", "")
    assert scene.driver.swapped == ["a", "b", "c"]
    assert [vm.pause_s for vm in op.vms] == pytest.approx([0.004] * 3)
    assert {vm.detail for vm in op.vms} == {"B, was A"}
    assert scene.told() == [(kind, vm) for vm in "abc" for kind in ("VmFrozen", "VmResumed")]
    assert sorted(scene.driver.released) == ["a", "b", "c"]


async def test_one_vm_that_cannot_be_prepared_stops_the_swap_before_anything_pauses(
    journal: JournalThread,
) -> None:
    for error in (DriverError("b", "machine type pc-q35-9.9 is not known"), ZeroDivisionError("a bug")):
        scene = Scene(journal, "a", "b", method="swap")
        scene.driver.broken_prepares["b"] = error
        op = await scene.run()
        assert op.end == "failed"
        assert op.failure.startswith("nothing was frozen: VM b cannot swap: ")
        assert (scene.guard.armed, scene.driver.swapped, scene.told()) == ([], [], [])
        assert sorted(scene.driver.released) == ["a", "b"]


async def test_a_failed_swap_leaves_the_rest_where_they_are_and_is_told_with_its_pause(
    journal: JournalThread,
) -> None:
    scene = Scene(journal, "a", "b", "c", method="swap")
    now = time.monotonic()
    scene.driver.hand_overs["b"] = SwapFailed(
        "b", "QEMU: no such device", frozen_at=now + 5, resumed_at=now + 5.02
    )
    op = await scene.run()
    assert op.end == "failed"
    assert op.failure == "VM b was not swapped: QEMU: no such device"
    assert scene.driver.swapped == ["a"]
    assert [vm for kind, vm in scene.told() if kind == "VmResumed"] == ["a", "b"]
    assert "not begun" in op.vms[2].error
    assert [vm.pause_s > 0 for vm in op.vms] == [True, True, False]


async def test_abort_in_the_middle_of_a_swap(journal: JournalThread) -> None:
    scene = Scene(journal, "a", "b", method="swap")
    scene.driver.hand_overs["a"] = asyncio.Event()
    task = asyncio.create_task(scene.run())
    await scene.driver.freezing.wait()
    scene.runner.abort("aborted", "enough")
    op = await task
    assert (op.end, op.failure) == ("failed", "aborted: enough")
    assert scene.driver.swapped == []
    assert scene.told() == [("VmFrozen", "a"), ("VmResumed", "a")]


async def test_replace_prepares_then_checkpoints_then_restores(journal: JournalThread) -> None:
    scene = Scene(journal, "a", "b", method="replace")
    op = await scene.run()
    assert op.end == "completed"
    assert sorted(scene.driver.checkpointed) == ["a", "b"]
    assert {vm.detail for vm in op.vms} == {"process B, was process A"}
    assert sorted(scene.driver.released) == ["a", "b"]


# -- another kernel under paused VMs --------------------------------------------------------------------------


async def test_a_host_that_could_not_leave_its_kernel_resumes_its_vms_under_it(
    journal: JournalThread,
) -> None:
    scene = Scene(journal, "a", "b", method="kexec")
    scene.guard.no_jump = GuardUnavailable("no kernel is loaded")
    op = await scene.run()
    assert (op.end, op.codes) == ("failed", ("leave_failed",))
    assert op.failure == "kernel 6.1.0-9-amd64 was not started: no kernel is loaded"
    assert sorted(scene.driver.checkpointed) == ["a", "b"]
    assert sorted(scene.driver.released) == ["a", "b"]
    assert scene.guard.asked_to_leave == 1
    assert scene.published == [2], "the broker has every `frozen` before the jump"
    assert scene.guard.change == KernelChange("6.1.0-9-amd64", "/carve-out")
    assert [run.outcome for run in op.runs] == ["succeeded"]


async def test_a_guard_that_returns_from_a_jump_did_not_jump(journal: JournalThread) -> None:
    op = await Scene(journal, "a", method="kexec").run()
    assert op.codes == ("leave_failed",)
    assert "this kernel still runs" in op.failure


@pytest.mark.parametrize("wrong", ["none is loaded", RuntimeError("a bug")])
async def test_a_kernel_that_is_not_ready_freezes_nothing(
    journal: JournalThread, wrong: str | Exception
) -> None:
    scene = Scene(journal, "a", method="kexec")
    scene.kernels.wrong = wrong
    op = await scene.run()
    assert op.end == "failed"
    assert "nothing was frozen" in op.failure or "a bug" in op.failure
    assert not scene.driver.freezing.is_set()
    assert not scene.guard.armed
    assert not scene.guard.asked_to_leave


async def test_one_vm_that_is_not_saved_keeps_the_host_in_its_kernel(journal: JournalThread) -> None:
    scene = Scene(journal, "a", "b", method="kexec")
    scene.driver.broken_freezes["b"] = FreezeFailed("b", "its state was not saved")
    op = await scene.run()
    assert op.codes == ("freeze_failed",)
    assert not scene.guard.asked_to_leave


async def test_a_journal_that_the_disk_refuses_keeps_the_host_in_its_kernel(
    journal: JournalThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    scene = Scene(journal, "a", method="kexec")
    real = journal.do

    async def do(work: Callable[[Any], Any]) -> Any:
        if scene.published:
            raise StoreError("the disk is full")
        return await real(work)

    monkeypatch.setattr(journal, "do", do)
    op = await scene.run()
    assert op.codes == ("leave_failed",)
    assert "its journal is not on the disk: the disk is full" in op.failure
    assert not scene.guard.asked_to_leave


@pytest.mark.parametrize("state", ["running", "paused", "unknown"])
async def test_a_vm_that_was_started_since_keeps_the_kernel(journal: JournalThread, state: VmState) -> None:
    """It is in no file, and would end with the kernel; the others are not even paused."""
    scene = Scene(journal, "a", method="kexec")
    scene.driver.vms["late"] = state
    async with asyncio.timeout(patient(10)):
        op = await scene.runner.run()
    assert op.codes == ("kernel_not_ready",)
    assert f"VM late is {state}" in op.failure
    assert scene.driver.frozen == []


async def test_a_vm_that_is_started_in_the_pause_keeps_the_kernel(journal: JournalThread) -> None:
    scene = Scene(journal, "a", method="kexec")
    scene.driver.on_first = lambda: scene.driver.vms.update(late="running")
    op = await scene.run()
    assert op.codes == ("leave_failed",)
    assert "VM late is running" in op.failure
    assert not scene.guard.asked_to_leave


async def test_states_that_cannot_be_read_keep_the_kernel(journal: JournalThread) -> None:
    scene = Scene(journal, "a", method="kexec")

    async def nothing() -> Mapping[str, VmState]:
        return {}

    scene.driver.read_states = nothing  # type: ignore[method-assign]
    op = await scene.run()
    assert op.codes == ("kernel_not_ready",)
    assert "cannot be read" in op.failure


@pytest.mark.parametrize("absent", [False, True])
async def test_who_was_not_paused_by_it_is_told_to_the_guard_before_the_disarm(
    journal: JournalThread, absent: bool
) -> None:
    """Somebody else paused it: the guard, and a later life of ours, would resume it."""
    scene = Scene(journal, "a", "b")
    scene.driver.broken_freezes["a"] = FreezeFailed("a", "it was paused by somebody else", untouched=True)
    scene.driver.left["a"] = "it was paused by somebody else"
    if absent:
        scene.driver.on_first = lambda: setattr(scene.guard, "broken", GuardUnavailable("it has died"))
    op = await scene.run()
    assert scene.guard.dropped == ([] if absent else ["a"])
    assert scene.markers.said[:2] == ["write", "remove"]
    assert "a" not in scene.markers.marked
    assert {vm.vm: vm.end for vm in op.vms} == {"a": "left", "b": "running"}


async def test_a_guard_that_hangs_delays_no_resume_of_the_others(journal: JournalThread) -> None:
    """It was asked, and waited for, before the freeze that failed was reported: the others stayed paused meanwhile."""
    scene = Scene(journal, "a", "b")
    scene.driver.broken_freezes["a"] = FreezeFailed("a", "it was paused by somebody else", untouched=True)
    scene.driver.left["a"] = "it was paused by somebody else"
    answered = asyncio.Event()

    async def hang(operation: str, vms: Sequence[str]) -> None:
        await answered.wait()
        scene.guard.dropped += vms

    disarm, disarmed = scene.guard.disarm, list[list[str]]()

    async def record(operation: str) -> Intent | None:
        disarmed.append(list(scene.guard.dropped))
        return await disarm(operation)

    resume, runs = scene.driver.resume, asyncio.Event()

    async def resume_and_say(vm: str, timeout_s: float) -> Literal["running", "gone", "left"]:
        end = await resume(vm, timeout_s)
        if vm == "b":
            runs.set()
        return end

    scene.guard.drop, scene.guard.disarm = hang, record  # type: ignore[method-assign]
    scene.driver.resume = resume_and_say  # type: ignore[method-assign]
    running = asyncio.create_task(scene.runner.run())
    await asyncio.wait_for(runs.wait(), patient(10))
    assert not disarmed, "a guard that is released resumes whom it still has"
    answered.set()
    await running
    assert disarmed == [["a"]]


@pytest.mark.parametrize("why", ["aborted", "lost"])
async def test_an_operation_that_ends_before_its_first_freeze_leaves_every_vm_to_whoever_paused_it(
    journal: JournalThread, why: str
) -> None:
    """The guard would resume a VM that its operator has paused since the admission."""
    scene = Scene(journal, "a", "b")
    arm, disarm, dropped = scene.guard.arm, scene.guard.disarm, list[list[str]]()

    async def late(
        operation: str, deadline: float, plans: Sequence[ResumePlan], change: KernelChange | None = None
    ) -> None:
        await arm(operation, deadline, plans, change)
        if why == "aborted":
            scene.runner.abort("aborted", "enough")
            return
        raise GuardUnavailable("its answer was lost")

    async def record(operation: str) -> Intent | None:
        dropped.append(list(scene.guard.dropped))
        return await disarm(operation)

    scene.guard.arm, scene.guard.disarm = late, record  # type: ignore[method-assign]
    op = await scene.run()
    assert op.end == ("cancelled" if why == "aborted" else "failed")
    assert not scene.driver.freezing.is_set()
    assert dropped == [["a", "b"]]


async def test_who_was_left_is_told_to_the_guard_before_the_disarm(journal: JournalThread) -> None:
    """As one that was paused by an I/O error in its pause, or migrated away."""
    scene = Scene(journal, "a", "b")
    scene.driver.on_first = lambda: scene.driver.left.update(a="libvirt is migrating it")
    op = await scene.runner.run()
    assert {vm.vm: vm.end for vm in op.vms} == {"a": "left", "b": "running"}
    assert scene.guard.dropped == ["a"]
