"""Claims over several boots of a host: whatever is killed wherever, at most one process ever runs the guest."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from caesura_vmcontrol import claims, procfs, qemu_replace
from caesura_vmcontrol.boots import boot8
from caesura_vmcontrol.claims import Owner
from caesura_vmcontrol.procfs import Process
from caesura_vmcontrol.qemu_plans import AcrossBoots, ReplacePlan, Vmm
from caesura_vmcontrol.qmp_commands import ProcessGone
from caesura_vmcontrol.ram_places import identify

STATE = b"device state"
PID, TICKS = 4711, 99
"""Of every process that a boot starts first: boots are that much alike."""


class Killed(BaseException):
    """The process that was at it is gone, with this step or without it."""


@dataclass(eq=False)
class Qemu:
    """A new process. ``ran``: whether it was told to run the guest."""

    boot: str
    pid: int
    alive: bool = True
    loads: bool = True
    ran: bool = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing to close."""

    def close(self) -> None:
        """Nothing to close."""


@dataclass
class World:
    """A host. ``steps``: how many more things are done before what is at it is killed."""

    folder: Path
    plan: ReplacePlan
    boots: int = 0
    processes: list[Qemu] = field(default_factory=list)
    steps: int = 10**6
    loads: bool = True
    stranger: bool = False

    def boot(self, *, stranger: bool) -> None:
        """All processes end, the next boot begins. ``stranger``: some process of that one has the pid of one of ours."""
        self.stranger = stranger
        self.boots += 1
        for each in self.processes:
            each.alive = False
        (self.folder / "boot").write_text(f"{self.boots:08x}-0000-4000-8000-000000000001")

    @property
    def here(self) -> str:
        return boot8()

    def step(self) -> None:
        """Something is about to be done."""
        self.steps -= 1
        if self.steps < 0:
            raise Killed

    def living(self) -> list[Qemu]:
        return [each for each in self.processes if each.alive]

    def find(self, pid: int) -> Qemu | None:
        return next((each for each in self.living() if each.pid == pid), None)

    # -- in the place of qemu_replace's own ----------------------------------------------------------------------

    def is_stranger(self, pid: int, start_ticks: int) -> bool:
        return self.stranger and pid in (PID, PID + 1) and start_ticks == TICKS

    def is_alive(self, pid: int, start_ticks: int) -> bool:
        return self.is_stranger(pid, start_ticks) or (start_ticks == TICKS and self.find(pid) is not None)

    def started(self, _: ReplacePlan) -> list[Process]:
        self.step()
        return [Process(each.pid, 1, each.pid, "S", TICKS) for each in self.living()]

    def kill_and_wait(self, pid: int, start_ticks: int, _: float) -> None:
        self.step()
        assert not self.is_stranger(pid, start_ticks), "a stranger is killed"
        found = self.find(pid) if start_ticks == TICKS else None
        if found is not None:
            found.alive = False

    def start(self, *_: object) -> Process:
        self.step()
        # In the boot that is left the old process had that pid.
        first = PID + 2 if self.stranger else PID if self.boots else PID + 1
        pid = first + sum(each.boot == self.here for each in self.processes)
        self.processes.append(Qemu(self.here, pid, loads=self.loads))
        return Process(pid, 1, pid, "S", TICKS)

    def loaded(self, _: ReplacePlan, process: Process, __: int) -> Qemu:
        self.step()
        found = self.find(process.pid)
        if found is None or not found.loads:
            raise OSError("it does not load it")
        return found

    def reach(self, pid: int, start_ticks: int, *_: object) -> Qemu:
        self.step()
        assert not self.is_stranger(pid, start_ticks), "a stranger is asked"
        found = self.find(pid) if start_ticks == TICKS else None
        if found is None:
            raise ProcessGone("it is dead")
        return found

    def cont(self, qemu: Qemu, _: float) -> None:
        self.step()
        assert qemu.alive
        qemu.ran = True

    def claim(self, *arguments: Any, **named: Any) -> str:
        self.step()
        return claims.claim(*arguments, **named)

    def claim_first(self, *arguments: Any, **named: Any) -> bool:
        self.step()
        return claims.claim_first(*arguments, **named)

    def note_ran(self, folder: str) -> None:
        self.step()
        claims.note(folder, "ran")


@pytest.fixture(scope="module")
def patched() -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as patch:
        yield patch


def world(patch: pytest.MonkeyPatch, folder: Path) -> World:
    """A guest in its files, in the boot that will leave its kernel."""
    (folder / "state").write_bytes(STATE)
    (folder / "ram").write_bytes(bytes(4096))
    (folder / "operations/a/op.claims").mkdir(parents=True)
    patch.setattr(procfs, "BOOT_ID", str(folder / "boot"))
    there = identify(str(folder / "ram"))
    (folder / "boot").write_text("00000000-0000-4000-8000-000000000001")
    plan = ReplacePlan(
        vm="a",
        old=Vmm(PID, TICKS, str(folder / "old")),
        claims=str(folder / "operations/a/op.claims"),
        state_file=str(folder / "state"),
        qmp=str(folder / "qmp"),
        argv=(("/bin/false", "-incoming", "defer", "-S"),),
        environ=(("MARK", "a"),),
        mark="MARK=a",
        log=str(folder / "log"),
        ram=(str(folder / "ram"), 1, there.inode),
        across=AcrossBoots(procfs.boot_id(), there.fs_id, there.inode, there.size, str(folder), 0, 0),
    )
    claims.claim(plan.claims, 1, f"file:{len(STATE)}:{hashlib.sha256(STATE).hexdigest()}")
    made = World(folder, plan)
    patch.setattr(claims, "retry_in_s", lambda _: 0.0)  # waits are of no interest here
    patch.setattr(qemu_replace, "_TOTAL_S", 60.0)
    for name, other in {
        "alive": made.is_alive,
        "started": made.started,
        "kill_and_wait": made.kill_and_wait,
        "start": made.start,
        "_loaded": made.loaded,
        "reach": made.reach,
        "cont": made.cont,
        "note_ran": made.note_ran,
        "has_run": lambda folder, _: claims.noted(folder, "ran"),
        "run_state": lambda *_: "",
        "keep_memory_along": lambda *_: None,
        "boost_priority": lambda _: None,
        "restore_priority": lambda _: None,
        "sigcont": lambda *_: None,
        "send_signal": lambda *_: None,
    }.items():
        patch.setattr(qemu_replace, name, other)
    return made


EVENTS = st.one_of(
    st.tuples(st.just("recover"), st.integers(0, 12)),
    st.tuples(
        st.sampled_from(
            ["boot with a stranger", "boot", "admit", "leave", "a process dies", "it loads", "it does not"]
        ),
        st.just(0),
    ),
)


@example([("recover", 12), ("boot", 0)])
@example([("recover", 12), ("boot with a stranger", 0)])
@example([("leave", 0), ("boot with a stranger", 0), ("admit", 0), ("recover", 12), ("boot", 0)])
@given(st.lists(EVENTS, max_size=14))
@settings(suppress_health_check=list(HealthCheck), max_examples=60)
def test_at_most_one_process_ever_runs_the_guest(
    patched: pytest.MonkeyPatch, events: list[tuple[str, int]]
) -> None:
    folder = Path(tempfile.mkdtemp(prefix="ca"))
    try:
        made = world(patched, folder)
        for event, steps in events:
            _do(made, event, steps)
            ran = [each for each in made.processes if each.ran]
            assert len(ran) <= 1, ran
            if ran and not ran[0].alive:
                assert not any(each.ran for each in made.living())
        # Left alone, it comes to an end in this boot: the guest runs, or nobody will ever run it.
        claims.admit(made.plan.claims, made.here)
        _do(made, "it loads", 0)
        for _ in range(8):
            _do(made, "recover", 10**6)
        ran = [each for each in made.processes if each.ran]
        assert len(ran) <= 1, ran
        _, owner = claims.current(made.plan.claims)
        assert owner is not None
        if ran and ran[0].alive:
            assert (owner.kind, owner.pid, owner.boot8) == ("new", ran[0].pid, made.here)
            assert made.living() == ran
        else:
            assert owner.kind == "gone"
            assert made.living() == []
    finally:
        shutil.rmtree(folder)


def _do(made: World, event: str, steps: int) -> None:
    plan = made.plan
    match event:
        case "recover":
            made.steps = steps
            try:
                qemu_replace.recover(plan, alone=True)
            except (OSError, Killed):
                pass
            finally:
                made.steps = 10**6
        case "boot" | "boot with a stranger":
            made.boot(stranger=event != "boot")
        case "admit":
            claims.admit(plan.claims, made.here)
        case "leave":
            number, owner = claims.current(plan.claims)
            if owner is not None and owner.kind == "file" and not made.living():
                text = Owner("left", pid=PID + 1000, start_ticks=TICKS, boot8=made.here).text
                claims.claim(plan.claims, number + 1, text)
        case "a process dies":
            for each in made.living()[:1]:
                each.alive = False
        case _:
            made.loads = event == "it loads"
