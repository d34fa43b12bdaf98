"""SIGTERM ends the command as quietly as Ctrl-C does. Imports only what Python has loaded already, since it runs first."""

from __future__ import annotations

import signal
import sys

EXIT_TERMINATED = 128 + signal.SIGTERM


def exit_on_sigterm() -> None:
    """From now on SIGTERM unwinds the stack and exits with 143; while an event loop runs, ``Terminable`` replaces this."""
    signal.signal(signal.SIGTERM, _exit)


def _exit(_number: int, _frame: object) -> None:
    sys.exit(EXIT_TERMINATED)
