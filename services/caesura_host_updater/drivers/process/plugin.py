"""The ``process`` driver as a plug-in: its keys of the host file, and how it is made."""

from __future__ import annotations

from collections.abc import Iterable

from caesura.runtime.logs import get_logger
from caesura.runtime.processes import cgroup_name
from caesura_host_updater.drivers.diagnosis import Diagnosis, ok, warning, wrong
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

    def diagnose(self, setup: DriverSetup[ProcessVm, ProcessOptions]) -> Iterable[Diagnosis]:
        """Which freezer works here: looked at, not tried."""
        import os  # noqa: PLC0415 - as below
        from pathlib import Path  # noqa: PLC0415

        from caesura_host_updater.drivers.process.freezers import freezer_mounts, own_cgroups  # noqa: PLC0415

        mounts = freezer_mounts(Path("/proc/self/mountinfo").read_text(encoding="utf-8"))
        own = own_cgroups(Path("/proc/self/cgroup").read_text(encoding="utf-8"))
        usable = [
            kind
            for kind in ("cgroup2", "cgroup1")
            if kind in mounts and kind in own and os.access(mounts[kind] / own[kind].lstrip("/"), os.W_OK)
        ]
        wanted = setup.options.freezer
        if wanted in ("cgroup1", "cgroup2") and wanted not in usable:
            yield wrong(
                "process.freezer",
                f"{wanted} cannot be used here by this user",
                'Delegate=yes in the unit, or freezer = "auto"',
            )
        elif usable and wanted != "sigstop":
            yield ok(
                "process.freezer",
                f"VMs are frozen by {wanted if wanted != 'auto' else usable[0]}, as far as this user sees",
            )
        else:
            yield warning(
                "process.freezer",
                "VMs are stopped by SIGSTOP, which their parents notice",
                "Delegate=yes in the unit gives it a cgroup",
            )

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
