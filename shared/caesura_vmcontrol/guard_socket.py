"""Where the pause guard listens, how long a line to it may be, and one question to it. The guard and who asks it share this."""

from __future__ import annotations

import json
import os
import socket
from typing import Any

SOCKET_NAME = "guard.sock"
MAX_LINE_BYTES = 8 * 1024 * 1024  # a thousand VMs with a hundred processes each


def socket_address(folder_handle: int) -> str:
    """The socket's address through an open folder: a unix socket path may have 107 bytes, folders have more."""
    return f"/proc/self/fd/{folder_handle}/{SOCKET_NAME}"


def ask_guard(state_dir: str, request: dict[str, Any], patience_s: float) -> dict[str, Any]:
    """One request over a connection of its own, and the answer. Blocking.

    Raises:
        OSError: there is no guard, it may not be asked by this user, or does not answer within ``patience_s`` seconds.
        ValueError: its answer cannot be read.
    """
    folder = os.open(state_dir, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as guard:
            guard.settimeout(patience_s)
            guard.connect(socket_address(folder))
            guard.sendall(json.dumps(request).encode() + b"\n")
            with guard.makefile("rb") as lines:
                answer = json.loads(lines.readline(MAX_LINE_BYTES))
    finally:
        os.close(folder)
    if not isinstance(answer, dict):
        raise ValueError(f"the pause guard answers {answer!r}")  # noqa: TRY004 - as what is not JSON
    return answer
