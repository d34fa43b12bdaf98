"""The host updater's side of the pause markers: in order, bounded, and only about its own VMs."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from caesura_host_updater import pause_markers
from caesura_host_updater.pause_markers import NotMarked, PauseMarkers, how_to_resume
from caesura_vmcontrol import claims, markers
from caesura_vmcontrol.libvirt_rpc import LibvirtPlan
from caesura_vmcontrol.markers import Marker
from caesura_vmcontrol.procfs import boot_id
from caesura_vmcontrol.qemu_plans import QemuPlan, SwapPlan, Vmm
from caesura_vmcontrol.resume_plans import CgroupPlan, ResumePlan, SignalPlan

A = CgroupPlan("a", "cgroup2", "/sys/fs/cgroup/x/a/cgroup.freeze")
B = CgroupPlan("b", "cgroup1", "/sys/fs/cgroup/freezer/x/b/freezer.state")


async def test_marked_until_removed(tmp_path: Path) -> None:
    kept = PauseMarkers(tmp_path)
    await kept.write("op", [A, B])
    found = await kept.read()
    assert {vm: marker.operation for vm, marker in found.items() if marker is not None} == {
        "a": "op",
        "b": "op",
    }
    kept.remove(["a"])
    assert list(await kept.read()) == ["b"]
    await kept.close()


async def test_what_a_slow_disk_takes_late_does_not_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk, real = threading.Event(), markers.write

    def slow(state_dir: str, found: Sequence[Marker]) -> None:
        disk.wait()
        real(state_dir, found)

    monkeypatch.setattr(markers, "write", slow)
    monkeypatch.setattr(pause_markers, "_WRITE_S", 0.05)
    kept = PauseMarkers(tmp_path)
    with pytest.raises(NotMarked, match="did not take the pause markers within"):
        await kept.write("op", [A])
    disk.set()
    assert dict(await kept.read()) == {}
    assert (tmp_path / "pauses").is_dir(), "it was written, late, and removed after that"
    await kept.close()


async def test_a_disk_that_hangs_does_not_hold_up_the_end_of_the_service(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = threading.Event()

    def hangs(_state_dir: str, _vms: object) -> list[str]:
        disk.wait()
        return []

    monkeypatch.setattr(markers, "remove", hangs)
    kept = PauseMarkers(tmp_path)
    kept.remove(["a"])
    await kept.close(patience_s=0.05)
    disk.set()


async def test_what_could_not_be_removed_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pause_markers, "_REMOVE_AGAIN_S", 0.01)
    kept = PauseMarkers(tmp_path)
    await kept.write("op", [A])
    refusing, real = threading.Event(), markers.remove
    refusing.set()
    monkeypatch.setattr(
        markers, "remove", lambda where, vms: list(vms) if refusing.is_set() else real(where, vms)
    )
    kept.remove(["a"])
    trying = asyncio.create_task(kept.remove_later())
    assert list(await kept.read()) == ["a"]
    refusing.clear()
    async with asyncio.timeout(20):
        while await kept.read():  # noqa: ASYNC110 - a thread's doing
            await asyncio.sleep(0.01)
    trying.cancel()
    await kept.close()


QEMU = QemuPlan("a", Vmm(4711, 9, "/run/a/guard"))
SWAP = SwapPlan("a", Vmm(4711, 9, "/run/a/guard"), Vmm(4712, 10, "/run/a/next/guard"), "/var/a")


@pytest.mark.parametrize(
    ("then", "now", "ours"),
    [
        (A, A, True),
        (A, CgroupPlan("a", "cgroup2", "/sys/fs/cgroup/y/a/cgroup.freeze"), False),
        (SignalPlan("a", 4711, 9), SignalPlan("a", 4711, 9, ((4712, 10),)), True),
        (SignalPlan("a", 4711, 9), SignalPlan("a", 4711, 10), False),
        (QEMU, QEMU, True),
        (QEMU, QemuPlan("a", Vmm(4711, 10, "/run/a/guard")), False),
        (SWAP, QemuPlan("a", Vmm(4712, 10, "/run/a/guard")), True),
        (SWAP, SWAP, True),
        (QEMU, None, True),
    ],
)
def test_whose_it_is(tmp_path: Path, then: ResumePlan, now: ResumePlan | None, ours: bool) -> None:
    kept = PauseMarkers(tmp_path)
    assert kept.is_ours(Marker("op", boot_id(), 1.0, then), now) is ours
    assert not kept.is_ours(Marker("op", "another boot", 1.0, then), now)
    assert kept.is_ours(None, now)


def test_how_it_is_resumed_is_said_in_words_that_can_be_typed() -> None:
    assert how_to_resume(A) == f"resume it with: echo 0 > {A.control}"
    assert how_to_resume(B) == f"resume it with: echo THAWED > {B.control}"
    assert how_to_resume(SignalPlan("a", 4711, 9)) == "resume it with: kill -CONT -4711"
    assert "cont on its QMP socket, such as /run/a/guard" in how_to_resume(QEMU)
    assert how_to_resume(None) == "resume it with what paused it"


async def test_a_claim_is_a_mark_too(tmp_path: Path) -> None:
    """Without a marker: of a guest that waits in a state file nobody but us knows."""
    kept = PauseMarkers(tmp_path)
    begun, only_prepared = tmp_path / "begun", tmp_path / "prepared"
    for folder in (begun, only_prepared):
        folder.mkdir()
    claims.claim(str(begun), 1, "old")
    plans: dict[str, ResumePlan | None] = {
        "begun": replace(SWAP, claims=str(begun)),
        "prepared": replace(SWAP, claims=str(only_prepared)),
        "over": replace(SWAP, claims=str(tmp_path / "none")),
        "stopped": QEMU,
        "lost": None,
    }
    assert await kept.claimed(plans) == ["begun"]
    await kept.close()


@pytest.mark.parametrize(
    ("number", "pid", "ours"), [(1, 4711, True), (1, 4712, False), (2, 0, False), (1, 0, True)]
)
def test_a_domain_that_was_started_again_is_not_the_one_that_was_marked(
    tmp_path: Path, number: int, pid: int, ours: bool
) -> None:
    """Somebody paused it since: that is not ours to end."""
    uuid = "783136f9-2b12-4ee3-8a40-5eee38a7cccd"
    then = LibvirtPlan("a", "/s", "qemu:///system", uuid, 1, 4711, 7)
    now = replace(then, number=number, pid=pid)
    assert PauseMarkers(tmp_path).is_ours(Marker("op", boot_id(), 1.0, then), now) is ours
