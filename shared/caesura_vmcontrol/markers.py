"""The pause marker: one small file a VM that says "Caesura pauses this one", and how it is resumed.

It is on disk before the VM is frozen and is removed when the VM was seen to run again. It is self-contained: neither
the journal nor the guard's intent is needed to read it. So a VM that is found paused *with* a marker is resumed,
whatever else was lost; a VM *without* one was paused by somebody else and is left alone.

``pauses/VM.json`` in the state folder, sealed. A damaged one counts as a marker: only we write there. Its way out
is then taken from the VM's run files.
"""

# light imports on purpose: no pathlib here.
# ruff: noqa: PTH103, PTH108, PTH123, PTH208

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from caesura_vmcontrol.durable_files import sync_folder
from caesura_vmcontrol.plan_errors import BadPlan
from caesura_vmcontrol.qemu_plans import QemuPlan, Vmm
from caesura_vmcontrol.resume_plans import CgroupPlan, ResumePlan, SignalPlan, plan_from_json, plan_to_json
from caesura_vmcontrol.sealed_files import Damaged, seal, unseal

FOLDER = "pauses"
OPERATIONS = ".operations"
"""The suffix of the folder, beside a VM's run file, with what was prepared for operations on it."""
_FORMAT = 1
_END = ".json"
_BATCH = 64  # files that are open at once


@dataclass(frozen=True)
class Marker:
    """A VM that an operation pauses. ``at``: when it was written, seconds on the CLOCK_MONOTONIC of boot ``boot_id``."""

    operation: str
    boot_id: str
    at: float
    plan: ResumePlan

    @property
    def vm(self) -> str:
        """The VM."""
        return self.plan.vm

    def to_json(self) -> dict[str, Any]:
        """As it is in the file."""
        return {
            "format": _FORMAT,
            "operation": self.operation,
            "boot_id": self.boot_id,
            "at": self.at,
            "plan": plan_to_json(self.plan),
        }

    @classmethod
    def from_json(cls, data: Any) -> Marker:
        """Read a marker. Raises Damaged."""
        try:
            if data["format"] != _FORMAT:
                raise Damaged(f"a pause marker of format {data['format']}, this version knows {_FORMAT}")
            plan = plan_from_json(data["plan"])
            return cls(str(data["operation"]), str(data["boot_id"]), float(data["at"]), plan)
        except (KeyError, TypeError, ValueError, BadPlan) as error:
            raise Damaged(f"the pause marker cannot be read: {error}") from error


def write(state_dir: str, markers: Sequence[Marker]) -> None:
    """Make the markers of one operation durable, all of them or none. Blocking.

    The files are written first and then synced concurrently: one round of the disk for all VMs.

    Raises:
        OSError: the disk refused; nothing may be frozen.
    """
    folder = f"{state_dir}/{FOLDER}"
    os.makedirs(folder, mode=0o700, exist_ok=True)
    try:
        for start in range(0, len(markers), _BATCH):
            _write_batch(folder, markers[start : start + _BATCH])
        sync_folder(folder)
        sync_folder(state_dir)
    except OSError:
        remove(state_dir, [marker.vm for marker in markers])
        raise


def _write_batch(folder: str, markers: Sequence[Marker]) -> None:
    handles: list[int] = []
    try:
        for marker in markers:
            flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW
            handles.append(os.open(f"{folder}/{marker.vm}{_END}", flags, 0o600))
            left = seal(marker.to_json())
            while left:
                left = left[os.write(handles[-1], left) :]
        failed: list[OSError] = []
        threads = [
            threading.Thread(target=_fsync, args=(handle, failed), daemon=True) for handle in handles[1:]
        ]
        for thread in threads:
            thread.start()
        for handle in handles[:1]:
            _fsync(handle, failed)
        for thread in threads:
            thread.join()
        if failed:
            raise failed[0]
    finally:
        for handle in handles:
            os.close(handle)


def _fsync(handle: int, failed: list[OSError]) -> None:
    try:
        os.fsync(handle)
    except OSError as error:
        failed.append(error)


def remove(state_dir: str, vms: Iterable[str]) -> list[str]:
    """The VMs run: remove their markers. Returns the names whose marker could not be removed. Blocking.

    Not synced: a marker that reappears after a crash of the host belongs to another boot.
    """
    left = []
    for vm in vms:
        try:
            os.unlink(f"{state_dir}/{FOLDER}/{vm}{_END}")
        except FileNotFoundError:
            continue
        except OSError:
            left.append(vm)
    return left


def read(state_dir: str) -> dict[str, Marker | None]:
    """Every VM with a marker; None where it is damaged. Blocking. A folder that cannot be read holds none."""
    found: dict[str, Marker | None] = {}
    try:
        names = os.listdir(f"{state_dir}/{FOLDER}")
    except OSError:
        return found
    for name in sorted(names):
        vm = name.removesuffix(_END)
        if vm == name:
            continue
        found[vm] = None
        with suppress(OSError, Damaged):
            with open(f"{state_dir}/{FOLDER}/{name}", "rb") as file:
                marker = Marker.from_json(unseal(file.read()))
            found[vm] = marker if marker.vm == vm else None
    return found


def recovery_plan(state_dir: str, vm: str, boot: str) -> ResumePlan | None:
    """The way out of a pause as far as the VM's run files show it, for a marker that is damaged. Blocking.

    The files are those of the drivers: what a swap or replace prepared, a QEMU's run file, a process VM's.
    """
    folder = f"{state_dir}/vms"
    for operation in _names(f"{folder}/{vm}{OPERATIONS}"):
        with suppress(OSError, ValueError, KeyError, TypeError, BadPlan):
            raw = _json(f"{folder}/{vm}{OPERATIONS}/{operation}/plan.json")
            if raw["boot_id"] == boot:
                return plan_from_json(raw)
    with suppress(OSError, ValueError, KeyError, TypeError, BadPlan):
        run = _json(f"{folder}/{vm}.qemu.json")
        if run["boot_id"] == boot:
            return QemuPlan(vm, Vmm(run["pid"], run["start_ticks"], run["guard"]))
    with suppress(OSError, ValueError, KeyError, TypeError, BadPlan):
        raw = _json(f"{folder}/{vm}.container.json")
        if raw["boot_id"] == boot:
            return plan_from_json(raw)
    with suppress(OSError, ValueError, KeyError, TypeError, BadPlan):
        run = _json(f"{folder}/{vm}.run.json")
        if run["boot_id"] == boot:
            return _process_plan(vm, run)
    return None


def _process_plan(vm: str, run: Mapping[str, Any]) -> ResumePlan:
    if run["kind"] == "sigstop":
        return SignalPlan(vm, run["pid"], run["start_ticks"])
    return CgroupPlan(vm, run["kind"], run["control"])


def _names(folder: str) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except OSError:
        return []


def _json(path: str) -> Any:
    with open(path, "rb") as file:
        return json.loads(file.read())
