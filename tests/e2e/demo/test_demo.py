"""``caesura demo``: every rule holds; Ctrl-C at any moment leaves nothing behind."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import sys
from pathlib import Path

import pytest

from caesura.bus.brokers import find_mosquitto
from caesura.runtime.processes import frozen_processes, marked_processes

pytestmark = pytest.mark.timeout(150)


async def _demo(
    *words: str, mark: str, stderr: int = asyncio.subprocess.STDOUT
) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "caesura_ctl",
        "demo",
        *words,
        env={**os.environ, **dict([mark.split("=")])},
        stdout=asyncio.subprocess.PIPE,
        stderr=stderr,
        start_new_session=True,
    )


@pytest.mark.parametrize("kind", ["mosquitto", "embedded"])
async def test_every_rule_holds(kind: str) -> None:
    if kind == "mosquitto" and find_mosquitto() is None:
        pytest.skip("mosquitto is not installed (on Debian: apt-get install mosquitto)")
    mark = f"DEMO_TEST=holds-{kind}"
    process = await _demo("--json", "--broker-kind", kind, mark=mark)
    out, _ = await process.communicate()
    result = json.loads(out)
    assert [check["rule"] for check in result["checks"] if not check["held"]] == []
    assert (process.returncode, result["held"]) == (0, True)
    assert result["urls"]["live page"].startswith("http://127.0.0.1:")
    assert len(result["pauses"]) == 25
    assert not list(marked_processes(mark))


@pytest.mark.parametrize(
    "moment", ["broker: ", "VMs running", "wave 0: scheduled", "wave 0: started", "frozen"]
)
async def test_ctrl_c_leaves_nothing_behind(moment: str) -> None:
    mark = f"DEMO_TEST=interrupted-{moment.replace(' ', '-').replace(':', '')}"
    before = _cgroups()
    process = await _demo(mark=mark)
    assert process.stdout is not None
    said = b""
    async with asyncio.timeout(90):
        if moment == "frozen":
            while not frozen_processes(mark):  # noqa: ASYNC110 - the kernel announces it to nobody
                await asyncio.sleep(0.05)
        else:
            while moment.encode() not in said:
                said += await process.stdout.readline()
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGINT)  # impatient people press it twice
    async with asyncio.timeout(60):
        await process.communicate()
    assert process.returncode == 130
    assert not list(marked_processes(mark))
    assert _cgroups() <= before, "cgroups were left behind"


async def test_json_is_all_that_is_on_stdout_while_it_is_kept() -> None:
    mark = "DEMO_TEST=kept"
    process = await _demo("--json", "--keep", mark=mark, stderr=asyncio.subprocess.PIPE)
    assert process.stdout is not None
    assert process.stderr is not None
    async with asyncio.timeout(90):
        page = (await process.stderr.readline()).decode()
        result = json.loads(await process.stdout.readline())
        while b"Still running" not in await process.stderr.readline():
            pass
    process.send_signal(signal.SIGINT)
    out, _ = await process.communicate()
    assert out == b""
    assert page.startswith(f"live page: {result['urls']['live page']} ")
    assert not list(marked_processes(mark))


def _cgroups() -> set[Path]:
    return {each for each in Path("/sys/fs/cgroup").glob("**/caesura*") if each.is_dir()}


@pytest.mark.timeout(600)
async def test_every_rule_holds_with_real_guests() -> None:
    """Three real guests with the agent inside: frozen, swapped and replaced, domain by domain, approving over HTTP."""
    if shutil.which("qemu-system-x86_64") is None:
        pytest.skip("QEMU is not installed (on Debian: apt-get install qemu-system-x86)")
    mark = "QEMU_DEMO_TEST=guests"  # a name that QEMU is given, too
    methods = ("freeze", "swap", "replace")
    words = [word for method in methods for word in ("--method", method)]
    process = await _demo("--json", "--driver", "qemu", "--vms", "3", *words, mark=mark)
    out, _ = await process.communicate()
    result = json.loads(out[out.index(b"{") :])
    for method, told in zip(methods, result["rollouts"], strict=True):
        broken = [check for check in told["checks"] if not check["held"]]
        assert broken == [], method
        assert {pause["vm"] for pause in told["pauses"]} == {"web-1", "web-2", "web-3"}
        assert not any(clock["simulated"] for clock in told["clocks"])
    assert (process.returncode, result["held"]) == (0, True)
    freeze, swap, replace = (max(pause["pause_s"] for pause in told["pauses"]) for told in result["rollouts"])
    assert swap < 1.0 < min(freeze, replace)
    assert not list(marked_processes(mark))
    assert [name for name in os.listdir("/dev/shm") if name.startswith("caesura-demo-")] == []  # noqa: PTH208, S108
