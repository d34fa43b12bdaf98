"""Runs slirp4netns or pasta for as long as the rehearsal lives. Run by path with ``python -I -S``: standard library only.

``outbound_helper.py PROGRAM ARGUMENT...`` ends the program when the other end of standard input is closed, however the rehearsal ended; both hold on to
a network that nobody uses any more. If the program ends first, its last words go out there.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile

PR_SET_PDEATHSIG = 1
_SAID_BYTES = 500


def main(argv: list[str]) -> int:
    """See the module."""
    outside = socket.socket(fileno=0)
    with tempfile.TemporaryFile() as said:
        try:
            tool = subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=said,
                preexec_fn=_end_with_us,  # noqa: PLW1509 - there are no threads here
            )
        except OSError as error:
            outside.sendall(f"cannot start {argv[0]}: {error.strerror}".encode())
            return 1
        poll = select.poll()
        poll.register(outside, select.POLLIN | select.POLLHUP)
        poll.register(os.pidfd_open(tool.pid), select.POLLIN)
        ready = [handle for handle, _ in poll.poll()]
        if outside.fileno() in ready:
            tool.kill()
            tool.wait()
            return 0
        tool.wait()
        said.seek(0)
        outside.sendall(
            said.read()[-_SAID_BYTES:].strip() or f"{argv[0]} ended with {tool.returncode}".encode()
        )
    return 1


def _end_with_us() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
