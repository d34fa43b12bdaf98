"""One fault inside each pause, of every kind in turn: no VM is paused beyond its budget, and nothing is left behind.

The kernel is the witness. ``CAESURA_SOAK_S=720 CAESURA_SOAK_SEED=7 pytest -s tests/e2e/soak``: at least one whole deck of
faults, then more until the time is over; the figures are printed, the seed also with a failure. To look into one kind:
``CAESURA_SOAK_FAULTS="guard stopped;VM killed"``.
"""

from __future__ import annotations

import asyncio
import importlib.util
import os
import random
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from caesura.bus.local_broker import LocalBroker
from caesura.contract import messages as m
from caesura.runtime.processes import marked_processes
from caesura_ctl.errors import NoBroker, NoCoordinatorAnswer
from caesura_ctl.session import new_request_id
from caesura_testing.patience import patient
from caesura_testing.sandbox import Vm

_SECONDS = float(os.environ.get("CAESURA_SOAK_S", "60"))
_SEED = int(os.environ.get("CAESURA_SOAK_SEED", "0")) or random.randrange(1, 1_000_000)
REPEAT_WITH = {"CAESURA_SOAK_S": f"{_SECONDS:g}", "CAESURA_SOAK_SEED": str(_SEED)}
_ONLY = {each.strip() for each in os.environ.get("CAESURA_SOAK_FAULTS", "").split(";")} - {""}
"""Only these kinds, divided by semicolons: to look into one."""
_BUDGET_S = 6.0
_SLACK_S = 0.3  # s: the watch looks a hundred times a second, on a machine that may be busy
_DECK_S = 600.0  # s: far more than a whole deck of faults takes
_UPDATE = "caesura-soak-update"
"""A word on the command line of every process of an update."""


def _faults() -> ModuleType:
    # Test folders are no packages.
    spec = importlib.util.spec_from_file_location(
        "caesura_soak_faults", Path(__file__).with_name("faults.py")
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


class Soak:
    """The stage, its faults, and what was seen."""

    def __init__(self, stage: Any, faults: Any, dice: random.Random) -> None:
        self.stage = stage
        self.sandbox = stage.sandbox
        self.faults = faults
        self.dice = dice
        self.done: Counter[str] = Counter()
        self.longest: dict[str, float] = {}
        self.now = ""

    async def one_pause(self, kind: str) -> None:
        """A rollout on one host, a fault when the kernel shows its first pause, then everything as it was."""
        update, strike = self.faults.kinds()[kind]
        host = self.faults.host_of(kind, self.dice.choice(["host-1", "host-2"]), "host-2")
        self.now = f"{kind} on {host}"
        before = len(self.sandbox.watch.pauses)
        rollout = await self._roll(update, host)
        await self.sandbox.until(
            lambda: bool(self.sandbox.watch.standing()), 20, f"a pause of {host}: {self.now}"
        )
        await asyncio.sleep(self.dice.choice([0.0, 0.0, 0.2, 0.8]))  # somewhere in the pause
        await strike(host)
        await self.sandbox.until(
            lambda: not self.sandbox.watch.standing(),
            _BUDGET_S + 5,
            f"the end of the pause: {self.now}",
        )
        pauses = self.sandbox.watch.pauses[before:]
        longest_s = max(each.ended - each.begun for each in pauses if each.ended is not None)
        self.done[kind] += 1
        self.longest[kind] = max(longest_s, self.longest.get(kind, 0.0))
        limit_s = _BUDGET_S + _SLACK_S
        if kind == "updater and guard killed":
            # Nobody is left until they are restarted, and a busy machine takes seconds to import them.
            limit_s = patient(_BUDGET_S)
        assert longest_s <= limit_s, f"{longest_s:.2f} s: {self.now}"
        self.stage.assert_order()
        await self.faults.undo()
        await self._all_well(rollout)

    async def _roll(self, update: str, host: str) -> str:
        policy = self.stage.policy(
            budget_s=_BUDGET_S,
            notice_s=0.2,
            verify_timeout_s=5.0,
            on_not_ready="proceed",
            on_unsynced="proceed",
        )
        selection = m.Selection(hosts=(host,))
        answer = await self.stage.session.ask(
            m.RolloutRequested(
                request=new_request_id(),
                update=update,
                policy=policy,
                selection=selection,
                limits=m.Limits(again=True),
            )
        )
        assert answer.accepted, f"{answer.reason}: before {self.now}"
        return str(answer.rollout)

    async def _all_well(self, rollout: str) -> None:
        """Every service is back, the rollout has its end, and there is nothing that was not there before."""
        await self.sandbox.until(self._over(rollout), 120, f"the end of rollout {rollout}: {self.now}")
        for _ in range(20):
            if self.stage.rollout(rollout).status in {"completed", "aborted"}:
                break
            with suppress(NoCoordinatorAnswer, NoBroker):
                await self.stage.session.ask(m.AbortRequested(request=new_request_id(), rollout=rollout))
                await self.sandbox.until(
                    lambda: self.stage.rollout(rollout).status in {"completed", "aborted"},
                    20,
                    self.now,
                )
        if any(self._vms_missing()):
            await self._restart_updaters()  # they start VMs that do not run
        await self.stage.ready("host-1", "host-2")
        await self.sandbox.until(lambda: not self._left_behind(), 20, f"nothing left behind: {self.now}")
        assert self._left_behind() == []

    def _over(self, rollout: str) -> Callable[[], bool]:
        def over() -> bool:
            state = self.stage.rollout(rollout)
            return state is not None and state.status in {"completed", "halted", "aborted"}

        return over

    def _vms_missing(self) -> list[str]:
        """VMs without a first process, or without the agent that belongs in them."""
        found = self.sandbox.watch.learn()
        with_agent = {
            vm for vm, pids in found.items() if any(b"caesura_vm_agent" in _words(pid) for pid in pids)
        }
        return sorted(set(self.sandbox.hosts) - with_agent)

    async def _restart_updaters(self) -> None:
        for vm in self._vms_missing():
            for pid in self.sandbox.watch.learn().get(vm, []):
                with suppress(ProcessLookupError):
                    os.kill(pid, 9)
        for host in ("host-1", "host-2"):
            await self.sandbox.stop(host, 60)
            await self.sandbox.start(host)

    def _left_behind(self) -> list[str]:
        """What runs, or is there, that should not be."""
        words = [_words(pid) for pid in marked_processes(self.sandbox.mark)]
        found = [each.replace(b"\0", b" ").decode() for each in words if _UPDATE.encode() in each]
        for module, wanted in (
            ("caesura_host_updater", 2),
            ("caesura_pause_guard", 2),
            ("caesura_coordinator", 1),
        ):
            count = sum(module.encode() in each.split(b"\0") for each in words)
            if count != wanted:
                found.append(f"{count} times {module}, not {wanted}")
        found += [f"VM {vm} lacks processes" for vm in self._vms_missing()]
        found += [f"VM {vm} is paused" for vm in sorted(self.sandbox.watch.frozen())]
        found += [
            f"set {document.set} shows {len(document.events)} events"
            for document in self.stage.fleet_view.documents.values()
            if document.events
        ]
        return found


def _words(pid: int) -> bytes:
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    return b""


def _describe(stage: Any, stack: ExitStack, tools: ModuleType) -> tuple[str, dict[str, Any]]:
    """Updates, the small disk of host-1, and the pipes of host-2, whose guard is a service of its own."""
    sandbox = stage.sandbox
    hang = f"exec -a {_UPDATE} sleep 600"
    sandbox.update("patch", ["bash", "-c", f"exec -a {_UPDATE} sleep 1.5"], expected_s=1.5, timeout_s=4.0)
    sandbox.update("hangs", ["bash", "-c", hang], expected_s=1.0, timeout_s=4.0)
    sandbox.update(
        "ignores", ["bash", "-c", f"trap '' TERM; ({hang}) & {hang}"], expected_s=1.0, timeout_s=4.0
    )
    sandbox.service("host-2-guard", "caesura_pause_guard", {})
    sandbox.environments["host-2-guard"] = ("caesura_pause_guard", {})
    sandbox.arguments["host-2-guard"] = ("--state-dir", f"{sandbox.folder}/host-2")
    pipes = {}
    for name in ("host-2", "host-2-guard"):
        pipes[name] = sandbox_pipe = tools.Pipe(sandbox.folder / f"{name}.pipe")
        stack.callback(sandbox_pipe.close)
        sandbox.outputs[name] = sandbox_pipe.path
    if os.geteuid() != 0:
        return "", pipes
    stack.enter_context(tools.small_disk(sandbox.folder / "host-1", "8m"))
    return "host-1", pipes


@pytest.mark.timeout(_SECONDS + _DECK_S)
async def test_a_fault_in_each_pause(stages: Callable[..., Any], broker: LocalBroker) -> None:
    dice, tools = random.Random(_SEED), _faults()
    stage = await stages(
        host_1=[Vm(name="web-1", set="web"), Vm(name="db-1", set="db", update_domain=1)], up=False
    )
    stage.sandbox.host(
        "host-2",
        Vm(name="web-2", set="web", update_domain=1),
        Vm(name="db-2", set="db"),
        guard="external",
    )
    with ExitStack() as stack:
        disk, pipes = _describe(stage, stack, tools)
        await stage.sandbox.start("host-2-guard")
        await stage.up("host-1", "host-2")
        soak = Soak(stage, tools.Faults(stage, broker, disk=disk, pipes=pipes), dice)
        draining = asyncio.create_task(_keep_draining(soak, pipes))
        began = time.monotonic()
        kinds = [each for each in soak.faults.kinds() if not _ONLY or each in _ONLY]
        assert _ONLY or len(kinds) >= 14
        try:
            while time.monotonic() - began < _SECONDS or not soak.done:
                for kind in dice.sample(kinds, len(kinds)):
                    await soak.one_pause(kind)
                    if time.monotonic() - began >= _SECONDS and len(soak.done) == len(kinds):
                        break
        except BaseException:
            print(f"\nseed {_SEED}; at {soak.now}; done before: {dict(soak.done)}")  # noqa: T201 - a failure without its seed is no use
            raise
        finally:
            draining.cancel()
        took_s = time.monotonic() - began
    rows = [
        f"{count:>3}  longest {soak.longest[kind]:.2f} s  {kind}" for kind, count in sorted(soak.done.items())
    ]
    print(  # noqa: T201 - what was tried
        f"\nseed {_SEED}: {sum(soak.done.values())} faults of {len(kinds)} kinds in {took_s:.0f} s, "
        f"{len(stage.sandbox.watch.pauses)} pauses, longest {max(soak.longest.values()):.2f} s "
        f"of a budget of {_BUDGET_S:g} s; nothing left behind",
        *rows,
        sep="\n  ",
    )


async def _keep_draining(soak: Soak, pipes: dict[str, Any]) -> None:
    """Somebody reads the pipes, except in a pause whose fault is that nobody does."""
    while True:
        if "pipe" not in soak.now:
            for pipe in pipes.values():
                pipe.drain()
        await asyncio.sleep(0.05)
