"""Claims: one decision, whoever makes it, at any moment. And the plans of QEMU guests over JSON."""

from __future__ import annotations

import errno
import json
import os
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from caesura_vmcontrol.claims import (
    BadClaim,
    Owner,
    claim,
    current,
    failures,
    note_failure,
    parse_owner,
)
from caesura_vmcontrol.plan_errors import BadPlan
from caesura_vmcontrol.qemu_plans import QemuPlan, ReplacePlan, SwapPlan, Vmm
from caesura_vmcontrol.resume_plans import ResumePlan, plan_from_json, plan_to_json

HASH = "0123456789abcdef" * 4
OWNERS = [
    ("old", Owner("old")),
    ("gone", Owner("gone")),
    ("new:4711:815", Owner("new", pid=4711, start_ticks=815)),
    (f"file:350000:{HASH}", Owner("file", size_bytes=350000, sha256=HASH)),
]


@pytest.mark.parametrize(("text", "owner"), OWNERS)
def test_texts(text: str, owner: Owner) -> None:
    assert parse_owner(text) == owner
    assert owner.text == text


@pytest.mark.parametrize(
    "text",
    ["", "OLD", "old ", "new", "new:1", "new:a:b", "new:0:1", "new:-1:1", "new:1:1:1", "new:1:\n1", "file:1:2",
     f"file:0:{HASH}", f"file:1:{HASH.upper()}", f"file:1:{HASH}0", "new:99999999999:1"],
)  # fmt: skip
def test_what_is_no_claim(text: str, tmp_path: Path) -> None:
    with pytest.raises(BadClaim):
        parse_owner(text)
    with pytest.raises(BadClaim):
        claim(str(tmp_path), 1, text)
    assert current(str(tmp_path)) == (0, None)


def test_the_first_one_decides_and_the_highest_number_stands(tmp_path: Path) -> None:
    folder = str(tmp_path)
    assert current(folder) == (0, None)
    assert claim(folder, 1, "new:7:8") == "new:7:8"
    assert claim(folder, 1, "old") == "new:7:8"
    assert current(folder) == (1, Owner("new", 7, 8))
    for number in range(2, 12):  # ten is more than nine
        assert claim(folder, number, f"new:7:{number}") == f"new:7:{number}"
    assert current(folder) == (11, Owner("new", 7, 11))
    (tmp_path / "plan.json").touch()
    note_failure(folder, "it is no number")
    assert current(folder)[0] == 11


def test_no_folder_is_no_claim_and_takes_none(tmp_path: Path) -> None:
    folder = str(tmp_path / "over")
    assert current(folder) == (0, None)
    with pytest.raises(FileNotFoundError):
        claim(folder, 1, "old")
    note_failure(folder, "nobody cares any more")
    assert failures(folder) == []


def test_what_others_wrote_is_not_believed(tmp_path: Path) -> None:
    (tmp_path / "1").symlink_to("/etc/passwd")
    with pytest.raises(BadClaim, match="/etc/passwd"):
        current(str(tmp_path))


def test_threads_agree(tmp_path: Path) -> None:
    """Many claim at once: everybody is told the same."""
    for turn in range(30):
        folder = tmp_path / str(turn)
        folder.mkdir()
        told: list[str] = []
        start = threading.Barrier(6)

        def decide(text: str, folder: Path = folder, told: list[str] = told, start: Any = start) -> None:
            start.wait()
            told.append(claim(str(folder), 1, text))

        texts = ["old", "gone", *(f"new:{pid}:1" for pid in range(2, 6))]
        threads = [threading.Thread(target=decide, args=(text,)) for text in texts]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        standing = current(str(folder))[1]
        assert standing is not None
        assert set(told) == {standing.text}
        assert len(told) == 6


def test_failures_are_kept_in_order(tmp_path: Path) -> None:
    folder = str(tmp_path)
    for number in range(12):
        note_failure(folder, f"why\n number\0{number}")
    note_failure(folder, "")
    note_failure(folder, "ö" * 5000)
    assert failures(folder)[:12] == [f"why number {number}" for number in range(12)]
    assert failures(folder)[12] == "no reason"
    assert set(failures(folder)[13]) == {"ö"}


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Long texts need a block, short ones do not; the state file can be claimed again all the same."""
    folder, file = str(tmp_path), f"file:350000:{HASH}"
    assert claim(folder, 1, file) == file
    real = os.symlink

    def full(text: str, path: str) -> None:
        if len(text) > 59:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(text, path)

    monkeypatch.setattr(os, "symlink", full)
    note_failure(folder, "x" * 300)
    assert failures(folder) == ["x" * 59]
    assert claim(folder, 2, file) == file
    assert claim(folder, 2, "old") == file
    assert claim(folder, 3, "new:5:6") == "new:5:6"
    with pytest.raises(OSError, match="No space"):
        claim(folder, 4, f"file:1:{HASH}")
    assert current(folder) == (3, Owner("new", 5, 6))
    for number in range(1, 4):
        (tmp_path / str(number)).unlink()
    with pytest.raises(OSError, match="No space"):
        claim(folder, 1, file)
    assert current(folder) == (0, None)


# -- plans --------------------------------------------------------------------------------------------------------

OLD = Vmm(100, 5, "/run/x/vm/guard")
NEW = Vmm(200, 6, "/run/x/vm/next/guard")
ARGV = ("/usr/bin/qemu-system-x86_64", "-incoming", "defer", "-S")
REPLACE = ReplacePlan(
    vm="vm",
    old=OLD,
    claims="/state/vm.claims/op",
    state_file="/state/vm.state",
    qmp="/run/x/vm/next/guard",
    argv=(ARGV, ("/opt/old/qemu", *ARGV[1:])),
    environ=(("PATH", "/bin"), ("MARK", "op=1")),
    mark="MARK=op=1",
    log="/state/vm.log",
    ram=("/ram/vm.ram", 25, 4711),
)
PLANS: list[ResumePlan] = [QemuPlan("vm", OLD), SwapPlan("vm", OLD, NEW, "/state/vm.claims/op"), REPLACE]


@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: type(plan).__name__)
def test_plans_survive_json(plan: ResumePlan) -> None:
    told = json.loads(json.dumps(plan_to_json(plan)))
    assert plan_from_json(told) == plan
    for key in told:
        if key != "kind":
            with pytest.raises(BadPlan):
                plan_from_json({name: value for name, value in told.items() if name != key})
            with pytest.raises(BadPlan):
                plan_from_json(told | {key: 7})


def test_what_no_plan_may_say() -> None:
    for pid, ticks, qmp in [
        (1, 1, "/x"),
        (0, 1, "/x"),
        (-5, 1, "/x"),
        (2, -1, "/x"),
        (2, 1, "x"),
        (2, 1, "/a/../x"),
    ]:
        with pytest.raises(BadPlan):
            Vmm(pid, ticks, qmp)
    for number in (True, 2.0, "2", None):
        with pytest.raises(BadPlan):
            plan_from_json(plan_to_json(PLANS[0]) | {"vmm": {"pid": number, "start_ticks": 1, "qmp": "/x"}})
    with pytest.raises(BadPlan, match="itself"):
        SwapPlan("vm", OLD, OLD, "/x")
    changes: list[dict[str, Any]] = [
        {"argv": ()},
        {"argv": ((),)},
        {"argv": (("qemu", "-incoming", "defer", "-S"),)},
        {"argv": ((*ARGV, "\0"),)},
        {"argv": ((*ARGV[:-1],),)},
        {"argv": (("/bin/qemu", "-S"),)},
        {"environ": ()},
        {"environ": (("MARK=op", "1"),)},
        {"environ": (("MARK", "op=1"), ("X", "\0"))},
        {"mark": ""},
        {"mark": "OTHER=1"},
        {"log": "log"},
        {"state_file": ""},
    ]
    for change in changes:
        with pytest.raises(BadPlan):
            replace(REPLACE, **change)
    for wrong in (
        {"argv": "qemu -S"},
        {"argv": ["qemu"]},
        {"environ": ["MARK=op=1"]},
        {"environ": [["MARK"]]},
    ):
        with pytest.raises(BadPlan):
            plan_from_json(plan_to_json(REPLACE) | wrong)
