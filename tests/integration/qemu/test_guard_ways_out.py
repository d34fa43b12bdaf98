"""Swap and replace, broken off in every phase: the guard brings real QEMU processes to exactly one that runs.

No guest system is needed: SeaBIOS runs, is stopped, moves and goes on. What the driver does on the happy path is
played here, up to the phase in question; then the guard, or two at once, are left alone with it.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import random
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from caesura_testing.patience import patient
from caesura_vmcontrol import claims, qemu_replace, qemu_swap, qmp_commands
from caesura_vmcontrol.guard_socket import socket_address
from caesura_vmcontrol.process_control import find_by_env, kill_and_wait, sigstop
from caesura_vmcontrol.procfs import alive, boot_id, read_process, thread_states
from caesura_vmcontrol.qemu_plans import QemuPlan, ReplacePlan, SwapPlan, Vmm
from caesura_vmcontrol.qmp import Qmp, QmpError, QmpNoAnswer, QmpRefused
from caesura_vmcontrol.qmp_commands import cont, end_unless_it_ran
from caesura_vmcontrol.resume_plans import ResumePlan, plan_to_json
from caesura_vmcontrol.vm_control import condition, resume_vm

QEMU = "/usr/bin/qemu-system-x86_64"
PATIENCE_S = 15.0
SOON_S = patient(
    5.0
)  # s: a way out takes 0.1 to 0.3 s on an idle host, half a second more where QEMU hangs; this host is shared

Phase = Callable[[Any], None]
"""Plays the driver up to some point; gets a ``Swap`` or a ``Replace``."""

pytestmark = [
    pytest.mark.skipif(not Path(QEMU).exists(), reason="qemu-system-x86_64 is not installed"),
    pytest.mark.skipif(shutil.which("qemu-img") is None, reason="qemu-img is not installed"),
]


def wait(holds: Callable[[], bool], what: str, timeout_s: float = PATIENCE_S) -> None:
    """Wait for the kernel or another process."""
    until = time.monotonic() + patient(timeout_s)
    while not holds():
        assert time.monotonic() < until, f"not within {timeout_s} s: {what}"
        time.sleep(0.003)


def soon() -> float:
    """A deadline for one QMP command of the test."""
    return time.monotonic() + patient(PATIENCE_S)


class Machine:
    """A QEMU process that the test has started, and the connection that the driver would have."""

    def __init__(self, argv: list[str], environ: dict[str, str], sockets: Path) -> None:
        self.process = subprocess.Popen(argv, env=environ, stderr=subprocess.PIPE, start_new_session=True)
        pid = self.process.pid
        wait(lambda: (sockets / "guard").exists() or self.process.poll() is not None, "QEMU to start")
        own = read_process(pid)
        assert own is not None
        self.vmm = Vmm(pid, own.start_ticks, str(sockets / "guard"))
        self.qmp = Qmp(str(sockets / "qmp"), pid, soon())

    def do(self, command: str, handle: int | None = None, **arguments: Any) -> Any:
        """One QMP command."""
        return self.qmp.execute(command, arguments or None, until=soon(), handle=handle)

    def capabilities(self, *, return_path: bool) -> None:
        """As the driver sets them, every time."""
        wanted = {
            "x-ignore-shared": True,
            "events": True,
            "return-path": return_path,
            "late-block-activate": True,
        }
        self.do(
            "migrate-set-capabilities",
            capabilities=[{"capability": name, "state": on} for name, on in wanted.items()],
        )

    def resumed(self) -> bool:
        """Whether its guest was let go since the connection was made."""
        with suppress(QmpError):
            self.qmp.take_events(time.monotonic() + 0.05)
        return "RESUME" in self.qmp.events

    def kill(self) -> None:
        """-9, and reaped."""
        self.process.kill()
        self.process.wait()

    def close(self) -> None:
        """Leave nothing."""
        self.qmp.close()
        self.kill()
        assert self.process.stderr is not None
        self.process.stderr.close()


class Lab:
    """One VM: its old process, what a swap or a replace adds to it, and every file of it."""

    def __init__(self, folder: Path, ram: Path, *, spare: bool = False) -> None:
        self.folder = folder
        self.ram = ram
        self.spare = spare
        self.machines: list[Machine] = []
        self.mark = f"CAESURA_TEST_MARK={folder}"  # of this run alone: what carries it is ended
        self.disk = folder / "d.qcow2"
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", self.disk, "16M"], check=True)
        (folder / "next").mkdir()
        self.claims = folder / "claims"
        self.claims.mkdir()
        self.state = folder / "state"
        self.log = folder / "new.log"
        ram.touch(0o600)
        self.old = self.start(folder)

    def argv(self, sockets: Path, *more: str, memory: int = 64, disk: bool = True) -> tuple[str, ...]:
        """A complete command line."""
        drive = ("-device", "virtio-blk-pci,drive=d") if disk else ()
        return (
            *(QEMU, "-nodefaults", "-no-user-config", "-display", "none", "-accel", "tcg", "-cpu", "qemu64"),
            *("-machine", "pc-q35-7.2,memory-backend=ram", "-m", str(memory)),
            *("-object", f"memory-backend-file,id=ram,mem-path={self.ram},size={memory}M,share=on"),
            *("-drive", f"if=none,id=d,file={self.disk},format=qcow2", *drive),
            *("-qmp", f"unix:{sockets}/qmp,server=on,wait=off"),
            *("-qmp", f"unix:{sockets}/guard,server=on,wait=off"),
            *(("-qmp", f"unix:{sockets}/guard.2,server=on,wait=off") if self.spare else ()),
            *more,
        )

    def start(self, sockets: Path, *more: str) -> Machine:
        """Start a process; one with ``-incoming`` is a new one and carries the mark."""
        environ = {"PATH": os.environ["PATH"]}
        if more:
            name, _, value = self.mark.partition("=")
            environ[name] = value
        made = Machine(list(self.argv(sockets, *more)), environ, sockets)
        self.machines.append(made)
        return made

    def incoming(self, *, disk: bool = True) -> tuple[str, ...]:
        """The command line of one that waits for a state."""
        return self.argv(self.folder / "next", "-incoming", "defer", "-S", disk=disk)

    def start_new(self) -> Machine:
        """The one that shall take over."""
        return self.start(self.folder / "next", "-incoming", "defer", "-S")

    def claim(self, text: str) -> None:
        """The next one, and it must be ours."""
        number, _ = claims.current(str(self.claims))
        assert claims.claim(str(self.claims), number + 1, text) == text

    def living(self) -> list[int]:
        """Every process of this VM that is alive."""
        ours = [(each.vmm.pid, each.vmm.start_ticks) for each in self.machines]
        ours += [(each.pid, each.start_ticks) for each in find_by_env(self.mark)]
        return sorted({pid for pid, ticks in ours if alive(pid, ticks)})

    def runs(self, pid: int) -> bool:
        """Whether this process runs the guest, asked through whichever guard socket is its own."""
        if "T" in set(thread_states(pid)):
            return False
        for path in (self.folder / "guard", self.folder / "next" / "guard"):
            with suppress(QmpError), Qmp(str(path), pid, time.monotonic() + 1) as qmp:
                return bool(qmp.execute("query-status", until=time.monotonic() + 1)["running"])
        return False

    def owner(self) -> str:
        """``old``, ``new`` or ``gone``: who runs the guest, once exactly one process is left and does; else empty."""
        left = self.living()
        if not left:
            return "gone"
        if len(left) > 1 or not self.runs(left[0]):
            return ""
        return "old" if left[0] == self.old.vmm.pid else "new"

    def close(self) -> None:
        """Leave nothing."""
        for process in find_by_env(self.mark):
            os.kill(process.pid, signal.SIGKILL)
        for machine in self.machines:
            machine.close()
        self.ram.unlink(missing_ok=True)
        shutil.rmtree(self.folder)


class Swap(Lab):
    """The old one sends its device state to the new one."""

    prepared: Machine | None = None

    @property
    def new(self) -> Machine:
        """The one that shall take over."""
        assert self.prepared is not None
        return self.prepared

    def plan(self) -> SwapPlan:
        """As the driver arms the guard with it."""
        return SwapPlan("vm", self.old.vmm, self.new.vmm, str(self.claims))

    def prepare(self) -> None:
        """The new one waits; the guest runs. Once: it has to be there before the guard is armed."""
        if self.prepared is not None:
            return
        self.prepared = self.start_new()
        for each in (self.old, self.new):
            each.capabilities(return_path=True)
        self.new.do("migrate-incoming", uri=f"unix:{self.folder}/mig")

    def send(self) -> None:
        """The old one sends; nobody waits for it."""
        claims.note(str(self.claims), "begun")
        self.old.do("migrate", uri=f"unix:{self.folder}/mig")
        claims.note(str(self.claims), "accepted")

    def load(self) -> None:
        """Everything is over there, and stands still."""
        self.send()
        wait(lambda: str(self.old.do("query-migrate")["status"]) == "completed", "the old one to have sent")
        wait(lambda: str(self.new.do("query-status")["status"]) == "paused", "the new one to have loaded")

    def claim_new(self) -> None:
        """The commit point."""
        self.claim(f"new:{self.new.vmm.pid}:{self.new.vmm.start_ticks}")

    def rename(self) -> None:
        """Its sockets take the old one's places."""
        for name in ("qmp", "guard"):
            (self.folder / "next" / name).rename(self.folder / name)


class Replace(Lab):
    """The old one writes its device state to a file; another one is started from it."""

    new: Machine
    candidates: tuple[tuple[str, ...], ...] = ()

    def plan(self) -> ReplacePlan:
        """As the driver arms the guard with it."""
        name, _, value = self.mark.partition("=")
        return ReplacePlan(
            vm="vm",
            old=self.old.vmm,
            claims=str(self.claims),
            state_file=str(self.state),
            qmp=str(self.folder / "next" / "guard"),
            argv=self.candidates or (self.incoming(),),
            environ=(("PATH", os.environ["PATH"]), (name, value)),
            mark=self.mark,
            log=str(self.log),
        )

    def save(self, *, done: bool = True) -> None:
        """Device state into the file."""
        self.old.capabilities(return_path=False)
        handle = os.open(self.state, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        try:
            self.old.do("getfd", handle, fdname="state")
        finally:
            os.close(handle)
        self.old.do("stop")
        claims.note(str(self.claims), "begun")
        self.old.do("migrate", uri="fd:state")
        claims.note(str(self.claims), "accepted")
        if done:
            wait(
                lambda: str(self.old.do("query-migrate")["status"]) == "completed",
                "the old one to have saved",
            )

    def claim_file(self) -> None:
        """From here the old one never runs the guest again."""
        data = self.state.read_bytes()
        self.claim(f"file:{len(data)}:{hashlib.sha256(data).hexdigest()}")

    def file(self) -> None:
        """Saved, claimed, the old one dead."""
        self.save()
        self.claim_file()
        self.old.kill()

    def load(self, *, done: bool = True) -> None:
        """A new one, started by an updater, loads the file."""
        self.new = self.start_new()
        self.new.capabilities(return_path=False)
        handle = os.open(self.state, os.O_RDONLY)
        try:
            self.new.do("getfd", handle, fdname="state")
        finally:
            os.close(handle)
        self.new.do("migrate-incoming", uri="fd:state")
        if done:
            wait(lambda: str(self.new.do("query-status")["status"]) == "paused", "the new one to have loaded")

    def claim_new(self) -> None:
        """The new one may be told to go on."""
        self.claim(f"new:{self.new.vmm.pid}:{self.new.vmm.start_ticks}")


class Guard:
    """The guard as a process, armed by this test."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.log = folder / "guard.log"
        folder.mkdir(mode=0o700)
        self.process: subprocess.Popen[bytes] | None = None
        self.connection: socket.socket | None = None

    def start(self) -> None:
        """Start it, and connect."""
        command = [sys.executable, "-m", "caesura_pause_guard", "--state-dir", str(self.folder)]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(command, stderr=log)
        handle = os.open(self.folder, os.O_RDONLY)
        connection = socket.socket(socket.AF_UNIX)
        try:

            def answers() -> bool:
                """A process that a killed guard was about to start holds that one's socket until it executes its program."""
                nonlocal connection
                with suppress(OSError):
                    connection.connect(socket_address(handle))
                    connection.sendall(b'{"do": "status"}\n')
                    if connection.recv(1 << 20):
                        return True
                connection.close()
                connection = socket.socket(socket.AF_UNIX)
                return False

            wait(answers, "the guard to answer")
        finally:
            os.close(handle)
        self.connection = connection

    def ask(self, **request: Any) -> dict[str, Any]:
        """One request, one answer."""
        assert self.connection is not None
        self.connection.sendall(json.dumps(request).encode() + b"\n")
        answer: dict[str, Any] = json.loads(self.connection.makefile().readline())
        return answer

    def arm(self, *plans: ResumePlan) -> None:
        """For a long time: it fires when we let go."""
        told = [plan_to_json(plan) for plan in plans]
        deadline = time.monotonic() + 60
        answer = self.ask(do="arm", operation="op", boot_id=boot_id(), deadline=deadline, plans=told)
        assert answer["ok"], answer

    def let_fire(self) -> None:
        """Close the connection that armed it, and make another one to ask."""
        assert self.connection is not None
        self.connection.close()
        handle = os.open(self.folder, os.O_RDONLY)
        try:
            self.connection = socket.socket(socket.AF_UNIX)
            self.connection.connect(socket_address(handle))
        finally:
            os.close(handle)

    def kill(self) -> None:
        """-9, before it can see that whoever armed it is gone."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None
        if self.connection is not None:
            self.connection.close()

    def record(self) -> dict[str, Any]:
        """What it says it did to the VM, once it is done."""
        wait(lambda: str(self.ask(do="status")["state"]) == "fired", "the guard to be done")
        catch: dict[str, Any] = self.ask(do="status")["intent"]["fired"]["vms"]["vm"]
        return catch


@pytest.fixture
def place() -> Iterator[Path]:
    """A folder with a path short enough for QEMU's sockets."""
    made = Path(tempfile.mkdtemp(prefix="cg", dir="/tmp"))
    yield made
    shutil.rmtree(made, ignore_errors=True)


@pytest.fixture
def guard(place: Path) -> Iterator[Guard]:
    """Not started yet."""
    made = Guard(place / "g")
    yield made
    made.kill()


def ram(folder: Path) -> Path:
    """A RAM file in tmpfs."""
    return Path("/dev/shm") / f"{folder.parent.name}-{folder.name}.ram"  # noqa: S108 - the kernel's tmpfs is meant


@pytest.fixture
def swap(place: Path) -> Iterator[Swap]:
    """A VM that runs."""
    (place / "v").mkdir()
    made = Swap(place / "v", ram(place / "v"))
    yield made
    made.close()


@pytest.fixture
def replace(place: Path) -> Iterator[Replace]:
    """A VM that runs."""
    (place / "v").mkdir()
    made = Replace(place / "v", ram(place / "v"))
    yield made
    made.close()


def lock_disk(lab: Lab) -> int:
    """Hold QEMU's image lock as a third process would: "nobody else writes" (``block/file-posix.c``: byte 200 + 1)."""
    handle = os.open(lab.disk, os.O_RDWR)
    f_ofd_setlk = 37
    flock = struct.pack("hhqqi4x", fcntl.F_RDLCK, os.SEEK_SET, 201, 1, 0)
    fcntl.fcntl(handle, f_ofd_setlk, flock)
    return handle


def unlock_when_dead(handle: int, machine: Machine) -> None:
    """The third process lets go as soon as the new one was given up."""

    def watch() -> None:
        with suppress(AssertionError):
            wait(lambda: not alive(machine.vmm.pid, machine.vmm.start_ticks), "the new one to be given up")
        os.close(handle)

    threading.Thread(target=watch, daemon=True).start()


# -- swap: what was done before everything broke off, and who must run the guest in the end ------------------------


def swap_prepared(lab: Swap) -> None:
    lab.prepare()


def swap_hung(lab: Swap) -> None:
    lab.prepare()
    os.kill(lab.new.vmm.pid, signal.SIGSTOP)
    lab.send()
    wait(lambda: "STOP" in lab.old.qmp.events or not answers(lab.old), "the old one to stand still")


def answers(machine: Machine) -> bool:
    """Whether QMP says anything within a tenth of a second."""
    try:
        machine.qmp.execute("query-status", until=time.monotonic() + 0.1)
    except QmpError:
        return False
    return True


def swap_new_killed(lab: Swap) -> None:
    lab.prepare()
    lab.load()
    lab.new.kill()


def swap_loaded(lab: Swap) -> None:
    lab.prepare()
    lab.load()


def swap_rolling_back(lab: Swap) -> None:
    lab.prepare()
    lab.load()
    lab.claim("old")


def swap_claimed(lab: Swap) -> None:
    lab.prepare()
    lab.load()
    os.kill(lab.old.vmm.pid, signal.SIGSTOP)
    lab.claim_new()


def swap_claimed_and_held(lab: Swap) -> None:
    swap_claimed(lab)
    os.kill(lab.new.vmm.pid, signal.SIGSTOP)


def swap_claimed_old_dead(lab: Swap) -> None:
    lab.prepare()
    lab.load()
    lab.claim_new()
    lab.old.kill()


def swap_running(lab: Swap) -> None:
    swap_claimed(lab)
    lab.new.do("cont")


def swap_renamed(lab: Swap) -> None:
    swap_running(lab)
    lab.old.kill()
    lab.rename()


def swap_refused(lab: Swap) -> None:
    swap_claimed(lab)
    unlock_when_dead(lock_disk(lab), lab.new)


def swap_old_dead_loaded(lab: Swap) -> None:
    lab.prepare()
    lab.load()
    lab.old.kill()


def swap_old_dead_waiting(lab: Swap) -> None:
    lab.prepare()
    lab.old.kill()


def swap_new_dead_after_claim(lab: Swap) -> None:
    swap_claimed(lab)
    lab.new.do("cont")
    lab.new.kill()


SWAP: dict[Phase, str] = {
    swap_prepared: "old",
    swap_hung: "old",
    swap_new_killed: "old",
    swap_loaded: "old",
    swap_rolling_back: "old",
    swap_claimed: "new",
    swap_claimed_and_held: "new",
    swap_claimed_old_dead: "new",
    swap_running: "new",
    swap_renamed: "new",
    swap_refused: "old",
    swap_old_dead_loaded: "new",
    swap_old_dead_waiting: "gone",
    swap_new_dead_after_claim: "gone",  # it ran: the old one's state is of the past
}


# -- replace ------------------------------------------------------------------------------------------------------


def replace_before(lab: Replace) -> None:
    """The guest runs."""


def replace_stopped(lab: Replace) -> None:
    claims.note(str(lab.claims), "begun")
    lab.old.do("stop")


def replace_saving(lab: Replace) -> None:
    lab.save(done=False)


def replace_saved(lab: Replace) -> None:
    lab.save()


def replace_filed(lab: Replace) -> None:
    lab.save()
    lab.claim_file()


def replace_filed_old_dead(lab: Replace) -> None:
    lab.file()


def replace_started(lab: Replace) -> None:
    lab.file()
    lab.new = lab.start_new()


def replace_loading(lab: Replace) -> None:
    lab.file()
    lab.load(done=False)


def replace_loaded(lab: Replace) -> None:
    lab.file()
    lab.load()


def replace_claimed(lab: Replace) -> None:
    lab.file()
    lab.load()
    lab.claim_new()


def replace_running(lab: Replace) -> None:
    replace_claimed(lab)
    lab.new.do("cont")


def replace_refused(lab: Replace) -> None:
    replace_claimed(lab)
    unlock_when_dead(lock_disk(lab), lab.new)


def replace_new_dead_after_claim(lab: Replace) -> None:
    replace_claimed(lab)
    lab.new.kill()


def replace_old_dead(lab: Replace) -> None:
    lab.save()
    lab.old.kill()


def replace_short(lab: Replace) -> None:
    lab.file()
    os.truncate(lab.state, lab.state.stat().st_size - 5000)


def replace_garbled(lab: Replace) -> None:
    lab.file()
    data = bytearray(lab.state.read_bytes())
    data[len(data) // 2] ^= 1
    lab.state.write_bytes(data)


def replace_program_missing(lab: Replace) -> None:
    lab.file()


def replace_state_refused(lab: Replace) -> None:
    lab.file()


def program_missing(lab: Replace) -> tuple[tuple[str, ...], ...]:
    good = lab.incoming()
    return (("/nonexistent/qemu", *good[1:]), good)


def state_refused(lab: Replace) -> tuple[tuple[str, ...], ...]:
    return (lab.incoming(disk=False), lab.incoming())


CANDIDATES: dict[Phase, Callable[[Replace], tuple[tuple[str, ...], ...]]] = {
    replace_program_missing: program_missing,
    replace_state_refused: state_refused,
}


REPLACE: dict[Phase, str] = {
    replace_before: "old",
    replace_stopped: "old",
    replace_saving: "old",
    replace_saved: "old",
    replace_filed: "new",
    replace_filed_old_dead: "new",
    replace_started: "new",
    replace_loading: "new",
    replace_loaded: "new",
    replace_claimed: "new",
    replace_running: "new",
    replace_refused: "new",
    replace_new_dead_after_claim: "gone",  # whether it ran, nobody can tell
    replace_old_dead: "gone",
    replace_short: "gone",
    replace_garbled: "gone",
    replace_program_missing: "new",
    replace_state_refused: "new",
}


# -- the guard alone, and the guard killed and started again -------------------------------------------------------


def settle(lab: Swap | Replace, guard: Guard, phase: Phase, *, restarted: bool) -> dict[str, Any]:
    """Play up to the phase with an armed guard, then leave it alone; what it says it did."""
    guard.start()
    if isinstance(lab, Swap):
        lab.prepare()
    elif phase in CANDIDATES:
        lab.candidates = CANDIDATES[phase](lab)
    guard.arm(lab.plan())
    phase(lab)
    began = time.monotonic()
    if restarted:
        guard.kill()
        guard.start()
    else:
        guard.let_fire()
    record = guard.record()
    took_s = time.monotonic() - began
    assert took_s < SOON_S, f"it took {took_s:.2f} s"
    return record


@pytest.mark.parametrize("restarted", [False, True], ids=["fires", "killed-and-restarted"])
@pytest.mark.parametrize("phase", SWAP, ids=lambda phase: phase.__name__)
def test_swap(swap: Swap, guard: Guard, phase: Phase, restarted: bool) -> None:
    record = settle(swap, guard, phase, restarted=restarted)
    assert swap.owner() == SWAP[phase]
    new = f"new:{swap.new.vmm.pid}:{swap.new.vmm.start_ticks}"
    assert record["owner"] == {"old": "old", "new": new, "gone": ""}[SWAP[phase]]
    assert record["end"] == ("gone" if SWAP[phase] == "gone" else "running")
    assert record["was_frozen"] == (phase not in (swap_prepared, swap_running, swap_renamed))
    if SWAP[phase] == "old":
        assert not swap.new.resumed(), "the new one ran before the old one went on"
    if phase is swap_refused:
        assert any("lock" in why for why in claims.failures(str(swap.claims)))
        assert "lock" in guard.log.read_text()


@pytest.mark.parametrize("restarted", [False, True], ids=["fires", "killed-and-restarted"])
@pytest.mark.parametrize("phase", REPLACE, ids=lambda phase: phase.__name__)
def test_replace(replace: Replace, guard: Guard, phase: Phase, restarted: bool) -> None:
    record = settle(replace, guard, phase, restarted=restarted)
    assert replace.owner() == REPLACE[phase]
    assert record["end"] == ("gone" if REPLACE[phase] == "gone" else "running")
    _, owner = claims.current(str(replace.claims))
    assert owner is not None
    if REPLACE[phase] == "new":
        assert record["owner"] == owner.text == f"new:{owner.pid}:{owner.start_ticks}"
        assert replace.living() == [owner.pid]
    else:
        assert owner.text == REPLACE[phase]
        assert record["owner"] == ("old" if REPLACE[phase] == "old" else "")
    log = guard.log.read_text()
    if phase in (replace_claimed, replace_running):
        assert owner.pid == replace.new.vmm.pid, "it was claimed: nobody else may run the guest"
    if phase in (replace_started, replace_loading, replace_loaded, replace_refused):
        assert owner.pid != replace.new.vmm.pid
        assert not replace.new.resumed()
    if phase is replace_short:
        assert "bytes, not" in log
    if phase is replace_garbled:
        assert "SHA-256" in log
    if phase is replace_program_missing:
        assert "/nonexistent/qemu" in log
    if phase is replace_state_refused:
        assert "0000:00:01.0" in log or "virtio" in log or "Unknown savevm section" in log
    if phase in (replace_short, replace_garbled):
        assert not replace.log.exists(), "a new process was started on a bad file"


def test_started_by_the_guard_outlives_it(replace: Replace, guard: Guard) -> None:
    settle(replace, guard, replace_filed_old_dead, restarted=False)
    pid = replace.living()[0]
    child, mine = read_process(pid), guard.process
    assert child is not None
    assert mine is not None
    assert child.session == pid
    assert Path(f"/proc/{pid}/fd/2").readlink() == replace.log
    mine.send_signal(signal.SIGTERM)
    assert mine.wait(patient(PATIENCE_S)) == 0
    assert replace.owner() == "new"
    assert replace.living() == [pid]


def test_a_program_that_hangs_is_given_up(replace: Replace) -> None:
    good = replace.incoming()
    replace.candidates = (
        ("/bin/sleep", "60", "-incoming", "-S"),
        ("/bin/sh", "-c", "sleep 60", "-incoming", "-S"),
        good,
    )
    replace.file()
    plan = replace.plan()
    until_it_runs(plan)
    assert replace.owner() == "new"
    assert len(claims.failures(plan.claims)) == 2


def test_nobody_can_take_it_for_now(replace: Replace) -> None:
    """Every try fails and says why, within its time; the file is kept, and taken as soon as it can be."""
    replace.file()
    plan = replace.plan()
    handle = lock_disk(replace)
    for _ in range(2):
        began = time.monotonic()
        with pytest.raises(OSError, match=r"no new process could take the guest: .*lock"):
            resume_vm(plan)
        assert time.monotonic() - began < SOON_S
        assert replace.living() == []
        assert condition(plan) == "held"
    os.close(handle)
    resume_vm(plan)
    assert replace.owner() == "new"


def test_another_one_that_does_not_give_its_turn_back(swap: Swap) -> None:
    """Nobody waits for it for long."""
    swap.prepare()
    swap.load()
    handle = os.open(swap.claims, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    began = time.monotonic()
    resume_vm(swap.plan())
    assert 1 < time.monotonic() - began < SOON_S
    assert swap.owner() == "old"
    os.close(handle)


HOLDER = """
import fcntl, os, sys, time
from caesura_vmcontrol.qmp import Qmp
handle = os.open(sys.argv[1], os.O_RDONLY)
fcntl.flock(handle, fcntl.LOCK_EX)
held = Qmp(sys.argv[2], int(sys.argv[3]), time.monotonic() + 10)
print("holds", flush=True)
time.sleep(600)
"""


def test_an_updater_stopped_in_the_middle_of_its_way_out(place: Path) -> None:
    """It has the turn, and QEMU's guard socket: it is passed over, and the spare socket is used."""
    (place / "v").mkdir()
    lab = Swap(place / "v", ram(place / "v"), spare=True)
    argv = [sys.executable, "-c", HOLDER, str(lab.claims), lab.old.vmm.qmp, str(lab.old.vmm.pid)]
    holder = subprocess.Popen(argv, stdout=subprocess.PIPE)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"holds\n"
        holder.send_signal(signal.SIGSTOP)
        wait(lambda: set(thread_states(holder.pid)) == {"T"}, "the other one to stand")
        lab.prepare()
        lab.load()
        began = time.monotonic()
        resume_vm(lab.plan())
        assert time.monotonic() - began < patient(1.4), "it waited for its turn"
        assert condition(lab.plan()) == "running"
        assert lab.living() == [lab.old.vmm.pid]
        assert lab.old.do("query-status")["running"]
    finally:
        holder.kill()
        holder.wait()
        if holder.stdout is not None:
            holder.stdout.close()
        lab.close()


def test_killed_in_the_middle_again_and_again(place: Path, guard: Guard) -> None:
    """The guard is killed -9 at a random moment of its work and started again, until one lives long enough."""
    dice = random.Random(3)
    moments: list[Phase] = [replace_filed, swap_claimed, replace_loaded]
    for turn in range(6):
        phase = moments[turn % 3]
        folder = place / f"v{turn}"
        folder.mkdir()
        lab = (Swap if phase is swap_claimed else Replace)(folder, ram(folder))
        try:
            guard.folder = place / f"g{turn}"
            guard.folder.mkdir(mode=0o700)
            guard.start()
            if isinstance(lab, Swap):
                lab.prepare()
            guard.arm(lab.plan())
            phase(lab)
            for _ in range(3):
                guard.kill()
                guard.start()
                time.sleep(dice.random() * 0.12)  # not a wait: how far it gets
            guard.record()
            assert lab.owner() == "new", phase.__name__
        finally:
            guard.kill()
            lab.close()


def test_the_proof(swap: Swap) -> None:
    """A connection from before ``cont`` knows whether the process ever ran, whoever sent it, though it is dead."""
    swap.prepare()
    swap.load()
    new = swap.new.vmm
    with Qmp(new.qmp, new.pid, soon()) as quiet:
        assert end_unless_it_ran(quiet, new.pid, new.start_ticks, soon()) == "never_ran"
    assert not alive(new.pid, new.start_ticks)
    swap.old.do("cont")
    old = swap.old.vmm
    swap.old.do("stop")
    with Qmp(old.qmp, old.pid, soon()) as quiet:
        swap.old.do("cont")
        assert end_unless_it_ran(quiet, old.pid, old.start_ticks, soon()) == "runs"
    assert swap.owner() == "old"


def test_let_go_by_somebody_else_between_the_no_and_the_kill(
    swap: Swap, monkeypatch: pytest.MonkeyPatch
) -> None:
    """QEMU refused our ``cont`` and took the updater's a moment later: the guest runs there, and nobody kills it."""
    swap_claimed(swap)

    def refused(_: Qmp, __: float) -> QmpError:
        swap.new.do("cont")
        return QmpRefused("cont", "GenericError", "as the test wants it")

    monkeypatch.setattr(qemu_swap, "cont", refused)
    resume_vm(swap.plan())
    assert swap.owner() == "new"
    assert claims.current(str(swap.claims))[0] == 1


@pytest.mark.parametrize("kind", ["swap", "replace"])
def test_a_new_one_that_answers_late_keeps_the_guest(
    kind: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A busy machine: our ``cont`` is carried out when we have given up waiting for its answer. Killed then, the guest would be lost."""
    lab: Swap | Replace = request.getfixturevalue(kind)
    if isinstance(lab, Swap):
        swap_claimed(lab)
    else:
        replace_loaded(lab)
        lab.claim_new()

    def late(qmp: Qmp, until: float) -> QmpError | None:
        qmp.execute("cont", until=until)
        return QmpNoAnswer("it does not answer")

    monkeypatch.setattr(qemu_swap if kind == "swap" else qemu_replace, "cont", late)
    resume_vm(lab.plan())
    assert lab.owner() == "new"
    assert claims.failures(str(lab.claims)) == []
    assert claims.noted(str(lab.claims), "ran")


def test_one_that_began_to_run_as_it_was_killed_is_not_said_to_have_never_run(
    swap: Swap, monkeypatch: pytest.MonkeyPatch
) -> None:
    swap.prepare()
    swap.load()
    new = swap.new.vmm

    def continued_by_another(pid: int, start_ticks: int, until: float) -> None:
        os.kill(pid, signal.SIGCONT)
        swap.new.do("cont")
        kill_and_wait(pid, start_ticks, until)

    monkeypatch.setattr(qmp_commands, "kill_and_wait", continued_by_another)
    with Qmp(new.qmp, new.pid, soon()) as quiet:
        assert end_unless_it_ran(quiet, new.pid, new.start_ticks, soon()) == "unknown"


def test_the_new_one_hangs_at_cont(swap: Swap, monkeypatch: pytest.MonkeyPatch) -> None:
    """No answer is a no, and the proof holds: the old one goes on."""
    swap_claimed(swap)

    def hung(qmp: Qmp, until: float) -> QmpError | None:
        os.kill(swap.new.vmm.pid, signal.SIGSTOP)
        wait(lambda: set(thread_states(swap.new.vmm.pid)) == {"T"}, "the new one to hang")
        return cont(qmp, until)

    monkeypatch.setattr(qemu_swap, "cont", hung)
    resume_vm(swap.plan())
    assert swap.owner() == "old"
    assert not swap.new.resumed()
    assert "does not answer" in claims.failures(str(swap.claims))[0]


def test_an_updater_claims_while_its_process_is_cleared_away(
    replace: Replace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is killed must not be claimed the moment before: the next number is taken first."""
    replace_loaded(replace)
    new, told = replace.new.vmm, []
    text = f"new:{new.pid}:{new.start_ticks}"

    def claim_first(pid: int, start_ticks: int, until: float) -> None:
        if pid == new.pid:
            told.append(claims.claim(str(replace.claims), 2, text))
        kill_and_wait(pid, start_ticks, until)

    monkeypatch.setattr(qemu_replace, "kill_and_wait", claim_first)
    resume_vm(replace.plan())
    assert replace.owner() == "new"
    assert told
    assert text not in told


def test_claimed_but_not_loaded(swap: Swap) -> None:
    """Nobody of ours does that; QEMU would take ``cont`` as "run as soon as you have something"."""
    swap.prepare()
    swap.claim_new()
    with pytest.raises(OSError, match="inmigrate"):
        resume_vm(swap.plan())
    assert len(swap.living()) == 2


# -- two at once ---------------------------------------------------------------------------------------------------


def until_it_runs(plan: ResumePlan) -> None:
    """What the driver does: ``resume_vm`` until ``condition`` is content."""
    until = time.monotonic() + patient(PATIENCE_S)
    while True:
        why = "no reason"
        try:
            resume_vm(plan)
        except OSError as error:
            why = str(error)
        if condition(plan) in ("running", "gone"):
            return
        assert time.monotonic() < until, f"it does not come to an end: {why}"


RACED: list[Phase] = [
    swap_loaded,
    swap_claimed,
    replace_saved,
    replace_filed,
    swap_refused,
    replace_loaded,
    replace_claimed,
    swap_hung,
    replace_refused,
    swap_old_dead_loaded,
]


@pytest.mark.parametrize("turn", [1, 2])
@pytest.mark.parametrize("phase", RACED, ids=lambda phase: phase.__name__)
def test_two_resumers(place: Path, phase: Phase, turn: int) -> None:
    """The guard's thaw and the driver's at once, from a random moment each."""
    dice = random.Random(f"{phase.__name__} {turn}")
    (place / "v").mkdir()
    is_swap = phase in SWAP
    lab = (Swap if is_swap else Replace)(place / "v", ram(place / "v"))
    try:
        phase(lab)
        plan = lab.plan()
        wrong: list[BaseException] = []

        def resume(after_s: float) -> None:
            try:
                time.sleep(after_s)
                until_it_runs(plan)
            except BaseException as error:  # noqa: BLE001 - told below
                wrong.append(error)

        both = [threading.Thread(target=resume, args=(dice.random() * 0.03,)) for _ in range(2)]
        for each in both:
            each.start()
        for each in both:
            each.join()
        assert not wrong
        expected = SWAP[phase] if is_swap else REPLACE[phase]
        assert lab.owner() == expected
        if is_swap and expected == "old":
            assert not lab.new.resumed()
    finally:
        lab.close()


def test_the_updater_goes_on_while_the_guard_decides(place: Path) -> None:
    """The driver's happy path (it takes no turn) against the guard's resume_vm, which comes first, or late, or in between."""
    ends = []
    for turn, moment in enumerate((0.0, 0.001, 0.002, 0.004, 0.006, 0.01, 0.02, 1.0)):
        folder = place / f"v{turn}"
        folder.mkdir()
        lab = Swap(folder, ram(folder))
        try:
            lab.prepare()
            plan = lab.plan()

            def hand_over(lab: Swap = lab) -> None:
                with suppress(QmpError):  # the new one may be killed under it: it has lost then
                    lab.send()
                    while lab.new.do("query-status")["status"] != "paused":
                        time.sleep(0.001)
                    os.kill(lab.old.vmm.pid, signal.SIGSTOP)
                    text = f"new:{lab.new.vmm.pid}:{lab.new.vmm.start_ticks}"
                    if claims.claim(str(lab.claims), 1, text) == text:
                        lab.new.do("cont")

            driver = threading.Thread(target=hand_over)
            driver.start()
            time.sleep(moment)  # not a wait: how far the other one gets
            until_it_runs(plan)
            driver.join()
            until_it_runs(plan)  # the guard goes on enforcing: the stop signal may have come after it
            ends.append(lab.owner())
            assert ends[-1] in ("old", "new"), ends
            if ends[-1] == "old":
                assert not lab.new.resumed()
        finally:
            lab.close()
    assert set(ends) == {"old", "new"}, "the moments are too much alike"


def test_one_that_hangs_delays_nobody(place: Path, guard: Guard) -> None:
    """Another client holds the first VM's guard socket; the second one runs at once, the first one when it can."""
    labs = []
    try:
        for name in ("v1", "v2"):
            (place / name).mkdir()
            labs.append(Lab(place / name, ram(place / name)))
        guard.start()
        guard.arm(*(QemuPlan(lab.folder.name, lab.old.vmm) for lab in labs))
        for lab in labs:
            lab.old.do("stop")
        with Qmp(labs[0].old.vmm.qmp, labs[0].old.vmm.pid, soon()):
            began = time.monotonic()
            guard.let_fire()
            wait(lambda: bool(labs[1].old.do("query-status")["running"]), "the free one to run", 1.0)
            assert time.monotonic() - began < patient(0.5)
            answer = guard.ask(do="status")
            assert answer["state"] == "firing"
            assert not labs[0].old.do("query-status")["running"]
        wait(lambda: str(guard.ask(do="status")["state"]) == "fired", "the other one", SOON_S)
        assert labs[0].old.do("query-status")["running"]
    finally:
        for lab in labs:
            lab.close()


def test_disarmed_after_a_swap(swap: Swap, guard: Guard) -> None:
    """The way it should go: the new one runs, its sockets have the old places, the guard believes it."""
    guard.start()
    swap.prepare()
    guard.arm(swap.plan())
    swap.load()
    swap.claim_new()
    swap.new.do("cont")
    swap.old.kill()
    swap.rename()
    answer = guard.ask(do="disarm", operation="op")
    assert answer["ok"], answer
    assert answer["record"] is None
    assert swap.owner() == "new"


def test_claims_that_were_lost_before_the_new_one_had_anything(swap: Swap) -> None:
    swap.prepare()
    plan = swap.plan()
    swap.claims.rmdir()
    resume_vm(plan)
    assert swap.owner() == "old"
    assert condition(plan) == "running"


def test_claims_that_were_lost_when_the_new_one_had_everything(swap: Swap) -> None:
    """And the old one was stopped, so that the new one could be claimed."""
    swap.prepare()
    swap.load()
    plan = swap.plan()
    shutil.rmtree(swap.claims)
    sigstop(swap.old.vmm.pid, swap.old.vmm.start_ticks)
    resume_vm(plan)
    assert swap.owner() == "new"
    assert condition(plan) == "running"


def test_claims_that_were_lost_before_a_state_was_claimed(replace: Replace) -> None:
    replace.save()
    plan = replace.plan()
    shutil.rmtree(replace.claims)
    sigstop(replace.old.vmm.pid, replace.old.vmm.start_ticks)
    resume_vm(plan)
    assert replace.owner() == "old"


@pytest.mark.parametrize("method", ["swap", "replace"])
def test_a_guard_that_comes_late_to_an_operation_that_is_over(
    method: str, request: pytest.FixtureRequest
) -> None:
    """It could not be disarmed, and the operator has paused the guest since."""
    lab: Lab = request.getfixturevalue(method)
    if isinstance(lab, Swap):
        lab.prepare()
        lab.new.kill()
    plan = lab.plan()  # type: ignore[attr-defined]
    lab.claims.rmdir()
    lab.old.do("stop")
    resume_vm(plan)
    assert str(lab.old.do("query-status")["status"]) == "paused"
