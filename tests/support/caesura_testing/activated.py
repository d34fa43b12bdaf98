"""Starts a program with listening sockets as a service manager does: sd_listen_fds(3)."""

from __future__ import annotations

import sys
from collections.abc import Sequence

_CODE = """
import fcntl, os, sys
passed = [int(each) for each in sys.argv[1].split(",")]
above = [fcntl.fcntl(each, fcntl.F_DUPFD, 64) for each in passed]
for number, each in enumerate(above, 3):
    os.dup2(each, number)
os.environ.update(LISTEN_FDS=str(len(passed)), LISTEN_PID=str(os.getpid()))
os.execv(sys.argv[2], sys.argv[2:])
"""


def activated(sockets: Sequence[int], program: Sequence[str]) -> list[str]:
    """The command line of ``program`` with these descriptors, which its starter must pass on (``pass_fds``)."""
    return [sys.executable, "-c", _CODE, ",".join(map(str, sockets)), *program]
