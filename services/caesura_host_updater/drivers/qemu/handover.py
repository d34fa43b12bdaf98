"""The swap itself: from a running guest in the old process to the same guest in the new one.

The order of things is the commit protocol of ``guard.claims``; the pause lasts from QEMU's STOP to its RESUME, so
nothing is asked, written or waited for between them that need not be.
"""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from typing import Any, NamedTuple

from caesura_host_updater.drivers.qemu.async_qmp import (
    AsyncQmp,
    QmpCommandRefused,
    QmpConnectionLost,
    QmpEvent,
    QmpEventWatch,
    QmpFailed,
)
from caesura_host_updater.drivers.qemu.memory_comparison import Compared
from caesura_vmcontrol.claims import claim, note
from caesura_vmcontrol.procfs import alive, send_signal
from caesura_vmcontrol.qemu_plans import ReplacePlan, SwapPlan
from caesura_vmcontrol.qmp_commands import note_ran

SWAP_CAPABILITIES = {"x-ignore-shared": True, "events": True, "return-path": True}
"""The capabilities of both processes of a swap."""
_STATE_BYTES = 1 << 20  # device state is 0.2 to 0.4 MB
_DEATH_S = 0.3  # s: from the end of a process's connections to its own
_LOOK_S = 0.001
_COMPARE_S = (
    0.1  # s: 0.3 ms is usual, beside two QMP answers; RAM that was swapped out must not prolong the pause
)

Compare = Callable[[], Awaitable[Compared]]
"""Compares sampled pages of the guest's RAM in both processes, while the guest is paused."""


class HandOverFailed(Exception):
    """The new process does not run the guest, as far as we know; the text says why."""


class MemoryDiffers(HandOverFailed):
    """The new process has other memory than the old one; the old one still has the guest."""


class Handed(NamedTuple):
    """When the guest stopped in the old process and continued in the new one, on CLOCK_MONOTONIC; what was shown of its memory."""

    stopped_at: float
    resumed_at: float
    compared: Compared


def is_verdict(event: QmpEvent) -> bool:
    """Whether it says how a migration ended."""
    return event.name == "MIGRATION" and event.data.get("status") in ("completed", "failed", "cancelled")


async def read_capabilities(qmp: AsyncQmp) -> dict[str, bool]:
    """Every migration capability that this QEMU knows, and whether it is on."""
    return {each["capability"]: each["state"] for each in await qmp.execute("query-migrate-capabilities")}


async def check_capabilities(qmp: AsyncQmp, wanted: Mapping[str, bool]) -> None:
    """Raises QmpFailed: what is wanted could not be set later."""
    _check_known(qmp, await read_capabilities(qmp), wanted)


def _check_known(qmp: AsyncQmp, known: Mapping[str, bool], wanted: Mapping[str, bool]) -> None:
    lacking = [name for name, on in wanted.items() if on and name not in known]
    if lacking:
        raise QmpFailed(f"QEMU {qmp.version} has no migration capability {', '.join(lacking)}")


async def set_capabilities(qmp: AsyncQmp, wanted: Mapping[str, bool]) -> None:
    """Set exactly these and clear all others that are on: they last from one migration to the next.

    So the caller that sets them restores what there was before: an operator's migration with our ``x-ignore-shared`` would
    leave the guest's memory behind.

    Raises:
        QmpFailed: this QEMU does not know one that is wanted on.
    """
    known = await read_capabilities(qmp)
    _check_known(qmp, known, wanted)
    changed = {name: wanted.get(name, False) for name, on in known.items() if on or wanted.get(name)}
    if changed:
        capabilities = [{"capability": name, "state": on} for name, on in changed.items()]
        await qmp.execute("migrate-set-capabilities", capabilities=capabilities)


async def run_hand_over(
    old: AsyncQmp, new: AsyncQmp, plan: SwapPlan, uri: str, by: float, compare: Compare, *, moved_bytes: int
) -> Handed:
    """Do it. Ends by ``by`` whatever hangs; then nothing of it continues by itself but QEMU's own migration.

    ``moved_bytes``: the RAM blocks beside the guest's shared RAM (firmware, video), which are copied.

    Raises:
        MemoryDiffers: before the new process was given the guest.
        HandOverFailed, QmpFailed: the guard's way out decides who runs the guest.
    """
    began_at = time.monotonic()
    with old.watch() as told_by_old, new.watch() as told_by_new:
        try:
            async with asyncio.timeout_at(asyncio.get_running_loop().time() + by - time.monotonic()):
                await migrate(old, plan, uri)
                await _both_completed(told_by_old, told_by_new)
                # Both have stopped for good here: a disk's last reads have ended, and nothing writes to RAM until `cont`.
                status, moved, compared = await asyncio.gather(
                    new.status(), old.execute("query-migrate"), _in_time(compare)
                )
                _check(status, moved, moved_bytes + _STATE_BYTES)
                if compared.equal is False:
                    raise MemoryDiffers(f"the new process has other memory than the guest: {compared.note}")
                if not alive(plan.new.pid, plan.new.start_ticks):
                    raise HandOverFailed("the new process died when it had the whole state")
                take_from(plan, f"new:{plan.new.pid}:{plan.new.start_ticks}")
                resumed = await _let_run(new, told_by_new, plan)
                note_ran(plan.claims)
        except TimeoutError:
            raise HandOverFailed("the new process did not take the guest over in time") from None
        stopped_at = next((event.at for event in told_by_old.events if event.name == "STOP"), began_at)
        return Handed(stopped_at, resumed.at, compared)


async def migrate(old: AsyncQmp, plan: SwapPlan | ReplacePlan, uri: str) -> None:
    """Have QEMU begin, and write down whether it did: a migration that it refused ours for is somebody else's.

    Raises:
        QmpFailed: it did not, or nobody knows.
    """
    try:
        await old.execute("migrate", uri=uri)
    except QmpCommandRefused:
        note(plan.claims, "refused")
        raise
    with suppress(OSError):  # a full disk: `is_ours` looks at what arrived
        note(plan.claims, "accepted")


async def restore_capabilities(qmp: AsyncQmp, usual: Mapping[str, bool]) -> None:
    """As they were before, those that this QEMU knows. Raises QmpFailed: not now, while a migration is under way."""
    known = await read_capabilities(qmp)
    await set_capabilities(qmp, {name: on for name, on in usual.items() if name in known})


async def _in_time(compare: Compare) -> Compared:
    """A proof that takes too long is given up, not waited for: the guest is paused."""
    looking = asyncio.ensure_future(compare())
    done, _ = await asyncio.wait({looking}, timeout=_COMPARE_S)
    if not done:
        looking.add_done_callback(lambda task: task.cancelled() or task.exception())
        return Compared(None, f"comparing the sampled pages took longer than {_COMPARE_S:g} s")
    return looking.result()


def take_from(plan: SwapPlan | ReplacePlan, text: str) -> None:
    """Fence the old process and claim; it is held from here on, unless it has been decided otherwise."""
    send_signal(plan.old.pid, plan.old.start_ticks, signal.SIGSTOP)
    try:
        standing = claim(
            plan.claims, 1, text, durable=isinstance(plan, ReplacePlan) and plan.across is not None
        )
    except BaseException:
        send_signal(plan.old.pid, plan.old.start_ticks, signal.SIGCONT)
        raise
    if standing != text:
        if standing == "old":  # the one that decided that may be talking to it right now
            send_signal(plan.old.pid, plan.old.start_ticks, signal.SIGCONT)
        raise HandOverFailed(f"it has been decided otherwise: {standing}")


async def _let_run(new: AsyncQmp, watch: QmpEventWatch, plan: SwapPlan) -> QmpEvent:
    """``cont``. If the new process died of it or before it, see whether the guest can go back.

    QEMU writes RESUME to every connection before it lets the first virtual CPU go, and what it wrote is read to the
    end before the connection counts as closed: none of it in there, and the process dead, shows that nothing ran.
    """
    try:
        await new.execute("cont")
        return await watch.first(_is_resume)
    except QmpConnectionLost:
        until = time.monotonic() + _DEATH_S
        while not (ended := new.closed and not alive(plan.new.pid, plan.new.start_ticks)):
            if time.monotonic() > until:
                break
            await asyncio.sleep(_LOOK_S)  # its sockets are closed before it is dead
        if ended and not any(_is_resume(event) for event in watch.events):
            claim(plan.claims, 2, "old")
        raise


def _is_resume(event: QmpEvent) -> bool:
    return event.name == "RESUME"


async def _both_completed(old: QmpEventWatch, new: QmpEventWatch) -> None:
    """Wait for both verdicts; the first bad one counts."""
    both = (
        asyncio.create_task(_first(old.first(is_verdict))),
        asyncio.create_task(_first(new.first(is_verdict))),
    )
    waiting: set[asyncio.Task[QmpEvent]] = set(both)
    try:
        while waiting:
            done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                status = task.result().data["status"]
                if status != "completed":
                    raise HandOverFailed(f"QEMU says that the migration {status}")
    finally:
        for task in waiting:
            task.cancel()
        await asyncio.gather(*both, return_exceptions=True)


async def _first(event: Awaitable[QmpEvent]) -> QmpEvent:
    return await event


def _check(status: str, moved: Any, limit_bytes: int) -> None:
    if status != "paused":
        raise HandOverFailed(f"the new process is {status!r} and should be paused with the loaded state")
    transferred = moved.get("ram", {}).get("transferred", 0)
    if transferred > limit_bytes:
        raise HandOverFailed(
            f"{transferred} bytes were copied and all but the guest's own RAM has {limit_bytes}: its RAM was copied too"
        )


async def error_of_migration(qmp: AsyncQmp, within_s: float) -> str:
    """QEMU's own description of why its last migration failed; empty where it has none or does not answer."""
    try:
        return str((await qmp.execute("query-migrate", within_s)).get("error-desc", ""))
    except QmpFailed:
        return ""
