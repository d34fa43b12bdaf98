"""KVM in a kernel that has just started: an initramfs has neither its modules nor the group that may open it.

Without it a guest of KVM would stay in its files until udev runs, far beyond any pause budget.
"""

# light imports on purpose: no pathlib here.
# ruff: noqa: PTH101, PTH110, PTH116, PTH123

from __future__ import annotations

import os
import stat
import subprocess
from collections.abc import Callable, Sequence
from contextlib import suppress

DEVICE = "/dev/kvm"
_MODULES = {"vmx": "kvm_intel", "svm": "kvm_amd"}
"""By what ``/proc/cpuinfo`` says of the processor."""
_GROUP = "kvm"
_PATH = "/usr/sbin:/usr/bin:/sbin:/bin"
_LOAD_S = 20.0  # s: for modprobe, which takes some 0.1 s

Log = Callable[..., None]
Run = Callable[[Sequence[str]], None]


def module_for(cpuinfo: str) -> str:
    """The module that a processor needs; empty: it has no virtualization, or its kernel needs no module. Pure."""
    flags = next((line.split() for line in cpuinfo.splitlines() if line.startswith("flags")), [])
    return next((module for flag, module in _MODULES.items() if flag in flags), "")


def group_id(groups: str) -> int | None:
    """The group that may open the device, by ``/etc/group``; None: there is none. Pure."""
    for words in (line.split(":") for line in groups.splitlines()):
        if len(words) > 2 and words[0] == _GROUP and words[2].isdigit():
            return int(words[2])
    return None


def make_ready(
    log: Log,
    *,
    device: str = DEVICE,
    cpuinfo: str = "/proc/cpuinfo",
    groups: str = "/etc/group",
    run: Run | None = None,
) -> None:
    """As root: load the module where the device is missing, and give the device to its group as udev would. Whatever fails is logged.

    Args:
        run: runs a program; injected by tests only.
    """
    try:
        module = "" if os.path.exists(device) else module_for(_text(cpuinfo))
        if module:
            (run or _run)(("modprobe", module))
        found = os.stat(device)
        gid = group_id(_text(groups))
        if (
            gid is not None and found.st_gid == 0
        ):  # nobody has given it to anybody: this is before udev, or udev's rules
            os.chown(device, 0, gid)
            os.chmod(device, stat.S_IRUSR | stat.S_IWUSR | stat.S_IRGRP | stat.S_IWGRP)
    except FileNotFoundError:
        log("arrival.no_kvm", device=device)
    except (OSError, subprocess.SubprocessError) as error:
        log("arrival.no_kvm", device=device, why=str(error))


def _run(argv: Sequence[str]) -> None:
    subprocess.run(argv, check=True, timeout=_LOAD_S, stdin=subprocess.DEVNULL, env={"PATH": _PATH})


def _text(path: str) -> str:
    with suppress(OSError), open(path, encoding="utf-8", errors="replace") as file:
        return file.read()
    return ""
