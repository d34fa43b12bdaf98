"""Many swaps of one guest under load: ``python benchmarks/soak.py``. Memory, disk, heartbeat and clocks are checked.

The guest rewrites a part of its memory, writes checksummed blocks to a qcow2 disk with fsync, and beats every 5 ms,
while it is handed from process to process by one driver, as a host updater has it. See --help.
"""

from __future__ import annotations

import argparse
import asyncio
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from hops import Bench
from pause import percentile

from caesura_testing.guests import Definition, image


async def soak(swaps: int, every: int, binary: str, ram_mib: int) -> int:
    """Swap and check; 0 when nothing was ever wrong."""
    with tempfile.TemporaryDirectory(prefix="cb-", dir="/tmp") as name:
        folder = Path(name)
        disk = folder / "disk.qcow2"
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(disk), "64M"], check=True)
        definition = Definition(
            memory_mib=ram_mib,
            binary=binary,
            vcpus=2,
            run=("heartbeat", "memory", "disk"),
            parameters={"memory": "50", "dirty_mib": "32", "heartbeat_ms": "5"},
            disks=((disk, "qcow2"),),
        )
        bench = Bench(definition, folder, await asyncio.to_thread(image))
        try:
            await bench.boot()
            return await _swap_and_check(bench, swaps, every, disk)
        finally:
            await bench.close()


async def _swap_and_check(bench: Bench, swaps: int, every: int, disk: Path) -> int:
    driver = bench.adopting()
    await driver.open()
    pauses, began, wrong = [], time.monotonic(), []
    try:
        for number in range(1, swaps + 1):
            await driver.prepare("vm", f"soak-{number}", "swap", "")
            await bench.heartbeat.connect(bench.vm / "next" / "heartbeat")
            done = await driver.hand_over("vm", time.monotonic() + 10)
            pauses.append(done.resumed_at - done.frozen_at)
            await driver.release("vm")
            await bench.heartbeat.next(30.0)
            if number % every == 0 or number == swaps:
                wrong += await _check(bench)
                shown = f"median {median(pauses) * 1000:.1f}, p99 {percentile(pauses, 0.99) * 1000:.1f}, max {max(pauses) * 1000:.1f} ms"
                print(
                    f"{number}/{swaps} swaps, {time.monotonic() - began:.0f} s, pause {shown}; {wrong or 'all well'}",
                    flush=True,
                )
                if wrong:
                    return 1
        states = dict(driver.states())
    finally:
        words = driver.process_of("vm")
        bench.pid = int(words.rsplit("pid ", 1)[1].rstrip(")")) if "pid " in words else bench.pid
        await driver.close(stop_vms=False)
    left = [pid for pid in _qemus(str(bench.folder)) if pid != bench.pid]
    await bench.close()
    image_check = subprocess.run(
        ["qemu-img", "check", str(disk)], capture_output=True, text=True, check=False
    )
    print(
        f"qemu-img check: {image_check.stdout.strip().splitlines()[0] if image_check.stdout else image_check.stderr}"
    )
    print(f"state at the end: {states}; QEMU processes left beside the guest's: {left or 'none'}")
    print(f"beats heard: {len(bench.heartbeat.beats)}, faults: {bench.heartbeat.faults() or 'none'}")
    return (
        1 if image_check.returncode or left or bench.heartbeat.faults() or states != {"vm": "running"} else 0
    )


async def _check(bench: Bench) -> list[str]:
    wrong: list[str] = list(bench.heartbeat.faults())
    for workload in ("memory", "disk"):
        answer: dict[str, Any] = await bench.ask(workload, "verify")
        if not answer["ok"]:
            wrong.append(f"{workload}: {answer}")
    return wrong


def _qemus(mark: str) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if (
                entry.name.isdigit()
                and mark in (entry / "cmdline").read_text()
                and "qemu" in str((entry / "exe").readlink())
            ):
                found.append(int(entry.name))
        except OSError:
            continue
    return found


def main() -> int:
    """Exit code: 0 nothing was ever wrong, 1 something was."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog="examples:\n  python benchmarks/soak.py\n  python benchmarks/soak.py --swaps 20",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--swaps", type=int, default=1000, help="default: %(default)s")
    parser.add_argument(
        "--every", type=int, default=50, help="check memory and disk so often (default: %(default)s)"
    )
    parser.add_argument("--ram", type=int, default=256, help="guest RAM in MiB (default: %(default)s)")
    parser.add_argument("--binary", default="qemu-system-x86_64")
    options = parser.parse_args()
    return asyncio.run(soak(options.swaps, options.every, options.binary, options.ram))


if __name__ == "__main__":
    sys.exit(main())
