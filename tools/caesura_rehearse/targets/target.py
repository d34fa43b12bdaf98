"""What is paused, and the usual one: a program that is started for it."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, Protocol

from caesura.runtime.errors import ConfigError
from caesura.runtime.logs import get_logger
from caesura.runtime.threads import in_thread
from caesura_host_updater.drivers.process import guest_init
from caesura_host_updater.drivers.process.freezers import (
    Freezer,
    ProcessGroupRecord,
    ProcessPlan,
    plan_of,
)
from caesura_host_updater.spawn import ExitWatch
from caesura_rehearse.targets.pause import TargetPlan, pids_of
from caesura_vmcontrol.procfs import boot_id, send_signal
from caesura_vmcontrol.vm_control import resume_vm

_START_S = 15.0  # s: the first process needs some 20 ms; this is for a machine that thrashes
_KILLED_S = 5.0  # s: for what was killed to be gone
_LOOK_S = 0.01  # s: between two looks at processes that are not our children

_log = get_logger("caesura.rehearse")


class NoTarget(ConfigError):
    """The program cannot be started, or what should be paused does not exist or must not be paused."""


class Target(Protocol):
    """See the module. ``vm`` is its name in the documents."""

    vm: str
    what: str
    """It, for people."""
    restart_obstacle: str
    """Why it cannot be started (again); empty: it can."""
    ended: asyncio.Event
    """Set while it does not run."""
    exit_code: int | None
    """Of its last run; negative: the signal that ended it; None: it runs, or nobody knows."""
    on_exit: Callable[[], None]
    """Called when it ended, whether by itself or not."""

    async def start(self) -> None:
        """Start it, if it is startable. Raises NoTarget."""

    def plan(self) -> TargetPlan:
        """How it is resumed, with the processes of now. Blocking. Raises NoTarget: it does not run."""

    async def end(self, grace_s: float, *, again: bool = False) -> None:
        """SIGTERM, after ``grace_s`` seconds SIGKILL, and wait until it is gone.

        Args:
            again: it is to be started again, also if the rehearsal ends before.

        Raises:
            NoTarget: it could not be ended.
        """

    async def close(self, grace_s: float) -> None:
        """Leave it as it was found: a program is ended, what ran before runs."""

    def hurry(self) -> None:
        """Whatever is being ended is killed at once."""


class Program:
    """A program below a first process of its own (``guest_init``), which collects all that it starts and ends with it.

    Args:
        vm: its VM's name.
        argv: the program and its arguments.
        environ: the whole environment.
        folder: where its files are.
        freezer: how it is paused.
        way_in: words before its command line, of a program that executes it.
        cwd: the folder that it starts in; None: ours.
        output: where standard output and standard error go; None: to ours.
        stdout: the descriptor that gets its standard output instead of the one that we have.
    """

    restart_obstacle = ""

    def __init__(
        self,
        vm: str,
        argv: Sequence[str],
        environ: Mapping[str, str],
        folder: Path,
        freezer: Freezer,
        *,
        way_in: Sequence[str] = (),
        cwd: Path | None = None,
        output: Path | None = None,
        stdout: int | None = None,
    ) -> None:
        self.vm = vm
        self.what = argv[0]
        self.argv = tuple(argv)
        self._environ = dict(environ)
        self._folder = folder
        self._freezer = freezer
        self._way_in = tuple(way_in)
        self._cwd = cwd
        self._output = output
        self._stdout = stdout
        self.ended = asyncio.Event()
        self.ended.set()
        self.pid = 0
        """The program's own process."""
        self.exit_code: int | None = None
        """Of the last run; negative: the signal that ended it; None: it runs, or never ran."""
        self.starts = 0
        self.left: tuple[str, ...] = ()
        """Processes that ran on when the program's own process had ended, for people; they were killed."""
        self.on_exit: Callable[[], None] = lambda: None
        self._run: ProcessGroupRecord | None = None
        self._first: dict[str, Any] = {}
        """The first report of the present run: that it was started, or why not."""
        self._reported = asyncio.Event()
        self._gone = asyncio.Event()
        self._hurry = asyncio.Event()
        self._watch: ExitWatch | None = None
        self._report_fd: int | None = None
        self._pending = b""

    async def start(self) -> None:
        """Start it and wait until its program is executed."""
        self._find()
        self._first, self._reported, self._gone = {}, asyncio.Event(), asyncio.Event()
        self.exit_code, self.left = None, ()
        read, write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        os.set_blocking(write, True)  # only the reading end does not wait
        control = await in_thread("cgroup", lambda: self._freezer.create_cgroup(self.vm))
        try:
            spec = self._folder / f"{self.vm}.spec.json"
            spec.write_text(self._spec(control, write), encoding="utf-8")
            init = await in_thread(f"start {self.vm}", lambda: self._spawn(spec, write))
        except OSError as error:
            os.close(read)
            raise NoTarget(f"cannot start {self.what}: {error.strerror or error}") from error
        finally:
            os.close(write)
        self._report_fd, self._pending = read, b""
        asyncio.get_running_loop().add_reader(read, self._read_reports)
        self._watch = ExitWatch(init.pid, self._init_ended)
        try:
            async with asyncio.timeout(_START_S):
                first = await self._first_report()
        except TimeoutError:
            with suppress(ProcessLookupError):
                os.kill(init.pid, signal.SIGKILL)
            raise NoTarget(f"{self.what} was not started within {_START_S:g} s") from None
        if "failed" in first:
            await self._gone.wait()
            raise NoTarget(str(first["failed"]).partition("\n")[0])
        self._run = ProcessGroupRecord(
            pid=first["started"],
            start_ticks=first["start_ticks"],
            boot_id=boot_id(),
            kind=self._freezer.kind,
            control=control,
        )
        self.pid = first["processes"][0]
        self.starts += 1
        if self._gone.is_set() or self.exit_code is not None:
            self.on_exit()
        else:
            self.ended.clear()

    def _find(self) -> None:
        """Look for the program's file before anything is started. Raises NoTarget."""
        word = self.argv[0]
        place = self._cwd or Path.cwd()
        if "/" in word:
            path = place / word
            if not path.exists():
                raise NoTarget(f"cannot start {word}: there is no such file")
            if path.is_dir() or not os.access(path, os.X_OK):
                raise NoTarget(f"cannot start {word}: it is not executable")
        elif shutil.which(word, path=self._environ.get("PATH", os.defpath)) is None:
            raise NoTarget(f"cannot start {word}: it is not on the PATH")

    def _spec(self, control: str, report_fd: int) -> str:
        files = self._folder / self.vm
        return json.dumps(
            {
                "report_fd": report_fd,
                "lock_file": f"{files}.lock",
                "run_file": f"{files}.run.json",
                "ended_file": f"{files}.ended",
                "shutdown_file": f"{files}.shutdown",
                "cgroup_procs": str(Path(control).parent / "cgroup.procs") if control else "",
                "run": {"kind": self._freezer.kind, "control": control, "boot_id": boot_id()},
                "processes": [{"argv": [*self._way_in, *self.argv], "environ": self._environ}],
            }
        )

    def _spawn(self, spec: Path, report_fd: int) -> subprocess.Popen[bytes]:
        """Start the first process. It has no terminal: in a session of its own a read from one would fail."""
        out: int | IO[bytes] | None = self._stdout
        err: int | IO[bytes] | None = None
        if self._output is not None:
            out = err = self._output.open("ab", buffering=0)
        try:
            child = subprocess.Popen(
                [sys.executable, "-I", "-S", guest_init.__file__, str(spec)],
                stdin=subprocess.DEVNULL if reads_terminal() else None,
                stdout=out,
                stderr=err,
                cwd=self._cwd,
                pass_fds=(report_fd,),
                start_new_session=True,
            )
        finally:
            if self._output is not None and not isinstance(out, int | None):
                out.close()
        child.returncode = 0  # its exit is collected by the watch, not by this object
        return child

    async def _first_report(self) -> dict[str, Any]:
        await _first_of(None, self._reported, self._gone)
        return self._first or {"failed": f"cannot start {self.what}: its first process ended at once"}

    def _take(self, report: dict[str, Any]) -> None:
        if "ended" not in report:
            self._first = self._first or report
            self._reported.set()
            return
        self.exit_code = report["code"]
        self.left = tuple(f"{pid} ({_name_of(pid)})" for pid in report["left"])
        self._over()

    def _read_reports(self) -> None:
        while self._report_fd is not None:
            try:
                data = os.read(self._report_fd, 65536)
            except BlockingIOError:
                return
            *lines, self._pending = (self._pending + data).split(b"\n")
            for line in lines:
                self._take(json.loads(line))
            if not data:
                asyncio.get_running_loop().remove_reader(self._report_fd)
                os.close(self._report_fd)
                self._report_fd = None

    def _init_ended(self) -> None:
        self._read_reports()  # how the program ended may have been reported a moment before
        self._gone.set()
        self._over()

    def _over(self) -> None:
        if not self.ended.is_set():
            self.ended.set()
            self.on_exit()

    def plan(self) -> ProcessPlan:
        """As in ``Target``."""
        if self._run is None or self.ended.is_set():
            raise NoTarget(f"{self.what} does not run")
        return plan_of(self.vm, self._run)

    async def end(self, grace_s: float, *, again: bool = False) -> None:  # noqa: ARG002 - as in the protocol
        """As in ``Target``; SIGTERM for the program's own process, SIGKILL for all that is left."""
        run = self._run
        if run is None or self._gone.is_set():
            return
        await in_thread(f"thaw {self.vm}", self._thaw)
        if not self.ended.is_set() and grace_s > 0:
            with suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGTERM)
            await _first_of(grace_s, self.ended, self._hurry)
        # The first process kills what is below it, wherever it moved to, and ends with it.
        send_signal(run.pid, run.start_ticks, signal.SIGALRM)
        try:
            async with asyncio.timeout(_KILLED_S):
                await self._gone.wait()
        except TimeoutError:
            await in_thread(f"kill {self.vm}", self._kill)
            with suppress(TimeoutError):
                async with asyncio.timeout(_KILLED_S):
                    await self._gone.wait()

    def _thaw(self) -> None:
        if self._run is not None:
            with suppress(OSError):
                resume_vm(plan_of(self.vm, self._run))

    def _kill(self) -> None:
        if self._run is not None:
            for pid in pids_of(plan_of(self.vm, self._run)):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    def hurry(self) -> None:
        """As in ``Target``."""
        self._hurry.set()

    async def close(self, grace_s: float) -> None:
        """End it and remove its cgroup."""
        await self.end(grace_s)
        if self._watch is not None:
            self._watch.close()
        await in_thread("cgroup", lambda: self._freezer.remove(self.vm))


def program_environ(
    vm: str, set_name: str, url: str, *, proxy: bool = False, base: Mapping[str, str] | None = None
) -> dict[str, str]:
    """The environment of a VM's program: ``base``, or ours, and where its metadata is."""
    environ = {
        **(os.environ if base is None else base),
        "CAESURA_VM": vm,
        "CAESURA_SET": set_name,
        "CAESURA_METADATA_URL": url,
    }
    if proxy:
        for name in ("http_proxy", "HTTP_PROXY"):
            environ[name] = url
        for name in ("no_proxy", "NO_PROXY"):
            environ.pop(name, None)
    return environ


async def _first_of(timeout_s: float | None, *events: asyncio.Event) -> None:
    """Wait until one of them is set, for ``timeout_s`` seconds."""
    waits = [asyncio.ensure_future(each.wait()) for each in events]
    try:
        await asyncio.wait(waits, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for each in waits:
            each.cancel()


def _name_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text(errors="replace").strip()
    except OSError:
        return "?"


def reads_terminal() -> bool:
    """Whether our standard input is a terminal, which a program in another session cannot use."""
    try:
        return stat.S_ISCHR(os.fstat(0).st_mode) and os.isatty(0)
    except OSError:
        return True  # closed: the program gets /dev/null
