"""A client of qemu-guest-agent (QEMU, docs/interop/qemu-ga): what is asked of it, and the way by the unix socket that QEMU has for it.

One line of JSON a request, one a reply. The socket belongs to one QEMU process and serves one client at a time;
the client that connects first drops what the one before left half said: 0xFF and ``guest-sync-delimited``.
"""

from __future__ import annotations

import asyncio
import base64
import json
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from typing import Any

from caesura_host_updater.drivers.port import DriverError

_MAX_LINE = 1 << 20  # bytes: guest-exec-status may carry output; more is not an answer to anything we ask
_RESYNC_S = 0.25
"""s: just after a hand-over the guest's end of the port may be closed for a moment, and what is written is lost."""
_EXEC_POLL_S = 0.005
_BOOT_ID = "/proc/sys/kernel/random/boot_id"
_BOOT_ID_LENGTH = 36  # a UUID as text


class AgentSilent(DriverError):
    """The guest agent did not answer in time, or its connection ended."""


class AgentGarbage(DriverError):
    """What came back is not what a guest agent says."""


class AgentRefused(DriverError):
    """The guest agent answered with an error; ``why`` quotes it."""


class GuestAgent(ABC):
    """What the agent can be asked. Every call is bounded by an instant that its maker knows.

    Args:
        vm: for errors.
    """

    def __init__(self, vm: str) -> None:
        self._vm = vm

    async def ping(self) -> None:
        """Raises one of this module's errors unless the agent answers."""
        await self._call("guest-ping")

    async def time_ns(self) -> int:
        """The guest's wall clock, nanoseconds since 1970."""
        return _time_from(self._vm, await self._call("guest-get-time"))

    async def set_time(self, now_ns: Callable[[], int]) -> str:
        """Set the guest's wall clock; the time is taken at the last moment.

        The agent sets the clock at once, then runs ``hwclock -w``, which may take a second or fail: judge by
        ``time_ns``. Returns what the agent complained about, or nothing.
        """
        try:
            await self._call("guest-set-time", lambda: {"time": now_ns()})
        except AgentRefused as error:
            return error.why
        return ""

    async def shutdown(self) -> None:
        """Have the guest power itself down. There is no answer where it works: the agent ends with the guest.

        Raises:
            AgentRefused: the guest cannot.
        """
        with suppress(AgentSilent):
            await self._call("guest-shutdown", lambda: {"mode": "powerdown"})

    async def run(self, path: str, *arguments: str) -> int | None:
        """Run a program in the guest; its exit code, None if it was killed.

        Raises:
            AgentRefused: there is no such program, or guest-exec is not allowed.
        """
        started = await self._call("guest-exec", lambda: {"path": path, "arg": list(arguments)})
        pid = started.get("pid") if isinstance(started, dict) else None
        if not isinstance(pid, int):
            raise AgentGarbage(self._vm, f"the guest agent answers guest-exec with {_short(started)}")
        while True:
            status = await self._call("guest-exec-status", lambda: {"pid": pid})
            if not isinstance(status, dict) or not isinstance(status.get("exited"), bool):
                raise AgentGarbage(
                    self._vm, f"the guest agent answers guest-exec-status with {_short(status)}"
                )
            if status["exited"]:
                code = status.get("exitcode")
                return code if isinstance(code, int) else None
            await asyncio.sleep(_EXEC_POLL_S)

    async def read_file(self, path: str, count: int = 4096) -> bytes:
        """The first bytes of a file in the guest.

        Raises:
            AgentRefused: there is no such file, or reading files is not allowed.
        """
        handle = await self._call("guest-file-open", lambda: {"path": path, "mode": "r"})
        try:
            answer = await self._call("guest-file-read", lambda: {"handle": handle, "count": count})
        finally:
            await self._call("guest-file-close", lambda: {"handle": handle})
        try:
            return base64.b64decode(answer["buf-b64"], validate=True)
        except (KeyError, TypeError, ValueError) as error:
            raise AgentGarbage(self._vm, f"the guest agent reads {path} as {_short(answer)}") from error

    @abstractmethod
    async def _call(self, command: str, arguments: Callable[[], dict[str, Any]] | None = None) -> Any:
        """What the agent returns; ``arguments`` are made at the last moment.

        Raises:
            AgentRefused, AgentSilent, AgentGarbage: it returns nothing that makes sense.
        """


class SocketAgent(GuestAgent):
    """A connection that was synchronised; see ``guest_agent``."""

    def __init__(
        self, vm: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, by: float
    ) -> None:
        super().__init__(vm)
        self._reader = reader
        self._writer = writer
        self._by = by

    async def _call(self, command: str, arguments: Callable[[], dict[str, Any]] | None = None) -> Any:
        request: dict[str, Any] = {"execute": command}
        if arguments is not None:
            request["arguments"] = arguments()
        try:
            async with asyncio.timeout_at(self._by):
                self._writer.write(json.dumps(request).encode() + b"\n")
                await self._writer.drain()
                line = await self._line()
        except TimeoutError as error:
            raise AgentSilent(self._vm, f"the guest agent did not answer {command} in time") from error
        return read_reply(self._vm, command, line)

    async def _line(self) -> bytes:
        try:
            line = await self._reader.readuntil(b"\n")
        except asyncio.IncompleteReadError as error:
            raise AgentSilent(self._vm, "the guest agent's connection ended: QEMU closed it") from error
        except asyncio.LimitOverrunError as error:
            raise AgentGarbage(
                self._vm, f"the guest agent sent {_MAX_LINE} bytes without a newline"
            ) from error
        except OSError as error:
            raise AgentSilent(self._vm, f"the guest agent's connection failed: {error}") from error
        return line

    async def synchronise(self) -> None:
        """Throw away what is in the pipe, on both sides. Raises this module's errors."""
        # Any number that an earlier client's left-over reply does not carry.
        first = number = time.monotonic_ns() & 0x3FFFFFFF
        try:
            async with asyncio.timeout_at(self._by):
                while True:
                    request = {"execute": "guest-sync-delimited", "arguments": {"id": number}}
                    self._writer.write(b"\xff" + json.dumps(request).encode() + b"\n")
                    await self._writer.drain()
                    try:
                        async with asyncio.timeout(_RESYNC_S):
                            await self._until_number(first, number)
                    except TimeoutError:
                        number += 1
                        continue
                    return
        except TimeoutError as error:
            why = (
                "the guest agent does not answer: is qemu-guest-agent running in the guest, "
                "and does nobody else hold its socket?"
            )
            raise AgentSilent(self._vm, why) from error
        except OSError as error:
            raise AgentSilent(self._vm, f"the guest agent's connection failed: {error}") from error

    async def _until_number(self, first: int, number: int) -> None:
        while True:
            # Complaints about the 0xFF itself come before it, on lines of their own.
            _, mark, line = (await self._line()).rpartition(b"\xff")
            if mark and read_reply(self._vm, "guest-sync-delimited", line) == number:
                return
            if mark and not first <= number:
                return


@asynccontextmanager
async def guest_agent(vm: str, path: str, by: float) -> AsyncIterator[SocketAgent]:
    """A synchronised connection.

    Args:
        path: the socket; unix paths end at 107 bytes.
        by: instant on the event loop's clock by which everything must be done.

    Raises:
        AgentSilent, AgentGarbage: no agent, or none that makes sense.
    """
    try:
        async with asyncio.timeout_at(by):
            reader, writer = await asyncio.open_unix_connection(path, limit=_MAX_LINE)
    except TimeoutError as error:
        raise AgentSilent(vm, f"no connection to the guest agent's socket {path}") from error
    except OSError as error:
        why = error.strerror or str(error)
        raise AgentSilent(vm, f"cannot connect to the guest agent's socket {path}: {why}") from error
    try:
        agent = SocketAgent(vm, reader, writer, by)
        await agent.synchronise()
        yield agent
    finally:
        # Not close(): that would wait indefinitely to write what a stopped QEMU does not read.
        writer.transport.abort()


OpenAgent = Callable[[float], AbstractAsyncContextManager[GuestAgent]]
"""Makes a connection; the instant on the event loop's clock by which everything must be done."""


async def read_boot_id(vm: str, open_agent: OpenAgent, *, timeout_s: float = 2.0) -> str:
    """The guest kernel's boot id (proc(5), /proc/sys/kernel/random/boot_id): new with every boot, in its memory only.

    Raises:
        AgentSilent, AgentGarbage, AgentRefused: the guest agent does not tell.
    """
    async with open_agent(asyncio.get_running_loop().time() + timeout_s) as agent:
        answer = (await agent.read_file(_BOOT_ID)).decode(errors="replace").strip()
    if len(answer) != _BOOT_ID_LENGTH:
        raise AgentGarbage(vm, f"the guest agent says that the boot id is {_short(answer)}")
    return answer


def read_reply(vm: str, command: str, line: bytes | str) -> Any:
    """What a line of the agent's returns. Raises AgentGarbage, AgentRefused."""
    try:
        reply = json.loads(line)
    except ValueError as error:
        raise AgentGarbage(vm, f"the guest agent answers {command} with {_short(line)}") from error
    if isinstance(reply, dict) and isinstance(reply.get("error"), dict):
        said = str(reply["error"].get("desc", reply["error"]))
        raise AgentRefused(vm, f"the guest agent refuses {command}: {_short(said)}")
    if not isinstance(reply, dict) or "return" not in reply:
        raise AgentGarbage(vm, f"the guest agent answers {command} with {_short(reply)}")
    return reply["return"]


def _time_from(vm: str, value: object) -> int:
    # 2**62 ns is the year 2116; bool is an int to Python but no time.
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**62:
        raise AgentGarbage(vm, f"the guest agent says that the time is {_short(value)}")
    return value


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:117]}..."
