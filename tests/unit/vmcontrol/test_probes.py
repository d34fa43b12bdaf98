"""QEMU guests in the guard's watch: side by side, decided once, enforced, and what is written down of them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest

from caesura_testing.patience import patient
from caesura_vmcontrol.freezer_control import Condition
from caesura_vmcontrol.intent import Intent
from caesura_vmcontrol.procfs import Process
from caesura_vmcontrol.qemu_plans import QemuPlan, Vmm
from caesura_vmcontrol.resume_plans import ResumePlan
from caesura_vmcontrol.watchdog import GuardRefusal, Watchdog

PATIENCE_S = patient(5.0)


class World:
    """Two QEMU guests, of which one may hang."""

    def __init__(self) -> None:
        self.vms: dict[str, Condition] = {"a": "frozen", "b": "frozen"}
        self.hang = threading.Event()
        self.hang.set()
        self.refuse = ""
        self.unreadable: set[str] = set()
        """Those that can be released, and not be looked at while they are paused."""
        self.released: list[str] = []
        self.logged: list[tuple[str, dict[str, Any]]] = []
        self.disk: dict[str, Any] | None = None
        self.writes = 0
        self.watch = Watchdog(self, self.log, look=self.look, release=self.release)

    def log(self, event: str, **facts: Any) -> None:
        self.logged.append((event, facts))

    def look(self, plan: ResumePlan, _: Mapping[int, Process] | None) -> Condition:
        if plan.vm in self.unreadable and self.vms[plan.vm] != "running":
            raise PermissionError("nobody says")
        return self.vms[plan.vm]

    def release(self, plan: ResumePlan, _: Mapping[int, Process] | None) -> None:
        self.released.append(plan.vm)
        if plan.vm == "a":
            self.hang.wait(PATIENCE_S)
        if self.refuse:
            raise OSError(self.refuse)
        self.vms[plan.vm] = "running"

    def store(self, intent: Intent) -> None:
        self.disk = intent.to_json()
        self.writes += 1

    def clear(self) -> None:
        self.disk = None

    def arm(self, seconds: float = 60) -> None:
        """Both guests."""
        plans = tuple(QemuPlan(vm, Vmm(2 + number, 1, f"/{vm}")) for number, vm in enumerate(self.vms))
        now = time.monotonic()
        self.watch.arm(Intent("op", "boot", now, now + seconds, plans))

    def until(self, holds: Callable[[], bool]) -> None:
        """Serve as the guard's loop does."""
        until = time.monotonic() + PATIENCE_S
        while not holds():
            assert time.monotonic() < until
            time.sleep(min(self.watch.step() or 0.01, 0.01))

    @property
    def state(self) -> str:
        """Read anew each time."""
        return self.watch.state

    def intervention(self, vm: str) -> dict[str, Any]:
        """What is written down."""
        assert self.watch.intent is not None
        intervention: dict[str, Any] = self.watch.intent.to_json()["fired"]["vms"][vm]
        return intervention


@pytest.fixture
def world() -> Iterator[World]:
    """Nothing of it hangs when the test is over."""
    made = World()
    yield made
    made.hang.set()


def test_one_that_hangs_delays_nobody(world: World) -> None:
    world.arm()
    world.hang.clear()
    began = time.monotonic()
    world.watch.fire("test")
    world.until(lambda: world.intervention("b")["end"] == "running")
    assert time.monotonic() - began < patient(1)
    assert world.intervention("a")["end"] == ""
    assert world.state == "firing"
    with pytest.raises(GuardRefusal, match="not running yet: a"):
        world.watch.disarm("op")
    world.hang.set()
    world.until(lambda: world.state == "fired")
    assert world.intervention("a")["was_frozen"]


def test_it_is_decided_once_although_everything_runs(world: World) -> None:
    """A swap that was not begun must not be begun later: so the way out is taken once, whatever is seen."""
    world.vms = {"a": "running", "b": "running"}
    world.arm()
    world.watch.fire("test")
    world.until(lambda: world.state == "fired")
    assert sorted(world.released) == ["a", "b"]
    assert not world.intervention("a")["was_frozen"]
    writes = world.writes
    until = time.monotonic() + 0.35
    world.until(lambda: time.monotonic() > until)
    assert sorted(world.released) == ["a", "b"], "nothing stood still since"
    assert world.writes == writes, "nothing was news"


def test_late_freezes_are_undone(world: World) -> None:
    world.vms = {"a": "running", "b": "running"}
    world.arm()
    world.watch.fire("test")
    world.until(lambda: world.state == "fired")
    world.vms["b"] = "frozen"
    world.until(lambda: world.vms["b"] == "running" and world.intervention("b")["frozen_after"] is not None)
    assert world.watch.disarm("op") is not None


def test_a_guest_that_was_only_thought_to_be_gone(world: World) -> None:
    world.vms = {"a": "gone", "b": "running"}
    world.refuse = ""
    world.release = lambda *_: None  # type: ignore[method-assign]
    world.watch = Watchdog(world, world.log, look=world.look, release=world.release)
    world.arm()
    world.watch.fire("test")
    world.until(lambda: world.intervention("a")["end"] == "gone")
    world.vms["a"] = "running"
    world.until(lambda: world.intervention("a")["end"] == "running")
    world.vms["b"] = "gone"  # shut down by its user, later: it did run
    until = time.monotonic() + 0.25
    world.until(lambda: time.monotonic() > until)
    assert world.intervention("b")["end"] == "running"


def test_the_reason_is_logged_once_and_tries_come_less_often(world: World) -> None:
    world.refuse = "QEMU refuses cont: no (GenericError)"
    world.arm()
    world.watch.fire("test")
    until = time.monotonic() + 0.8
    world.until(lambda: time.monotonic() > until)
    assert 4 <= world.released.count("b") <= 12  # 5, 10, 20 ... 250 ms between them
    failed = [facts["vm"] for event, facts in world.logged if event == "guard.resume_failed"]
    assert sorted(failed) == ["a", "b"]
    assert world.state == "firing"
    world.refuse = ""
    world.until(lambda: world.state == "fired")


def test_disarm_looks_first(world: World) -> None:
    world.arm()
    world.hang.clear()
    with pytest.raises(GuardRefusal, match="a"):
        world.watch.disarm("op")
    assert world.logged[0][0] == "guard.fired"
    world.hang.set()
    world.until(lambda: world.state == "fired")
    record = world.watch.disarm("op")
    assert record is not None
    assert record["fired"]["why"] == "disarmed while a VM was paused"
    world.vms = {"a": "running", "b": "running"}
    world.arm()
    assert world.watch.disarm("op") is None
    assert world.disk is None


def test_a_round_of_an_earlier_operation_is_not_taken_for_one_of_the_next(world: World) -> None:
    world.arm()
    world.hang.clear()
    world.watch.fire("test")
    world.until(lambda: world.intervention("b")["end"] == "running")
    world.vms["a"] = "running"  # by somebody else; the round still hangs
    with pytest.raises(GuardRefusal, match="a"):
        world.watch.disarm("op")
    world.hang.set()
    world.until(lambda: world.state == "fired")
    assert world.watch.disarm("op") is not None
    assert world.state == "ready"


def test_one_that_cannot_be_looked_at_is_released_all_the_same(world: World) -> None:
    world.unreadable = {"a", "b"}
    world.arm()
    world.watch.fire("test")
    world.until(lambda: world.state == "fired")
    assert sorted(world.released) == ["a", "b"]
