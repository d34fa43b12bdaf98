"""The ``proxmox`` driver as a plug-in: its keys of the host file, and how it is made."""

from __future__ import annotations

from collections.abc import Iterable

from caesura_host_updater.drivers.diagnosis import Diagnosis
from caesura_host_updater.drivers.plugin import DriverPlugin, DriverSetup
from caesura_host_updater.drivers.port import Driver
from caesura_host_updater.drivers.proxmox.definition import ProxmoxOptions, ProxmoxVm
from caesura_host_updater.drivers.proxmox.diagnosis import diagnose


class ProxmoxPlugin(DriverPlugin[ProxmoxVm, ProxmoxOptions]):
    """See the module."""

    name = "proxmox"
    takes = "no [[vm]]: its VMs are found"
    vm_type = ProxmoxVm
    options_type = ProxmoxOptions
    mechanisms = frozenset(("qmp",))

    def vm_error(self, vm: ProxmoxVm, options: ProxmoxOptions) -> str:  # noqa: ARG002 - the port's
        """VMs say themselves what they are."""
        return (
            "is in the host file, and with this driver VMs are found: remove it there, and say what it is with tags in Proxmox, such as"
            f" `qm set ID --tags 'caesura-set-{vm.set or 'SET'};caesura-ud-{vm.update_domain or 0}'`"
        )

    def diagnose(self, setup: DriverSetup[ProxmoxVm, ProxmoxOptions]) -> Iterable[Diagnosis]:
        """The configurations, rights on the sockets, tags, locks, agents."""
        return diagnose(setup.options)

    async def build(self, setup: DriverSetup[ProxmoxVm, ProxmoxOptions]) -> Driver:
        """Does not read anything yet."""
        from caesura_host_updater.drivers.proxmox.driver import ProxmoxDriver  # noqa: PLC0415

        return ProxmoxDriver(setup.options)
