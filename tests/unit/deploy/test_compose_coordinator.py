"""``deploy/compose/coordinator.sh``: which store the coordinator of docker-compose.yml gets, and how the script ends."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from caesura_testing.fleet import until

_SCRIPT = Path(__file__).parents[3] / "deploy" / "compose" / "coordinator.sh"
_STORE, _PASSWORD = "postgresql://caesura@database/caesura", "/etc/caesura/secrets/store"
_COORDINATOR = """#!/bin/sh
trap 'echo stopped >>"$LOG"; exit 5' TERM
echo "${CAESURA_COORDINATOR_STORE-sqlite} ${CAESURA_COORDINATOR_STORE_PASSWORD_FILE-}" >>"$LOG"
echo $$ >"$LOG.pid"
while :; do sleep 0.1; done
"""
"""Stands for caesura-coordinator: says what it was given, and runs until it is told to stop."""


class Container:
    """The script as a container starts it."""

    def __init__(self, folder: Path) -> None:
        self.store = folder / "store"
        self.store.mkdir()
        self.mark = self.store / "postgresql"
        self.log = folder / "log"
        program = folder / "bin" / "caesura-coordinator"
        program.parent.mkdir()
        program.write_text(_COORDINATOR)
        program.chmod(0o755)
        self._environ = {"PATH": f"{program.parent}:{os.environ['PATH']}", "LOG": str(self.log)}
        self.process: subprocess.Popen[str] | None = None

    def start(self) -> subprocess.Popen[str]:
        self.process = subprocess.Popen(
            ["sh", _SCRIPT, self.mark, _STORE, _PASSWORD],
            env=self._environ,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        return self.process

    def said(self) -> list[str]:
        return self.log.read_text().splitlines() if self.log.exists() else []

    def started(self, times: int = 1) -> None:
        pid = Path(f"{self.log}.pid")
        until(lambda: len(self.said()) >= times and pid.exists(), 10.0, lambda: f"it starts: {self.said()}")

    def ended(self) -> tuple[int, str]:
        assert self.process is not None
        _, said = self.process.communicate(timeout=30)
        return self.process.returncode, said

    def close(self) -> None:
        if self.process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.communicate()


@pytest.fixture
def container(tmp_path: Path) -> Iterator[Container]:
    made = Container(tmp_path)
    yield made
    made.close()


def test_without_the_mark_it_is_sqlite_and_a_stop_is_the_coordinators_own(container: Container) -> None:
    process = container.start()
    container.started()
    process.send_signal(signal.SIGTERM)
    code, said = container.ended()
    assert container.said() == ["sqlite ", "stopped"]
    assert (code, said) == (5, "")


def test_with_the_mark_it_is_postgresql(container: Container) -> None:
    container.mark.touch()
    process = container.start()
    container.started()
    process.send_signal(signal.SIGTERM)
    code, _ = container.ended()
    assert container.said() == [f"{_STORE} {_PASSWORD}", "stopped"]
    assert code == 5


def test_a_mark_that_is_made_meanwhile_ends_it_and_the_next_has_the_other_store(container: Container) -> None:
    container.start()
    container.started()
    container.mark.touch()
    code, said = container.ended()
    assert code == 5, "stopped, not killed"
    assert "PostgreSQL from now on" in said
    container.start()
    container.started(3)
    assert container.said() == ["sqlite ", "stopped", f"{_STORE} {_PASSWORD}"]


def test_a_coordinator_that_dies_ends_the_container_with_its_code(container: Container) -> None:
    container.start()
    container.started()
    os.kill(int(Path(f"{container.log}.pid").read_text()), signal.SIGKILL)
    code, _ = container.ended()
    assert code == 128 + signal.SIGKILL


def test_without_the_volume_nothing_starts(container: Container) -> None:
    container.store.rmdir()
    container.start()
    code, said = container.ended()
    assert code == 2
    assert "is not mounted" in said
    assert container.said() == []
