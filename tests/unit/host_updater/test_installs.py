"""Which updates a host has: what succeeded is remembered, and an update's own command is asked."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import structlog
from structlog.testing import capture_logs

from caesura.contract.messages import InstalledUpdate, OperationReported, RefusedUpdate
from caesura_host_updater.installed_probe import InstalledProbe
from caesura_host_updater.inventory.installs import Mark, installed, marks_of, remembered
from caesura_host_updater.inventory.updates import Catalogue, UpdateFile, parse_update
from caesura_host_updater.journal import Journal
from caesura_host_updater.operation.state import Operation, UpdateRun, VmPause
from caesura_testing.collector import eventually

AT = datetime(2026, 4, 20, 9, 30, tzinfo=UTC)


def update(name: str = "patch", **changes: Any) -> UpdateFile:
    values: dict[str, Any] = {
        "name": name,
        "version": "2",
        "impact": "pause",
        "scope": "host",
        "argv": ("true",),
        "expected_s": 1.0,
        "timeout_s": 5.0,
    }
    return UpdateFile(**(values | changes))


def catalogue(*updates: UpdateFile) -> Catalogue:
    return Catalogue({each.name: each for each in updates})


def mark(vm: str = "", version: str = "2", *, succeeded: bool = True) -> Mark:
    return Mark(update="patch", version=version, vm=vm, succeeded=succeeded, at=AT)


def operation(*runs: UpdateRun, **changes: Any) -> Operation:
    values: dict[str, Any] = {
        "operation": "op",
        "method": "freeze",
        "budget_s": 10.0,
        "update": "patch",
        "update_version": "2",
        "vms": (VmPause(vm="a", set="web", update_domain=0),),
        "runs": runs,
        "end": "completed",
    }
    return Operation(**(values | changes))


def test_an_update_that_succeeded_is_remembered_whatever_became_of_the_pause() -> None:
    ended = operation(UpdateRun(started=True, outcome="succeeded"), end="failed", failure="over the budget")
    assert marks_of(ended, AT) == (mark(),)


@pytest.mark.parametrize("outcome", ["failed", "timeout", "interrupted"])
def test_one_that_did_not_ends_what_was_remembered(outcome: Any) -> None:
    """Nobody knows what of it is installed."""
    marks = marks_of(operation(UpdateRun(started=True, outcome=outcome)), AT)
    assert remembered([mark(version="1")], marks) == ()


def test_one_that_was_never_run_changes_nothing() -> None:
    assert marks_of(operation(UpdateRun(outcome="not_run"), UpdateRun()), AT) == ()


def test_a_new_vmm_counts_only_where_the_guests_came_into_it() -> None:
    run = UpdateRun(key="a", started=True, outcome="succeeded")
    assert marks_of(operation(run, method="swap"), AT) == (mark("a"),)
    assert marks_of(operation(run, method="swap", end="failed"), AT) == (mark("a", succeeded=False),)


def test_only_the_version_that_is_defined_now_counts() -> None:
    known = catalogue(update())
    assert installed(known, [mark(version="1")], {}, ["a"]) == ()
    assert installed(known, [mark()], {}, ["a"]) == (InstalledUpdate(update="patch", version="2", at=AT),)


def test_an_update_by_vm_is_remembered_by_vm() -> None:
    known = catalogue(update(scope="vm"))
    (some,) = installed(known, [mark("a"), mark("gone")], {}, ["a", "b"])
    assert some.vms == ("a",)
    (every,) = installed(known, [mark("a"), mark("b")], {}, ["a", "b"])
    assert every.vms == (), "the whole host"
    assert installed(known, [mark()], {}, ["a"]) == (), "once of scope host, now of scope vm"


def test_where_an_update_has_a_command_of_its_own_that_decides() -> None:
    known = catalogue(update(installed=("true",)))
    assert installed(known, [mark()], {"patch": False}, ["a"]) == (), "rolled back"
    assert installed(known, [mark()], {}, ["a"]) == (), "not asked yet"
    assert installed(known, [], {"patch": True}, ["a"]) == (InstalledUpdate(update="patch", version="2"),)


def test_of_an_update_by_vm_the_command_can_only_deny() -> None:
    """It is asked of the host: it cannot know in which VMM a guest is."""
    known = catalogue(update(scope="vm", installed=("true",)))
    assert installed(known, [], {"patch": True}, ["a"]) == ()
    assert installed(known, [mark("a")], {"patch": True}, ["a"]) != ()
    assert installed(known, [mark("a")], {"patch": False}, ["a"]) == ()


def test_a_command_that_is_not_there_refuses_the_file() -> None:
    text = 'name = "patch"\nimpact = "pause"\nscope = "host"\nargv = ["a"]\nexpected_s = 1\ntimeout_s = 2\ninstalled = ["nowhere"]\n'
    refused = parse_update("patch.toml", text, find=lambda name: None if name == "nowhere" else name)
    assert isinstance(refused, RefusedUpdate)
    assert refused.line == 7
    assert "nowhere" in refused.reason


def test_it_is_on_disk_with_the_report_and_a_second_end_changes_nothing(tmp_path: Path) -> None:
    def report(name: str) -> OperationReported:
        return OperationReported(operation=name, host="host-1", epoch=1, status="completed", at=AT)

    path = str(tmp_path / "journal.sqlite")
    journal = Journal(path)
    journal.finish(report("one"), [], marks=[mark(), mark("a")])
    journal.finish(report("one"), [], marks=[mark(succeeded=False)])
    journal.close()
    again = Journal(path)
    assert again.installed() == [mark(), mark("a")]
    again.finish(report("two"), [], marks=[mark(succeeded=False)])
    assert again.installed() == [mark("a")]
    again.close()


class Asked:
    """A probe of one update whose command is Python code."""

    def __init__(self, code: str, limit_s: float = 30.0) -> None:
        self.known = catalogue(update(installed=(sys.executable, "-S", "-c", code)))
        self.busy = False
        self.probe = InstalledProbe(
            "host-1",
            os.environ,
            catalogue=lambda: self.known,
            busy=lambda: self.busy,
            changed=lambda: None,
            again_s=3600.0,
            limit_s=limit_s,
        )


async def _running(asked: Asked, body: Callable[[], Any]) -> None:
    task = asyncio.create_task(asked.probe.run())
    try:
        await body()
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_the_exit_code_is_the_answer_and_is_asked_again_on_request(tmp_path: Path) -> None:
    there = tmp_path / "there"
    asked = Asked(f"import os; raise SystemExit(not os.path.exists({str(there)!r}))")

    async def body() -> None:
        await eventually(lambda: asked.probe.answers == {"patch": False})
        there.touch()
        asked.probe.ask()
        await eventually(lambda: asked.probe.answers == {"patch": True})

    await _running(asked, body)


async def test_one_that_does_not_answer_in_time_is_killed_and_says_no(tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    code = f"import os, time; open({str(pid)!r}, 'w').write(str(os.getpid())); time.sleep(600)"
    asked = Asked(code, limit_s=1.0)

    async def body() -> None:
        await eventually(lambda: asked.probe.answers == {"patch": False})

    await _running(asked, body)
    if pid.exists() and pid.read_text():
        await eventually(lambda: not Path(f"/proc/{pid.read_text()}").exists())


async def test_nobody_is_asked_in_an_operation_and_one_that_is_being_asked_is_killed(tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    code = f"import os, time; open({str(pid)!r}, 'w').write(str(os.getpid())); time.sleep(600)"
    asked = Asked(code)

    async def body() -> None:
        await eventually(lambda: pid.exists() and bool(pid.read_text()))
        first = pid.read_text()
        asked.busy = True
        asked.probe.interrupt()
        await eventually(lambda: not Path(f"/proc/{first}").exists())
        pid.unlink()
        asked.probe.ask()
        for _ in range(20):  # the loop turns as often as it likes: nothing is started
            await asyncio.sleep(0)
        assert not pid.exists()
        asked.busy = False
        asked.probe.ask()
        await eventually(pid.exists)

    await _running(asked, body)
    assert asked.probe.answers == {}


async def test_an_update_that_is_not_installed_is_an_answer_and_no_failure_in_the_log() -> None:
    """It is asked every minute: a warning for each host and update that is merely due would drown the real ones."""
    structlog.reset_defaults()  # another test may have silenced it
    asked = Asked("print('not here'); raise SystemExit(1)")
    broken = update("broken", installed=("/nonexistent/program",))
    asked.known = catalogue(*asked.known.updates.values(), broken)

    async def body() -> None:
        await eventually(lambda: asked.probe.answers == {"patch": False, "broken": False})

    with capture_logs() as logs:
        await _running(asked, body)
    # On a machine that is so busy that a start takes too long, that is said, too; it is asked again.
    said = [(each["event"], each["update"]) for each in logs if each["event"] != "update.started_too_late"]
    assert said == [("update.not_asked", "broken")]


async def test_an_answer_holds_only_for_the_definition_that_was_asked() -> None:
    asked = Asked("")

    async def body() -> None:
        await eventually(lambda: asked.probe.answers == {"patch": True})
        asked.known = catalogue(update(version="3", installed=("false",)))
        assert asked.probe.answers == {}

    await _running(asked, body)
