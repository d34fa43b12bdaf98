"""What libvirt adds to a freeze: the same pause through its daemon and over a QMP socket, in turns, in one run.

    python benchmarks/libvirt_freeze.py
    python benchmarks/libvirt_freeze.py --pauses 50 --json

Each pause is a freeze that is confirmed and a resume that is confirmed, with nothing in between: what is left is the overhead. Both guests are firmware
without a disk, under TCG. The milliseconds are those of this machine; quote the ratio. Needs libvirt-daemon, libvirt-clients and python3-libvirt.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

from caesura_host_updater.drivers.libvirt.definition import LibvirtOptions
from caesura_host_updater.drivers.libvirt.driver import LibvirtDriver
from caesura_host_updater.drivers.port import Driver
from caesura_host_updater.drivers.qemu.definition import Definition, QemuOptions, QemuVm
from caesura_host_updater.drivers.qemu.driver import QemuDriver
from caesura_testing.libvirt_daemons import URI, libvirt_daemon, libvirt_installed

_VM = "web-1"
_WARM_UP = 3


async def pause_s(driver: Driver) -> float:
    """Seconds of one pause of nothing."""
    began = time.monotonic()
    await driver.freeze(_VM, began + 10)
    if await driver.resume(_VM, 10) != "running":
        raise RuntimeError("it does not run after its pause")
    return time.monotonic() - began


async def run(pauses: int) -> dict[str, object]:
    """Both drivers in turns."""
    with tempfile.TemporaryDirectory(prefix="lvb-", dir="/tmp") as name, libvirt_daemon() as daemon:
        folder = Path(name)
        daemon.define(_VM)
        libvirt = LibvirtDriver(LibvirtOptions(uri=URI), (str(daemon.socket),), folder / "libvirt")
        qemu = QemuDriver(
            "host-1",
            (QemuVm(name=_VM, qemu=Definition(memory_mib=32, machine="pc-i440fx-7.2")),),
            QemuOptions(run_dir=str(folder / "run"), ram_dir=str(folder)),
            folder / "qemu",
            accel="tcg,thread=multi",
            environ=os.environ,
            max_digest_bytes=0,
        )
        taken: dict[str, list[float]] = {"libvirt": [], "qemu": []}
        try:
            for driver in (libvirt, qemu):
                await driver.open()
            for number in range(pauses + _WARM_UP):
                for driver in (libvirt, qemu):
                    seconds = await pause_s(driver)
                    if number >= _WARM_UP:
                        taken[driver.name].append(seconds)
        finally:
            await libvirt.close(stop_vms=False)
            await qemu.close(stop_vms=True)
    medians = {name: statistics.median(each) for name, each in taken.items()}
    return {
        "pauses": pauses,
        "median_ms": {name: round(each * 1000, 1) for name, each in medians.items()},
        "p95_ms": {
            name: round(sorted(each)[int(len(each) * 0.95)] * 1000, 1) for name, each in taken.items()
        },
        "ratio": round(medians["libvirt"] / medians["qemu"], 2),
    }


def main() -> int:
    """0: measured; 1: it cannot be measured here."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--pauses", type=int, default=100, metavar="N", help="pauses of each driver (default: 100)"
    )
    parser.add_argument("--json", action="store_true", help="one JSON document")
    arguments = parser.parse_args()
    if not libvirt_installed():
        print(
            "libvirtd, virsh, QEMU or python3-libvirt is missing: deploy/debian-packages.sh", file=sys.stderr
        )
        return 1
    result = asyncio.run(run(arguments.pauses))
    if arguments.json:
        print(json.dumps(result))
    else:
        print(
            f"median {result['median_ms']} ms, 95 % within {result['p95_ms']} ms; libvirt / qemu {result['ratio']}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
