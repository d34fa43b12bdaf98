"""``./check``: which lanes run, in what order, and how it ends; with lanes of a few lines instead of the real ones."""

from __future__ import annotations

import io
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from caesura_testing import lanes as module
from caesura_testing.fleet import until
from caesura_testing.patience import patient

_ROOT = Path(__file__).parents[2]


@pytest.fixture
def lanes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """The module, in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    return module


def _table(lanes: Any, monkeypatch: pytest.MonkeyPatch, **scripts: str) -> None:
    monkeypatch.setattr(lanes, "LANES", {name: lanes.Lane(name, script) for name, script in scripts.items()})


def test_what_is_chosen(lanes: Any) -> None:
    everything = lanes.chosen([], fast=False)
    lasting = {"e2e", "hosts", "journeys", "clusters", "integration", "compose", "wheel", "asyncapi", "kexec"}
    assert lasting < set(everything)
    assert not {"soak", "mutation", "kexec-all", "nats"} & set(everything), (
        "they take hours, or an idle machine"
    )
    assert lanes.chosen(["soak", "types", "types"], fast=False) == ["types", "soak"]
    fast = lanes.chosen([], fast=True)
    assert set(fast) == {"format", "lint", "types", "layers", "generated", "docs", "unit"}
    assert set(lanes.chosen(["asyncapi"], fast=True)) == {*fast, "asyncapi"}
    with pytest.raises(ValueError, match="no lane 'e3e'"):
        lanes.chosen(["e3e"], fast=False)


def test_a_lane_that_goes_alone_begins_when_all_others_have_ended(
    lanes: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each lane leaves a file behind while it runs; the lonely ones look for those of the others."""
    nobody_else = '[ -z "$(ls *.here 2>/dev/null)" ]'
    _table(
        lanes,
        monkeypatch,
        alone=f"{nobody_else}; touch alone.here; rm alone.here",
        slow="touch slow.here; until [ -e quick.ended ]; do sleep 0.01; done; rm slow.here",
        quick="touch quick.ended",
        other=f"{nobody_else}; touch other.here; rm other.here",
    )
    for name in ("alone", "other"):
        monkeypatch.setitem(lanes.LANES, name, lanes.LANES[name]._replace(alone=True))
    run = lanes.Run(lanes.LANES, jobs=4, out=io.StringIO())
    run.run()
    assert {each.lane: each.code for each in run.results} == dict.fromkeys(lanes.LANES, 0)
    assert [each.lane for each in run.results][2:] == ["alone", "other"]


@pytest.mark.parametrize("jobs", ["1", "2"])
def test_each_lane_is_judged(
    jobs: str, lanes: Any, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    _table(
        lanes,
        monkeypatch,
        good="echo well",
        half="echo begun; false; echo not reached",
        bare="echo 'SKIPPED: no tool'; exit 77",
        killed="kill -KILL $$",
    )
    monkeypatch.setenv("CI", "false")
    assert lanes.main(["--jobs", jobs]) == 1
    said = capfd.readouterr().out
    assert "well" in said
    assert "begun" in said
    assert "not reached" not in said
    judged = dict(re.findall(r"^== (\w+) (passed|skipped|FAILED) \(", said, re.MULTILINE))
    assert judged == {"good": "passed", "half": "FAILED", "bare": "skipped", "killed": "FAILED"}
    last = said.splitlines()[-1]
    assert last.startswith("check FAILED after")
    assert set(last.partition(": ")[2].split()) == {"half", "killed"}


def test_a_skipped_lane_is_a_failure_in_ci_only(
    lanes: Any, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    _table(lanes, monkeypatch, good="true", bare="echo 'SKIPPED: no tool'; exit 77")
    monkeypatch.setenv("CI", "false")
    assert lanes.main([]) == 0
    assert "skipped: bare" in capfd.readouterr().out
    monkeypatch.setenv("CI", "true")
    assert lanes.main([]) == 1
    assert "which CI does not allow" in capfd.readouterr().out


_TESTS = """
import os, pathlib
def test_first_time():
    seen = pathlib.Path("seen")
    known = seen.exists()
    seen.touch()
    assert known
def test_well(): pass
@__import__("pytest").mark.parametrize("number", range(int(os.environ.get("BAD", "0"))))
def test_bad(number): assert False
"""


@pytest.mark.parametrize(
    ("ci", "bad", "workers", "code"),
    [
        ("true", 0, "", 0),
        ("true", 0, "-p xdist -n 2", 0),
        ("true", 1, "", 1),
        ("true", 3, "", 1),
        ("false", 0, "", 1),
    ],
)
def test_in_ci_an_unsteady_test_is_named_and_stops_nothing(
    ci: str,
    bad: int,
    workers: str,
    code: int,
    lanes: Any,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    (tmp_path / "pytest.ini").write_text("[pytest]\naddopts = -p no:cacheprovider\n")
    (tmp_path / "conftest.py").write_text(
        """
def pytest_configure(config):
    from caesura_testing.second_look import second_look
    if looking := second_look(config):
        config.pluginmanager.register(looking)
"""
    )
    (tmp_path / "test_it.py").write_text(_TESTS)
    monkeypatch.setenv("CI", ci)
    monkeypatch.setenv("BAD", str(bad))
    monkeypatch.setenv("PYTHONPATH", str(_ROOT / "tests" / "support"))
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # the others take most of the time of its start
    pytest_command = f"{sys.executable} -m pytest -q {workers} test_it.py"
    _table(lanes, monkeypatch, tests=pytest_command, other="true")
    assert lanes.main(["--jobs", "2"]) == code
    said = capfd.readouterr().out
    named = (
        "UNSTEADY, failed once and passed alone; find out why: test_it.py::test_first_time (tests)" in said
    )
    assert named == (code == 0)
    # With more than three failures something is broken, and nothing is run again.
    assert ("once more, alone" in said) == (ci == "true" and bad < 3)


def test_two_run_at_once_and_the_third_waits(
    lanes: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    meet = "touch {0}; until [ -e {1} ]; do sleep 0.01; done; touch {0}-is-over"
    _table(
        lanes,
        monkeypatch,
        one=meet.format("a", "b"),
        two=meet.format("b", "a"),
        three="[ -e a-is-over ] || [ -e b-is-over ]",
    )
    out = io.StringIO()
    run = lanes.Run(lanes.chosen([], fast=False), jobs=2, out=out)
    run.run()
    assert {each.lane: each.code for each in run.results} == {"one": 0, "two": 0, "three": 0}
    assert sorted(path.name for path in (tmp_path / ".lanes").iterdir()) == [
        "one.log",
        "three.log",
        "two.log",
    ]


def test_an_interrupt_ends_what_is_under_way(tmp_path: Path) -> None:
    # `exec`: a signal that reaches a shell while it starts a command is lost, and the lane is killed only 20 s later.
    text = """
import signal, sys
from caesura_testing import lanes
signal.signal(signal.SIGINT, signal.default_int_handler)  # it is ignored in a shell's background
lanes.LANES = {name: lanes.Lane(name, f"echo $$ >{name}.pid; exec sleep 600") for name in ("one", "two", "three")}
sys.exit(lanes.main(["--jobs", "2"]))
"""
    with subprocess.Popen(
        [sys.executable, "-c", text], cwd=tmp_path, stderr=subprocess.PIPE, text=True
    ) as process:
        pids = [tmp_path / "one.pid", tmp_path / "two.pid"]
        until(
            lambda: all(each.exists() and each.read_text().strip() for each in pids),
            20,
            lambda: "two lanes under way",
        )
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=patient(30))
    assert process.returncode == 130
    assert said == "check: interrupted\n"
    # Killed when it left; who adopts a dead process takes a moment to reap it.
    until(
        lambda: not any(Path(f"/proc/{path.read_text().strip()}").exists() for path in pids),
        20,
        lambda: "both lanes are gone",
    )
    assert not (tmp_path / "three.pid").exists()


def test_the_script_needs_no_environment_for_its_help() -> None:
    helped = subprocess.run(
        [str(_ROOT / "check"), "--help"], capture_output=True, text=True, timeout=patient(30), check=True
    )
    for lane in ("e2e", "hosts", "journeys", "unit", "soak"):
        assert f"\n  {lane} " in helped.stdout
    assert "examples:" in helped.stdout


def test_an_output_that_cannot_be_printed_stops_no_lane(
    lanes: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A terminal or a log of another encoding: the lanes behind it were never run, and ``./check`` passed."""
    said = "printf 'caf\\303\\251\\n'"
    _table(lanes, monkeypatch, one=said, two=said, last="touch last-ran; false")
    written = io.BytesIO()
    run = lanes.Run(["one", "two", "last"], jobs=2, out=io.TextIOWrapper(written, encoding="ascii"))
    run.run()
    assert (tmp_path / "last-ran").exists()
    assert {each.lane: each.code for each in run.results} == {"one": 0, "two": 0, "last": 1}
    assert written.getvalue().count(b"caf\\xe9") == 2


def test_a_lane_that_came_to_no_result_has_failed(
    lanes: Any, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    _table(lanes, monkeypatch, good="true", other="true")
    work = lanes.Run._work

    def ends_early(run: Any) -> None:
        run._waiting = run._waiting[:1]
        work(run)

    monkeypatch.setattr(lanes.Run, "_work", ends_early)
    assert lanes.main(["--jobs", "1"]) == 1
    assert "other (no result)" in capfd.readouterr().out


def test_an_interrupt_while_the_lanes_are_being_started_ends_them_too(
    lanes: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The second lane is under way, and the call that started its thread has not returned."""
    _table(lanes, monkeypatch, one="echo $$ >one.pid; exec sleep 600", two="echo $$ >two.pid; exec sleep 600")
    pids = [tmp_path / "one.pid", tmp_path / "two.pid"]
    start, started = threading.Thread.start, list[threading.Thread]()

    def interrupted(thread: threading.Thread) -> None:
        start(thread)
        started.append(thread)
        if len(started) == 2:
            until(
                lambda: all(each.exists() and each.read_text().strip() for each in pids),
                20,
                lambda: "two lanes under way",
            )
            raise KeyboardInterrupt

    monkeypatch.setattr(threading.Thread, "start", interrupted)
    with pytest.raises(KeyboardInterrupt):
        lanes.Run(["one", "two"], jobs=2, out=io.StringIO()).run()
    assert not any(Path(f"/proc/{path.read_text().strip()}").exists() for path in pids)
