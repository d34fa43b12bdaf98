"""Few connections to a daemon for all domains: authenticated ahead of a pause, and given up when a call on one is not answered."""

from __future__ import annotations

import os
import socket
import struct
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from caesura_testing.libvirt_answers import UUID, Daemon, QmpSocket, good, refusal, reply
from caesura_testing.patience import patient
from caesura_vmcontrol import libvirt_connections, libvirt_control
from caesura_vmcontrol.libvirt_connections import CallUnanswered, daemon_at, open_ahead
from caesura_vmcontrol.libvirt_control import domain_look, look_at, resume_domain
from caesura_vmcontrol.libvirt_rpc import (
    Domain,
    Libvirt,
    LibvirtGone,
    LibvirtPlan,
    LibvirtRefused,
    LibvirtSilent,
)
from caesura_vmcontrol.procfs import read_process

_AUTH_LIST, _AUTH_POLKIT, _OPEN, _LOOKUP, _STATE, _RESUME, _SUSPEND, _JOB = 66, 70, 1, 24, 212, 28, 34, 298


class Polkit:
    """A daemon that asks polkit, which answers when it is let."""

    def __init__(self, daemon: Daemon) -> None:
        self.daemon = daemon
        self.go = threading.Event()
        self.go.set()
        self.asked = threading.Event()
        daemon.answer = self.answer

    def answer(self, procedure: int, serial: int, arguments: bytes) -> bytes | None:
        if procedure == _AUTH_LIST:
            return reply(procedure, serial, struct.pack(">Ii", 1, 2))
        if procedure == _AUTH_POLKIT:
            self.asked.set()
            self.go.wait()
        return good(procedure, serial, arguments)


@pytest.fixture
def polkit(daemon: Daemon) -> Iterator[Polkit]:
    made = Polkit(daemon)
    yield made
    made.go.set()


@pytest.fixture
def unhurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy machine may take long for an answer."""
    for module in (libvirt_connections, libvirt_control):
        monkeypatch.setattr(module, "RPC_S", patient(20))
    monkeypatch.setattr(libvirt_connections, "OPENING_S", patient(60))
    monkeypatch.setattr(libvirt_control, "_DAEMON_S", patient(60))


def _plan(daemon: Daemon) -> LibvirtPlan:
    return LibvirtPlan("web-1", daemon.path, "qemu:///system", UUID, 7, 0, 0)


@pytest.mark.usefixtures("unhurried")
def test_many_looks_and_resumes_at_once_need_few_connections(daemon: Daemon, polkit: Polkit) -> None:
    """A connection for each look at each domain never got through polkit's queue in time."""
    plan = _plan(daemon)
    with ThreadPoolExecutor(30) as threads:
        looks = list(threads.map(lambda _: domain_look(plan).condition, range(60)))
        list(threads.map(lambda _: resume_domain(plan), range(60)))
    assert looks == ["frozen"] * 60
    assert daemon.called.count(_RESUME) == 60
    assert 1 <= daemon.called.count(_AUTH_POLKIT) <= 5
    assert 1 <= daemon.called.count(_OPEN) <= 5


@pytest.mark.usefixtures("unhurried")
def test_it_is_authenticated_ahead(daemon: Daemon, polkit: Polkit) -> None:
    open_ahead([_plan(daemon)])
    assert polkit.asked.wait(patient(10))
    assert domain_look(_plan(daemon)).condition == "frozen"
    assert daemon.called.count(_AUTH_POLKIT) == 1


def test_polkit_may_take_longer_than_other_answers(
    daemon: Daemon, polkit: Polkit, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A group from a directory service: the domain was never resumed."""
    for module in (libvirt_connections, libvirt_control):
        monkeypatch.setattr(module, "RPC_S", patient(0.3))
    monkeypatch.setattr(libvirt_connections, "OPENING_S", patient(30))
    monkeypatch.setattr(libvirt_control, "_DAEMON_S", patient(30))
    polkit.go.clear()
    with ThreadPoolExecutor(1) as threads:
        look = threads.submit(domain_look, _plan(daemon))
        assert polkit.asked.wait(patient(10))
        time.sleep(patient(0.4))  # longer than RPC_S, on purpose
        polkit.go.set()
        assert look.result().condition == "frozen"


def test_a_domain_with_another_way_out_does_not_wait_for_polkit(
    daemon: Daemon, polkit: Polkit, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(libvirt_control, "RPC_S", 0.05)
    monkeypatch.setattr(libvirt_control, "_look_by_qmp", lambda _: libvirt_control.DomainLook("running"))
    polkit.go.clear()
    assert domain_look(replace(_plan(daemon), qmp=("/q",))).condition == "running"


@pytest.mark.usefixtures("unhurried")
def test_a_refusal_is_told_to_all_and_asked_again(daemon: Daemon) -> None:
    refused = True

    def answer(procedure: int, serial: int, arguments: bytes) -> bytes | None:
        if procedure == _OPEN and refused:
            return reply(procedure, serial, refusal(45, "authentication failed"), status=1)
        return good(procedure, serial, arguments)

    daemon.answer = answer
    with pytest.raises(LibvirtRefused, match="authentication failed"):
        domain_look(_plan(daemon))
    refused = False
    assert domain_look(_plan(daemon)).condition == "frozen"


@pytest.mark.usefixtures("unhurried")
def test_while_a_call_is_not_answered_others_get_another_connection(
    daemon: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    hangs, go = threading.Event(), threading.Event()

    def answer(procedure: int, serial: int, arguments: bytes) -> bytes | None:
        if procedure == _STATE and not hangs.is_set():
            hangs.set()
            go.wait()
        return good(procedure, serial, arguments)

    daemon.answer = answer
    with daemon_at(daemon.path, "qemu:///system", time.monotonic() + patient(60)) as slow:
        domain = slow.domain(UUID)
        slow.extend(time.monotonic() + patient(0.2))
        try:
            with pytest.raises(LibvirtSilent, match="does not answer in time"):
                slow.state(domain)
            assert hangs.wait(patient(60))
            with monkeypatch.context() as patched:
                patched.setattr(libvirt_connections, "RPC_S", 0.001)  # shorter than what has passed
                assert domain_look(_plan(daemon)).condition == "frozen"
            assert daemon.called.count(_OPEN) == 2
        finally:
            go.set()


@pytest.mark.usefixtures("unhurried")
def test_who_had_little_time_left_spoils_the_connection_for_nobody(daemon: Daemon) -> None:
    """It would be opened, and authenticated, again: in a pause, and again and again where the daemon is slow."""
    go = threading.Event()

    def answer(procedure: int, serial: int, arguments: bytes) -> bytes | None:
        if procedure == _STATE:
            go.wait()
        return good(procedure, serial, arguments)

    daemon.answer = answer
    with daemon_at(daemon.path, "qemu:///system", time.monotonic() + patient(60)) as hurried:
        domain = hurried.domain(UUID)
        hurried.extend(time.monotonic() + patient(0.05))
        with pytest.raises(LibvirtSilent):
            hurried.state(domain)
    go.set()
    assert domain_look(_plan(daemon)).condition == "frozen"
    assert daemon.called.count(_OPEN) == 1


@pytest.mark.usefixtures("unhurried")
def test_many_domains_of_a_slow_daemon_are_resumed_one_after_the_other(
    daemon: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a turn for each call all would be half-way when their time is over, and begin again."""
    monkeypatch.setattr(libvirt_connections, "_MOST_CONNECTIONS", 1)
    plan = _plan(daemon)
    open_ahead([plan])
    with ThreadPoolExecutor(30) as threads:
        list(threads.map(lambda _: resume_domain(plan), range(30)))
    for nth, at in enumerate(at for at, called in enumerate(daemon.called) if called == _RESUME):
        assert daemon.called[:at].count(_LOOKUP) <= nth + 4


@pytest.mark.usefixtures("unhurried")
def test_many_users_have_as_many_calls_under_way_as_the_daemon_has_workers(daemon: Daemon) -> None:
    """A suspend takes as long as its domain's disks need to be flushed."""
    all_have_one = threading.Barrier(20)

    def suspend(_: int) -> None:
        with daemon_at(daemon.path, "qemu:///system", time.monotonic() + patient(60)) as shared:
            domain = shared.domain(UUID)
            all_have_one.wait(patient(60))
            shared.suspend(domain)

    open_ahead([replace(_plan(daemon), vm=f"web-{number}") for number in range(60)])
    with ThreadPoolExecutor(20) as threads:
        list(threads.map(suspend, range(20)))
    assert daemon.called.count(_SUSPEND) == 20
    assert daemon.called.count(_OPEN) == 5


@pytest.mark.usefixtures("unhurried")
def test_a_host_that_cannot_start_a_thread_has_a_connection_of_its_own(
    daemon: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = threading.Thread.start

    def refuse(thread: threading.Thread) -> None:
        if "libvirt at" in thread.name:
            raise RuntimeError("can't start new thread")
        start(thread)

    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", refuse)
        open_ahead([_plan(daemon)])
        with daemon_at(daemon.path, "qemu:///system", time.monotonic() + patient(10)) as own:
            domain = own.domain(UUID)
    assert domain.number == 7
    assert domain_look(_plan(daemon)).condition == "frozen", "it is shared again as soon as there are threads"


def test_a_pause_that_takes_long_keeps_no_other_domain_waiting(
    daemon: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its QEMU hangs, and it may take all the time of a freeze; the daemon's places for one connection are few."""
    monkeypatch.setattr(libvirt_connections, "RPC_S", patient(0.1))
    hangs, go = threading.Event(), threading.Event()

    def answer(procedure: int, serial: int, arguments: bytes) -> bytes | None:
        if procedure == _SUSPEND:
            hangs.set()
            go.wait()
        return good(procedure, serial, arguments)

    daemon.answer = answer

    def suspend() -> None:
        with daemon_at(daemon.path, "qemu:///system", time.monotonic() + patient(60)) as slow:
            slow.suspend(slow.domain(UUID))

    with ThreadPoolExecutor(1) as threads:
        suspending = threads.submit(suspend)
        try:
            assert hangs.wait(patient(10))
            time.sleep(patient(0.2))  # longer than RPC_S, on purpose
            assert domain_look(_plan(daemon)).condition == "frozen"
            assert not suspending.done()
        finally:
            go.set()
        suspending.result()


def test_after_a_call_that_was_not_written_whole_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The daemon would take it for the rest of the one before."""
    monkeypatch.setattr(libvirt_connections, "RPC_S", patient(0.3))
    ours, theirs = socket.socketpair()
    path = str(tmp_path / "s")

    def connect(line: Libvirt) -> None:
        line._socket.close()
        line._socket = ours

    monkeypatch.setattr(Libvirt, "_connect", connect)
    monkeypatch.setattr(Libvirt, "_authenticate", lambda _: None)
    monkeypatch.setattr(Libvirt, "_call", lambda *_: b"")
    until = time.monotonic() + patient(10)
    line = libvirt_connections._SharedConnection(path, "qemu:///system", until, lambda: None)
    sent: list[int] = []
    much = bytes(8 << 20)
    with theirs:
        with pytest.raises(LibvirtSilent):
            line.ask(1, much, time.monotonic() + patient(0.3), 60, lambda: sent.append(1))
        with pytest.raises(LibvirtGone, match="does not read what it is sent"):
            line.ask(1, b"", time.monotonic() + patient(10), 60, lambda: sent.append(1))
        assert (sent, line.is_usable) == ([], False)
    line.close()


@pytest.mark.usefixtures("unhurried")
def test_a_call_whose_time_is_over_is_not_sent(daemon: Daemon) -> None:
    """A pause that is late must not be asked for at all; the connection is as good as before."""
    with daemon_at(daemon.path, "qemu:///system", time.monotonic() + patient(10)) as late:
        domain = late.domain(UUID)
        late.extend(time.monotonic())
        with pytest.raises(LibvirtSilent, match="does not answer in time"):
            late.suspend(domain)
        late.extend(time.monotonic() + patient(10))
        assert late.state(domain) == (3, 1)
    assert _SUSPEND not in daemon.called
    assert domain_look(_plan(daemon)).condition == "frozen"
    assert daemon.called.count(_OPEN) == 1


@pytest.mark.usefixtures("unhurried")
def test_a_daemon_that_ends_the_connection_is_asked_over_another_one(daemon: Daemon) -> None:
    assert domain_look(_plan(daemon)).condition == "frozen"
    daemon.answer = lambda *_: None
    with pytest.raises(LibvirtGone):
        domain_look(_plan(daemon))
    daemon.answer = good
    assert domain_look(_plan(daemon)).condition == "frozen"
    assert daemon.called.count(_OPEN) == 2


# -- a domain whose QEMU hangs: what waits for its job keeps a worker of the daemon -------------------------------


class HangingDomain:
    """A daemon that answers what waits for web-1's job when it is let, and about every other domain at once."""

    def __init__(self, daemon: Daemon) -> None:
        self.daemon = daemon
        self.number = 7
        self.waits_for = {_JOB, _RESUME}
        self.ends_connection = False
        self.is_asked = threading.Event()
        self.go = threading.Event()
        daemon.answer = self.answer

    def answer(self, procedure: int, serial: int, arguments: bytes) -> bytes | None:
        if procedure == _LOOKUP:
            named = struct.pack(">I", 5) + b"web-1\0\0\0" + arguments[:16]
            return reply(procedure, serial, named + struct.pack(">i", self.number))
        if procedure in self.waits_for and _UUID_SENT in arguments and not self.go.is_set():
            self.is_asked.set()
            self.go.wait()
            if self.ends_connection:
                return None
        return good(procedure, serial, arguments)

    def asked_for_job(self) -> int:
        """How many calls waited for a domain's job, or had it at once."""
        return self.daemon.called.count(_JOB) + self.daemon.called.count(_RESUME)


_UUID_SENT = bytes.fromhex(UUID.replace("-", ""))
_OTHER = "00000000-0000-0000-0000-000000000002"


@pytest.fixture
def hanging(daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> Iterator[HangingDomain]:
    """One call for its job is sent, and given up."""
    made = HangingDomain(daemon)
    with monkeypatch.context() as hurry:
        for module in (libvirt_connections, libvirt_control):
            hurry.setattr(module, "RPC_S", patient(0.2))
        while not made.is_asked.is_set():  # on a busy machine what is asked before may be late, too
            with pytest.raises(LibvirtSilent):
                domain_look(_plan(daemon))
    for module in (libvirt_connections, libvirt_control):
        monkeypatch.setattr(module, "RPC_S", patient(5))
    monkeypatch.setattr(libvirt_connections, "OPENING_S", patient(60))
    monkeypatch.setattr(libvirt_control, "_DAEMON_S", patient(60))
    monkeypatch.setattr(libvirt_connections, "_JOB_WAIT_S", patient(600))
    assert made.asked_for_job() == 1
    yield made
    made.go.set()


def test_a_domain_that_keeps_a_worker_is_given_no_second_one(daemon: Daemon, hanging: HangingDomain) -> None:
    """One QEMU that hangs took all of the daemon's workers within ten seconds, and with them every domain's way out."""
    states = daemon.called.count(_STATE)
    for ask in (domain_look, resume_domain) * 5:
        with pytest.raises(LibvirtSilent, match="has not answered an earlier call for this domain"):
            ask(_plan(daemon))
    assert hanging.asked_for_job() == 1
    assert daemon.called.count(_STATE) == states + 10, "it may run by now"
    assert look_at([_plan(daemon)]) == {"web-1": None}
    assert hanging.asked_for_job() == 1


def test_a_domain_that_is_not_answered_for_is_resumed_past_the_daemon(
    daemon: Daemon, hanging: HangingDomain, tmp_path: Path
) -> None:
    qmp = QmpSocket(tmp_path / "q")
    me = read_process(os.getpid())
    assert me is not None
    plan = replace(_plan(daemon), pid=me.pid, start_ticks=me.start_ticks, qmp=(qmp.path,))
    assert domain_look(plan).condition == "frozen"
    resume_domain(plan)
    assert (qmp.status, hanging.asked_for_job()) == ("running", 1)
    qmp.close()


@pytest.mark.usefixtures("hanging")
def test_other_domains_are_asked_for_beside_one_that_keeps_a_worker(daemon: Daemon) -> None:
    resume_domain(replace(_plan(daemon), vm="web-2", uuid=_OTHER))
    assert daemon.called[-2:] == [_JOB, _RESUME]


def test_another_life_of_the_domain_is_asked_for(daemon: Daemon, hanging: HangingDomain) -> None:
    hanging.number = 8
    hanging.waits_for = set()
    resume_domain(replace(_plan(daemon), number=8))
    assert daemon.called[-2:] == [_JOB, _RESUME]


@pytest.mark.parametrize("ends", [False, True], ids=["an answer", "the daemon's end"])
def test_it_is_asked_again_as_soon_as_the_call_can_keep_no_worker(
    daemon: Daemon, hanging: HangingDomain, ends: bool
) -> None:
    """A daemon that was restarted has no call of the time before."""
    with pytest.raises(CallUnanswered) as told:
        resume_domain(_plan(daemon))
    hanging.ends_connection = ends
    hanging.go.set()
    assert told.value.has_ended.wait(patient(60))
    resume_domain(_plan(daemon))
    assert daemon.called[-2:] == [_JOB, _RESUME]


def test_it_is_asked_again_after_the_daemons_own_wait_for_a_job(
    daemon: Daemon, hanging: HangingDomain, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The call has an answer then, or QEMU itself has it."""
    hanging.waits_for = set()
    monkeypatch.setattr(libvirt_connections, "_JOB_WAIT_S", 0.0)
    resume_domain(_plan(daemon))
    assert daemon.called[-2:] == [_JOB, _RESUME]


def test_a_resume_that_keeps_a_worker_is_not_sent_again(
    daemon: Daemon, hanging: HangingDomain, monkeypatch: pytest.MonkeyPatch
) -> None:
    hanging.go.set()
    resume_domain(_plan(daemon))
    hanging.go.clear()
    hanging.is_asked.clear()
    hanging.waits_for = {_RESUME}
    resumes = daemon.called.count(_RESUME)
    with monkeypatch.context() as hurry:
        for module in (libvirt_connections, libvirt_control):
            hurry.setattr(module, "RPC_S", patient(0.2))
        while not hanging.is_asked.is_set():
            with pytest.raises(LibvirtSilent):
                resume_domain(_plan(daemon))
    for _ in range(5):
        with pytest.raises(CallUnanswered):
            resume_domain(_plan(daemon))
    assert daemon.called.count(_RESUME) == resumes + 1


# -- how many are open ------------------------------------------------------------------------------------------


def _open(daemon: Daemon) -> int:
    return len(libvirt_connections._pool((daemon.path, "qemu:///system"))._connections)


def test_calls_that_are_not_answered_open_no_more_than_the_daemon_has_workers(
    daemon: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And when they are answered the surplus is closed: each is a thread, and is authenticated again after each restart of the daemon."""
    monkeypatch.setattr(libvirt_connections, "_MOST_CONNECTIONS", 2)
    monkeypatch.setattr(libvirt_connections, "_MOST_OPEN", 4)
    monkeypatch.setattr(libvirt_connections, "RPC_S", patient(0.05))
    go = threading.Event()

    def answer(procedure: int, serial: int, arguments: bytes) -> bytes | None:
        if procedure == _SUSPEND:
            go.wait()
        return good(procedure, serial, arguments)

    daemon.answer = answer
    domain = Domain("web-1", _UUID_SENT, 7)

    def suspend(_: int) -> None:
        with daemon_at(daemon.path, "qemu:///system", time.monotonic() + patient(60)) as slow:
            slow.suspend(domain)

    with ThreadPoolExecutor(20) as threads:
        suspending = [threads.submit(suspend, number) for number in range(20)]
        try:
            until = time.monotonic() + patient(60)
            while _open(daemon) < 4:
                assert time.monotonic() < until
                time.sleep(0.01)
            time.sleep(patient(0.2))  # those that wait begin to open more within RPC_S
            assert _open(daemon) == 4
        finally:
            go.set()
        for each in suspending:
            each.result()
    assert daemon.called.count(_SUSPEND) == 20
    monkeypatch.setattr(libvirt_connections, "RPC_S", patient(20))
    suspend(0)
    assert _open(daemon) <= 2


def test_connections_that_are_kept_for_an_answer_make_room(
    daemon: Daemon, hanging: HangingDomain, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(libvirt_connections, "_MOST_OPEN", 1)
    resume_domain(replace(_plan(daemon), vm="web-2", uuid=_OTHER))
    assert daemon.called[-2:] == [_JOB, _RESUME]
    assert not hanging.go.is_set()
    assert _open(daemon) == 1


@pytest.mark.usefixtures("unhurried")
def test_one_thread_is_enough_for_a_connection(daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    """A host at its limit of threads: the one that opened it took the last, and nobody was there to read the answers."""
    start = threading.Thread.start
    started: list[str] = []

    def one(thread: threading.Thread) -> None:
        if "libvirt" in thread.name:
            if started:
                raise RuntimeError("can't start new thread")
            started.append(thread.name)
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", one)
    assert domain_look(_plan(daemon)).condition == "frozen"
    assert domain_look(_plan(daemon)).condition == "frozen"
    assert daemon.called.count(_OPEN) == 1
