"""The driver conformance suite over QEMU processes in Proxmox's layout, while another client asks each for its status as pvestatd does."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from caesura.conformance.driver_harness import DriverHarness
from caesura.conformance.drivers import DriverConformance
from caesura_host_updater.drivers.port import Driver
from caesura_host_updater.drivers.proxmox.definition import ProxmoxOptions
from caesura_host_updater.drivers.proxmox.driver import ProxmoxDriver
from caesura_testing.proxmox_node import ProxmoxNode, StatusDaemon


class ProxmoxHarness(DriverHarness):
    """Two VMs."""

    vms = ("vm-100", "vm-101")
    starts_vms = False

    def __init__(self, node: ProxmoxNode) -> None:
        self._node = node
        node.create(100, tags=("caesura-set-web", "caesura-ud-0"))
        node.create(101, tags=("caesura-set-web", "caesura-ud-1"))

    def build(self) -> ProxmoxDriver:
        return ProxmoxDriver(
            ProxmoxOptions(config_dir=str(self._node.config_dir), run_dir=str(self._node.run_dir))
        )

    def processes(self, driver: Driver, vm: str) -> list[int]:  # noqa: ARG002 - the node says
        return [self._node.pid(int(vm.removeprefix("vm-")))]


class TestProxmoxDriver(DriverConformance):
    """Every test of the suite."""

    @pytest.fixture
    def harness(self, node: ProxmoxNode) -> Iterator[ProxmoxHarness]:
        harness = ProxmoxHarness(node)
        with StatusDaemon([node.run_dir / "100.qmp", node.run_dir / "101.qmp"]):
            yield harness
