"""An engine of the tests' own with live-restore, and an image of a shell and `sleep`: nothing is pulled."""

from __future__ import annotations

import io
import subprocess
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from caesura.runtime.identity import new_id
from caesura_testing.containers import Engine, default_cache, engine, missing_tools

IMAGE = "caesura-test-shell"
WORKLOAD = "trap 'exit 0' TERM; n=0; while [ $n -lt 20000 ]; do sleep 0.05; n=$((n + 1)); done"
"""It ends by itself: with live-restore it outlives tests that are killed."""


def rootfs() -> bytes:
    """A tar of the shell and `sleep` of this machine, with the libraries that they need."""
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w") as tar:
        wanted = {"/bin/sh", "/bin/sleep"}
        for program in sorted(wanted):
            said = subprocess.run(["ldd", program], capture_output=True, text=True, check=True).stdout
            wanted |= {word for word in said.split() if word.startswith("/")}
        for path in sorted(wanted):
            entry = tar.gettarinfo(str(Path(path).resolve()), arcname=path.lstrip("/"))
            with Path(path).resolve().open("rb") as file:
                tar.addfile(entry, file)
    return made.getvalue()


@pytest.fixture(scope="session")
def docker() -> Iterator[Engine]:
    if missing := missing_tools():
        pytest.skip(missing)
    # Not the compose lane's: its data are gigabytes, and both may be under way.
    cache = default_cache().with_name("containers-small")
    with engine(
        cache, None, "--live-restore", "--bridge=none", "--iptables=false", own_containerd=True
    ) as found:
        done = subprocess.run(
            ["docker", "import", "-", IMAGE],
            input=rootfs(),
            env=found.environ,
            capture_output=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr.decode()
        yield found


@pytest.fixture
def run_container(docker: Engine) -> Iterator[Callable[..., str]]:
    """Runs a container with this name and these words of `docker run`; returns its name."""
    made: list[str] = []

    def run(*words: str, name: str = "", code: str = WORKLOAD) -> str:
        name = name or f"c-{new_id()[:8]}"
        made.append(name)
        docker.run(
            "run",
            "-d",
            "--init=false",
            "--network=none",
            "--name",
            name,
            *words,
            IMAGE,
            "/bin/sh",
            "-c",
            code,
        )
        return name

    yield run
    for name in made:
        docker.run("unpause", name, check=False)
        docker.run("rm", "-f", name, check=False)


@pytest.fixture
def inspect(docker: Engine) -> Callable[[str, str], Any]:
    """What the engine says of a container, by a template."""
    return lambda name, template: docker.run("inspect", "-f", template, name).out.strip()
