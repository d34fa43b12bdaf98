"""What a host-scope freeze costs beyond the update's own time: ``python benchmarks/freeze.py``.

Real guests on one host, frozen by the operation that the host updater runs, with journal and pause guard, around an
update that sleeps. The overhead is the longest pause minus the update's own seconds. See --help.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import sys
import tempfile
from datetime import UTC, datetime, timedelta
from pathlib import Path
from statistics import median

import structlog
from pause import percentile

from caesura.contract.messages import OperationTarget, StartOperation
from caesura_host_updater.drivers.qemu.definition import Definition, QemuOptions, QemuVm
from caesura_host_updater.drivers.qemu.driver import QemuDriver
from caesura_host_updater.guard_client import GuardClient
from caesura_host_updater.inventory.updates import UpdateFile
from caesura_host_updater.journal import JournalThread
from caesura_host_updater.operation.report import final_report
from caesura_host_updater.operation.runner import OperationRunner
from caesura_host_updater.operation.state import Operation, UpdateRun, VmPause
from caesura_host_updater.pause_markers import PauseMarkers
from caesura_testing.guests import image
from caesura_vmcontrol.procfs import boot_id

_APPEND = "console=ttyS0 quiet rdinit=/init panic=-1 caesura.ip=none"


async def freeze(vms: int, times: int, seconds: float) -> list[float]:
    """The overheads in seconds."""
    files = await asyncio.to_thread(image)
    with (
        tempfile.TemporaryDirectory(prefix="cb-", dir="/tmp") as name,
        tempfile.TemporaryDirectory(dir="/dev/shm") as ram,
    ):
        folder = Path(name)
        guest = Definition(
            memory_mib=128, machine="pc-q35-7.2", kernel=files.kernel, initrd=files.initrd, append=_APPEND
        )
        names = [f"vm-{number}" for number in range(vms)]
        driver = QemuDriver(
            "bench",
            tuple(QemuVm(name=each, qemu=guest) for each in names),
            QemuOptions(run_dir=str(folder / "run"), ram_dir=ram, start_timeout_s=60.0),
            folder,
            accel="tcg,thread=multi",
            environ=os.environ,
            max_digest_bytes=0,
        )
        guard = GuardClient(folder, spawn=True)
        journal = JournalThread()
        await journal.open(str(folder / "journal.sqlite"))
        await guard.start()
        keeping = asyncio.create_task(guard.run())
        pauses = PauseMarkers(folder)
        await driver.open()
        try:
            await _until_idle(driver, names)
            return [
                await _once(driver, guard, pauses, journal, names, seconds, number) for number in range(times)
            ]
        finally:
            keeping.cancel()
            await driver.close(stop_vms=True)
            await guard.close()
            await journal.close()


async def _until_idle(driver: QemuDriver, names: list[str]) -> None:
    """Guests that boot keep the machine busy: wait until each one's agent tells the time."""
    for name in names:
        async with asyncio.timeout(300):
            while True:
                try:
                    await driver.sync_clock(name)
                    break
                except Exception:  # noqa: BLE001 - not up yet
                    await asyncio.sleep(0.2)


async def _once(
    driver: QemuDriver,
    guard: GuardClient,
    pauses: PauseMarkers,
    journal: JournalThread,
    names: list[str],
    seconds: float,
    number: int,
) -> float:
    update = UpdateFile(
        name="sleep",
        impact="pause",
        scope="host",
        argv=("sleep", str(seconds)),
        expected_s=seconds,
        timeout_s=seconds + 5,
    )
    command = StartOperation(
        operation=f"freeze-{number}",
        epoch=1,
        coordinator="bench",
        host="bench",
        rollout="bench",
        wave=0,
        method="freeze",
        targets=tuple(OperationTarget(vm=name, set="bench", update_domain=0) for name in names),
        update="sleep",
        budget_s=seconds + 8,
        not_after=datetime.now(UTC) + timedelta(seconds=30),
    )
    state = Operation(
        operation=command.operation,
        method="freeze",
        budget_s=command.budget_s,
        update="sleep",
        update_timeout_s=update.timeout_s,
        vms=tuple(VmPause(vm=name, set="bench", update_domain=0) for name in names),
        runs=(UpdateRun(),),
    )
    await journal.do(lambda kept: kept.accept(command, state, boot_id(), []))
    runner = OperationRunner(
        command,
        state,
        update,
        host="bench",
        driver=driver,
        guard=guard,
        pauses=pauses,
        journal=journal,
        environ=os.environ,
        announce=lambda *_: None,
        on_change=lambda: None,
    )
    ended = await runner.run()
    report = final_report("bench", command, ended, 1, driver.states(), datetime.now(UTC))
    if report.status != "completed" or report.overhead_s is None:
        raise SystemExit(f"the operation {report.status}: {report.reason}")
    await journal.do(lambda kept: kept.finish(report, [], []))
    return report.overhead_s


def main() -> int:
    """Exit code: 0 the median overhead is at most 20 ms, 1 not."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog="examples:\n  python benchmarks/freeze.py\n  python benchmarks/freeze.py --vms 2 --times 3",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--vms", type=int, default=8, help="guests on the host (default: %(default)s)")
    parser.add_argument("--times", type=int, default=20, help="freezes (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=0.5, help="the update takes (default: %(default)s)")
    options = parser.parse_args()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))
    found = asyncio.run(freeze(options.vms, options.times, options.seconds))
    shown = " / ".join(
        f"{value * 1000:.1f}" for value in (median(found), percentile(found, 0.99), max(found))
    )
    print(
        f"{len(found)} freezes of {options.vms} guests: overhead median / p99 / max {shown} ms; target: median at most 20"
    )
    return 0 if median(found) <= 0.02 else 1


if __name__ == "__main__":
    sys.exit(main())
