"""The guard's decisions, with VMs that are made up and a clock that stands still until told."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from typing import Any

import pytest

from caesura_testing.patience import patient
from caesura_vmcontrol.freezer_control import Condition
from caesura_vmcontrol.intent import GuardAction, Intent, Intervention, UnreadableIntent
from caesura_vmcontrol.kernel_change import Arrival, HostClock, KernelChange
from caesura_vmcontrol.plan_errors import BadPlan
from caesura_vmcontrol.procfs import Process
from caesura_vmcontrol.qemu_plans import QemuPlan, Vmm
from caesura_vmcontrol.resume_plans import CgroupPlan, ResumePlan, SignalPlan, plan_from_json, plan_to_json
from caesura_vmcontrol.watchdog import GuardRefusal, Watchdog


def no_log(event: str, **facts: object) -> None:
    """Nobody reads it here."""


class World:
    """Two VMs, a disk, a clock."""

    def __init__(self) -> None:
        self.now = 100.0
        self.vms: dict[str, Condition] = {"a": "running", "b": "running"}
        self.stubborn: set[str] = set()
        self.disk: dict[str, Any] | None = None
        self.full = False
        self.unreadable: set[str] = set()
        self.watch = Watchdog(self, no_log, clock=lambda: self.now, look=self.look, release=self.release)

    def look(self, plan: ResumePlan, _: Mapping[int, Process] | None) -> Condition:
        if plan.vm in self.unreadable:
            raise OSError("cannot tell")
        return self.vms[plan.vm]

    def release(self, plan: ResumePlan, _: Mapping[int, Process] | None) -> None:
        if plan.vm in self.stubborn:
            raise OSError("will not")
        if self.vms[plan.vm] != "gone":
            self.vms[plan.vm] = "running"

    def store(self, intent: Intent) -> None:
        if self.full:
            raise OSError(28, "No space left on device")
        self.disk = intent.to_json()

    def clear(self) -> None:
        self.disk = None

    def intent(self, operation: str = "op") -> Intent:
        plans = tuple(CgroupPlan(vm, "cgroup2", f"/sys/fs/cgroup/x/{vm}/cgroup.freeze") for vm in self.vms)
        return Intent(operation, "boot", self.now, self.now + 10, plans)

    def freeze(self) -> None:
        self.vms = dict.fromkeys(self.vms, "frozen")


def state(world: World) -> str:
    """The watch's state, read anew (mypy would remember the last answer)."""
    return world.watch.state


def written(world: World) -> dict[str, Any]:
    """What is on the disk."""
    assert world.disk is not None
    return world.disk


def test_not_armed_if_the_disk_is_full() -> None:
    world = World()
    world.full = True
    with pytest.raises(GuardRefusal, match="No space left"):
        world.watch.arm(world.intent())
    assert state(world) == "ready"


@pytest.mark.parametrize("deadline", [99.0, 100.0])
def test_an_operation_whose_deadline_has_passed_is_not_taken(deadline: float) -> None:
    """Whoever arms so late was stopped, or reads another clock; armed, it would begin to freeze (I2)."""
    world = World()
    late = world.intent()
    late.deadline = deadline
    with pytest.raises(GuardRefusal, match="deadline has passed"):
        world.watch.arm(late)
    assert (state(world), world.disk) == ("ready", None)


def test_fires_at_the_deadline_not_before() -> None:
    world = World()
    world.watch.arm(world.intent())
    world.freeze()
    world.now = 109.9
    assert world.watch.step() == pytest.approx(0.1)
    assert world.vms == {"a": "frozen", "b": "frozen"}
    world.now = 110.0
    world.watch.step()
    assert world.vms == {"a": "running", "b": "running"}
    assert state(world) == "fired"
    assert world.disk is not None
    assert world.disk["fired"]["vms"]["a"] == {
        "was_frozen": True,
        "frozen_after": None,
        "running_at": 110.0,
        "end": "running",
        "owner": "",
    }


def test_stubborn_vm_is_tried_until_it_runs_and_the_others_do_not_wait() -> None:
    world = World()
    world.watch.arm(world.intent())
    world.freeze()
    world.stubborn = {"a"}
    world.watch.owner_gone(dead=True)
    assert world.vms == {"a": "frozen", "b": "running"}
    assert state(world) == "firing"
    assert (world.watch.step() or 1) < 0.01
    with pytest.raises(GuardRefusal, match="not running yet: a"):
        world.watch.disarm("op")
    world.stubborn = set()
    world.now = 130.0
    world.watch.step()
    assert state(world) == "fired"
    assert world.watch.step() is None  # the owner is dead: nobody is left who could freeze
    record = world.watch.disarm("op")
    assert record is not None
    assert record["fired"]["vms"]["a"]["running_at"] == 130.0
    assert record["fired"]["vms"]["b"]["running_at"] == 100.0


def test_cannot_tell_counts_as_standing_still() -> None:
    world = World()
    world.watch.arm(world.intent())
    world.unreadable = {"a"}
    world.now = 120.0
    world.watch.step()
    assert state(world) == "firing"


def test_enforces_until_the_owner_acknowledges() -> None:
    world = World()
    world.watch.arm(world.intent())
    world.now = 110.0
    world.watch.step()
    assert state(world) == "fired"
    world.now = 170.0
    assert world.watch.step() is not None
    world.vms["b"] = "frozen"  # a late freeze call
    world.now = 170.1
    world.watch.step()
    assert world.vms["b"] == "running"
    record = world.watch.disarm("op")
    assert record is not None
    assert record["fired"]["vms"]["b"]["frozen_after"] == 170.0
    assert world.disk is None


def test_record_is_written_when_the_disk_has_room_again() -> None:
    world = World()
    world.watch.arm(world.intent())
    world.freeze()
    world.full = True
    world.watch.owner_gone(dead=True)
    assert world.vms == {"a": "running", "b": "running"}  # the disk is no reason to wait
    assert written(world)["fired"] is None
    assert world.watch.step() is not None
    world.full = False
    world.now += 2
    world.watch.step()
    assert written(world)["fired"]["why"] == "the host updater died"


def test_found_at_start_with_a_record_keeps_what_was_written() -> None:
    world = World()
    intent = world.intent()
    intent.fired = GuardAction(
        "the deadline passed",
        90.0,
        {"a": Intervention(True, None, 90.1, "running"), "b": Intervention(False)},
    )
    world.vms["b"] = "frozen"
    world.watch.adopt(intent)
    assert world.vms["b"] == "running"
    assert world.watch.intent is not None
    fired = world.watch.intent.fired
    assert fired is not None
    assert (fired.why, fired.at, fired.vms["a"].running_at) == ("the deadline passed", 90.0, 90.1)
    assert fired.vms["b"].was_frozen


def test_disarm_of_another_operation_changes_nothing() -> None:
    world = World()
    world.watch.arm(world.intent())
    assert world.watch.disarm("other") is None
    assert state(world) == "armed"
    with pytest.raises(GuardRefusal, match="op is armed"):
        world.watch.arm(world.intent("other"))
    assert world.watch.disarm("op") is None
    assert world.watch.step() is None


def test_plans_and_intents_survive_json() -> None:
    plans = (CgroupPlan("a", "cgroup1", "/sys/fs/cgroup/f/a/freezer.state"), SignalPlan("b", 9, 8, ((7, 6),)))
    for plan in plans:
        assert plan_from_json(plan_to_json(plan)) == plan
    intent = Intent(
        "op", "boot", 1.0, 2.0, plans, GuardAction("why", 2.0, {"a": Intervention(True, 1.5, 2.5, "running")})
    )
    assert Intent.from_json(intent.to_json()) == intent
    bad: Any
    for bad in ({}, {**intent.to_json(), "format": 2}, {**intent.to_json(), "plans": [{}]}, [], None):
        with pytest.raises(UnreadableIntent):
            Intent.from_json(bad)
    with pytest.raises(BadPlan):
        SignalPlan("x", 1, 5)


def test_members_of_a_signal_vm() -> None:
    def process(pid: int, ppid: int, session: int, start: int, state: str = "S") -> Process:
        return Process(pid, ppid, session, state, start)

    table = {
        each.pid: each
        for each in (
            process(10, 1, 10, 5),
            process(11, 10, 10, 6),
            process(12, 11, 12, 7),  # left the session, still a descendant
            process(13, 1, 10, 8),  # in the session, re-parented
            process(99, 1, 99, 5),
            process(50, 1, 50, 9),  # remembered
            process(51, 1, 51, 99),  # its pid was remembered, but it is another one
        )
    }
    plan = SignalPlan("v", 10, 5, ((50, 9), (51, 1)))
    assert {each.pid for each in plan.members(table)} == {10, 11, 12, 13, 50}
    # A stranger with the leader's pid: nothing but what was remembered is ours.
    recycled = {**table, 10: process(10, 1, 10, 77)}
    assert {each.pid for each in plan.members(recycled)} == {50}


def test_guard_needs_nothing_but_the_standard_library() -> None:
    code = (
        "import sys; import caesura_pause_guard.__main__;"
        "print([name for name in sys.modules if name.split('.')[0] in "
        "('msgspec', 'structlog', 'aiohttp', 'aiomqtt', 'prometheus_client', 'caesura', 'asyncio', 'sqlite3')])"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert told.stdout.strip() == "[]"


class Hanging(World):
    """A world in which the kernel does not answer for VM ``a`` until the test lets it."""

    def __init__(self, *calls: str) -> None:
        self.answers = threading.Event()
        self.hangs = calls
        self.begun: list[str] = []
        super().__init__()

    def look(self, plan: ResumePlan, table: Mapping[int, Process] | None) -> Condition:
        self._hang("look", plan)
        return super().look(plan, table)

    def release(self, plan: ResumePlan, table: Mapping[int, Process] | None) -> None:
        self._hang("release", plan)
        super().release(plan, table)

    def _hang(self, what: str, plan: ResumePlan) -> None:
        if plan.vm == "a" and what in self.hangs:
            self.begun.append(what)
            self.answers.wait()


@pytest.mark.parametrize("hangs", ["look", "release"])
def test_a_vm_whose_cgroup_hangs_does_not_keep_the_others_frozen(hangs: str) -> None:
    """A blocking call would never return here: the other VM comes second in the sweep."""
    world = Hanging(hangs)
    world.watch.arm(world.intent())
    world.freeze()
    world.now += 10
    world.watch.step()
    assert world.vms["b"] == "running"
    assert state(world) == "firing"
    for _ in range(20):
        world.watch.step()
    assert len(world.begun) == 1, "one call at a time: no threads that pile up"
    with pytest.raises(GuardRefusal, match="not running yet: a"):
        world.watch.disarm("op")
    world.answers.set()
    world.hangs = ()
    until = time.monotonic() + 20
    while state(world) != "fired":
        assert time.monotonic() < until
        world.watch.step()
    assert world.vms["a"] == "running"
    assert world.watch.disarm("op") is not None


def test_a_disk_that_hangs_keeps_no_vm_frozen_and_its_record_is_written_later() -> None:
    world = World()
    world.watch.arm(world.intent())
    disk, stored = threading.Event(), world.store

    def slow(intent: Intent) -> None:
        disk.wait()
        stored(intent)

    world.store = slow  # type: ignore[method-assign]
    world.freeze()
    world.now += 10
    world.watch.step()
    assert set(world.vms.values()) == {"running"}
    world.freeze()  # an updater that was stopped before its freeze call wakes up
    world.watch.step()
    assert set(world.vms.values()) == {"running"}
    with pytest.raises(GuardRefusal, match="still being written"):
        world.watch.disarm("op")
    disk.set()
    until = time.monotonic() + 20
    while True:
        assert time.monotonic() < until
        with suppress(GuardRefusal):
            assert world.watch.disarm("op") is not None
            break
    assert world.disk is None


class Qemu(World):
    """``a`` is a QEMU guest, ``b`` a process guest. The clock moves with each step; a look can be held after it has looked."""

    def __init__(self) -> None:
        self.released: list[str] = []
        self._looks: list[str] = []
        self.looked = threading.Event()
        self.answers = threading.Event()
        self.answers.set()
        super().__init__()

    def look(self, plan: ResumePlan, table: Mapping[int, Process] | None) -> Condition:
        found = super().look(plan, table)
        self._looks.append(plan.vm)
        if plan.vm == "a":
            self.looked.set()
            self.answers.wait(patient(20))
        return found

    def release(self, plan: ResumePlan, table: Mapping[int, Process] | None) -> None:
        super().release(plan, table)
        self.released.append(plan.vm)

    def looks_at(self, vm: str) -> int:
        return self._looks.count(vm)

    def intent(self, operation: str = "op") -> Intent:
        made = super().intent(operation)
        made.plans = (QemuPlan("a", Vmm(4711, 5, "/run/x")), *made.plans[1:])
        return made

    def until(self, holds: Callable[[], bool], step_s: float = 0.2) -> None:
        """Serve until it holds; each step is ``step_s`` seconds later than the last one."""
        until = time.monotonic() + patient(20)
        while not holds():
            assert time.monotonic() < until
            self.watch.step()
            self.now += step_s
            time.sleep(0.001)  # the rounds are threads

    def fire(self) -> None:
        """Armed and fired; everything runs, and the last look was just now."""
        self.watch.arm(self.intent())
        self.now += 10
        self.until(lambda: state(self) == "fired", 0)
        self.until(lambda: not self.watch._probes.under_way, 0)

    def hold_a_look(self) -> None:
        """A round of ``a`` has looked already, and has not ended."""
        self.looked.clear()
        self.answers.clear()
        self.until(self.looked.is_set)


@pytest.fixture
def qemu() -> Iterator[Qemu]:
    """No thread of it hangs when the test is over."""
    made = Qemu()
    yield made
    made.answers.set()


def test_the_owners_last_act_is_undone_however_short_ago_the_last_look_was(qemu: Qemu) -> None:
    qemu.fire()
    qemu.vms["a"] = "frozen"
    qemu.watch.owner_gone(dead=True)
    qemu.until(lambda: qemu.vms["a"] == "running")
    qemu.until(lambda: state(qemu) == "fired")
    assert qemu.watch.disarm("op") is not None


def test_a_look_from_before_the_owners_death_is_not_the_last_one(qemu: Qemu) -> None:
    qemu.fire()
    qemu.hold_a_look()
    qemu.vms["a"] = "frozen"
    qemu.watch.owner_gone(dead=True)
    assert state(qemu) == "firing"
    qemu.now += 60  # it ends when nothing that the owner asked for is waited for any more
    qemu.answers.set()
    qemu.until(lambda: qemu.vms["a"] == "running")
    qemu.until(lambda: state(qemu) == "fired")


def test_it_does_not_rest_before_the_look_after_the_owners_death_has_ended(qemu: Qemu) -> None:
    qemu.fire()
    qemu.looked.clear()
    qemu.answers.clear()
    qemu.watch.owner_gone(dead=True)
    assert qemu.looked.wait(patient(20))
    qemu.now += 60
    assert (state(qemu), qemu.watch.at_rest) == ("firing", False)
    qemu.answers.set()
    qemu.until(lambda: qemu.watch.at_rest)
    assert state(qemu) == "fired"
    assert qemu.watch.step() is None


def test_what_the_owner_began_and_takes_effect_after_its_death_is_undone(qemu: Qemu) -> None:
    """QEMU ends a migration that it was asked for, and the guest is paused then; nobody asks it to continue."""
    qemu.fire()
    qemu.watch.owner_gone(dead=True)
    qemu.until(lambda: state(qemu) == "fired", 0)
    qemu.vms["a"] = "frozen"
    assert not qemu.watch.at_rest
    qemu.until(lambda: qemu.vms["a"] == "running")
    qemu.until(lambda: qemu.watch.at_rest)


def test_a_stop_signal_that_is_still_pending_at_the_owners_death_is_taken_back() -> None:
    """The kernel says *running* until a thread has acted on SIGSTOP; SIGCONT removes what is pending (signal(7))."""
    world = World()
    pending: set[str] = set()
    released = world.release

    def release(plan: ResumePlan, table: Mapping[int, Process] | None) -> None:
        pending.discard(plan.vm)
        released(plan, table)

    world.watch = Watchdog(world, no_log, clock=lambda: world.now, look=world.look, release=release)
    world.watch.arm(world.intent())
    world.now += 10
    world.watch.step()
    pending = {"a", "b"}
    world.watch.owner_gone(dead=True)
    assert not pending


def test_a_disarm_looks_again_however_short_ago_the_last_look_was(qemu: Qemu) -> None:
    qemu.fire()
    qemu.vms["a"] = "frozen"
    with suppress(GuardRefusal):
        qemu.watch.disarm("op")
    assert qemu.vms["a"] == "running" or state(qemu) == "firing"
    qemu.until(lambda: state(qemu) in ("fired", "ready"))
    assert qemu.vms["a"] == "running"


def test_the_look_of_a_disarm_is_no_decision(qemu: Qemu) -> None:
    """It only looks; what fires then has to bring the operation of each guest to a decision before it is over."""
    qemu.watch.arm(qemu.intent())
    qemu.vms["b"] = "frozen"
    qemu.answers.clear()
    with pytest.raises(GuardRefusal, match="not running yet: a"):
        qemu.watch.disarm("op")
    assert qemu.released == ["b"]
    qemu.answers.set()
    until = time.monotonic() + patient(20)
    while state(qemu) != "ready":
        assert time.monotonic() < until
        with suppress(GuardRefusal):
            qemu.watch.disarm("op")
    assert "a" in qemu.released


def test_a_disarm_that_nobody_has_answered_yet_is_no_reason_to_act(qemu: Qemu) -> None:
    """A daemon of libvirt's that is slow needs longer for its answers than a disarm may take."""
    qemu.watch.arm(qemu.intent())
    qemu.answers.clear()
    for _ in range(2):
        with pytest.raises(GuardRefusal, match="nobody has said yet whether it runs: a"):
            qemu.watch.disarm("op")
    assert state(qemu) == "armed"
    qemu.answers.set()
    qemu.until(lambda: _is_disarmed(qemu), 0)
    assert (qemu.released, qemu.disk) == ([], None)


def _is_disarmed(world: World) -> bool:
    with suppress(GuardRefusal):
        assert world.watch.disarm("op") is None
        return True
    return False


def test_a_disarm_that_nobody_answers_ends_at_the_deadline(qemu: Qemu) -> None:
    qemu.watch.arm(qemu.intent())
    qemu.answers.clear()
    with pytest.raises(GuardRefusal):
        qemu.watch.disarm("op")
    qemu.vms["a"] = "frozen"
    qemu.answers.set()
    qemu.now += 10
    qemu.until(lambda: state(qemu) == "fired", 0)
    assert qemu.vms["a"] == "running"


def test_vms_that_are_asked_need_not_answer_in_one_round(qemu: Qemu) -> None:
    """Else two slow ones that take turns would keep an operation armed."""
    intent = qemu.intent()
    intent.plans = (*intent.plans, QemuPlan("c", Vmm(4712, 5, "/run/y")))
    qemu.vms["c"] = "running"
    qemu.watch.arm(intent)
    qemu.answers.clear()
    with pytest.raises(GuardRefusal, match=r"runs: a$"):
        qemu.watch.disarm("op")
    looks = qemu.looks_at("c")
    with pytest.raises(GuardRefusal, match=r"runs: a$"):
        qemu.watch.disarm("op")
    assert qemu.looks_at("c") == looks
    qemu.answers.set()
    qemu.until(lambda: _is_disarmed(qemu), 0)


def test_found_at_start_with_a_record_a_guest_that_is_frozen_again_is_not_at_its_end() -> None:
    world = World()
    intent = world.intent()
    intent.fired = GuardAction(
        "the deadline passed", 90.0, {vm: Intervention(False, None, 90.1, "running") for vm in ("a", "b")}
    )
    world.vms["a"] = "frozen"
    world.stubborn = {"a"}
    world.watch.adopt(intent)
    assert state(world) == "firing"
    world.stubborn = set()
    world.watch.step()
    assert world.vms["a"] == "running"
    record = world.watch.disarm("op")
    assert record is not None
    assert record["fired"]["at"] == 90.0
    assert record["fired"]["vms"]["a"] == {
        "was_frozen": True,
        "frozen_after": 90.1,
        "running_at": 100.0,
        "end": "running",
        "owner": "",
    }
    assert record["fired"]["vms"]["b"]["running_at"] == 90.1


def test_found_at_start_with_a_record_a_qemu_guest_is_looked_at_before_it_rests(qemu: Qemu) -> None:
    intent = qemu.intent()
    intent.fired = GuardAction(
        "the deadline passed", 90.0, {vm: Intervention(False, None, 90.1, "running") for vm in ("a", "b")}
    )
    qemu.answers.clear()
    qemu.watch.adopt(intent)
    assert state(qemu) == "firing"
    qemu.answers.set()
    qemu.until(lambda: state(qemu) == "fired")


def test_a_guest_that_a_round_leaves_paused_is_not_at_its_end() -> None:
    """It ran at the round's first look, and does not at its last one."""
    first: list[Condition] = ["running", "frozen"]
    seen = iter(first)
    vms: dict[str, Condition] = {"a": "running"}
    world = World()

    def look(plan: ResumePlan, _: Mapping[int, Process] | None) -> Condition:
        return next(seen, vms[plan.vm])

    world.watch = Watchdog(world, no_log, clock=lambda: world.now, look=look, release=lambda *_: None)
    intent = Intent("op", "boot", 90.0, 99.0, (QemuPlan("a", Vmm(4711, 5, "/run/x")),))
    world.watch.adopt(intent)
    until = time.monotonic() + patient(20)
    while not intent.fired or not intent.fired.vms["a"].was_frozen:
        assert time.monotonic() < until
        world.watch.step()
        world.now += 0.2
        time.sleep(0.001)


def test_a_process_table_that_cannot_be_read_does_not_end_the_guard(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> Mapping[int, Process]:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr("caesura_vmcontrol.watchdog.process_table", refuse)
    world = World()
    intent = world.intent()
    intent.plans = (*intent.plans[:1], SignalPlan("b", 4711, 5))
    world.freeze()
    world.watch.adopt(intent)
    assert world.vms == {"a": "running", "b": "running"}


@pytest.mark.parametrize("how", ["killed", "found at the start"])
def test_a_rehearsal_whose_command_is_dead_keeps_nobody_out(how: str) -> None:
    """Nobody knows of it who could acknowledge it, and it has paused nothing."""
    world = World()
    change = KernelChange("6.1", "/carve-out", rehearsal=True)
    rehearsal = Intent("rehearsal-1", "boot", world.now, world.now + 10, (), kernel_change=change)
    if how == "killed":
        world.watch.arm(rehearsal)
        world.watch.owner_gone(dead=True)
    else:
        world.watch.adopt(rehearsal)
    assert world.watch.state == "ready"
    assert world.disk is None
    world.watch.arm(world.intent())


def test_a_rehearsal_that_arrived_waits_for_who_measures_it() -> None:
    world = World()
    arrival = Arrival("boot", "6.1", "unit", HostClock("tsc", 0.0, 0.0), 1.0)
    change = KernelChange("6.1", "/carve-out", rehearsal=True, arrival=arrival)
    world.watch.adopt(Intent("rehearsal-1", "former", 0.0, 1.0, (), kernel_change=change))
    assert world.watch.state == "fired"


def test_a_vm_that_the_operation_did_not_pause_is_left_as_it_is() -> None:
    """Somebody else paused it: neither the disarm nor the deadline nor the updater's death resumes it."""
    for end in ("disarm", "deadline", "death", "restart"):
        world = World()
        world.watch.arm(world.intent())
        world.vms["a"] = "frozen"
        world.watch.drop("op", ["a"])
        assert [plan["vm"] for plan in written(world)["plans"]] == ["b"], "durably"
        match end:
            case "disarm":
                assert world.watch.disarm("op") is None
            case "deadline":
                world.now += 11
                world.watch.step()
            case "death":
                world.watch.owner_gone(dead=True)
            case _:
                world.watch.adopt(Intent.from_json(written(world)))
        assert world.vms == {"a": "frozen", "b": "running"}, end


def test_what_is_dropped_is_of_this_operation_and_before_it_fired() -> None:
    world = World()
    with pytest.raises(GuardRefusal, match="not armed"):
        world.watch.drop("op", ["a"])
    world.watch.arm(world.intent())
    with pytest.raises(GuardRefusal, match="not armed"):
        world.watch.drop("another", ["a"])
    world.watch.fire("test")
    with pytest.raises(GuardRefusal, match="fired already"):
        world.watch.drop("op", ["a"])
    assert [plan["vm"] for plan in written(world)["plans"]] == ["a", "b"]


def test_an_operation_of_which_all_is_dropped_is_released_without_a_look() -> None:
    """Nothing of it was frozen: who is paused, or cannot be looked at, is somebody else's."""
    world = World()
    world.watch.arm(world.intent())
    world.freeze()
    world.unreadable = {"b"}
    world.watch.drop("op", ["a", "b"])
    assert world.watch.disarm("op") is None
    assert world.vms == {"a": "frozen", "b": "frozen"}
    assert (state(world), world.disk) == ("ready", None)


def test_a_full_disk_does_not_make_a_dropped_vm_the_operations_again() -> None:
    """It is told: a guard that is started again would take it for one."""
    world = World()
    world.watch.arm(world.intent())
    world.vms["a"] = "frozen"
    world.full = True
    with pytest.raises(GuardRefusal, match="not recorded"):
        world.watch.drop("op", ["a"])
    world.full = False
    assert world.watch.disarm("op") is None
    assert world.vms["a"] == "frozen"
