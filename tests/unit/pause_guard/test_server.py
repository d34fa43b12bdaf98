"""The guard's loop: what has to happen before it ends."""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Mapping
from pathlib import Path

from caesura_pause_guard.server import ACCEPT_RETRY_S, GuardServer
from caesura_testing.patience import patient
from caesura_vmcontrol.freezer_control import Condition
from caesura_vmcontrol.guard_socket import SOCKET_NAME
from caesura_vmcontrol.intent import Intent
from caesura_vmcontrol.notify import Notifier
from caesura_vmcontrol.procfs import Process
from caesura_vmcontrol.qemu_plans import QemuPlan, Vmm
from caesura_vmcontrol.resume_plans import CgroupPlan, ResumePlan
from caesura_vmcontrol.watchdog import Watchdog


class NoStore:
    """The intent is kept nowhere."""

    def store(self, _intent: Intent) -> None:
        """Nothing to do."""

    def clear(self) -> None:
        """Nothing to do."""


class EndedAtOnce(Notifier):
    """SIGTERM comes when the loop begins."""

    def ready(self) -> None:
        os.kill(os.getpid(), signal.SIGTERM)


def test_before_it_ends_it_looks_again_however_short_ago_the_last_look_was(tmp_path: Path) -> None:
    """The updater freezes a guest that the guard resumed, and both are ended."""
    vms: dict[str, Condition] = {"a": "running"}

    def look(plan: ResumePlan, _: Mapping[int, Process] | None) -> Condition:
        return vms[plan.vm]

    def release(plan: ResumePlan, _: Mapping[int, Process] | None) -> None:
        vms[plan.vm] = "running"

    watch = Watchdog(NoStore(), lambda *_, **__: None, clock=lambda: 100.0, look=look, release=release)
    watch.arm(Intent("op", "boot", 90.0, 101.0, (QemuPlan("a", Vmm(4711, 5, "/run/x")),)))
    watch.fire("test")
    until = time.monotonic() + patient(20)
    while watch.state != "fired" or watch._probes.under_way:
        assert time.monotonic() < until
        watch.step()
    vms["a"] = "frozen"
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        GuardServer(
            str(tmp_path), watch, lambda *_, **__: None, exit_when_alone_s=None, notifier=EndedAtOnce()
        ).run()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert vms["a"] == "running"


class CountedSteps(Watchdog):
    """It counts how often it looks."""

    steps = 0

    def step(self) -> float | None:
        self.steps += 1
        return super().step()


def test_one_that_ends_when_alone_does_not_spin_while_its_owner_may_still_pause_a_vm(tmp_path: Path) -> None:
    """It is alone and has work: a request of the updater that died may take effect late."""
    watch = CountedSteps(
        NoStore(),
        lambda *_, **__: None,
        clock=lambda: 10 * time.monotonic(),  # that time is over sooner
        look=lambda *_: "running",
        release=lambda *_: None,
    )
    plan = CgroupPlan("a", "cgroup2", "/sys/fs/cgroup/caesura-made-up/a/cgroup.freeze")
    watch.adopt(Intent("op", "boot", 0.0, 0.1, (plan,)))
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        GuardServer(str(tmp_path), watch, lambda *_, **__: None, exit_when_alone_s=0.0).run()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert watch.at_rest
    assert watch.steps < 100, "some looks; a loop that does not wait takes thousands"


class NoDescriptors:
    """A listener whose first accepts fail; everything else is the real one's."""

    def __init__(self, listener: socket.socket, failures: int) -> None:
        self._listener = listener
        self._failures = failures

    def accept(self) -> tuple[socket.socket, object]:
        if self._failures:
            self._failures -= 1
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return self._listener.accept()

    def fileno(self) -> int:
        return self._listener.fileno()

    def close(self) -> None:
        self._listener.close()


def test_without_descriptors_it_neither_spins_nor_stays_deaf_and_says_it_once(tmp_path: Path) -> None:
    logged: list[str] = []
    watch = Watchdog(NoStore(), lambda event, **_: logged.append(event), clock=time.monotonic)
    server = GuardServer(
        str(tmp_path), watch, lambda event, **_: logged.append(event), exit_when_alone_s=None
    )
    server._listener = NoDescriptors(server._listener, failures=2)  # type: ignore[assignment]
    took_s: list[float] = []
    answers: list[bytes] = []

    def ask() -> None:
        began = time.monotonic()
        try:
            with socket.socket(socket.AF_UNIX) as client:
                client.settimeout(patient(20))
                client.connect(str(tmp_path / SOCKET_NAME))
                client.sendall(b'{"do": "status"}\n')
                answers.append(client.recv(65536))
            took_s.append(time.monotonic() - began)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)

    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    asking = threading.Timer(0, ask)

    class AskedAtOnce(Notifier):
        """The client comes when the loop begins."""

        def ready(self) -> None:
            asking.start()

    server._notifier = AskedAtOnce()
    try:
        server.run()
    finally:
        asking.join()
        for number, handler in before.items():
            signal.signal(number, handler)
    assert json.loads(answers[0])["ok"]
    assert took_s[0] >= 2 * ACCEPT_RETRY_S, "each failure is followed by a pause"
    assert logged.count("guard.accept_failed") == 1
