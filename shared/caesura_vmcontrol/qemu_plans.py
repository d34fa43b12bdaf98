"""The way out of freeze, swap and replace of a QEMU guest, as data: what the guard must know to complete it alone."""

# light imports on purpose: no pathlib here.
# ruff: noqa: PTH117

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from caesura_vmcontrol.plan_errors import BadPlan

SPARE = ".2"
"""The suffix of the path of a second QMP socket for the guard."""


def _path(what: str, path: object) -> None:
    if not isinstance(path, str) or not os.path.isabs(path) or os.path.normpath(path) != path or "\0" in path:
        raise BadPlan(f"{what} {path!r} is not an absolute path")


def _text(what: str, text: object) -> None:
    if not isinstance(text, str) or not text or "\0" in text:
        raise BadPlan(f"{what} {text!r} is not a text")


@dataclass(frozen=True)
class Vmm:
    """One QEMU process. ``qmp``: its QMP socket that no client keeps open; it listens there itself (not through a
    descriptor that another process made), so that the kernel can show whose socket it is. If there is a second one at
    ``qmp`` + ``SPARE``, it is used when a client of the first one was stopped.
    """

    pid: int
    start_ticks: int
    qmp: str

    def __post_init__(self) -> None:
        if any(type(number) is not int for number in (self.pid, self.start_ticks)):
            raise BadPlan("pid and start_ticks are whole numbers")
        if self.pid <= 1 or self.start_ticks < 0:
            raise BadPlan(f"{self.pid} cannot be a QEMU process")
        _path("the QMP socket", self.qmp)


@dataclass(frozen=True)
class QemuPlan:
    """Stopped with ``stop``; resumed with ``cont``."""

    vm: str
    vmm: Vmm


@dataclass(frozen=True)
class SwapPlan:
    """``new`` takes the guest over from ``old``, both alive. ``claims``: the folder of ``claims``."""

    vm: str
    old: Vmm
    new: Vmm
    claims: str

    def __post_init__(self) -> None:
        if self.old.pid == self.new.pid:
            raise BadPlan(f"process {self.old.pid} cannot take over from itself")
        _path("the claims folder", self.claims)


@dataclass(frozen=True)
class AcrossBoots:
    """What another boot of the host must know to load the guest from its files.

    Args:
        boot_id: of the boot in which the plan's pids and start times name processes. In any other one ``old`` is dead.
        fs_id: of the file system with the RAM file, see ``ram_places``; with inode and size it names the file in every boot.
        inode: of the RAM file.
        size: of the RAM file, in bytes.
        carve_out: where that file system is mounted.
        uid, gid, groups: as which the guest's process runs.
        folders: of the sockets of the new process; the next boot has an empty /run.
    """

    boot_id: str
    fs_id: str
    inode: int
    size: int
    carve_out: str
    uid: int
    gid: int
    groups: tuple[int, ...] = ()
    folders: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _text("the boot", self.boot_id)
        _text("the file system", self.fs_id)
        _path("the carve-out", self.carve_out)
        for folder in self.folders:
            _path("the sockets' folder", folder)
        numbers = (self.inode, self.size, self.uid, self.gid, *self.groups)
        if any(type(number) is not int or number < 0 for number in numbers):
            raise BadPlan("inode, size, user and groups are whole numbers")


@dataclass(frozen=True)
class ReplacePlan:
    """``old`` saves its state to a file and ends; another process is started from the file.

    Args:
        state_file: where the device state is once it was claimed; size and hash are in the claim.
        qmp: where the new process has its QMP socket for us, until its sockets are renamed onto the old one's.
        argv: complete command lines to try in turn, with ``-incoming defer -S``.
        environ: for the new process; contains ``mark``.
        mark: ``NAME=value`` in the environment of every new process of this operation and VM, whichever process started it.
        log: its output is appended here.
        beside: a new process can be started while the old one is still dying: they share no exclusive resource.
        ram: the guest's RAM file as it is now: path, device and inode. A QEMU would create a missing one again, full of
            zeros. None: not known.
        across: the host's kernel is replaced between ``old`` and the new process; None: both are of one boot.
    """

    vm: str
    old: Vmm
    claims: str
    state_file: str
    qmp: str
    argv: tuple[tuple[str, ...], ...]
    environ: tuple[tuple[str, str], ...]
    mark: str
    log: str
    ram: tuple[str, int, int] | None = None
    beside: bool = False
    across: AcrossBoots | None = None

    def __post_init__(self) -> None:
        if self.across is not None and self.ram is None:
            raise BadPlan(
                "over a change of the kernel a guest keeps nothing but its RAM file, and none is named"
            )
        _path("the claims folder", self.claims)
        _path("the state file", self.state_file)
        _path("the QMP socket", self.qmp)
        _path("the log", self.log)
        _text("the mark", self.mark)
        if self.ram is not None:
            _path("the RAM file", self.ram[0])
            if any(type(number) is not int for number in self.ram[1:]):
                raise BadPlan("a RAM file has a path, a device and an inode")
        if not self.argv or not all(self.argv):
            raise BadPlan("no command line")
        for argv in self.argv:
            _path("the program", argv[0])
            for word in argv:
                if not isinstance(word, str) or "\0" in word:
                    raise BadPlan(f"{word!r} is not an argument")
            if "-incoming" not in argv or "-S" not in argv:
                raise BadPlan(
                    "a command line without -incoming or -S would start another guest on this memory"
                )
        for name, value in self.environ:
            _text("the variable", name)
            if not isinstance(value, str) or "\0" in value or "=" in name:
                raise BadPlan(f"{name!r} is not a variable with a text")
        if self.mark not in {f"{name}={value}" for name, value in self.environ}:
            raise BadPlan(f"the mark {self.mark!r} is not in the environment")


VmmPlan = QemuPlan | SwapPlan | ReplacePlan


def to_json(plan: VmmPlan) -> dict[str, Any]:
    """As it is sent over the socket and written to disk."""
    kinds = {QemuPlan: "qemu", SwapPlan: "swap", ReplacePlan: "replace"}
    data = {**asdict(plan), "kind": kinds[type(plan)]}
    if data.get("across", data) is None:
        del data["across"]
    return data


def from_json(data: Mapping[str, Any]) -> VmmPlan:
    """Read a plan of one of the three kinds. Raises BadPlan, KeyError or TypeError."""
    vm = data["vm"]
    if data["kind"] == "qemu":
        return QemuPlan(vm, _vmm(data["vmm"]))
    if data["kind"] == "swap":
        return SwapPlan(vm, _vmm(data["old"]), _vmm(data["new"]), data["claims"])
    lines = data["argv"]
    if not isinstance(lines, list | tuple) or not all(isinstance(line, list | tuple) for line in lines):
        raise BadPlan("argv is a list of command lines, each a list of words")
    variables = data["environ"]
    if not isinstance(variables, list | tuple) or any(
        not isinstance(pair, list | tuple) or len(pair) != 2 for pair in variables
    ):
        raise BadPlan("environ is a list of pairs")
    return ReplacePlan(
        vm=vm,
        old=_vmm(data["old"]),
        claims=data["claims"],
        state_file=data["state_file"],
        qmp=data["qmp"],
        argv=tuple(tuple(line) for line in lines),
        environ=tuple((name, value) for name, value in variables),
        mark=data["mark"],
        log=data["log"],
        ram=_ram(data["ram"]),
        beside=_yes_or_no("beside", data["beside"]),
        across=_across(data.get("across")),
    )


def _across(data: Any) -> AcrossBoots | None:
    if data is None:
        return None
    fields = {**data, "groups": tuple(data["groups"]), "folders": tuple(data["folders"])}
    return AcrossBoots(**fields)


def _yes_or_no(what: str, data: Any) -> bool:
    if not isinstance(data, bool):
        raise BadPlan(f"{what} is true or false")
    return data


def _ram(data: Any) -> tuple[str, int, int] | None:
    if data is None:
        return None
    if not isinstance(data, list | tuple) or len(data) != 3:
        raise BadPlan("a RAM file has a path, a device and an inode")
    path, device, inode = data
    return path, device, inode


def _vmm(data: Any) -> Vmm:
    return Vmm(data["pid"], data["start_ticks"], data["qmp"])
