"""How many boots there were since the former kernel was left, counted twice: on the disk, and in the carve-out.

Each boot raises the counter on the disk, and the one in the carve-out if it has the carve-out. A kernel that was started without the
carve-out used that memory as its own: it leaves the two counters different, and what they count beside is not loaded.
"""

# light imports on purpose: no pathlib here.
# ruff: noqa: PTH123

from __future__ import annotations

import errno
import json
import os
from dataclasses import asdict, dataclass

from caesura_vmcontrol.durable_files import write_durably

_NAME = "boot-counter.json"


@dataclass(frozen=True)
class BootCounter:
    """``operation``: that left the former kernel. ``count``: boots since. ``boot_id``: that raised it last, or that was left."""

    operation: str
    count: int
    boot_id: str


def reset(state_dir: str, carve_out: str, operation: str, boot_id: str) -> None:
    """Both equal: from here on boots are counted. Raises OSError."""
    counter = BootCounter(operation, 0, boot_id)
    _write(carve_out, counter)
    _write(state_dir, counter)


def raise_counter(folder: str, boot_id: str) -> BootCounter | None:
    """Count this boot, once; the counter afterwards. None: there is none that can be read. Raises OSError."""
    counter = read(folder)
    if counter is None or counter.boot_id == boot_id:
        return counter
    raised = BootCounter(counter.operation, counter.count + 1, boot_id)
    try:
        _write(folder, raised)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        # No space for another file, and guests wait: in its place. Torn by a crash it cannot be read, and then nothing is loaded.
        _write_over(folder, raised)
    return raised


def read(folder: str) -> BootCounter | None:
    """The counter in a folder; None: there is none, or it is not ours. Raises OSError: it cannot be read."""
    try:
        with open(f"{folder}/{_NAME}", "rb") as file:
            data = json.loads(file.read())
        return BootCounter(str(data["operation"]), int(data["count"]), str(data["boot_id"]))
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError):
        return None


def counters_error(on_disk: BootCounter | None, in_carve_out: BootCounter | None, operation: str) -> str:
    """Why the carve-out may have been another kernel's memory; empty: every boot since had it. Pure."""
    if on_disk is None or in_carve_out is None:
        return f"there is no boot counter {'in the state folder' if on_disk is None else 'in the carve-out'}"
    if on_disk.operation != operation or in_carve_out.operation != operation:
        return "the boot counters are of another operation"
    if on_disk != in_carve_out:
        return (
            f"{on_disk.count} boots since the former kernel was left, and {in_carve_out.count} of them with the carve-out: "
            "another kernel had the guests' memory for its own"
        )
    return ""


def _write_over(folder: str, counter: BootCounter) -> None:
    handle = os.open(f"{folder}/{_NAME}", os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        data = _data(counter)
        os.ftruncate(handle, os.pwrite(handle, data, 0))
        os.fsync(handle)
    finally:
        os.close(handle)


def _data(counter: BootCounter) -> bytes:
    return json.dumps(asdict(counter)).encode()


def _write(folder: str, counter: BootCounter) -> None:
    write_durably(folder, _NAME, _data(counter))
