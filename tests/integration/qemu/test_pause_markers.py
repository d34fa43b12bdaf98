"""Real QEMUs that are found paused: by their marker alone those of ours run again, and nobody else's."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from caesura_host_updater.drivers.qemu.definition import Definition
from caesura_vmcontrol import markers
from caesura_vmcontrol.marked_pauses import marked_and_paused, resume
from caesura_vmcontrol.markers import Marker
from caesura_vmcontrol.procfs import boot_id
from caesura_vmcontrol.resume_plans import ResumePlan

SMALL = Definition(memory_mib=16, machine="pc-q35-7.2")


def no_log(event: str, **facts: object) -> None:
    """Nobody reads it here."""


def mark(state: Path, plan: ResumePlan, boot: str = "") -> None:
    """As an operation does it before it pauses the VM."""
    markers.write(str(state), [Marker("op-1", boot or boot_id(), time.monotonic(), plan)])


def rescue(state: Path) -> list[str]:
    """What a guard or an updater does at its start; who runs now."""
    found = marked_and_paused(str(state), boot_id(), no_log)
    if found is None:
        return []
    assert found.operation == "op-1"
    return sorted(resume(found, "the test", no_log, time.monotonic() + 30, lambda: False))


async def test_a_stop_of_ours_is_undone_and_an_operators_is_not(rig: Any, tools: Any) -> None:
    vms = {"ours": SMALL, "his": SMALL, "runs": SMALL, "before": SMALL}
    driver = await rig.open(vms)
    state = rig.folder / "state"
    for vm in ("ours", "runs"):
        mark(state, driver.resume_plan(vm))
    mark(state, driver.resume_plan("before"), boot="another boot")
    for vm in ("ours", "his", "before"):
        await driver.freeze(vm, tools.soon())
    await rig.crash()
    assert rescue(state) == ["ours"]
    again = await rig.open(vms)
    assert again.states() == {"ours": "running", "his": "paused", "runs": "running", "before": "paused"}
    for vm in ("his", "before"):
        assert await again.resume(vm, 5) == "running"


async def test_with_a_damaged_marker_the_run_file_has_the_way_out(rig: Any, tools: Any) -> None:
    driver = await rig.open({"a": SMALL})
    state = rig.folder / "state"
    mark(state, driver.resume_plan("a"))
    await driver.freeze("a", tools.soon())
    await rig.crash()
    path = state / "pauses" / "a.json"
    path.write_bytes(path.read_bytes()[:-1])
    found = marked_and_paused(str(state), boot_id(), no_log)
    assert found is not None
    assert list(resume(found, "the test", no_log, time.monotonic() + 30, lambda: False)) == ["a"]
    assert (await rig.open({"a": SMALL})).states() == {"a": "running"}


async def test_a_guest_in_a_state_file_is_loaded_by_its_marker_alone(rig: Any, tools: Any) -> None:
    driver = await rig.open({"a": SMALL})
    state = rig.folder / "state"
    await driver.prepare("a", "op-1", "replace", "")
    mark(state, driver.resume_plan("a"))
    await driver.checkpoint("a", tools.soon())
    await rig.crash()
    assert rig.processes() == []
    assert rescue(state) == ["a"]
    again = await rig.open({"a": SMALL})
    assert again.states() == {"a": "running"}
    await rig.only(tools.pid_of(again, "a"))
