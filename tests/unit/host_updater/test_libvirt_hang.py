"""A daemon of libvirt's that hangs, and whoever asks it from a terminal."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from caesura_host_updater.drivers.libvirt import diagnosis
from caesura_host_updater.drivers.libvirt.connection import LibvirtConnection
from caesura_host_updater.drivers.libvirt.definition import FoundDomain, LibvirtOptions
from caesura_libvirt import command
from caesura_vmcontrol.libvirt_rpc import LibvirtPlan

_UUID = "783136f9-2b12-4ee3-8a40-5eee38a7cccd"


@pytest.fixture
def hang(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A daemon's socket; no question is answered."""
    go = threading.Event()

    def forever(*_: object) -> None:
        go.wait()

    for method in ("version", "domains", "set_label", "close"):
        monkeypatch.setattr(LibvirtConnection, method, forever)
    monkeypatch.setattr(diagnosis, "_ANSWER_S", 0.1)
    monkeypatch.setattr(command, "_ANSWER_S", 0.1)
    socket = tmp_path / "sock"
    socket.touch()
    yield str(socket)
    go.set()


def test_the_doctor_says_so(hang: str) -> None:
    (found,) = diagnosis.diagnose(LibvirtOptions(socket=hang), {}, Path(hang).parent)
    assert (found.level, found.name) == ("wrong", "libvirt.daemon")
    assert "does not answer within" in found.about
    assert "systemctl restart libvirtd" in found.remedy


def test_the_commands_say_so(hang: str, monkeypatch: pytest.MonkeyPatch) -> None:
    listed = CliRunner().invoke(command.libvirt, ["list", "--socket", hang])
    assert listed.exit_code == 1
    assert "does not answer within" in listed.output
    assert "systemctl restart libvirtd" in listed.output
    monkeypatch.setattr(LibvirtConnection, "domains", lambda _: [FoundDomain(name="web-1", uuid=_UUID)])
    label = ["label", "web-1", "--set", "web", "--update-domain", "0", "--socket", hang]
    labelled = CliRunner().invoke(command.libvirt, label)
    assert labelled.exit_code == 1
    assert "does not answer within" in labelled.output


@pytest.mark.parametrize("guard", ["none", "usable", "unusable"])
def test_the_doctor_asks_the_guard_what_it_may_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, guard: str
) -> None:
    """Run as root it sees what a unit without the drop-ins cannot use."""
    socket = tmp_path / "sock"
    socket.touch()
    plan = LibvirtPlan("web-1", str(socket), "qemu:///system", _UUID, 1, 0, 0, ("/run/q/monitor.sock",))
    domain = FoundDomain(name="web-1", uuid=_UUID, number=1)
    monkeypatch.setattr(diagnosis, "_ask", lambda *_: ("9.0.0", [domain]))
    monkeypatch.setattr(diagnosis, "plan_of_domain", lambda *_: plan)
    monkeypatch.setattr(diagnosis, "libvirt_condition", lambda _: "running")
    asked: list[Any] = []

    def ask_guard(state_dir: str, request: Any, _: float) -> Any:
        asked.append((state_dir, request["do"]))
        if guard == "none":
            raise FileNotFoundError
        return {"ok": True, "unusable": {"web-1": list(plan.qmp)} if guard == "unusable" else {}}

    monkeypatch.setattr(diagnosis, "ask_guard", ask_guard)
    found = diagnosis.diagnose(LibvirtOptions(socket=str(socket)), {}, tmp_path)
    (ways,) = [each for each in found if each.name == "libvirt.ways"]
    assert asked == [(str(tmp_path), "inspect")]
    assert ways.level == ("warning" if guard == "unusable" else "ok")
    assert ("may not use /run/q/monitor.sock" in ways.about) is (guard == "unusable")
