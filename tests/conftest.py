"""With CI=true a skipped test is a failure: there, nothing may be missing."""

from __future__ import annotations

import asyncio
import logging
import os
import tempfile
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest
import structlog
from hypothesis import HealthCheck, Phase, settings

from caesura.runtime.logs import flush_logs
from caesura_testing.evidence import ends_of_logs, repeat_command
from caesura_testing.patience import FACTOR, VARIABLE, patient
from caesura_testing.sandbox import Sandbox
from caesura_testing.second_look import second_look
from caesura_testing.virtual_time import only_where_marked

# How long an example takes depends on what else the machine does: no test fails for that.
# What failed is printed in a form that can be given again, wherever the tests run.
settings.register_profile(
    "any-machine", deadline=None, print_blob=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("any-machine")
# Whether an example fails is all that a mutation run asks: the smallest one takes most of the time to find.
settings.register_profile(
    "first-failure", parent=settings.get_profile("any-machine"), phases=(Phase.explicit, Phase.generate)
)


def pytest_configure(config: pytest.Config) -> None:
    if (looking := second_look(config)) is not None:
        config.pluginmanager.register(looking)
    only_where_marked(config)
    # Processes that run a part of the tests are as patient as the one that started them.
    os.environ[VARIABLE] = f"{FACTOR:.2f}"
    # pytest-asyncio makes an event loop that nobody closes when a synchronous test runs first; warnings are errors.
    asyncio.set_event_loop(None)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The time limit of every test is multiplied by the patience factor, as all other upper bounds are."""
    usual_s = float(config.getini("timeout"))
    for item in items:
        marker = item.get_closest_marker("timeout")
        seconds = float(marker.args[0]) if marker is not None else usual_s
        item.add_marker(pytest.mark.timeout(patient(seconds)), append=False)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A failed test shows the logs of the services that it started, and the command that repeats it alone."""
    report = yield
    if report.failed:
        folders = [each.folder for each in Sandbox.open_ones]
        if (own := getattr(item, "funcargs", {}).get("tmp_path")) is not None:
            folders.append(own)
        for folder in folders:
            if text := ends_of_logs(folder):
                report.sections.append(("logs of its services", text))
        report.sections.append(("repeat it", repeat_command(item.nodeid, getattr(item, "module", None))))
    return report


@pytest.fixture(autouse=True)
def logging_as_it_was() -> Iterator[None]:
    """A test may set up logging, as the command that it runs does; the next one finds it as it was."""
    root = logging.getLogger()
    handlers, level, structured = root.handlers[:], root.level, structlog.get_config()
    yield
    if root.handlers != handlers:
        flush_logs()
    root.handlers[:] = handlers
    root.setLevel(level)
    structlog.configure(**structured)
    structlog.contextvars.clear_contextvars()


@pytest.fixture
def ram_path() -> Iterator[Path]:
    """A folder in memory, for a test that writes so often that a busy disk would take minutes over it."""
    shm = Path("/dev/shm")  # noqa: S108 - the kernel's tmpfs is meant
    with tempfile.TemporaryDirectory(
        prefix="caesura-test-", dir=shm if os.access(shm, os.W_OK) else None
    ) as folder:
        yield Path(folder)


def pytest_report_header() -> str:
    return f"patience: {FACTOR:.2f} ({VARIABLE} sets it)"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if os.environ.get("CI") == "true" and terminalreporter.stats.get("skipped"):
        terminalreporter.write_line("skipped tests are failures with CI=true", red=True)


def pytest_sessionfinish(session: pytest.Session) -> None:
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    skipped = reporter.stats.get("skipped") if reporter is not None else None
    if os.environ.get("CI") == "true" and skipped and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
