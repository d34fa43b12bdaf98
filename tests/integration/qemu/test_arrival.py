"""Another boot resumes guests from their files: the arrival as a process of its own, with real QEMU processes.

The carve-out is a folder, and "another boot" is another boot id: all processes of the former one are dead, as after a change of the kernel.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest

from caesura_testing.patience import patient
from caesura_vmcontrol import boot_counters, claims
from caesura_vmcontrol.intent import Intent, IntentFile
from caesura_vmcontrol.kernel_change import Arrival, ClockPair, HostClock, KernelChange, Left
from caesura_vmcontrol.process_control import find_by_env
from caesura_vmcontrol.procfs import alive, boot_id, read_process
from caesura_vmcontrol.qemu_plans import AcrossBoots, ReplacePlan, Vmm
from caesura_vmcontrol.qmp import Qmp, QmpError
from caesura_vmcontrol.qmp_commands import reach
from caesura_vmcontrol.ram_places import identify

QEMU = "/usr/bin/qemu-system-x86_64"
PATIENCE_S = 30.0
NEXT_BOOT = "bbbbbbbb-0000-4000-8000-000000000002"
THIRD_BOOT = "cccccccc-0000-4000-8000-000000000003"
PATTERN = bytes(range(256)) * 256
AT = 32 << 20  # in the guest's RAM, where its firmware has nothing

AS_ANOTHER_BOOT = """
import sys
from caesura_vmcontrol import procfs
procfs.BOOT_ID = sys.argv[1]
from caesura_pause_guard import arrival
arrival.carve_out_error = lambda path: sys.argv[2]
arrival._SOCKETS = sys.argv[1] + "-sockets"
arrival.kvm_device.make_ready = lambda log: None
from caesura_pause_guard.__main__ import main
sys.exit(main(sys.argv[3:]))
"""

pytestmark = pytest.mark.skipif(not Path(QEMU).exists(), reason="qemu-system-x86_64 is not installed")


def wait(holds: Callable[[], bool], what: str) -> None:
    """Wait for another process."""
    until = time.monotonic() + patient(PATIENCE_S)
    while not holds():
        assert time.monotonic() < until, what
        time.sleep(0.003)


class Host:
    """One guest that was saved by the former boot, and what the next boots find of it."""

    def __init__(self, place: Path) -> None:
        self.state_dir = place / "state"
        self.carve_out = place / "carve-out"
        self.run = place / "run"
        self.claims = self.carve_out / "operations" / "vm" / "op.claims"
        self.state = self.carve_out / "operations" / "vm" / "op.state"
        self.ram = self.carve_out / "vm.ram"
        for folder in (self.state_dir, self.run / "next", self.claims):
            folder.mkdir(parents=True)
        self.mark = f"CAESURA_TEST_MARK={place}"
        self.store = IntentFile(str(self.state_dir))
        with self.ram.open("wb") as file:
            file.truncate(64 << 20)
            file.seek(AT)
            file.write(PATTERN)
        self.old = self._save()
        self.plan = self._plan()
        boot_counters.reset(str(self.state_dir), str(self.carve_out), "op", boot_id())
        self.leave()
        self.reboot()

    def argv(self, sockets: Path, *more: str) -> tuple[str, ...]:
        """A complete command line."""
        return (
            *(QEMU, "-nodefaults", "-no-user-config", "-display", "none", "-accel", "tcg", "-cpu", "qemu64"),
            *("-machine", "pc-q35-7.2,memory-backend=ram", "-m", "64"),
            *("-object", f"memory-backend-file,id=ram,mem-path={self.ram},size=64M,share=on"),
            *("-qmp", f"unix:{sockets}/guard,server=on,wait=off", *more),
        )

    def _save(self) -> Vmm:
        """The former boot: a guest runs, is saved and claimed for the file, and its process ends."""
        process = subprocess.Popen(self.argv(self.run), stderr=subprocess.DEVNULL, start_new_session=True)
        wait((self.run / "guard").exists, "the old QEMU to start")
        own = read_process(process.pid)
        assert own is not None
        until = time.monotonic() + patient(PATIENCE_S)
        with reach(process.pid, own.start_ticks, [str(self.run / "guard")], until) as qmp:
            wanted = [{"capability": "x-ignore-shared", "state": True}]
            qmp.execute("migrate-set-capabilities", {"capabilities": wanted}, until=until)
            qmp.execute("stop", until=until)
            handle = os.open(self.state, os.O_WRONLY | os.O_CREAT, 0o600)
            qmp.execute("getfd", {"fdname": "state"}, until=until, handle=handle)
            os.close(handle)
            claims.note(str(self.claims), "begun")
            qmp.execute("migrate", {"uri": "fd:state"}, until=until)
            claims.note(str(self.claims), "accepted")
            wait(
                lambda: qmp.execute("query-migrate", until=until)["status"] == "completed",
                "its state to be saved",
            )
        process.kill()
        process.wait()
        data = self.state.read_bytes()
        self.file = f"file:{len(data)}:{hashlib.sha256(data).hexdigest()}"
        claims.claim(str(self.claims), 1, self.file)
        return Vmm(process.pid, own.start_ticks, str(self.run / "guard"))

    def _plan(self) -> ReplacePlan:
        name, _, value = self.mark.partition("=")
        there, identity = self.ram.stat(), identify(str(self.ram))
        return ReplacePlan(
            vm="vm",
            old=self.old,
            claims=str(self.claims),
            state_file=str(self.state),
            qmp=str(self.run / "next" / "guard"),
            argv=(self.argv(self.run / "next", "-incoming", "defer", "-S"),),
            environ=(("PATH", os.environ["PATH"]), (name, value)),
            mark=self.mark,
            log=str(self.state_dir / "next.log"),
            ram=(str(self.ram), there.st_dev + 1, there.st_ino),  # a device's number may change
            across=AcrossBoots(
                boot_id=boot_id(),
                fs_id=identity.fs_id,
                inode=identity.inode,
                size=identity.size,
                carve_out=str(self.carve_out),
                uid=os.getuid(),
                gid=os.getgid(),
                groups=(),
                folders=(str(self.run / "next"),),
            ),
        )

    def leave(self, **changes: object) -> None:
        """What the former guard wrote last."""
        left = Left(ClockPair(0, time.time(), 0.0), time.monotonic(), "6.1.0-47-amd64")
        change = replace(KernelChange("6.1.0-48-amd64", str(self.carve_out), left=left), **changes)  # type: ignore[arg-type]
        self.store.store(Intent("op", boot_id(), 0.0, 1.0, (self.plan,), kernel_change=change))

    def begin(self, boot: str = NEXT_BOOT, by: str = "initramfs", wrong: str = "") -> subprocess.Popen[bytes]:
        """An arrival in another boot. ``wrong``: why the carve-out is not there."""
        boot_file = self.state_dir.parent / f"boot-{boot[:8]}"
        boot_file.write_text(boot)
        argv = [sys.executable, "-c", AS_ANOTHER_BOOT, str(boot_file), wrong]
        return subprocess.Popen([*argv, "--arrive", "--by", by, "--state-dir", str(self.state_dir)])

    def reboot(self) -> None:
        """A new boot has an empty /run."""
        shutil.rmtree(self.run)

    def arrive(self, boot: str = NEXT_BOOT, by: str = "initramfs", wrong: str = "") -> int:
        """To its end; the exit code."""
        return self.begin(boot, by, wrong).wait(patient(PATIENCE_S))

    @property
    def arrival(self) -> Arrival:
        """As it was recorded."""
        intent = self.store.read()
        assert intent is not None
        assert intent.kernel_change is not None
        assert intent.kernel_change.arrival is not None
        return intent.kernel_change.arrival

    def processes(self) -> list[int]:
        """Of this guest."""
        return [each.pid for each in find_by_env(self.mark)]

    def runs(self) -> bool:
        """Whether exactly one process has the guest and runs it with its memory."""
        pids = self.processes()
        if len(pids) != 1:
            return False
        until = time.monotonic() + patient(PATIENCE_S)
        with suppress(QmpError), Qmp(str(self.run / "next" / "guard"), pids[0], until) as qmp:
            with self.ram.open("rb") as file:
                file.seek(AT)
                same = file.read(len(PATTERN)) == PATTERN
            return same and bool(qmp.execute("query-status", until=until)["running"])
        return False

    def close(self) -> None:
        """Leave nothing."""
        for pid in self.processes():
            os.kill(pid, signal.SIGKILL)


@pytest.fixture
def host() -> Iterator[Host]:
    """A guest in its files, the former kernel left."""
    place = Path(tempfile.mkdtemp(prefix="ca", dir="/tmp"))
    made = Host(place)
    yield made
    made.close()
    shutil.rmtree(place, ignore_errors=True)


def test_the_guest_goes_on_in_another_boot_and_a_second_arrival_changes_nothing(host: Host) -> None:
    assert host.arrive() == 0
    assert host.runs()
    there = host.arrival
    first = host.processes()
    assert (there.boot_id, there.by, there.vms["vm"].end, there.vms["vm"].pid) == (
        NEXT_BOOT,
        "initramfs",
        "running",
        *first,
    )
    _, owner = claims.current(str(host.claims))
    assert owner is not None
    assert (owner.kind, owner.pid, owner.boot8) == ("new", first[0], NEXT_BOOT[:8])
    assert host.arrive(by="unit") == 0
    assert host.processes() == first
    assert host.arrival.by == "initramfs"


def test_a_stranger_with_the_old_pid_lives_on(host: Host) -> None:
    stranger = subprocess.Popen(["sleep", "1000"])
    try:
        own = read_process(stranger.pid)
        assert own is not None
        host.plan = replace(host.plan, old=Vmm(own.pid, own.start_ticks, host.plan.old.qmp))
        host.leave()
        assert host.arrive() == 0
        assert host.runs()
        assert alive(own.pid, own.start_ticks)
    finally:
        stranger.kill()
        stranger.wait()


def test_the_new_process_of_another_boot_ran_the_guest_so_nothing_is_loaded(host: Host) -> None:
    """Its pid may be anybody's; its memory is ahead of the state file."""
    assert host.arrive() == 0
    host.close()
    wait(lambda: not host.processes(), "it to be dead")
    assert host.arrive(THIRD_BOOT) == 5
    assert not host.processes()
    assert host.arrival.vms["vm"].end == "lost"


def test_a_boot_without_the_carve_out_in_between(host: Host) -> None:
    assert host.arrive(wrong="no carve-out here") == 4
    assert host.arrive(by="unit", wrong="no carve-out here") == 5
    assert host.arrive(THIRD_BOOT) == 5
    assert not host.processes()
    assert "another kernel had the guests' memory" in host.arrival.vms["vm"].why + " ".join(
        host.arrival.doubts
    )


def test_a_carve_out_that_is_late_in_the_same_boot(host: Host) -> None:
    assert host.arrive(wrong="not there yet") == 4
    assert host.arrive(by="unit") == 0
    assert host.runs()
    assert host.arrival.by == "unit"


def test_counters_that_differ(host: Host) -> None:
    boot_counters.raise_counter(str(host.state_dir), "another boot")
    assert host.arrive() == 5
    assert not host.processes()
    assert claims.current(str(host.claims))[1] == claims.Owner("gone")


def test_a_gap_that_no_counted_boot_explains(host: Host) -> None:
    up_s = time.clock_gettime(time.CLOCK_BOOTTIME)
    host.leave(left=Left(ClockPair(0, time.time() - up_s - 1000, 0.0), 1.0, "6.1"))
    assert host.arrive() == 5
    assert not host.processes()


def test_a_host_that_crashed_before_it_was_left(host: Host) -> None:
    host.leave(left=None)
    assert host.arrive() == 5
    assert not host.processes()


def test_a_ram_file_that_was_replaced(host: Host) -> None:
    copy = host.ram.with_suffix(".copy")
    shutil.copy(host.ram, copy)
    copy.replace(host.ram)
    assert host.arrive() == 5
    assert not host.processes()
    assert "deleted and created again" in host.arrival.vms["vm"].why


def test_a_state_file_that_is_garbled(host: Host) -> None:
    data = bytearray(host.state.read_bytes())
    data[-1] ^= 1
    host.state.write_bytes(data)
    assert host.arrive() == 5
    assert not host.processes()


def test_a_guard_that_left_claims_no_process(host: Host) -> None:
    """``left`` of the former boot, by a pid that is somebody's now: the guest is in the file."""
    own = read_process(os.getpid())
    assert own is not None
    text = claims.Owner("left", pid=own.pid, start_ticks=own.start_ticks, boot8=boot_id()[:8]).text
    claims.claim(str(host.claims), 2, text)
    assert host.arrive() == 0
    assert host.runs()


def test_two_arrivals_at_once(host: Host) -> None:
    both = [host.begin(), host.begin(by="unit")]
    assert [each.wait(patient(PATIENCE_S)) for each in both] == [0, 0]
    assert host.runs()


@pytest.mark.parametrize("step", range(8))
def test_an_arrival_that_is_killed_and_run_again(host: Host, step: int) -> None:
    """At the traces that it leaves on its way, one after the other; wherever it is, the next one ends it."""

    def passed() -> bool:
        number, owner = claims.current(str(host.claims))
        counter = boot_counters.read(str(host.state_dir))
        traces = (
            True,
            (host.state_dir / "arrival.lock").exists(),
            counter is not None and counter.count == 1,
            claims.admitted(str(host.claims), NEXT_BOOT[:8]),
            bool(host.processes()),
            (host.run / "next" / "guard").exists(),
            number > 1,
            owner is not None and owner.kind == "new" and claims.noted(str(host.claims), "ran"),
        )
        return bool(traces[step])

    first = host.begin()
    wait(lambda: passed() or first.poll() is not None, f"step {step}")
    first.kill()
    first.wait()
    before = host.processes()
    assert host.arrive() == 0
    assert host.runs()
    if step == 7:
        assert host.processes() == before


def test_an_intent_that_cannot_be_read_stays(host: Host) -> None:
    path = host.state_dir / "guard-intent.json"
    path.write_text("garbled")
    assert host.arrive() == 3
    assert path.read_text() == "garbled"
    assert not host.processes()


def test_the_boot_that_armed_it_has_nothing_to_arrive_at(host: Host) -> None:
    assert host.arrive(boot_id()) == 0
    assert not host.processes()


def test_the_ordinary_guard_arrives_where_nobody_did(host: Host) -> None:
    """And waits for its disarm."""
    boot_file = host.state_dir.parent / "boot"
    boot_file.write_text(NEXT_BOOT)
    argv = [sys.executable, "-c", AS_ANOTHER_BOOT, str(boot_file), "", "--state-dir", str(host.state_dir)]
    guard = subprocess.Popen(argv, stderr=subprocess.PIPE)
    try:
        wait(host.runs, "the guest to run")

        def recorded() -> bool:
            with suppress(AssertionError, KeyError):
                return host.arrival.vms["vm"].end == "running"
            return False

        wait(recorded, "the arrival to be recorded")
        assert host.arrival.by == "guard"
        guard.terminate()
        _, said = guard.communicate(timeout=patient(PATIENCE_S))
    finally:
        guard.kill()  # with a guest that it cannot resume it never ends by itself
        guard.wait()
    events = [json.loads(line)["event"] for line in said.splitlines()]
    assert "guard.intent_of_a_left_kernel" in events
    assert host.runs()
    assert host.store.read() is not None, "it is the updater that disarms it"


def rehearse(host: Host, **changes: object) -> None:
    """The former guard left without guests."""
    left = Left(ClockPair(0, time.time(), 0.0), time.monotonic(), "6.1.0-47-amd64")
    change = KernelChange("6.1.0-48-amd64", str(host.carve_out), rehearsal=True, left=left)
    host.store.store(Intent("op", boot_id(), 0.0, 1.0, (), kernel_change=replace(change, **changes)))  # type: ignore[arg-type]


def test_a_rehearsal_ends_when_a_vmm_answers(host: Host) -> None:
    rehearse(host)
    assert host.arrive() == 0
    there = host.arrival.vms["rehearsal"]
    assert there.end == "running"
    assert there.running_at is not None
    assert there.running_at > host.arrival.at
    assert host.arrive(by="unit") == 0
    assert host.arrival.vms["rehearsal"] == there, "the second one measures nothing"


def test_a_rehearsal_before_the_carve_out_is_there(host: Host) -> None:
    rehearse(host)
    ends = []
    for code, by, wrong in ((4, "initramfs", "not there yet"), (0, "unit", "")):
        assert host.arrive(by=by, wrong=wrong) == code
        ends.append(host.arrival.vms["rehearsal"].end)
    assert ends == ["undecided", "running"]


def test_a_rehearsal_without_the_carve_out_measures_nothing(host: Host) -> None:
    """With guests this kernel would have lost them."""
    rehearse(host)
    assert host.arrive(by="unit", wrong="there is none") == 5
    assert host.arrival.vms["rehearsal"].end == "lost"
    assert "there is none" in host.arrival.vms["rehearsal"].why


def test_the_ordinary_guard_ends_a_rehearsal_where_nobody_did(host: Host) -> None:
    rehearse(host)
    boot_file = host.state_dir.parent / "boot"
    boot_file.write_text(NEXT_BOOT)
    argv = [sys.executable, "-c", AS_ANOTHER_BOOT, str(boot_file), "", "--state-dir", str(host.state_dir)]
    guard = subprocess.Popen(argv, stderr=subprocess.DEVNULL)
    try:

        def recorded() -> bool:
            with suppress(AssertionError, KeyError):
                return host.arrival.vms["rehearsal"].end == "running"
            return False

        wait(recorded, "the rehearsal to be recorded")
        assert guard.poll() is None, "it waits for its disarm"
    finally:
        guard.kill()
        guard.wait()


def test_the_ordinary_guard_examines_again_what_it_could_not_at_its_start(host: Host) -> None:
    """The boot cannot be counted, as on a disk that is full; then it can."""
    boot_file = host.state_dir.parent / "boot"
    boot_file.write_text(NEXT_BOOT)
    in_the_way = host.carve_out / "boot-counter.json.new"
    in_the_way.mkdir()
    argv = [sys.executable, "-c", AS_ANOTHER_BOOT, str(boot_file), "", "--state-dir", str(host.state_dir)]
    log = host.state_dir.parent / "log"
    with log.open("wb") as file:
        guard = subprocess.Popen(argv, stderr=file)
    try:
        wait(lambda: b"guard.resume_failed" in log.read_bytes(), "a try that fails")
        assert not host.processes()
        in_the_way.rmdir()
        wait(host.runs, "the guest to run")
    finally:
        guard.kill()
        guard.wait()


@pytest.mark.parametrize("tried", [False, True], ids=["nothing was seen of it", "it tried until just before"])
def test_a_gap_after_a_boot_that_was_counted(host: Host, tried: bool) -> None:
    """That one did not resume the guest; what ran between it and this one is known only where it gave signs until the end."""
    up_s = time.clock_gettime(time.CLOCK_BOOTTIME)
    left_at = time.time() - up_s - 1000.0
    former = Arrival(NEXT_BOOT, "6.1", "initramfs", HostClock("rtc", None, 1.0), left_at + 20.0)
    host.leave(left=Left(ClockPair(0, left_at, 0.0), 1.0, "6.1"), arrival=former)
    for folder in (host.state_dir, host.carve_out):
        boot_counters.raise_counter(str(folder), NEXT_BOOT)
    if tried:
        claims.note_failure(str(host.claims), "QEMU did not start there")
        note = host.claims / "failure-1"
        os.utime(note, (left_at + 990.0,) * 2, follow_symlinks=False)
    assert host.arrive(THIRD_BOOT) == (0 if tried else 5)
    assert host.runs() == tried
    assert bool(host.arrival.doubts) != tried


def test_a_disk_that_takes_no_record_keeps_no_guest_paused(host: Host) -> None:
    """Neither the lock nor the arrival can be written down: the claims are in the carve-out."""
    for name in ("arrival.lock", "guard-intent.json.new"):
        (host.state_dir / name).mkdir()
    assert host.arrive() == 0
    assert host.runs()


NOBODY = 65534


@pytest.mark.skipif(os.geteuid() != 0, reason="becoming another user needs root")
@pytest.mark.parametrize("trick", ["none", "lock", "root's plan", "log"])
def test_root_carries_out_nothing_of_another_user_as_root(host: Host, trick: str) -> None:
    """The host updater's user wrote the plan, and could name any program, user and file in it."""
    victim = host.state_dir.parent / "of-root"
    victim.write_text("")
    if trick == "lock":
        (host.state_dir / "arrival.lock").symlink_to(victim)
    elif trick == "log":
        host.plan = replace(host.plan, log=str(host.state_dir.parent / "new-file-of-root"))
    across = host.plan.across
    assert across is not None
    user = 0 if trick == "root's plan" else NOBODY
    host.plan = replace(host.plan, across=replace(across, uid=user, gid=user, groups=(0,)))
    host.leave()
    host.run.mkdir()
    sockets = host.state_dir.parent / f"boot-{NEXT_BOOT[:8]}-sockets"
    sockets.mkdir()  # by somebody before, who is root
    for folder, _, names in os.walk(host.state_dir.parent):
        if folder != str(host.state_dir.parent):
            os.chown(folder, NOBODY, NOBODY)
            for name in names:
                os.chown(f"{folder}/{name}", NOBODY, NOBODY, follow_symlinks=False)
    host.state_dir.parent.chmod(0o711)
    code = host.arrive()
    assert victim.stat().st_uid == 0, "a file of root's was given away"
    assert not (host.state_dir.parent / "new-file-of-root").exists()
    for pid in host.processes():
        status = Path(f"/proc/{pid}/status").read_text()
        lines = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
        assert lines["Uid"].split() == [str(NOBODY)] * 4
        assert "0" not in lines["Groups"].split()
        files = Path(f"/proc/{pid}/limits").read_text().split("Max open files")[1].split()
        assert int(files[0]) >= 8192, "an initramfs has 1,024"
    assert sockets.stat().st_uid == NOBODY
    if trick in ("none", "root's plan"):
        assert code == 0
        assert host.runs()
