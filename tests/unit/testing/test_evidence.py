"""What a failed test shows: the logs of its services, and the command that repeats it alone."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from caesura_testing.evidence import ends_of_logs, repeat_command
from caesura_testing.patience import FACTOR, VARIABLE

_TESTS = Path(__file__).parents[2]


def test_the_command_has_the_seed_that_was_drawn_and_says_whether_it_was_ci() -> None:
    module = SimpleNamespace(REPEAT_WITH={"CAESURA_SOAK_SEED": "7"})
    assert repeat_command("tests/a.py::test_b[x y]", module, {"CI": "true"}) == (
        f"{VARIABLE}={FACTOR:.2f} CI=true CAESURA_SOAK_SEED=7 .venv/bin/pytest 'tests/a.py::test_b[x y]'"
    )
    assert repeat_command("tests/a.py", None, {}) == f"{VARIABLE}={FACTOR:.2f} .venv/bin/pytest tests/a.py"


@pytest.mark.parametrize(
    "path",
    [
        path
        for path in sorted(_TESTS.rglob("test_*.py"))
        if "mixed" not in path.parts and re.search(r"^_SEED = .*environ", path.read_text(), re.MULTILINE)
    ],
    ids=lambda path: path.stem,
)
def test_every_module_that_draws_a_seed_can_be_repeated(path: Path) -> None:
    source = path.read_text()
    (variable,) = set(re.findall(r"^_SEED = .*\"(CAESURA_\w+_SEED)\"", source, re.MULTILINE))
    assert re.search(rf"^REPEAT_WITH = .*\"{variable}\": str\(_SEED\)", source, re.MULTILINE), path


def test_the_ends_of_logs_are_under_their_names(tmp_path: Path) -> None:
    (tmp_path / "host").mkdir()
    (tmp_path / "host" / "updater.log").write_text("".join(f"line {number}\n" for number in range(20)))
    assert ends_of_logs(tmp_path, lines=2) == "--- host/updater.log\nline 18\nline 19"


FAILING = """
from hypothesis import given, strategies as st

REPEAT_WITH = {"CAESURA_TEST_SEED": "11"}

@given(st.integers())
def test_it(number):
    assert number < 1000
"""


def test_a_hypothesis_test_that_fails_shows_what_to_give_it_again(tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text((_TESTS / "conftest.py").read_text())
    (tmp_path / "test_it.py").write_text(FAILING)
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            "-o",
            "timeout=120",
            "--rootdir",
            tmp_path,
            tmp_path,
        ],
        env={name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
        | {"PYTHONPATH": str(_TESTS / "support")},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert "number=1000" in done.stdout
    assert "@reproduce_failure(" in done.stdout
    assert re.search(
        r"CAESURA_TEST_SEED=11 \.venv/bin/pytest test_it\.py::test_it$", done.stdout, re.MULTILINE
    )
