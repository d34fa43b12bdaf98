"""The host's hardware watchdog: it resets a host that hangs between two kernels, where none of our programs exists."""

from __future__ import annotations

import fcntl
import os
import struct
from contextlib import suppress

_DEVICE = "/dev/watchdog"
_SETTIMEOUT = 0xC0045706  # WDIOC_SETTIMEOUT of include/uapi/linux/watchdog.h
_GOODBYE = b"V"  # an orderly end (Documentation/watchdog/watchdog-api.rst, "magic close")


class HardwareWatchdog:
    """The host's first one. It stays armed when the kernel goes: nothing closes it in an orderly way then.

    Args:
        device: another one in tests only.
    """

    def __init__(self, device: str = _DEVICE) -> None:
        self._device = device
        self._handle: int | None = None

    def arm(self, seconds: int) -> str:
        """Have it reset the host after that; why not, if not."""
        try:
            self._handle = os.open(self._device, os.O_WRONLY | os.O_CLOEXEC)
            fcntl.ioctl(self._handle, _SETTIMEOUT, struct.pack("i", seconds))
        except OSError as error:
            self.disarm()
            return f"{self._device}: {error.strerror or error}"
        return ""

    def disarm(self) -> None:
        """The host does not hang."""
        if self._handle is not None:
            with suppress(OSError):
                os.write(self._handle, _GOODBYE)
            os.close(self._handle)
            self._handle = None

    def disarm_former(self) -> str:
        """Disarm what the former kernel armed, if this kernel's driver has taken it over; why not, if not."""
        try:
            self._handle = os.open(self._device, os.O_WRONLY | os.O_CLOEXEC)
        except OSError:
            return ""  # there is none, or the system's own manager has it by now
        try:
            os.write(self._handle, _GOODBYE)
        except OSError as error:
            return f"{self._device}: {error.strerror or error}"
        finally:
            os.close(self._handle)
            self._handle = None
        return ""
