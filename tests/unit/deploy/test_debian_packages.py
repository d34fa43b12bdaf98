"""``deploy/debian-packages.sh``: what it would install, and with what words it refuses; it installs nothing here."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from caesura_testing.lanes import LANES

_SCRIPT = Path(__file__).parents[3] / "deploy" / "debian-packages.sh"
_ITS_OWN = ("sh", "awk", "cat", "grep", "sort", "tr", "id", "env")


@pytest.fixture
def programs(tmp_path: Path) -> Path:
    """All that is on the path: what the script itself uses, and what a test adds."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in _ITS_OWN:
        found = shutil.which(name)
        assert found is not None
        (folder / name).symlink_to(found)
    return folder


def add(programs: Path, name: str, script: str = "") -> None:
    path = programs / name
    path.unlink(missing_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


def run(programs: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["sh", _SCRIPT, *arguments],
        env={**os.environ, "PATH": str(programs)},
        capture_output=True,
        text=True,
        check=False,
    )


def test_every_lane_that_is_listed_is_one_of_check(programs: Path) -> None:
    listed = dict(line.split(": ", 1) for line in run(programs, "--list").stdout.splitlines())
    assert listed.pop("all").split() == ["ca-certificates", "python3", "python3-pip"]
    assert set(listed) <= set(LANES)
    assert listed["asyncapi"] == "nodejs npm"
    assert {"docker.io", "debootstrap"} <= set(listed["compose"].split())


def test_a_dry_run_names_what_is_missing_for_the_lanes_that_are_named(programs: Path) -> None:
    add(programs, "python3")
    assert {"npm", "nodejs", "qemu-utils", "chromium"} <= set(run(programs, "--dry-run").stdout.split())
    assert run(programs, "--dry-run", "asyncapi").stdout.split() == ["nodejs", "npm"]
    add(programs, "node")
    assert run(programs, "--dry-run", "asyncapi").stdout.split() == ["npm"]
    add(programs, "npm")
    done = run(programs, "--dry-run", "asyncapi")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "debian-packages: nothing is missing\n")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--dry",), "no option --dry; see --help"),
        (("soap",), "no lane soap; there are: all"),
        (("asyncapi",), "this is not Debian. Install these by other means: nodejs npm"),
    ],
)
def test_what_it_cannot_do_is_said_with_exit_code_2(
    programs: Path, arguments: tuple[str, ...], words: str
) -> None:
    add(programs, "python3")
    done = run(programs, *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert words in done.stderr


def test_without_root_and_sudo_it_says_what_to_run_as_root(programs: Path) -> None:
    add(programs, "python3")
    add(programs, "apt-get", "exit 9")
    add(programs, "id", "echo 1000")
    done = run(programs, "asyncapi")
    assert done.returncode == 2
    assert "as root: apt-get install --no-install-recommends nodejs npm" in done.stderr


def test_everything_goes_through_sudo_and_a_failure_is_named(programs: Path, tmp_path: Path) -> None:
    add(programs, "python3")
    add(programs, "apt-get")
    add(programs, "id", "echo 1000")
    log = tmp_path / "sudo.log"
    add(programs, "sudo", f'echo "$@" >>{log}; case "$*" in *install*) exit 100 ;; esac')
    done = run(programs, "asyncapi")
    assert done.returncode == 1
    assert "installing nodejs npm" in done.stderr
    assert "the next run installs the rest" in done.stderr
    lines = [line for line in log.read_text().splitlines() if "apt-get" in line]
    assert lines == [
        "env DEBIAN_FRONTEND=noninteractive apt-get update -qq",
        "env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends nodejs npm",
    ]


def test_ci_uses_it() -> None:
    assert "deploy/debian-packages.sh" in (_SCRIPT.parents[1] / ".ci" / "run").read_text()
