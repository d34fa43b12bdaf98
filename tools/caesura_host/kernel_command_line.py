"""Command lines of Linux kernels: what the next kernel is given, and what a carve-out on them says. Pure.

Sources: the kernel's Documentation/admin-guide/kernel-parameters.rst, arch/x86/kernel/e820.c for ``memmap=``.
"""

from __future__ import annotations

import re

_UNIT = {"": 0, "K": 10, "M": 20, "G": 30, "T": 40}
_CARVE_OUT = re.compile(
    r"^(?P<size>\d+)(?P<size_unit>[KMGT]?)!(?P<start>\d+|0x[0-9a-fA-F]+)(?P<start_unit>[KMGT]?)$",
    re.IGNORECASE,
)
_OF_THE_LOADER = ("BOOT_IMAGE=", "initrd=", "caesura.arrive=")
"""Words that are of one boot, and that the next kernel must not be given."""
ALIGNMENT = 128 << 20
"""bytes: the size of a memory section on x86-64 (``SECTION_SIZE_BITS`` 27), below which a region cannot be used whole."""


class BadCarveOut(ValueError):
    """What was given for ``memmap=`` is not a region of memory; the text says why."""


def parse_carve_out(text: str) -> tuple[int, int]:
    """Size and start in bytes of a region as ``memmap=`` takes it: ``4G!4G``.

    Raises:
        BadCarveOut: it is not one, or its start or size is not a multiple of 2 MiB.
    """
    match = _CARVE_OUT.match(text)
    if match is None:
        raise BadCarveOut(f"{text!r} is not SIZE!START, such as 4G!4G")
    size = int(match["size"]) << _UNIT[match["size_unit"].upper()]
    start = int(match["start"], 0) << _UNIT[match["start_unit"].upper()]
    if size == 0 or start == 0:
        raise BadCarveOut(f"{text!r}: size and start must be above 0")
    if size % (2 << 20) or start % (2 << 20):
        raise BadCarveOut(f"{text!r}: size and start must be multiples of 2 MiB (better of 128 MiB)")
    return size, start


def next_command_line(current: str) -> str:
    """What a kernel is given that takes the place of the running one: all that this one has, but the boot loader's words."""
    return " ".join(word for word in current.split() if not word.startswith(_OF_THE_LOADER))


def parameter(command_line: str, name: str) -> str | None:
    """The value of the last ``name=value``; None: it is not there."""
    found = [word.removeprefix(f"{name}=") for word in command_line.split() if word.startswith(f"{name}=")]
    return found[-1] if found else None
