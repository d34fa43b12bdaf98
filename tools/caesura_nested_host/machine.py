"""A host in emulation whose kernel can be replaced: started, read and commanded from outside.

Four serial lines: the console, a root shell, and one for each of two guests. Every line that comes out of them is kept with the
instant at which it was read here, which is the only clock that no kernel change touches.
"""

from __future__ import annotations

import base64
import json
import os
import re
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from caesura.runtime.errors import CaesuraError
from caesura_nested_host.image import CARVE_OUT, Image

CONSOLE, SHELL, FIRST, SECOND = range(4)
PATIENCE_S = 400.0
"""s: for anything that a host does: a boot takes 45 s where the machine has nothing else to do, and minutes where it has."""
_BOOT = (
    "root=/dev/vda ro console=ttyS0,115200 loglevel=6 systemd.show_status=0 net.ifnames=0 mitigations=off panic=5"
    " watchdog.stop_on_reboot=0 tsc=reliable random.trust_cpu=on systemd.mask=dev-hugepages.mount systemd.mask=sys-kernel-debug.mount"
)


_TRANSLATED_MIB = 64
"""MiB of translated code that the emulator keeps. By default it is 1 GiB, and then the next kernel is several times slower: whatever it writes to a
page in which the former one had code, the emulator first has to find and drop what was translated of it."""
_THREADS = "single"
"""Of the emulator, for both processors: with several, QEMU 7.2 may translate code on one of them while the other patches it, and a kernel
that patches itself (static keys) then takes the same breakpoint without end. Seen twice in some twenty boots."""


class HostEnded(CaesuraError):
    """The emulator is gone."""


class CommandFailed(CaesuraError):
    """A script ended with another code than 0 on the host."""


@dataclass(frozen=True)
class SerialLine:
    """One line of a serial line. ``at``: seconds, CLOCK_MONOTONIC of this machine."""

    at: float
    text: str


class NestedHost:
    """One host in QEMU TCG.

    Args:
        name: of the host.
        image: what it runs.
        folder: for its disk, sockets and logs; short, for sockets' paths are.
        memory_mib: of the host.
        devices: more of them, as ``-device`` has them.
        environ: more for the emulator's environment, such as the mark of a run.
    """

    def __init__(
        self,
        name: str,
        image: Image,
        folder: Path,
        *,
        memory_mib: int = 1536,
        devices: Sequence[str] = (),
        environ: Mapping[str, str] | None = None,
    ) -> None:
        self.name = name
        self.image = image
        self._folder = folder
        self._memory_mib = memory_mib
        self._devices = tuple(devices)
        self._environ = dict(environ or {})
        self._lines: list[list[SerialLine]] = [[], [], [], []]
        self._changed = threading.Condition()
        self._number = 0
        self._commands = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._sockets: list[socket.socket] = []

    def start(self, *, more: str = "", carve_out: bool = True) -> None:
        """Begin to boot the old kernel, which any reset boots again."""
        self._folder.mkdir(parents=True, exist_ok=True)
        disk = self._folder / "disk.qcow2"
        if not disk.exists():
            argv = (
                "qemu-img",
                "create",
                "-q",
                "-f",
                "qcow2",
                "-F",
                "raw",
                "-b",
                self.image.disk,
                str(disk),
            )
            subprocess.run(argv, check=True, timeout=60)
        words = f"{_BOOT} {f'memmap={CARVE_OUT}' if carve_out else ''} {more}"
        command = [
            *(
                "qemu-system-x86_64",
                "-name",
                self.name,
                "-nodefaults",
                "-no-user-config",
                "-display",
                "none",
            ),
            *(
                "-machine",
                "q35",
                "-cpu",
                "max",
                "-accel",
                f"tcg,thread={_THREADS},tb-size={_TRANSLATED_MIB}",
                "-smp",
                "2",
                "-m",
                str(self._memory_mib),
            ),
            *("-kernel", f"{self.image.boot}/vmlinuz-{self.image.old}"),
            *("-initrd", f"{self.image.boot}/initrd.img-{self.image.old}", "-append", words),
            *("-drive", f"file={disk},format=qcow2,if=virtio,cache=unsafe", "-rtc", "base=utc,clock=host"),
            *("-netdev", "user,id=n0", "-device", "virtio-net-pci,netdev=n0", "-device", "virtio-rng-pci"),
            *(word for device in self._devices for word in ("-device", device)),
            *("-qmp", f"unix:{self._folder}/qmp,server=on,wait=off"),
        ]
        for line in range(4):
            command += [
                "-chardev",
                f"socket,id=c{line},path={self._folder}/s{line},server=on,wait=on",
                "-serial",
                f"chardev:c{line}",
            ]
        log = (self._folder / "qemu.log").open("wb")
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, **self._environ},
            start_new_session=True,  # Ctrl-C is for who started it
        )
        log.close()
        # In their order: the emulator waits for each in turn.
        self._sockets = [self._connect(line) for line in range(4)]
        for line, connection in enumerate(self._sockets):
            threading.Thread(target=self._read, args=(line, connection), daemon=True).start()

    def _connect(self, line: int) -> socket.socket:
        end = time.monotonic() + 60
        while True:
            connection = socket.socket(socket.AF_UNIX)
            try:
                connection.connect(f"{self._folder}/s{line}")
            except OSError as error:
                connection.close()
                if self._process is None or self._process.poll() is not None or time.monotonic() > end:
                    raise HostEnded((self._folder / "qemu.log").read_text()) from error
                time.sleep(0.02)
            else:
                return connection

    def _read(self, line: int, connection: socket.socket) -> None:
        waiting = b""
        with (self._folder / f"s{line}.log").open("ab", buffering=0) as log:
            while True:
                try:
                    data = connection.recv(65536)
                except OSError:
                    data = b""
                at = time.monotonic()
                waiting += data
                *whole, waiting = waiting.split(b"\n")
                for text in whole:
                    log.write(f"{at:.3f} ".encode() + text.rstrip(b"\r") + b"\n")
                with self._changed:
                    self._lines[line] += [
                        SerialLine(at, text.rstrip(b"\r").decode(errors="replace")) for text in whole
                    ]
                    if not data:
                        self._sockets = []
                    self._changed.notify_all()
                if not data:
                    connection.close()
                    return

    def lines(self, line: int, since: float = 0.0) -> list[SerialLine]:
        """What came out of a serial line at or after an instant."""
        with self._changed:
            return [each for each in self._lines[line] if each.at >= since]

    def wait_for(
        self, line: int, pattern: str, *, since: float = 0.0, patience_s: float = PATIENCE_S
    ) -> SerialLine:
        """The first line at or after an instant that the pattern is found in.

        Raises:
            HostEnded: the emulator ended.
            TimeoutError: with the last lines of the console.
        """
        wanted = re.compile(pattern)
        end = time.monotonic() + patience_s
        looked = 0
        with self._changed:
            while True:
                known = self._lines[line]
                for each in known[looked:]:
                    if each.at >= since and wanted.search(each.text):
                        return each
                looked = len(known)
                if not self._sockets:
                    raise HostEnded(f"{self.name} ended\n{self._tails()}")
                if (left := end - time.monotonic()) <= 0:
                    raise TimeoutError(
                        f"{self.name}: no {pattern!r} on line {line} in {patience_s} s\n{self._tails()}"
                    )
                self._changed.wait(min(left, 5))

    def last_lines(self) -> str:
        """The ends of all serial lines, for failure reports."""
        with self._changed:
            return self._tails()

    def _tails(self) -> str:
        tails = ((CONSOLE, 40), (SHELL, 10), (FIRST, 4), (SECOND, 4))
        return "\n".join(
            f"{line}: {each.at:.2f} {each.text}"
            for line, count in tails
            for each in self._lines[line][-count:]
        )

    def wait_shell(self, *, since: float = 0.0) -> str:
        """Wait for the root shell of a boot; the boot id."""
        return self.wait_for(SHELL, r"^@@ready .*@@", since=since).text.split()[1].strip("@")

    def run(self, script: str, *, patience_s: float = PATIENCE_S, check: bool = True) -> str:
        """Run a shell script as root; what it printed, both ways.

        Raises:
            CommandFailed: it did, and ``check``.
        """
        with self._commands:
            self._number += 1
            begun = time.monotonic()
            self._send(f"{self._number} {base64.b64encode(script.encode()).decode()}\n")
            ended = self.wait_for(SHELL, rf"^@@end {self._number} \d+@@", since=begun, patience_s=patience_s)
            found = [each.text for each in self.lines(SHELL, begun) if each.at <= ended.at]
        first = next(index for index, text in enumerate(found) if text == f"@@begin {self._number}@@")
        last = found.index(ended.text)
        text = "\n".join(found[first + 1 : last])
        code = int(ended.text.split()[2].rstrip("@"))
        if check and code != 0:
            raise CommandFailed(f"{script}: ended with {code}:\n{text}")
        return text

    def begin(self, script: str) -> float:
        """Send a script whose end is not awaited, since the kernel may change in it; the instant before."""
        with self._commands:
            self._number += 1
            begun = time.monotonic()
            self._send(f"{self._number} {base64.b64encode(script.encode()).decode()}\n")
            return begun

    def _send(self, text: str) -> None:
        # A serial line has a small buffer, and no flow control that a shell would notice.
        data = text.encode()
        for begin in range(0, len(data), 512):
            self._sockets[SHELL].sendall(data[begin : begin + 512])

    def put(self, path: str, text: str, *, mode: str = "644") -> None:
        """Write a file."""
        self.run(
            f"mkdir -p $(dirname {path}); cat >{path} <<'END-OF-FILE'\n{text}\nEND-OF-FILE\nchmod {mode} {path}"
        )

    def json(self, script: str) -> Any:
        """What a command of the host prints as JSON."""
        return json.loads(self.run(script))

    def qmp(self, command: str) -> None:
        """A command for the emulator, such as ``system_reset``."""
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(f"{self._folder}/qmp")
            stream = connection.makefile("rwb")
            stream.readline()
            for each in ("qmp_capabilities", command):
                stream.write(json.dumps({"execute": each}).encode() + b"\n")
                stream.flush()
                while "return" not in json.loads(stream.readline()):
                    pass

    def stop(self) -> None:
        """End the emulator."""
        process, self._process = self._process, None
        if process is None:
            return
        with suppress(ProcessLookupError):
            process.send_signal(signal.SIGKILL)
        process.wait(60)
        for connection in self._sockets:
            connection.close()


@contextmanager
def running(*hosts: NestedHost, **how: Any) -> Iterator[None]:
    """Start them, and end them whatever happens."""
    try:
        for each in hosts:
            each.start(**how)
        yield
    finally:
        for each in hosts:
            each.stop()
