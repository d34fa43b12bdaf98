"""Whose guest it is: a migration or a pause that somebody else began is his, whatever of ours is under way.

Where it cannot be told by QEMU's state alone, the claims of an operation hold a note; each test leaves one moment open.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from caesura_host_updater.drivers.port import FreezeFailed, SwapFailed
from caesura_host_updater.drivers.qemu import checkpointing, handover, supervisor, vmm
from caesura_host_updater.drivers.qemu import migration as migrations
from caesura_host_updater.drivers.qemu.async_qmp import AsyncQmp
from caesura_host_updater.drivers.qemu.definition import Definition, QemuOptions, QemuVm
from caesura_host_updater.drivers.qemu.driver import QemuDriver
from caesura_host_updater.drivers.qemu.handover import SWAP_CAPABILITIES, HandOverFailed
from caesura_testing.patience import patient
from caesura_vmcontrol import claims, process_control, qemu_replace, qemu_swap
from caesura_vmcontrol.qmp_commands import UNDER_WAY, migration, reach
from caesura_vmcontrol.vm_control import condition, resume_vm

SMALL = Definition(memory_mib=16, machine="pc-q35-7.2")
METHODS = pytest.mark.parametrize("method", ["swap", "replace"])


def qmp(driver: Any) -> AsyncQmp:
    """The driver's own connection."""
    found: AsyncQmp = driver._guests["a"].qmp
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
    ours = getattr(migrations, step)

    async def theirs_first(*arguments: Any, **more: Any) -> Any:
        await migrate_away(driver, rig.folder / "a", slow=slow)
        return await ours(*arguments, **more)

    monkeypatch.setattr(migrations, step, theirs_first)
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
        resume_vm(plan)
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
    resume_vm(plan)
    assert condition(plan) == "gone"
    assert await qmp(driver).status() == "postmigrate"
    resume_vm(plan)  # the other process is dead by now, and can tell nothing any more
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
    monkeypatch.setattr(driver._migrator, "recover", nothing)
    with pytest.raises((SwapFailed, FreezeFailed)):
        await hand_over(driver, method, tools)
    monkeypatch.undo()
    resume_vm(plan)
    assert condition(plan) == "running"
    assert tools.runs(pid)
    await driver.release("a")
    assert tools.pid_of(driver, "a") == pid
    await rig.only(pid)


def refuse(*_: Any, **__: Any) -> str:
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
    resume_vm(plan)
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
    resume_vm(plan)
    assert await qmp(driver).status() == "postmigrate"
    await driver.release("a")


# -- an operation whose updater died, or whose claims were lost ----------------------------------------------------


async def crash_before_it_is_published(driver: Any, rig: Any, tools: Any, monkeypatch: Any) -> Any:
    """The new process runs, and nobody has written down that it is the VM. The plan."""
    plan = driver.resume_plan("a")
    monkeypatch.setattr(driver._migrator, "_committed", for_ever)
    moved = asyncio.create_task(driver.hand_over("a", tools.soon()))
    await tools.until(lambda: claims.noted(plan.claims, "ran"), "the new process to run")
    moved.cancel()
    with suppress(asyncio.CancelledError):
        await moved
    await rig.crash()
    return plan


async def for_ever(*_: Any) -> None:
    """It never comes to that."""
    await asyncio.Event().wait()


async def next_qmp(rig: Any) -> AsyncQmp:
    """The new process's socket before it has the old one's place."""
    return await AsyncQmp.connect(str(rig.folder / "run" / "a" / "next" / "qmp"), 5)


async def test_a_swapped_guest_that_an_operator_paused_while_nobody_was_there_is_not_started_twice(
    rig: Any, tools: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = await rig.open({"a": SMALL})
    await driver.prepare("a", "op-1", "swap", "")
    new = tools.next_pid(driver, "a")
    plan = await crash_before_it_is_published(driver, rig, tools, monkeypatch)
    await asyncio.to_thread(resume_vm, plan)
    theirs = await next_qmp(rig)
    await theirs.execute("stop")
    await theirs.close()
    driver = await rig.open({"a": SMALL})
    await rig.only(new)
    assert tools.pid_of(driver, "a") == new
    assert driver.states() == {"a": "paused"}
    assert "paused by somebody else since" in driver.ping()
    await qmp(driver).execute("cont")
    await tools.until(lambda: driver.states() == {"a": "running"}, "it to run")
    await driver.prepare("a", "op-2", "swap", "")
    await driver.release("a")


async def test_a_replaced_guest_that_was_migrated_away_while_nobody_was_there_is_not_started_twice(
    rig: Any, tools: Any
) -> None:
    driver = await rig.open({"a": SMALL})
    await driver.prepare("a", "op-1", "replace", "")
    plan = driver.resume_plan("a")
    await driver.checkpoint("a", tools.soon())
    await rig.crash()
    await asyncio.to_thread(resume_vm, plan)
    (pid,) = rig.processes()
    theirs = await next_qmp(rig)
    listed = await theirs.execute("query-migrate-capabilities")
    assert not [each for each in listed if each["capability"] == "x-ignore-shared" and each["state"]]
    await theirs.execute("migrate", uri=f"exec:cat>{rig.folder}/a")
    async with asyncio.timeout(patient(30)):
        while await theirs.status() != "postmigrate":  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    await theirs.close()
    driver = await rig.open({"a": SMALL})
    assert rig.processes() == [pid]
    assert driver.states() == {"a": "stopped"}
    assert "it was migrated away" in driver.ping()


async def test_a_guest_whose_answer_was_lost_is_not_taken_for_dead(
    rig: Any, tools: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = await rig.open({"a": SMALL})
    await driver.prepare("a", "op-1", "swap", "")
    new = tools.next_pid(driver, "a")
    ours = handover.run_hand_over

    async def lost(old: Any, fresh: Any, *arguments: Any, **more: Any) -> Any:
        await ours(old, fresh, *arguments, **more)
        await fresh.execute("stop")
        raise HandOverFailed("the answer to cont was lost")

    monkeypatch.setattr(migrations, "run_hand_over", lost)
    with pytest.raises(SwapFailed, match="was lost"):
        await driver.hand_over("a", tools.soon())
    assert await driver.resume("a", 5) == "left"
    await driver.release("a")
    assert tools.pid_of(driver, "a") == new
    await rig.only(new)
    assert driver.states() == {"a": "paused"}
    await qmp(driver).execute("cont")


async def test_the_start_ends_no_process_that_the_guard_has_claimed_meanwhile(
    rig: Any, tools: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = await rig.open({"a": SMALL})
    await driver.prepare("a", "op-1", "replace", "")
    plan = driver.resume_plan("a")
    await driver.checkpoint("a", tools.soon())
    await rig.crash()
    look = vmm.marked

    def guard_first(mark: str) -> Any:
        resume_vm(plan)
        return look(mark)

    monkeypatch.setattr(supervisor, "marked", guard_first)
    driver = await rig.open({"a": SMALL})
    assert driver.states() == {"a": "running"}
    await rig.only(tools.pid_of(driver, "a"))


@METHODS
async def test_claims_that_are_lost_in_the_pause(
    rig: Any, tools: Any, monkeypatch: pytest.MonkeyPatch, method: Any
) -> None:
    driver = await rig.open({"a": SMALL})
    await driver.prepare("a", "op-1", method, "")
    where = handover if method == "swap" else checkpointing
    take = where.take_from

    def without(plan: Any, text: str) -> None:
        shutil.rmtree(plan.claims)
        take(plan, text)

    monkeypatch.setattr(where, "take_from", without)
    with suppress(
        SwapFailed, FreezeFailed
    ):  # the new process has everything, so it may run there all the same
        await hand_over(driver, method, tools)
    assert await driver.resume("a", 5) == "running"
    await driver.release("a")
    await rig.only(tools.pid_of(driver, "a"))
    assert driver.states() == {"a": "running"}


async def test_a_record_that_could_not_be_removed(
    rig: Any, tools: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The state disk is read-only: the claims are gone with the folder of sockets, the record is still there."""
    driver = await rig.open({"a": SMALL})
    await driver.prepare("a", "op-1", "swap", "")
    await driver.hand_over("a", tools.soon())
    monkeypatch.setattr(driver._migrator._records, "end", lambda _: None)
    await driver.release("a")
    pid = tools.pid_of(driver, "a")
    driver = await rig.open({"a": SMALL})
    assert driver.states() == {"a": "running"}
    assert tools.pid_of(driver, "a") == pid
    await driver.prepare("a", "op-2", "swap", "")
    await driver.release("a")
    assert not (rig.folder / "state" / "vms" / "a.operations").exists()


@METHODS
async def test_another_host_updater_with_the_same_vm_and_the_same_folder_for_sockets(
    rig: Any, tools: Any, method: Any
) -> None:
    driver = await rig.open({"a": SMALL})
    await driver.prepare("a", "op-1", method, "")
    other = QemuDriver(
        "host-1",
        (QemuVm(name="a", qemu=SMALL),),
        QemuOptions(run_dir=str(rig.folder / "run"), powerdown_s=0),
        rig.folder / "state-2",
        accel="tcg,thread=multi",
        environ=os.environ,
        max_digest_bytes=0,
    )
    await other.open()
    await other.close(stop_vms=False)
    await hand_over(driver, method, tools)
    assert await driver.resume("a", 10) == "running"
    await driver.release("a")
    await rig.only(tools.pid_of(driver, "a"))


async def test_a_crash_before_there_was_a_plan_leaves_nothing(rig: Any, tools: Any) -> None:
    driver = await rig.open({"a": SMALL})
    await rig.crash()
    (rig.folder / "state" / "vms" / "a.operations" / "op-1").mkdir(parents=True)
    driver._supervisor._launcher.claims("a", "op-1").mkdir()
    driver = await rig.open({"a": SMALL})
    await driver.prepare("a", "op-1", "swap", "")
    await driver.hand_over("a", tools.soon())
    await driver.release("a")


@METHODS
async def test_a_pause_before_anything_was_begun_is_left_by_the_guard(
    rig: Any, tools: Any, method: Any
) -> None:
    driver = await rig.open({"a": SMALL})
    await driver.prepare("a", "op-1", method, "")
    plan = driver.resume_plan("a")
    await qmp(driver).execute("stop")
    resume_vm(plan)
    assert condition(plan) == "gone"
    assert await qmp(driver).status() == "paused"
    await driver.release("a")


# -- a migration of ours that nobody has written down ----------------------------------------------------------------


async def test_our_migration_that_completes_while_the_guard_asks_whose_it_is(
    rig: Any, tools: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A swap's: the new process is stopped before it is asked, so that nothing can change behind the answer."""
    driver = await rig.open({"a": SMALL})
    await driver.prepare("a", "op-1", "swap", "")
    guest = driver._guests["a"]
    plan = guest.prepared.plan
    await driver._migrator._begin(guest, guest.prepared, guest.qmp, SWAP_CAPABILITIES)
    loop = asyncio.get_running_loop()
    stop = process_control.sigstop

    async def migrate() -> None:
        await guest.qmp.execute("migrate", uri=f"unix:{rig.folder}/run/a/mig")

    def late(pid: int, start_ticks: int) -> None:
        stop(pid, start_ticks)
        asyncio.run_coroutine_threadsafe(migrate(), loop).result()

    monkeypatch.setattr(qemu_swap, "sigstop", late)
    await asyncio.to_thread(resume_vm, plan)
    assert await asyncio.to_thread(condition, plan) == "running"
    await tools.until(lambda: condition(plan) == "running", "it to run for good")
    await driver.release("a")


async def test_our_migration_that_begins_while_the_guard_asks_whose_it_is(
    rig: Any, tools: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A replace's: the updater's last command is carried out after the guard's first look."""
    driver = await rig.open({"a": SMALL})
    await driver.prepare("a", "op-1", "replace", "")
    guest = driver._guests["a"]
    plan = guest.prepared.plan
    await driver._migrator._begin(guest, guest.prepared, guest.qmp, checkpointing.CAPABILITIES)
    file = os.open(f"{plan.state_file}.part", os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o600)
    await guest.qmp.pass_file(file, "caesura-state")
    os.close(file)
    await guest.qmp.execute("stop")
    loop, ask, asked = asyncio.get_running_loop(), qemu_replace.is_ours, list[bool]()

    def late(known: Any) -> bool:
        found = ask(known)
        if not asked:
            asked.append(found)
            sent = guest.qmp.execute("migrate", uri="fd:caesura-state")
            asyncio.run_coroutine_threadsafe(sent, loop).result()
        return found

    monkeypatch.setattr(qemu_replace, "is_ours", late)
    await asyncio.to_thread(resume_vm, plan)
    assert asked == [False]
    await tools.until(lambda: not under_way(plan), "the migration to end")
    assert await asyncio.to_thread(condition, plan) == "running"
    await driver.release("a")


def under_way(plan: Any) -> bool:
    """Whether the old process still migrates."""
    until = time.monotonic() + patient(5)
    with reach(plan.old.pid, plan.old.start_ticks, [plan.old.qmp], until) as asked:
        return migration(asked, until) in UNDER_WAY


# -- migration capabilities ------------------------------------------------------------------------------------------


async def test_capabilities_are_restored_when_the_guest_was_found_paused_by_its_operator(
    rig: Any, tools: Any
) -> None:
    driver = await rig.open({"a": SMALL})
    before = await capabilities(driver)
    await driver.prepare("a", "op-1", "replace", "")
    await driver.checkpoint("a", tools.soon())
    assert await driver.resume("a", 10) == "running"
    await qmp(driver).execute("stop")
    driver = await rig.open({"a": SMALL})
    assert await capabilities(driver) == before
    await qmp(driver).execute("cont")


async def test_capabilities_are_restored_when_the_operators_migration_is_over(
    rig: Any, tools: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "_LOOK_S", 0.05)
    driver = await rig.open({"a": SMALL})
    before = await capabilities(driver)
    await driver.prepare("a", "op-1", "replace", "")
    ours = checkpointing.save_state

    async def theirs_first(*arguments: Any, **more: Any) -> Any:
        await qmp(driver).execute("migrate-set-parameters", max_bandwidth=4096)
        await qmp(driver).execute("migrate", uri=f"exec:cat>{rig.folder}/a")
        return await ours(*arguments, **more)

    monkeypatch.setattr(migrations, "save_state", theirs_first)
    with pytest.raises(FreezeFailed):
        await hand_over(driver, "replace", tools)
    assert await driver.resume("a", 5) == "running"
    await driver.release("a")
    await qmp(driver).execute("migrate_cancel")
    async with asyncio.timeout(patient(20)):
        while await capabilities(driver) != before:  # noqa: ASYNC110 - nobody calls us
            await asyncio.sleep(0.02)


async def test_capabilities_that_the_new_qemu_does_not_know_keep_no_other_from_being_restored(
    rig: Any, tools: Any
) -> None:
    driver = await rig.open({"a": SMALL})
    before = await capabilities(driver)
    await driver.prepare("a", "op-1", "swap", "")
    kept = driver._supervisor._launcher.usual_capabilities("a")
    kept.write_text(json.dumps(before | {"of-another-version": True}))
    await driver.hand_over("a", tools.soon())
    await driver.release("a")
    assert await capabilities(driver) == before


@METHODS
async def test_capabilities_that_an_operator_sets_meanwhile_are_his(
    rig: Any, tools: Any, method: Any
) -> None:
    driver = await rig.open({"a": SMALL})
    await driver.prepare("a", "op-1", method, "")
    told = [{"capability": "auto-converge", "state": True}]
    await qmp(driver).execute("migrate-set-capabilities", capabilities=told)
    await driver.release("a")
    assert (await capabilities(driver))["auto-converge"]


@METHODS
async def test_the_guard_alone_leaves_no_guest_whose_memory_stays_behind(
    rig: Any, tools: Any, method: Any
) -> None:
    driver = await rig.open({"a": SMALL})
    await driver.prepare("a", "op-1", method, "")
    guest = driver._guests["a"]
    await driver._migrator._begin(guest, guest.prepared, guest.qmp, SWAP_CAPABILITIES)
    resume_vm(guest.prepared.plan)
    assert not (await capabilities(driver))["x-ignore-shared"]
    await driver.release("a")
