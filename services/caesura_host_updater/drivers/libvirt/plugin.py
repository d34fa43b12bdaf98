"""The ``libvirt`` driver as a plug-in: its keys of the host file, and how it is made."""

from __future__ import annotations

from collections.abc import Iterable

from caesura_host_updater.drivers.diagnosis import Diagnosis
from caesura_host_updater.drivers.libvirt.definition import LibvirtOptions, LibvirtVm
from caesura_host_updater.drivers.libvirt.diagnosis import diagnose, sockets_of
from caesura_host_updater.drivers.plugin import DriverPlugin, DriverSetup
from caesura_host_updater.drivers.port import Driver


class LibvirtPlugin(DriverPlugin[LibvirtVm, LibvirtOptions]):
    """See the module."""

    name = "libvirt"
    takes = "no [[vm]]: its domains are found"
    vm_type = LibvirtVm
    options_type = LibvirtOptions
    mechanisms = frozenset(("libvirt",))

    def vm_error(self, vm: LibvirtVm, options: LibvirtOptions) -> str:  # noqa: ARG002 - the port's
        """Domains say themselves what they are."""
        return (
            f"is in the host file, and with this driver domains are found: remove it there, and say what it is with"
            f" `caesura libvirt label {vm.name} --set {vm.set or 'SET'} --update-domain {vm.update_domain or 0}`"
        )

    def diagnose(self, setup: DriverSetup[LibvirtVm, LibvirtOptions]) -> Iterable[Diagnosis]:
        """The binding, the daemon, rights, labels, ways out, agents."""
        return diagnose(setup.options, setup.environ, setup.state_dir)

    async def build(self, setup: DriverSetup[LibvirtVm, LibvirtOptions]) -> Driver:
        """Does not connect yet."""
        from caesura_host_updater.drivers.libvirt.driver import LibvirtDriver  # noqa: PLC0415

        sockets = sockets_of(setup.options, setup.environ)
        return LibvirtDriver(setup.options, sockets, setup.state_dir, setup.max_digest_bytes)
