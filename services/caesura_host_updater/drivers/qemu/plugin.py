"""The ``qemu`` driver as a plug-in: its keys of the host file, and how it is made."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

import msgspec

from caesura.runtime.logs import get_logger
from caesura_host_updater.drivers.diagnosis import Diagnosis
from caesura_host_updater.drivers.plugin import DriverPlugin, DriverSetup
from caesura_host_updater.drivers.port import Driver
from caesura_host_updater.drivers.qemu.accel import Accelerator, find_accelerator
from caesura_host_updater.drivers.qemu.definition import QemuOptions, QemuVm, vm_error
from caesura_host_updater.drivers.qemu.diagnosis import diagnose
from caesura_host_updater.drivers.qemu.discovery import unnamed_vms
from caesura_host_updater.inventory.kernel_options import KernelOptions

_ACCEL = {"kvm": "kvm", "tcg": "tcg,thread=multi"}

_log = get_logger("caesura.driver")


def ram_dir(options: QemuOptions, kernel: KernelOptions) -> str:
    """The folder below which guests' RAM files are."""
    return f"{kernel.carve_out}/ram" if kernel.kexec else options.ram_dir


class QemuPlugin(DriverPlugin[QemuVm, QemuOptions]):
    """See the module."""

    name = "qemu"
    takes = "[vm.qemu] or [vm.adopt]"
    vm_type = QemuVm
    options_type = QemuOptions
    mechanisms = frozenset(("qmp",))

    def vm_error(self, vm: QemuVm, options: QemuOptions) -> str:
        """See ``definition``."""
        return vm_error(vm, options)

    def kernel_error(self, kernel: KernelOptions, options: QemuOptions) -> str:
        """With kexec, guests' RAM is in the carve-out; a host file that wants it elsewhere contradicts itself."""
        wanted = ram_dir(options, kernel)
        if kernel.kexec and options.ram_dir not in (QemuOptions().ram_dir, wanted):
            return (
                f"[qemu] ram_dir {options.ram_dir!r} is not in the carve-out, where guests' RAM must be with [kernel] kexec = true: "
                f"leave ram_dir out, or write {wanted!r}"
            )
        return ""

    def discover(
        self, options: QemuOptions, known: Collection[str]
    ) -> tuple[tuple[QemuVm, ...], Mapping[str, str]]:
        """See ``discovery``."""
        return unnamed_vms(options.discover, known)

    def diagnose(self, setup: DriverSetup[QemuVm, QemuOptions]) -> Iterable[Diagnosis]:
        """The binary, KVM, folders, disks."""
        return diagnose(setup.vms, setup.options, ram_dir(setup.options, setup.kernel))

    async def build(self, setup: DriverSetup[QemuVm, QemuOptions]) -> Driver:
        """Finds the accelerator first, which may boot a kernel."""
        from caesura_host_updater.drivers.qemu.driver import QemuDriver  # noqa: PLC0415

        accelerator = await _accelerator(setup)
        return QemuDriver(
            setup.host,
            setup.vms,
            msgspec.structs.replace(setup.options, ram_dir=ram_dir(setup.options, setup.kernel)),
            setup.state_dir,
            accel=_ACCEL[accelerator.name],
            accel_reason=accelerator.reason,
            environ=setup.environ,
            max_digest_bytes=setup.max_digest_bytes,
            kernel=setup.kernel,
        )


async def _accelerator(setup: DriverSetup[QemuVm, QemuOptions]) -> Accelerator:
    """What VMs that are started here run with. KVM is tried by booting a kernel, once in a boot of this machine."""
    ours = next((vm.qemu for vm in setup.vms if vm.qemu is not None), None)
    if setup.options.accel != "auto":
        return Accelerator(setup.options.accel, "as the host file says")
    if ours is None:
        return Accelerator("tcg", "no VM is started here")
    found = await find_accelerator(
        setup.options.binary, cpu=ours.cpu, kernel=ours.kernel, cache=setup.state_dir / "accelerator.json"
    )
    _log.info("accelerator.chosen", name=found.name, why=found.reason)
    return found
