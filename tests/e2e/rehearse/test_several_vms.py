"""Several VMs of a set, each with the program: by the command, by orders, and by the fixture."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import sys
import urllib.request
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest

from caesura.runtime.processes import is_frozen, kill_marked
from caesura_rehearse import Rehearsal, RehearsalAssertion, RehearsalError
from caesura_testing.fleet import until
from caesura_testing.rehearsing import CLIENT, Rehearsed, ask, caesura

pytestmark = pytest.mark.e2e


def _server(folder: Path) -> tuple[str, ...]:
    """A program that says on its port who it is."""
    (folder / "server.py").write_text(
        """
import http.server, json, os, sys

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        names = ("CAESURA_VM", "CAESURA_SET", "CAESURA_PORT", "CAESURA_UPDATE_DOMAIN", "CAESURA_METADATA_URL")
        body = json.dumps([sys.argv[2:], [os.environ[name] for name in names]]).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass

http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""
    )
    return (sys.executable, str(folder / "server.py"), "{port}", "{vm}", "{set}", "{n}")


def _get(url: str) -> Any:
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:  # noqa: S310 - our own
            return json.loads(answer.read())
    except OSError:
        return None


def _free_ports(count: int) -> int:
    """The first of so many ports that are free one after the other."""
    for first in range(20000, 60000, 100):
        probes = [socket.socket() for _ in range(count)]
        try:
            for offset, probe in enumerate(probes):
                probe.bind(("127.0.0.1", first + offset))
        except OSError:
            continue
        finally:
            for probe in probes:
                probe.close()
        return first
    raise AssertionError("no ports are free")


def test_three_copies_of_a_server(tmp_path: Path) -> None:
    first = _free_ports(3)
    run = Rehearsed(
        tmp_path,
        ("--vms", "3", "--set", "web", "--port", str(first), "--terminate", "--notice", "600s"),
        _server(tmp_path),
    )
    addresses = set()
    for number in (1, 2, 3):
        url = f"http://127.0.0.1:{first + number - 1}/"
        until(lambda url=url: _get(url) is not None, 60, lambda: run.said)  # type: ignore[misc]
        words, (vm, set_name, port, domain, metadata) = _get(url)
        assert words == [f"web-{number}", "web", str(number)]
        assert (vm, set_name, port, domain) == (
            f"web-{number}",
            "web",
            str(first + number - 1),
            str(number - 1),
        )
        addresses.add(metadata)
        assert f"metadata  web-{number}: {metadata}/" in run.said
    assert len(addresses) == 3, "each has its own metadata API"
    run.process.send_signal(signal.SIGINT)
    assert run.finish() == 130


def test_expectations_are_held_for_each_vm(tmp_path: Path) -> None:
    """web-2 never asks; the others approve."""
    (tmp_path / "app.sh").write_text(
        f'test "$CAESURA_VM" = web-2 && exec sleep 1000\nexec {sys.executable} {tmp_path}/client.py approve {tmp_path}/$CAESURA_VM\n'
    )
    junit = tmp_path / "junit.xml"
    options = [
        "--vms",
        "3",
        "--set",
        "web",
        "--freeze",
        "0.2s",
        "--notice",
        "1s",
        "--settle",
        "0s",
        "--junit",
        str(junit),
    ]
    options += ["--expect", "seen", "--expect", "web-1: approved"]
    run = Rehearsed(tmp_path, options, ("sh", str(tmp_path / "app.sh")))
    assert run.finish() == 1, run.said
    lines = [line for line in run.said.splitlines() if line.startswith(("held", "FAILED"))]
    assert [line.split(": ")[0].split() for line in lines[-4:]] == [
        ["held", "web-1"], ["FAILED", "web-2"], ["held", "web-3"], ["held", "web-1"],
    ]  # fmt: skip
    suite = ET.parse(junit).getroot()[0]  # noqa: S314 - our own
    cases = [(each.get("classname"), each.get("name")) for each in suite.iter("testcase")]
    assert ("caesura.rehearse.web-2", "seen") in cases


def test_a_set_halts_when_a_program_of_it_has_ended(tmp_path: Path) -> None:
    (tmp_path / "app.sh").write_text(
        f'test "$CAESURA_VM" = app-2 && exit 3\nexec {sys.executable} {tmp_path}/client.py approve {tmp_path}/$CAESURA_VM\n'
    )
    run = Rehearsed(
        tmp_path,
        ("--vms", "3", "--freeze", "0.2s", "--notice", "1s", "--settle", "0s", "--json"),
        ("sh", str(tmp_path / "app.sh")),
    )
    assert run.finish() == 1, run.said
    report = run.report()
    assert [each["outcome"] for each in report["events"]] == ["completed", "failed"]
    (rollout,) = report["rollouts"]
    assert (rollout["outcome"], rollout["waves_begun"]) == ("failed", 2)
    assert "Freeze of app-3" in [each["what"] for each in report["verdicts"] if not each["held"]]


TWO_SETS = """
title = "a long pause of two sets"
[[set]]
name = "web"
vms = 2
update_domains = 1
[[set]]
name = "db"
[[step]]
event = "Freeze"
notice = "600s"
duration = "20s"
"""


@pytest.fixture
def paused(tmp_path: Path) -> Iterator[tuple[Rehearsed, list[int]]]:
    """Three VMs of two sets, all paused in one wave, and the processes of their programs."""
    (tmp_path / "own.toml").write_text(TWO_SETS)
    options = ("--scenario", str(tmp_path / "own.toml"), "--freezer", "sigstop")
    run = Rehearsed(tmp_path, options, "approve", place="{vm}")
    pids = [int(run.until(f"{vm}/pid")) for vm in ("web-1", "web-2", "db-1")]
    until(lambda: all(is_frozen(pid) for pid in pids), 60, lambda: run.said)
    yield run, pids
    asyncio.run(kill_marked(run.mark))
    run.process.communicate()


def test_killed_in_the_pause_of_a_wave_all_of_it_runs_again(paused: tuple[Rehearsed, list[int]]) -> None:
    """I2: one guard holds the way out of both sets."""
    run, pids = paused
    run.process.kill()
    run.process.wait()
    until(lambda: not any(is_frozen(pid) for pid in pids), 10, lambda: "the guard has not resumed them")
    assert all(Path(f"/proc/{pid}").exists() for pid in pids)


def test_interrupted_in_the_pause_of_a_wave_all_of_it_is_ended(paused: tuple[Rehearsed, list[int]]) -> None:
    run, pids = paused
    run.process.send_signal(signal.SIGINT)
    assert run.finish() == 130
    assert [run.read(f"{vm}/terminated") for vm in ("web-1", "web-2", "db-1")] == ["yes"] * 3
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


@pytest.fixture
def control(tmp_path: Path) -> Path:
    return tmp_path / "control.json"


@pytest.fixture
def run(tmp_path: Path, control: Path) -> Iterator[Rehearsed]:
    """Three VMs that wait for orders; their programs approve."""
    started = Rehearsed(tmp_path, ("--control", str(control), "--vms", "3"), "approve", place="{vm}")
    until(lambda: "orders    caesura rehearse freeze" in started.said, 60, lambda: started.said)
    yield started
    if started.process.poll() is None:
        started.process.send_signal(signal.SIGINT)
        started.finish()


def test_orders_for_a_vm_and_for_a_set(run: Rehearsed, control: Path) -> None:
    one = caesura(control, "freeze", "--vm", "app-2", "--for", "0.2s", "--notice", "600s", "--wait", "--json")
    assert [gap["vm"] for gap in json.loads(one.stdout)["gaps"]] == ["app-2"], one.stderr
    all_of_it = caesura(control, "freeze", "--set", "app", "--for", "0.2s", "--notice", "600s", "--wait")
    assert "Freeze of app-1; app-2; app-3: completed" in all_of_it.stdout, all_of_it.stderr
    gaps = [
        (gap["vm"], gap["began"], gap["began"] + gap["seconds"])
        for event in json.loads(caesura(control, "state", "--json").stdout)["events"][1:]
        for gap in event["gaps"]
    ]
    assert [vm for vm, _, _ in gaps] == ["app-1", "app-2", "app-3"]
    assert all(end <= begin for (_, _, end), (_, begin, _) in pairwise(gaps))
    two = caesura(control, "freeze", "--vm", "app-1", "--vm", "app-2")
    assert two.returncode == 3
    assert "app-1 and app-2 are in two update domains of app" in two.stderr
    both = caesura(control, "freeze", "--vm", "app-1", "--set", "app")
    assert (both.returncode, "exclude each other" in both.stderr) == (2, True)
    assert "there is no set appp here, did you mean app" in caesura(control, "freeze", "--set", "appp").stderr


def test_rollouts_by_http(run: Rehearsed, control: Path) -> None:
    order = {
        "event": "Freeze",
        "notice_s": 600,
        "duration_s": "0.1s",
        "approval_starts": False,
        "sets": ["app"],
    }
    assert ask(control, "POST", "/v1/events", order)[0] == 400, "one event is not for a set"
    status, rollout = ask(control, "POST", "/v1/rollouts", order)
    assert (status, rollout["waves"]) == (201, [["app-1"], ["app-2"], ["app-3"]])
    path = f"/v1/rollouts/{rollout['rollout_id']}"
    status, problem = ask(control, "POST", f"{path}/wait", {"timeout": 0.1})
    assert (status, "1 of 3 update domains were begun" in problem["error"]) == (409, True)
    assert ask(control, "POST", f"{path}/cancel")[1]["outcome"] == "cancelled"
    assert ask(control, "POST", f"{path}/cancel")[0] == 404
    assert ask(control, "POST", "/v1/rollouts/none/wait", {})[0] == 404


@pytest.fixture
def client(tmp_path: Path) -> list[str]:
    (tmp_path / "client.py").write_text(CLIENT, encoding="utf-8")
    return [sys.executable, str(tmp_path / "client.py")]


def test_the_fixture_with_three_vms(caesura: Rehearsal, client: list[str], tmp_path: Path) -> None:
    programs = caesura.run([*client, "approve", f"{tmp_path}/{{vm}}"], vms=3)
    assert [each.vm for each in programs] == ["app-1", "app-2", "app-3"]
    assert len({each.port for each in programs} | {each.url for each in programs}) == 6
    rollout = caesura.rollout(notice="60s", duration="0.2s").wait_ended()
    assert rollout.waves == [["app-1"], ["app-2"], ["app-3"]]
    assert [each.gap >= 0.2 for each in rollout.events] == [True] * 3
    caesura.freeze(notice="60s", duration="0.1s", vms=["app-3"]).wait_ended()
    caesura.expect("seen", "approved", "app-2: survived")
    programs[1].stop()
    assert (programs[0].exit_code, programs[1].exit_code) == (None, 0)
    with pytest.raises(RehearsalAssertion, match="app-2: survived"):
        caesura.expect("survived")


def test_one_program_after_three(caesura: Rehearsal, client: list[str], tmp_path: Path) -> None:
    three = caesura.run([*client, "approve", f"{tmp_path}/{{vm}}"], vms=3)
    one = caesura.run([*client, "approve", tmp_path / "one"])
    assert not any(Path(f"/proc/{each.pid}").exists() for each in three)
    caesura.freeze(notice="60s", duration="0.1s").wait_ended()
    assert one.exit_code is None
    with pytest.raises(RehearsalError, match=r"unknown placeholder \{prot\}, did you mean port"):
        caesura.run(["echo", "{prot}"], vms=2)
    with pytest.raises(RehearsalError, match="<= 50"):
        caesura.run(["true"], vms=51)


def test_a_scenario_in_a_test(caesura: Rehearsal, client: list[str], tmp_path: Path) -> None:
    caesura.run([*client, "approve", tmp_path / "app"])
    caesura.play("network-blip", speed=600)
    caesura.expect("seen", "approved", "survived")
    with pytest.raises(RehearsalError, match="did you mean network-blip"):
        caesura.play("network-blib")
    own = tmp_path / "own.toml"
    own.write_text(
        'title = "t"\nexpect = ["approved"]\n[[step]]\nevent = "Freeze"\nnotice = "1s"\nduration = "0s"\n'
    )
    caesura.fault("500")
    with pytest.raises(RehearsalAssertion, match="approved: the Freeze was not approved: no client asked"):
        caesura.play(own)
    caesura.no_faults()
    own.write_text(
        'title = "t"\n[[step]]\nevent = "Freeze"\nnotice = "1s"\nduration = "0s"\nvms = ["app-9"]\n'
    )
    with pytest.raises(RehearsalError, match=r"own\.toml:2: there is no VM app-9"):
        caesura.play(own)
