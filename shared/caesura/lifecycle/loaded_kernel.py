"""The kernel that a host leaves for, as the command that loads it writes it down and the host updater reads it. Pure.

A running kernel does not say what was loaded with kexec, nor with which command line.
"""

from __future__ import annotations

import msgspec

RECORD = "/run/caesura/kexec-loaded.json"
"""Where it is written down: of this boot, readable by everybody."""

CARVE_OUT = "/var/lib/caesura/carve-out"
"""Where the file system with guests' RAM is mounted, in memory that every kernel of the host leaves alone, unless an operator says otherwise."""


class LoadedKernel(msgspec.Struct, frozen=True, kw_only=True):
    """What was loaded, and in which boot."""

    boot_id: str
    release: str
    """As ``uname -r`` names it."""
    kernel: str
    initrd: str
    command_line: str
    hook_version: str
    """Of the hook in its initramfs that resumes guests; empty: it has none."""


def carve_outs(command_line: str) -> list[str]:
    """The regions of memory that ``memmap=SIZE!START`` words keep, in order; one word may name several, with commas between.

    Source: the kernel's Documentation/admin-guide/kernel-parameters.rst.
    """
    return [
        region
        for word in command_line.split()
        if word.startswith("memmap=")
        for region in word.removeprefix("memmap=").split(",")
        if "!" in region
    ]
