"""The guard's loop: what has to happen before it ends."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Mapping
from pathlib import Path

from caesura.testing.patience import patient
from caesura_host_updater.guard.intent import Intent
from caesura_host_updater.guard.notify import Notifier
from caesura_host_updater.guard.plans import Condition, Plan, QemuPlan, Vmm
from caesura_host_updater.guard.procfs import Process
from caesura_host_updater.guard.server import GuardServer
from caesura_host_updater.guard.watch import Watch


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

    def look(plan: Plan, _: Mapping[int, Process] | None) -> Condition:
        return vms[plan.vm]

    def release(plan: Plan, _: Mapping[int, Process] | None) -> None:
        vms[plan.vm] = "running"

    watch = Watch(NoStore(), lambda *_, **__: None, clock=lambda: 100.0, look=look, release=release)
    watch.arm(Intent("op", "boot", 90.0, 101.0, (QemuPlan("a", Vmm(4711, 5, "/run/x")),)))
    watch.fire("test")
    until = time.monotonic() + patient(20)
    while watch.state != "fired" or watch._rounds.under_way:
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
