"""The host updater's side of the pause guard: keeps one running, arms it, reads what it did.

Fails closed: a guard that does not answer in time counts as lost. Its connection is then closed, which
makes a guard that is alive after all resume the VMs it was armed for.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from caesura.runtime.errors import CaesuraError
from caesura.runtime.logs import get_logger
from caesura_host_updater.spawn import ExitWatch, SpawnError, start_detached
from caesura_vmcontrol import kernel_change
from caesura_vmcontrol.guard_socket import MAX_LINE_BYTES, socket_address
from caesura_vmcontrol.intent import Intent, UnreadableIntent
from caesura_vmcontrol.kernel_change import KernelChange
from caesura_vmcontrol.procfs import boot_id
from caesura_vmcontrol.resume_plans import ResumePlan, plan_to_json

_LINGER_S = 5.0  # s: how long our own guard stays without us; long enough for a quick restart
_RETRY_S = 0.2  # s: between two tries to reach a guard
_START_S = 5.0  # s: it needs some 60 ms
_ANSWER_S = 2.0  # s: a guard answers within milliseconds; an fsync on a busy disk may take longer

_UNUSABLE = (
    "give host updater and guard the same rights, or where the daemon is away the guard cannot resume this VM"
)

_log = get_logger("caesura.guard_client")


class GuardUnavailable(CaesuraError):
    """No pause guard, or it refused; nothing may be frozen then."""


class GuardClient:
    """A guard, and the connection to it.

    Args:
        state_dir: shared with the guard.
        spawn: start a guard when there is none; else one is expected to run by itself.
    """

    def __init__(self, state_dir: Path, *, spawn: bool) -> None:
        self._state_dir = state_dir
        self._spawn = spawn
        self._boot_id = boot_id()
        self._folder = os.open(state_dir, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._answers: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self._request_lock = asyncio.Lock()
        self._connected = asyncio.Event()
        self._unusable: dict[str, list[str]] = {}
        self._work = asyncio.Event()
        """The connection is gone, or there is an operation to disarm."""
        self._listener: asyncio.Task[None] | None = None
        self._exits: list[ExitWatch] = []
        self._armed = ""
        self._pending_disarms: set[str] = set()
        self._refused_disarms: set[str] = set()
        """Operations that are over, and that the guard has not released in time."""
        self.on_lost: Callable[[], None] = lambda: None
        """Called when the connection ends."""
        self.on_connected: Callable[[], None] = lambda: None
        """Called when a guard answers."""
        self.pid = 0

    @property
    def state(self) -> Literal["ready", "armed", "absent"]:
        """For the inventory."""
        if not self._connected.is_set():
            return "absent"
        return "armed" if self._armed else "ready"

    async def run(self) -> None:
        """Keep a guard connected, and disarm what it would not release in time. Never ends."""
        while True:
            if not self._connected.is_set():
                try:
                    await self._connect()
                except GuardUnavailable as error:
                    _log.warning("guard.absent", why=str(error))
                    await asyncio.sleep(_RETRY_S)
                    continue
            self._work.clear()
            if self._connected.is_set():
                if not await self._disarm_refused():
                    await asyncio.sleep(_RETRY_S)
                    continue
                await self._work.wait()

    async def _disarm_refused(self) -> bool:
        """Whether there is none left."""
        for operation in tuple(self._refused_disarms):
            with suppress(GuardUnavailable):
                await self._ask({"do": "disarm", "operation": operation})
                self._refused_disarms.discard(operation)
        return not self._refused_disarms

    async def start(self, timeout_s: float = 10.0) -> Intent | None:
        """Connect to a guard; returns what it holds of a previous run.

        Raises:
            GuardUnavailable: there is none after ``timeout_s`` seconds.
        """
        last: GuardUnavailable | None = None
        try:
            async with asyncio.timeout(timeout_s):
                while not self._connected.is_set():
                    try:
                        await self._connect()
                    except GuardUnavailable as error:
                        last = error
                        await asyncio.sleep(_RETRY_S)
                return await self.wait_idle()
        except TimeoutError:
            raise GuardUnavailable(f"no pause guard: {last or 'it does not answer'}") from last

    async def wait_idle(self) -> Intent | None:
        """What the guard holds, once it is no longer busy resuming."""
        while True:
            answer = await self._ask({"do": "status"})
            if answer["state"] != "firing":
                return self._intent_in(answer)
            await asyncio.sleep(
                0.02
            )  # the guard does not notify us: it looks at the VMs every few milliseconds

    async def held(self) -> Intent | None:
        """What the guard holds now, whatever it is doing. Raises GuardUnavailable."""
        return self._intent_in(await self._ask({"do": "status"}))

    @staticmethod
    def _intent_in(answer: dict[str, Any]) -> Intent | None:
        try:
            return None if answer["intent"] is None else Intent.from_json(answer["intent"])
        except UnreadableIntent as error:
            raise GuardUnavailable(str(error)) from error

    async def arm(
        self,
        operation: str,
        deadline: float,
        plans: Sequence[ResumePlan],
        change: KernelChange | None = None,
    ) -> None:
        """Have the guard hold the operation; with ``change`` over a change of the kernel. Raises GuardUnavailable."""
        across = {} if change is None else {"kernel_change": kernel_change.to_json(change)}
        if not self._connected.is_set():
            raise GuardUnavailable("there is no pause guard")
        self._armed = operation
        try:
            answer = await self._ask(
                {
                    "do": "arm",
                    "operation": operation,
                    "boot_id": self._boot_id,
                    "deadline": deadline,
                    "plans": [plan_to_json(plan) for plan in plans],
                    **across,
                }
            )
        except GuardUnavailable:
            self._armed = ""
            raise
        self._note_unusable([plan.vm for plan in plans], answer.get("unusable", {}))

    async def inspect(self, plans: Sequence[ResumePlan]) -> bool:
        """Ask which ways out of these VMs are none for it, before it is armed for them. Whether what it says is news.

        Raises:
            GuardUnavailable: it does not say; one of an earlier release refuses.
        """
        answer = await self._ask({"do": "inspect", "plans": [plan_to_json(plan) for plan in plans]})
        return self._note_unusable([plan.vm for plan in plans], answer["unusable"])

    def _note_unusable(self, vms: Sequence[str], unusable: Mapping[str, list[str]]) -> bool:
        before = {vm: sockets for vm in vms if (sockets := self._unusable.pop(vm, None))}
        self._unusable |= unusable
        for vm, sockets in unusable.items():
            if before.get(vm) != sockets:
                _log.error("guard.socket_unusable", vm=vm, sockets=sockets, hint=_UNUSABLE)
        return before != dict(unusable)

    def pause_risk(self, vm: str) -> str:
        """Which way out of a VM is none for this guard, as it said when it was last asked; empty: it said of none."""
        sockets = self._unusable.get(vm)
        return f"the pause guard may not use {', '.join(sockets)}: {_UNUSABLE}" if sockets else ""

    async def leave(self, operation: str, by: float) -> None:
        """Have the guard start the loaded kernel, not after ``by`` (CLOCK_MONOTONIC). Returns, if at all, as an error.

        Raises:
            GuardUnavailable: it refused or could not, or does not answer: then it may still leave, until the claims say otherwise.
        """
        patience_s = max(_ANSWER_S, by - time.monotonic() + _ANSWER_S)
        await self._ask({"do": "leave", "operation": operation, "by": by}, patience_s)

    async def drop(self, operation: str, vms: Sequence[str]) -> None:
        """These VMs were not paused by it: if they are paused, the guard is not to resume them. Raises GuardUnavailable."""
        await self._ask({"do": "drop", "operation": operation, "vms": list(vms)})

    async def disarm(self, operation: str, timeout_s: float = 3.0) -> Intent | None:
        """The operation is over; returns what the guard did if it had fired. It is disarmed later if it is away, or must look longer.

        Raises:
            GuardUnavailable: it is not released after ``timeout_s`` seconds and the request that is under way then.
        """
        self._armed = ""
        until = asyncio.get_running_loop().time() + timeout_s
        try:
            while True:
                async with asyncio.timeout_at(until):
                    await self._connected.wait()
                # A request is not cut off: the guard would take that for our end, and act.
                with suppress(GuardUnavailable):
                    answer = await self._ask({"do": "disarm", "operation": operation})
                    return None if answer["record"] is None else Intent.from_json(answer["record"])
                async with asyncio.timeout_at(until):
                    await asyncio.sleep(0.02)  # refused: a VM does not run yet, or the guard went away
        except (TimeoutError, UnreadableIntent) as error:
            self._pending_disarms.add(operation)
            self._refused_disarms.add(operation)
            self._work.set()
            raise GuardUnavailable(
                "the pause guard did not confirm that it released the operation"
            ) from error

    async def _connect(self) -> None:
        address = socket_address(self._folder)
        try:
            reader, writer = await asyncio.open_unix_connection(address, limit=MAX_LINE_BYTES)
        except OSError as error:
            if not self._spawn:
                raise GuardUnavailable(f"cannot reach it in {self._state_dir}: {error}") from error
            reader, writer = await self._start_guard(address)
        self._reader, self._writer = reader, writer
        self._unusable = {}  # this one may have other rights
        self._answers = asyncio.Queue()
        self._connected.set()
        self._listener = asyncio.create_task(self._listen(reader, self._answers), name="guard connection")
        answer = await self._ask({"do": "status"})
        self.pid = answer["pid"]
        _log.info("guard.connected", pid=self.pid, state=answer["state"])
        held = answer["intent"]["operation"] if answer["intent"] else ""
        if held in self._pending_disarms:
            with suppress(GuardUnavailable):
                await self._ask({"do": "disarm", "operation": held})
                self._pending_disarms.discard(held)
        self.on_connected()

    async def _start_guard(self, address: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Start one and connect to it; it may also end at once, when another one holds the lock."""
        ended = asyncio.Event()
        argv = [
            sys.executable,
            "-P",  # a module of the working folder that is named as one of the standard library's must not be imported
            "-m",
            "caesura_pause_guard",
            "--state-dir",
            str(self._state_dir),
            "--exit-when-alone",
            str(_LINGER_S),
        ]
        try:
            pid = await start_detached(argv, os.environ, self._state_dir / "guard.log")
        except SpawnError as error:
            raise GuardUnavailable(str(error)) from error
        self._exits = [watch for watch in self._exits if watch.watching]
        self._exits.append(ExitWatch(pid, ended.set))
        with suppress(TimeoutError):
            async with asyncio.timeout(_START_S):
                while not ended.is_set():
                    with suppress(OSError):
                        return await asyncio.open_unix_connection(address, limit=MAX_LINE_BYTES)
                    await asyncio.sleep(0.01)  # it cannot notify us before it listens
        raise GuardUnavailable(f"it does not start: see {self._state_dir / 'guard.log'}")

    async def _listen(self, reader: asyncio.StreamReader, answers: asyncio.Queue[dict[str, Any]]) -> None:
        try:
            while line := await reader.readline():
                answers.put_nowait(json.loads(line))
        except (OSError, ValueError) as error:
            _log.warning("guard.connection_failed", why=str(error))
        finally:
            if answers is self._answers:
                self._lose()

    def _lose(self) -> None:
        if not self._connected.is_set():
            return
        self._connected.clear()
        self._work.set()
        if self._armed:
            self._pending_disarms.add(self._armed)
        self._armed = ""
        if self._writer is not None:
            self._writer.close()
        self._answers.put_nowait({"ok": False, "error": "the pause guard is gone"})
        _log.warning("guard.lost", pid=self.pid)
        self.on_lost()

    async def _ask(self, request: dict[str, Any], patience_s: float = _ANSWER_S) -> dict[str, Any]:
        async with self._request_lock:
            writer, answers = self._writer, self._answers
            if writer is None or not self._connected.is_set():
                raise GuardUnavailable("the pause guard is gone")
            try:
                writer.write(json.dumps(request).encode() + b"\n")
                async with asyncio.timeout(patience_s):
                    answer = await answers.get()
            except (OSError, TimeoutError) as error:
                self._lose()
                raise GuardUnavailable(f"the pause guard does not answer within {patience_s:g} s") from error
            except asyncio.CancelledError:
                self._lose()  # its answer may still arrive and must not be taken for that of another request
                raise
        if not answer["ok"]:
            raise GuardUnavailable(str(answer["error"]))
        return answer

    async def close(self) -> None:
        """Disconnect from the guard; one that we started ends by itself a little later."""
        self.on_lost = lambda: None
        if self._listener is not None:
            self._listener.cancel()
            with suppress(asyncio.CancelledError):
                await self._listener
        for watch in self._exits:
            watch.close()
        if self._writer is not None:
            self._writer.close()
            with suppress(OSError):
                await self._writer.wait_closed()
        os.close(self._folder)
