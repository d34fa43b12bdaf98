"""Which files of the unpacked packages go into the guest, and under which names."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from caesura_guest_image.cpio import FOLDER, ArchiveEntry, file_entry, link_entry
from caesura_guest_image.elf import NotElf, needed_libraries
from caesura_guest_image.packages import GuestError

MODULES = (
    *("virtio_ring", "virtio", "virtio_pci_modern_dev", "virtio_pci_legacy_dev", "virtio_pci"),
    *(
        "virtio_console",
        "failover",
        "net_failover",
        "virtio_net",
        "virtio-rng",
        "virtio_blk",
        "evdev",
        "button",
    ),
)
"""In dependency order. ``evdev`` and ``button``: the guest reacts to system_powerdown."""

APPLETS = (
    *(
        "sh",
        "mount",
        "umount",
        "cat",
        "ls",
        "mkdir",
        "ln",
        "rm",
        "insmod",
        "hostname",
        "ip",
        "sleep",
        "udhcpc",
    ),
    *(
        "ps",
        "dmesg",
        "free",
        "kill",
        "date",
        "echo",
        "grep",
        "ping",
        "vi",
        "top",
        "reboot",
        "poweroff",
        "sync",
    ),
    *("dd", "md5sum", "df", "wget", "nc", "env", "id", "uname", "stty", "init", "acpid"),
)
_SYSTEM_APPLETS = ("hwclock", "shutdown", "halt")
"""qemu-ga calls these paths: /sbin/hwclock after guest-set-time, /sbin/shutdown."""

_STDLIB = "usr/lib/python3.11"
_NOT_NEEDED = frozenset(
    {
        *(
            "test",
            "unittest",
            "idlelib",
            "lib2to3",
            "distutils",
            "ensurepip",
            "tkinter",
            "turtledemo",
            "venv",
        ),
        *("pydoc_data", "sqlite3", "curses", "dbm", "xml", "xmlrpc", "wsgiref", "multiprocessing", "html"),
        *(
            "turtle.py",
            "pydoc.py",
            "doctest.py",
            "pdb.py",
            "tarfile.py",
            "imaplib.py",
            "mailbox.py",
            "nntplib.py",
        ),
        *("_pydecimal.py", "_pyio.py", "pickletools.py", "smtplib.py", "ftplib.py", "optparse.py", "cgi.py"),
        *(
            "telnetlib.py",
            "pyclbr.py",
            "plistlib.py",
            "poplib.py",
            "smtpd.py",
            "__phello__",
            "antigravity.py",
        ),
        *("tomllib", "zoneinfo", "aifc.py", "wave.py", "chunk.py", "sunau.py", "trace.py", "cProfile.py"),
        *("_sysconfigdata__linux_x86_64-linux-gnu.py", "_sysconfigdata__x86_64-linux-gnu.py", "LICENSE.txt"),
    }
)
_ENCODINGS = frozenset(
    {"__init__.py", "aliases.py", "ascii.py", "utf_8.py", "latin_1.py", "idna.py", "punycode.py", "cp437.py"}
)
_EXTENSIONS = (
    *(
        "_asyncio",
        "_contextvars",
        "_ctypes",
        "_hashlib",
        "_json",
        "_queue",
        "_ssl",
        "_typing",
        "_uuid",
        "_decimal",
    ),
    *("mmap", "resource", "termios", "_bz2", "_lzma", "_opcode"),
)


_OLD_NAMES = ("libpthread.so.0", "libdl.so.2", "librt.so.1", "libutil.so.1")
"""Parts of the C library that are in libc itself now; wheels built for older systems still link to them."""


def copy_python(unpacked: Path, stage: Path) -> None:
    """The interpreter and the part of its library that the agent and the workloads may need."""
    stdlib = stage / _STDLIB
    shutil.copytree(unpacked / _STDLIB, stdlib, ignore=_ignored, symlinks=True)
    for file in (stdlib / "encodings").iterdir():
        if file.name not in _ENCODINGS:
            file.unlink()
    for file in (stdlib / "lib-dynload").iterdir():
        if not file.name.startswith(tuple(f"{name}." for name in _EXTENSIONS)):
            file.unlink()
    _copy(unpacked, stage, "usr/bin/python3.11")


def copy_programs(unpacked: Path, stage: Path) -> None:
    """BusyBox and the guest agent."""
    _copy(unpacked, stage, "bin/busybox")
    _copy(unpacked, stage, "usr/sbin/qemu-ga")


def copy_libraries(unpacked: Path, stage: Path) -> None:
    """Every shared library that a file in ``stage`` needs, and their dependencies.

    Raises:
        GuestError: none of the packages contains one.
    """
    folders = ("lib/x86_64-linux-gnu", "usr/lib/x86_64-linux-gnu")
    for name in _OLD_NAMES:
        _copy(unpacked, stage, f"{folders[0]}/{name}")
    queue = [path for path in stage.rglob("*") if path.is_file() and not path.is_symlink()]
    done: set[str] = set()
    while queue:
        for name in _needs(queue.pop()):
            if name in done:
                continue
            done.add(name)
            place = next((each for each in folders if (unpacked / each / name).exists()), None)
            if place is None:
                raise GuestError(f"no package of the guest has the library {name}")
            queue.append(_copy(unpacked, stage, f"{place}/{name}"))
    _copy(unpacked, stage, "lib/x86_64-linux-gnu/ld-linux-x86-64.so.2")


def loader(stage: Path) -> list[str]:
    """How to run the guest's Python on this machine: through its own loader, with its own libraries."""
    libraries = ":".join(str(stage / each) for each in ("lib/x86_64-linux-gnu", "usr/lib/x86_64-linux-gnu"))
    return [
        str(stage / "lib/x86_64-linux-gnu/ld-linux-x86-64.so.2"),
        "--library-path",
        libraries,
        str(stage / "usr/bin/python3.11"),
    ]


def system_entries(unpacked: Path, inside: Path) -> dict[str, ArchiveEntry]:
    """Everything that is not Python: init, modules, links, a few files in /etc."""
    entries = {f"bin/{name}": link_entry("busybox") for name in APPLETS}
    entries |= {f"sbin/{name}": link_entry("../bin/busybox") for name in _SYSTEM_APPLETS}
    entries |= dict.fromkeys(("dev", "proc", "sys", "run", "root", "mnt", "var"), FOLDER)
    entries["tmp"] = link_entry("run/tmp")
    entries["lib64/ld-linux-x86-64.so.2"] = link_entry("/lib/x86_64-linux-gnu/ld-linux-x86-64.so.2")
    entries["usr/bin/python3"] = link_entry("python3.11")
    entries["init"] = file_entry((inside / "init").read_bytes(), executable=True)
    entries["etc/udhcpc"] = file_entry((inside / "udhcpc").read_bytes(), executable=True)
    # What acpid runs when the power button is pressed (QMP's system_powerdown).
    entries["etc/acpi/PWRF/00000080"] = file_entry(b"#!/bin/sh\nsync\npoweroff -f\n", executable=True)
    entries["etc/passwd"] = file_entry(b"root:x:0:0:root:/root:/bin/sh\n")
    entries["etc/group"] = file_entry(b"root:x:0:\n")
    entries["etc/hosts"] = file_entry(b"127.0.0.1 localhost\n")
    entries["etc/resolv.conf"] = file_entry(b"nameserver 10.0.2.3\n")
    entries["usr/sbin/caesura-set-clock"] = file_entry(
        (inside / "caesura-set-clock").read_bytes(), executable=True
    )
    folders = list((unpacked / "lib/modules").iterdir())
    if len(folders) != 1:
        raise GuestError(f"expected one kernel, found {[each.name for each in folders]}")
    found = {path.name.removesuffix(".ko"): path for path in folders[0].rglob("*.ko")}
    for name in MODULES:
        if name not in found:
            raise GuestError(f"the kernel {folders[0].name} has no module {name}")
        entries[f"lib/modules/{name}.ko"] = file_entry(found[name].read_bytes())
    entries["lib/modules/list"] = file_entry("".join(f"{name}.ko\n" for name in MODULES).encode())
    return entries


def tree_entries(stage: Path) -> dict[str, ArchiveEntry]:
    """The files below ``stage``."""
    found = {}
    for path in sorted(stage.rglob("*")):
        name = str(path.relative_to(stage))
        if path.is_symlink():
            found[name] = link_entry(str(path.readlink()))
        elif path.is_file():
            found[name] = file_entry(path.read_bytes(), executable=os.access(path, os.X_OK))
    return found


def _ignored(folder: str, names: list[str]) -> set[str]:
    top = folder.endswith(_STDLIB)
    return {
        name
        for name in names
        if (top and name in _NOT_NEEDED) or name == "__pycache__" or name.startswith("config-")
    }


def _needs(path: Path) -> list[str]:
    with path.open("rb") as file:
        if file.read(4) != b"\x7fELF":
            return []
    try:
        return needed_libraries(path.read_bytes())
    except NotElf as error:
        raise GuestError(f"{path.name}: {error}") from error


def _copy(unpacked: Path, stage: Path, name: str) -> Path:
    target = stage / name
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        # Links are followed: one file under the name by which it is loaded.
        shutil.copy2(unpacked / name, target)
    return target
