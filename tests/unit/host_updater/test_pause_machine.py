"""Hypothesis drives the pause machine through everything that can happen, in any order and at any time."""

from __future__ import annotations

from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from caesura_host_updater.operation.effects import (
    Arm,
    CheckKernel,
    DigestVms,
    Disarm,
    Finish,
    FreezeVms,
    LeaveKernel,
    PrepareVms,
    PublishFrozen,
    PublishResumed,
    ResumeVms,
    RunUpdate,
    ShutDownVms,
    StartVms,
    StopUpdate,
    SwapVms,
)
from caesura_host_updater.operation.inputs import (
    AbortReceived,
    Armed,
    ArmRefused,
    Digested,
    Disarmed,
    GuardIntervention,
    GuardLost,
    KernelNotReady,
    KernelReady,
    NotLeft,
    ResumeEnded,
    Sampled,
    Start,
    TimePassed,
    UpdateEnded,
    VmFroze,
    VmLost,
    VmNotFrozen,
    VmNotPrepared,
    VmNotShutDown,
    VmNotStarted,
    VmNotSwapped,
    VmPrepared,
    VmShutDown,
    VmStarted,
    VmSwapped,
)
from caesura_host_updater.operation.machine import decide
from caesura_host_updater.operation.report import shown_by_host
from caesura_host_updater.operation.state import Operation, UpdateRun, VmPause, vm_of

NAMES = ("a", "b", "c")


class PauseMachine(RuleBasedStateMachine):
    """Plays the shell: performs effects into sets of pending work, and feeds back what comes of them."""

    @initialize(
        count=st.integers(1, 3),
        budget_s=st.sampled_from([0.5, 1.0, 2.0, 30.0]),
        kind=st.sampled_from(
            ["hold", "host", "vm", "live", "swap", "swap of an update", "replace", "kexec", "reboot"]
        ),
        can_digest=st.booleans(),
        can_sample=st.booleans(),
        faults=st.sets(
            st.sampled_from(["abort", "guard", "refuse", "freeze", "lost", "hurry", "prepare"]), max_size=2
        ),
    )
    def begin(
        self,
        count: int,
        budget_s: float,
        kind: str,
        can_digest: bool,
        can_sample: bool,
        faults: set[str],
    ) -> None:
        """An operation of some kind, accepted, and what may go wrong with it: few things, so that it gets far."""
        self.faults = faults
        names = NAMES[:count]
        of_vms = tuple(UpdateRun(key=name) for name in names)
        runs = {"hold": (), "swap": (), "vm": of_vms, "swap of an update": of_vms}.get(kind, (UpdateRun(),))
        methods: dict[str, Any] = {each: each for each in ("live", "replace", "kexec", "reboot")}
        self.now = 1000.0
        self.op = Operation(
            operation="op",
            method="swap" if kind.startswith("swap") else methods.get(kind, "freeze"),
            budget_s=budget_s,
            hold_s=0.1 if kind == "hold" else 0.0,
            update="" if kind in ("hold", "swap") else "patch",
            update_timeout_s=budget_s,
            shutdown_s=2.0,
            vms=tuple(
                VmPause(vm=name, set="s", update_domain=0, can_digest=can_digest, can_sample=can_sample)
                for name in names
            ),
            runs=runs,
        )
        self.arming = self.disarming = self.checking = self.leaving = False
        self.preparing: set[str] = set()
        self.ready: set[str] = set()
        self.swapping: list[str] = []
        self.shutting_down: set[str] = set()
        self.starting: set[str] = set()
        self.start_asked = False
        self.freezing: set[str] = set()
        self.called: set[str] = set()
        self.digesting: set[str] = set()
        self.updating: set[str] = set()
        self.resuming: set[str] = set()
        self.world = dict.fromkeys(names, "running")
        self.armed = self.aborted = self.resume_asked = False
        self.finished = 0
        self.told: list[tuple[str, str]] = []
        self.freeze_calls = 0
        self.feed(Start())

    def feed(self, event: Any) -> None:
        """One event through the machine, and its effects into the pending work."""
        self.op, effects = decide(self.op, event, self.now)
        for effect in effects:
            self.perform(effect)

    def perform(self, effect: Any) -> None:  # noqa: PLR0912 - one flat table of effects
        """What the shell would do, with everything checked that must hold at this instant."""
        assert self.finished == 0, "an effect after the end"
        deadlines = self.op.deadlines
        match effect:
            case Arm():
                assert deadlines is not None
                assert deadlines.started_at < effect.deadline < deadlines.started_at + self.op.budget_s
                self.arming = True
            case PrepareVms():
                assert not self.aborted
                assert not self.updating, "the update still changes the host"
                self.preparing = set(effect.vms)
            case SwapVms():
                assert self.armed, "swapped without a guard"
                assert self.ready == set(self.world), "swapped before all were ready"
                assert deadlines is not None
                assert self.now < effect.by
                self.swapping = sorted(self.world)
            case ShutDownVms():
                assert self.op.method == "reboot"
                assert not self.aborted
                assert set(effect.vms) == set(self.world)
                assert effect.by == self.now + self.op.shutdown_s
                self.shutting_down = set(effect.vms)
            case StartVms():
                assert set(effect.vms) == set(self.world), "a VM was forgotten"
                assert not self.updating, "the update continues under VMs that are started"
                assert not self.start_asked
                self.start_asked = True
                self.shutting_down.clear()
                self.starting = set(effect.vms)
            case FreezeVms():
                assert self.op.method == "freeze" or self.ready == set(self.world), "not ready"
                assert self.armed, "frozen without a guard"
                assert not self.aborted, "frozen after an abort"
                assert deadlines is not None
                assert self.now < effect.by
                self.freeze_calls += 1
                assert self.freeze_calls == 1
                self.freezing = set(self.world)
                self.called = set(self.world)
            case DigestVms():
                assert deadlines is not None
                assert self.now < effect.until <= deadlines.resume_at
                assert not effect.whole or effect.until <= deadlines.digest_until
                assert effect.whole <= {vm.vm for vm in self.op.vms if vm.can_digest}
                self.digesting |= set(effect.vms)
            case CheckKernel():
                assert not self.updating, "the kernel is still being loaded"
                assert self.op.method == "kexec"
                self.checking = True
            case LeaveKernel():
                assert self.armed, "left without a guard"
                assert not self.aborted, "left after an abort"
                assert not self.checking, "left before the kernel was looked at"
                assert set(self.world.values()) <= {"frozen", "gone"}, "left while a VM runs"
                assert deadlines is not None
                assert self.now < effect.by < deadlines.resume_at
                self.leaving = True
            case RunUpdate():
                assert not self.aborted, "update started after an abort"
                assert self.op.method in ("live", "swap", "kexec") or all(
                    self.world[vm] in ("frozen", "gone", "down") for vm in self.world
                ), "update started while a VM runs"
                self.updating |= set(effect.keys)
            case StopUpdate(kill=True):
                self.updating.clear()
            case ResumeVms():
                answered = {vm.vm for vm in self.op.vms if vm.end}
                assert self.called <= set(effect.vms) | answered, "a VM was forgotten"
                self.swapping.clear()
                assert not self.updating, "the update goes on under VMs that run"
                self.resume_asked = True
                for vm in self.freezing:
                    self.feed_later(vm)
                self.freezing.clear()
                self.digesting.clear()
                self.resuming = set(effect.vms)
            case Disarm():
                assert not self.resuming, "disarmed before every VM runs"
                self.disarming = True
            case PublishFrozen() | PublishResumed():
                told = (type(effect).__name__, effect.vm)
                assert told not in self.told
                self.told.append(told)
                if isinstance(effect, PublishResumed):
                    assert ("PublishFrozen", effect.vm) in self.told
            case Finish():
                self.finished += 1
                assert not self.called or self.resume_asked or self.op.method == "swap"
                assert all(state != "frozen" for state in self.world.values()), "ended with a VM frozen"
                assert self.op.failure or "down" not in self.world.values(), (
                    "ended with a VM that was not started"
                )
                assert not self.starting, "ended before every VM answered"

    def feed_later(self, vm: str) -> None:
        """A cancelled freeze reports that it was called off."""
        self.op, effects = decide(self.op, VmNotFrozen(vm, self.now, "called off"), self.now)
        assert effects == ()

    # -- what can happen ----------------------------------------------------------------------------------

    @rule(seconds=st.sampled_from([0.001, 0.01, 0.05]))
    def a_little_time_passes(self, seconds: float) -> None:
        """The shell ticks as soon as it can when the machine wants it."""
        self.pass_time(seconds)

    @precondition(lambda self: "hurry" in self.faults or self.op.phase in ("updating", "updated", "frozen"))
    @rule(seconds=st.sampled_from([0.2, 1.0, 12.0, 60.0]))
    def much_time_passes(self, seconds: float) -> None:
        """The host updater was stopped, or the update takes long."""
        self.pass_time(seconds)

    def pass_time(self, seconds: float) -> None:
        """Time passes, if the machine wants it."""
        self.now += seconds
        if self.op.wake_at is not None and self.now >= self.op.wake_at:
            self.feed(TimePassed())

    @precondition(lambda self: self.arming)
    @rule(good=st.booleans())
    def guard_answers(self, good: bool) -> None:
        """Armed, or refused."""
        good = good or "refuse" not in self.faults
        self.arming = False
        self.armed = good
        self.feed(Armed() if good else ArmRefused("no"))

    @precondition(lambda self: self.preparing)
    @rule(good=st.booleans(), data=st.data())
    def preparing_ends(self, good: bool, data: st.DataObject) -> None:
        """One VM is ready, or cannot be."""
        vm = data.draw(st.sampled_from(sorted(self.preparing)))
        self.preparing.discard(vm)
        if good or "prepare" not in self.faults:
            self.ready.add(vm)
            self.feed(VmPrepared(vm))
        else:
            self.feed(VmNotPrepared(vm, "QEMU said no"))

    @precondition(lambda self: self.checking)
    @rule(good=st.booleans())
    def kernel_is_looked_at(self, good: bool) -> None:
        """It is the update's, and the host can start it; or not."""
        self.checking = False
        if good or "prepare" not in self.faults:
            self.feed(KernelReady())
        else:
            self.feed(KernelNotReady("none is loaded"))

    @precondition(lambda self: self.leaving)
    @rule()
    def the_jump_fails(self) -> None:
        """If it succeeds there is no machine any more."""
        self.leaving = False
        self.feed(NotLeft("the guard said no"))

    @precondition(lambda self: self.swapping)
    @rule(how=st.sampled_from(["new", "new", "old", "stuck", "untouched"]))
    def swap_ends(self, how: str) -> None:
        """The next guest runs in its new process, is back in the old one, stands still, or was not touched."""
        vm = self.swapping.pop(0)
        if how == "new" or "freeze" not in self.faults:
            self.called.add(vm)
            self.feed(VmSwapped(vm, self.now, self.now, self.now))
            return
        self.called |= {vm} - ({vm} if how == "untouched" else set())
        self.world[vm] = "frozen" if how == "stuck" else "running"
        paused = self.now if how in ("old", "stuck") else None
        back = self.now if how == "old" else None
        called_at = None if how == "untouched" else self.now
        for event in (
            VmNotSwapped(vm, called_at, "will not", paused, back),
            *(VmNotSwapped(each, None, "not begun") for each in self.swapping),
        ):
            if self.op.phase == "swapping":
                self.feed(event)
        self.swapping.clear()

    @precondition(lambda self: self.shutting_down)
    @rule(good=st.booleans(), data=st.data())
    def shutdown_ends(self, good: bool, data: st.DataObject) -> None:
        """One VM is down, or runs on."""
        vm = data.draw(st.sampled_from(sorted(self.shutting_down)))
        self.shutting_down.discard(vm)
        if good or "freeze" not in self.faults:
            self.world[vm] = "down"
            self.feed(VmShutDown(vm, self.now, "ACPI"))
        else:
            self.feed(VmNotShutDown(vm, "ignores it"))

    @precondition(lambda self: self.starting)
    @rule(good=st.booleans(), data=st.data())
    def start_ends(self, good: bool, data: st.DataObject) -> None:
        """One VM is up, or cannot be started."""
        vm = data.draw(st.sampled_from(sorted(self.starting)))
        self.starting.discard(vm)
        if good or "prepare" not in self.faults:
            again, self.world[vm] = self.world[vm] == "down", "running"
            self.feed(VmStarted(vm, self.now, again))
        else:
            self.feed(VmNotStarted(vm, "no memory"))

    @precondition(lambda self: self.freezing)
    @rule(good=st.booleans(), data=st.data())
    def freeze_ends(self, good: bool, data: st.DataObject) -> None:
        """One VM stands still, or cannot."""
        good = good or "freeze" not in self.faults
        vm = data.draw(st.sampled_from(sorted(self.freezing)))
        self.freezing.discard(vm)
        if good:
            self.world[vm] = "frozen"
            self.feed(VmFroze(vm, self.now, self.now))
        else:
            self.feed(VmNotFrozen(vm, self.now, "will not"))

    @precondition(lambda self: self.digesting)
    @rule(digest=st.sampled_from(["x", "x", "y", ""]), data=st.data())
    def digest_ends(self, digest: str, data: st.DataObject) -> None:
        """A digest, or none; before it the sampled pages, where they are looked at."""
        vm = data.draw(st.sampled_from(sorted(self.digesting)))
        self.digesting.discard(vm)
        if vm_of(self.op, vm).can_sample:
            self.feed(Sampled(vm, data.draw(st.sampled_from(["x", "x", "y", ""]))))
        self.feed(Digested(vm, digest if vm_of(self.op, vm).can_digest else ""))

    @precondition(lambda self: self.updating)
    @rule(outcome=st.sampled_from(["succeeded", "failed"]), data=st.data())
    def update_ends(self, outcome: Any, data: st.DataObject) -> None:
        """A run of the update ends."""
        key = data.draw(st.sampled_from(sorted(self.updating)))
        self.updating.discard(key)
        self.feed(UpdateEnded(key, outcome, 0 if outcome == "succeeded" else 1, 0.1, ""))

    @precondition(lambda self: "abort" in self.faults)
    @rule()
    def abort(self) -> None:
        """At any time, and again."""
        self.aborted = True
        self.feed(AbortReceived("aborted", "test"))

    @precondition(lambda self: "guard" in self.faults)
    @rule()
    def guard_dies(self) -> None:
        """At any time, and again."""
        self.armed = False
        self.feed(GuardLost())

    @precondition(lambda self: "lost" in self.faults and "frozen" in self.world.values())
    @rule(thawed=st.booleans(), data=st.data())
    def vm_is_lost(self, thawed: bool, data: st.DataObject) -> None:
        """It ends, or somebody else lets it run."""
        vm = data.draw(st.sampled_from([each for each, state in self.world.items() if state == "frozen"]))
        self.world[vm] = "running" if thawed else "gone"
        self.feed(VmLost(vm, thawed, "is lost"))

    @precondition(lambda self: self.resuming)
    @rule(data=st.data(), held=st.booleans())
    def resume_ends(self, data: st.DataObject, held: bool) -> None:
        """One VM runs."""
        vm = data.draw(st.sampled_from(sorted(self.resuming)))
        self.resuming.discard(vm)
        end: Any = "gone" if self.world[vm] == "gone" else "running"
        self.world[vm] = end
        self.feed(ResumeEnded(vm, self.now, end, held))

    @precondition(lambda self: self.disarming)
    @rule(fired=st.booleans())
    def guard_lets_go(self, fired: bool) -> None:
        """With or without having fired."""
        self.disarming = False
        interventions = tuple(GuardIntervention(vm, True, None, self.now) for vm in sorted(self.called))
        self.feed(Disarmed("the deadline passed", interventions) if fired else Disarmed())

    # -- what must hold -----------------------------------------------------------------------------------

    @invariant()
    def resumed_in_time(self) -> None:
        """After a tick at or beyond `resume_at`, the resume was asked for."""
        deadlines = self.op.deadlines
        if deadlines is not None and self.now >= deadlines.resume_at:
            assert self.op.phase in ("arming", "resuming", "resumed", "ended"), self.op.phase

    @invariant()
    def always_wakes_up(self) -> None:
        """While VMs may stand still, the machine wants a tick no later than `resume_at`."""
        if self.op.deadlines is not None and self.op.phase in (
            "swapping",
            "freezing",
            "frozen",
            "updating",
            "updated",
            "leaving",
        ):
            assert self.op.wake_at is not None
            assert self.op.wake_at <= self.op.deadlines.resume_at

    @invariant()
    def honest_end(self) -> None:
        """What the end says is what happened."""
        if self.op.end == "completed":
            assert not self.op.failure
            assert self.op.method in ("live", "reboot") or all(vm.frozen_at is not None for vm in self.op.vms)
            assert self.op.method != "reboot" or all(vm.down_at is not None for vm in self.op.vms)
            assert all(run.outcome == "succeeded" for run in self.op.runs)
            for vm in self.op.vms:
                assert not shown_by_host(vm).broken, "memory changed, and the operation says completed (I3)"
        if self.op.end == "cancelled":
            assert not self.op.paused
            assert not any(run.started for run in self.op.runs)
        assert (self.finished == 1) == (self.op.end is not None)

    def teardown(self) -> None:
        """However it went, it comes to its end when the world does its part."""
        if not hasattr(self, "op"):
            return
        for _ in range(200):
            if self.op.end is not None:
                break
            for vm in sorted(self.preparing):
                self.preparing.discard(vm)
                self.ready.add(vm)
                self.feed(VmPrepared(vm))
            if self.arming:
                self.arming, self.armed = False, True
                self.feed(Armed())
            for vm in sorted(self.starting):
                self.starting.discard(vm)
                self.world[vm] = "running"
                self.feed(VmStarted(vm, self.now))
            for vm in sorted(self.resuming):
                self.resuming.discard(vm)
                self.world[vm] = "running" if self.world[vm] != "gone" else "gone"
                self.feed(ResumeEnded(vm, self.now, "running"))
            if self.disarming:
                self.disarming = False
                self.feed(Disarmed())
            if self.op.end is None:
                self.now += 1.0
                self.feed(TimePassed())
        assert self.op.end is not None
        assert self.finished == 1


TestPauseMachine = PauseMachine.TestCase
TestPauseMachine.settings = settings(
    max_examples=150, stateful_step_count=40, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
