"""What a rehearsal says of a VMM that does not start."""

from __future__ import annotations

from pathlib import Path

import pytest

from caesura_pause_guard import arrival
from caesura_vmcontrol.kernel_change import Arrival, HostClock, VmArrival


def rehearsed(monkeypatch: pytest.MonkeyPatch, *programs: str) -> VmArrival:
    """With these programs in the place of QEMU."""
    monkeypatch.setattr(arrival, "_QEMU", programs)
    there = Arrival("boot-2", "6.1", "unit", HostClock("tsc", 0.0, 0.001), 5.0)
    arrival.rehearse(there, lambda *_, **__: None)
    return there.vms[arrival.REHEARSAL]


def program(folder: Path, text: str) -> str:
    """An executable."""
    path = folder / "qemu"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def test_no_qemu(monkeypatch: pytest.MonkeyPatch) -> None:
    found = rehearsed(monkeypatch, "/nonexistent/qemu")
    assert (found.end, found.running_at) == ("lost", None)
    assert "/nonexistent/qemu" in found.why


def test_its_own_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = rehearsed(monkeypatch, program(tmp_path, "echo no such machine >&2; exit 1"))
    assert (found.end, found.running_at) == ("lost", None)
    assert "no such machine" in found.why


def test_one_that_hangs_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arrival, "_REHEARSAL_S", 0.2)
    found = rehearsed(monkeypatch, program(tmp_path, "exec sleep 1000"))
    assert found.end == "lost"


def test_the_instant_is_that_of_its_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not waited for: what it does after that is no part of a pause."""
    text = """read line; echo '{"QMP": {}}'; echo '{"return": {}}'; exec sleep 1000"""
    found = rehearsed(monkeypatch, program(tmp_path, text))
    assert found.end == "running"
    assert found.running_at is not None
