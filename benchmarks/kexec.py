"""What the pause of guests consists of while their host's kernel is replaced: one run on a host in emulation, in shares.

    python benchmarks/kexec.py
    python benchmarks/kexec.py --json

The seconds are those of QEMU TCG on this machine and say nothing of a real host (for which there is `caesura host rehearse-kexec`); the shares
say what there is to be gained where. Needs what `./check kexec` needs.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from urllib.parse import urlsplit

from caesura.contract import messages as m
from caesura.contract.parts import WholeRollout
from caesura_ctl.session import Session, connect, new_request_id
from caesura_ctl.settings import CtlSettings
from caesura_nested_host.fleet_host import SLOW, FleetHost
from caesura_nested_host.image import Image, NoImage, build, missing
from caesura_nested_host.machine import CONSOLE, running
from caesura_nested_host.pause_parts import pause_parts
from caesura_testing.broker import mosquitto
from caesura_testing.nested_guests import TRIES
from caesura_testing.sandbox import Sandbox

_PATIENCE_S = 900.0


async def run(image: Image) -> dict[str, object]:
    """One host, two guests, the old kernel to the new one."""
    with tempfile.TemporaryDirectory(prefix="ck-", dir="/tmp") as name:
        folder = Path(name)
        (folder / "broker").mkdir()
        async with mosquitto(folder / "broker") as broker, Sandbox(broker) as sandbox:
            host = FleetHost("host-1", image, folder / "h", domain=0)
            async with connect(CtlSettings(broker_url=broker.url, client="benchmark")) as session:
                sandbox.coordinator()
                with running(host.machine):
                    await sandbox.start("coordinator")
                    await asyncio.to_thread(host.prepare, urlsplit(broker.url).port or 1883)
                    await asyncio.to_thread(host.start_updater)
                    await sandbox.until(
                        lambda: host.ready(session.fleet_view), _PATIENCE_S, "host and guests"
                    )
                    await asyncio.to_thread(host.until_guests_beat)
                    for _ in range(TRIES):
                        begun = time.monotonic()
                        state = await rolled(session, sandbox)
                        codes = {code for each in session.fleet_view.reports.values() for code in each.codes}
                        if state.status == "completed" or not SLOW & codes:
                            break
                        await session.ask(m.AbortRequested(request=new_request_id(), rollout=state.rollout))
                        await sandbox.until(
                            lambda: host.ready(session.fleet_view), _PATIENCE_S, "guests that run again"
                        )
                    pauses = await asyncio.to_thread(host.guest_pauses, begun)
                    longest = max(pauses.values(), key=lambda each: each.silence_s)
                    parts = pause_parts(host.machine.lines(CONSOLE), longest.before.at, longest.after.at)
    pause_s = longest.silence_s
    return {
        "from": image.old,
        "to": image.new,
        "status": state.status,
        "codes": list(state.codes),
        "pause_s": round(pause_s, 2),
        "faults": [fault for each in pauses.values() for fault in each.faults],
        "seconds": {name: round(seconds, 2) for name, seconds in parts.items()},
        "shares": {name: round(seconds / pause_s, 3) for name, seconds in parts.items()},
    }


async def rolled(session: Session, sandbox: Sandbox) -> WholeRollout:
    """One rollout to the new kernel, to its end."""
    policy = m.Policy(notice_s=1.0, budget_s=30.0, verify_timeout_s=600.0, on_unsynced="proceed")
    answer = await session.ask(
        m.RolloutRequested(
            request=new_request_id(),
            update="kernel-new",
            selection=m.Selection(),
            policy=policy,
            limits=m.Limits(again=True),
        )
    )
    if not answer.accepted:
        raise NoImage(answer.reason)
    rollouts = session.fleet_view.rollouts

    def ended() -> bool:
        return answer.rollout in rollouts and rollouts[answer.rollout].status in ("completed", "halted")

    await sandbox.until(ended, _PATIENCE_S, "the end of the rollout")
    return rollouts[answer.rollout]


def main() -> int:
    """Print it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    if why := missing():
        print(f"kexec: {why}", file=sys.stderr)
        return 2
    try:
        found = asyncio.run(run(build(uv=os.environ.get("UV", "uv"))))
    except (NoImage, AssertionError) as error:
        print(f"kexec: {error}", file=sys.stderr)
        return 1
    if arguments.json:
        print(json.dumps(found, indent=2))
        return 0
    print(f"{found['from']} -> {found['to']}: {found['status']} {found['codes']}, pause {found['pause_s']} s")
    seconds, parts = found["seconds"], found["shares"]
    assert isinstance(seconds, dict)
    assert isinstance(parts, dict)
    for name, share in parts.items():
        print(f"  {name:<24} {seconds[name]:6.2f} s  {share:6.1%}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
