"""A node of Proxmox VE as far as files, sockets and QEMU processes go: its layout in a folder, and its programs' habits.

Configurations are in Proxmox's format; QEMU is started as Proxmox 9 starts it (``-daemonize``, a monitor that is asked and one that
connects to qmeventd), less what needs Proxmox's own QEMU, KVM, or disks. There is no real node in these tests.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import struct
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Self

from caesura_testing.guests import QEMU
from caesura_testing.patience import patient
from caesura_vmcontrol.procfs import alive, read_process

_START_S = 30.0
_RETRY_S = 0.1
"""s: between two tries of Proxmox's tools at a full backlog (``PVE::QMPClient``)."""

CONFIG = """#{title}, in the 2nd rack
{agent}boot: order=scsi0;ide2
{lock}cores: 1
cpu: x86-64-v2-AES
ide2: none,media=cdrom
memory: {memory}
meta: creation-qemu=9.0.2,ctime=1725975013
name: {title}
net0: virtio=BC:24:11:2C:69:EC,bridge=vmbr0,firewall=1
numa: 0
ostype: l26
scsihw: virtio-scsi-single
smbios1: uuid=b3247ab1-1fe6-428e-965b-08a1b64a8746
sockets: 1
{tags}vmgenid: 7079e97c-50e3-4079-afe7-23e67566b946

[before-update]
boot: order=scsi0;ide2
cores: 1
lock: snapshot
memory: {memory}
name: older
snaptime: 1737549549
tags: caesura-set-old;caesura-ud-9
vmstate: local:vm-state
"""


class ProxmoxNode:
    """See the module. ``config_dir`` and ``run_dir`` are for the host file."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config_dir = folder / "pve"
        self.run_dir = folder / "run"
        self.config_dir.mkdir()
        self.run_dir.mkdir()
        self.events = EventDaemon(folder / "qmeventd.sock")

    def config(
        self,
        vmid: int,
        title: str = "",
        *,
        tags: Sequence[str] = (),
        lock: str = "",
        agent: str = "",
        memory: int = 32,
    ) -> None:
        """Write a configuration as Proxmox does: another file under the same name."""
        file = self.config_dir / f"{vmid}.conf"
        text = CONFIG.format(
            title=title or f"web-{vmid}",
            memory=memory,
            tags=f"tags: {';'.join(tags)}\n" if tags else "",
            lock=f"lock: {lock}\n" if lock else "",
            agent=f"agent: {agent}\n" if agent else "",
        )
        made = file.with_suffix(".tmp")
        made.write_text(text)
        made.rename(file)

    def set_lock(self, vmid: int, lock: str) -> None:
        """As each of Proxmox's tasks does at its start; empty: at its end."""
        file = self.config_dir / f"{vmid}.conf"
        lines = file.read_text().splitlines(keepends=True)
        section = lines.index("[before-update]\n")
        kept = [line for at, line in enumerate(lines) if at > section or not line.startswith("lock:")]
        made = file.with_suffix(".tmp")
        made.write_text("".join([lines[0], f"lock: {lock}\n" if lock else "", *kept[1:]]))
        made.rename(file)

    def move_away(self, vmid: int) -> None:
        """As a migration does at its end: the configuration is another node's."""
        (self.folder / "other-node").mkdir(exist_ok=True)
        (self.config_dir / f"{vmid}.conf").rename(self.folder / "other-node" / f"{vmid}.conf")

    def start(self, vmid: int, *extra: str, memory: int = 32) -> int:
        """As ``qm start``; the pid. ``extra``: as the key ``args`` of a configuration."""
        run = self.run_dir
        argv = [
            *(QEMU, "-name", f"web-{vmid},debug-threads=on", "-no-shutdown"),
            *("-chardev", f"socket,id=qmp,path={run}/{vmid}.qmp,server=on,wait=off"),
            *("-mon", "chardev=qmp,mode=control"),
            *("-chardev", f"socket,id=qmp-event,path={self.events.path},reconnect=5"),
            *("-mon", "chardev=qmp-event,mode=control"),
            *("-pidfile", f"{run}/{vmid}.pid", "-daemonize"),
            *("-smbios", "type=1,uuid=b3247ab1-1fe6-428e-965b-08a1b64a8746"),
            *("-smp", "1,sockets=1,cores=1,maxcpus=1", "-nodefaults", "-boot", "menu=on,strict=on"),
            *("-vnc", f"unix:{run}/{vmid}.vnc", "-cpu", "qemu64", "-m", str(memory)),
            *("-device", "pci-bridge,id=pci.1,chassis_nr=1,bus=pci.0,addr=0x1e"),
            *("-device", "vmgenid,guid=7079e97c-50e3-4079-afe7-23e67566b946"),
            *("-device", "piix3-usb-uhci,id=uhci,bus=pci.0,addr=0x1.0x2"),
            *("-chardev", f"socket,path={run}/{vmid}.qga,server=on,wait=off,id=qga0"),
            *("-device", "virtio-serial,id=qga0,bus=pci.0,addr=0x8"),
            *("-device", "virtserialport,chardev=qga0,name=org.qemu.guest_agent.0"),
            *("-device", "VGA,id=vga,bus=pci.0,addr=0x2", "-accel", "tcg"),
            *("-machine", "hpet=off,type=pc", *extra),
        ]
        with (self.folder / f"{vmid}.log").open("ab") as log:
            done = subprocess.run(argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log, timeout=patient(_START_S), check=False)  # fmt: skip
        assert done.returncode == 0, (self.folder / f"{vmid}.log").read_text()
        return self.pid(vmid)

    def create(self, vmid: int, title: str = "", **config: Any) -> int:
        """A configuration, and a VM of it that runs."""
        self.config(vmid, title, **config)
        return self.start(vmid)

    def pid(self, vmid: int) -> int:
        """Of a VM that was started."""
        return int((self.run_dir / f"{vmid}.pid").read_text())

    def qmp(self, vmid: int, command: str, **arguments: object) -> Any:
        """As Proxmox's tools: connect, one command, disconnect; what QEMU returns."""
        return ask(self.run_dir / f"{vmid}.qmp", command, patient(5), arguments)["return"]

    def status(self, vmid: int) -> str:
        """QEMU's word."""
        return str(self.qmp(vmid, "query-status")["status"])

    def kill(self, vmid: int) -> None:
        """End a VM at once, and wait until it has ended."""
        with suppress(OSError, ValueError):
            pid = self.pid(vmid)
            process = read_process(pid)
            command_line = Path(f"/proc/{pid}/cmdline").read_bytes()
            if process is None or f"{self.run_dir}/{vmid}.pid".encode() not in command_line:
                return  # not its process any more
            os.kill(pid, signal.SIGKILL)
            until = time.monotonic() + patient(10)
            while alive(pid, process.start_ticks):
                assert time.monotonic() < until, f"process {pid} does not end"
                time.sleep(0.005)

    def remove_all(self) -> None:
        """End every VM, and remove its files."""
        for file in self.run_dir.glob("*.pid"):
            self.kill(int(file.stem))
        for folder in (self.run_dir, self.config_dir):
            for file in folder.iterdir():
                file.unlink()

    def close(self) -> None:
        """End everything, and remove the folder."""
        for file in self.run_dir.glob("*.pid"):
            self.kill(int(file.stem))
        self.events.close()
        shutil.rmtree(self.folder, ignore_errors=True)


@contextmanager
def proxmox_node() -> Iterator[ProxmoxNode]:
    """One, in a folder with a short name: sockets are below it."""
    node = ProxmoxNode(Path(tempfile.mkdtemp(prefix="cpx-")))
    try:
        yield node
    finally:
        node.close()


class EventDaemon:
    """As qmeventd: every QEMU connects to it, and it gets every event. It is the witness of pauses."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.pauses: list[tuple[int, float, float]] = []
        """Pid, from, to (CLOCK_MONOTONIC), in the order of their ends."""
        self.paused: dict[int, float] = {}
        self.at_once: set[frozenset[int]] = set()
        """Which processes were paused at the same time."""
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen(16)
        threading.Thread(target=self._accept, name="qmeventd", daemon=True).start()

    def forget(self) -> None:
        """Begin again."""
        self.pauses, self.paused, self.at_once = [], {}, set()

    def _accept(self) -> None:
        with suppress(OSError):  # closed
            while True:
                connection, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        pid = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0]
        with suppress(OSError, ValueError), connection, connection.makefile("rb") as lines:
            connection.sendall(b'{"execute":"qmp_capabilities"}\n')
            for line in lines:
                self._on_message(pid, json.loads(line).get("event", ""))
        self._on_message(pid, "RESUME")

    def _on_message(self, pid: int, event: str) -> None:
        if event == "STOP":
            self.paused[pid] = time.monotonic()
            self.at_once.add(frozenset(self.paused))
        elif event == "RESUME" and (since := self.paused.pop(pid, None)) is not None:
            self.pauses.append((pid, since, time.monotonic()))

    def close(self) -> None:
        """QEMUs that live try to connect again."""
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()


def ask(path: Path, command: str, timeout_s: float, arguments: Any = None) -> dict[str, Any]:
    """One command over a connection of its own, as Proxmox's tools give it. Raises OSError."""
    until = time.monotonic() + timeout_s
    with socket.socket(socket.AF_UNIX) as link:
        while True:
            link.settimeout(0)
            try:
                link.connect(str(path))
                break
            except BlockingIOError:  # its backlog is full
                if time.monotonic() >= until:
                    raise TimeoutError(f"{path} has no room for another client") from None
                time.sleep(_RETRY_S)
        link.settimeout(max(until - time.monotonic(), 0.001))
        with link.makefile("rb") as lines:
            if b"QMP" not in lines.readline():
                raise ConnectionError(f"{path} does not greet")
            answer: dict[str, Any] = {}
            for request in (
                {"execute": "qmp_capabilities"},
                {"execute": command, "arguments": arguments or {}},
            ):
                link.sendall(json.dumps(request).encode() + b"\n")
                while "return" not in (answer := json.loads(lines.readline() or b'{"return": null}')):
                    assert "error" not in answer, answer
    return answer


class StatusDaemon:
    """As pvestatd, and oftener: asks every VM for its status again and again, and notes how long it waited.

    Args:
        sockets: of the VMs.
    """

    def __init__(self, sockets: Sequence[Path], pause_s: float = 0.1) -> None:
        self.waits: list[float] = []
        """How long each answer took, from the first try to connect, in seconds."""
        self.errors: list[str] = []
        self._stop = threading.Event()
        self._threads = [
            threading.Thread(
                target=self._poll, args=(path, pause_s), name=f"pvestatd {path.name}", daemon=True
            )
            for path in sockets
        ]

    def _poll(self, path: Path, pause_s: float) -> None:
        while not self._stop.wait(pause_s):
            began = time.monotonic()
            try:
                ask(path, "query-status", patient(5))
            except OSError as error:
                self.errors.append(f"{path.name}: {error!r}")
            self.waits.append(time.monotonic() - began)

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(patient(10))


def until(wanted: Callable[[], bool], what: str, timeout_s: float = 10.0) -> None:
    """Wait until something is so. Raises AssertionError."""
    end = time.monotonic() + patient(timeout_s)
    while not wanted():
        assert time.monotonic() < end, f"not within {timeout_s:g} s: {what}"
        time.sleep(0.01)
