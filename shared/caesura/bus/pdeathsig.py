"""Tie a child process to its parent: when the parent dies, however it dies, the kernel ends the child.

``python -m caesura.bus.pdeathsig PARENT_PID PROGRAM ARG...`` becomes PROGRAM with that tie in place. A wrapper
and no ``preexec_fn``, which may deadlock in a process that has threads. Standard library only.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def die_with(parent_pid: int) -> None:
    """Have the kernel send us SIGTERM when our parent ends; exit at once if it has ended already.

    Survives ``exec`` of a program without set-user-id. Linux only; elsewhere it does nothing.
    """
    if sys.platform != "linux":
        return
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    if os.getppid() != parent_pid:
        sys.exit(1)


def main() -> None:
    """Become the program that the arguments name."""
    parent_pid, *program = sys.argv[1:]
    die_with(int(parent_pid))
    os.execv(program[0], program)  # noqa: S606 - no shell, the caller's own argv


if __name__ == "__main__":
    main()
