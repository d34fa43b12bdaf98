"""Three ways to freeze the processes of a VM: cgroup v2, cgroup v1, signals.

Each knows where a VM's processes are put, how to ask for the freeze, and the plan that undoes it. Whether
a freeze took is read from the kernel by ``caesura_vmcontrol.freezer_control.cgroup_condition``, the same for all.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Literal, Protocol

import msgspec

from caesura.runtime.errors import CaesuraError
from caesura_vmcontrol.freezer_control import FreezerChoice
from caesura_vmcontrol.procfs import Process, process_table, send_signal
from caesura_vmcontrol.resume_plans import CgroupPlan, SignalPlan
from caesura_vmcontrol.vm_control import condition, resume_vm

FreezerKind = Literal["cgroup2", "cgroup1", "sigstop"]

ProcessPlan = CgroupPlan | SignalPlan
"""How a VM that is a group of processes is resumed."""


class FreezerUnusable(CaesuraError):
    """This way of freezing does not work here; the text says why."""


class ProcessGroupRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A VM that was started: written by its first process, read by every later host updater."""

    pid: int
    start_ticks: int
    boot_id: str
    kind: FreezerKind
    control: str = ""


class Freezer(Protocol):
    """One way of freezing."""

    @property
    def kind(self) -> FreezerKind:
        """Its name in settings, logs and run files."""

    def create_cgroup(self, vm: str) -> str:
        """Make the place for a VM's processes; the file that controls it, empty where there is none."""

    def remove(self, vm: str) -> None:
        """Take the place away again; a place still in use stays."""


def plan_of(vm: str, run: ProcessGroupRecord, table: Mapping[int, Process] | None = None) -> ProcessPlan:
    """The plan that resumes this VM. With signals it holds the descendants of now, so make it fresh."""
    if run.kind != "sigstop":
        return CgroupPlan(vm, run.kind, run.control)
    bare = SignalPlan(vm, run.pid, run.start_ticks)
    others = tuple(
        (each.pid, each.start_ticks) for each in bare.members(process_table() if table is None else table)
    )
    return SignalPlan(vm, run.pid, run.start_ticks, others)


def request_freeze(plan: ProcessPlan, table: Mapping[int, Process] | None = None) -> None:
    """Ask the kernel to stop the VM; for signals call it again until ``condition`` says frozen.

    ``table`` saves reading the process table.

    Raises:
        OSError: the kernel refused.
    """
    if isinstance(plan, SignalPlan):
        for member in plan.members(process_table() if table is None else table):
            send_signal(member.pid, member.start_ticks, signal.SIGSTOP)
        return
    handle = os.open(plan.control, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(handle, b"1" if plan.kind == "cgroup2" else b"FROZEN")
    finally:
        os.close(handle)


def outside(plan: CgroupPlan, run: ProcessGroupRecord, table: Mapping[int, Process]) -> str:
    """What the VM's first process has below it that is not in the VM's cgroup, in words; empty if nothing is.

    A freeze does not hold it: something moved it (``podman``, ``systemd-run --scope``, ``cgexec``). Blocking.
    """
    held: set[int] = set()
    for folder, _, names in os.walk(Path(plan.control).parent):
        if "cgroup.procs" in names:
            with suppress(OSError):
                held.update(map(int, (Path(folder) / "cgroup.procs").read_text(encoding="ascii").split()))
    strays = [
        each.pid
        for each in SignalPlan(plan.vm, run.pid, run.start_ticks).members(table)
        if each.pid not in held
    ]
    return ", ".join(f"{pid} ({_name_of(pid)})" for pid in sorted(strays)[:5])


def _name_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text(errors="replace").strip()
    except OSError:
        return "?"


class CgroupFreezer:
    """The kernel's cgroup freezer, v1 or v2. VMs live in ``<base>/<vm>``.

    Raises:
        FreezerUnusable: no permission, or the kernel lacks the files.
    """

    def __init__(self, kind: Literal["cgroup1", "cgroup2"], base: Path) -> None:
        self._kind = kind
        self._base = base
        self._control = "cgroup.freeze" if kind == "cgroup2" else "freezer.state"
        probe = base / "_probe"
        try:
            probe.mkdir(parents=True, exist_ok=True)
            plan = CgroupPlan("_probe", kind, str(probe / self._control))
            request_freeze(plan)
            condition(plan)
        except (OSError, ValueError) as error:
            raise FreezerUnusable(f"{kind} under {base}: {error}") from error
        finally:
            # The base too, unless VMs are in it: a start that fails after this leaves nothing behind.
            with suppress(OSError):
                probe.rmdir()
                base.rmdir()

    @property
    def kind(self) -> FreezerKind:
        """``cgroup1`` or ``cgroup2``."""
        return self._kind

    def create_cgroup(self, vm: str) -> str:
        """Make the VM's cgroup."""
        folder = self._base / vm
        folder.mkdir(parents=True, exist_ok=True)
        # One that died while it was frozen leaves its switch on; the next to enter would be frozen at once.
        resume_vm(CgroupPlan(vm, self._kind, str(folder / self._control)))
        return str(folder / self._control)

    def remove(self, vm: str) -> None:
        """Remove the VM's cgroup, and the base with the last one."""
        with suppress(OSError):
            (self._base / vm).rmdir()
        with suppress(OSError):
            self._base.rmdir()


class SignalFreezer:
    """SIGSTOP and SIGCONT: works everywhere, for processes of our own user."""

    @property
    def kind(self) -> FreezerKind:
        """``sigstop``."""
        return "sigstop"

    def create_cgroup(self, vm: str) -> str:  # noqa: ARG002 - the port's signature
        """Signals need no place."""
        return ""

    def remove(self, vm: str) -> None:
        """Signals need no place."""


def freezer_mounts(mountinfo: str) -> dict[str, Path]:
    """Mount points of the two cgroup hierarchies that can freeze. Pure; source: proc_pid_mountinfo(5).

    Returns:
        ``cgroup2`` and ``cgroup1`` (the one with the freezer controller), where mounted.
    """
    found: dict[str, Path] = {}
    for line in mountinfo.splitlines():
        left, _, right = line.partition(" - ")
        fields, kind = left.split(), right.split()
        if len(fields) < 5 or not kind:
            continue
        if kind[0] == "cgroup2":
            found.setdefault("cgroup2", Path(fields[4]))
        elif kind[0] == "cgroup" and "freezer" in kind[-1].split(","):
            found.setdefault("cgroup1", Path(fields[4]))
    return found


def own_cgroups(cgroup: str) -> dict[str, str]:
    """Our own place in the two hierarchies, from ``/proc/self/cgroup``. Pure; source: cgroups(7)."""
    found: dict[str, str] = {}
    for line in cgroup.splitlines():
        number, controllers, path = line.split(":", 2)
        if number == "0":
            found["cgroup2"] = path
        elif "freezer" in controllers.split(","):
            found["cgroup1"] = path
    return found


def choose_freezer(wanted: FreezerChoice, group: str) -> tuple[Freezer, Mapping[str, str]]:
    """The first usable freezer of the order cgroup2, cgroup1, sigstop, or the one that is wanted.

    Args:
        group: name of the cgroup below our own that holds this host's VMs.

    Returns:
        The freezer, and why each better one was passed over.

    Raises:
        FreezerUnusable: the one that was asked for by name does not work here.
    """
    passed: dict[str, str] = {}
    mounts = freezer_mounts(Path("/proc/self/mountinfo").read_text(encoding="utf-8"))
    own = own_cgroups(Path("/proc/self/cgroup").read_text(encoding="utf-8"))
    kinds: tuple[Literal["cgroup1", "cgroup2"], ...] = ("cgroup2", "cgroup1")
    for kind in kinds:
        if wanted not in ("auto", kind):
            continue
        try:
            return CgroupFreezer(kind, _base(kind, mounts, own) / group), passed
        except FreezerUnusable as error:
            if wanted == kind:
                raise
            passed[kind] = str(error)
    return SignalFreezer(), passed


def _base(kind: str, mounts: Mapping[str, Path], own: Mapping[str, str]) -> Path:
    if kind not in mounts or kind not in own:
        raise FreezerUnusable(f"{kind} is not mounted")
    return mounts[kind] / own[kind].lstrip("/")
