"""The first acts of the guard in another kernel: clock, boot counters, guests' memory, then each guest is loaded and resumed.

Run by the initramfs or a unit as root before anything else of the system, or by the ordinary guard when neither did. It may be killed at
any step, run again, and run twice at once: what is decided about a guest is in its claims. The load itself is ``qemu_replace``'s, in
``caesura_vmcontrol``, as after every other replace.
"""

# light imports on purpose: no pathlib here.
# ruff: noqa: PTH102, PTH112, PTH120

from __future__ import annotations

import fcntl
import math
import os
import resource
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Literal

from caesura_vmcontrol import boot_counters, claims, kernel_clock, kvm_device
from caesura_vmcontrol.boots import boot8
from caesura_vmcontrol.durable_files import give_to_owner, sync_folder
from caesura_vmcontrol.hardware_watchdog import HardwareWatchdog
from caesura_vmcontrol.intent import Intent, IntentFile, UnreadableIntent
from caesura_vmcontrol.kernel_change import Arrival, By, HostClock, KernelChange, Left, VmArrival
from caesura_vmcontrol.procfs import boot_id
from caesura_vmcontrol.qemu_control import condition, resume_guest
from caesura_vmcontrol.qemu_plans import ReplacePlan
from caesura_vmcontrol.ram_places import RamIdentity, carve_out_error, find_error
from caesura_vmcontrol.resume_plans import ResumePlan
from caesura_vmcontrol.service_user import ServiceUser, become, user_to_become

Log = Callable[..., None]

ALL_RUN, UNUSABLE, UNREADABLE, UNDECIDED, LOST = 0, 1, 3, 4, 5
"""Exit codes of ``--arrive``."""
MAX_GAP_S = 120.0
"""From the leaving of a kernel, or the last sign of a boot that was counted since, to the start of this one, in seconds: a longer gap may be
a boot that nobody counted, and what it did with the memory is not known."""
_TRIES = 4  # of one guest, its command lines in turn; then the boot continues and the ordinary guard tries
_LOAD_S = 300.0  # s: the same, if each try takes long
_LOCK_S = 120.0  # s: for another arrival to end; claims keep two apart even so
_AGAIN_S = 0.01  # s: between two tries
_REHEARSAL_S = 120.0  # s: for a QEMU without a guest to start; as for one with a guest, see qemu_replace
_SOCKETS = "/run/caesura"
"""Where the units have the sockets' folders; only root makes something in /run, and it makes nothing there that a plan names."""
_FILES = 8192
"""Open files of each QEMU, as the units have it (``LimitNOFILE=``); an initramfs has 1,024."""
_SAID = 200  # characters of what it says instead
REHEARSAL = "rehearsal"
"""In the place of a VM's name: the QEMU of a rehearsal."""
_QEMU = ("/usr/bin/qemu-system-x86_64", "qemu-system-x86_64", "/usr/libexec/qemu-kvm", "qemu-kvm")
_WITHOUT_GUEST = (
    *("-S", "-nodefaults", "-no-user-config", "-display", "none"),
    *("-machine", "q35,accel=kvm:tcg", "-m", "16"),
)


def arrive(folder: str, by: By, log: Log) -> int:
    """Resume what another boot left; the exit code. Run by root in a folder that is not root's, it becomes the folder's owner."""
    store = IntentFile(folder)
    begun: Arrival | None = None
    if (user := user_to_become(folder)) is not None:
        begun = _as_root(store, user, by, log)
        become(user_to_become(folder) or user)  # again: the group of KVM's device may be known only now
    with _one_at_a_time(folder, log):
        try:
            intent = store.read()
        except UnreadableIntent as error:
            log("arrival.intent_unreadable", why=str(error))
            return UNREADABLE
        change = intent.kernel_change if intent is not None else None
        if intent is None or change is None or intent.boot_id == boot_id():
            log("arrival.nothing_to_do")
            return ALL_RUN
        if user is None:
            _disarm_hardware_watchdog(change, log)
            if os.geteuid() == 0:
                _make_kvm_ready(intent, log)
        arrival = examine(intent, folder, by, log, begun)
        _record(store, intent, log)
        if change.rehearsal:
            with _phase(arrival, "load"):
                rehearse(arrival, log)
        else:
            with _phase(arrival, "load"):
                _load_all(intent, arrival, log)
        _record(store, intent, log)
        ends = {each.end for each in arrival.vms.values()}
        log("arrival.ended", vms={vm: each.end for vm, each in arrival.vms.items()}, phases=arrival.phases)
    return LOST if "lost" in ends else UNDECIDED if "undecided" in ends else ALL_RUN


def _record(store: IntentFile, intent: Intent, log: Log) -> None:
    """For the report. What is decided about a guest is in its claims, so a disk that refuses this keeps no guest paused."""
    try:
        store.store(intent)
    except OSError as error:
        log("arrival.not_recorded", why=str(error))


def _as_root(store: IntentFile, user: ServiceUser, by: By, log: Log) -> Arrival | None:
    """What only root can do, and nothing else: clock, hardware watchdog, KVM, limits, and the sockets' folder in the new /run."""
    try:
        intent = store.read()
    except UnreadableIntent:
        return None  # said by who reads it next
    change = intent.kernel_change if intent is not None else None
    if intent is None or change is None or intent.boot_id == boot_id():
        return None
    _disarm_hardware_watchdog(change, log)
    with suppress(OSError):
        with suppress(FileExistsError):
            os.mkdir(_SOCKETS, 0o700)
        os.chown(_SOCKETS, user.uid, user.gid, follow_symlinks=False)
    with suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (_FILES, _FILES))
    here = change.arrival is not None and change.arrival.boot_id == boot_id()
    begun = None if here else _begin(change, by, log)
    _make_kvm_ready(intent, log)
    return begun


def _make_kvm_ready(intent: Intent, log: Log) -> None:
    """Where a guest is to have it; a rehearsal measures it, too."""
    lines = [line for plan in intent.plans if isinstance(plan, ReplacePlan) for line in plan.argv]
    if not lines or any("kvm" in word for line in lines for word in line):
        kvm_device.make_ready(log)


def _disarm_hardware_watchdog(change: KernelChange, log: Log) -> None:
    """Before anything is loaded: this kernel does not hang, and a reset would end the guests that run by then."""
    if change.watchdog_s and (why := HardwareWatchdog().disarm_former()):
        log("arrival.hardware_watchdog", why=why)


def examine(intent: Intent, folder: str, by: By, log: Log, begun: Arrival | None = None) -> Arrival:
    """Set the clock, count the boot, and decide for each guest whether it may be loaded here. Repeated without harm.

    A guest whose memory may not be what it was is ``gone`` by its claims: it is never loaded. ``begun``: by root, who has set the clock.
    """
    change = intent.kernel_change
    assert change is not None  # noqa: S101 - of the callers
    arrival = change.arrival
    if arrival is None or arrival.boot_id != boot_id():
        arrival = change.arrival = begun if begun is not None else _begin(change, by, log)
        intent.fired = None  # its instants are of the other boot
    elif by != "guard" and not any(each.end == "running" for each in arrival.vms.values()):
        arrival.by = by
    if change.left is not None:
        boot_counters.raise_counter(folder, boot_id())
    wrong = carve_out_error(change.carve_out)
    if wrong and by == "initramfs":
        _undecided(intent, arrival, f"{wrong}; it is looked at again when the system is up")
        return arrival
    rehearsed = arrival.vms.pop(REHEARSAL, None)
    arrival.doubts = _doubts(intent, change, arrival, folder, wrong)
    for doubt in arrival.doubts:
        log("arrival.doubt", why=doubt)
    if rehearsed is not None and rehearsed.end == "running":
        arrival.vms[REHEARSAL] = rehearsed
    elif change.rehearsal and arrival.doubts:
        arrival.vms[REHEARSAL] = VmArrival("lost", why="; ".join(arrival.doubts))
    for plan in intent.plans:
        there = arrival.vms.get(plan.vm)
        if isinstance(plan, ReplacePlan) and (there is None or there.end == "undecided"):
            _admit(plan, arrival, wrong, log)
            try:
                _make_folders(plan)
            except OSError as error:
                log("arrival.no_folder_for_sockets", vm=plan.vm, why=str(error))
    return arrival


def out_of_reach(intent: Intent, plan: ResumePlan) -> bool:
    """Whether nothing can be done for a guest that is lost: what would be asked about it is in a carve-out that is not there."""
    arrival = intent.kernel_change.arrival if intent.kernel_change is not None else None
    there = arrival.vms.get(plan.vm) if arrival is not None else None
    lost = there is not None and there.end == "lost"
    return lost and isinstance(plan, ReplacePlan) and not os.path.isdir(plan.claims)


def _begin(change: KernelChange, by: By, log: Log) -> Arrival:
    """Before anything else the host's clock, for guests are set by it."""
    left = change.left
    clock = HostClock("rtc", None, kernel_clock.RTC_UNCERTAINTY_S)
    phases: dict[str, float] = {}
    if left is not None:
        clock, elapsed_s = _set_clock(left, log)
        up_s = time.clock_gettime(time.CLOCK_BOOTTIME)
        phases = {"jump": elapsed_s - up_s, "boot": up_s}
    before = change.arrival  # of a boot in between, which was counted
    change.arrival = Arrival(boot_id(), os.uname().release, by, clock, time.time(), phases=phases)
    if left is not None:
        seen_at = max(left.pair.realtime, before.at if before is not None else 0.0)
        change.arrival.unseen_s = left.pair.realtime + phases["jump"] - seen_at
    return change.arrival


def _set_clock(left: Left, log: Log) -> tuple[HostClock, float]:
    """How the clock is now, and the seconds since the former kernel was left."""
    ticks: int | None = None
    with suppress(OSError):
        ticks = kernel_clock.tsc() if kernel_clock.trusted_here() else None
    now = time.time()
    elapsed = kernel_clock.elapsed_since(left.pair, ticks, kernel_clock.by_rtc(left, now, kernel_clock.rtc()))
    error_s = now - (left.pair.realtime + elapsed.seconds)
    if not elapsed.by_tsc and abs(error_s) <= 2 * elapsed.uncertainty_s:
        return HostClock(
            "rtc", None, elapsed.uncertainty_s
        ), elapsed.seconds  # no better than the kernel's own
    try:
        time.clock_settime(time.CLOCK_REALTIME, time.time() - error_s)
    except OSError as error:  # the ordinary guard may not
        log("arrival.clock_not_set", why=str(error), error_s=round(error_s, 6))
        return HostClock("rtc", error_s, abs(error_s) + elapsed.uncertainty_s), elapsed.seconds
    source: Literal["tsc", "rtc"] = "tsc" if elapsed.by_tsc else "rtc"
    log("arrival.clock_set", error_before_s=round(error_s, 6), source=source)
    return HostClock(source, error_s, elapsed.uncertainty_s), elapsed.seconds


def _doubts(intent: Intent, change: KernelChange, arrival: Arrival, folder: str, wrong: str) -> list[str]:
    """Why guests' memory may not be what it was when the former kernel was left. Counts this boot in the carve-out."""
    if change.left is None:
        return ["the former kernel was not left by the guard: the host was reset, or crashed"]
    if wrong:
        return [f"this kernel has no carve-out: {wrong}"]
    here = boot_id()
    on_disk = boot_counters.read(folder)
    in_carve_out = boot_counters.raise_counter(change.carve_out, here)
    doubts = [
        each for each in (boot_counters.counters_error(on_disk, in_carve_out, intent.operation),) if each
    ]
    gap_s = min(arrival.unseen_s, _since_last_try_s(intent, arrival, change.left))
    if gap_s > MAX_GAP_S:
        doubts.append(
            f"{gap_s:.0f} s from the last sign of the kernels before it to the start of this one, more than {MAX_GAP_S:g} s: another "
            "system may have run in between"
        )
    return doubts


def _since_last_try_s(intent: Intent, arrival: Arrival, left: Left) -> float:
    """From the last try of a kernel before this one to load a guest, to this one's start, in seconds: each leaves a note."""
    began_at = left.pair.realtime + arrival.phases.get("jump", 0.0)
    tries = [
        each
        for plan in intent.plans
        if isinstance(plan, ReplacePlan)
        for each in claims.tried_at(plan.claims)
    ]
    return min((began_at - each for each in tries if each <= began_at), default=math.inf)


def _admit(plan: ReplacePlan, arrival: Arrival, wrong: str, log: Log) -> None:
    """Whether one guest may be loaded in this boot; durable when this returns."""
    across = plan.across
    assert across is not None  # noqa: S101 - of what may be armed
    why = "; ".join(arrival.doubts)
    if plan.ram is not None and not why:
        why = find_error(plan.ram[0], RamIdentity(across.fs_id, across.inode, across.size))
    try:
        number, owner = claims.current(plan.claims)
        in_files = owner is not None and owner.kind in ("file", "left")
        if why and in_files and not claims.admitted(plan.claims, boot8()):
            claims.note_failure(plan.claims, why)
            claims.claim(plan.claims, number + 1, "gone", durable=True)
        elif not why:
            claims.admit(plan.claims, boot8())
            sync_folder(plan.claims)
    except (OSError, claims.BadClaim) as error:
        if not wrong:
            arrival.vms[plan.vm] = VmArrival("undecided", why=f"its claims cannot be read: {error}")
            log("arrival.claims_unreadable", vm=plan.vm, why=str(error))
            return
    if why:
        arrival.vms[plan.vm] = VmArrival("lost", why=why)
        log("arrival.lost", vm=plan.vm, why=why)


def _undecided(intent: Intent, arrival: Arrival, why: str) -> None:
    rehearsal = intent.kernel_change is not None and intent.kernel_change.rehearsal
    for vm in [REHEARSAL] if rehearsal else [plan.vm for plan in intent.plans]:
        if vm not in arrival.vms or arrival.vms[vm].end == "undecided":
            arrival.vms[vm] = VmArrival("undecided", why=why)


def _load_all(intent: Intent, arrival: Arrival, log: Log) -> None:
    """All guests at once."""
    plans = [plan for plan in intent.plans if isinstance(plan, ReplacePlan) and _is_open(plan, arrival)]
    threads = [
        threading.Thread(target=_load, args=(plan, arrival, log), name=f"load {plan.vm}", daemon=True)
        for plan in plans
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _is_open(plan: ReplacePlan, arrival: Arrival) -> bool:
    there = arrival.vms.get(plan.vm)
    with suppress(OSError):
        return (there is None or there.end == "undecided") and claims.admitted(plan.claims, boot8())
    return False


def _load(plan: ReplacePlan, arrival: Arrival, log: Log) -> None:
    """One guest, until it runs, is lost, or is left to the ordinary guard. In a thread: nothing here may raise."""
    until = time.monotonic() + _LOAD_S
    found = VmArrival("undecided", why="nothing was tried")
    try:
        while found.end == "undecided":
            found = _try(plan)
            if found.end == "undecided" and (
                claims.tries(plan.claims) >= _TRIES or time.monotonic() >= until
            ):
                break
            time.sleep(_AGAIN_S if found.end == "undecided" else 0)
    except Exception as error:  # noqa: BLE001 - see above
        found = VmArrival("undecided", why=str(error) or type(error).__name__)
    arrival.vms[plan.vm] = found
    log("arrival.vm", vm=plan.vm, end=found.end, why=found.why)


def _try(plan: ReplacePlan) -> VmArrival:
    why = ""
    try:
        if condition(plan) != "running":
            resume_guest(plan)
    except OSError as error:
        why = str(error)
    running_at = time.time()
    try:
        state = condition(plan)
        _, owner = claims.current(plan.claims)
    except (OSError, claims.BadClaim) as error:
        return VmArrival("undecided", why=why or str(error))
    if state == "running" and owner is not None and owner.kind == "new":
        return VmArrival("running", running_at, owner.pid, owner.start_ticks)
    if state == "gone":
        failures = claims.failures(plan.claims)
        return VmArrival(
            "lost", why=failures[-1] if failures else "no process has the guest, and its state is in no file"
        )
    return VmArrival("undecided", why=why or f"it is {state}")


def _make_folders(plan: ReplacePlan) -> None:
    """Where the new process makes its sockets: a new boot has an empty /run. Raises OSError."""
    across = plan.across
    for folder in across.folders if across is not None else ():
        missing, place = [], folder
        while not os.path.isdir(place):
            missing.append(place)
            place = os.path.dirname(place)
        for each in reversed(missing):
            with suppress(FileExistsError):
                os.mkdir(each, 0o700)
            if os.geteuid() == 0 and across is not None:
                os.chown(each, across.uid, across.gid)


def rehearse(arrival: Arrival, log: Log) -> None:
    """A QEMU without a guest is started until it answers, and ended: that is the part of a pause that no boot alone shows."""
    there = arrival.vms.get(REHEARSAL)
    if there is not None and there.end != "undecided":
        return
    if there is None:
        there = _throw_away()
    arrival.vms[REHEARSAL] = there
    log("arrival.rehearsal", end=there.end, why=there.why)


def _throw_away() -> VmArrival:
    program = next((each for each in map(shutil.which, _QEMU) if each is not None), None)
    if program is None:
        return VmArrival("lost", why=f"there is no QEMU here to start: {', '.join(_QEMU)}")
    argv = (program, *_WITHOUT_GUEST, "-qmp", "stdio")
    try:
        process = subprocess.Popen(
            argv, bufsize=0, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd="/"
        )
    except OSError as error:
        return VmArrival("lost", why=f"{program}: {error.strerror or error}")
    impatience = threading.Timer(_REHEARSAL_S, process.kill)
    impatience.start()
    try:
        with process:
            said = _greeted(process)
            running_at = time.time()
            process.kill()
    finally:
        impatience.cancel()
    if said:
        return VmArrival("lost", why=f"{program} does not answer: {said}")
    return VmArrival("running", running_at)


def _greeted(process: subprocess.Popen[bytes]) -> str:
    """Wait until QEMU has answered its first QMP command; what it said instead, if not."""
    assert process.stdin is not None  # noqa: S101 - of _throw_away
    assert process.stdout is not None  # noqa: S101 - of _throw_away
    with suppress(OSError):
        process.stdin.write(b'{"execute": "qmp_capabilities"}\n')
    other = b""
    for line in process.stdout:
        if line.startswith(b'{"return"'):
            return ""
        other = line
    return other.decode(errors="replace").strip()[:_SAID] or "it ended"


@contextmanager
def _phase(arrival: Arrival, name: str) -> Iterator[None]:
    begin = time.monotonic()
    yield
    arrival.phases[name] = arrival.phases.get(name, 0.0) + time.monotonic() - begin


@contextmanager
def _one_at_a_time(folder: str, log: Log) -> Iterator[None]:
    """So that two arrivals do not measure each other. One that hangs does not keep the next one from trying: claims decide."""
    try:
        handle = os.open(
            f"{folder}/arrival.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600
        )
    except OSError as error:
        log("arrival.no_lock", why=str(error))
        yield
        return
    try:
        with suppress(OSError):
            give_to_owner(handle, folder)
        until = time.monotonic() + _LOCK_S
        while time.monotonic() < until:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(_AGAIN_S)
        yield
    finally:
        os.close(handle)
