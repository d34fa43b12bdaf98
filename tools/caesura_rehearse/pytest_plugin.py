"""The pytest plug-in: the fixture ``caesura``. Imported by every test run, so it imports nothing until a test asks for it."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from caesura_rehearse.testing.fixture import Rehearsal
    from caesura_rehearse.testing.rehearsal_process import RehearsalProcess

_FIXTURE = "caesura"


@pytest.fixture(scope="session")
def _caesura_process() -> Iterator[RehearsalProcess]:
    """The process in which rehearsals run, started once in a session (with xdist: in a worker)."""
    from caesura_rehearse.testing.rehearsal_process import RehearsalProcess as Process  # noqa: PLC0415 - see the module

    process = Process()
    yield process
    process.close()


@pytest.fixture
def caesura(_caesura_process: RehearsalProcess) -> Iterator[Rehearsal]:
    """A rehearsal: order a Freeze, Reboot, Redeploy, Preempt or Terminate for the program that the test runs."""
    from caesura_rehearse.testing.fixture import Rehearsal as Opened  # noqa: PLC0415 - see the module

    yield Opened(_caesura_process, _caesura_process.open())
    _caesura_process.end()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A failed test shows what its program saw, and what it wrote."""
    report = yield
    used: Any = getattr(item, "funcargs", {}).get(_FIXTURE)
    sections = getattr(used, "failure_sections", None)
    if report.failed and report.when == "call" and sections is not None:
        report.sections += sections()
    return report
