"""The container driver, held to the suite of all drivers, over a real engine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from caesura.conformance.driver_harness import DriverHarness
from caesura.conformance.drivers import DriverConformance
from caesura_host_updater.drivers.container.definition import (
    ContainerDefinition,
    ContainerOptions,
    ContainerVm,
)
from caesura_host_updater.drivers.container.driver import ContainerDriver
from caesura_testing.containers import Engine


class ContainerHarness(DriverHarness):
    """Three containers."""

    vms = ("a", "b", "c")

    def __init__(self, docker: Engine, folder: Path, names: dict[str, str]) -> None:
        self._docker = docker
        self._folder = folder
        self._names = names

    def build(self) -> ContainerDriver:
        specs = tuple(
            ContainerVm(name=vm, container=ContainerDefinition(name=name)) for vm, name in self._names.items()
        )
        return ContainerDriver(specs, ContainerOptions(socket=str(self._docker.socket)), self._folder)


class TestContainerDriver(DriverConformance):
    """See the module."""

    @pytest.fixture
    def harness(self, docker: Engine, tmp_path: Path, run_container: Callable[..., str]) -> ContainerHarness:
        return ContainerHarness(docker, tmp_path, {vm: run_container() for vm in ContainerHarness.vms})
