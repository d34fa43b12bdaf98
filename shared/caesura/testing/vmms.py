"""The QEMU processes of a sandbox as a test sees them: who is alive, and who runs the guest. Knows nothing of messages.

Every QEMU of ``Sandbox.qemu_host`` has a QMP socket ``witness`` of the test's own; that of a process that shall follow
another one is in ``next/``.
"""

from __future__ import annotations

import json
import socket
from contextlib import suppress
from pathlib import Path

from caesura.runtime.processes import marked_processes

_ANSWER_S = 2.0


class Vmms:
    """See the module. ``mark``: the sandbox's; ``folder``: where the hosts' run folders are."""

    def __init__(self, mark: str, folder: Path) -> None:
        self._mark = mark
        self._folder = folder

    def of(self, vm: str) -> list[int]:
        """Every process of a VM, whoever started it, also one that is not a QEMU yet."""
        found = []
        for pid in marked_processes(self._mark):
            with suppress(OSError):
                words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
                if vm.encode() in words and b"-machine" in words:
                    found.append(pid)
        return found

    def running(self, host: str, vm: str) -> list[int]:
        """The processes that run the guest now."""
        found = set()
        for place in ("", "next/"):
            with suppress(OSError, ValueError, KeyError):
                pid, status = _ask(self._folder / f"{host}.run" / vm / f"{place}witness")
                if status == "running":
                    found.add(pid)
        return sorted(found)


def _ask(path: Path) -> tuple[int, str]:
    """Who listens on a witness socket, and its run state."""
    with socket.socket(socket.AF_UNIX) as link:
        link.settimeout(_ANSWER_S)
        link.connect(str(path))
        pid = int.from_bytes(link.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)[:4], "little")
        lines = link.makefile("rb")
        lines.readline()
        for command in ("qmp_capabilities", "query-status"):
            link.sendall(json.dumps({"execute": command}).encode() + b"\n")
            while "return" not in (answer := json.loads(lines.readline())):
                pass
    return pid, answer["return"]["status"]
