"""In CI, a few tests that failed are run once more, alone: an unsteady test is named, and does not stop a landing.

A test that passes alone is not a test that is well: it is named at the end of ``./check``, and its cause is looked for as that of any
red one. Without the runner of ``./check`` in CI nothing is run twice.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import MutableMapping
from pathlib import Path

import pytest

UNSTEADY = "CAESURA_TEST_UNSTEADY"
"""The file to which the names of unsteady tests are added; without it no test gets a second look."""
MOST = 3
"""With more failures than this something is broken."""


class SecondLook:
    """A pytest plug-in; one for each run of pytest.

    Args:
        config: pytest's, of the process that reports (not of one that runs a part of the tests).
        unsteady: see ``UNSTEADY``.
    """

    def __init__(self, config: pytest.Config, unsteady: Path) -> None:
        self._config = config
        self._unsteady = unsteady
        self._failed: dict[str, None] = {}
        self._session: pytest.Session | None = None

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self._failed[report.nodeid] = None

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        self._session = session

    def pytest_unconfigure(self) -> None:
        """Here the fixtures of the first run are gone, and its report is printed."""
        session = self._session
        if session is None or session.exitstatus != pytest.ExitCode.TESTS_FAILED:
            return
        if not 1 <= len(self._failed) <= MOST:
            return
        sys.stdout.write(f"once more, alone: {shlex.join(self._failed)}\n")
        sys.stdout.flush()
        again = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *self._failed],
            cwd=self._config.rootpath,
            stdin=subprocess.DEVNULL,
            check=False,
        )
        if again.returncode != 0:
            return
        with self._unsteady.open("a") as file:
            file.writelines(f"{name}\n" for name in self._failed)
        session.exitstatus = pytest.ExitCode.OK


def second_look(config: pytest.Config, environ: MutableMapping[str, str] = os.environ) -> SecondLook | None:
    """The plug-in, if the runner of ``./check`` asked for it. What the tests start is not asked."""
    asked = environ.pop(UNSTEADY, "")
    if not asked or hasattr(config, "workerinput"):
        return None
    return SecondLook(config, Path(asked))
