"""VMs that nobody wrote down: a folder with one folder per VM, named like it, that holds its sockets."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from caesura.contract.names import InvalidName, check_name
from caesura_host_updater.drivers.qemu.definition import Adopt, QemuVm


def discovered(folder: str, vm: str) -> Adopt | None:
    """The sockets of a VM below a folder; None: there is no QMP socket."""
    place = Path(folder) / vm
    if not folder or not (place / "qmp").exists():
        return None
    there = {name: str(place / name) if (place / name).exists() else "" for name in ("guard", "ga")}
    return Adopt(qmp=str(place / "qmp"), guard_qmp=there["guard"], guest_agent=there["ga"])


def discover(folder: str) -> tuple[list[str], dict[str, str]]:
    """The names of all VMs below a folder, and why others that look like one are none.

    A folder that is not there (yet) has no VMs.
    """
    found, passed = [], {}
    try:
        places = (
            sorted(place for place in Path(folder).iterdir() if (place / "qmp").exists()) if folder else []
        )
    except OSError as error:
        return [], {folder: error.strerror or str(error)} if Path(folder).exists() else {}
    for place in places:
        try:
            check_name("VM", place.name)
        except InvalidName as error:
            passed[str(place)] = str(error)
        else:
            found.append(place.name)
    return found, passed


def unnamed_vms(folder: str, known: Collection[str]) -> tuple[tuple[QemuVm, ...], dict[str, str]]:
    """A VM in no set for each one that is found and not ``known``; and who was passed over, and why."""
    names, passed = discover(folder)
    # Nobody said that an agent runs in it, so none is waited for.
    return tuple(QemuVm(name=name, agent=False) for name in names if name not in known), passed
