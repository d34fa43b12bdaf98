"""Whether this host's wall clock may be the reference of its guests' clocks.

It always may, but for a host whose kernel was replaced where the processor's counter did not carry the time over: a kernel sets its
clock from the RTC, up to half a second beside the truth, and guests that are set by it would be wrong and be called right.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from caesura.runtime.logs import get_logger
from caesura_vmcontrol.durable_files import write_durably
from caesura_vmcontrol.procfs import boot_id

_FILE = "host-clock.json"
_STATUS_AT = 40  # struct timex of include/uapi/linux/timex.h, on 64 bits: modes, four longs, status
_TIMEX_BYTES = 256  # a little more than the structure's 208
_UNSYNC = 0x40  # STA_UNSYNC: no NTP client has set the clock since it was last set otherwise

_log = get_logger("caesura.clock")


def is_synchronized() -> bool:
    """Whether an NTP client keeps the host's clock, as the kernel says (adjtimex(2)). False where we may not ask."""
    import ctypes  # noqa: PLC0415 - few hosts need it

    timex = ctypes.create_string_buffer(_TIMEX_BYTES)  # modes 0: nothing is set
    if ctypes.CDLL(None, use_errno=True).adjtimex(timex) < 0:
        return False
    return not int.from_bytes(timex.raw[_STATUS_AT : _STATUS_AT + 4], "little") & _UNSYNC


class ReferenceClock:
    """See the module. Its calls do not wait for anything but a small file, when the answer changes.

    Args:
        state_dir: the state folder, which outlives this process: the clock does, too.
        synchronized: whether NTP keeps the clock; injected by tests only.
    """

    def __init__(self, state_dir: Path, synchronized: Callable[[], bool] = is_synchronized) -> None:
        self._folder = state_dir
        self._synchronized = synchronized
        self._uncertainty_s = self._read()

    def distrust(self, uncertainty_s: float) -> None:
        """The clock may be off by so much, until NTP has set it."""
        self._uncertainty_s = uncertainty_s
        data = json.dumps({"boot_id": boot_id(), "uncertainty_s": uncertainty_s})
        try:
            write_durably(str(self._folder), _FILE, data.encode())
        except OSError as error:
            _log.error("host_clock.not_written", why=str(error))
        if why := self.error():
            _log.error("host_clock.not_trusted", why=why)

    def error(self) -> str:
        """Why no guest may be set by this clock now; empty: it may."""
        if not self._uncertainty_s:
            return ""
        if self._synchronized():
            _log.info("host_clock.trusted", uncertainty_s=self._uncertainty_s)
            self._uncertainty_s = 0.0
            with suppress(OSError):
                (self._folder / _FILE).unlink()
            return ""
        return (
            f"the host's own clock may be {self._uncertainty_s:g} s off since its kernel was replaced, until NTP has set it: "
            "see timedatectl"
        )

    def _read(self) -> float:
        """What an earlier run of this service wrote down in this boot."""
        with suppress(OSError, ValueError, KeyError, TypeError):
            data = json.loads((self._folder / _FILE).read_bytes())
            if data["boot_id"] == boot_id():
                return float(data["uncertainty_s"])
        return 0.0
