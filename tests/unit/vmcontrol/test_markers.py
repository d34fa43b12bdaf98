"""Pause markers and the sealed intent: what is read back, and that nothing damaged is taken for something else."""

from __future__ import annotations

import json
import os
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from caesura_vmcontrol import markers
from caesura_vmcontrol.intent import GuardAction, Intent, IntentFile, Intervention, UnreadableIntent
from caesura_vmcontrol.markers import Marker
from caesura_vmcontrol.qemu_plans import QemuPlan, SwapPlan, Vmm
from caesura_vmcontrol.resume_plans import CgroupPlan, ResumePlan, SignalPlan, plan_to_json
from caesura_vmcontrol.sealed_files import Damaged, seal, unseal

CONTROL = "/sys/fs/cgroup/x/a/cgroup.freeze"
PLANS: tuple[ResumePlan, ...] = (
    CgroupPlan("a", "cgroup2", CONTROL),
    SignalPlan("b", 4711, 99, ((4712, 100),)),
    QemuPlan("c", Vmm(4713, 101, "/run/c/guard")),
    SwapPlan("d", Vmm(4714, 102, "/run/d/guard"), Vmm(4715, 103, "/run/d/next/guard"), "/var/d"),
)


def of(plan: ResumePlan) -> Marker:
    """A marker of this boot."""
    return Marker("op", "boot", 12.5, plan)


def test_what_was_written_is_read_back_until_it_is_removed(tmp_path: Path) -> None:
    written = [of(plan) for plan in PLANS]
    markers.write(str(tmp_path), written)
    assert markers.read(str(tmp_path)) == {marker.vm: marker for marker in written}
    assert markers.remove(str(tmp_path), ["a", "b", "nobody"]) == []
    assert sorted(markers.read(str(tmp_path))) == ["c", "d"]
    assert (tmp_path / "pauses").stat().st_mode & 0o077 == 0


def test_many_are_synced_side_by_side_and_before_it_returns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One after the other the barrier would never open; with ``os.sync`` left out nothing would be counted."""
    together = threading.Barrier(20, timeout=20)
    synced: list[int] = []
    real = os.fsync

    def fsync(handle: int) -> None:
        if not Path(f"/proc/self/fd/{handle}").is_dir():
            together.wait()
            synced.append(handle)
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    markers.write(str(tmp_path), [of(CgroupPlan(f"vm-{number}", "cgroup2", CONTROL)) for number in range(20)])
    assert len(synced) == 20


def test_on_a_disk_that_refuses_none_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = 0
    turn = threading.Lock()

    def fsync(_: int) -> None:
        nonlocal calls
        with turn:
            calls += 1
            if calls == 3:
                raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match="No space left"):
        markers.write(str(tmp_path), [of(plan) for plan in PLANS])
    assert markers.read(str(tmp_path)) == {}


def damaged(raw: bytes) -> list[bytes]:
    """The bytes, cut at every place and with each of their bits flipped once."""
    flipped = []
    for place in range(len(raw)):
        for bit in range(8):
            changed = bytearray(raw)
            changed[place] ^= 1 << bit
            flipped.append(bytes(changed))
    return [raw[:length] for length in range(len(raw))] + flipped


def test_no_damage_goes_unnoticed() -> None:
    raw = seal(of(PLANS[1]).to_json())
    assert Marker.from_json(unseal(raw)) == of(PLANS[1])
    for each in damaged(raw):
        with pytest.raises(Damaged):
            unseal(each)


@pytest.mark.parametrize(
    "content", [b"", b"{}", seal({}), seal({"format": 2}), seal([]), seal({"format": 1})]
)
def test_a_marker_that_cannot_be_read_still_counts(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "pauses").mkdir()
    (tmp_path / "pauses" / "a.json").write_bytes(content)
    assert markers.read(str(tmp_path)) == {"a": None}


def test_a_marker_under_another_name_counts_as_damaged(tmp_path: Path) -> None:
    markers.write(str(tmp_path), [of(PLANS[0])])
    (tmp_path / "pauses" / "a.json").rename(tmp_path / "pauses" / "z.json")
    assert markers.read(str(tmp_path)) == {"z": None}


@pytest.mark.parametrize(
    ("file", "content", "wanted"),
    [
        (
            "a.run.json",
            {"pid": 4711, "start_ticks": 9, "boot_id": "boot", "kind": "cgroup2", "control": CONTROL},
            PLANS[0],
        ),
        (
            "a.run.json",
            {"pid": 4711, "start_ticks": 9, "boot_id": "boot", "kind": "sigstop", "control": ""},
            SignalPlan("a", 4711, 9),
        ),
        (
            "a.qemu.json",
            {"pid": 4711, "start_ticks": 9, "boot_id": "boot", "guard": "/run/a/guard", "argv": []},
            QemuPlan("a", Vmm(4711, 9, "/run/a/guard")),
        ),
        ("a.qemu.json", {"pid": 4711, "start_ticks": 9, "boot_id": "another", "guard": "/run/a/guard"}, None),
        ("a.qemu.json", {"pid": 4711}, None),
        ("b.run.json", {}, None),
    ],
)
def test_the_way_out_of_a_vm_whose_marker_is_damaged(
    tmp_path: Path, file: str, content: dict[str, Any], wanted: ResumePlan | None
) -> None:
    (tmp_path / "vms").mkdir()
    (tmp_path / "vms" / file).write_text(json.dumps(content))
    assert markers.recovery_plan(str(tmp_path), "a", "boot") == wanted


def test_what_a_swap_prepared_comes_before_the_run_file(tmp_path: Path) -> None:
    folder = tmp_path / "vms" / "d.operations" / "op"
    folder.mkdir(parents=True)
    (folder / "plan.json").write_text(json.dumps({**plan_to_json(PLANS[3]), "boot_id": "boot"}))
    (tmp_path / "vms" / "d.qemu.json").write_text("{")
    assert markers.recovery_plan(str(tmp_path), "d", "boot") == PLANS[3]


# -- the guard's intent ----------------------------------------------------------------------------------------


def intent() -> Intent:
    fired = GuardAction("why", 13.0, {"a": Intervention(was_frozen=True, running_at=13.5, end="running")})
    return Intent("op", "boot", 12.0, 20.0, PLANS[:2], fired)


def test_every_cut_and_every_flipped_bit_of_an_intent_is_noticed(ram_path: Path) -> None:
    store = IntentFile(str(ram_path))
    store.store(intent())
    assert store.load() == intent()
    path = ram_path / "guard-intent.json"
    raw = path.read_bytes()
    for each in damaged(raw)[:: 1 + len(raw) // 400]:
        path.write_bytes(each)
        with pytest.raises(UnreadableIntent):
            store.load()
        assert (ram_path / "guard-intent.json.unreadable").read_bytes() == each
    for length in range(len(raw)):
        path.write_bytes(raw[:length])
        with pytest.raises(UnreadableIntent):
            store.load()
    with suppress(FileNotFoundError):
        path.unlink()
    assert store.load() is None


def test_an_intent_of_before_there_were_checksums_is_still_read(tmp_path: Path) -> None:
    (tmp_path / "guard-intent.json").write_text(json.dumps(intent().to_json()))
    assert IntentFile(str(tmp_path)).load() == intent()
