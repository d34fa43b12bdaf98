"""The way out of a replace, where two processes are at it: steps of one between any two steps of the other."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from caesura_vmcontrol import claims, process_control, qemu_replace
from caesura_vmcontrol.procfs import Process, alive, read_process
from caesura_vmcontrol.qemu_plans import ReplacePlan, Vmm

STATE = b"device state"


class Other:
    """Another process that restores the guest: a guard beside a host updater. Its "QEMU" sleeps."""

    def __init__(self, plan: ReplacePlan) -> None:
        self.plan = plan
        self.number, owner = claims.current(plan.claims)
        assert owner is not None
        self.file = owner.text
        self.qemu: subprocess.Popen[bytes] | None = None

    def begin(self) -> None:
        """As ``_restore`` after it found something left over: the file again, then a process."""
        self.number += 1
        assert claims.claim(self.plan.claims, self.number, self.file) == self.file
        name, _, value = self.plan.mark.partition("=")
        self.qemu = subprocess.Popen(["sleep", "1000"], env={**os.environ, name: value})

    @property
    def process(self) -> Process:
        assert self.qemu is not None
        found = read_process(self.qemu.pid)
        assert found is not None
        return found

    def claim(self) -> bool:
        """Whether its process has the guest from here on: the next thing is ``cont``."""
        text = claims.Owner("new", pid=self.process.pid, start_ticks=self.process.start_ticks).text
        self.number += 1
        return claims.claim(self.plan.claims, self.number, text) == text

    def close(self) -> None:
        if self.qemu is not None:
            self.qemu.kill()
            self.qemu.wait()


@pytest.fixture
def other(tmp_path: Path) -> Iterator[Other]:
    """Of a guest in its state file, whose old process is dead."""
    folder = tmp_path / "claims"
    folder.mkdir()
    (tmp_path / "state").write_bytes(STATE)
    claims.claim(str(folder), 1, f"file:{len(STATE)}:{hashlib.sha256(STATE).hexdigest()}")
    mark = f"CAESURA_TEST_MARK={tmp_path}"
    plan = ReplacePlan(
        vm="a",
        old=Vmm(2**31 - 1, 1, str(tmp_path / "old")),
        claims=str(folder),
        state_file=str(tmp_path / "state"),
        qmp=str(tmp_path / "qmp"),
        argv=(("/bin/false", "-incoming", "defer", "-S"),),
        environ=(tuple(mark.split("=", 1)),),  # type: ignore[arg-type]
        mark=mark,
        log=str(tmp_path / "log"),
    )
    made = Other(plan)
    yield made
    made.close()


def ended_without(plan: ReplacePlan, *, alone: bool) -> str:
    """One call that does not complete it: nothing here is a QEMU. The reason."""
    try:
        qemu_replace.recover(plan, alone=alone)
    except OSError as error:
        return str(error)
    raise AssertionError("it cannot be complete")


@pytest.mark.parametrize("alone", [True, False])
def test_a_process_that_was_given_the_guest_is_never_killed(
    other: Other, monkeypatch: pytest.MonkeyPatch, alone: bool
) -> None:
    """The other one claims the file again and starts a process between our reading of the claims and our look for processes; it is
    given the guest before ours kills what it has found."""
    monkeypatch.setattr(qemu_replace, "_age_s", lambda _: 1e9)
    monkeypatch.setattr(qemu_replace, "_START_S", 0.1)
    given: list[bool] = []

    def started(_: ReplacePlan) -> list[Process]:
        if other.qemu is None:
            other.begin()
        return [other.process] if other.process.state != "Z" else []

    def kill(pid: int, start_ticks: int, until: float) -> None:
        if other.qemu is not None and not given:
            given.append(other.claim())
        process_control.kill_and_wait(pid, start_ticks, until)

    monkeypatch.setattr(qemu_replace, "started", started)
    monkeypatch.setattr(qemu_replace, "kill_and_wait", kill)
    ended_without(other.plan, alone=alone)
    if not given:
        given.append(other.claim())
    assert (other.process.state != "Z") == given[0]


def test_one_that_is_being_loaded_by_another_process_is_given_its_time(other: Other) -> None:
    other.begin()
    assert "another process" in ended_without(other.plan, alone=False)
    assert other.process.state not in "ZX"
    assert claims.current(other.plan.claims)[0] == other.number, "nothing was decided against it"


def test_one_whose_starter_is_dead_is_not(other: Other) -> None:
    """Then nobody has its lock."""
    other.begin()
    pid, ticks = other.process.pid, other.process.start_ticks
    ended_without(other.plan, alone=True)
    assert not alive(pid, ticks)
    assert claims.failures(other.plan.claims)


def test_one_that_takes_too_long_is_not(other: Other, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qemu_replace, "_START_S", 0.0)
    other.begin()
    pid, ticks = other.process.pid, other.process.start_ticks
    os.kill(pid, signal.SIGSTOP)
    ended_without(other.plan, alone=False)
    assert not alive(pid, ticks)


def test_each_round_of_the_command_lines_has_longer_than_the_one_that_failed(other: Other) -> None:
    """A host too busy for one length would be too busy for it for ever, with tries of several guests that end each other's."""
    plan = replace(other.plan, argv=other.plan.argv * 2)
    lines = len(plan.argv)
    found = []
    for _ in range(6 * lines):
        found.append(qemu_replace._patience_s(plan))
        claims.note_failure(plan.claims, "it does not answer")
    assert found[::lines] == [3.0, 6.0, 12.0, 24.0, 48.0, 48.0]
    assert found[: 2 * lines] == [3.0] * lines + [6.0] * lines, (
        "the old QEMU is next to one that hangs: it waits no longer"
    )
