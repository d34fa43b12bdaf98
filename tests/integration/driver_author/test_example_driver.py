"""The test module of the example in ``docs/develop/driver.md``, as its author writes it; the wheel lane runs it outside the checkout."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from caesura.conformance.drivers import DriverConformance, DriverHarness
from caesura_host_updater.drivers.plugin import DriverSetup
from caesura_testing.example_driver import ExampleDriver, ExampleOptions, ExampleVm, Program


class ExampleHarness(DriverHarness):
    """Two VMs, each a program that waits."""

    vms = ("first", "second")

    def __init__(self, state_dir: Path) -> None:
        self._state_dir = state_dir

    def build(self) -> ExampleDriver:
        program = Program(argv=("sleep", "600"))
        return ExampleDriver(
            DriverSetup(
                host="host-1",
                vms=tuple(ExampleVm(name=vm, example=program) for vm in self.vms),
                options=ExampleOptions(),
                state_dir=self._state_dir,
                environ=os.environ,
                max_digest_bytes=0,
            )
        )


class TestExampleDriver(DriverConformance):
    """Every test of the suite."""

    @pytest.fixture
    def harness(self, tmp_path: Path) -> ExampleHarness:
        """A state folder of its own for each test."""
        return ExampleHarness(tmp_path)
