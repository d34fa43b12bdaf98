"""``caesura rehearse --container``: a container that runs already is paused through its engine; the kernel and the engine are the witnesses."""

from __future__ import annotations

import asyncio
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from caesura.runtime.processes import kill_marked
from caesura_host_updater.drivers.container.cgroup import read_freezer
from caesura_testing.containers import Engine
from caesura_testing.fleet import until
from caesura_testing.rehearsing import Rehearsed
from caesura_vmcontrol.resume_plans import CgroupPlan
from caesura_vmcontrol.vm_control import condition

_ASK = """
import urllib.request
url = "http://169.254.169.254/metadata/instance/compute/name?api-version=2021-02-01&format=text"
with urllib.request.urlopen(urllib.request.Request(url, headers={"Metadata": "true"}), timeout=10) as answer:
    print(answer.read().decode())
"""


class Container:
    """A container under test, and what can be asked about it."""

    def __init__(self, docker: Engine, name: str, inspect: Callable[[str, str], Any]) -> None:
        self.docker, self.name, self._inspect = docker, name, inspect
        self.options = ("--container", name, "--engine", str(docker.socket))

    def says(self, template: str) -> str:
        return str(self._inspect(self.name, template))

    @property
    def pid(self) -> int:
        return int(self.says("{{.State.Pid}}"))

    @property
    def freezer(self) -> CgroupPlan:
        return CgroupPlan("a", *read_freezer(self.pid))

    def ask_inside(self) -> subprocess.CompletedProcess[str]:
        """What a client in its network gets from 169.254.169.254."""
        words = ["nsenter", f"--net=/proc/{self.pid}/ns/net", sys.executable, "-I", "-c", _ASK]
        return subprocess.run(words, capture_output=True, text=True, check=False)


@pytest.fixture
def container(
    docker: Engine, run_container: Callable[..., str], inspect: Callable[[str, str], Any]
) -> Container:
    return Container(docker, run_container(), inspect)


def test_a_freeze_of_a_container(container: Container, tmp_path: Path) -> None:
    run = Rehearsed(
        tmp_path, (*container.options, "--freeze", "1s", "--notice", "0.5s", "--settle", "0s", "--json")
    )
    assert run.finish() == 0, run.said
    (gap,) = run.report()["events"][0]["gaps"]
    assert gap["seconds"] >= 1.0
    assert gap["cpu_s"] < 0.005
    assert gap["resumed_by"] == "rehearse"
    assert run.report()["programs"][0]["exited"] is None
    assert container.says("{{.State.Running}} {{.State.Paused}}") == "true false"
    assert "--netns puts it at 169.254.169.254 inside" in run.said
    assert "live-restore" not in run.said, "it is on"


@pytest.mark.parametrize("engine_state", ["well", "dead"])
def test_killed_in_the_pause_the_container_runs_again(
    container: Container, docker: Engine, tmp_path: Path, engine_state: str
) -> None:
    """By the guard, a process of its own; where the engine is dead, too, by the kernel's freezer."""
    run = Rehearsed(tmp_path, (*container.options, "--freeze", "20s", "--notice", "0.2s"))
    freezer = container.freezer
    until(lambda: "paused: app-1" in run.said, 60, lambda: run.said)
    assert condition(freezer) == "frozen"
    if engine_state == "dead":
        docker.kill()
    try:
        run.process.kill()
        run.process.wait()
        until(lambda: condition(freezer) == "running", 15, lambda: "the guard has not resumed it")
    finally:
        if engine_state == "dead":
            docker.start()
        asyncio.run(kill_marked(run.mark))
        run.process.communicate()
    assert container.says("{{.State.Running}}") == "true"
    if engine_state == "well":
        assert container.says("{{.State.Paused}}") == "false"


def test_a_signal_in_the_pause_resumes_it_and_leaves_it(container: Container, tmp_path: Path) -> None:
    run = Rehearsed(tmp_path, (*container.options, "--freeze", "20s", "--notice", "0.2s"))
    until(lambda: "paused: app-1" in run.said, 60, lambda: run.said)
    run.process.send_signal(signal.SIGINT)
    assert run.finish() == 130
    assert condition(container.freezer) == "running"
    assert container.says("{{.State.Running}} {{.State.Paused}}") == "true false"


def test_a_reboot_stops_and_starts_it(container: Container, tmp_path: Path) -> None:
    before = container.pid
    run = Rehearsed(
        tmp_path,
        (*container.options, "--reboot", "--notice", "0.2s", "--settle", "0s", "--expect", "survived"),
    )
    assert run.finish() == 0, run.said
    assert container.says("{{.State.Running}}") == "true"
    assert container.pid != before


def test_a_signal_while_it_is_stopped_by_a_reboot_leaves_it_running(
    docker: Engine, run_container: Callable[..., str], inspect: Callable[[str, str], Any], tmp_path: Path
) -> None:
    stubborn = Container(
        docker,
        run_container(code="trap '' TERM; n=0; while [ $n -lt 20000 ]; do sleep 0.05; n=$((n + 1)); done"),
        inspect,
    )
    before = stubborn.pid
    run = Rehearsed(tmp_path, (*stubborn.options, "--reboot", "--notice", "0.2s", "--grace", "600s"))
    until(lambda: "started: Reboot" in run.said, 60, lambda: run.said)
    run.process.send_signal(signal.SIGINT)
    until(lambda: "Reboot called off" in run.said, 60, lambda: run.said)
    run.process.send_signal(signal.SIGINT)  # once more, as impatient people do: what is being ended is killed
    assert run.finish() == 130, run.said
    assert stubborn.says("{{.State.Running}}") == "true"
    assert stubborn.pid != before


def test_a_terminate_stops_it(container: Container, tmp_path: Path) -> None:
    run = Rehearsed(tmp_path, (*container.options, "--terminate", "--notice", "0.2s", "--settle", "0s"))
    assert run.finish() == 0, run.said
    assert container.says("{{.State.Status}} {{.State.ExitCode}}") == "exited 0"


def test_one_that_ends_by_itself_did_not_survive(
    container: Container, docker: Engine, tmp_path: Path
) -> None:
    run = Rehearsed(
        tmp_path,
        (*container.options, "--terminate", "--notice", "600s", "--expect", "survived", "--settle", "0s"),
    )
    until(lambda: "announced" in run.said, 60, lambda: run.said)
    docker.run("kill", container.name)
    until(lambda: "of app-1 ended: exit code 137" in run.said, 60, lambda: run.said)
    run.process.send_signal(signal.SIGINT)
    assert run.finish() == 130


def test_the_address_answers_in_the_containers_network_and_is_taken_away(
    container: Container, tmp_path: Path
) -> None:
    if shutil.which("nsenter") is None:
        pytest.skip("nsenter is not installed")
    run = Rehearsed(tmp_path, (*container.options, "--netns"))
    until(lambda: "inside the container" in run.said, 60, lambda: run.said)
    asked = container.ask_inside()
    assert asked.stdout == "app-1\n", asked.stderr
    second = Rehearsed(tmp_path / "second", (*container.options, "--netns"))
    assert second.finish() == 2
    assert "the address 169.254.169.254 in the container's network: Address already in use" in second.said
    assert container.ask_inside().stdout == "app-1\n", "the second has taken nothing away"
    run.process.kill()  # nothing of ours can clean up
    run.process.communicate()
    until(lambda: not run.left(), 15, lambda: f"left: {run.left()}")
    addresses = subprocess.run(
        ["nsenter", f"--net=/proc/{container.pid}/ns/net", "cat", "/proc/net/fib_trie"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "169.254.169.254" not in addresses.stdout


def test_the_address_answers_again_after_a_reboot(container: Container, tmp_path: Path) -> None:
    if shutil.which("nsenter") is None:
        pytest.skip("nsenter is not installed")
    before = container.pid
    run = Rehearsed(
        tmp_path, (*container.options, "--netns", "--reboot", "--notice", "0.2s", "--settle", "600s")
    )
    until(lambda: "Reboot completed" in run.said, 60, lambda: run.said)
    assert container.pid != before
    assert container.ask_inside().stdout == "app-1\n"
    run.process.send_signal(signal.SIGINT)
    assert run.finish() == 130


@pytest.mark.parametrize(
    ("state", "says"),
    [
        ("gone", r"there is no container \S+; (these run|there is none)"),
        (
            "stopped",
            r"container \S+ is not running \(exited with exit code 0\): start it first \(docker start \S+\)",
        ),
        ("paused", r"container \S+ is paused already: resume it first \(docker unpause \S+\)"),
    ],
)
def test_what_cannot_be_paused_is_said_in_one_line(
    container: Container, docker: Engine, tmp_path: Path, state: str, says: str
) -> None:
    match state:
        case "gone":
            docker.run("rm", "-f", container.name)
        case "stopped":
            docker.run("stop", "-t", "5", container.name)
        case "paused":
            docker.run("pause", container.name)
    run = Rehearsed(tmp_path, (*container.options, "--freeze", "1s", "--notice", "1s"))
    assert run.finish() == 2
    assert re.fullmatch(f"caesura: {says}.*", run.said.strip()), run.said


def test_a_compose_service_is_found_by_its_labels(
    docker: Engine, run_container: Callable[..., str], tmp_path: Path
) -> None:
    def service(name: str, project: str, number: int) -> str:
        labels = {"service": name, "project": project, "container-number": str(number)}
        words = [
            word for key, value in labels.items() for word in ("--label", f"com.docker.compose.{key}={value}")
        ]
        return run_container(*words)

    web, first, second = service("web", "shop", 1), service("worker", "shop", 1), service("worker", "shop", 2)
    engine = ("--engine", str(docker.socket), "--freeze", "0.2s", "--notice", "0.1s", "--settle", "0s")
    run = Rehearsed(tmp_path / "one", ("--compose-service", "shop/web", *engine))
    assert run.finish() == 0, run.said
    assert f"container {web}" in run.said
    many = Rehearsed(tmp_path / "many", ("--compose-service", "worker", *engine))
    assert many.finish() == 2
    assert (
        f"has several containers: name one with --container: {', '.join(sorted((first, second)))}"
        in many.said
    )
