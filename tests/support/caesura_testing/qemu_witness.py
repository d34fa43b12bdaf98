"""The QEMU processes of a sandbox as a test sees them: who is alive, and who runs the guest. Knows nothing of messages.

Every QEMU of ``Sandbox.qemu_host`` has a QMP socket ``witness`` of the test's own; that of a process that shall follow
another one is in ``next/``.
"""

from __future__ import annotations

import json
import socket
from contextlib import suppress
from pathlib import Path
from typing import Any

from caesura.runtime.processes import marked_processes

_ANSWER_S = 2.0


class QemuWitness:
    """See the module. ``mark``: the sandbox's; ``folder``: where the hosts' run folders are."""

    def __init__(self, mark: str, folder: Path) -> None:
        self._mark = mark
        self._folder = folder

    def of(self, vm: str) -> list[int]:
        """Every process of a VM, by whichever process it was started, also one that is not a QEMU yet; but no trial, which is none's."""
        found = []
        for pid in marked_processes(self._mark):
            with suppress(OSError):
                words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
                trial = any(word.endswith(b"/trial,server=on,wait=off") for word in words)
                if vm.encode() in words and b"-machine" in words and not trial:
                    found.append(pid)
        return found

    def running(self, host: str, vm: str) -> list[int]:
        """The processes that run the guest now."""
        found = set()
        for place in ("", "next/"):
            with suppress(OSError, ValueError, KeyError):
                pid, answer = _ask(self._folder / f"{host}.run" / vm / f"{place}witness", "query-status")
                if answer["status"] == "running":
                    found.add(pid)
        return sorted(found)

    def execute(self, host: str, vm: str, command: str, **arguments: object) -> Any:
        """One QMP command to the process that has a VM's settled sockets, as an operator gives one."""
        return _ask(self._folder / f"{host}.run" / vm / "witness", command, arguments)[1]


def _ask(path: Path, command: str, arguments: dict[str, object] | None = None) -> tuple[int, Any]:
    """Who listens on a witness socket, and its answer. An underscore in an argument's name stands for a dash."""
    told = {name.replace("_", "-"): value for name, value in (arguments or {}).items()}
    with socket.socket(socket.AF_UNIX) as link:
        link.settimeout(_ANSWER_S)
        link.connect(str(path))
        pid = int.from_bytes(link.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)[:4], "little")
        lines = link.makefile("rb")
        lines.readline()
        answer: dict[str, Any] = {}
        for each in ({"execute": "qmp_capabilities"}, {"execute": command, "arguments": told}):
            link.sendall(json.dumps(each).encode() + b"\n")
            while "return" not in (answer := json.loads(lines.readline())) and "error" not in answer:
                pass
    return pid, answer["return"]
