"""Starting QEMU processes: folders, RAM files, scripts for bridges, and the wait until one answers or says why not."""

from __future__ import annotations

import asyncio
import errno
import os
import shutil
import signal
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from hashlib import blake2b
from pathlib import Path

from caesura.runtime.threads import in_thread
from caesura_host_updater.drivers.qemu import commandline, successor
from caesura_host_updater.drivers.qemu.async_qmp import AsyncQmp, QmpUnreachable
from caesura_host_updater.drivers.qemu.cleanup import remove_files
from caesura_host_updater.drivers.qemu.definition import Definition, QemuOptions
from caesura_host_updater.drivers.qemu.process_records import Records, VmProcessRecord
from caesura_host_updater.drivers.qemu.vmm import last_words
from caesura_host_updater.inventory.kernel_options import KernelOptions
from caesura_host_updater.spawn import ExitWatch, SpawnError, start_detached
from caesura_vmcontrol.durable_files import sync_folder
from caesura_vmcontrol.process_control import QEMU_MARK
from caesura_vmcontrol.procfs import boot_id, read_process, send_signal
from caesura_vmcontrol.qemu_replace import PART

_SOCKET_PATH_BYTES = 107  # unix(7): sun_path has 108 bytes with the closing zero
_LONGEST = "next/guard.2"
_VERSION_S = (
    20.0  # s: a QEMU says its version within 30 ms, on an emulated host within seconds; no guest is paused
)
_KERNEL_S = 1.0  # s: to start it
_LOOK_S = 0.002
_FOR_QEMU = frozenset(("PATH", "HOME", "LANG", "TZ", "TMPDIR", "LD_LIBRARY_PATH"))
_FOR_QEMU_PREFIXES = ("LC_", "XDG_", "QEMU_", "CAESURA_")
_NO_KEXEC = KernelOptions()


class LaunchFailed(Exception):
    """A QEMU could not be started; the text says why, in its own words where it had some."""


def _for_qemu(name: str) -> bool:
    """Whether QEMU is given this variable. It lands in the guard's intent too: secrets of the service's starter stay out."""
    return name in _FOR_QEMU or name.startswith(_FOR_QEMU_PREFIXES)


class Launcher:
    """Starts the processes of one host updater, which no other one's are mixed up with.

    Args:
        accel: the value of ``-accel``, such as ``tcg,thread=multi``.
        environ: what the processes inherit.
        kernel: whether another kernel may be started under the guests, and where their memory stays then.
    """

    def __init__(
        self,
        host: str,
        options: QemuOptions,
        state_dir: Path,
        records: Records,
        *,
        accel: str,
        environ: Mapping[str, str],
        kernel: KernelOptions = _NO_KEXEC,
    ) -> None:
        self._options = options
        self.kernel = kernel
        self.operations_dir = Path(kernel.carve_out) / "operations"
        """Claims and states of operations over a change of the kernel."""
        self._records = records
        self._accel = accel
        self._environ = {name: value for name, value in environ.items() if _for_qemu(name)}
        # Two hosts of one name may share a machine in a demo: the state folder tells them apart.
        self._own = f"{host}-{blake2b(str(state_dir.resolve()).encode(), digest_size=4).hexdigest()}"
        base = Path("/run") if os.geteuid() == 0 else Path(environ.get("XDG_RUNTIME_DIR", "/tmp"))  # noqa: S108
        self.run_dir = Path(options.run_dir) if options.run_dir else base / "caesura" / self._own
        self.ram_dir = Path(options.ram_dir) / f"caesura-{self._own}"
        self.mark = f"{QEMU_MARK}={self._own}/"
        """In the environment of every QEMU that was started here; more follows."""

    def mark_of(self, vm: str, operation: str) -> str:
        """In the environment of every process that was started for one operation on one VM."""
        return f"{self.mark}{vm}/{operation}"

    def environ_of(self, mark: str) -> dict[str, str]:
        """The environment of a process with this mark."""
        name, _, value = mark.partition("=")
        return {**self._environ, name: value}

    def folder(self, vm: str) -> Path:
        """Where the VM's sockets are."""
        return self.run_dir / vm

    def claims(self, vm: str, operation: str, *, across: bool = False) -> Path:
        """Where it is decided who runs the guest. Not on a disk: neither a full one nor a slow one may keep it paused.

        ``across``: of an operation over a change of the kernel; then it is in the carve-out.
        """
        return self._own_folder(vm, across=across) / f"{operation}{self.claims_end}"

    def _own_folder(self, vm: str, *, across: bool) -> Path:
        return self.operations_dir / vm if across else self.folder(vm)

    @property
    def claims_end(self) -> str:
        """The end of the names of our claims: another host updater may have its sockets in the same folder."""
        return f".{self._own}.claims"

    def state_file(self, vm: str, operation: str, *, across: bool = False) -> Path:
        """Where a replace keeps the device state. ``across``: as for ``claims``."""
        return self._own_folder(vm, across=across) / f"{operation}{self.state_end}"

    @property
    def state_end(self) -> str:
        """As ``claims_end``, of state files."""
        return f".{self._own}.state"

    def own_files(self, vm: str, operation: str, *, across: bool = False) -> tuple[Path, ...]:
        """What an operation has in the folder of the VM's sockets or in the carve-out; the folder of its claims last."""
        state = self.state_file(vm, operation, across=across)
        return (
            self.folder(vm) / "mig",
            state,
            state.with_name(f"{state.name}{PART}"),
            self.claims(vm, operation, across=across),
        )

    def usual_capabilities(self, vm: str) -> Path:
        """Which migration capabilities the guest's process had before ours; it is there until they are restored."""
        return self.folder(vm) / f"{self._own}.capabilities"

    def make_folder(self, vm: str) -> Path:
        """The folder of the VM's sockets, made if need be. Raises OSError."""
        folder = self.folder(vm)
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        return folder

    def prepare_folders(self) -> None:
        """Make what all VMs share. Raises OSError."""
        self._records.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.run_dir.mkdir(parents=True, exist_ok=True, mode=0o700)

    def remove_folders(self, vms: Iterable[str]) -> None:
        """Remove what was made for VMs that were stopped, and the folders that are empty."""
        remove_files(*self.run_dir.glob("bridge-*.sh"))
        for vm in vms:
            for folder in (self.folder(vm) / successor.NEXT, self.folder(vm)):
                with suppress(OSError):
                    folder.rmdir()
        for folder in (self.ram_dir, self.run_dir):
            with suppress(OSError):
                folder.rmdir()

    def default_binary(self) -> str:
        """The VMM that the host file names, as a path. Raises LaunchFailed."""
        found = shutil.which(self._options.binary, path=self._environ.get("PATH"))
        if found is None:
            raise LaunchFailed(
                f"there is no program {self._options.binary!r}: install QEMU, or name it in [qemu] binary"
            )
        return str(Path(found).absolute())

    async def check_binary(self, binary: str) -> str:
        """The version that a binary says it is. Raises LaunchFailed when it is not a QEMU."""
        try:
            # The limit is kept by us, too: a program on a file system that hangs is not even started.
            async with asyncio.timeout(_VERSION_S + _KERNEL_S):
                said = await in_thread(f"version of {binary}", lambda: self._version(binary))
        except (TimeoutError, subprocess.TimeoutExpired):
            raise LaunchFailed(
                f"{binary} is not QEMU: asked for its version it says nothing for {_VERSION_S:g} s"
            ) from None
        except OSError as error:
            raise LaunchFailed(f"{binary} cannot be run: {error.strerror or error}") from error
        first = said.splitlines()[0] if said else "nothing"
        if not first.startswith("QEMU emulator version "):
            raise LaunchFailed(f"{binary} is not QEMU: asked for its version it says {first[:200]!r}")
        return first.removeprefix("QEMU emulator version ").split()[0]

    def _version(self, binary: str) -> str:
        """What a program says when it is asked for its version. Blocking. Raises OSError, TimeoutExpired, LaunchFailed."""
        if shutil.which(binary) != binary:
            raise LaunchFailed(f"{binary} is not a program, or not given with its whole path")
        done = subprocess.run(
            [binary, "--version"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=self._environ,
            timeout=_VERSION_S,
            check=False,
        )
        return done.stdout.decode(errors="replace").strip()

    # -- a VM's first process -------------------------------------------------------------------------------

    async def start(self, vm: str, definition: Definition) -> tuple[VmProcessRecord, AsyncQmp]:
        """Start a VM from its definition. Raises LaunchFailed; nothing is left then."""
        ram = self.ram_dir / f"{vm}.ram"
        log = self._records.log(vm)
        try:
            remove_files(log)
            at = self._paths(vm, definition, ram)
            argv = commandline.first_command(vm, definition, self.default_binary(), self._accel, at)
            await in_thread(f"RAM of {vm}", lambda: self._make_ram(ram, definition.memory_mib << 20))
        except OSError as error:
            raise LaunchFailed(f"cannot be started: {error}") from error
        try:
            pid, qmp = await self.spawn(argv, self.mark_of(vm, "start"), log, at.qmp)
        except BaseException:
            remove_files(ram)
            raise
        process = read_process(pid)
        run = VmProcessRecord(
            pid=pid,
            start_ticks=process.start_ticks if process is not None else 0,
            boot_id=boot_id(),
            argv=argv,
            qmp=at.qmp,
            guard=at.guard,
            agent=at.agent,
            ours=True,
            ram_file=str(ram),
        )
        return run, qmp

    def _paths(self, vm: str, definition: Definition, ram: Path) -> commandline.Paths:
        folder = self.folder(vm)
        longest = str(folder / _LONGEST)
        if len(longest.encode()) > _SOCKET_PATH_BYTES:
            raise LaunchFailed(
                f"the socket {longest} has more than {_SOCKET_PATH_BYTES} bytes: give a shorter [qemu] run_dir"
            )
        for each in (folder, ram.parent):
            each.mkdir(parents=True, exist_ok=True, mode=0o700)
        scripts = {nic.bridge: self._script(nic.bridge) for nic in definition.nic if nic.bridge is not None}
        return commandline.Paths(
            ram=str(ram),
            qmp=str(folder / "qmp"),
            guard=str(folder / "guard"),
            agent=str(folder / "ga"),
            serial=str(folder / "serial"),
            serial_log=str(self._records.serial_log(vm)),
            scripts=scripts,
        )

    def _script(self, bridge: str) -> str:
        # A new boot has an empty /run, and runs the script before anything writes it again.
        folder = self._records.folder if self.kernel.kexec else self.run_dir
        path = folder / f"bridge-{bridge}.sh"
        part = path.with_suffix(f".{os.getpid()}")
        part.write_text(commandline.bridge_script(bridge))
        part.chmod(0o700)
        part.replace(path)
        return str(path)

    def _make_ram(self, path: Path, size: int) -> None:
        path.unlink(missing_ok=True)
        handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            os.ftruncate(handle, size)
            if self._options.reserve_memory:
                os.posix_fallocate(handle, 0, size)
            if self.kernel.kexec:
                os.posix_fallocate(handle, 0, size)
                os.fsync(
                    handle
                )  # a mapping with DAX shows the memory itself; where it belongs to is in the file system
                sync_folder(str(path.parent))
        except OSError as error:
            path.unlink()
            if error.errno != errno.ENOSPC:
                raise
            free = os.statvfs(path.parent)
            raise LaunchFailed(
                f"its RAM of {size >> 20} MiB does not fit into {self._options.ram_dir}:"
                f" {free.f_bavail * free.f_frsize >> 20} MiB are free"
            ) from error
        finally:
            os.close(handle)

    # -- any process ----------------------------------------------------------------------------------------

    async def spawn(self, argv: Sequence[str], mark: str, log: Path, qmp: str) -> tuple[int, AsyncQmp]:
        """Start a process and wait until it answers on ``qmp``. Raises LaunchFailed; it is dead then."""
        remove_files(*successor.sockets_of(argv))
        try:
            pid = await start_detached(argv, self.environ_of(mark), log)
        except SpawnError as error:
            raise LaunchFailed(str(error)) from error
        ended = asyncio.Event()
        watch = ExitWatch(pid, ended.set)
        answers: AsyncQmp | None = None
        try:
            async with asyncio.timeout(self._options.start_timeout_s):
                answers = await self._connected(qmp, ended)
        except TimeoutError:
            remove_files(*successor.sockets_of(argv))
            raise LaunchFailed(
                f"{argv[0]} does not answer within {self._options.start_timeout_s:g} s. {last_words(log)}".strip()
            ) from None
        finally:
            if watch.watching and (answers is None or answers.listener != pid):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)  # our child, and not reaped yet
                await ended.wait()
            watch.close()
        if answers is not None and answers.listener == pid:
            return pid, answers
        remove_files(*successor.sockets_of(argv))
        if answers is not None:
            await answers.close()
        raise LaunchFailed(f"{argv[0]} did not start: {last_words(log) or 'it ended without a word'}")

    @staticmethod
    async def _connected(path: str, ended: asyncio.Event) -> AsyncQmp | None:
        while not ended.is_set():
            with suppress(QmpUnreachable):
                return await AsyncQmp.connect(path, 1.0)
            await asyncio.sleep(_LOOK_S)
        return None


def kill(pid: int, start_ticks: int) -> None:
    """End exactly this process; the one that watches it reaps it."""
    send_signal(pid, start_ticks, signal.SIGKILL)
