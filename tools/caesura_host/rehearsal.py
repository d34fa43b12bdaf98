"""Rehearses a change of the host's kernel while the host holds no guest: the same jump as in an update, so that it is measured.

The host updater makes the figure of it once the next kernel is up; a plan needs one.
"""

from __future__ import annotations

import json
import os
import socket
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from caesura.lifecycle.loaded_kernel import LoadedKernel
from caesura_host.host_files import HostError
from caesura_vmcontrol.guard_socket import socket_address

_ANSWER_S = 10.0  # s: the guard answers in milliseconds
_LEAVE_S = 30.0  # s: within which the guard must have left the kernel, or it stays
_DEADLINE_S = 600.0  # s: of an operation that has no VM, so nobody is resumed by it
_PROGRAMS = ("qemu-system-", "qemu-kvm", "kvm", "firecracker", "cloud-hyperviso", "crosvm", "VBoxHeadless")
"""As ``comm`` has them: its first 15 characters."""
_DEVICE = "/dev/kvm"


def guests_here(proc: Path = Path("/proc")) -> list[str]:
    """Processes that may hold a guest: a VMM by its name, or whatever has /dev/kvm open. Sentences for people.

    A process of another user is not looked into unless this is root.
    """
    found = []
    for folder in sorted(proc.glob("[0-9]*"), key=lambda each: int(each.name)):
        try:
            name = (folder / "comm").read_text(errors="replace").strip()
            if name.startswith(_PROGRAMS) or _has_kvm(folder):
                found.append(f"{name} (pid {folder.name})")
        except OSError:
            continue  # it has ended
    return found


def _has_kvm(folder: Path) -> bool:
    try:
        return any(os.readlink(each) == _DEVICE for each in (folder / "fd").iterdir())  # noqa: PTH115 - no resolution
    except OSError:
        return False


def refuse_guests(guests: list[str]) -> None:
    """Raises HostError: the host holds guests, which a rehearsal would end."""
    if guests:
        raise HostError(
            f"guests run on this host, and a rehearsal would end them: {', '.join(guests)}. Shut them down or move them away first"
        )


class GuardConnection:
    """One connection to the pause guard of a state folder.

    Raises:
        HostError: it cannot be reached.
    """

    def __init__(self, state_dir: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            folder = os.open(state_dir, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                self._socket.settimeout(_ANSWER_S)
                self._socket.connect(socket_address(folder))
            finally:
                os.close(folder)
        except OSError as error:
            self._socket.close()
            raise HostError(
                f"the pause guard of {state_dir} cannot be reached ({error.strerror or error}):"
                " systemctl start caesura-pause-guard"
            ) from error
        self._lines = self._socket.makefile("rb")

    def close(self) -> None:
        """The guard notices it."""
        self._lines.close()
        self._socket.close()

    def ask(self, request: dict[str, Any], patience_s: float = _ANSWER_S) -> dict[str, Any]:
        """One request, one answer.

        Raises:
            HostError: it refuses, or does not answer.
        """
        try:
            self._socket.settimeout(patience_s)
            self._socket.sendall(json.dumps(request).encode() + b"\n")
            answer = json.loads(self._lines.readline())
        except (OSError, ValueError) as error:
            raise HostError(f"the pause guard does not answer: {error}") from error
        if not answer.get("ok"):
            raise HostError(f"the pause guard refuses: {answer.get('error', answer)}")
        return dict(answer)


def leave(
    loaded: LoadedKernel,
    *,
    state_dir: str,
    carve_out: str,
    watchdog_s: int,
    before_leaving: Callable[[], None] = lambda: None,
) -> None:
    """Have the guard start the loaded kernel, without guests. Returns only by raising.

    Args:
        loaded: what was loaded in this boot.
        state_dir: of the host updater and its guard.
        carve_out: where the memory that stays is mounted.
        watchdog_s: after which a hardware watchdog resets a host that hangs; 0: none.
        before_leaving: called when the guard is ready; the last that is seen of this kernel.

    Raises:
        HostError: the guard refuses, cannot do it, or is busy with another operation; the kernel is as it was.
    """
    connection = GuardConnection(state_dir)
    operation = f"rehearsal-{uuid.uuid4()}"
    try:
        status = connection.ask({"do": "status"})
        if status["intent"] is not None:
            raise HostError(
                f"the pause guard is busy with operation {status['intent']['operation']}: wait until it has ended"
            )
        connection.ask(
            {
                "do": "arm",
                "operation": operation,
                "boot_id": loaded.boot_id,
                "deadline": time.monotonic() + _DEADLINE_S,
                "plans": [],
                "kernel_change": {
                    "expected_release": loaded.release,
                    "carve_out": carve_out,
                    "rehearsal": True,
                    "watchdog_s": watchdog_s,
                },
            }
        )
        try:
            before_leaving()
            connection.ask(
                {"do": "leave", "operation": operation, "by": time.monotonic() + _LEAVE_S},
                _LEAVE_S + _ANSWER_S,
            )
        finally:
            with suppress(
                HostError
            ):  # a guard that is away finds an operation without VMs, and nothing to do
                connection.ask({"do": "disarm", "operation": operation})
    finally:
        connection.close()
