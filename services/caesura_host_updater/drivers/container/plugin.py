"""The ``container`` driver as a plug-in: its keys of the host file, and how it is made."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

from caesura.contract.names import InvalidName, check_name
from caesura_host_updater.drivers.container.definition import ContainerOptions, ContainerVm, vms_of
from caesura_host_updater.drivers.container.diagnosis import diagnose
from caesura_host_updater.drivers.diagnosis import Diagnosis
from caesura_host_updater.drivers.plugin import DriverPlugin, DriverSetup
from caesura_host_updater.drivers.port import Driver
from caesura_vmcontrol import container_engine

_LIST_S = 5.0  # s: for the list of containers; it takes milliseconds


class ContainerPlugin(DriverPlugin[ContainerVm, ContainerOptions]):
    """See the module."""

    name = "container"
    takes = "[vm.container]"
    vm_type = ContainerVm
    options_type = ContainerOptions
    mechanisms = frozenset(("engine",))

    def vm_error(self, vm: ContainerVm, options: ContainerOptions) -> str:  # noqa: ARG002 - the port's
        """What only ``discover`` may say."""
        return "has the key found, which is not for the host file" if vm.found else ""

    def discover(
        self, options: ContainerOptions, known: Collection[str]
    ) -> tuple[tuple[ContainerVm, ...], Mapping[str, str]]:
        """Containers that run and have the label ``caesura.update_domain``."""
        if not options.discover:
            return (), {}
        try:
            answer = container_engine.call(options.socket, "GET", "/containers/json", _LIST_S)
        except OSError as error:
            return (), {options.socket: f"its containers cannot be listed: {error}"}
        found, passed = vms_of(answer, options.project, set(known))
        usable, wrong = [], dict(passed)
        for vm in found:
            try:
                check_name("VM", vm.name)
                if vm.set:
                    check_name("set", vm.set)
            except InvalidName as error:
                wrong[vm.container_name] = str(error)
            else:
                usable.append(vm)
        return tuple(usable), wrong

    def diagnose(self, setup: DriverSetup[ContainerVm, ContainerOptions]) -> Iterable[Diagnosis]:
        """The engine, live-restore, the containers and their freezers."""
        return diagnose(setup.vms, setup.options)

    async def build(self, setup: DriverSetup[ContainerVm, ContainerOptions]) -> Driver:
        """Does not ask the engine yet."""
        from caesura_host_updater.drivers.container.driver import ContainerDriver  # noqa: PLC0415

        return ContainerDriver(setup.vms, setup.options, setup.state_dir)
