"""Domains of libvirt as the guard sees them: their condition and their way out, by the daemon's RPC, and past it by QMP.

The daemon first: a domain that is resumed behind its back is noticed by it, but marked as tainted. A daemon that is dead leaves its
monitor socket free, for QEMU serves one client at a time; one that hangs keeps it, and only a QMP socket of the domain's own helps.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

from caesura_vmcontrol import libvirt_rpc
from caesura_vmcontrol.freezer_control import Condition
from caesura_vmcontrol.libvirt_connections import RPC_S, CallUnanswered, daemon_at
from caesura_vmcontrol.libvirt_rpc import Domain, Libvirt, LibvirtPlan, LibvirtRefused
from caesura_vmcontrol.process_control import is_held
from caesura_vmcontrol.procfs import alive
from caesura_vmcontrol.qmp_commands import (
    NOT_OURS,
    OVER,
    PASSING,
    RUNNING,
    ProcessGone,
    make_run,
    reach,
    run_state,
)

_DAEMON_S = 5.0
"""s: for all answers about one domain: a daemon that is slow, but answers, is the better way out than none."""
_LOOKS_S = 10.0
"""s: the same for all domains of a host."""
_QMP_S = 0.5
_AGAIN_S = 0.05
"""s: the least between two tries to resume a domain whose last call is not answered: each asks the daemon for its state."""
_RUNS = (libvirt_rpc.RUNNING, libvirt_rpc.BLOCKED, libvirt_rpc.SUSPENDED)
_ENDED = (libvirt_rpc.SHUTDOWN, libvirt_rpc.SHUTOFF, libvirt_rpc.CRASHED)


class DomainNotPaused(OSError):
    """The daemon did not pause a domain; the text says why."""


class DomainPausedBefore(DomainNotPaused):
    """Somebody else had paused it."""


class DomainTaken(OSError):
    """The daemon paused a domain, and something had begun with it that must not find it paused; the text says what was done."""


class DomainLost(OSError):
    """The daemon does not know a domain whose process lives: it was restarted and could not read what it knew of it."""


class DomainBusy(OSError):
    """libvirt does something with a paused domain that ends by itself, and resumes it no sooner; the text says what."""


@dataclass(frozen=True)
class DomainLook:
    """What the daemon says of a domain in a plan's life.

    Args:
        domain: None: it is over.
        not_ours: why it is paused, where it is not ours to resume.
        busy: what libvirt does with it that ends by itself, and lets nothing resume it until then.
        migrated: it is over here, for it was migrated to another host; the daemon knows that while it has its definition.
    """

    condition: Condition
    domain: Domain | None = None
    not_ours: str = ""
    busy: str = ""
    migrated: bool = False


def libvirt_condition(plan: LibvirtPlan) -> Condition:
    """What the daemon says, and QEMU where it does not answer, or refuses.

    A domain that its storage, a migration or a dump has paused is ``gone`` for us: nothing that we do leads there, and whatever
    brought it there resumes it.

    Raises:
        OSError: neither answers (not: the domain is gone, which is an answer).
    """
    return domain_look(plan).condition


def domain_look(plan: LibvirtPlan) -> DomainLook:
    """As the daemon says, else as QEMU does. Raises OSError: neither answers."""
    try:
        with _daemon_of(plan) as daemon:
            return _look(daemon, plan)
    except OSError as error:
        if _is_over(plan, error):
            return DomainLook("gone")
        found = _look_by_qmp(plan)
        if found is None:
            raise
        return found


def look_at(plans: Sequence[LibvirtPlan]) -> dict[str, DomainLook | None]:
    """VM to what is said of it, over one connection for all of one daemon while that answers; None: nobody says. Blocking."""
    found: dict[str, DomainLook | None] = {}
    until = time.monotonic() + _LOOKS_S
    for place in {(plan.socket, plan.uri) for plan in plans}:
        mine = [plan for plan in plans if (plan.socket, plan.uri) == place]
        found |= _said_by_daemon(place, mine, until)
        for plan in mine:
            if plan.vm not in found:
                found[plan.vm] = _look_by_qmp(plan)
    return found


def _said_by_daemon(
    place: tuple[str, str], plans: Sequence[LibvirtPlan], until: float
) -> dict[str, DomainLook]:
    """One domain that it does not answer for hides no other: those are asked for over another connection."""
    found: dict[str, DomainLook] = {}
    left = list(plans)
    while left and time.monotonic() < until:
        try:
            connection = daemon_at(*place, min(until, time.monotonic() + _DAEMON_S), RPC_S)
        except OSError:
            break
        with suppress(OSError), connection as daemon:
            while left:
                plan = left.pop(0)
                daemon.extend(min(until, time.monotonic() + _DAEMON_S))
                found[plan.vm] = _look(daemon, plan)
    return found


def is_settled(plan: LibvirtPlan) -> bool:
    """Whether nothing that was asked of a domain that runs is still to come. Raises OSError.

    The daemon carries out one such request for a domain after the other, and a resume of one that runs changes nothing.
    """
    with _daemon_of(plan) as daemon:
        domain = find(daemon, plan)
        if domain is None:
            return True
        if daemon.state(domain)[0] not in _RUNS:
            return False
        try:
            daemon.resume(domain)
        except LibvirtRefused as refused:
            return refused.code == libvirt_rpc.OPERATION_INVALID
        return True


def _daemon_of(plan: LibvirtPlan) -> Libvirt:
    """Where there is another way out it is not kept waiting for polkit."""
    opening_s = RPC_S if plan.qmp else _DAEMON_S
    return daemon_at(plan.socket, plan.uri, time.monotonic() + _DAEMON_S, RPC_S, opening_s=opening_s)


def resume_domain(plan: LibvirtPlan) -> None:
    """Resume by the daemon, over the connection that looked; if that does not make it run, by QMP. Raises OSError: it does not run yet."""
    try:
        with _daemon_of(plan) as daemon:
            look = _look(daemon, plan)
            if look.condition == "frozen" and look.domain is not None:
                daemon.resume(look.domain)
    except OSError as error:
        if _is_over(plan, error):
            return
        if not _resume_by_qmp(plan):
            if isinstance(error, CallUnanswered):
                error.has_ended.wait(_AGAIN_S)
            raise
    else:
        if look.busy:
            raise DomainBusy(look.busy)


def unusable_sockets(plan: LibvirtPlan) -> list[str]:
    """The QMP sockets of a plan that this process may not use: the updater, which made it, may have more rights, or see other files."""
    return [path for path in plan.qmp if not os.access(path, os.W_OK)]


def suspend_domain(plan: LibvirtPlan, until: float) -> None:
    """Ask the daemon to pause a domain that runs.

    Whether something is done with it that takes long is asked before and after: a migration shall not find it paused, and leave it so.

    Raises:
        DomainPausedBefore, DomainNotPaused: nothing was done: it did not run, libvirt does something with it, or the daemon did not
            help before it was asked for the pause.
        DomainTaken: it was paused in the moment in which that began.
        LibvirtSilent: it may be paused later.
        OSError: it was asked for, and was not shown to be paused.
    """
    try:
        connection = daemon_at(plan.socket, plan.uri, until)
    except OSError as error:
        raise DomainNotPaused(str(error)) from error
    with connection as daemon:
        try:
            domain = _suspendable(daemon, plan)
        except DomainNotPaused:
            raise
        except OSError as error:
            raise DomainNotPaused(str(error)) from error
        try:
            daemon.suspend(domain)
        except OSError as error:
            if daemon.sent:
                raise
            raise DomainNotPaused(str(error)) from error
        try:
            job = _job(daemon, domain)
        except OSError as error:
            raise DomainTaken(f"{error}, after it was paused; that is undone") from error
        if not job:
            return
        if job != libvirt_rpc.MIGRATION_JOB and job not in _BUSY:
            with suppress(OSError):  # the operation resumes it until it runs
                daemon.resume(domain)
        raise DomainTaken(
            f"{_JOBS.get(job, _SOME_JOB)}; that began in the moment of its pause, which is undone"
        )


def _suspendable(daemon: Libvirt, plan: LibvirtPlan) -> Domain:
    """Raises DomainPausedBefore, DomainNotPaused: it may not be suspended now; OSError."""
    domain = find(daemon, plan)
    if domain is None:
        raise DomainNotPaused("it has ended, was started again, or was migrated away")
    state, reason = daemon.state(domain)
    if state == libvirt_rpc.PAUSED:
        raise DomainPausedBefore(f"it was paused before ({pause_reason(reason)})")
    if state not in _RUNS:
        raise DomainNotPaused("it does not run")
    if job := _job(daemon, domain):
        raise DomainNotPaused(_JOBS.get(job, _SOME_JOB))
    return domain


def _job(daemon: Libvirt, domain: Domain) -> int:
    """What libvirt does with it that takes long; 0: nothing, or a daemon that knows no jobs."""
    with suppress(LibvirtRefused):
        return daemon.job(domain)
    return libvirt_rpc.NO_JOB


def find(daemon: Libvirt, plan: LibvirtPlan) -> Domain | None:
    """The domain in the plan's life; None: it is over.

    A daemon that was restarted may give an id again, or have lost a domain that runs, so the process is looked at, too.

    Raises:
        DomainLost: the daemon says that it is over, and its process lives.
        OSError: the daemon does not say.
    """
    if plan.pid and not alive(plan.pid, plan.start_ticks):
        return None
    domain = None
    try:
        domain = daemon.domain(plan.uuid)
    except LibvirtRefused as refused:
        if refused.code != libvirt_rpc.NO_DOMAIN:
            raise
    if domain is not None and domain.number == plan.number:
        return domain
    if _lives(plan):
        raise DomainLost(f"libvirt at {plan.socket} does not know it any more, but process {plan.pid} lives")
    return None


def _lives(plan: LibvirtPlan) -> bool:
    """Whether its process is known, and lives."""
    return bool(plan.pid) and alive(plan.pid, plan.start_ticks)


def _is_over(plan: LibvirtPlan, error: OSError) -> bool:
    """Whether the daemon has no such domain any more, and no process of it is known to live."""
    no_domain = isinstance(error, LibvirtRefused) and error.code == libvirt_rpc.NO_DOMAIN
    return no_domain and not _lives(plan)


def _was_migrated(daemon: Libvirt, plan: LibvirtPlan) -> bool:
    try:
        domain = daemon.domain(plan.uuid)
        return domain.number < 0 and daemon.state(domain) == (libvirt_rpc.SHUTOFF, _SHUTOFF_MIGRATED)
    except LibvirtRefused:  # it is not defined any more
        return False


_SHUTOFF_MIGRATED = 4
"""VIR_DOMAIN_SHUTOFF_MIGRATED"""
_BY_MIGRATION = (2, 12)
"""VIR_DOMAIN_PAUSED_MIGRATION, _POSTCOPY"""
_BUSY = {
    libvirt_rpc.SAVE_JOB: "libvirt is saving it to a file",
    libvirt_rpc.SNAPSHOT_JOB: "libvirt is taking a snapshot of it",
    libvirt_rpc.DUMP_JOB: "libvirt is dumping its memory",
}


def _look(daemon: Libvirt, plan: LibvirtPlan) -> DomainLook:
    domain = find(daemon, plan)
    if domain is None:
        return DomainLook("gone", migrated=_was_migrated(daemon, plan))
    state, reason = daemon.state(domain)
    condition = _condition_of(state, reason)
    if state != libvirt_rpc.PAUSED:
        return DomainLook(condition, domain)
    if reason in _BY_MIGRATION:
        return DomainLook("gone", domain, MIGRATES)
    if condition == "gone":
        return DomainLook(condition, domain, f"libvirt has paused it {pause_reason(reason)}")
    # A resume would wait behind the job for half a minute, and keep one of the daemon's workers from others.
    job = _job(daemon, domain)
    if job == libvirt_rpc.MIGRATION_JOB:
        return DomainLook("gone", domain, MIGRATES)
    return DomainLook("held" if job in _BUSY else condition, domain, busy=_BUSY.get(job, ""))


MIGRATES = "libvirt is migrating it to another host"
"""Why it is left: where it arrives it is paused as it was here."""
_JOBS = _BUSY | {
    libvirt_rpc.MIGRATION_JOB: MIGRATES,
    libvirt_rpc.BACKUP_JOB: "libvirt is taking a backup of it",
}
_SOME_JOB = "libvirt is doing something with it (`virsh domjobinfo` says what)"

_REASONS = {
    1: "by somebody who asked libvirt for it",
    2: "for a migration",
    3: "for a save to a file",
    4: "for a dump",
    5: "by an I/O error",
    6: "by its watchdog",
    7: "after a restore from a snapshot",
    8: "it is shutting down",
    9: "for a snapshot",
    10: "it crashed",
    11: "it is starting",
    12: "in a post-copy migration",
    13: "by a post-copy migration that failed",
}


def pause_reason(reason: int) -> str:
    """virDomainPausedReason, for people."""
    return _REASONS.get(reason, f"reason {reason}")


def _condition_of(state: int, reason: int) -> Condition:
    if state in _RUNS:
        return "running"
    if state in _ENDED:
        return "gone"
    if state == libvirt_rpc.PAUSED:
        # 0, unknown: what a daemon says that was restarted in the pause.
        return "frozen" if reason in (0, libvirt_rpc.PAUSED_BY_USER) else "gone"
    return "held"


def _look_by_qmp(plan: LibvirtPlan) -> DomainLook | None:
    """None: QEMU does not say."""
    if not plan.pid:
        return None
    if not alive(plan.pid, plan.start_ticks):
        return DomainLook("gone")
    if not plan.qmp:
        return None
    if is_held(plan.pid):
        return DomainLook("held")
    until = time.monotonic() + _QMP_S
    try:
        with reach(plan.pid, plan.start_ticks, plan.qmp, until) as qmp:
            state = run_state(qmp, until)
    except ProcessGone:
        return DomainLook("gone")
    except OSError:
        return None
    if state in RUNNING:
        return DomainLook("running")
    if state == "paused":
        return DomainLook("frozen")
    if state in PASSING:
        return DomainLook("held")
    if state in NOT_OURS:
        return DomainLook("gone", not_ours=NOT_OURS[state])
    return DomainLook("gone" if state in OVER else "held")


def _resume_by_qmp(plan: LibvirtPlan) -> bool:
    """Whether it was resumed past the daemon, or is over."""
    if not plan.pid or not plan.qmp:
        return bool(plan.pid) and not alive(plan.pid, plan.start_ticks)
    until = time.monotonic() + _QMP_S
    with suppress(OSError):
        try:
            with reach(plan.pid, plan.start_ticks, plan.qmp, until) as qmp:
                make_run(qmp, until, ours=False, stopped=True)
        except ProcessGone:
            return True
        return True
    return False
