"""A container engine's HTTP API over its unix socket, as far as a pause needs it: Docker's, which Podman speaks too.

Every call has one deadline for all that it does: an engine that hangs holds its caller no longer. HTTP/1.0, so that the engine
sends no chunks and ends the connection behind its answer. Sources: Docker Engine API (``ContainerPause``, ``ContainerUnpause``,
``ContainerInspect``); unix(7).
"""

from __future__ import annotations

import json
import re
import socket
import time
from dataclasses import dataclass
from typing import Any, Literal

from caesura_vmcontrol.plan_errors import BadPlan

UNPAUSE_S = 0.5
"""s: what an engine gets to resume a container before the kernel is asked directly; it takes some 12 ms."""
_MOST_BYTES = 8 << 20
_ID = re.compile(r"[0-9a-f]{64}")


class EngineGone(OSError):
    """No engine listens on the socket, or it ended the connection without an answer."""


class EngineSilent(OSError):
    """The engine did not answer in time; the request may take effect later."""


class EngineRefused(OSError):
    """The engine answered with an error: ``status`` is HTTP's."""

    def __init__(self, status: int, why: str) -> None:
        self.status = status
        self.why = why
        super().__init__(f"the container engine says {status}: {why}")


@dataclass(frozen=True)
class EnginePlan:
    """A container: resumed through its engine, and by its cgroup when the engine is dead.

    ``control`` is the freezer file of its cgroup, of the hierarchy ``freezer``: the kernel is its witness.
    ``pid`` and ``start_ticks`` are its first process.
    """

    vm: str
    socket: str
    container: str
    pid: int
    start_ticks: int
    freezer: Literal["cgroup1", "cgroup2"]
    control: str

    def __post_init__(self) -> None:
        if not isinstance(self.socket, str) or not self.socket.startswith("/"):
            raise BadPlan(f"{self.socket!r} is not the path of a socket")
        if not isinstance(self.container, str) or not _ID.fullmatch(self.container):
            raise BadPlan(f"{self.container!r} is not the id of a container")
        if any(type(number) is not int or number <= 0 for number in (self.pid, self.start_ticks)):
            raise BadPlan(f"{self.pid!r} cannot be the first process of a container")


def request(path: str, method: str, target: str, timeout_s: float) -> tuple[int, bytes]:
    """One request; the status and the body of its answer. Blocking, for ``timeout_s`` seconds at most.

    Raises:
        EngineGone, EngineSilent: no answer.
        OSError: the socket cannot be used.
    """
    until = time.monotonic() + timeout_s
    received = bytearray()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        try:
            connection.settimeout(_left(until))
            connection.connect(path)
            head = f"{method} {target} HTTP/1.0\r\nHost: engine\r\nContent-Length: 0\r\n\r\n"
            connection.sendall(head.encode("ascii"))
            while len(received) < _MOST_BYTES:
                connection.settimeout(_left(until))
                part = connection.recv(1 << 16)
                if not part:
                    break
                received += part
        except (TimeoutError, BlockingIOError) as error:  # the latter: its queue of connections is full
            raise EngineSilent(
                f"the container engine at {path} does not answer within {timeout_s:g} s"
            ) from error
        except (FileNotFoundError, ConnectionError) as error:
            raise EngineGone(f"no container engine at {path}: {error.strerror or error}") from error
    head_bytes, _, body = bytes(received).partition(b"\r\n\r\n")
    words = head_bytes.split(b"\r\n", 1)[0].split()
    if len(words) < 2 or not words[0].startswith(b"HTTP/") or not words[1].isdigit():
        raise EngineGone(f"what listens at {path} does not speak HTTP, or ended the connection")
    return int(words[1]), body


def _left(until: float) -> float:
    left = until - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left


def call(path: str, method: str, target: str, timeout_s: float) -> Any:
    """One request; its answer decoded from JSON, None for an empty one. Blocking.

    Raises:
        EngineRefused: the engine's error.
        EngineGone, EngineSilent, OSError: as ``request``.
    """
    status, body = request(path, method, target, timeout_s)
    try:
        answer = json.loads(body) if body.strip() else None
    except ValueError:
        answer = None
    if status >= 400:
        message = answer.get("message", "") if isinstance(answer, dict) else ""
        raise EngineRefused(status, str(message) or body.decode(errors="replace")[:200] or "no reason")
    return answer


def unpause(plan: EnginePlan, timeout_s: float = UNPAUSE_S) -> None:
    """Have the engine resume the container. Blocking. Raises as ``call``."""
    call(plan.socket, "POST", f"/containers/{plan.container}/unpause", timeout_s)
