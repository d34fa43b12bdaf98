"""The first half of a replace: the device state goes to a file, and the old process is killed.

Until the claim ``file:...`` stands, the way out is ``cont`` on the old process; from then on it is a new process
that is started from the file. The file is small and read back at once: what is claimed is what is on disk.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import signal
import time
from pathlib import Path

from caesura.runtime.threads import in_thread, in_thread_to_its_end
from caesura_host_updater.drivers.qemu.async_qmp import AsyncQmp
from caesura_host_updater.drivers.qemu.handover import HandOverFailed, is_verdict, migrate, take_from
from caesura_vmcontrol.durable_files import sync_folder
from caesura_vmcontrol.procfs import alive, send_signal
from caesura_vmcontrol.qemu_plans import ReplacePlan
from caesura_vmcontrol.qemu_replace import PART

CAPABILITIES = {"x-ignore-shared": True, "events": True}
"""The capabilities of the process that saves its state. A file never answers, so it has no return path."""
_NAME = "caesura-state"
_STATE_BYTES = 8 << 20  # device state is 0.2 to 0.4 MB
_DEATH_S = 2.0  # s: a killed QEMU unmaps its RAM, which stays in its file
_LOOK_S = 0.001


async def save_state(qmp: AsyncQmp, plan: ReplacePlan, by: float, *, gone: bool, moved_bytes: int) -> float:
    """Save, claim, and kill the old process; when the guest stopped, on CLOCK_MONOTONIC.

    ``gone``: return when it is dead. Unmapping its RAM takes the kernel some 10 ms a GiB, in which a new process can
    be started already if nothing but the old one's death is waited for.
    ``moved_bytes``: the RAM blocks beside the guest's shared RAM (firmware, video), which are in the file.

    Raises:
        HandOverFailed, QmpFailed, OSError: the guard's way out makes the guest run again.
    """
    part = Path(f"{plan.state_file}{PART}")
    handle = os.open(part, os.O_CREAT | os.O_TRUNC | os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        await qmp.pass_file(handle, _NAME)
    finally:
        os.close(handle)
    with qmp.watch() as watch:
        try:
            async with asyncio.timeout_at(asyncio.get_running_loop().time() + by - time.monotonic()):
                await qmp.execute("stop")
                await migrate(qmp, plan, f"fd:{_NAME}")
                verdict = await watch.first(is_verdict)
                if verdict.data["status"] != "completed":
                    raise HandOverFailed(f"QEMU says that saving its state {verdict.data['status']}")
        except TimeoutError:
            raise HandOverFailed("its state was not saved in time") from None
        stopped = next((event.at for event in watch.events if event.name == "STOP"), time.monotonic())
    if plan.across is None:
        text = _keep(part, plan.state_file, moved_bytes + _STATE_BYTES)
    else:  # on a disk, which may make us wait
        text = await in_thread("state file", lambda: _keep_durably(part, plan, moved_bytes + _STATE_BYTES))
    if time.monotonic() >= by:
        raise HandOverFailed("its state was not saved in time")
    if plan.across is None:
        take_from(plan, text)
    else:
        await in_thread_to_its_end("claim", lambda _: take_from(plan, text))
    send_signal(plan.old.pid, plan.old.start_ticks, signal.SIGKILL)
    until = time.monotonic() + _DEATH_S
    while gone and alive(plan.old.pid, plan.old.start_ticks):
        if time.monotonic() > until:
            raise HandOverFailed(f"the old process {plan.old.pid} does not die")
        await asyncio.sleep(_LOOK_S)  # the kernel does not call us before it is reaped
    return stopped


def _keep_durably(part: Path, plan: ReplacePlan, limit_bytes: int) -> str:
    """As ``_keep``; it outlives the kernel when this returns. Blocking."""
    handle = os.open(part, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
    text = _keep(part, plan.state_file, limit_bytes)
    sync_folder(str(part.parent))
    return text


def _keep(part: Path, state_file: str, limit_bytes: int) -> str:
    """Give the state its name; what is claimed of it."""
    size = part.stat().st_size
    if not 0 < size <= limit_bytes:
        raise HandOverFailed(f"the state file has {size} bytes: that is not the state of devices alone")
    part.rename(state_file)
    return f"file:{size}:{hashlib.sha256(Path(state_file).read_bytes()).hexdigest()}"
