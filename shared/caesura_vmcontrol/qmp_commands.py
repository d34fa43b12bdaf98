"""One QEMU process and the guest in it: its states, how it is made to run, whether it ever ran.

Source of the states: QEMU's ``qapi/run-state.json`` (RunState) and ``qapi/migration.json`` (MigrationStatus).
"""

# light imports on purpose: no pathlib here.
# ruff: noqa: PTH110

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Literal

from caesura_vmcontrol import claims
from caesura_vmcontrol.process_control import is_held, kill_and_wait, sigcont, sigstop
from caesura_vmcontrol.procfs import alive
from caesura_vmcontrol.qemu_plans import SPARE
from caesura_vmcontrol.qmp import PeerMismatch, Qmp, QmpError, QmpNoAnswer, QmpRefused

RUNNING = frozenset({"running", "suspended"})  # suspended: the guest's own sleep, not our pause
OVER = frozenset({"shutdown", "guest-panicked", "internal-error"})  # nothing but a reset makes it run again
LOADING = frozenset({"inmigrate", "prelaunch"})
AWAY = {
    "postmigrate": "it was migrated away: QEMU says postmigrate",
    "finish-migrate": "it is being migrated away: QEMU says finish-migrate",
    "inmigrate": "it waits for an incoming migration: QEMU says inmigrate",
    "prelaunch": "it was never started: QEMU says prelaunch",
    "colo": "it is a COLO secondary: QEMU says colo",
}
"""States in which this process does not have the guest, or not alone: a ``cont`` could make it run twice."""
PASSING = {
    "finish-migrate": AWAY["finish-migrate"],
    "save-vm": "a snapshot of its state is being taken: QEMU says save-vm",
}
"""Those of ``NOT_OURS`` that end by themselves. ``save-vm`` is seen with Proxmox's QEMU, which takes snapshots in the background
and lets the guest run afterwards, if it ran before."""
NOT_OURS = AWAY | {
    "save-vm": PASSING["save-vm"],
    "io-error": "QEMU paused it for an I/O error: check its storage, then resume it with `cont`",
    "watchdog": "its watchdog paused it: resume it with `cont`",
    "debug": "a debugger paused it",
}
"""States that our ``stop`` never leads to, each with its meaning; whatever brought the guest there must resume it."""
CONT_S = 1.0  # s: what ``cont`` may take: activating the disks may wait for a busy one
UNDER_WAY = frozenset(
    {"setup", "cancelling", "active", "pre-switchover", "device", "wait-unplug", "postcopy-active"}
)
_LEAVES_MEMORY = "x-ignore-shared"
_STEP_S = 0.002  # s: between two queries
_LOOK_S = 0.5  # s: an answer takes a millisecond; a QEMU that hangs must not delay us
_BUSY_S = 0.2  # s: a greeting takes a millisecond; then the spare socket, and so on in turn
_CANCEL_S = 0.3  # s: a migration that was cancelled ends within some milliseconds
_HOLD_S = 0.3  # s: for every thread to be stopped; a millisecond at rest
_LAST_WORDS_S = 0.5  # s: the output of a dead process is available at once


class ProcessGone(QmpError):
    """The process that should be queried is dead."""


class NotRunning(OSError):
    """The guest was asked to run and does not run yet."""


def reach(pid: int, start_ticks: int, paths: Sequence[str], until: float) -> Qmp:
    """A connection to exactly this process, through whichever of ``paths`` is its own now.

    Paths change while we look: after a hand-over the new process's sockets are renamed onto the old one's. Where a
    socket has a spare one beside it (``SPARE``), that is used when the first one is busy: another client may have
    been stopped while QEMU served it. The time is shared among the paths: a client that stays at one keeps none of
    the others from being tried.

    Raises:
        ProcessGone: it is dead.
        QmpNoAnswer: it does not answer by ``until``.
    """
    while True:
        silent: QmpNoAnswer | None = None
        sockets = list(_sockets(paths))
        for number, (path, patience_s) in enumerate(sockets):
            if not alive(pid, start_ticks):
                raise ProcessGone(f"process {pid} is dead")
            now = time.monotonic()
            by = min(until, now + patience_s)
            if patience_s == math.inf:
                by = now + (until - now) / (
                    1 + sum(os.path.exists(later) for later, _ in sockets[number + 1 :])
                )
            try:
                return Qmp(path, pid, by)
            except PeerMismatch as error:
                silent = silent or error
            except QmpNoAnswer as error:
                silent = error
        if time.monotonic() >= until:
            if not alive(pid, start_ticks):
                raise ProcessGone(f"process {pid} is dead")
            raise silent or QmpNoAnswer(f"process {pid} has no socket")
        time.sleep(_STEP_S)


def _sockets(paths: Sequence[str]) -> Iterator[tuple[str, float]]:
    """Every socket there is, and how long to wait for a greeting at it, in seconds; infinity: its share of the time."""
    for path in dict.fromkeys(paths):
        spare = path + SPARE
        if os.path.exists(spare):
            yield path, _BUSY_S
            yield spare, _BUSY_S
        else:
            yield path, math.inf


def run_state(qmp: Qmp, until: float) -> str:
    """QEMU's name for the state of its guest."""
    return str(qmp.execute("query-status", until=until)["status"])


def migration(qmp: Qmp, until: float) -> str:
    """QEMU's name for the state of its last migration; ``none`` when there was none."""
    return str(qmp.execute("query-migrate", until=until).get("status", "none"))


def look(
    pid: int,
    start_ticks: int,
    paths: Sequence[str],
    *,
    ours: Callable[[], bool],
    claimed: bool = False,
    theirs: bool = False,
) -> Literal["running", "held", "frozen", "gone"]:
    """The condition of the process that has the guest: as ``plans.condition``.

    ``ours``: tells whether our migration may have brought it to where it is; if not, a guest that was migrated away
    or paused by somebody else is ``gone`` for us. ``claimed``: it is a new process that may be loading our state.
    ``theirs``: if it is paused, somebody else paused it, too.
    """
    if not alive(pid, start_ticks):
        return "gone"
    if is_held(pid):
        return "held"
    until = time.monotonic() + _LOOK_S
    try:
        with reach(pid, start_ticks, paths, until) as qmp:
            state = run_state(qmp, until)
    except QmpError:
        return "held" if alive(pid, start_ticks) else "gone"
    if state in RUNNING:
        return "running"
    if state in OVER or (state == "paused" and theirs):
        return "gone"
    if state == "save-vm":
        return "held"
    if state in NOT_OURS and not (claimed and state in LOADING) and not ours():
        return "gone"
    return "held" if state in ("inmigrate", "finish-migrate") else "frozen"


def make_run(qmp: Qmp, until: float, *, ours: bool, stopped: bool, once: bool = False) -> None:
    """Make a guest run that this process has and no other process may have.

    Args:
        ours: whether a migration of this guest is ours: it is cancelled while it is under way, and undone when it
            is complete. If not, a guest that was migrated away or paused by somebody else is left as it is.
        stopped: whether we may have paused it; if not, a pause is somebody else's, and is left, too.
        once: do not wait and try again here: other clients need the socket, and the caller has other connections.

    Raises:
        NotRunning: it does not run by ``until``, or after one try; QEMU's reason is in the text.
        QmpError: QEMU does not answer.
    """
    give_up_waiting = time.monotonic() + _CANCEL_S
    cancelled, why = False, "no reason"
    while True:
        wait = False
        if ours and time.monotonic() < give_up_waiting and migration(qmp, until) in UNDER_WAY:
            if not cancelled:
                cancelled = True
                qmp.execute("migrate_cancel", until=until)
            wait = True  # also for a guest that runs: it would be paused again when the migration completes
        state = run_state(qmp, until)
        if state in OVER or (state in RUNNING and not wait) or (state == "paused" and not stopped):
            return
        if once and state in PASSING and not ours:
            raise NotRunning(PASSING[state])
        if state in NOT_OURS and not ours:
            # Our migration, if it failed because no process receives it, returns from this state by itself.
            wait = stopped and state == "finish-migrate" and time.monotonic() < give_up_waiting
            if not wait:
                return
        elif state == "inmigrate":
            raise NotRunning("it waits for a state that nobody sends")
        if not wait:
            try:
                qmp.execute("cont", until=until)
            except QmpRefused as refused:
                why = str(refused)
            if run_state(qmp, until) in RUNNING:
                return
        if once or time.monotonic() >= until:
            raise NotRunning(f"it is {state} and does not run: {why}")
        time.sleep(_STEP_S)


def has_run(claims_folder: str, state: str) -> bool:
    """Whether a claimed process ran the guest already. Raises NotRunning where it could not even be claimed."""
    if claims.noted(claims_folder, "ran"):
        return True
    if state in LOADING:
        raise NotRunning(f"it has the guest by the claims and is {state}")
    # This state follows only from running, so it got `cont` already: another `cont` could make the guest run twice.
    found = state in RUNNING or state in OVER or state in NOT_OURS
    if found:
        note_ran(claims_folder)
    return found


def keep_memory_along(qmp: Qmp, until: float) -> None:
    """Switch off ``x-ignore-shared``, which our migrations need: somebody else's next one would leave the memory behind.

    Never fails: a migration that is under way forbids it. The process that began the operation restores the rest.
    """
    with suppress(QmpError):
        listed = qmp.execute("query-migrate-capabilities", until=until)
        if any(each["capability"] == _LEAVES_MEMORY and each["state"] for each in listed):
            off = [{"capability": _LEAVES_MEMORY, "state": False}]
            qmp.execute("migrate-set-capabilities", {"capabilities": off}, until=until)


def note_ran(claims_folder: str) -> None:
    """The claimed process runs the guest: whatever state it is in from now on, it is not resumed again, nor sent back."""
    with suppress(
        OSError
    ):  # a full disk: the guest runs; if somebody pauses it in the next seconds, we may resume it
        claims.note(claims_folder, "ran")


def cont(qmp: Qmp, until: float) -> QmpError | None:
    """Resume a loaded guest; the reason, if it did not resume. No answer counts as a no, unless QEMU sent RESUME."""
    try:
        qmp.execute("cont", until=until)
    except QmpError as error:
        with suppress(QmpError):
            qmp.take_events(time.monotonic())
        return None if "RESUME" in qmp.events else error
    return None


def end_unless_it_ran(
    qmp: Qmp, pid: int, start_ticks: int, until: float
) -> Literal["runs", "never_ran", "unknown"]:
    """Kill a process that did not take our ``cont``, unless it took one after all: an answer may be late, or it was another's.

    ``qmp`` was negotiated while the guest was paused. QEMU writes RESUME to every negotiated connection before the first virtual
    CPU runs (``vm_prepare_start``), whichever client sent ``cont``. So the process is stopped, and what it wrote by then is read:
    with a RESUME it has the guest, and it continues. Without, it is killed, and what it wrote is read to its end: if there is
    still no RESUME, no instruction of the guest was executed.

    Returns:
        ``runs``: it is alive and has the guest. ``never_ran``: it is dead, and never had it. ``unknown``: it is dead, and nothing
        shows that it had not begun to run the guest.

    Raises:
        KillTimeout: it is not dead by ``until``.
    """
    sigstop(pid, start_ticks, _HOLD_S)
    qmp.take_events(time.monotonic())
    if "RESUME" in qmp.events and alive(pid, start_ticks):
        sigcont(pid, start_ticks)
        return "runs"
    kill_and_wait(pid, start_ticks, until)
    read_to_the_end = qmp.take_events(time.monotonic() + _LAST_WORDS_S)
    return "never_ran" if read_to_the_end and "RESUME" not in qmp.events else "unknown"
