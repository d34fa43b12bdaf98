"""Pauses that another process was asked for and did not answer: undone once, remembered on disk, forgotten when they cannot come."""

from __future__ import annotations

import asyncio
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from caesura_host_updater.drivers import remote_pauses
from caesura_host_updater.drivers.libvirt.resume_paths import is_same_life
from caesura_host_updater.drivers.remote_pauses import LatePauses
from caesura_vmcontrol.libvirt_rpc import LibvirtPlan

_UUID = "783136f9-2b12-4ee3-8a40-5eee38a7cccd"
_PLAN = LibvirtPlan("a", "/s", "qemu:///system", _UUID, 1, 4711, 7)


class World:
    """One VM, and what was expected of it."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self.state = "running"
        self.plan: LibvirtPlan | None = _PLAN
        self.excluded = False
        self.asked = 0
        monkeypatch.setattr(remote_pauses, "condition", lambda _: self.state)
        monkeypatch.setattr(remote_pauses, "resume_vm", lambda _: setattr(self, "state", "running"))
        monkeypatch.setattr(remote_pauses, "_ASK_AGAIN_S", 0.0)

    def _exclude(self, _: LibvirtPlan) -> bool:
        self.asked += 1
        return self.excluded

    async def begin(self) -> LatePauses[LibvirtPlan]:
        """A driver that is opened."""
        late = LatePauses(lambda _: self.plan, "libvirt", self.folder, is_same_life, self._exclude)
        await late.open(LibvirtPlan)
        return late


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    return World(tmp_path, monkeypatch)


async def test_a_late_pause_is_undone_once_and_the_next_one_is_somebody_elses(world: World) -> None:
    late = await world.begin()
    late.expect(_PLAN)
    world.state = "frozen"
    await late.undo()
    assert world.state == "running"
    world.state = "frozen"  # virsh suspend
    await late.undo()
    assert world.state == "frozen"
    await late.close()
    assert list(world.folder.iterdir()) == []


async def test_it_is_undone_by_the_next_life_of_the_updater(world: World) -> None:
    before = await world.begin()
    before.expect(_PLAN)
    await before.close()
    late = await world.begin()
    world.state = "frozen"
    await late.undo()
    assert world.state == "running"
    await late.close()
    assert "a" not in await world.begin()


async def test_another_life_of_the_vm_was_not_asked_to_pause(world: World) -> None:
    late = await world.begin()
    late.expect(_PLAN)
    world.plan = replace(_PLAN, number=2, pid=4712)
    world.state = "frozen"
    await late.undo()
    assert world.state == "frozen"
    assert "a" not in late
    await late.close()


async def test_notes_of_another_boot_and_damaged_ones_are_removed(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = await world.begin()
    before.expect(_PLAN)
    await before.close()
    (world.folder / "b.late").write_bytes(b"{")
    monkeypatch.setattr(remote_pauses, "boot_id", lambda: "another")
    assert "a" not in await world.begin()
    assert list(world.folder.iterdir()) == []


async def test_it_is_expected_as_long_as_it_may_come(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Storage that is back after an hour."""
    monkeypatch.setattr(remote_pauses, "_LATE_S", -1.0)
    late = await world.begin()
    late.expect(_PLAN)
    for _ in range(3):
        await late.undo()
    assert world.asked == 3
    assert "a" in late
    world.state = "frozen"
    await late.undo()
    assert (world.state, world.asked) == ("running", 3)
    late.expect(_PLAN)
    world.excluded = True
    await late.undo()
    assert "a" not in late
    await late.close()


async def test_a_pause_of_ours_that_begins_in_the_meantime_is_not_asked_about(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The question whether a pause can still come is a resume."""
    monkeypatch.setattr(remote_pauses, "_LATE_S", -1.0)
    late = await world.begin()
    late.expect(_PLAN)

    def looked(_: LibvirtPlan) -> str:
        late._pop("a")  # as `forget` does, in the thread of the freeze
        return "running"

    monkeypatch.setattr(remote_pauses, "condition", looked)
    await late.undo()
    assert world.asked == 0
    assert "a" not in late
    await late.close()


async def test_a_new_pause_of_ours_is_told_of_an_earlier_one(world: World) -> None:
    late = await world.begin()
    assert not late.forget(_PLAN)
    late.expect(_PLAN)
    assert late.forget(_PLAN)
    world.state = "frozen"
    await late.undo()
    assert world.state == "frozen", "it is ours now"
    await late.close()


async def test_one_that_is_not_listed_is_looked_at_by_its_noted_plan(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its daemon was away since the updater's start, or an edited label gave it another name."""
    monkeypatch.setattr(remote_pauses, "_LATE_S", -1.0)
    late = await world.begin()
    late.expect(_PLAN)
    world.plan = None
    world.state = "frozen"
    await late.undo()
    assert world.state == "running"
    await late.close()


async def test_one_of_which_nobody_says_anything_stays_noted(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote_pauses, "_LATE_S", -1.0)

    def silent(_: LibvirtPlan) -> str:
        raise OSError("no answer")

    late = await world.begin()
    late.expect(_PLAN)
    world.plan = None
    world.excluded = True
    with monkeypatch.context() as patched:
        patched.setattr(remote_pauses, "condition", silent)
        await late.undo()
    assert "a" in late
    world.state = "gone"
    await late.undo()
    assert "a" not in late, "its end is an answer"
    await late.close()


async def test_a_new_pause_under_another_name_is_ours_too(world: World) -> None:
    late = await world.begin()
    late.expect(_PLAN)
    world.plan = replace(_PLAN, vm="b")
    assert late.forget(world.plan)
    world.state = "frozen"
    await late.undo()
    assert world.state == "frozen"
    await late.close()


def test_another_domain_is_never_the_same_life() -> None:
    """A daemon that was restarted gives ids again, and without a process there is nothing else."""
    one = replace(_PLAN, pid=0, start_ticks=0)
    assert is_same_life(one, replace(one, vm="b"))
    assert not is_same_life(one, replace(one, vm="b", uuid=_UUID.replace("7", "6")))


async def test_an_undoing_delays_only_a_new_pause_of_its_own_vm(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A daemon that is slow about one VM; a resume is over when the VM runs, whatever is done beside it."""
    begun, go = threading.Event(), threading.Event()

    def slow(_: LibvirtPlan) -> str:
        begun.set()
        go.wait()
        return "running"

    monkeypatch.setattr(remote_pauses, "condition", slow)
    late = await world.begin()
    late.expect(_PLAN)
    undoing = asyncio.create_task(late.undo())
    await asyncio.to_thread(begun.wait)
    other = replace(_PLAN, vm="b", uuid=_UUID.replace("7", "6"), number=2, pid=4712)
    forgotten = threading.Event()

    def forget() -> None:
        late.forget(_PLAN)
        forgotten.set()

    try:
        async with asyncio.timeout(60):
            assert not await asyncio.to_thread(late.forget, other)
        own = asyncio.create_task(asyncio.to_thread(forget))
        assert not await asyncio.to_thread(forgotten.wait, 0.05), "it waits for the end of the undoing"
        late.forget_resumed("a")  # does not wait
        assert "a" not in late
    finally:
        go.set()
    await asyncio.gather(undoing, own)
    await late.close()


async def test_one_that_hangs_delays_the_undoing_of_no_other(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    go = threading.Event()

    def look(plan: LibvirtPlan) -> str:
        if plan.vm == "a":
            go.wait()
        return world.state

    monkeypatch.setattr(remote_pauses, "condition", look)
    late = await world.begin()
    world.plan = None
    for plan in (_PLAN, replace(_PLAN, vm="b", uuid=_UUID.replace("7", "6"), number=2, pid=4712)):
        late.expect(plan)
    world.state = "frozen"
    undoing = asyncio.create_task(late.undo())
    try:
        async with asyncio.timeout(60):
            while "b" in late:  # noqa: ASYNC110 - a thread's work
                await asyncio.sleep(0.01)
        assert "a" in late
    finally:
        go.set()
    await undoing
    await late.close()
