"""``deploy/compose/host.sh`` against an updater that does what a test says, and a ``sleep`` that does not."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest

from caesura_testing.fleet import until
from caesura_testing.patience import patient

_SCRIPT = Path(__file__).parents[3] / "deploy" / "compose" / "host.sh"


class Container:
    """The script with its commands replaced: what the updater ends with, start by start; after that it stays."""

    def __init__(self, folder: Path, *ends: str) -> None:
        self.folder = folder
        programs = folder / "bin"
        programs.mkdir()
        (folder / "ends").write_text("".join(f"{each}\n" for each in ends))
        # `now` is the time of day: the updater ran for so long before it ended.
        self._program(
            "caesura-host-updater",
            f"""
            cd {folder}
            read -r code ran <ends || {{
              trap 'echo stopped >>log; exit 0' TERM
              echo start >>log  # only now: who reads it sends the signal
              while :; do /bin/sleep 0.02; done
            }}
            echo start >>log
            sed -i 1d ends
            echo $(($(cat now) + ${{ran:-0}})) >now
            [ "$code" != 137 ] || kill -KILL $$
            exit "$code"
            """,
        )
        self._program("date", f"cat {folder}/now")
        self._program(
            "sleep", f'echo "sleep $1" >>{folder}/log; [ ! -e {folder}/slow ] || exec /bin/sleep 60'
        )
        (folder / "now").write_text("1000\n")
        self.process = subprocess.Popen(
            ["sh", str(_SCRIPT)],
            env={
                "PATH": f"{programs}:{os.environ['PATH']}",
                "CAESURA_HOST_UPDATER_STATE_DIR": str(folder / "state" / "host-updater"),
            },
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def _program(self, name: str, text: str) -> None:
        path = self.folder / "bin" / name
        path.write_text(f"#!/bin/sh\n{text}")
        path.chmod(0o755)

    @property
    def log(self) -> list[str]:
        path = self.folder / "log"
        return path.read_text().splitlines() if path.exists() else []

    def ended(self) -> tuple[int, str]:
        """How it ended by itself, and what it said."""
        _, said = self.process.communicate(timeout=patient(20))
        return self.process.returncode, said

    def stopped(self, starts: int) -> tuple[int, str]:
        """The same, told to stop while the updater runs that was started as often."""
        try:
            until(lambda: self.log.count("start") == starts, 20.0, lambda: f"{starts} starts: {self.log}")
        finally:
            self.process.send_signal(signal.SIGTERM)
        return self.ended()


def test_a_stop_reaches_the_updater_and_is_waited_for(tmp_path: Path) -> None:
    container = Container(tmp_path)
    code, said = container.stopped(1)
    assert (code, said) == (0, "")
    assert container.log == ["start", "stopped"]
    assert (tmp_path / "state" / "workloads").is_dir()


def test_a_wrong_configuration_ends_the_container(tmp_path: Path) -> None:
    container = Container(tmp_path, "2")
    assert container.ended() == (2, "")
    assert container.log == ["start"]


def test_a_wrong_configuration_beside_vms_that_run_is_tried_again(tmp_path: Path) -> None:
    container = Container(tmp_path, "137", *["2"] * 7)
    code, said = container.stopped(9)
    assert code == 0
    assert container.log[:5] == ["start", "sleep 1", "start", "sleep 10", "start"]
    assert said.count("its VMs run on, it is tried again in 10 s") == 7


def test_an_updater_that_was_killed_says_what_may_be_the_cause(tmp_path: Path) -> None:
    _, said = Container(tmp_path, "137", "1").stopped(3)
    killed, failed = [line for line in said.splitlines() if line.startswith("caesura-host:")]
    assert "ended with 137, it was killed, perhaps because memory ran out" in killed
    assert failed == "caesura-host: the updater ended with 1, its reason is above; it is started again"


@pytest.mark.parametrize("code", ["1", "137"])
def test_failures_in_a_row_end_the_container(code: str, tmp_path: Path) -> None:
    container = Container(tmp_path, *[code] * 5)
    ended, said = container.ended()
    assert ended == 1
    assert container.log.count("start") == 5
    assert said.strip().endswith("that was 5 times in a row, so the container ends")


def test_an_updater_that_ran_for_a_while_begins_the_count_anew(tmp_path: Path) -> None:
    code, said = Container(tmp_path, *["1"] * 4, *["1 60"] * 3, *["1"] * 3).stopped(11)
    assert code == 0
    assert "in a row" not in said


def test_a_stop_between_two_starts_is_obeyed_at_once(tmp_path: Path) -> None:
    (tmp_path / "slow").touch()
    container = Container(tmp_path, "1")
    try:
        until(lambda: "sleep 1" in container.log, 20.0, lambda: "it waits")
        container.process.send_signal(signal.SIGTERM)
        container.process.wait(patient(20))
    finally:
        os.killpg(container.process.pid, signal.SIGKILL)  # the sleep, which in a container ends with it
    code, _ = container.ended()
    assert code == 0
    assert container.log.count("start") == 1
