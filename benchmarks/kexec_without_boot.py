"""What method kexec costs a guest beside the boot of the kernel: its state is saved, and another boot loads and resumes it.

    python benchmarks/kexec_without_boot.py
    python benchmarks/kexec_without_boot.py --memory 4096 --runs 20 --json

Each run is a guest of its own (firmware without a disk, TCG). "Another boot" is another boot id: the pause guard arrives as the initramfs starts it, in a
process of its own, and the guest's old QEMU is dead. The carve-out is a folder in /dev/shm. Three parts: saving until the old QEMU is dead, the guard's
start until it has looked at the guest, and QEMU's start with the load of the state and `cont`. Milliseconds are those of this machine.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

from caesura.runtime.logs import configure_logging
from caesura_host_updater.drivers.qemu import kexec_obstacles, supervisor
from caesura_host_updater.drivers.qemu.definition import Definition, QemuOptions, QemuVm
from caesura_host_updater.drivers.qemu.driver import QemuDriver
from caesura_host_updater.inventory.kernel_options import KernelOptions
from caesura_vmcontrol import boot_counters, procfs
from caesura_vmcontrol.intent import Intent, IntentFile
from caesura_vmcontrol.kernel_change import ClockPair, KernelChange, Left
from caesura_vmcontrol.process_control import find_by_env, kill_and_wait

_VM = "web-1"
_PATIENCE_S = 30.0
_OTHER_BOOT = "bbbbbbbb-0000-4000-8000-000000000002"
_ARRIVE = """
import sys
from caesura_vmcontrol import procfs
procfs.BOOT_ID = sys.argv[1]
from caesura_pause_guard import arrival
arrival.carve_out_error = lambda path: ""
arrival.kvm_device.make_ready = lambda log: None
from caesura_pause_guard.__main__ import main
sys.exit(main(["--arrive", "--state-dir", sys.argv[2], "--by", "initramfs"]))
"""


async def one_run(folder: Path, memory_mib: int) -> dict[str, float]:
    """Seconds of each part of one pause."""
    carve_out, state_dir = folder / "carve-out", folder / "state"
    carve_out.mkdir()
    driver = QemuDriver(
        "host-1",
        (QemuVm(name=_VM, qemu=Definition(memory_mib=memory_mib, machine="pc-q35-7.2")),),
        QemuOptions(run_dir=str(folder / "run"), ram_dir=f"{carve_out}/ram"),
        state_dir,
        accel="tcg,thread=multi",
        environ=os.environ,
        max_digest_bytes=0,
        kernel=KernelOptions(kexec=True, carve_out=str(carve_out), early=False),
    )
    await driver.open()
    mark = ""
    try:
        await driver.prepare(_VM, "op-1", "kexec", "")
        plan = driver.resume_plan(_VM)
        mark = plan.mark  # type: ignore[union-attr] - that of a replace
        called = time.monotonic()
        await driver.checkpoint(_VM, time.monotonic() + _PATIENCE_S)
        saved = time.monotonic()
        boot_counters.reset(str(state_dir), str(carve_out), "op-1", procfs.boot_id())
        left = Left(ClockPair(0, time.time(), 0.0), time.monotonic(), "6.1")
        change = KernelChange("6.1", str(carve_out), left=left)
        IntentFile(str(state_dir)).store(
            Intent("op-1", procfs.boot_id(), 0.0, 1.0, (plan,), kernel_change=change)
        )
        other_boot = folder / "boot"
        other_boot.write_text(_OTHER_BOOT)
        begun = time.monotonic()
        argv = (sys.executable, "-I", "-c", _ARRIVE, str(other_boot), str(state_dir))
        done = await asyncio.to_thread(subprocess.run, argv, capture_output=True, text=True, check=False)
        ended = time.monotonic()
        if done.returncode:
            raise RuntimeError(done.stdout + done.stderr)
        load_s = float(re.findall(r'"load": ([\d.]+)', done.stdout + done.stderr)[-1])
    finally:
        await driver.close(stop_vms=True)
        for each in find_by_env(mark) if mark else ():
            kill_and_wait(each.pid, each.start_ticks, time.monotonic() + _PATIENCE_S)
    return {
        "save": saved - called,
        "guard": ended - begun - load_s,
        "QEMU, load, cont": load_s,
        "all": saved - called + ended - begun,
    }


async def run(runs: int, memory_mib: int) -> dict[str, object]:
    """The median and the worst of each part, seconds."""
    found: list[dict[str, float]] = []
    # No file system here has DAX.
    with (
        mock.patch.object(kexec_obstacles, "dax_error", return_value=""),
        mock.patch.object(supervisor, "carve_out_error", return_value=""),
    ):
        for _ in range(runs + 1):  # the first warms up
            with tempfile.TemporaryDirectory(prefix="ckb-", dir="/dev/shm") as name:
                found.append(await one_run(Path(name), memory_mib))
    parts = {part: [each[part] for each in found[1:]] for part in found[0]}
    return {
        "runs": runs,
        "memory_mib": memory_mib,
        "median_s": {part: round(statistics.median(each), 4) for part, each in parts.items()},
        "worst_s": {part: round(max(each), 4) for part, each in parts.items()},
    }


def main() -> int:
    """Print it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--memory", type=int, default=1024, metavar="MIB")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    configure_logging("benchmark", level="error")
    found = asyncio.run(run(arguments.runs, arguments.memory))
    if arguments.json:
        print(json.dumps(found, indent=2))
        return 0
    medians, worst = found["median_s"], found["worst_s"]
    assert isinstance(medians, dict)
    assert isinstance(worst, dict)
    print(f"{arguments.runs} pauses of a guest of {arguments.memory} MiB, without the boot between:")
    for part, seconds in medians.items():
        print(
            f"  {part:<20} {seconds * 1e3:7.1f} ms  {seconds / medians['all']:5.1%}  worst {worst[part] * 1e3:.1f} ms"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
