"""Whether another kernel can be started under the host's guests: each obstacle by name, with its remedy. Pure.

Between the jump and the new kernel nothing of Caesura runs, so what cannot be known to be right is refused before anything pauses.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import msgspec

from caesura.contract.messages import KernelFigure
from caesura.lifecycle.kernel_figures import budget_error, newest_figure
from caesura.lifecycle.loaded_kernel import LoadedKernel, carve_outs
from caesura_host_updater.inventory.kernel_options import KernelOptions
from caesura_vmcontrol.mounts import Mount, mount_of

CHECK = "`caesura host prepare-kexec --check` says what is missing"
_VOLATILE = frozenset(("tmpfs", "ramfs", "overlay", "squashfs"))
"""File systems that do not outlive a kernel, or may not."""
CAP_SYS_BOOT = 22
"""linux/capability.h"""


class KernelFacts(msgspec.Struct, frozen=True, kw_only=True):
    """The host as it was found."""

    boot_id: str
    release: str
    command_line: str
    kexec_loaded: str
    """The content of ``/sys/kernel/kexec_loaded``; empty where this kernel has none."""
    loaded: LoadedKernel | None
    mounts: tuple[Mount, ...]
    carve_out_error: str
    """Why guests' RAM in it would not stay; empty: it does."""
    state_dir: str
    guard_capabilities: int | None
    """The guard's effective ones; None: it cannot be seen."""
    services: tuple[str, ...]
    """Those of Caesura's own programs and of brokers that run on this host."""
    broker_here: str = ""
    """The broker's address, where that is this host's."""
    foreign_guests: tuple[str, ...] = ()
    """VMMs on this host that no host updater has started."""
    rtc_is_local: bool = False
    """Whether the RTC is said to be in local time: third line of ``/etc/adjtime``, hwclock(8)."""


def obstacles(facts: KernelFacts) -> Iterator[str]:
    """What is in the way whatever the kernel."""
    if not carve_outs(facts.command_line):
        yield f"the running kernel keeps no carve-out (memmap=SIZE!START on its command line): {CHECK}"
    if facts.carve_out_error:
        yield f"{facts.carve_out_error}; {CHECK}"
    state = mount_of(facts.mounts, facts.state_dir)
    if state is None or state.kind in _VOLATILE:
        kind = state.kind if state is not None else "no mount"
        yield f"the state folder {facts.state_dir} ({kind}) does not outlive a kernel: put CAESURA_HOST_UPDATER_STATE_DIR on a disk"
    if facts.rtc_is_local:
        # systemd, src/core/main.c: "RTC configured in localtime, applying delta of %i minutes to system time".
        yield (
            "the RTC is in local time (/etc/adjtime): systemd would move the clock by hours after the guests were resumed: "
            "timedatectl set-local-rtc 0"
        )
    if facts.guard_capabilities is None:
        yield "the pause guard, which leaves the kernel, cannot be seen: is caesura-pause-guard.service up?"
    elif not facts.guard_capabilities >> CAP_SYS_BOOT & 1:
        yield f"the pause guard may not leave the kernel (CAP_SYS_BOOT): {CHECK}"
    if facts.foreign_guests:
        yield (
            f"{', '.join(facts.foreign_guests)} is not a VM of this host updater, and its guest would end with this kernel: "
            "shut it down or move it away"
        )
    if facts.services:
        yield (
            f"{', '.join(facts.services)} on this host would be away in the pause of its VMs: a host that starts another kernel "
            "under its VMs runs no broker, coordinator, publisher or exporter of the fleet"
        )
    elif facts.broker_here:
        yield f"the broker {facts.broker_here} is on this host, and would be away in the pause of its VMs: use one on another host"


def loaded_error(facts: KernelFacts, options: KernelOptions, release: str) -> str:
    """Why the kernel that is loaded is not the one to start; empty: it is."""
    how = f"end the update's argv with `caesura host load-kernel {release}`"
    if facts.kexec_loaded != "1":
        return f"no kernel is loaded (/sys/kernel/kexec_loaded is {facts.kexec_loaded or 'missing'}): {how}"
    loaded = facts.loaded
    if loaded is None or loaded.boot_id != facts.boot_id:
        return f"a kernel is loaded, and nothing says which: {how}"
    if loaded.release != release:
        return f"kernel {loaded.release} is loaded, and the update starts {release}: {how}"
    missing = [each for each in carve_outs(facts.command_line) if each not in carve_outs(loaded.command_line)]
    if missing:
        return f"the loaded kernel's command line lacks memmap={','.join(missing)}: it would use its guests' memory; {how}"
    if options.early and not loaded.hook_version:
        return f"{loaded.initrd} has not the hook that resumes guests: {CHECK}"
    return ""


def figure_error(figures: Iterable[KernelFigure], release: str, budget_s: float) -> str:
    """Why what was measured does not allow the jump within the budget; empty: it does."""
    newest = newest_figure(figures, release)
    if newest is None:
        return f"nothing was measured for kernel {release}: `caesura host rehearse-kexec {release}` while the host holds no VM"
    return budget_error(newest, budget_s)
