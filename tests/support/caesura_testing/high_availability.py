"""A rollout that outlives its coordinator, for people to watch: ``deploy/try-high-availability.sh``."""

from __future__ import annotations

import asyncio
import sys
import tempfile
import time
from pathlib import Path

from caesura.contract import messages as m
from caesura.runtime.logs import configure_logging
from caesura_ctl.session import Session, connect, new_request_id
from caesura_ctl.settings import CtlSettings
from caesura_testing.broker import mosquitto, mosquitto_installed
from caesura_testing.postgresql import PostgresServer, programs
from caesura_testing.sandbox import Sandbox, Vm


async def main() -> int:
    """The story; its exit code."""
    for there, package in ((mosquitto_installed(), "mosquitto"), (programs() is not None, "postgresql")):
        if not there:
            print(f"{package} is not installed (on Debian: apt-get install {package})", file=sys.stderr)
            return 2
    configure_logging("try", style="console", level="error")
    with tempfile.TemporaryDirectory(prefix="caesura-try-") as folder:
        async with (
            mosquitto(Path(folder)) as broker,
            PostgresServer() as server,
            Sandbox(broker) as sandbox,
            connect(CtlSettings(broker_url=broker.url, client="ops")) as session,
        ):
            return await _tell(server, sandbox, session)


async def _tell(server: PostgresServer, sandbox: Sandbox, session: Session) -> int:
    names = ("coordinator-1", "coordinator-2")
    hosts = ("host-1", "host-2")
    for name in names:
        sandbox.coordinator(name, store=server.url)
    sandbox.update("patch", ["sleep", "3"], expected_s=3.0)
    for number, host in enumerate(hosts):
        sandbox.host(host, Vm(name=f"web-{number + 1}", set="web", update_domain=number))
    view, began = session.fleet_view, time.monotonic()

    def say(text: str) -> None:
        print(f"{time.monotonic() - began:6.1f} s  {text}", flush=True)

    def ready() -> bool:
        boss = view.coordinator
        known = [view.hosts.get(host) for host in hosts]
        return (
            boss is not None
            and len(view.coordinators) == len(names)
            and any(each.leads for each in view.coordinators.values())
            and all(
                each is not None and each.guard == "ready" and each.epoch == boss.epoch and each.vms
                for each in known
            )
            and all(vm in view.agents and view.agents[vm].online for vm in ("web-1", "web-2"))
        )

    say(f"starting broker, {server.url}, {' and '.join(names)}, {' and '.join(hosts)}")
    await sandbox.start(*names, *hosts)
    await sandbox.until(ready, 60, "everything is ready")
    sandbox.watch.learn()
    leader = next(name for name, each in view.coordinators.items() if each.leads)
    other = next(name for name in names if name != leader)
    say(f"{leader} leads, {other} stands by")
    request = m.RolloutRequested(request=new_request_id(), update="patch", policy=m.Policy(notice_s=1.0))
    answer = await session.ask(request)
    say(f"rollout {answer.rollout} started over web-1 and web-2")
    await sandbox.until(lambda: bool(sandbox.watch.standing()), 60, "a VM is paused")
    say(f"{', '.join(sandbox.watch.standing())} is paused: killing {leader} (kill -9)")
    await sandbox.kill(leader)
    killed = time.monotonic()
    await sandbox.until(lambda: view.coordinators[other].leads, 60, f"{other} leads")
    say(f"{other} leads, {time.monotonic() - killed:.1f} s later")

    def over() -> bool:
        state = view.rollouts.get(answer.rollout)
        return state is not None and state.status in {"completed", "halted", "aborted"}

    await sandbox.until(over, 120, "the end of the rollout")
    state = view.rollouts[answer.rollout]
    for pause in sandbox.watch.pauses:
        say(
            f"{pause.vm} was paused for {(pause.ended or time.monotonic()) - pause.begun:.1f} s, says the kernel"
        )
    # Of a halt the reason begins with the status.
    say(f"rollout {answer.rollout}: {state.reason or state.status}")
    return int(state.status != "completed")


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
