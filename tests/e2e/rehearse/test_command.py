"""``caesura rehearse`` as people run it: a real program, really paused, and nothing left behind."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from caesura.runtime.processes import is_frozen, kill_marked
from caesura_testing.fleet import until
from caesura_testing.patience import patient
from caesura_testing.rehearsing import Rehearsed

pytestmark = pytest.mark.e2e


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "program"


@pytest.mark.parametrize("freezer", ["auto", "sigstop"])
def test_a_freeze_by_approval(folder: Path, freezer: str) -> None:
    junit = folder / "junit.xml"
    run = Rehearsed(
        folder,
        (
            *(
                "--freeze",
                "1s",
                "--notice",
                "60s",
                "--freezer",
                freezer,
                "--settle",
                "4s",
                "--json",
                "--junit",
                str(junit),
            ),
            *("--expect", "approved", "--expect", "drained-within", "50s", "--expect", "survived"),
        ),
        "approve",
    )
    run.until(
        "seen",
        lambda text: text == '[[], ["Scheduled"], ["Started"], []]' or text.endswith('["Started"], []]'),
    )
    assert run.finish() == 0, run.said
    report = run.report()
    (event,) = report["events"]
    (gap,) = event["gaps"]
    assert 1.0 <= gap["seconds"] < patient(5)
    assert gap["cpu_s"] < 0.005
    assert event["approved_by"] == "app-1"
    assert event["started"] < 60, "the approval ended the notice"
    assert event["seen_started"] is not None
    shown = [[seen["EventStatus"] for seen in each["events"]] for each in report["deliveries"]]
    assert shown[-3:] == [["Scheduled"], ["Started"], []]
    assert ET.parse(junit).getroot()[0].get("failures") == "0"  # noqa: S314 - our own
    assert run.read("terminated") == "yes", "it was asked to end before it was killed"


def test_a_handler_that_does_not_react_is_found(folder: Path) -> None:
    run = Rehearsed(
        folder, ("--freeze", "0.5s", "--notice", "1s", "--expect", "approved", "--settle", "0s"), "ignore"
    )
    assert run.finish() == 1
    assert "FAILED      approved: the Freeze was seen" in run.said
    assert "held        Freeze of app-1" in run.said


def test_a_reboot_ends_it_in_order_and_starts_it_again(folder: Path) -> None:
    run = Rehearsed(
        folder, ("--reboot", "--notice", "60s", "--expect", "survived", "--settle", "60s"), "approve"
    )
    run.until("runs", lambda text: text == "2")
    assert run.read("terminated") == "yes"
    run.until("seen", lambda text: text.endswith("[]]"))
    run.process.send_signal(signal.SIGINT)
    assert run.finish() == 130


def test_a_terminate_is_drained_by_leaving(folder: Path) -> None:
    run = Rehearsed(
        folder, ("--terminate", "--notice", "2s", "--expect", "drained-within 60s", "--settle", "0s"), "leave"
    )
    assert run.finish() == 0, run.said
    assert "held        drained-within 60s" in run.said


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_in_the_pause_resumes_and_ends_everything(folder: Path, number: signal.Signals) -> None:
    run = Rehearsed(folder, ("--freeze", "20s", "--notice", "60s"), "approve")
    pid = int(run.until("pid"))
    until(lambda: is_frozen(pid), 60, lambda: run.said)
    run.process.send_signal(number)
    assert run.finish() == 128 + number
    assert run.read("terminated") == "yes"
    assert not Path(f"/proc/{pid}").exists()


@pytest.fixture
def killed(folder: Path) -> Iterator[Rehearsed]:
    run = Rehearsed(folder, ("--freeze", "20s", "--notice", "60s", "--freezer", "sigstop"), "approve")
    yield run
    asyncio.run(kill_marked(run.mark))
    run.process.communicate()


def test_killed_in_the_pause_the_program_runs_again(killed: Rehearsed) -> None:
    """The guard knows at once that its owner is gone; the deadline is the latest."""
    pid = int(killed.until("pid"))
    until(lambda: is_frozen(pid), 60, lambda: killed.said)
    before = killed.read("beats")
    killed.process.kill()
    killed.process.wait()  # not for the end of its output: the program has it, too
    until(lambda: not is_frozen(pid), 10, lambda: "the guard has not resumed it")
    assert Path(f"/proc/{pid}").exists()
    os.kill(pid, signal.SIGTERM)  # its handler runs only if it does
    until(
        lambda: killed.read("terminated") == "yes", 30, lambda: f"{before} and {killed.read('beats')} beats"
    )


def test_a_process_that_runs_already(folder: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as other:
        try:
            run = Rehearsed(
                folder,
                ("--freeze", "0.5s", "--notice", "0.2s", "--pid", str(other.pid), "--settle", "0s", "--json"),
            )
            assert run.finish() == 0, run.said
            (gap,) = run.report()["events"][0]["gaps"]
            assert gap["seconds"] >= 0.5
            assert gap["cpu_s"] < 0.005, "it wants nothing but CPU, and got none"
            assert other.poll() is None, "it was not ours to end"
            assert not is_frozen(other.pid)
        finally:
            other.kill()


def test_a_process_that_ran_already_and_ended_by_itself_did_not_survive(folder: Path) -> None:
    with subprocess.Popen(["sleep", "600"]) as other:
        options = ("--terminate", "--notice", "2s", "--settle", "0s", "--expect", "survived")
        run = Rehearsed(folder, (*options, "--pid", str(other.pid)))
        until(lambda: "announced" in run.said, 60, lambda: run.said)
        other.kill()
    assert run.finish() == 1, run.said
    assert f"FAILED      survived: process {other.pid} of app-1 ended by itself" in run.said


@pytest.mark.parametrize(
    ("program", "code", "says"),
    [
        (("sh", "-c", "exit 3"), 1, "sh ended (exit code 3) before it could be paused"),
        (
            (
                "sh",
                "-c",
                "setsid sh -c 'touch up; exec sleep 1000' & until test -e up; do sleep 0.1; done; rm up",
            ),
            1,
            "left its process group and was ended with it",
        ),
    ],
)
def test_programs_that_do_not_stay(folder: Path, program: tuple[str, ...], code: int, says: str) -> None:
    run = Rehearsed(folder, ("--freeze", "1s", "--notice", "30s"), program)
    assert run.finish() == code
    assert says in run.said


_ANY_CLIENT = """
import time, urllib.request
url = "http://169.254.169.254/metadata/instance/compute/name?api-version=2021-02-01&format=text"
with urllib.request.urlopen(urllib.request.Request(url, headers={"Metadata": "true"}), timeout=10) as answer:
    print(answer.read().decode())
"""


def _namespaces_work() -> bool:
    return (
        subprocess.run(
            ["unshare", "-n" if os.geteuid() == 0 else "-Urn", "true"], check=False, capture_output=True
        ).returncode
        == 0
    )


def test_any_client_in_a_network_of_its_own(folder: Path) -> None:
    if not _namespaces_work():
        pytest.skip("this user may not make a network namespace")
    run = Rehearsed(folder, ("--netns",), (sys.executable, "-I", "-c", _ANY_CLIENT))
    assert run.finish() == 0, run.said
    assert run.out == "app-1\n"


_OUT = """
import socket, sys
with open("/proc/net/route") as file:
    gateway = next(line.split()[2] for line in file if line.split()[1] == "00000000")
address = socket.inet_ntoa(bytes.fromhex(gateway)[::-1])
with socket.create_connection((address, int(sys.argv[1])), 30) as outside:
    print(outside.recv(100).decode())
"""


def test_connections_lead_out_of_a_network_of_its_own(folder: Path) -> None:
    """To this machine's own loopback, at the address of the default route inside: no test needs the internet."""
    if not _namespaces_work() or not os.access("/dev/net/tun", os.R_OK | os.W_OK):
        pytest.skip("this user may not make a network namespace, or a device in it")
    if shutil.which("slirp4netns") is None:
        pytest.skip("slirp4netns is not installed")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]

        def answer() -> None:
            connection, _ = server.accept()
            with connection:
                connection.sendall(b"from outside")

        thread = threading.Thread(target=answer, daemon=True)
        thread.start()
        run = Rehearsed(folder, ("--netns",), (sys.executable, "-I", "-c", _OUT, str(port)))
        assert run.finish() == 0, run.said
    assert run.out == "from outside\n"
    assert "connections lead out" in run.said


def test_where_nothing_leads_out_it_is_said_and_the_program_runs(folder: Path) -> None:
    if not _namespaces_work():
        pytest.skip("this user may not make a network namespace")
    tool = folder / "bin" / "slirp4netns"
    tool.parent.mkdir(parents=True)
    tool.write_text(
        "#!/bin/sh\necho 'open(\"/dev/net/tun\"): Permission denied' >&2\nexit 1\n", encoding="utf-8"
    )
    tool.chmod(0o755)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", f"{tool.parent}:{os.environ['PATH']}")
        run = Rehearsed(folder, ("--netns",), (sys.executable, "-I", "-c", _ANY_CLIENT))
    assert run.finish() == 0, run.said
    assert run.out == "app-1\n"
    assert 'no other network inside: open("/dev/net/tun"): Permission denied' in run.said


def _ask(url: str, body: bytes | None = None) -> bytes:
    request = urllib.request.Request(url, data=body, headers={"Metadata": "true"})  # noqa: S310 - our own
    with urllib.request.urlopen(request, timeout=10) as answer:  # noqa: S310 - the same
        text: bytes = answer.read()
        return text


def _or_nothing(url: str) -> bytes:
    try:
        return _ask(url)
    except OSError:
        return b""


def test_a_published_port_leads_in_also_after_a_reboot(folder: Path) -> None:
    if not _namespaces_work():
        pytest.skip("this user may not make a network namespace")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    serve = f"echo $$ >{folder}/pid; exec {sys.executable} -P -m http.server {port} --bind 127.0.0.1 --directory {folder}"
    options = ("--netns", "--publish", str(port), "--reboot", "--notice", "600s", "--settle", "600s")
    run = Rehearsed(folder, options, ("sh", "-c", serve))
    inside = f"http://127.0.0.1:{port}/pid"
    until(lambda: _or_nothing(inside) != b"", 60, lambda: run.said)
    first = _ask(inside)
    # The same API from outside: the first line names it.
    outside = re.findall(r"http://127\.0\.0\.1:\d+/metadata\S+", run.said)[0]
    (event,) = json.loads(_ask(outside))["Events"]
    _ask(outside, json.dumps({"StartRequests": [{"EventId": event["EventId"]}]}).encode())
    until(lambda: _or_nothing(inside) not in {b"", first}, 60, lambda: run.said)
    run.process.send_signal(signal.SIGINT)
    assert run.finish() == 130
    assert "Traceback" not in run.said


def test_a_client_that_honours_http_proxy(folder: Path) -> None:
    run = Rehearsed(folder, ("--proxy",), (sys.executable, "-I", "-c", _ANY_CLIENT))
    assert run.finish() == 0, run.said
    assert run.out == "app-1\n"


def test_the_real_address_is_refused_where_something_answers(folder: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        run = Rehearsed(folder, ("--address", address), ("true",))
        assert run.finish() == 2
    assert f"something answers at {address} already" in run.said
