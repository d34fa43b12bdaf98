"""libvirt's RPC against daemons that are wrong in every way; the right one is in tests/integration/libvirt."""

from __future__ import annotations

import struct
import subprocess
import time

import pytest

from caesura_testing.libvirt_answers import PROGRAM, UUID, Daemon, good, refusal, reply, with_job
from caesura_vmcontrol.libvirt_control import (
    DomainBusy,
    domain_look,
    libvirt_condition,
    resume_domain,
)
from caesura_vmcontrol.libvirt_rpc import (
    Libvirt,
    LibvirtGone,
    LibvirtPlan,
    LibvirtRefused,
    LibvirtSilent,
)
from caesura_vmcontrol.plan_errors import BadPlan

_ANSWER_S = 60.0


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """An answer that comes is waited for, on the busiest machine; what is too late is told so by its test."""
    for name in ("libvirt_control._DAEMON_S", "libvirt_control.RPC_S", "libvirt_connections.RPC_S"):
        monkeypatch.setattr(f"caesura_vmcontrol.{name}", _ANSWER_S)


def plan(daemon: Daemon, number: int = 7) -> LibvirtPlan:
    return LibvirtPlan("web-1", daemon.path, "qemu:///system", UUID, number, 0, 0)


def opened(daemon: Daemon, seconds: float = _ANSWER_S) -> Libvirt:
    return Libvirt(daemon.path, "qemu:///system", time.monotonic() + seconds)


def test_a_paused_domain_is_resumed(daemon: Daemon) -> None:
    assert libvirt_condition(plan(daemon)) == "frozen"
    resume_domain(plan(daemon))
    assert daemon.called[-1] == 28


def test_another_life_of_the_domain_is_left_alone(daemon: Daemon) -> None:
    """It was started again: its id is another one."""
    assert libvirt_condition(plan(daemon, number=6)) == "gone"
    resume_domain(plan(daemon, number=6))
    assert 28 not in daemon.called


@pytest.mark.parametrize("reason", [2, 3, 4, 5, 9, 12])
def test_what_a_migration_a_dump_or_an_io_error_has_paused_is_not_ours(daemon: Daemon, reason: int) -> None:
    def answer(procedure: int, serial: int, arguments: bytes) -> bytes | None:
        if procedure == 212:
            return reply(procedure, serial, struct.pack(">ii", 3, reason))
        return good(procedure, serial, arguments)

    daemon.answer = answer
    assert libvirt_condition(plan(daemon)) == "gone"
    resume_domain(plan(daemon))
    assert 28 not in daemon.called


def test_a_domain_that_is_being_migrated_is_left_to_the_migration(daemon: Daemon) -> None:
    """A resume would wait behind it and keep a worker of the daemon from others; where it arrives it is paused as it was here."""
    daemon.answer = with_job(5)
    assert libvirt_condition(plan(daemon)) == "gone"
    assert "migrating" in domain_look(plan(daemon)).not_ours
    resume_domain(plan(daemon))
    assert 28 not in daemon.called


@pytest.mark.parametrize("job", [2, 6, 8])
def test_a_domain_that_is_saved_or_dumped_is_resumed_when_that_has_ended(daemon: Daemon, job: int) -> None:
    daemon.answer = with_job(job)
    assert libvirt_condition(plan(daemon)) == "held"
    with pytest.raises(DomainBusy, match="libvirt is"):
        resume_domain(plan(daemon))
    assert 28 not in daemon.called
    daemon.answer = good
    resume_domain(plan(daemon))
    assert daemon.called[-1] == 28


def test_a_job_that_lets_domains_be_resumed_keeps_nobody(daemon: Daemon) -> None:
    """A backup, which may take hours."""
    daemon.answer = with_job(9)
    assert libvirt_condition(plan(daemon)) == "frozen"
    resume_domain(plan(daemon))
    assert daemon.called[-1] == 28


def test_a_daemon_without_jobs_is_one_too(daemon: Daemon) -> None:
    def answer(procedure: int, serial: int, arguments: bytes) -> bytes | None:
        if procedure == 298:
            return reply(procedure, serial, refusal(3, "unknown procedure"), status=1)
        return good(procedure, serial, arguments)

    daemon.answer = answer
    assert libvirt_condition(plan(daemon)) == "frozen"


def test_a_domain_whose_process_has_ended_is_over_though_its_id_was_given_again(daemon: Daemon) -> None:
    """As by a daemon that was restarted: it counts on from the highest id that runs."""
    ended = subprocess.Popen(["true"])
    ended.wait()
    past = LibvirtPlan("web-1", daemon.path, "qemu:///system", UUID, 7, ended.pid, 1)
    assert libvirt_condition(past) == "gone"
    resume_domain(past)
    assert 28 not in daemon.called


def test_a_domain_that_is_not_there_is_gone(daemon: Daemon) -> None:
    def answer(procedure: int, serial: int, arguments: bytes) -> bytes | None:
        if procedure == 24:
            return reply(procedure, serial, refusal(42, "Domain not found"), status=1)
        return good(procedure, serial, arguments)

    daemon.answer = answer
    assert libvirt_condition(plan(daemon)) == "gone"
    resume_domain(plan(daemon))


def test_its_own_words_are_quoted(daemon: Daemon) -> None:
    daemon.answer = lambda procedure, serial, arguments: (
        reply(procedure, serial, refusal(80, "access denied"), status=1)
        if procedure == 1
        else good(procedure, serial, arguments)
    )
    with pytest.raises(LibvirtRefused, match="libvirt says: access denied") as raised:
        opened(daemon)
    assert raised.value.code == 80


def test_sasl_is_refused_by_name(daemon: Daemon) -> None:
    daemon.answer = lambda procedure, serial, _: reply(procedure, serial, struct.pack(">Ii", 1, 1))
    with pytest.raises(LibvirtRefused, match="SASL"):
        opened(daemon)


def test_polkit_is_asked(daemon: Daemon) -> None:
    daemon.answer = lambda procedure, serial, arguments: (
        reply(procedure, serial, struct.pack(">Ii", 1, 2))
        if procedure == 66
        else good(procedure, serial, arguments)
    )
    with opened(daemon):
        assert daemon.called == [66, 70, 1]


@pytest.mark.parametrize(
    "sent",
    [
        b"HTTP/1.1 400 Bad Request\r\n\r\n",
        struct.pack(">I", 3),
        struct.pack(">I", 1 << 30),
        b"\0\0",
        b"",
    ],
)
def test_what_is_not_libvirt_is_noticed(daemon: Daemon, sent: bytes) -> None:
    said = iter((sent, None))

    def answer(_procedure: int, _serial: int, _arguments: bytes) -> bytes | None:
        return next(said)

    daemon.answer = answer if sent else lambda *_: None
    with pytest.raises((LibvirtGone, LibvirtSilent)):
        opened(daemon, 0.5)


def test_answers_to_others_and_events_are_passed_over(daemon: Daemon) -> None:
    def answer(procedure: int, serial: int, arguments: bytes) -> bytes | None:
        event = struct.pack(">I", 28) + struct.pack(">IIiiII", PROGRAM, 1, 318, 2, 0, 0)
        return event + reply(procedure, serial + 1) + (good(procedure, serial, arguments) or b"")

    daemon.answer = answer
    assert libvirt_condition(plan(daemon)) == "frozen"


def test_a_daemon_that_drips_its_answer_holds_nobody_longer(daemon: Daemon) -> None:
    """One deadline for all: not one for each byte."""
    daemon.answer = lambda procedure, serial, _: reply(procedure, serial)[:10]
    began = time.monotonic()
    with pytest.raises(LibvirtSilent):
        opened(daemon, 0.3)
    assert time.monotonic() - began >= 0.3


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("uri", "qemu+ssh://other/system"),
        ("uuid", "web-1"),
        ("socket", "relative"),
        ("qmp", ("relative",)),
        ("number", -1),
        ("pid", "2"),
    ],
)
def test_a_plan_that_cannot_be_one_is_refused(key: str, value: object) -> None:
    fields: dict[str, object] = {
        "vm": "a", "socket": "/s", "uri": "qemu:///system", "uuid": UUID, "number": 1, "pid": 2, "start_ticks": 1, "qmp": (),
    }  # fmt: skip
    LibvirtPlan(**fields)  # type: ignore[arg-type]
    with pytest.raises(BadPlan):
        LibvirtPlan(**{**fields, key: value})  # type: ignore[arg-type]
