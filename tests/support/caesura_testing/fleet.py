"""The fleet of a compose project as a person and the kernel see it: commands, queries, and what is paused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import msgspec

from caesura.runtime.processes import is_stopped
from caesura_testing.compose import Project
from caesura_testing.patience import patient

HOSTS = ("host-1", "host-2", "host-3")
_LOOK_S = 0.02
_WORKLOAD = "CAESURA_DEMO_VM="


class Waited(AssertionError):
    """Something did not come about in time; the text says what, and what there was instead."""


class PauseLog(msgspec.Struct, frozen=True):
    """One VM that was paused: from the first look that found it stopped to the first that found it running.

    Seconds of CLOCK_MONOTONIC.
    """

    vm: str
    since: float
    until: float


class Watch:
    """Asks the kernel again and again which workloads are stopped; runs as a thread."""

    def __init__(self, workloads: Mapping[str, int]) -> None:
        self._workloads = dict(workloads)
        self._since: dict[str, float] = {}
        self._end = threading.Event()
        self.seen: list[PauseLog] = []
        self.together: list[frozenset[str]] = []
        """Which VMs were paused at once, each combination once."""

    def loop(self) -> None:
        """Until ``end``."""
        while not self._end.wait(_LOOK_S):
            self.look()
        self.look(last=True)

    def end(self) -> None:
        """Stop looking."""
        self._end.set()

    def look(self, *, last: bool = False) -> None:
        """Look once; with ``last``, what is paused counts until now."""
        now = time.monotonic()
        frozen = frozenset(vm for vm, pid in self._workloads.items() if is_stopped(pid))
        if frozen and frozen not in self.together:
            self.together.append(frozen)
        for vm in frozen:
            self._since.setdefault(vm, now)
        for vm in [vm for vm in self._since if last or vm not in frozen]:
            self.seen.append(PauseLog(vm, self._since.pop(vm), now))


class Fleet:
    """What tests do with a running project.

    Args:
        project: the compose project.
        ports: published ports: BROKER, EXPORTER, PROMETHEUS.
        folder: for the operator's password.
    """

    def __init__(self, project: Project, ports: Mapping[str, int], folder: Path) -> None:
        self.project = project
        self.prometheus_url = f"http://127.0.0.1:{ports['PROMETHEUS']}"
        self.exporter_url = f"http://127.0.0.1:{ports['EXPORTER']}"
        self._broker_url = f"mqtt://127.0.0.1:{ports['BROKER']}"
        self._password = folder / "ops"

    # -- as a person --

    def caesura(self, *words: str) -> tuple[int, Any, str]:
        """The operator's command on this machine: exit code, its JSON, what it said besides."""
        if not self._password.exists():
            read = (
                "run",
                "--rm",
                "--no-deps",
                "--entrypoint",
                "cat",
                "caesura",
                "/etc/caesura/secrets/ctl_ops",
            )
            self._password.touch(mode=0o600)
            self._password.write_text(self.project.run(*read).out)
        environ = {key: value for key, value in os.environ.items() if not key.startswith("CAESURA_")} | {
            "CAESURA_CTL_BROKER_URL": self._broker_url,
            "CAESURA_CTL_BROKER_PROTOCOL": "5",
            "CAESURA_CTL_BROKER_USERNAME": "ctl_ops",
            "CAESURA_CTL_BROKER_PASSWORD_FILE": str(self._password),
            "CAESURA_CTL_CLIENT": "ops",
        }
        done = subprocess.run(
            [sys.executable, "-m", "caesura_ctl", *words, "--json"],
            env=environ,
            capture_output=True,
            text=True,
            timeout=patient(120),
            check=False,
        )
        try:
            return done.returncode, json.loads(done.stdout), done.stderr
        except ValueError:
            return done.returncode, None, done.stdout + done.stderr

    def rollouts(self) -> dict[str, Any]:
        """Every rollout that the bus retains, by its id; asked again while the broker does not answer."""
        found: list[dict[str, Any]] = []
        said = ""

        def look() -> bool:
            nonlocal said
            code, told, said = self.caesura("history")
            found[:] = told or []
            return code == 0

        until(look, 30.0, lambda: f"the history is answered: {said}")
        return {each["rollout"]: each for each in found}

    def ended(self, rollout: str, *, timeout_s: float = 90.0) -> dict[str, Any]:
        """The state of a rollout once it completed, halted or was aborted."""
        found: dict[str, Any] = {}

        def look() -> bool:
            found.update(self.rollouts().get(rollout, {}))
            return found.get("status") in {"completed", "halted", "aborted"}

        until(look, timeout_s, lambda: f"rollout {rollout} ends, it is {found.get('status', 'unknown')}")
        return found

    def completed(self, rollout: str) -> dict[str, Any]:
        """Bring a rollout to its end as an operator would: resume it when it halted, which must have a reason."""
        begun, resumed = time.monotonic(), 0
        state = self.ended(rollout)
        while state["status"] == "halted" and resumed <= 3:
            if not state["reason"]:
                raise Waited(f"it halted and does not say why: {state}")
            # Refused while a host still owes its report (it tells it when it is back on the bus), and when what was read is over.
            resumed += self.caesura("resume", rollout, "--detach")[0] == 0
            if time.monotonic() - begun > patient(180.0):
                raise Waited(f"not within 180 s: {rollout} continues; it is {state}")
            state = self.ended(rollout)
        if state["status"] != "completed":
            raise Waited(f"rollout {rollout} completes; it is {state['status']}: {state['reason']}")
        return state

    def give_up(self) -> None:
        """Abort whatever has not ended: a test that failed leaves no set held for the next one."""
        for rollout, state in self.rollouts().items():
            if state["status"] not in {"completed", "aborted"}:
                self.caesura("abort", rollout)

    def quiet(self) -> None:
        """Stop the service that starts rollouts, and bring those that it has started to their end.

        The service may be stopped between its request and the coordinator's decision. A later request is decided after it,
        so its answer means that every rollout there will be is known.
        """
        self.project.run("stop", "rollout")
        decided = ("plan", "hypervisor-patch", "--all", "--again")
        until(
            lambda: self.caesura(*decided)[0] in {0, 3},
            60.0,
            lambda: f"the coordinator answers: {self.caesura(*decided)}",
        )
        for rollout in self.rollouts():
            if self.ended(rollout)["status"] == "halted":
                # A test before this one recreated hosts in mid-rollout, which a person has to judge: it holds its sets until then.
                code, _, said = self.caesura("abort", rollout)
                assert code == 0, said
        until(
            lambda: all(each["status"] in {"completed", "aborted"} for each in self.rollouts().values()),
            30.0,
            lambda: f"every rollout ends: {self.rollouts()}",
        )

    def query(self, expression: str) -> dict[tuple[str, ...], float]:
        """An instant query: values by (set, update domain) or whatever labels there are, without the metric's name."""
        url = f"{self.prometheus_url}/api/v1/query?{urllib.parse.urlencode({'query': expression})}"
        try:
            with urllib.request.urlopen(url, timeout=5) as answer:  # noqa: S310 - our own Prometheus
                told = json.load(answer)
        except OSError:
            return {}
        return {
            tuple(value for name, value in sorted(each["metric"].items()) if name != "__name__"): float(
                each["value"][1]
            )
            for each in told["data"]["result"]
        }

    # -- as the kernel --

    def workloads(self) -> dict[str, int]:
        """VM to the process of its workload, as this machine numbers it."""
        found = {}
        for host in HOSTS:
            for pid in self.project.processes(host):
                with suppress(OSError):
                    for each in Path(f"/proc/{pid}/environ").read_bytes().decode().split("\0"):
                        if each.startswith(_WORKLOAD):
                            found[each.removeprefix(_WORKLOAD)] = pid
        return found

    def frozen(self) -> list[int]:
        """Processes of the hosts that are stopped now."""
        return [pid for host in HOSTS for pid in self.project.processes(host) if is_stopped(pid)]

    @contextmanager
    def watched(self) -> Iterator[Watch]:
        """Watch the workloads that run now while the block runs."""
        watch = Watch(self.workloads())
        thread = threading.Thread(target=watch.loop, name="watch")
        thread.start()
        try:
            yield watch
        finally:
            watch.end()
            thread.join()


def until(condition: Callable[[], bool], timeout_s: float, what: Callable[[], str]) -> float:
    """Wait until it holds; how many seconds that took.

    Raises:
        Waited: it did not hold within ``timeout_s`` seconds.
    """
    begun = time.monotonic()
    while not condition():
        if time.monotonic() - begun > patient(timeout_s):
            raise Waited(f"not within {timeout_s:g} s: {what()}")
        time.sleep(_LOOK_S)
    return time.monotonic() - begun
