"""A real libvirtd with a state of its own: a session, of a user that is not root, in a folder.

As root it runs as nobody: libvirtd decides by its user id whether it is the system's. Its guests are QEMU under TCG without a disk,
whose firmware looks for one indefinitely.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from caesura_host_updater.drivers.libvirt.binding import NoBinding, load_binding
from caesura_testing.patience import patient

_START_S = 30.0
URI = "qemu:///session"

DOMAIN = """<domain type='qemu'{qemu}>
  <name>{name}</name>
  <memory unit='MiB'>{memory_mib}</memory>
  {memory}
  <vcpu>1</vcpu>
  {metadata}
  <os><type arch='x86_64' machine='pc'>hvm</type>{boot}</os>
  <features><acpi/></features>
  <on_poweroff>destroy</on_poweroff>
  <devices>
    <emulator>/usr/bin/qemu-system-x86_64</emulator>
    <controller type='usb' model='none'/>
    <memballoon model='none'/>
    {devices}
  </devices>
  {commandline}
</domain>
"""
_QEMU_NAMESPACE = " xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'"


def libvirt_installed() -> bool:
    """Whether libvirtd, its log daemon and QEMU are here, and a Python binding that this Python can load."""
    programs = ("libvirtd", "virtlogd", "virsh", "setpriv", "qemu-system-x86_64")
    if not all(shutil.which(name, path=_PATH) for name in programs):
        return False
    try:
        load_binding("")
    except NoBinding:
        return False
    return True


_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


class LibvirtDaemon:
    """See the module. ``socket`` is where it listens."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.runtime_dir = folder / "run"
        self.socket = self.runtime_dir / "libvirt/libvirt-sock"
        self._environ = {
            "PATH": _PATH,
            "HOME": str(folder),
            "LANG": "C",
            "XDG_RUNTIME_DIR": str(self.runtime_dir),
            "XDG_CONFIG_HOME": str(folder / "config"),
            "XDG_CACHE_HOME": str(folder / "cache"),
            "XDG_DATA_HOME": str(folder / "data"),
        }
        self._as_user: tuple[str, ...] = ()
        for name in ("run", "config", "cache", "data"):
            (folder / name).mkdir(mode=0o700)
        if os.geteuid() == 0:
            self._as_user = ("setpriv", "--reuid=nobody", "--regid=nogroup", "--clear-groups")
            for each in (folder, *folder.iterdir()):
                shutil.chown(each, "nobody", "nogroup")
        self._log = self._spawn("virtlogd")
        self._wait_for(self.runtime_dir / "libvirt/virtlogd-sock", self._log)
        self.process = self._log
        self.start()

    def _spawn(self, program: str) -> subprocess.Popen[bytes]:
        with (self.folder / f"{program}.log").open("ab") as log:
            return subprocess.Popen(
                [*self._as_user, program],
                env=self._environ,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def _wait_for(self, path: Path, process: subprocess.Popen[bytes]) -> None:
        until = time.monotonic() + patient(_START_S)
        while not path.exists():
            assert process.poll() is None, (self.folder / "libvirtd.log").read_text()
            assert time.monotonic() < until, f"{path} does not appear"
            time.sleep(0.01)

    def start(self) -> None:
        """Start libvirtd, also after ``kill``."""
        self.socket.unlink(missing_ok=True)
        self.process = self._spawn("libvirtd")
        self._wait_for(self.socket, self.process)

    def kill(self) -> None:
        """As a crash would; the guests run on."""
        self.process.kill()
        self.process.wait()

    @contextmanager
    def hung(self) -> Iterator[None]:
        """A daemon that is there and answers nothing."""
        self.process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            with suppress(ProcessLookupError):
                self.process.send_signal(signal.SIGCONT)

    def virsh(self, *words: str) -> str:
        """As an operator would. Raises CalledProcessError."""
        done = subprocess.run(
            [*self._as_user, "virsh", "-q", "-c", URI, *words],
            env=self._environ,
            check=True,
            capture_output=True,
            text=True,
            timeout=patient(60),
        )
        return done.stdout.strip()

    def migrate(self, name: str, to: LibvirtDaemon, *words: str) -> subprocess.Popen[str]:
        """Begin a migration to another host, as an operator does. The definition stays here unless words say otherwise."""
        return subprocess.Popen(
            [
                *(*self._as_user, "virsh", "-q", "-c", URI, "migrate", "--live", "--persistent", name),
                *(
                    f"qemu+unix:///session?socket={to.socket}",
                    "--migrateuri",
                    f"unix://{self.folder}/{name}.move",
                    *words,
                ),
            ],
            env=self._environ,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def define_guest(self, name: str, kernel: str, initrd: str, append: str) -> None:
        """A domain that runs a real guest of ``caesura guest build``, with a guest agent."""
        own = {}
        for kind, path in (("kernel", kernel), ("initrd", initrd)):  # the daemon's user may not read ours
            own[kind] = self.folder / f"{name}.{kind}"
            shutil.copyfile(path, own[kind])
        boot = f"<kernel>{own['kernel']}</kernel><initrd>{own['initrd']}</initrd><cmdline>{append}</cmdline>"
        channel = "<channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/></channel>"
        self.define(name, devices=channel, boot=boot, memory_mib=192)

    def define(
        self,
        name: str,
        *,
        label: str = "",
        own_qmp: bool = False,
        qmp_dir: Path | None = None,
        devices: str = "",
        memory: str = "",
        boot: str = "",
        memory_mib: int = 32,
        start: bool = True,
    ) -> None:
        """A domain, running unless ``start`` is false.

        Args:
            label: our element's attributes, such as ``set='web' update-domain='0'``.
            own_qmp: whether it has a QMP socket of its own, ``NAME.qmp`` in ``qmp_dir`` if that is given.
            memory: what is in its ``<memoryBacking>``.
            boot: further elements of ``<os>``.
        """
        commandline = ""
        if own_qmp:
            commandline = (
                "<qemu:commandline><qemu:arg value='-qmp'/>"
                f"<qemu:arg value='unix:{(qmp_dir or self.runtime_dir) / name}.qmp,server=on,wait=off'/></qemu:commandline>"
            )
        metadata = f"<metadata><c:vm xmlns:c='urn:caesura:libvirt' {label}/></metadata>" if label else ""
        file = self.folder / f"{name}.xml"
        file.write_text(
            DOMAIN.format(
                name=name,
                metadata=metadata,
                devices=devices,
                memory_mib=memory_mib,
                memory=f"<memoryBacking>{memory}</memoryBacking>" if memory else "",
                boot=boot,
                commandline=commandline,
                qemu=_QEMU_NAMESPACE if own_qmp else "",
            )
        )
        self.virsh("define", str(file))
        if start:
            self.virsh("start", name)

    def own_qmp(self, name: str) -> Path:
        """The QMP socket of a domain that has one of its own."""
        return self.runtime_dir / f"{name}.qmp"

    def pid(self, name: str) -> int:
        """Of its QEMU."""
        return int((self.runtime_dir / f"libvirt/qemu/run/{name}.pid").read_text())

    def state(self, name: str) -> str:
        """As libvirt has it: ``running``, ``paused``, ``shut off``."""
        return self.virsh("domstate", name)

    def remove_all(self) -> None:
        """End every guest, at once (``virsh destroy`` waits two seconds for each), and undefine it."""
        self._kill_guests()
        names = self.virsh("list", "--all", "--name").split()
        until = time.monotonic() + patient(_START_S)
        while self.virsh("list", "--name").split():
            assert time.monotonic() < until, "libvirt does not notice that its guests have ended"
            time.sleep(0.01)
        for name in names:
            self.virsh("undefine", name)

    def _kill_guests(self) -> None:
        for file in self.runtime_dir.glob("libvirt/qemu/run/*.pid"):
            if file.name == "driver.pid":
                continue  # the daemon's own
            with suppress(OSError, ValueError):
                os.kill(int(file.read_text()), signal.SIGKILL)

    def close(self) -> None:
        """End every guest, the daemons, and remove the folder."""
        self._kill_guests()
        for process in (self.process, self._log):
            with suppress(ProcessLookupError):
                process.kill()
            process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)


@contextmanager
def libvirt_daemon() -> Iterator[LibvirtDaemon]:
    """One, in a folder with a short name: sockets are below it."""
    folder = Path(tempfile.mkdtemp(prefix="clv-"))
    folder.chmod(0o755)
    daemon = LibvirtDaemon(folder)
    try:
        yield daemon
    finally:
        daemon.close()
