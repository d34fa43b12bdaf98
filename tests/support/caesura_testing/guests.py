"""Real guests for tests: QEMU processes with the guest of ``caesura guest build``, and what is seen of them from outside.

A guest's folder holds its sockets: ``qmp``, ``guard`` (a second QMP), ``ga`` (guest agent), ``heartbeat``, and one for
each other workload that runs in it (``memory``, ``disk``, ``tcp``, ``approve``); ``serial.log`` and ``qemu.log``.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from caesura_testing.patience import patient

QEMU = "qemu-system-x86_64"
_BUILD_S = 600
_BOOT_S = 60.0
"""s: a guest is up after some 4 on an idle core, and shares two cores with the rest of the tests."""
_POLL_S = 0.02


T = TypeVar("T")


class GuestUnavailable(Exception):
    """No guest can be had here; the text says why."""


class Image(msgspec.Struct, frozen=True):
    """What ``caesura guest build`` made."""

    kernel: str
    initrd: str


def qemu_installed(binary: str = QEMU) -> bool:
    """Whether there is a QEMU to run guests with."""
    return shutil.which(binary) is not None


@lru_cache(maxsize=1)
def image() -> Image:
    """The guest of the code under test; built on first use (seconds), then from the cache.

    Raises:
        GuestUnavailable: it cannot be built here.
    """
    return _from_command("build", Image)


class SecondQemu(msgspec.Struct, frozen=True):
    """Another QEMU version than the installed one; ``binary`` is None where it cannot be had, for this ``reason``."""

    binary: str | None = None
    version: str = ""
    reason: str = ""


@lru_cache(maxsize=1)
def second_qemu() -> SecondQemu:
    """Debian 12 backports' QEMU (10.0), unpacked beside the installed one (7.2); fetched on first use."""
    try:
        return _from_command("qemu", SecondQemu)
    except GuestUnavailable as error:
        return SecondQemu(reason=str(error))


def _from_command(command: str, wanted: type[T]) -> T:
    # As a user does it: shared code imports no service.
    argv = [sys.executable, "-m", "caesura_ctl", "guest", command, "--json"]
    done = subprocess.run(argv, capture_output=True, timeout=_BUILD_S, check=False)
    if done.returncode != 0:
        said = done.stderr.decode(errors="replace").strip().splitlines()
        raise GuestUnavailable(
            said[-1] if said else f"`caesura guest {command}` ended with {done.returncode}"
        )
    return msgspec.json.decode(done.stdout, type=wanted)


class Definition(msgspec.Struct, frozen=True, kw_only=True):
    """One guest. The defaults suit most tests."""

    memory_mib: int = 128
    vcpus: int = 1
    binary: str = QEMU
    machine: str = "pc-q35-7.2"
    accel: str = "tcg,thread=multi"
    cpu: str = "qemu64"
    run: tuple[str, ...] = ("heartbeat",)
    """Workloads inside, of heartbeat (always there), memory, disk, tcp, approve."""
    parameters: Mapping[str, str] = {}
    """``memory=60`` becomes ``caesura.memory=60`` on the kernel command line; see caesura_guest_image/inside."""
    agent: Mapping[str, str] = {}
    """``vm``, ``broker_url``, ... become CAESURA_VM_AGENT_*; with ``vm`` the agent runs. The host is 10.0.2.2."""
    disks: tuple[tuple[Path, str], ...] = ()
    """(file, format) of virtio-blk disks; the first is /dev/vda."""
    user_network: bool = False
    extra: tuple[str, ...] = ()
    """Further words of QEMU's command line."""


def kernel_command_line(definition: Definition) -> str:
    """What the guest's init reads."""
    words = ["console=ttyS0", "quiet", "rdinit=/init", "panic=-1"]
    words.append(f"caesura.run={','.join(dict.fromkeys(('heartbeat', *definition.run)))}")
    words += [f"caesura.{key}={value}" for key, value in definition.parameters.items()]
    words += [f"CAESURA_VM_AGENT_{key.upper()}={value}" for key, value in definition.agent.items()]
    return " ".join(words)


def command_line(definition: Definition, folder: Path, ram_file: Path, files: Image) -> list[str]:
    """QEMU's command line: guest RAM is a shared file, the machine type has a version."""
    memory = definition.memory_mib
    argv = [
        *(definition.binary, "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"),
        *("-machine", f"{definition.machine},memory-backend=ram", "-m", str(memory)),
        *("-smp", str(definition.vcpus), "-accel", definition.accel, "-cpu", definition.cpu),
        *("-object", f"memory-backend-file,id=ram,mem-path={ram_file},size={memory}M,share=on"),
        *("-rtc", "base=utc,clock=host"),
        *("-kernel", files.kernel, "-initrd", files.initrd, "-append", kernel_command_line(definition)),
        *("-chardev", f"file,id=serial,path={folder}/serial.log,append=on", "-serial", "chardev:serial"),
        *("-device", "virtio-rng-pci", "-device", "virtio-serial-pci,id=vs"),
        *_port(folder, "ga", "org.qemu.guest_agent.0"),
    ]
    for name in dict.fromkeys(("heartbeat", *definition.run)):
        argv += _port(folder, name, f"org.caesura.{name}.0")
    for number, (file, kind) in enumerate(definition.disks):
        argv += ["-blockdev", f"driver={kind},node-name=d{number},file.driver=file,file.filename={file}"]
        argv += ["-device", f"virtio-blk-pci,drive=d{number}"]
    if definition.user_network:
        argv += ["-netdev", "user,id=net", "-device", "virtio-net-pci,netdev=net"]
    for name in ("qmp", "guard"):
        argv += ["-chardev", f"socket,id={name},path={folder}/{name},server=on,wait=off"]
        argv += ["-mon", f"chardev={name},mode=control"]
    return [*argv, *definition.extra]


def _port(folder: Path, name: str, port: str) -> list[str]:
    chardev = f"socket,id={name},path={folder}/{name},server=on,wait=off"
    return ["-chardev", chardev, "-device", f"virtserialport,chardev={name},name={port}"]


class Beat(msgspec.Struct, frozen=True):
    """One line of the heartbeat, and when it came in (seconds on this machine's monotonic clock)."""

    received: float
    count: int
    monotonic_ns: int
    realtime_ns: int
    boot_id: str
    steps_back: int
    """How often the guest saw its CLOCK_MONOTONIC go back."""


class Heartbeat:
    """Records every beat of one guest, over whichever sockets it comes: those of the old and of the new process."""

    def __init__(self) -> None:
        self.beats: list[Beat] = []
        self._news = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []

    async def connect(self, path: Path, timeout_s: float = 10.0) -> None:
        """Listen there too, until the process behind it is gone. Do so before a swap, for the new process's socket."""
        reader, writer = await connect(path, timeout_s)
        self._tasks.append(asyncio.create_task(self._read(reader, writer)))

    async def _read(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        loop = asyncio.get_running_loop()
        try:
            while line := await reader.readline():
                beat = parse_beat(line, loop.time())
                if beat is not None:
                    self.beats.append(beat)
                    self._news.set()
        except OSError:
            pass  # QEMU was killed
        finally:
            writer.close()

    async def close(self) -> None:
        """Stop listening."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def next(self, timeout_s: float = _BOOT_S, *, after: float | None = None) -> Beat:
        """The next beat to come in (later than ``after``, an instant). Raises TimeoutError."""
        after = asyncio.get_running_loop().time() if after is None else after
        async with asyncio.timeout(patient(timeout_s)):
            while not self.beats or self.beats[-1].received <= after:
                self._news.clear()
                await self._news.wait()
        return next(beat for beat in self.beats if beat.received > after)

    def since(self, instant: float) -> list[Beat]:
        """Beats that came in after that."""
        return [beat for beat in self.beats if beat.received > instant]

    def longest_gap_s(self, since: float = 0.0, until: float | None = None) -> float:
        """The longest silence, from the last beat before ``since`` on; silence up to ``until`` counts."""
        times = [beat.received for beat in self.beats if until is None or beat.received <= until]
        times = [*[each for each in times if each <= since][-1:], *[each for each in times if each > since]]
        if until is not None:
            times.append(until)
        return max((later - earlier for earlier, later in pairwise(times)), default=0.0)

    def missing(self) -> int:
        """Counts that never came in: dropped because nobody read, or lost on the way."""
        return self.beats[-1].count - self.beats[0].count + 1 - len(self.beats) if self.beats else 0

    def faults(self) -> list[str]:
        """What must never be: another boot, a count or CLOCK_MONOTONIC that went back (seen here or by the guest)."""
        found = []
        for earlier, later in pairwise(self.beats):
            if later.boot_id != earlier.boot_id:
                found.append(f"the guest booted again after beat {earlier.count}")
            elif later.count <= earlier.count:
                found.append(f"beat {later.count} came after beat {earlier.count}")
            elif later.monotonic_ns < earlier.monotonic_ns:
                found.append(f"CLOCK_MONOTONIC went back at beat {later.count}")
        if self.beats and self.beats[-1].steps_back:
            found.append(f"the guest saw CLOCK_MONOTONIC go back {self.beats[-1].steps_back} times")
        return found


def parse_beat(line: bytes, received: float) -> Beat | None:
    """A beat; None for a line that was cut when a connection began or ended."""
    try:
        count, monotonic_ns, realtime_ns, boot_id, steps_back = line.decode("ascii").split()
        if not line.endswith(b"\n") or len(boot_id) != 36:
            return None
        return Beat(received, int(count), int(monotonic_ns), int(realtime_ns), boot_id, int(steps_back))
    except ValueError:
        return None


class RunningGuest:
    """A guest that was booted. ``folder`` has its sockets; ``process`` is QEMU, unless it has been swapped."""

    def __init__(
        self,
        definition: Definition,
        folder: Path,
        ram_file: Path,
        argv: Sequence[str],
        process: asyncio.subprocess.Process,
    ) -> None:
        self.definition = definition
        self.folder = folder
        self.ram_file = ram_file
        self.argv = list(argv)
        self.process = process
        self.heartbeat = Heartbeat()

    @property
    def qmp(self) -> Path:
        """The first QMP socket."""
        return self.folder / "qmp"

    @property
    def guard(self) -> Path:
        """The second QMP socket."""
        return self.folder / "guard"

    @property
    def guest_agent(self) -> Path:
        """The guest agent's socket."""
        return self.folder / "ga"

    async def ask(
        self, workload: str, request: str, timeout_s: float = 60.0, folder: Path | None = None
    ) -> dict[str, Any]:
        """A workload's answer to ``status`` or ``verify``; it waits for its start. ``folder``: of another process.

        Raises:
            TimeoutError: no answer.
        """
        async with asyncio.timeout(patient(timeout_s)):
            reader, writer = await connect((folder or self.folder) / workload, timeout_s)
            try:
                writer.write(f"{request}\n".encode())
                answer: dict[str, Any] = json.loads(await reader.readline())
                return answer
            finally:
                writer.close()

    async def execute(self, command: str, folder: Path | None = None) -> Any:
        """One QMP command on the second socket, for a moment. Raises AssertionError with QEMU's words."""
        async with asyncio.timeout(patient(10.0)):
            reader, writer = await connect((folder or self.folder) / "guard", 10.0)
            try:
                await reader.readline()  # the greeting
                for each in ("qmp_capabilities", command):
                    writer.write(json.dumps({"execute": each}).encode() + b"\n")
                    while "event" in (reply := json.loads(await reader.readline())):
                        pass
                    if "return" not in reply:
                        raise AssertionError(f"{each}: {reply}")
                return reply["return"]
            finally:
                writer.close()

    async def until(
        self, workload: str, condition: Callable[[dict[str, Any]], bool], timeout_s: float = 30.0
    ) -> dict[str, Any]:
        """Ask for a workload's ``status`` until it is as wanted.

        Raises:
            AssertionError: it did not come true in time; with the last status.
        """
        loop = asyncio.get_running_loop()
        end = loop.time() + patient(timeout_s)
        while not condition(status := await self.ask(workload, "status", timeout_s)):
            if loop.time() > end:
                raise AssertionError(f"not within {timeout_s:g} s; {workload} says {status}\n{self.logs()}")
            await asyncio.sleep(_POLL_S)
        return status

    async def verify_memory(self, timeout_s: float = 60.0, folder: Path | None = None) -> dict[str, Any]:
        """Let the guest compare all of its pattern; ``ok`` must be true. The workload ``memory`` must run."""
        return await self.ask("memory", "verify", timeout_s, folder)

    def logs(self) -> str:
        """The ends of QEMU's output and of the guest's console, for failure reports."""
        parts = []
        for name in ("qemu.log", "serial.log"):
            with suppress(OSError):
                lines = (self.folder / name).read_text(errors="replace").splitlines()
                parts.append("\n".join([f"--- {name}", *lines[-15:]]))
        return "\n".join(parts)

    async def until_up(self, timeout_s: float = _BOOT_S) -> Beat:
        """Wait for the first heartbeat.

        Raises:
            AssertionError: it did not come, or QEMU ended; with the ends of the logs.
        """
        beat = asyncio.create_task(self.heartbeat.next(timeout_s, after=0.0))
        ended = asyncio.create_task(self.process.wait())
        try:
            await asyncio.wait({beat, ended}, return_when=asyncio.FIRST_COMPLETED)
            if beat.done() and not beat.exception():
                return beat.result()
            raise AssertionError(f"the guest did not come up:\n{self.logs()}")
        finally:
            for task in (beat, ended):
                task.cancel()
            await asyncio.gather(beat, ended, return_exceptions=True)


async def connect(path: Path, timeout_s: float) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A connection to a unix socket that may not be there yet. Raises TimeoutError."""
    async with asyncio.timeout(patient(timeout_s)):
        while True:
            try:
                return await asyncio.open_unix_connection(str(path))
            except (FileNotFoundError, ConnectionRefusedError):
                await asyncio.sleep(_POLL_S)


@asynccontextmanager
async def boot(
    definition: Definition | None = None, *, folder: Path | None = None, wait: bool = True
) -> AsyncIterator[RunningGuest]:
    """A guest that runs; up (first heartbeat) unless ``wait`` is false. QEMU is killed and its files are removed at the end.

    Args:
        folder: for the sockets; short (unix paths end at 107 bytes). Made and removed if not given.
    """
    definition = definition or Definition()
    files = await asyncio.to_thread(image)
    own = folder is None
    place = folder or Path(tempfile.mkdtemp(prefix="cguest-", dir="/tmp"))
    ram_folder = Path(tempfile.mkdtemp(prefix="cguest-", dir="/dev/shm"))
    ram_file = ram_folder / "ram"
    ram_file.touch(mode=0o600)
    argv = command_line(definition, place, ram_file, files)
    try:
        with (place / "qemu.log").open("ab") as log:
            process = await asyncio.create_subprocess_exec(
                *argv, stdin=asyncio.subprocess.DEVNULL, stdout=log, stderr=log
            )
        guest = RunningGuest(definition, place, ram_file, argv, process)
        try:
            await guest.heartbeat.connect(place / "heartbeat")
            if wait:
                await guest.until_up()
            yield guest
        finally:
            await guest.heartbeat.close()
            with suppress(ProcessLookupError):
                process.kill()
            await process.wait()
    finally:
        shutil.rmtree(ram_folder, ignore_errors=True)
        if own:
            shutil.rmtree(place, ignore_errors=True)
