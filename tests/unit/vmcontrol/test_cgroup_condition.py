"""What the kernel's cgroup files say of a VM: asked to freeze is not frozen, and not running either (I2, I3)."""

from __future__ import annotations

import errno
import os
from typing import Literal

import pytest

from caesura_vmcontrol import freezer_control, procfs
from caesura_vmcontrol.freezer_control import Condition
from caesura_vmcontrol.resume_plans import CgroupPlan

_V2 = "/sys/fs/cgroup/x/a/cgroup.freeze"
_V1 = "/sys/fs/cgroup/freezer/x/a/freezer.state"


def _files(monkeypatch: pytest.MonkeyPatch, **files: str) -> None:
    def read(path: str) -> str:
        name = path.rpartition("/")[2].replace(".", "_")
        if name not in files:
            raise OSError(errno.ENODEV, "No such device")
        return files[name]

    monkeypatch.setattr(freezer_control, "_read", read)


@pytest.mark.parametrize(
    ("switch", "frozen", "populated", "wanted"),
    [
        ("0", "0", "1", "running"),
        ("1", "1", "1", "frozen"),
        ("1", "0", "1", "held"),  # asked for; a task in the kernel keeps it from taking
        ("0", "1", "1", "frozen"),  # a parent's switch, or a thaw that has not taken yet
        ("1", "1", "0", "gone"),
        ("0", "0", "0", "gone"),
    ],
)
def test_version_2(
    switch: str, frozen: str, populated: str, wanted: Condition, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Source: admin-guide/cgroup-v2.rst, "cgroup.events" and "cgroup.freeze"."""
    events = f"populated {populated}\nfrozen {frozen}\n"
    _files(monkeypatch, cgroup_events=events, cgroup_freeze=f"{switch}\n")
    assert freezer_control.cgroup_condition(CgroupPlan("a", "cgroup2", _V2)) == wanted


def test_a_kernel_that_does_not_say_whether_it_is_frozen_is_not_believed_to_have_frozen_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _files(monkeypatch, cgroup_events="populated 1\n", cgroup_freeze="1\n")
    assert freezer_control.cgroup_condition(CgroupPlan("a", "cgroup2", _V2)) == "held"


@pytest.mark.parametrize(
    ("state", "procs", "wanted"),
    [
        ("THAWED", "7\n", "running"),
        ("FROZEN", "7\n", "frozen"),
        ("FREEZING", "7\n", "held"),
        ("", "7\n", "held"),
        ("FROZEN", "", "gone"),
    ],
)
def test_version_1(state: str, procs: str, wanted: Condition, monkeypatch: pytest.MonkeyPatch) -> None:
    """Source: cgroup-v1/freezer-subsystem.rst: FREEZING lasts until every task has stopped."""
    _files(monkeypatch, freezer_state=f"{state}\n", cgroup_procs=procs)
    assert freezer_control.cgroup_condition(CgroupPlan("a", "cgroup1", _V1)) == wanted


@pytest.mark.parametrize(("kind", "control"), [("cgroup2", _V2), ("cgroup1", _V1)])
def test_a_cgroup_that_was_removed_is_gone(
    kind: Literal["cgroup1", "cgroup2"], control: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _files(monkeypatch)
    assert freezer_control.cgroup_condition(CgroupPlan("a", kind, control)) == "gone"


def test_a_process_that_cannot_be_looked_at_is_not_taken_for_dead(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a free descriptor the guard would give a living VM up."""
    own = procfs.read_process(os.getpid())
    assert own is not None

    def none_free(*_: object) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(procfs, "open", none_free, raising=False)
    assert procfs.alive(own.pid, own.start_ticks)
    assert procfs.read_process(own.pid) is None
