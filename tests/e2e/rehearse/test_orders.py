"""Orders for a rehearsal that runs: by the command, and by HTTP."""

from __future__ import annotations

import json
import signal
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from caesura_testing.fleet import until
from caesura_testing.rehearsing import Rehearsed, ask, caesura

pytestmark = pytest.mark.e2e


@pytest.fixture
def control(tmp_path: Path) -> Path:
    return tmp_path / "control.json"


@pytest.fixture
def run(tmp_path: Path, control: Path) -> Iterator[Rehearsed]:
    """A rehearsal that waits for orders, whose program approves nothing."""
    started = Rehearsed(tmp_path / "program", ("--control", str(control)), "ignore")
    until(lambda: "orders    caesura rehearse freeze" in started.said, 60, lambda: started.said)
    yield started
    if started.process.poll() is None:
        started.process.send_signal(signal.SIGINT)
        started.finish()


def test_by_the_command(run: Rehearsed, control: Path) -> None:
    assert stat.S_IMODE(control.stat().st_mode) == 0o600
    ordered = caesura(control, "freeze", "--for", "0.3s", "--notice", "600s", "--json")
    assert ordered.returncode == 0, ordered.stderr
    event = json.loads(ordered.stdout)
    run.until("seen", lambda text: "Scheduled" in text)
    assert caesura(control, "approve").returncode == 0
    run.until("seen", lambda text: text.endswith('["Started"], []]'))
    done = json.loads(caesura(control, "state", "--json").stdout)
    assert [each["event_id"] for each in done["events"]] == [event["event_id"]]
    assert done["events"][0]["gaps"][0]["seconds"] >= 0.3

    assert caesura(control, "reboot", "--notice", "600s").returncode == 0
    cancelled = caesura(control, "cancel")
    assert "Reboot of app-1: cancelled" in cancelled.stdout
    nothing = caesura(control, "cancel")
    assert (nothing.returncode, nothing.stderr) == (3, "caesura: no event is scheduled\n")

    gone = caesura(control, "terminate", "--notice", "0s", "--wait")
    assert "Terminate of app-1: completed" in gone.stdout, gone.stderr
    assert run.finish() == 0, "the end of the program ends the rehearsal"
    assert run.read("terminated") == "yes"
    assert not control.exists()
    late = caesura(control, "freeze")
    assert late.returncode == 3
    assert "not the control file of a rehearsal that runs" in late.stderr


def test_by_http(run: Rehearsed, control: Path) -> None:
    assert ask(control, "GET", "/v1/state", token="wrong")[0] == 401  # noqa: S106 - it is
    assert ask(control, "GET", "/openapi.json", token="")[1]["openapi"] == "3.1.0"
    status, problem = ask(control, "POST", "/v1/events", {"event": "Pause"})
    assert (status, "order is not valid" in problem["error"]) == (400, True)
    assert ask(control, "POST", "/v1/events", {"notice_s": "soon"})[0] == 400
    assert ask(control, "POST", "/v1/events", {"vms": ["app-7"]}) == (
        400,
        {"error": "there is no VM app-7 here, did you mean app-1?"},
    )
    assert ask(control, "POST", "/v1/events", b"{not json")[0] == 400
    assert ask(control, "POST", "/v1/events", ["a list"])[0] == 400
    assert ask(control, "DELETE", "/v1/state")[0] == 405
    assert ask(control, "GET", "/v1/nothing")[0] == 404
    assert ask(control, "POST", "/v1/events/no-such-event/approve", {})[0] == 404

    status, event = ask(
        control, "POST", "/v1/events", {"event": "Freeze", "notice_s": 600, "duration_s": "0.2s"}
    )
    assert status == 201
    path = f"/v1/events/{event['event_id']}"
    assert ask(control, "POST", f"{path}/wait", {"step": "seen"})[0] == 200
    status, problem = ask(control, "POST", f"{path}/wait", {"step": "approved", "timeout": 0.1})
    assert (status, "was not approved" in problem["error"]) == (409, True)
    assert ask(control, "POST", f"{path}/approve")[1]["approved_by"] == "rehearse"
    assert ask(control, "POST", f"{path}/wait", {"step": "ended"})[1]["outcome"] == "completed"
    assert ask(control, "POST", f"{path}/cancel")[0] == 404, "it is over"
    run.process.send_signal(signal.SIGINT)
    assert run.finish() == 0, "what was ordered came about"
