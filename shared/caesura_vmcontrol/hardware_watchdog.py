"""The host's hardware watchdog: it resets a host that hangs between two kernels, where none of our programs exists."""

# light imports on purpose: no pathlib here.
# ruff: noqa: PTH123

from __future__ import annotations

import fcntl
import os
import struct
from contextlib import suppress

_DEVICE = "/dev/watchdog"
_SETTIMEOUT = 0xC0045706  # WDIOC_SETTIMEOUT of include/uapi/linux/watchdog.h
_NO_WAY_OUT = "/sys/class/watchdog/watchdog0/nowayout"
_STOP_ON_REBOOT = "/sys/module/watchdog/parameters/stop_on_reboot"
_GOODBYE = b"V"  # an orderly end (Documentation/watchdog/watchdog-api.rst, "magic close")


class HardwareWatchdog:
    """The host's first one. It stays armed when the kernel goes: nothing closes it in an orderly way then.

    Args:
        device: another one in tests only.
        no_way_out: the file that says whether it can never be disarmed; another one in tests only.
        stop_on_reboot: the file that says whether the kernel stops it when it is left; another one in tests only.
    """

    def __init__(
        self,
        device: str = _DEVICE,
        no_way_out: str = _NO_WAY_OUT,
        stop_on_reboot: str = _STOP_ON_REBOOT,
    ) -> None:
        self._device = device
        self._no_way_out = no_way_out
        self._stop_on_reboot = stop_on_reboot
        self._handle: int | None = None

    def arm(self, seconds: int) -> str:
        """Have it reset the host after that; why it will not, or may not.

        One that cannot be disarmed is not armed: it would reset a host that was not left after all, and one that has arrived.
        """
        if self._cannot_be_disarmed():
            return f"{self._device}: it cannot be disarmed again (nowayout)"
        try:
            self._handle = os.open(self._device, os.O_WRONLY | os.O_CLOEXEC)
            fcntl.ioctl(self._handle, _SETTIMEOUT, struct.pack("i", seconds))
        except OSError as error:
            self.disarm()
            return f"{self._device}: {error.strerror or error}"
        if _text(self._stop_on_reboot) not in ("", "0"):
            return (
                f"{self._device} is armed, and its driver may stop it when this kernel is left: watchdog.stop_on_reboot=0 is not on"
                " its command line (caesura host prepare-kexec --check)"
            )
        return ""

    def _cannot_be_disarmed(self) -> bool:
        return _text(self._no_way_out) == "1"

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


def _text(path: str) -> str:
    """Of a small file; empty: this kernel has none."""
    try:
        with open(path, encoding="ascii") as file:
            return file.read().strip()
    except OSError:
        return ""
