"""A host updater that was set back finds a journal of a newer version: the VMs run again, it says why it ends, and nothing is lost."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

from caesura.contract.messages import VmFrozen
from caesura.runtime.errors import ConfigError


def _set_version(journal: Path, version: int) -> int:
    """Give the file another schema version; the one that it had."""
    with closing(sqlite3.connect(journal)) as file:
        ((had,),) = file.execute("PRAGMA user_version").fetchall()
        file.execute(f"PRAGMA user_version={version}")
        return int(had)


async def test_vms_run_again_and_the_operation_is_reported_by_the_version_that_can(
    hosts: Callable[..., Any], fleet: Any
) -> None:
    host = hosts()
    host.add_vm("a")
    await host.start()
    command = await host.freeze(hold_s=5.0)
    await host.until("a", "frozen")
    await fleet.ear.one(VmFrozen, lambda m: m.operation == command.operation, 40.0)  # so it is in the journal
    await host.kill_with_guard()
    assert host.kernel("a") == "frozen", "nobody is left to resume it"
    journal = host.state_dir / "journal.sqlite"
    had = _set_version(journal, 99)

    await host.launch()
    await host.until("a", "running")
    assert await host.process.wait() == ConfigError.exit_code, "its unit does not start it again and again"
    (line,) = [each for each in host.log() if each["event"] == "service.failed"]
    assert "schema version 99" in line["why"]
    assert "run the newer version" in line["why"]
    assert not [each for each in fleet.reports(command.operation) if each.status != "accepted"]

    _set_version(journal, had)
    await host.start()
    report = await fleet.report(command.operation)
    assert (report.status, report.vms[0].state, report.vms[0].frozen) == ("failed", "running", True)
    assert report.codes
