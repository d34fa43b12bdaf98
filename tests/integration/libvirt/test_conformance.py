"""The driver conformance suite over domains of a real libvirtd."""

from __future__ import annotations

from pathlib import Path

import pytest

from caesura.conformance.driver_harness import DriverHarness
from caesura.conformance.drivers import DriverConformance
from caesura_host_updater.drivers.libvirt.definition import LibvirtOptions
from caesura_host_updater.drivers.libvirt.driver import LibvirtDriver
from caesura_host_updater.drivers.port import Driver
from caesura_testing.libvirt_daemons import URI, LibvirtDaemon


class LibvirtHarness(DriverHarness):
    """Two domains."""

    vms = ("web-1", "web-2")
    starts_vms = False

    def __init__(self, daemon: LibvirtDaemon, state_dir: Path) -> None:
        self._daemon = daemon
        self._state_dir = state_dir
        daemon.define("web-1", label="set='web' update-domain='0'")
        daemon.define("web-2", label="set='web' update-domain='1'")

    def build(self) -> LibvirtDriver:
        return LibvirtDriver(LibvirtOptions(uri=URI), (str(self._daemon.socket),), self._state_dir)

    def processes(self, driver: Driver, vm: str) -> list[int]:  # noqa: ARG002 - libvirt says
        return [self._daemon.pid(vm)]


class TestLibvirtDriver(DriverConformance):
    """Every test of the suite."""

    @pytest.fixture
    def harness(self, daemon: LibvirtDaemon, tmp_path: Path) -> LibvirtHarness:
        return LibvirtHarness(daemon, tmp_path)
