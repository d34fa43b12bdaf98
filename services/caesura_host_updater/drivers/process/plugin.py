"""The ``process`` driver as a plug-in: its keys of the host file, and how it is made."""

from __future__ import annotations

from caesura.runtime.logs import get_logger
from caesura.runtime.processes import cgroup_name
from caesura_host_updater.drivers.plugin import DriverPlugin, DriverSetup
from caesura_host_updater.drivers.port import Driver
from caesura_host_updater.drivers.process.definition import ProcessOptions, ProcessVm, vm_error

_log = get_logger("caesura.driver")


class ProcessPlugin(DriverPlugin[ProcessVm, ProcessOptions]):
    """See the module."""

    name = "process"
    takes = "[[vm.process]] or ram_bytes"
    vm_type = ProcessVm
    options_type = ProcessOptions
    mechanisms = frozenset(("signal", "cgroup"))

    def vm_error(self, vm: ProcessVm, options: ProcessOptions) -> str:  # noqa: ARG002 - the port's
        """See ``definition``."""
        return vm_error(vm)

    async def build(self, setup: DriverSetup[ProcessVm, ProcessOptions]) -> Driver:
        """Chooses the freezer that works here."""
        from caesura_host_updater.drivers.process.driver import ProcessDriver  # noqa: PLC0415
        from caesura_host_updater.drivers.process.freezers import choose_freezer  # noqa: PLC0415

        freezer, passed = choose_freezer(setup.options.freezer, cgroup_name(setup.host, setup.state_dir))
        for kind, why in passed.items():
            _log.warning("freezer.passed_over", kind=kind, why=why, chosen=freezer.kind)
        return ProcessDriver(
            setup.host,
            setup.vms,
            setup.state_dir,
            freezer,
            environ=setup.environ,
            max_digest_bytes=setup.max_digest_bytes,
        )
