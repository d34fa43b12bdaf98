"""Notifies systemd that the service is up and alive: sd_notify(3) over its datagram socket, standard library only.

The beat comes from the loop that must not hang, so a loop that hangs is noticed: systemd kills the service after
``WatchdogSec=`` and restarts it. A send never waits: a supervisor that does not read costs a beat, not a resume.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import MutableMapping

_AGAIN_S = 0.5  # s: between two tries to send what the manager did not accept
_VARIABLES = ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID")


class Notifier:
    """The connection to the service manager; without one, every method does nothing.

    Args:
        address: of the socket; empty: there is no service manager. ``@name`` is in the abstract namespace.
        watchdog_s: seconds after which a service that did not beat is killed; 0: never.
    """

    def __init__(self, address: str = "", watchdog_s: float = 0.0) -> None:
        self._address = "\0" + address[1:] if address.startswith("@") else address
        self._watchdog_s = watchdog_s
        self._next_beat = 0.0
        self._unsent = ""

    @classmethod
    def taken_from(cls, environ: MutableMapping[str, str]) -> Notifier:
        """From the environment; its variables are removed, so that no process that we start can notify in our name."""
        address, timeout_us, pid = (environ.pop(name, "") for name in _VARIABLES)
        # WATCHDOG_PID: the variables may have been inherited from another service (sd_watchdog_enabled(3)).
        for_us = not pid or pid == str(os.getpid())
        watchdog_s = int(timeout_us) / 1e6 if for_us and timeout_us.isdigit() else 0.0
        return cls(address if address.startswith(("/", "@")) else "", watchdog_s)

    @property
    def interval_s(self) -> float | None:
        """Seconds between two beats: a third of what is allowed. None: no supervisor expects any."""
        if self._unsent:
            return _AGAIN_S
        return self._watchdog_s / 3 if self._address and self._watchdog_s > 0 else None

    def ready(self) -> None:
        """The service is up. If the manager does not accept it at once, ``beat`` sends it again: it must not be lost."""
        if not self._send("READY=1"):
            self._unsent = "READY=1"

    def stopping(self) -> None:
        """The service ends on request."""
        self._send("STOPPING=1")

    def beat(self) -> None:
        """The loop is alive. May be called at any rate."""
        interval_s, now = self.interval_s, time.monotonic()
        if self._unsent and self._send(self._unsent):
            self._unsent = ""
        if interval_s is not None and now >= self._next_beat:
            self._next_beat = now + interval_s
            self._send("WATCHDOG=1")

    def _send(self, state: str) -> bool:
        """Whether the manager accepted it, or there is none."""
        if not self._address:
            return True
        kind = socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK
        try:
            with socket.socket(socket.AF_UNIX, kind) as out:
                out.sendto(state.encode(), self._address)
        except BlockingIOError:
            return False
        except OSError:
            return True  # there is no receiver: repeating it would not help
        return True
