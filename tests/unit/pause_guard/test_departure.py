"""The guard's last acts in a kernel, and what becomes of them where it is not left after all."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from caesura_pause_guard.departure import Departure
from caesura_vmcontrol import boot_counters, claims, qemu_replace
from caesura_vmcontrol.boots import boot8
from caesura_vmcontrol.intent import Intent, IntentFile
from caesura_vmcontrol.kernel_change import KernelChange
from caesura_vmcontrol.procfs import boot_id, read_process
from caesura_vmcontrol.qemu_control import condition
from caesura_vmcontrol.qemu_plans import AcrossBoots, ReplacePlan, Vmm
from caesura_vmcontrol.qmp_commands import NotRunning
from caesura_vmcontrol.ram_places import identify
from caesura_vmcontrol.watchdog import GuardRefusal, Watchdog

STATE = b"device state"


class Jumped(BaseException):
    """The kernel was left: nothing of this process runs any more."""


class Kernel:
    """What is done with the host, in order. ``jump``: what reboot(2) does."""

    def __init__(self, jump: Callable[[], None]) -> None:
        self.jump = jump
        self.done: list[str] = []
        self.kernel_is_loaded = True
        self.no_watchdog = ""

    def loaded(self) -> bool:
        return self.kernel_is_loaded

    def sync(self) -> None:
        self.done.append("sync")

    def arm_watchdog(self, seconds: int) -> str:
        self.done.append(f"arm {seconds}")
        return self.no_watchdog

    def disarm_watchdog(self) -> None:
        self.done.append("disarm")

    def start_loaded(self) -> None:
        self.done.append("jump")
        self.jump()


class Host:
    """A host with one guest in its files, armed for another kernel."""

    def __init__(self, place: Path, jump: Callable[[], None]) -> None:
        self.state_dir, self.carve_out = place / "state", place / "carve-out"
        self.folder = self.carve_out / "operations" / "a" / "op.claims"
        self.state_dir.mkdir()
        self.folder.mkdir(parents=True)
        ram = self.carve_out / "a.ram"
        ram.write_bytes(bytes(4096))
        (place / "state-file").write_bytes(STATE)
        self.file = f"file:{len(STATE)}:{hashlib.sha256(STATE).hexdigest()}"
        claims.claim(str(self.folder), 1, self.file)
        there = identify(str(ram))
        mark = f"CAESURA_TEST_MARK={place}"
        self.plan = ReplacePlan(
            vm="a",
            old=Vmm(2**31 - 1, 1, str(place / "old")),
            claims=str(self.folder),
            state_file=str(place / "state-file"),
            qmp=str(place / "qmp"),
            argv=(("/bin/false", "-incoming", "defer", "-S"),),
            environ=(("CAESURA_TEST_MARK", str(place)),),
            mark=mark,
            log=str(place / "log"),
            ram=(str(ram), 1, there.inode),
            across=AcrossBoots(boot_id(), there.fs_id, there.inode, there.size, str(self.carve_out), 0, 0),
        )
        self.store = IntentFile(str(self.state_dir))
        self.watch = Watchdog(self.store, lambda *_, **__: None)
        change = KernelChange("6.1.0-48", str(self.carve_out), watchdog_s=60)
        self.watch.arm(
            Intent(
                "op", boot_id(), time.monotonic(), time.monotonic() + 1000, (self.plan,), kernel_change=change
            )
        )
        self.kernel = Kernel(jump)
        self.departure = Departure(str(self.state_dir), self.watch, lambda *_, **__: None, self.kernel)
        self.departure.measure()

    def leave(self, by_s: float = 1000.0) -> None:
        self.departure.leave("op", time.monotonic() + by_s)

    @property
    def owner(self) -> claims.Owner | None:
        return claims.current(str(self.folder))[1]

    @property
    def recorded(self) -> KernelChange:
        intent = self.store.read()
        assert intent is not None
        assert intent.kernel_change is not None
        return intent.kernel_change


@pytest.fixture
def host(tmp_path: Path) -> Callable[..., Host]:
    """``host(jump)``."""

    def make(jump: Callable[[], None]) -> Host:
        return Host(tmp_path, jump)

    return make


def returns() -> None:
    """As a reboot(2) that does nothing."""


def fails() -> None:
    """As one that is not allowed."""
    raise PermissionError(1, "Operation not permitted")


def jumps() -> None:
    """As one that works."""
    raise Jumped


def test_all_is_on_disk_when_the_kernel_is_left(host: Callable[..., Host]) -> None:
    at: list[Any] = []
    made = host(returns)
    made.kernel.jump = lambda: at.append((made.owner, made.recorded.left, list(made.kernel.done)))
    with pytest.raises(GuardRefusal):
        made.leave()
    (owner, left, done), own = at[0], read_process(os.getpid())
    assert own is not None
    assert owner == claims.Owner("left", pid=own.pid, start_ticks=own.start_ticks, boot8=boot8())
    assert left.pair.realtime <= time.time()
    assert done == ["sync", "arm 60", "jump"], (
        "a guard that is killed before its last act leaves nothing armed"
    )
    counters = [boot_counters.read(str(each)) for each in (made.state_dir, made.carve_out)]
    assert counters == [boot_counters.BootCounter("op", 0, boot_id())] * 2


@pytest.mark.parametrize("jump", [returns, fails])
def test_a_call_that_comes_back_leaves_everything_as_it_was(
    host: Callable[..., Host], jump: Callable[[], None]
) -> None:
    """Armed, the guest in its files again, the hardware watchdog disarmed: the ordinary way out follows."""
    made = host(jump)
    with pytest.raises(GuardRefusal):
        made.leave()
    assert made.owner == claims.parse_owner(made.file)
    assert made.recorded.left is None
    assert made.watch.state == "armed"
    assert made.kernel.done.count("arm 60") == made.kernel.done.count("disarm") == 1
    assert made.kernel.done[-1] == "disarm"
    with pytest.raises(GuardRefusal):  # and again
        made.leave()
    assert made.owner == claims.parse_owner(made.file)


def test_a_host_without_a_hardware_watchdog_is_left_all_the_same(host: Callable[..., Host]) -> None:
    made = host(jumps)
    made.kernel.no_watchdog = "/dev/watchdog: No such file or directory"
    with pytest.raises(Jumped):
        made.leave()


@pytest.mark.parametrize("wrong", ["not loaded", "too late", "another operation", "not in its files"])
def test_what_keeps_it_from_beginning(host: Callable[..., Host], wrong: str) -> None:
    made = host(jumps)
    made.kernel.kernel_is_loaded = wrong != "not loaded"
    if wrong == "not in its files":
        claims.claim(str(made.folder), 2, f"new:{os.getpid()}:1:{boot8()}")
    before = made.owner
    with pytest.raises(GuardRefusal):
        made.departure.leave(
            "another" if wrong == "another operation" else "op",
            time.monotonic() + (-1 if wrong == "too late" else 99),
        )
    assert made.kernel.done == []
    assert made.owner == before


def test_a_guard_that_is_killed_between_its_claim_and_the_jump(
    host: Callable[..., Host], tmp_path: Path
) -> None:
    """In the same boot the guest is resumed from its files by who comes next, and not before that guard is dead."""
    made = host(jumps)
    pid = os.fork()
    if pid == 0:  # the guard: it stops itself where it would leave the kernel
        made.kernel.jump = lambda: os.kill(os.getpid(), 19)
        try:
            made.leave()
        finally:
            os._exit(0)
    try:
        os.waitpid(pid, os.WUNTRACED)
        assert made.owner is not None
        assert (made.owner.kind, made.owner.pid) == ("left", pid)
        with pytest.raises(NotRunning, match="is leaving this kernel"):
            qemu_replace.recover(made.plan, alone=True)
        assert condition(made.plan) == "held", "it is not lost, and does not run"
        assert made.owner.kind == "left"
    finally:
        os.kill(pid, 9)
        os.waitpid(pid, 0)
    with pytest.raises(OSError, match="/bin/false"):  # it tries to load it: nothing here is a QEMU
        qemu_replace.recover(made.plan, alone=True)
    assert made.owner == claims.parse_owner(made.file)
    found = made.recorded
    assert found.left is not None, "as the dead guard wrote it"
    assert found.arrival is None
