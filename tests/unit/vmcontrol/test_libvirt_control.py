"""Ways out of a pause by libvirt: a daemon that refuses, one that is slow, and QEMU where neither helps."""

from __future__ import annotations

import os
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from caesura_testing.libvirt_answers import UUID, Answer, Daemon, QmpSocket, good, refusal, reply, with_job
from caesura_testing.patience import patient
from caesura_vmcontrol import libvirt_control
from caesura_vmcontrol.intent import Intent
from caesura_vmcontrol.libvirt_control import (
    DomainNotPaused,
    DomainTaken,
    domain_look,
    is_settled,
    libvirt_condition,
    look_at,
    resume_domain,
    suspend_domain,
    unusable_sockets,
)
from caesura_vmcontrol.libvirt_rpc import (
    NO_JOB,
    Libvirt,
    LibvirtGone,
    LibvirtPlan,
    LibvirtRefused,
    LibvirtSilent,
)
from caesura_vmcontrol.procfs import read_process
from caesura_vmcontrol.watchdog import Watchdog

_AUTH_LIST, _LOOKUP, _RESUME, _SUSPEND, _STATE, _JOB = 66, 24, 28, 34, 212, 298


@pytest.fixture
def qmp(tmp_path: Path) -> Iterator[QmpSocket]:
    made = QmpSocket(tmp_path / "q")
    yield made
    made.close()


def plan(daemon: Daemon, qmp: QmpSocket | None = None, vm: str = "web-1") -> LibvirtPlan:
    """With a QMP socket its process is this one."""
    me = read_process(os.getpid())
    assert me is not None
    process = (me.pid, me.start_ticks, (qmp.path,)) if qmp is not None else (0, 0, ())
    return LibvirtPlan(vm, daemon.path, "qemu:///system", UUID, 7, *process)


def refusing(procedure: int, serial: int, arguments: bytes) -> bytes | None:
    """As when polkit is away, or the right was withdrawn."""
    if procedure == _AUTH_LIST:
        return reply(procedure, serial, refusal(80, "authentication unavailable"), status=1)
    return good(procedure, serial, arguments)


def wants_sasl(procedure: int, serial: int, _: bytes) -> bytes | None:
    return reply(procedure, serial, struct.pack(">Ii", 1, 1))


def slow(seconds: float, answer: Answer = good) -> Answer:
    def late(procedure: int, serial: int, arguments: bytes) -> bytes | None:
        time.sleep(seconds)
        return answer(procedure, serial, arguments)

    return late


class Disk:
    """The guard's."""

    def store(self, intent: Intent) -> None:
        """Nobody reads it here."""

    def clear(self) -> None:
        """The same."""


def fired(which: LibvirtPlan) -> Watchdog:
    """A guard whose deadline has passed."""
    watch = Watchdog(Disk(), lambda *_, **__: None)
    now = time.monotonic()
    watch.arm(Intent("op", "boot", now, now + 60, (which,)))
    watch.fire("test")
    return watch


def serve(watch: Watchdog, holds: Callable[[], bool]) -> None:
    """As the guard's loop does."""
    until = time.monotonic() + patient(20)
    while not holds():
        assert time.monotonic() < until
        time.sleep(min(watch.step() or 0.01, 0.01))


@pytest.mark.parametrize("answer", [refusing, wants_sasl])
def test_where_the_daemon_refuses_qemu_is_asked(daemon: Daemon, qmp: QmpSocket, answer: Answer) -> None:
    daemon.answer = answer
    which = plan(daemon, qmp)
    assert libvirt_condition(which) == "frozen"
    watch = fired(which)
    serve(watch, lambda: watch.state == "fired")
    assert qmp.status == "running"
    assert libvirt_condition(which) == "running"


@pytest.mark.parametrize("garbled", [_AUTH_LIST, _LOOKUP, _STATE])
def test_where_the_daemons_words_cannot_be_read_qemu_is_asked(
    daemon: Daemon, qmp: QmpSocket, garbled: int
) -> None:
    daemon.answer = lambda procedure, serial, arguments: (
        reply(procedure, serial, b"\0\0") if procedure == garbled else good(procedure, serial, arguments)
    )
    assert libvirt_condition(plan(daemon, qmp)) == "frozen"
    resume_domain(plan(daemon, qmp))
    assert qmp.status == "running"


def test_a_refusal_with_no_other_way_is_told(daemon: Daemon) -> None:
    daemon.answer = refusing
    with pytest.raises(LibvirtRefused, match="authentication unavailable"):
        libvirt_condition(plan(daemon))


def test_a_slow_daemon_is_asked_as_long_as_it_answers(
    daemon: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each answer within its time, all together beyond it."""
    monkeypatch.setattr(libvirt_control, "RPC_S", patient(0.2))
    daemon.answer = slow(patient(0.08))
    assert libvirt_condition(plan(daemon)) == "frozen"
    resume_domain(plan(daemon))
    assert daemon.called[-1] == _RESUME


def test_one_answer_that_takes_too_long_ends_it(daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(libvirt_control, "RPC_S", 0.05)
    daemon.answer = slow(0.5)
    with pytest.raises(LibvirtSilent):
        libvirt_condition(plan(daemon))


def test_many_domains_of_a_slow_daemon_have_their_time_each(
    daemon: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(libvirt_control, "RPC_S", patient(0.2))
    daemon.answer = slow(patient(0.02))
    found = look_at([plan(daemon, vm=f"v{number}") for number in range(12)])
    assert [look.condition for look in found.values() if look is not None] == ["frozen"] * 12


def test_one_domain_that_is_not_answered_for_hides_no_other(
    daemon: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(libvirt_control, "RPC_S", patient(1))
    states, over = 0, threading.Event()

    def answer(procedure: int, serial: int, arguments: bytes) -> bytes | None:
        nonlocal states
        states += procedure == _STATE
        if procedure == _STATE and states == 2:
            over.wait()
        return good(procedure, serial, arguments)

    daemon.answer = answer
    found = look_at([plan(daemon, vm=vm) for vm in ("a", "b", "c")])
    over.set()
    assert {vm for vm, look in found.items() if look is None} == {"b"}


@pytest.mark.parametrize(
    ("status", "condition"),
    [
        ("running", "running"),
        ("paused", "frozen"),
        ("shutdown", "gone"),
        ("io-error", "gone"),
        ("watchdog", "gone"),
        ("postmigrate", "gone"),
        ("save-vm", "held"),
        ("finish-migrate", "held"),
    ],
)
def test_what_qemu_says_is_read_as_what_the_daemon_would_say(
    daemon: Daemon, qmp: QmpSocket, status: str, condition: str
) -> None:
    daemon.answer = refusing
    qmp.status = status
    assert libvirt_condition(plan(daemon, qmp)) == condition
    ours = status in ("running", "paused", "shutdown", "save-vm", "finish-migrate")
    assert (domain_look(plan(daemon, qmp)).not_ours == "") is ours
    look = look_at([plan(daemon, qmp)])["web-1"]
    assert look is not None
    assert (look.condition, look.not_ours == "") == (condition, ours)


def running(procedure: int, serial: int, arguments: bytes) -> bytes | None:
    """The domain runs until it is suspended."""
    if procedure == _STATE:
        return reply(procedure, serial, struct.pack(">ii", 1, 1))
    return good(procedure, serial, arguments)


@pytest.mark.parametrize("job", [2, 5, 6, 8, 9, 0])
def test_a_domain_with_a_job_under_way_is_not_suspended(daemon: Daemon, job: int) -> None:
    """Also one of which the daemon does not say what it is."""
    busy = with_job(job)
    daemon.answer = lambda procedure, serial, arguments: (busy if procedure == _JOB else running)(
        procedure, serial, arguments
    )
    with pytest.raises(DomainNotPaused, match="libvirt is"):
        suspend_domain(plan(daemon), time.monotonic() + 5)
    assert _SUSPEND not in daemon.called


@pytest.mark.parametrize(("job", "undone"), [(5, False), (9, True)])
def test_a_job_that_began_in_the_moment_of_the_suspend_undoes_it(
    daemon: Daemon, job: int, undone: bool
) -> None:
    """But during a migration: a resume would wait behind it."""
    busy = with_job(job)

    def answer(procedure: int, serial: int, arguments: bytes) -> bytes | None:
        if procedure == _JOB and _SUSPEND in daemon.called:
            return busy(procedure, serial, arguments)
        return running(procedure, serial, arguments)

    daemon.answer = answer
    with pytest.raises(DomainTaken, match="in the moment of its pause"):
        suspend_domain(plan(daemon), time.monotonic() + 5)
    assert (_RESUME in daemon.called) is undone


def test_a_daemon_that_falls_silent_after_the_suspend_pauses_nothing_later(daemon: Daemon) -> None:
    """It is paused now; whether a migration began cannot be asked, so it is not to stay so."""
    daemon.answer = lambda procedure, serial, arguments: (
        reply(procedure, serial)[:10]
        if procedure == _JOB and _SUSPEND in daemon.called
        else running(procedure, serial, arguments)
    )
    with pytest.raises(DomainTaken, match="does not answer"):
        suspend_domain(plan(daemon), time.monotonic() + patient(0.3))


def test_a_domain_without_a_job_is_suspended(daemon: Daemon) -> None:
    daemon.answer = running
    suspend_domain(plan(daemon), time.monotonic() + 5)
    assert daemon.called[-2:] == [_SUSPEND, _JOB]


@pytest.mark.parametrize("silent", [_AUTH_LIST, _LOOKUP, _STATE, _JOB])
def test_a_suspend_that_was_not_asked_for_does_not_come_late(daemon: Daemon, silent: int) -> None:
    daemon.answer = lambda procedure, serial, arguments: (
        reply(procedure, serial)[:10] if procedure == silent else running(procedure, serial, arguments)
    )
    with pytest.raises(DomainNotPaused, match="does not answer"):
        suspend_domain(plan(daemon), time.monotonic() + 0.2)


@pytest.mark.parametrize("refused", [True, False])
@pytest.mark.parametrize("last", [_AUTH_LIST, _LOOKUP, _STATE])
def test_whatever_fails_before_the_suspend_has_done_nothing(daemon: Daemon, last: int, refused: bool) -> None:
    """polkit is away, or the daemon ends."""

    def answer(procedure: int, serial: int, arguments: bytes) -> bytes | None:
        if procedure == last:
            return reply(procedure, serial, refusal(88, "no"), status=1) if refused else None
        return running(procedure, serial, arguments)

    daemon.answer = answer
    with pytest.raises(DomainNotPaused):
        suspend_domain(plan(daemon), time.monotonic() + patient(5))
    assert _SUSPEND not in daemon.called


def test_without_a_daemon_nothing_is_done(daemon: Daemon) -> None:
    with pytest.raises(DomainNotPaused, match="no libvirt at"):
        suspend_domain(replace(plan(daemon), socket=f"{daemon.path}-none"), time.monotonic() + patient(5))


def test_a_suspend_whose_time_is_over_before_it_is_sent_does_not_come_late(
    daemon: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    def last_answer(self: Libvirt, _: object) -> int:
        self.extend(time.monotonic())
        return NO_JOB

    monkeypatch.setattr(Libvirt, "job", last_answer)
    daemon.answer = running
    with pytest.raises(DomainNotPaused, match="does not answer in time"):
        suspend_domain(plan(daemon), time.monotonic() + patient(5))
    assert _SUSPEND not in daemon.called


@pytest.mark.parametrize(("refused", "kind"), [(True, LibvirtRefused), (False, LibvirtGone)])
def test_a_suspend_that_was_sent_and_fails_may_have_done_something(
    daemon: Daemon, refused: bool, kind: type[OSError]
) -> None:
    def answer(procedure: int, serial: int, arguments: bytes) -> bytes | None:
        if procedure == _SUSPEND:
            return reply(procedure, serial, refusal(38, "no"), status=1) if refused else None
        return running(procedure, serial, arguments)

    daemon.answer = answer
    with pytest.raises(kind):
        suspend_domain(plan(daemon), time.monotonic() + patient(5))


def test_a_suspend_that_is_not_answered_may_come_late(daemon: Daemon) -> None:
    daemon.answer = lambda procedure, serial, arguments: (
        reply(procedure, serial)[:10] if procedure == _SUSPEND else running(procedure, serial, arguments)
    )
    with pytest.raises(LibvirtSilent):
        suspend_domain(plan(daemon), time.monotonic() + patient(0.2))


@pytest.mark.parametrize(
    ("code", "settled"),
    [(None, True), (55, True), (68, False)],
    ids=["carried out", "runs already", "another request of it is under way"],
)
def test_a_request_that_waits_is_behind_none_when_a_later_one_is_answered(
    daemon: Daemon, code: int | None, settled: bool
) -> None:
    def answer(procedure: int, serial: int, arguments: bytes) -> bytes | None:
        if procedure == _RESUME and code is not None:
            return reply(procedure, serial, refusal(code, "no"), status=1)
        return running(procedure, serial, arguments)

    daemon.answer = answer
    assert is_settled(plan(daemon)) is settled


def test_a_domain_that_is_paused_is_not_asked_to_run_by_that(daemon: Daemon) -> None:
    assert not is_settled(plan(daemon))
    assert _RESUME not in daemon.called


def test_a_guard_with_less_rights_than_the_updater_knows_which_ways_are_none(
    daemon: Daemon, qmp: QmpSocket, monkeypatch: pytest.MonkeyPatch
) -> None:
    which = plan(daemon, qmp)
    assert unusable_sockets(which) == []
    monkeypatch.setattr(os, "access", lambda path, _: path != qmp.path)
    assert unusable_sockets(which) == [qmp.path]


# -- a daemon that has lost a domain ----------------------------------------------------------------------------


def off_or_unknown(number: int | None) -> Answer:
    """A daemon that was restarted and could not read what it knew of a domain: off (-1), started again, or none (None)."""

    def answer(procedure: int, serial: int, arguments: bytes) -> bytes | None:
        if procedure == _LOOKUP and number is None:
            return reply(procedure, serial, refusal(42, "Domain not found"), status=1)
        if procedure == _LOOKUP:
            name = struct.pack(">I", 5) + b"web-1\0\0\0" + bytes.fromhex(UUID.replace("-", ""))
            return reply(procedure, serial, name + struct.pack(">i", number))
        if procedure == _STATE:
            return reply(procedure, serial, struct.pack(">ii", 5, 0))
        return good(procedure, serial, arguments)

    return answer


def vanishing(procedure: int, serial: int, arguments: bytes) -> bytes | None:
    """The daemon loses it between two questions."""
    if procedure == _STATE:
        return reply(procedure, serial, refusal(42, "Domain not found"), status=1)
    return good(procedure, serial, arguments)


_LOST = [
    pytest.param(off_or_unknown(None), id="unknown"),
    pytest.param(off_or_unknown(-1), id="off"),
    pytest.param(off_or_unknown(8), id="another-id"),
    pytest.param(vanishing, id="vanishing"),
]


@pytest.mark.parametrize("answer", _LOST)
def test_a_domain_that_the_daemon_has_lost_is_resumed_past_it(
    daemon: Daemon, qmp: QmpSocket, answer: Answer
) -> None:
    """Its process lives: it is as paused as it was."""
    daemon.answer = answer
    which = plan(daemon, qmp)
    assert libvirt_condition(which) == "frozen"
    look = look_at([which])["web-1"]
    assert look is not None
    assert look.condition == "frozen"
    watch = fired(which)
    serve(watch, lambda: watch.state == "fired")
    assert qmp.status == "running"
    assert libvirt_condition(which) == "running"


@pytest.mark.parametrize("answer", _LOST)
def test_a_domain_that_the_daemon_has_lost_is_not_over_while_its_process_lives(
    daemon: Daemon, answer: Answer
) -> None:
    daemon.answer = answer
    me = read_process(os.getpid())
    assert me is not None
    which = replace(plan(daemon), pid=me.pid, start_ticks=me.start_ticks)
    for ask in (libvirt_condition, resume_domain, is_settled):
        with pytest.raises(OSError, match=r"does not know it any more|Domain not found"):
            ask(which)
    assert look_at([which]) == {"web-1": None}


@pytest.mark.parametrize("answer", _LOST)
def test_a_domain_that_the_daemon_does_not_know_and_whose_process_has_ended_is_over(
    daemon: Daemon, answer: Answer
) -> None:
    """Undefined, started again, or migrated away."""
    daemon.answer = answer
    ended = subprocess.Popen(["true"])
    ended.wait()
    for which in (replace(plan(daemon), pid=ended.pid, start_ticks=1), plan(daemon)):
        assert libvirt_condition(which) == "gone"
        resume_domain(which)
    assert _RESUME not in daemon.called
