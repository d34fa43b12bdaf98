"""Running an update: argv of the host's own file, output bounded, ended as a group, never awaited for too long."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import threading
import time
from collections.abc import Mapping

from caesura.runtime.errors import CaesuraError
from caesura.runtime.logs import get_logger
from caesura.runtime.threads import in_thread
from caesura.runtime.visible import visible
from caesura_host_updater.inventory.updates import UpdateFile
from caesura_host_updater.spawn import ExitWatch
from caesura_vmcontrol.bounded_read import environs
from caesura_vmcontrol.procfs import process_table, read_process, send_signal
from caesura_vmcontrol.resume_plans import SignalPlan

_TAIL_BYTES = 2048  # of the output, for the report
_LAST_WORDS_S = 0.05  # s: output written just before the end is still in the pipe

KEPT_HERE = "(its output stays on the host: see the log of the host updater there)"

_log = get_logger("caesura.update")


class UpdateNotStarted(CaesuraError):
    """The program could not be run."""


class UpdateProcess:
    """One run of an update in a session of its own.

    Args:
        environ: the whole environment of the program.
        question: it is the update's ``installed`` command, whose exit code is an answer: a nonzero one is not a failure.
    """

    def __init__(self, update: UpdateFile, environ: Mapping[str, str], *, question: bool = False) -> None:
        self._question = question
        self.started_at = time.monotonic()
        self._update = update
        self._environ = dict(environ)
        self._tail = b""
        self._ended = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._read = -1
        self._process: subprocess.Popen[bytes] | None = None
        self._plan: SignalPlan | None = None
        self._watch: ExitWatch | None = None
        self._turn = threading.Lock()
        self._unwanted = False

    async def start(self) -> None:
        """Start it, in a thread: its program or folder may be on a file system that does not answer.

        One that is ended while it is being started is killed as soon as it exists.

        Raises:
            UpdateNotStarted: no such program or folder, or no permission, or it was ended before it began.
        """
        self._read, write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        os.set_blocking(write, True)
        try:
            process = await in_thread(f"start {self._update.name}", lambda: self._spawn(write))
        except OSError as error:
            raise UpdateNotStarted(f"update {self._update.name} cannot be started: {error}") from error
        if process is None:
            raise UpdateNotStarted(f"update {self._update.name} was ended before it began")
        self._loop.add_reader(self._read, self._on_output)
        self._watch = ExitWatch(process.pid, self._on_exit, reap=False)

    def _spawn(self, write: int) -> subprocess.Popen[bytes] | None:
        try:
            process = subprocess.Popen(
                self._update.argv,
                stdin=subprocess.DEVNULL,
                stdout=write,
                stderr=write,
                cwd=self._update.working_directory,
                env=self._environ,
                start_new_session=True,
            )
        finally:
            os.close(write)
        own = read_process(process.pid)
        plan = SignalPlan("", process.pid, own.start_ticks if own else 0)
        with self._turn:
            if not self._unwanted:
                self._process, self._plan = process, plan
                return process
        _signal_all(plan, signal.SIGKILL)
        process.wait()
        _log.warning("update.started_too_late", update=self._update.name, pid=process.pid)
        return None

    @property
    def identity(self) -> tuple[int, int]:
        """Pid and start time, for the journal; of a process that was started."""
        assert self._plan is not None  # noqa: S101 - `start` sets it
        return self._plan.leader, self._plan.start_ticks

    def _on_output(self) -> None:
        try:
            data = os.read(self._read, 65536)
        except BlockingIOError:
            return
        if not data:
            self._loop.remove_reader(self._read)
        self._tail = (self._tail + data)[-_TAIL_BYTES:]

    def _on_exit(self) -> None:
        if self._process is not None:
            self._process.poll()
        self._ended.set()

    async def wait(self) -> tuple[int, float, str]:
        """Exit code (negative: the signal), seconds, the end of its output."""
        await self._ended.wait()
        seconds = time.monotonic() - self.started_at
        code = self._process.returncode if self._process is not None else None
        self._on_output_left()
        tail = self._tail.decode(errors="replace")
        if code != 0 and not self._question:
            _log.warning("update.failed", update=self._update.name, exit_code=code, output=visible(tail))
        if self._update.output == "host":
            tail = KEPT_HERE if tail else ""
        return -1 if code is None else code, seconds, tail

    def _on_output_left(self) -> None:
        # A background process of the update may hold the pipe open indefinitely, so its end is not awaited.
        until = time.monotonic() + _LAST_WORDS_S
        before = None
        while before != self._tail and time.monotonic() < until:
            before = self._tail
            self._on_output()

    def end(self, number: signal.Signals) -> None:
        """Signal everything in its session and below it, soon."""
        with self._turn:
            plan = self._plan
            if plan is None:
                self._unwanted = True
                return
        threading.Thread(
            target=_signal_all, args=(plan, number), name=f"end {self._update.name}", daemon=True
        ).start()

    def close(self) -> None:
        """Close the descriptors. A process that not even SIGKILL ends is left to the kernel."""
        with self._turn:
            self._unwanted = True
        if self._watch is not None:
            self._watch.close()
            self._loop.remove_reader(self._read)
        if self._read >= 0:
            os.close(self._read)
        if self._process is not None and self._process.poll() is None:
            self._process.returncode = (
                -signal.SIGKILL
            )  # it was sent; do not warn about a process we gave up on


def _signal_all(plan: SignalPlan, number: signal.Signals) -> None:
    for member in plan.members(process_table()):
        send_signal(member.pid, member.start_ticks, number)


def update_environ(
    base: Mapping[str, str], update: UpdateFile, *, operation: str, host: str, vm: str
) -> dict[str, str]:
    """The environment of an update: its own variables and which operation, update, host and VM this is."""
    variables = {"CAESURA_OPERATION": operation, "CAESURA_UPDATE": update.name, "CAESURA_HOST": host}
    return {**base, **update.environ, **variables, **({"CAESURA_VM": vm} if vm else {})}


def end_orphans(operation: str, host: str, known: tuple[tuple[int, int], ...]) -> int:
    """SIGKILL what an update of a dead host updater left behind; returns how many processes that were.

    Found by the journal's pid and start time, and by the environment that every update is given: the host
    updater may have died between starting it and recording its pid. Blocking: it reads the whole process table.
    """
    table = process_table()
    found = {
        (member.pid, member.start_ticks)
        for pid, start_ticks in known
        for member in SignalPlan("", pid, start_ticks).members(table)
    }
    wanted = {f"CAESURA_OPERATION={operation}".encode(), f"CAESURA_HOST={host}".encode()}
    found |= {(pid, table[pid].start_ticks) for pid, entries in environs(table) if wanted <= entries}
    for pid, start_ticks in found:
        send_signal(pid, start_ticks, signal.SIGKILL)
    if found:
        _log.warning("update.orphans_ended", operation=operation, processes=len(found))
    return len(found)
