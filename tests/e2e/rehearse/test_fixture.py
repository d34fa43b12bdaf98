"""The fixture ``caesura``, used as an application's tests use it."""

from __future__ import annotations

import http.client
import json
import os
import select
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from caesura.runtime.processes import is_frozen
from caesura_rehearse import Rehearsal, RehearsalAssertion, RehearsalError
from caesura_testing.fleet import until
from caesura_testing.patience import patient
from caesura_testing.rehearsing import CLIENT

pytestmark = pytest.mark.e2e


@pytest.fixture
def client(tmp_path: Path) -> list[str]:
    """The program; add a word of ``CLIENT`` and its folder."""
    (tmp_path / "client.py").write_text(CLIENT, encoding="utf-8")
    return [sys.executable, str(tmp_path / "client.py")]


def test_a_program_that_drains(caesura: Rehearsal, client: list[str], tmp_path: Path) -> None:
    program = caesura.run([*client, "approve", tmp_path])
    event = caesura.freeze(notice="60s", duration="1s")
    caesura.wait_started()
    assert set(caesura.approvals) == {event.event_id}
    caesura.wait_paused()
    assert is_frozen(int((tmp_path / "pid").read_text()))
    caesura.wait_resumed()
    caesura.expect("approved", "drained-within 50s", "survived")
    assert event.gap >= 1.0
    assert event.approved_by == "app-1"
    assert program.exit_code is None
    shown = [[each["EventStatus"] for each in document["events"]] for document in caesura.documents]
    assert ["Scheduled"] in shown


def test_a_program_that_does_not_react(caesura: Rehearsal, client: list[str], tmp_path: Path) -> None:
    caesura.run([*client, "ignore", tmp_path])
    event = caesura.freeze(notice="60s", duration="0.1s")
    event.wait_seen()
    with pytest.raises(RehearsalAssertion, match=r"was not approved .* after its announcement: it was seen"):
        event.wait_approved(timeout=0.3)
    event.approve()
    event.wait_ended()
    with pytest.raises(RehearsalAssertion, match="approved: the Freeze was seen"):
        caesura.expect("approved")


def test_cancelled_rebooted_and_ended(caesura: Rehearsal, client: list[str], tmp_path: Path) -> None:
    program = caesura.run([*client, "ignore", tmp_path], env={"OWN": "1"})
    until((tmp_path / "pid").exists, 60, lambda: "the program to be ready for SIGTERM")
    caesura.freeze(notice="60s").cancel()
    assert caesura.events[-1].record["outcome"] == "cancelled"
    caesura.reboot(notice=0, checks_s=0).wait_ended()
    assert (tmp_path / "terminated").read_text() == "yes"
    assert program.starts == 2
    caesura.terminate(notice="0s", checks_s=0).wait_ended()
    program.wait()


def test_output_and_exit(caesura: Rehearsal, tmp_path: Path) -> None:
    program = caesura.run(
        ["sh", "-c", "echo $PWD $OWN $CAESURA_VM; echo up >&2; exit 3"], cwd=tmp_path, env={"OWN": "mine"}
    )
    program.wait_for_output("up")
    assert program.wait() == 3
    assert program.output.splitlines()[0] == f"{tmp_path} mine app-1"
    with pytest.raises(RehearsalAssertion, match="ended and has not written 'down'"):
        program.wait_for_output("down")
    with pytest.raises(RehearsalAssertion, match=r"sh ended \(exit code 3\) before it could be paused"):
        caesura.freeze(notice="0.1s", duration="0.1s").wait_ended()


def test_the_program_has_the_signals_of_a_shell(caesura: Rehearsal) -> None:
    """Python ignores SIGPIPE, and what it executes would, too: `yes | head` would not end."""
    program = caesura.run(["grep", "SigIgn", "/proc/self/status"])
    program.wait()
    ignored = int(program.output.split()[1], 16)
    assert not ignored & 1 << (signal.SIGPIPE - 1)


def test_without_a_program_the_documents_are_served_all_the_same(caesura: Rehearsal) -> None:
    """For code that is tested in the test's own process."""
    event = caesura.freeze(notice=0, duration="1s", checks_s=0)
    event.wait_ended()
    assert event.gap == 0


@pytest.mark.parametrize(
    ("argv", "says"),
    [(["no-such-program"], "is not on the PATH"), (["/etc/passwd"], "is not executable"), ([], "argv")],
)
def test_what_cannot_be_started(caesura: Rehearsal, argv: list[str], says: str) -> None:
    with pytest.raises(RehearsalError, match=says):
        caesura.run(argv)


def test_bad_orders(caesura: Rehearsal) -> None:
    with pytest.raises(RehearsalError, match="'soon' is not a duration"):
        caesura.freeze(notice="soon")
    with pytest.raises(RehearsalError, match="order is not valid"):
        caesura.freeze(duration="40s")
    with pytest.raises(RehearsalError, match="nothing was ordered yet"):
        caesura.wait_started()


def _get(url: str) -> tuple[int, dict[str, Any]]:
    """Status and document; 0: the connection was dropped."""
    request = urllib.request.Request(  # noqa: S310 - our own
        f"{url}/metadata/scheduledevents?api-version=2020-07-01", headers={"Metadata": "true"}
    )
    try:
        with urllib.request.urlopen(request, timeout=patient(20)) as answer:  # noqa: S310 - the same
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.loads(error.read())
    except (OSError, http.client.HTTPException):
        return 0, {}


def test_faults(caesura: Rehearsal) -> None:
    assert _get(caesura.url) == (200, {"DocumentIncarnation": 1, "Events": []})
    event = caesura.freeze(notice="600s", duration=0)
    assert [each["EventId"] for each in _get(caesura.url)[1]["Events"]] == [event.event_id]
    for fault in ("500 x1", "429 x1", "410 x1", "drop x1", "stale x1", "empty x1", "slow 0.2s x1"):
        caesura.fault(fault)
    met = [_get(caesura.url) for _ in range(7)]
    assert [status for status, _ in met] == [500, 429, 410, 0, 200, 200, 200]
    assert met[0][1]["error"].startswith("Service Error.")
    assert met[4][1] == {"DocumentIncarnation": 1, "Events": []}, "stale"
    assert met[5][1] == {"DocumentIncarnation": 2, "Events": []}, "empty"
    assert len(met[6][1]["Events"]) == 1
    caesura.fault("500")
    assert {_get(caesura.url)[0] for _ in range(3)} == {500}
    caesura.no_faults()
    assert _get(caesura.url)[0] == 200
    with pytest.raises(RehearsalError, match="is not a fault"):
        caesura.fault("teapot")


_TESTS = """
import os, pathlib, pytest, sys

APP = pathlib.Path(__file__).with_name("client.py")

@pytest.mark.parametrize("n", range(2))
def test_green(caesura, tmp_path, n):
    caesura.run([sys.executable, APP, "approve", tmp_path])
    caesura.freeze(notice="60s", duration="0.2s")
    caesura.expect("approved", "survived")

def test_red(caesura, tmp_path):
    caesura.run([sys.executable, APP, "ignore", tmp_path])
    caesura.freeze(notice="0.5s", duration="0.2s")
    caesura.expect("approved")

def test_dies(caesura, tmp_path):
    caesura.run([sys.executable, APP, "approve", tmp_path])
    caesura.freeze(notice="60s", duration="20s").wait_paused()
    pathlib.Path(os.environ["PIDS"]).write_text((tmp_path / "pid").read_text())
    os.kill(os.getpid(), 9)
"""


def _pytest(folder: Path, *words: str, pids: Path | None = None) -> subprocess.CompletedProcess[str]:
    (folder / "client.py").write_text(CLIENT, encoding="utf-8")
    (folder / "test_app.py").write_text(_TESTS, encoding="utf-8")
    environ = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    return subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            *words,
        ],
        cwd=folder,
        env={**environ, "PIDS": str(pids or "")},
        capture_output=True,
        text=True,
        timeout=patient(90),
        check=False,
    )


def test_red_and_green_in_parallel(tmp_path: Path) -> None:
    done = _pytest(tmp_path, "-n", "2", "-k", "green or red")
    assert "1 failed, 2 passed" in done.stdout, done.stdout + done.stderr
    assert "RehearsalAssertion: approved: the Freeze was seen" in done.stdout
    assert "caesura rehearse" in done.stdout, "the report of what the program saw"
    assert "stopped for 0.2" in done.stdout


def test_when_the_test_run_is_killed_in_a_pause_nothing_is_left(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    done = _pytest(tmp_path, "-k", "dies", pids=pids)
    assert done.returncode == -9
    pid = int(pids.read_text())
    handle = os.pidfd_open(pid) if Path(f"/proc/{pid}").exists() else None
    if handle is not None:
        poll = select.poll()
        poll.register(handle, select.POLLIN)
        assert poll.poll(patient(20) * 1000), "the program outlives the test run"
        os.close(handle)


def test_importing_the_plug_in_costs_nothing() -> None:
    script = (
        "import sys, pytest; before = set(sys.modules); import caesura_rehearse.pytest_plugin; "
        "print(sorted(each for each in set(sys.modules) - before))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['caesura_rehearse', 'caesura_rehearse.pytest_plugin']"
