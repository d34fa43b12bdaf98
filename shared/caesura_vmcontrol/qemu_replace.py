"""The way out of a replace: the old process continues, or the state file is loaded by a new one that we start."""

# light imports on purpose: no pathlib here.
# ruff: noqa: PTH112, PTH120, PTH116, PTH123, PTH202

from __future__ import annotations

import hashlib
import os
import signal
import time
from contextlib import suppress

from caesura_vmcontrol import claims
from caesura_vmcontrol.boots import boot8, in_this_boot, of_another_boot, of_this_boot
from caesura_vmcontrol.bounded_calls import within
from caesura_vmcontrol.claims import Owner
from caesura_vmcontrol.durable_files import sync_folder
from caesura_vmcontrol.process_control import (
    LOG_S,
    ProgramUser,
    boost_priority,
    find_by_env,
    kill_and_wait,
    restore_priority,
    sigcont,
    start,
)
from caesura_vmcontrol.procfs import Process, alive, send_signal
from caesura_vmcontrol.qemu_plans import ReplacePlan, SwapPlan
from caesura_vmcontrol.qemu_swap import roll_back
from caesura_vmcontrol.qmp import Qmp, QmpError
from caesura_vmcontrol.qmp_commands import (
    CONT_S,
    LOADING,
    UNDER_WAY,
    NotRunning,
    ProcessGone,
    cont,
    end_unless_it_ran,
    has_run,
    keep_memory_along,
    migration,
    note_ran,
    reach,
    run_state,
)
from caesura_vmcontrol.ram_places import RamIdentity, find_error

_TOTAL_S = 1.0  # s: one call, except for a process that is starting; the caller tries again
_START_S = 3.0  # s: from the program's start to the loaded state; 60 ms on an idle host
_LONGEST_START_S = 48.0  # s: the same, after tries that failed
_ARRIVAL_START_S = 120.0  # s: the same in a boot that has just begun, with cold caches; killing it early makes the pause longer
_CAPABILITIES = {"x-ignore-shared": True, "events": True, "return-path": False, "late-block-activate": True}
_SHOWS_S = 0.3  # s: for our migration to write something; some milliseconds are usual
_STEP_S = 0.001
PART = ".part"
"""The suffix of the state file's path while it is being written."""
STUCK = "cannot be resumed"
"""How the reason of a guest begins whose way out fails again and again."""
_SAID = 400  # characters of a reason that is quoted in another one
_LOG_BYTES = 400  # how much of the end of a new process's log is part of the reason


class BadStateFile(OSError):
    """The state file is not the one that was claimed, or the RAM file not its guest's. It is never loaded."""


def recover(plan: ReplacePlan, *, alone: bool) -> None:
    """Bring the replace to an end. Safe at any time, repeated or concurrently.

    ``alone``: no other ``recover`` of this operation is under way; only then are unclaimed processes beside a
    claimed one killed.

    Raises:
        OSError: not complete yet; try again.
    """
    plan = in_this_boot(plan)
    check_place(plan)
    until = time.monotonic() + _TOTAL_S
    tries = 0
    while True:
        number, owner = claims.current(plan.claims)
        if owner is None:
            if not os.path.isdir(plan.claims):
                _after_the_operation(plan, until)
                return
            lives = alive(plan.old.pid, plan.old.start_ticks)
            _claim(plan, 1, "old" if lives else "gone")
        elif owner.kind == "old":
            _roll_back(plan, until)
            return
        elif owner.kind == "gone":
            _clear_away(plan, 0, until)
            kill_and_wait(plan.old.pid, plan.old.start_ticks, until)
            return
        elif owner.kind == "new":
            if _commit_new(plan, number, owner, until):
                if alone and claims.current(plan.claims) == (number, owner):
                    _clear_away(plan, owner.pid, until)
                return
            until = time.monotonic() + _TOTAL_S  # another decision is valid: a new time limit for it
        elif owner.kind == "left":
            _stay(plan, number, owner)
        else:
            _check_arrived(plan)
            if tries == len(plan.argv):
                raise NotRunning(_failed_tries(plan))
            if claims.retry_in_s(plan.claims) > 0:
                raise NotRunning(_failed_tries(plan))
            tries += 1
            _restore(plan, number, owner, until, alone=alone)


def _claim(plan: ReplacePlan, number: int, text: str) -> str:
    """As ``claims.claim``; over a change of the kernel it is durable before what it allows."""
    return claims.claim(plan.claims, number, text, durable=plan.across is not None)


def check_place(plan: SwapPlan | ReplacePlan) -> None:
    """Where the claims are not to be seen, nothing is decided: their folder is missing only after the operation.

    Raises:
        NotRunning: the file system that they are on is not mounted.
    """
    if not isinstance(plan, ReplacePlan) or plan.across is None:
        return
    if not os.path.isdir(os.path.dirname(os.path.dirname(plan.claims))):
        raise NotRunning(
            f"{plan.across.carve_out} is not mounted, and the guest's memory and state are there"
        )


def _check_arrived(plan: ReplacePlan) -> None:
    """Raises NotRunning: the state is of another boot, and nobody has examined yet whether the memory is what it was."""
    if of_another_boot(plan) and not claims.admitted(plan.claims, boot8()):
        raise NotRunning(
            "its memory was not examined in this boot yet: `caesura-pause-guard --arrive` does that"
        )


def give_up(plan: ReplacePlan, why: str) -> None:
    """Decide that a guest of another boot is lost, where nobody is left to examine its memory: it would wait in its files indefinitely.

    Nothing is decided where it was examined in this boot, or a process has it.

    Raises:
        OSError: it cannot be decided now.
    """
    if not of_another_boot(plan):
        return
    check_place(plan)
    if not os.path.isdir(plan.claims) or claims.admitted(plan.claims, boot8()):
        return
    number, owner = claims.current(plan.claims)
    if owner is None or owner.kind in ("file", "left"):
        claims.note_failure(plan.claims, why)
        _claim(plan, number + 1, "gone")


def _stay(plan: ReplacePlan, number: int, owner: Owner) -> None:
    """The guard that was about to leave the kernel did not, or it is another kernel's turn: the guest is in the file again."""
    leaves = of_this_boot(plan, owner) and owner.pid != os.getpid() and alive(owner.pid, owner.start_ticks)
    if leaves:
        raise NotRunning(
            f"the pause guard, process {owner.pid}, is leaving this kernel with the guest in its files"
        )
    file = claims.last_file(plan.claims, number)
    _claim(plan, number + 1, file.text if file is not None else "gone")


def is_ours(plan: ReplacePlan) -> bool:
    """Whether the old process's last migration is ours: QEMU accepted it, or has written to our file."""
    if claims.noted(plan.claims, "accepted"):
        return True
    return _is_open(plan) and _written(plan) > 0


def _is_open(plan: ReplacePlan) -> bool:
    """Whether QEMU's answer to our migration was not recorded."""
    return claims.noted(plan.claims, "begun") and not claims.noted(plan.claims, "refused")


def _written(plan: ReplacePlan) -> int:
    """Bytes of our state file so far; -1: it does not exist."""
    sizes = [-1]
    for path in (plan.state_file, f"{plan.state_file}{PART}"):
        with suppress(OSError):
            sizes.append(os.path.getsize(path))
    return max(sizes)


def _roll_back(plan: ReplacePlan, until: float) -> None:
    """The old process has the guest permanently."""
    while True:
        _wait_until_it_shows(plan, until)
        ours, begun = is_ours(plan), claims.noted(plan.claims, "begun")
        others = [(each.pid, each.start_ticks) for each in started(plan)]
        roll_back(plan.old, others, until, ours=ours, begun=begun)
        if ours or not is_ours(plan):
            return


def _wait_until_it_shows(plan: ReplacePlan, until: float) -> None:
    """A migration is under way that may be ours: ours writes to our file within milliseconds."""
    give_up = min(until, time.monotonic() + _SHOWS_S)
    with suppress(QmpError), reach(plan.old.pid, plan.old.start_ticks, [plan.old.qmp], give_up) as qmp:
        while _is_open(plan) and not is_ours(plan) and time.monotonic() < give_up:
            if migration(qmp, give_up) not in UNDER_WAY:
                return
            time.sleep(_STEP_S)


def _failed_tries(plan: ReplacePlan) -> str:
    """Why no new process has the guest yet; when it is always the same reason, what an operator can do."""
    why = claims.stuck(plan.claims)
    if not why:
        failures = claims.failures(plan.claims)
        return f"no new process could take the guest: {failures[-1] if failures else 'others are at it'}"
    return (
        f"{STUCK}: every try of a new process fails in the same way: {why[:_SAID]}. Its memory is in its RAM file and its "
        f"device state in {plan.state_file}; both are kept, and it is tried again every {claims.LONGEST_WAIT_S:g} s. "
        f"See `tail -n 20 {plan.log}` and whether `{plan.argv[0][0]} --version` runs; when the cause is mended it "
        f"resumes by itself. To give the guest up for good: `rm {plan.state_file}`"
    )


def _clear_away(plan: ReplacePlan, but: int, until: float) -> None:
    for each in started(plan):
        if each.pid != but:
            kill_and_wait(each.pid, each.start_ticks, until)


def started(plan: ReplacePlan) -> list[Process]:
    """The living processes of this operation and VM, whichever process started them."""
    return [each for each in find_by_env(plan.mark) if each.pid != plan.old.pid]


def _commit_new(plan: ReplacePlan, number: int, owner: Owner, until: float) -> bool:
    """The claimed process has the guest, unless it is proved that it never ran it. False: read the claims again."""
    pid, ticks = owner.pid, owner.start_ticks
    if not of_this_boot(plan, owner):
        claims.note_failure(plan.claims, "the guest ran in another boot of this host, and ended with it")
        _claim(plan, number + 1, "gone")
        return False
    if plan.across is not None:
        sync_folder(plan.claims)  # the process that claimed it may have ended before that
    sigcont(pid, ticks)
    try:
        qmp = reach(pid, ticks, [plan.qmp, plan.old.qmp], until)
    except ProcessGone:
        _claim(plan, number + 1, "gone")  # nothing can show whether it ran
        return False
    with qmp:
        if not has_run(plan.claims, run_state(qmp, until)):
            return _let_run(plan, number, owner, qmp, until)
        keep_memory_along(qmp, until)
    kill_and_wait(plan.old.pid, plan.old.start_ticks, until)
    return True


def _let_run(plan: ReplacePlan, number: int, owner: Owner, qmp: Qmp, until: float) -> bool:
    """``cont`` to a claimed process that was paused on this connection. False: it never ran and is dead."""
    restore_priority(owner.pid)  # virtual CPUs of real-time priority would starve the host
    until = max(until, time.monotonic() + CONT_S)
    refused = cont(qmp, until)
    if refused is not None:
        found = end_unless_it_ran(qmp, owner.pid, owner.start_ticks, until + _TOTAL_S)
        if found != "runs":
            claims.note_failure(plan.claims, str(refused))
            file = claims.last_file(plan.claims, number) if found == "never_ran" else None
            _claim(plan, number + 1, file.text if file is not None else "gone")
            return False
        until = time.monotonic() + CONT_S
    note_ran(plan.claims)
    keep_memory_along(qmp, until)
    return True


def _restore(plan: ReplacePlan, number: int, owner: Owner, until: float, *, alone: bool) -> None:
    """Start a process, have it load the file, claim for it, resume it. Returns without a try where another claim was made.

    Raises:
        OSError: this try failed and the time is over; the attempt is noted beside the claims.
    """
    if plan.beside:  # unmapping its RAM takes a while: it must be dead only when the new one may run
        send_signal(plan.old.pid, plan.old.start_ticks, signal.SIGKILL)
    else:
        kill_and_wait(plan.old.pid, plan.old.start_ticks, until)
    doomed = started(plan)
    if doomed:
        if not alone and any(_age_s(each) < _patience_s(plan) for each in doomed):
            # Two that kill each other's processes never end where a start takes longer than they wait for each other.
            raise NotRunning("another process is loading the guest")
        # The process that started them may be about to claim: after this claim it cannot, so they can be killed. After
        # another process's claim it can: they may have been started after that one.
        if not claims.claim_first(plan.claims, number + 1, owner.text, durable=plan.across is not None):
            return
        number += 1
        for each in doomed:
            kill_and_wait(each.pid, each.start_ticks, until)
    try:
        _check_ram(plan)
        state = _open_state(plan.state_file, owner)
    except BadStateFile as error:
        claims.note_failure(plan.claims, str(error))
        _claim(plan, number + 1, "gone")
        return
    try:
        _try_next(plan, number, state, until)
    finally:
        os.close(state)


def _check_ram(plan: ReplacePlan) -> None:
    """Lost memory cannot be restored: no guest is better than one on zeros with its disks. Raises BadStateFile."""
    if plan.ram is None:
        return
    path, device, inode = plan.ram
    if plan.across is not None:
        identity = RamIdentity(plan.across.fs_id, plan.across.inode, plan.across.size)
        if wrong := find_error(path, identity):
            raise BadStateFile(wrong)
        return
    try:
        there = os.stat(path)
    except FileNotFoundError as error:
        raise BadStateFile(f"the guest's RAM file {path} is gone") from error
    if (there.st_dev, there.st_ino) != (device, inode):
        raise BadStateFile(f"the guest's RAM file {path} was deleted and created again")


def _open_state(path: str, owner: Owner) -> int:
    """The state file, verified, and read again through the same descriptor only. Raises BadStateFile."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError as error:
        raise BadStateFile(f"the state file {path} is gone") from error
    try:
        _check(path, handle, owner)
    except BaseException:
        os.close(handle)
        raise
    return handle


def _check(path: str, handle: int, owner: Owner) -> None:
    size_bytes = os.fstat(handle).st_size
    if size_bytes != owner.size_bytes:
        raise BadStateFile(
            f"the state file {path} has {size_bytes} bytes, not {owner.size_bytes}: not loaded"
        )
    with open(handle, "rb", closefd=False) as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    if sha256 != owner.sha256:
        raise BadStateFile(f"the state file {path} has another SHA-256 than was claimed: not loaded")


def _try_next(plan: ReplacePlan, number: int, state: int, until: float) -> None:
    """One try; the number of failed tries, whichever process made them, decides which command line is next."""
    argv = plan.argv[claims.tries(plan.claims) % len(plan.argv)]
    log_bytes = _size(plan.log)
    process: Process | None = None
    try:
        process = start(argv, plan.environ, plan.log, _user(plan))
        boost_priority(process.pid)
        with _loaded(plan, process, state) as qmp:
            kill_and_wait(plan.old.pid, plan.old.start_ticks, until + _TOTAL_S)
            boot = "" if plan.across is None else boot8()
            text = Owner("new", pid=process.pid, start_ticks=process.start_ticks, boot8=boot).text
            if _claim(plan, number + 1, text) != text:
                kill_and_wait(process.pid, process.start_ticks, until + _START_S)
                return
            _let_run(plan, number + 1, claims.parse_owner(text), qmp, until)
    except OSError as error:
        if process is not None and claims.current(plan.claims)[0] <= number:
            kill_and_wait(process.pid, process.start_ticks, time.monotonic() + _TOTAL_S)
        words = _read_from(plan.log, log_bytes)
        claims.note_failure(plan.claims, f"{argv[0]}: {error}" + (f": {words}" if words else ""))
        if time.monotonic() >= until:
            raise


def _user(plan: ReplacePlan) -> ProgramUser | None:
    across = plan.across
    return None if across is None else ProgramUser(across.uid, across.gid, across.groups)


def _loaded(plan: ReplacePlan, process: Process, state: int) -> Qmp:
    """Have the new process load the file. Returns its connection, once it is paused with everything loaded.

    Raises:
        QmpError: it does not load it, or not in time.
    """
    patience_s = _patience_s(plan)
    until = time.monotonic() + patience_s
    qmp = reach(process.pid, process.start_ticks, [plan.qmp], until)
    try:
        _load(qmp, state, until, patience_s)
    except BaseException:
        qmp.close()
        raise
    return qmp


def _patience_s(plan: ReplacePlan) -> float:
    """From the start of a process to the loaded state, in seconds: twice as long after each round of all command lines.

    On a host that is too busy to load it in time, tries of the same length, of several guests at once, would fail indefinitely. Not after
    each try: the old QEMU, which is next to one that hangs, comes no later.
    """
    if of_another_boot(plan):
        return _ARRIVAL_START_S
    return min(_START_S * 2.0 ** min(claims.tries(plan.claims) // len(plan.argv), 10), _LONGEST_START_S)


def _age_s(process: Process) -> float:
    """Seconds since it was started."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) - process.start_ticks / os.sysconf("SC_CLK_TCK")


def _load(qmp: Qmp, state: int, until: float, patience_s: float) -> None:
    known = {each["capability"] for each in qmp.execute("query-migrate-capabilities", until=until)}
    wanted = [{"capability": name, "state": on} for name, on in _CAPABILITIES.items() if name in known]
    qmp.execute("migrate-set-capabilities", {"capabilities": wanted}, until=until)
    os.lseek(state, 0, os.SEEK_SET)
    qmp.execute("getfd", {"fdname": "state"}, until=until, handle=state)
    qmp.execute("migrate-incoming", {"uri": "fd:state"}, until=until)
    while (run := run_state(qmp, until)) in LOADING:
        if migration(qmp, until) == "failed":
            raise NotRunning("it cannot load the state")
        if time.monotonic() >= until:
            raise NotRunning(f"it does not load the state within {patience_s:g} s")
        time.sleep(_STEP_S)
    if run != "paused":
        raise NotRunning(f"it is {run} after loading the state")


def _size(path: str) -> int:
    """In bytes; 0 where it is unknown, or not known at once."""
    with suppress(OSError):
        return within(LOG_S, lambda: os.path.getsize(path), key=path)
    return 0


def _read_from(path: str, offset: int) -> str:
    """The end of what was appended to the log since."""

    def read() -> str:
        with open(path, "rb") as file:
            file.seek(offset)
            return " ".join(file.read()[-_LOG_BYTES:].decode(errors="replace").split())

    with suppress(OSError):
        return within(LOG_S, read, key=path)
    return ""


def _after_the_operation(plan: ReplacePlan, until: float) -> None:
    """The claims were removed: if the old process is left, it has the guest; of any other nothing is known."""
    old = plan.old
    if alive(old.pid, old.start_ticks) and not started(plan):
        sigcont(old.pid, old.start_ticks)
        written = _written(plan)
        if written >= 0:  # the claims were lost midway, for the state file is removed first
            roll_back(old, [], until, ours=written > 0, begun=True)
