"""Whose guest it is: a migration or a pause that somebody else began is his, whatever of ours is under way.

Where it cannot be told by QEMU's state alone, the claims of an operation hold a note; each test leaves one moment open.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from caesura.testing.patience import patient
from caesura_host_updater.drivers.port import FreezeFailed, SwapFailed
from caesura_host_updater.drivers.qemu import moving
from caesura_host_updater.drivers.qemu.definition import Definition
from caesura_host_updater.drivers.qemu.qmp import Qmp
from caesura_host_updater.guard import claims
from caesura_host_updater.guard.plans import condition, thaw

SMALL = Definition(memory_mib=16, machine="pc-q35-7.2")
METHODS = pytest.mark.parametrize("method", ["swap", "replace"])


def qmp(driver: Any) -> Qmp:
    """The driver's own connection."""
    found: Qmp = driver._guests["a"].qmp
    return found


async def capabilities(driver: Any) -> dict[str, bool]:
    """What the next migration of this process would do."""
    listed = await qmp(driver).execute("query-migrate-capabilities")
    return {each["capability"]: each["state"] for each in listed}


async def migrate_away(driver: Any, file: Path, *, slow: bool = False) -> None:
    """What an operator's tool does; ``slow``: it is still under way."""
    off = [{"capability": name, "state": False} for name in ("return-path", "x-ignore-shared")]
    await qmp(driver).execute("migrate-set-capabilities", capabilities=off)
    if slow:
        await qmp(driver).execute("migrate-set-parameters", max_bandwidth=4096)
    await qmp(driver).execute("migrate", uri=f"exec:cat>{file}")
    wanted = "active" if slow else "completed"
    async with asyncio.timeout(patient(30)):
        while (await qmp(driver).execute("query-migrate"))["status"] != wanted:  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def hand_over(driver: Any, method: Any, tools: Any) -> None:
    """The step of this method that stops the guest."""
    await (driver.hand_over if method == "swap" else driver.checkpoint)("a", tools.soon())


@METHODS
@pytest.mark.parametrize("slow", [False, True], ids=["done", "under way"])
async def test_a_migration_that_began_in_the_moment_before_ours(
    rig: Any, tools: Any, monkeypatch: pytest.MonkeyPatch, method: Any, *, slow: bool
) -> None:
    """After the last look, before our ``migrate``: QEMU refuses ours, so the one that there is is not ours to end."""
    driver = await rig.open({"a": SMALL})
    await driver.prepare("a", "op-1", method, "")
    plan = driver.resume_plan("a")
    step = "run_hand_over" if method == "swap" else "save_state"
    ours = getattr(moving, step)

    async def theirs_first(*arguments: Any, **more: Any) -> Any:
        await migrate_away(driver, rig.folder / "a", slow=slow)
        return await ours(*arguments, **more)

    monkeypatch.setattr(moving, step, theirs_first)
    with pytest.raises((SwapFailed, FreezeFailed), match="migrat"):
        await hand_over(driver, method, tools)
    if slow:
        assert await driver.resume("a", 5) == "running"
        assert condition(plan) == "running"
        assert (await qmp(driver).execute("query-migrate"))["status"] == "active"
        await qmp(driver).execute("migrate_cancel")
    else:
        assert await driver.resume("a", 5) == "left"
        assert driver.why_left("a") == "it was migrated away: QEMU says postmigrate"
        thaw(plan)
        assert condition(plan) == "gone"
        assert await qmp(driver).status() == "postmigrate"
    await driver.release("a")


@METHODS
async def test_a_migration_of_somebody_else_when_the_updater_died_before_ours(
    rig: Any, tools: Any, method: Any
) -> None:
    """That ours was about to begin is written down, and no more: only what it left behind can tell."""
    driver = await rig.open({"a": SMALL})
    await driver.prepare("a", "op-1", method, "")
    plan = driver.resume_plan("a")
    claims.note(plan.claims, "begun")
    await migrate_away(driver, rig.folder / "a")
    assert condition(plan) == "gone"
    thaw(plan)
    assert condition(plan) == "gone"
    assert await qmp(driver).status() == "postmigrate"
    thaw(plan)  # the other process is dead by now, and can tell nothing any more
    assert await qmp(driver).status() == "postmigrate"
    driver = await rig.open({"a": SMALL})
    assert await driver.resume("a", 5) in ("left", "gone")
    assert await qmp(driver).status() == "postmigrate"
    await driver.release("a")


@METHODS
async def test_our_own_migration_when_the_updater_died_before_it_was_written_down(
    rig: Any, tools: Any, monkeypatch: pytest.MonkeyPatch, method: Any
) -> None:
    monkeypatch.setattr("caesura_host_updater.drivers.qemu.handover.note", lambda *_: None)
    monkeypatch.setattr("caesura_host_updater.drivers.qemu.handover.claim", refuse)
    driver = await rig.open({"a": SMALL})
    await driver.prepare("a", "op-1", method, "")
    plan = driver.resume_plan("a")
    pid = tools.pid_of(driver, "a")
    monkeypatch.setattr(driver._mover, "way_out", nothing)
    with pytest.raises((SwapFailed, FreezeFailed)):
        await hand_over(driver, method, tools)
    monkeypatch.undo()
    thaw(plan)
    assert condition(plan) == "running"
    assert tools.runs(pid)
    await driver.release("a")
    assert tools.pid_of(driver, "a") == pid
    await rig.only(pid)


def refuse(*_: Any) -> str:
    """A disk that fails at the moment of the claim."""
    raise OSError("no claim")


async def nothing(*_: Any) -> str:
    """The updater is dead: it finds no way out."""
    return "held"


@METHODS
async def test_a_guest_that_ran_in_its_new_process_and_was_paused_there(
    rig: Any, tools: Any, method: Any
) -> None:
    """Before the operation was released: an operator's pause is his, and the guest never goes back in time."""
    driver = await rig.open({"a": SMALL})
    await driver.prepare("a", "op-1", method, "")
    plan = driver.resume_plan("a")
    await hand_over(driver, method, tools)
    assert await driver.resume("a", 10) == "running"
    pid = tools.pid_of(driver, "a")
    await qmp(driver).execute("stop")
    thaw(plan)
    assert condition(plan) == "gone"
    assert await driver.resume("a", 5) == "left"
    assert "paused by somebody else since" in driver.why_left("a")
    assert await qmp(driver).status() == "paused"
    await qmp(driver).execute("cont")
    assert condition(plan) == "running"
    assert await driver.resume("a", 5) == "running"
    await driver.release("a")
    assert driver.states() == {"a": "running"}
    await rig.only(pid)


@METHODS
async def test_what_our_migrations_are_told_is_not_told_to_the_next_one(
    rig: Any, tools: Any, method: Any
) -> None:
    """``x-ignore-shared`` left behind would make an operator's next migration leave the guest's memory at home."""
    driver = await rig.open({"a": SMALL})
    usual = await capabilities(driver)
    assert not usual["x-ignore-shared"]
    told = [{"capability": "auto-converge", "state": True}]
    await qmp(driver).execute("migrate-set-capabilities", capabilities=told)
    before = await capabilities(driver)
    await driver.prepare("a", "op-1", method, "")
    await driver.release("a")
    assert await capabilities(driver) == before, "called off before the pause"
    await driver.prepare("a", "op-2", method, "")
    await hand_over(driver, method, tools)
    assert await driver.resume("a", 10) == "running"
    await driver.release("a")
    assert await capabilities(driver) == before, "in the new process"
    await driver.prepare("a", "op-3", method, "")
    driver = await rig.open({"a": SMALL})
    assert await capabilities(driver) == before, "found by the next updater"


@METHODS
async def test_a_guest_that_was_migrated_away_after_it_was_handed_over(
    rig: Any, tools: Any, method: Any
) -> None:
    """The updater died before it released the operation; the new process was claimed, and has run."""
    driver = await rig.open({"a": SMALL})
    await driver.prepare("a", "op-1", method, "")
    plan = driver.resume_plan("a")
    await hand_over(driver, method, tools)
    assert await driver.resume("a", 10) == "running"
    await migrate_away(driver, rig.folder / "a")
    assert condition(plan) == "gone"
    thaw(plan)
    assert await qmp(driver).status() == "postmigrate"
    await driver.release("a")
