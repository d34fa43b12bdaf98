"""Runs a hook: an argv in its own process group, with a time limit and the end of its output kept."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import Mapping, Sequence
from typing import Literal

from caesura.contract.messages import HookFinished

_TAIL_BYTES = 2_000  # enough for the last lines of a stack trace, far below what a message may hold
_TERM_GRACE_S = 1.0  # s: time to clean up between SIGTERM and SIGKILL
_REST_S = 0.2  # s: for output still in the pipe when the hook ended while a child of it holds the pipe open


async def run_hook(
    hook: Literal["prepare", "recover"],
    argv: Sequence[str],
    *,
    vm: str,
    event_id: str,
    environ: Mapping[str, str],
    timeout_s: float,
) -> HookFinished:
    """Run ``argv`` and return how it ended. On timeout, and on cancellation, its whole process group is killed.

    Args:
        environ: added to the agent's own environment.
        timeout_s: seconds until SIGTERM; SIGKILL follows a second later.
    """
    started = time.monotonic()

    def finished(
        outcome: Literal["succeeded", "failed", "timeout", "missing"], code: int | None, tail: bytes
    ) -> HookFinished:
        return HookFinished(
            vm=vm,
            hook=hook,
            event_id=event_id,
            outcome=outcome,
            exit_code=code,
            seconds=time.monotonic() - started,
            output_tail=tail.decode(errors="replace"),
        )

    loop = asyncio.get_running_loop()
    try:
        transport, watch = await loop.subprocess_exec(
            _Watch,
            *argv,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            env={**os.environ, **environ},
            start_new_session=True,
        )
    except OSError as error:
        return finished("missing", None, f"cannot start {argv[0]!r}: {error.strerror or error}".encode())
    pid = transport.get_pid()
    try:
        try:
            async with asyncio.timeout(timeout_s):
                await watch.exited.wait()
        except TimeoutError:
            await _end_group(pid, watch)
            return finished("timeout", None, bytes(watch.tail))
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_REST_S):
                await watch.output_ended.wait()
        code = transport.get_returncode()
        return finished("succeeded" if code == 0 else "failed", code, bytes(watch.tail))
    finally:
        if not watch.exited.is_set():
            _signal_group(pid, signal.SIGKILL)
            await asyncio.shield(watch.exited.wait())
        transport.close()


class _Watch(asyncio.SubprocessProtocol):
    """Keeps the end of the output, and detects the end of the process independently of the end of its output.

    ``Process.wait`` of asyncio does not: it returns only when the pipe is closed too, and a daemon that the
    hook left behind may hold the pipe indefinitely.
    """

    def __init__(self) -> None:
        self.tail = bytearray()
        self.exited = asyncio.Event()
        self.output_ended = asyncio.Event()

    def pipe_data_received(self, fd: int, data: bytes) -> None:  # noqa: ARG002 - asyncio's signature
        self.tail += data
        del self.tail[:-_TAIL_BYTES]

    def pipe_connection_lost(self, fd: int, exc: Exception | None) -> None:  # noqa: ARG002 - asyncio's signature
        self.output_ended.set()

    def process_exited(self) -> None:
        self.exited.set()


async def _end_group(pid: int, watch: _Watch) -> None:
    _signal_group(pid, signal.SIGTERM)
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_TERM_GRACE_S):
            await watch.exited.wait()
    # Also when the leader ended: a child of it may have ignored the signal.
    _signal_group(pid, signal.SIGKILL)
    await watch.exited.wait()


def _signal_group(pid: int, number: signal.Signals) -> None:
    # The hook leads its own session, so its pid is its group's id. The group may be gone already.
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, number)
