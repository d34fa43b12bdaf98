"""What an operator says in the host file about starting another kernel under the host's guests. Pure."""

from __future__ import annotations

import posixpath
from typing import Annotated

import msgspec
from msgspec import Meta

from caesura.lifecycle.loaded_kernel import CARVE_OUT


class KernelOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The table ``[kernel]``: method ``kexec`` on this host."""

    kexec: bool = False
    """Whether updates may start another kernel under running guests. Their RAM then lies in the carve-out from their start."""
    carve_out: Annotated[str, Meta(pattern=r"^/")] = CARVE_OUT
    """Where the file system with DAX in the carve-out is mounted: RAM that every kernel of this host leaves alone."""
    early: bool = True
    """Whether the initramfs resumes the guests. Else a unit does, once local file systems are there: for guests whose disks or
    bridges an initramfs does not have, at the cost of a longer pause."""
    watchdog_s: Annotated[int, Meta(ge=0, le=3600)] = 60
    """Seconds after which a hardware watchdog resets a host whose new kernel hangs; 0: none is armed."""


def kernel_error(options: KernelOptions) -> str:
    """What is wrong beyond the types: names the key. Empty: nothing."""
    if posixpath.normpath(options.carve_out) != options.carve_out or options.carve_out == "/":
        return f"[kernel]: carve_out {options.carve_out!r} is not the plain path of a mount point"
    return ""
